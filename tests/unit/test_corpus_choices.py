"""A corpus of one's own: which files are what, what is held out, and which choices follow from text and link."""

import gzip
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes/tools"))
import bpe
import choose
import own_text
import translations


def put(folder, name, lines, packed=False):
    text = "".join(f"{line}\n" for line in lines)
    folder.mkdir(parents=True, exist_ok=True)
    if packed:
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    else:
        (folder / name).write_text(text, encoding="utf-8")


def sentences(language, count, first=0):
    return [f"{language} sentence number {number} of many" for number in range(first, first + count)]


def test_one_pair_of_files_is_split_the_same_way_every_time_and_whatever_the_order(tmp_path):
    pairs = list(zip(sentences("en", 600), sentences("fr", 600), strict=True))
    found = []
    for number in range(2):
        put(tmp_path / str(number), "mine.en", [pair[0] for pair in pairs], packed=number == 1)
        put(tmp_path / str(number), "mine.fr", [pair[1] for pair in pairs])
        found.append(own_text.splits_of(tmp_path / str(number), "en", "fr")[0])
        random.Random(1).shuffle(pairs)
    assert {name: len(split) for name, split in found[0].items()} == {"train": 542, "test": 30, "valid": 28}
    assert found[0]["test"] == found[1]["test"]
    assert found[0]["valid"] == found[1]["valid"]
    assert sorted(found[0]["train"]) == sorted(found[1]["train"])


def test_what_is_held_out_is_not_trained_on_however_often_it_stands_there(tmp_path):
    english = sentences("en", 300) * 2
    put(tmp_path, "mine.en", english)
    put(tmp_path, "mine.fr", [f"fr {line} {number}" for number, line in enumerate(english)])
    splits, _ = own_text.splits_of(tmp_path, "en", "fr")
    sources = {name: {pair[0] for pair in split} for name, split in splits.items()}
    assert not sources["train"] & (sources["valid"] | sources["test"])
    assert not sources["valid"] & sources["test"]
    assert len(splits["test"]) == len(sources["test"])


def test_splits_that_are_given_are_taken_whole_and_leave_training(tmp_path):
    for language in ("en", "fr"):
        put(tmp_path, f"train.{language}", sentences(language, 300))
        put(tmp_path, f"val.{language}", sentences(language, 30, first=290))
        put(tmp_path, f"test_2016.{language}", ["", *sentences(language, 9, first=900)])
    splits, said = own_text.splits_of(tmp_path, "en", "fr")
    assert {name: len(split) for name, split in splits.items()} == {"train": 290, "test": 10, "valid": 30}
    assert "left out: 10 training pairs whose source is in valid" in said


def test_pairs_that_nobody_can_learn_from_are_left_out_and_counted(tmp_path):
    odd = [("", "vide"), ("x" * 1001, "y" * 900), ("one two three four five six", "f" * 400)]
    put(tmp_path, "mine.en", sentences("en", 300) + [pair[0] for pair in odd])
    put(tmp_path, "mine.fr", sentences("fr", 300) + [pair[1] for pair in odd])
    _, said = own_text.splits_of(tmp_path, "en", "fr")
    assert said[1].startswith("left out: 3 pairs with an empty side")


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "no pair of files"),
        ({"a.en": 300, "b.en": 300, "a.fr": 300, "b.fr": 300}, "several pairs of files, a, b"),
        ({"a.en": 300}, "no pair of files"),
        ({"a.en": 300, "a.fr": 299}, "differ in length"),
        ({"a.en": 50, "a.fr": 50}, "holds 50 usable pairs; 200 is the least"),
        ({f"{name}.{end}": 300 for name in ("train", "test1", "test2") for end in ("en", "fr")}, "several tests"),
    ],
)
def test_files_that_leave_a_question_are_an_error_that_says_what_to_do(tmp_path, files, told):
    for name, count in files.items():
        put(tmp_path, name, sentences(name[-2:], count))
    with pytest.raises(ValueError, match=told):
        own_text.splits_of(tmp_path, "en", "fr")


def test_a_test_that_no_model_could_take_is_an_error_with_its_line(tmp_path):
    for language in ("en", "fr"):
        put(tmp_path, f"train.{language}", sentences(language, 300))
        put(tmp_path, f"test.{language}", ["short", "x" * 1001])
    with pytest.raises(ValueError, match=r"line 2 of test\.\{en,fr\} has more than 1,000 characters"):
        own_text.splits_of(tmp_path, "en", "fr")


@pytest.mark.parametrize(
    ("characters", "has_gpu", "size"),
    [
        (500_000, False, "tiny"),
        (3_900_000, False, "small"),
        (3e7, True, "medium"),
        (3e7, False, "small"),
        (1e9, True, "large"),
    ],
)
def test_the_size_goes_by_the_amount_of_text_and_stays_small_without_a_gpu(characters, has_gpu, size):
    assert choose.choose_size(int(characters), has_gpu)[0] == size


