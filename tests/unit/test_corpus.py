"""The embedded corpus: the same everywhere, split cleanly, and two sides that say the same."""

import re
import subprocess
import sys

import pytest
from num2words import num2words

from fairseq_codistill.demo import corpus

SIZES = (600, 60, 60)


@pytest.fixture(scope="module")
def splits():
    return corpus.make_splits(1, SIZES)


def test_same_seed_gives_the_same_pairs(splits):
    assert corpus.make_splits(1, SIZES) == splits


def test_another_seed_gives_other_pairs(splits):
    other = corpus.make_splits(2, SIZES)
    assert len(set(other[0]) & set(splits[0])) < SIZES[0] / 4


def test_splits_have_the_sizes_asked_for(splits):
    assert tuple(len(split) for split in splits) == SIZES


def test_no_sentence_occurs_twice_in_either_language(splits):
    for side in (0, 1):
        sentences = [pair[side] for split in splits for pair in split]
        assert len(sentences) == len(set(sentences))


def test_every_slot_is_filled_on_both_sides(splits):
    text = " ".join(sentence for split in splits for pair in split for sentence in pair)
    assert "{" not in text
    assert "}" not in text
    assert re.search(r"\d", text) is None


def test_templates_have_the_same_slots_in_both_languages():
    for german, english in corpus.TEMPLATES:
        assert sorted(re.findall(r"\{\w\}", german)) == sorted(re.findall(r"\{\w\}", english))


def test_both_sides_name_the_same_number(splits):
    """Plain numbers are looked up the slow way: by writing out every number below a thousand in both languages."""
    german = {corpus._capitalise(num2words(i, lang="de")): i for i in range(1000)}
    english = {corpus._capitalise(num2words(i, lang="en")): i for i in range(1000)}
    found = [pair for split in splits for pair in split if pair[0] in german]
    assert len(found) > 10
    for german_words, english_words in found:
        assert german[german_words] == english[english_words]


@pytest.mark.parametrize(
    ("german", "english"),
    [("halb vier", "half past three"), ("Viertel vor eins", "a quarter to one"), ("zwei vor zwölf", "two to twelve")],
)
def test_clock_times_count_from_the_right_hour(german, english):
    pairs = {corpus._clock_time(rng) for rng in map(corpus.random.Random, range(4000))}
    assert {e for g, e in pairs if g == german} == {english}


def test_more_sentences_than_there_are_is_an_error_not_an_endless_loop(monkeypatch):
    monkeypatch.setattr(corpus, "TEMPLATES", (("{s} Fenster", "{s} windows"),))
    with pytest.raises(ValueError, match="only 98 different pairs found where 120 are wanted"):
        corpus.make_splits(1, (100, 10, 10))


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        corpus.make_splits(1, (10, 0, 10))


def test_command_line_writes_line_aligned_files(tmp_path):
    command = [sys.executable, "-m", "fairseq_codistill.demo.corpus", "--out", str(tmp_path / "raw"), "--seed", "1"]
    subprocess.run([*command, "--num-train", "600", "--num-valid", "60", "--num-test", "60"], check=True)
    for split, pairs in zip(corpus.SPLITS, corpus.make_splits(1, SIZES), strict=True):
        sides = [(tmp_path / "raw" / f"{split}.{language}").read_text("utf-8") for language in corpus.LANGUAGES]
        assert [side.count("\n") for side in sides] == [len(pairs), len(pairs)]
        assert list(zip(*(side.splitlines() for side in sides), strict=True)) == pairs