def test_codec_and_interval_go_by_the_link_and_the_time_of_an_update():
    def chosen(link, step_s=0.4, symbols=3000, num_models=2):
        return choose.choose_exchange(link, symbols, 4096, num_models, step_s).settings

    assert chosen("local") == {"--codistill-codec": "fp16", "--codistill-divergence": "kl"}
    assert chosen("local", symbols=10_000)["--codistill-codec"] == "tokens:16"
    # 4,096 rows x 3,000 symbols x 16 bits are 197 Mbit; hundredths of that where classes are drawn
    assert chosen("100gbit")["--codistill-codec"] == "fp16"
    assert chosen("20mbit")["--codistill-codec"].startswith("counts:")
    assert "--codistill-interval" not in chosen("20mbit")
    assert int(chosen("100kbit")["--codistill-interval"]) > int(chosen("500kbit")["--codistill-interval"]) > 1
    assert all(chosen(link)["--codistill-divergence"] == "kl" for link in ("100gbit", "20mbit", "100kbit"))
    assert "--codistill-codec" not in chosen("local", num_models=1)


@pytest.mark.parametrize("link", ["20", "fast", "0mbit", "-1mbit", "20mb"])
def test_a_link_that_cannot_be_read_names_what_can(link):
    with pytest.raises(ValueError, match="it must be a speed in kbit, mbit or gbit a second: 20mbit"):
        choose.choose_exchange(link, 3000, 4096, 2, 0.4)


def test_a_vocabulary_that_the_text_does_not_hold_is_as_large_as_it_does(tmp_path):
    for language in ("en", "fr"):
        put(tmp_path, f"train.{language}", sentences(language, 50))
    with pytest.raises(ValueError, match="cannot learn that many"):
        bpe.learn(tmp_path, tmp_path, ["en", "fr"], 1000)
    bpe.learn(tmp_path, tmp_path, ["en", "fr"], 1000, at_most=True)
    assert 20 < len((tmp_path / "spm.vocab").read_text().splitlines()) < 1000


def test_translations_to_read_are_chosen_by_position_alone():
    lines = {name: [f"{name} {number}" for number in range(10)] for name in ("source", "reference", "model 0")}
    shown = translations.side_by_side(lines["source"], lines["reference"], {"model 0": lines["model 0"]}, 3)
    assert shown[1] == "source     source 3\nreference  reference 3\nmodel 0    model 0 3"
    assert len(translations.side_by_side(lines["source"], lines["reference"], {}, 99)) == 10
    with pytest.raises(ValueError, match="model 0 9"):
        translations.side_by_side(lines["source"], lines["reference"], {"model 0": lines["model 0"][1:]}, 3)


def test_a_text_of_more_characters_than_symbols_gets_more_where_it_may(tmp_path, capsys):
    drawn = random.Random(1)
    for split in bpe.SPLITS:
        put(tmp_path, f"{split}.en", sentences("en", 300))
        put(
            tmp_path,
            f"{split}.zh",
            ["".join(chr(0x4E00 + drawn.randrange(400)) for _ in range(12)) for _ in range(300)],
        )
    with pytest.raises(ValueError, match=r"--vocab-size is 100; the text has 4\d\d different characters: give more"):
        bpe.learn(tmp_path, tmp_path, ["en", "zh"], 100)
    bpe.learn(tmp_path, tmp_path, ["en", "zh"], 100, at_most=True)
    symbols = (tmp_path / "spm.vocab").read_text().count("\n")
    assert 500 <= symbols < 600
    assert f": {symbols} symbols" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "rows"),
    [
        ([], 4096 * 8),
        (["--max-tokens", "8192"], 8192 * 8),
        (["--max-tokens=512", "--update-freq", "2"], 1024),
        (["--update-freq", "4", "--lr", "1"], 4096 * 4),
    ],
)
def test_the_link_carries_the_batches_that_were_typed(typed, rows):
    assert choose.rows_of([*choose.SIZES["large"].settings.split(), *typed]) == rows
    with pytest.raises(ValueError, match="--max-tokens, --batch-size or --update-freq is not a number"):
        choose.rows_of([*typed, "--max-tokens", "4k"])


@pytest.mark.parametrize(
    ("typed", "told"),
    [([], "length: 40 epochs of each model\n"), (["--max-epoch", "3"], "length: 3 epochs of each model, as typed\n")],
)
def test_the_length_that_is_told_is_the_one_that_was_typed(tmp_path, monkeypatch, capsys, typed, told):
    for language in ("de", "en"):
        put(tmp_path / "raw", f"train.{language}", sentences(language, 30))
    given = ["--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "choices.sh"), "--languages", "de", "en"]
    monkeypatch.setattr(sys, "argv", ["choose.py", *given, "--", *typed])
    choose.main()
    assert told in capsys.readouterr().out


def test_a_text_that_begins_with_test_is_a_text_like_any_other(tmp_path):
    for name in ("testament", "test2016"):
        for language in ("en", "fr"):
            (tmp_path / f"{name}.{language}").write_text("one\n")
    assert own_text.find(tmp_path, "en", "fr") == {"train": "testament", "test": "test2016"}
