"""What the recipes read from the evaluation campaigns' files, and how they score; on small files of the same forms."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes/tools"))
import arm_rows
import corpus
import moses
import score


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def put(folder, name, *content):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(line + "\n" for line in content), encoding="utf-8")


@pytest.fixture
def iwslt(tmp_path):
    """The archive's files, unpacked: 46 sentences, metadata between them, a title, and five small test files."""
    folder = tmp_path / "orig/de-en"
    german = ["<url>http://x</url>", "<keywords>talks</keywords>", "<title>Der Titel hier</title>"]
    english = ["<url>http://x</url>", "<keywords>talks</keywords>", "<title>The title here</title>"]
    german += [f"Satz Nummer {i} ." for i in range(45)] + ["eins zwei drei vier", ""]
    english += [f"Sentence number {i} ." for i in range(45)] + ["one", "an empty other side"]
    put(folder, "train.tags.de-en.de", *german)
    put(folder, "train.tags.de-en.en", *english)
    for name in corpus.IWSLT14_TEST:
        for language in ("de", "en"):
            put(
                folder, f"IWSLT14.{name}.de-en.{language}.xml", '<mteval><doc docid="1">', "<url>x</url>",
                f'<seg id="1"> {name} in {language} &amp; mehr </seg>', "</doc></mteval>",
            )  # fmt: skip
    return tmp_path / "orig"


def test_iwslt_is_split_as_in_the_example_of_fairseq(iwslt, tmp_path):
    counts = corpus.write(corpus.iwslt14([iwslt], "de", "en"), tmp_path / "raw", "de", "en")
    assert counts == {"train": 44, "valid": 2, "test": 5}
    assert lines(tmp_path / "raw/train.de")[0] == "Der Titel hier"
    # Pair 23 is the first for validation: the title, then sentences 0 to 21.
    assert lines(tmp_path / "raw/valid.en") == ["Sentence number 21 .", "Sentence number 44 ."]
    assert lines(tmp_path / "raw/valid.de") == ["Satz Nummer 21 .", "Satz Nummer 44 ."]
    assert lines(tmp_path / "raw/test.de")[1] == "TEDX.dev2012 in de & mehr"
    assert not any("<" in line for line in lines(tmp_path / "raw/train.en"))


def test_a_pair_goes_when_either_side_is_about_the_talk(iwslt):
    path = iwslt / "de-en/train.tags.de-en.en"
    path.write_text(path.read_text().replace("Sentence number 3 .", "<speaker>Somebody</speaker>"))
    train = dict(corpus.iwslt14([iwslt], "de", "en")["train"])
    assert "Satz Nummer 3 ." not in train
    assert train["Satz Nummer 4 ."] == "Sentence number 4 ."


def test_wmt_takes_three_corpora_and_the_news_of_two_years_plain_gzipped_or_sgml(tmp_path):
    for number, name in enumerate(corpus.WMT16_TRAIN):
        put(tmp_path, f"training/{name}.en", f"Sentence {number} .", "a b c d e f g")
        put(tmp_path, f"training/{name}.de", f"Satz {number} .", "a")
    zipped = tmp_path / "training/commoncrawl.de-en.de"
    zipped.with_suffix(".de.gz").write_bytes(gzip.compress(zipped.read_bytes()))
    zipped.unlink()
    put(tmp_path, "dev/newstest2013.en", "Old news .")
    put(tmp_path, "dev/newstest2013.de", "Alte Nachrichten .")
    put(tmp_path, "test-full/newstest2014-deen-src.en.sgm", '<seg id="1">New &quot;news&quot;</seg><seg id="2">b</seg>')
    put(tmp_path, "test-full/newstest2014-deen-ref.de.sgm", '<seg id="1">Neues</seg>', '<seg id="2">B</seg>')
    put(tmp_path, "test-full/newstest2014-deen-src.de.sgm", '<seg id="1">not this one</seg>')
    counts = corpus.write(corpus.wmt16([tmp_path / "none", tmp_path], "en", "de"), tmp_path / "raw", "en", "de")
    assert counts == {"train": 3, "valid": 1, "test": 2}
    assert lines(tmp_path / "raw/train.de") == ["Satz 0 .", "Satz 1 .", "Satz 2 ."]
    assert lines(tmp_path / "raw/test.en") == ['New "news"', "b"]
    assert lines(tmp_path / "raw/test.de") == ["Neues", "B"]


def test_files_of_different_length_and_missing_ones_are_named(iwslt, tmp_path):
    path = iwslt / "de-en/train.tags.de-en.en"
    path.write_text(path.read_text() + "one more\n")
    with pytest.raises(ValueError, match="differ in length: one ends before line 51"):
        corpus.iwslt14([iwslt], "de", "en")
    with pytest.raises(ValueError, match=r"holds none of europarl-v7.de-en.en \(plain or .gz"):
        corpus.wmt16([tmp_path / "none", tmp_path], "en", "de")


@pytest.mark.parametrize(
    ("pair", "is_kept"),
    [
        (("one two three", "eins zwei"), True),
        (("one two three four", "eins zwei"), False),
        (("Well, no.", "Nein."), False),
        (("", "eins"), False),
        (("a " * 11, "b " * 10), False),
        (("a " * 10, "b " * 10), True),
    ],
)
def test_pairs_are_kept_by_length_and_ratio(pair, is_kept):
    assert list(corpus.clean([pair], max_words=10)) == ([pair] if is_kept else [])


def test_compounds_are_split_where_words_touch_a_hyphen_on_both_sides():
    assert moses.split_compounds("ein Zwei-Wort-Paar - und -ende") == (
        "ein Zwei ##AT##-##AT## Wort ##AT##-##AT## Paar - und -ende"
    )


def test_moses_subwords_come_back_as_the_raw_text(tmp_path):
    pytest.importorskip("sacremoses")
    pytest.importorskip("subword_nmt")
    for split in moses.SPLITS:
        put(tmp_path / "raw", f"{split}.de", *["Das ist ein Haus, nicht wahr?", "Zwei-Wort-Paare sind selten."] * 4)
        put(tmp_path / "raw", f"{split}.en", *["That is a house, isn't it?", "Word pairs are rare."] * 4)
    (tmp_path / "bpe").mkdir()
    moses.prepare(tmp_path / "raw", tmp_path / "bpe", ["de", "en"], 40, lower_case=False)
    encoded = lines(tmp_path / "bpe/test.de")
    assert any("@@" in line for line in encoded)
    tokens = [line.replace("@@ ", "") for line in encoded]
    assert tokens[0] == "Das ist ein Haus , nicht wahr ?"
    assert list(map(moses.make_detokeniser("de"), tokens)) == lines(tmp_path / "raw/test.de")


def test_tokenised_bleu_is_the_same_for_either_kind_of_subwords():
    pytest.importorskip("sacremoses")
    raw = ["Das ist ein Haus, nicht wahr?", "Ein Zwei-Wort-Paar war es."]
    wrong = ["Das ist ein Haus, nicht rot?", "Ein Zwei-Wort-Paar war es."]
    tokenise = moses.make_tokeniser("de")
    plain = score.tokenised_bleu(wrong, raw, "de", "sentencepiece")
    tokenised = score.tokenised_bleu(list(map(tokenise, wrong)), raw, "de", "moses")
    assert plain == tokenised
    assert 0 < plain["bleu_tokenised"] < plain["bleu_tokenised_compounds_split"] < 100
    assert score.tokenised_bleu(raw, raw, "de", "sentencepiece")["bleu_tokenised"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("language", "tokeniser"), [("zh", "zh"), ("zh-CN", "zh"), ("zho_Hans", "zh"), ("jpn", "char"), ("en", "13a")]
)
def test_words_of_a_language_without_spaces_are_told_apart(tmp_path, monkeypatch, language, tokeniser):
    chinese = language != "en"
    references = ["今天天气非常好我们去公园散步吧", "他昨天买了一本关于历史的新书"]
    if not chinese:
        references = ["the weather is very fine today", "he bought a new book about history"]
    put(tmp_path, "reference", *references)
    generated = [f"D-{i}\t-1.0\t{line if i else line.replace(line[2], line[0])}" for i, line in enumerate(references)]
    put(tmp_path, "generated", *generated)
    arguments = ["--generated", "generated", "--reference", "reference", "--json", "bleu.json", "--language", language]
    monkeypatch.setattr(sys, "argv", ["score.py", *arguments])
    monkeypatch.chdir(tmp_path)
    score.main()
    found = json.loads((tmp_path / "bleu.json").read_text())
    assert f"tok:{tokeniser}" in found["signature"]
    assert 50 < found["bleu"] < 100
    assert ("bleu_tokenised" in found) <= (not chinese)


def test_classes_are_divided_unevenly_and_every_image_has_one_owner(tmp_path):
    for name in ("cat", "dog"):
        folder = tmp_path / "images" / "train" / name
        folder.mkdir(parents=True)
        for number in range(40):
            (folder / f"{number}.png").touch()
    (tmp_path / "images" / "test").mkdir()
    command = [sys.executable, str(Path(score.__file__).parent / "split_images.py"), "--from", str(tmp_path / "images")]
    out = tmp_path / "out"
    subprocess.run([*command, "--out", str(out)], check=True)
    for name in ("cat", "dog"):
        halves = [set(os.listdir(out / half / "train" / name)) for half in ("half0", "half1")]
        shared, together = set(os.listdir(out / "shared" / name)), set(os.listdir(out / "together" / "train" / name))
        assert len(shared) == 4
        assert halves[0]
        assert halves[1]
        assert not halves[0] & halves[1]
        assert halves[0] | halves[1] == together
        assert not together & shared
        assert len(together | shared) == 40


def test_arms_are_means_over_seeds_of_means_over_models_that_have_finished(tmp_path):
    for folder, model, nll, bleu in (("a.seed1", 0, 3.0, 20), ("a.seed1", 1, 4.0, 30), ("a.seed2", 0, 5.0, 10)):
        where = tmp_path / folder / str(model)
        where.mkdir(parents=True)
        lines = [f"x | valid | {json.dumps({'valid_nll_loss': str(value)})}\n" for value in (9, nll)]
        (where / "train.log").write_text("".join(lines))
        (where / "bleu.json").write_text(json.dumps({"bleu": bleu}))
    (tmp_path / "b.seed1" / "0").mkdir(parents=True)  # under way
    assert arm_rows.table(tmp_path)[-1] == "| a | 2 | 4.25 ± 1.06 | 17.50 ± 10.61 |"
    assert [arm_rows.split_name(name) for name in ("half0.seed2", "taught3", "teacher")] == [
        ("half0", "2"),
        ("taught", "3"),
        ("teacher", "1"),
    ]


def test_a_language_that_is_not_known_is_told_by_its_text(capsys):
    assert score.tokeniser_of("wuu", ["\u4e00" * 30, "\u4e01" * 25]) == "char"
    assert "BLEU is of characters" in capsys.readouterr().err
    assert score.tokeniser_of("xx", ["a word or two of some length", "antidisestablishmentarianism"]) == ""
    assert score.tokeniser_of("xx", [""]) == ""


def test_rows_of_arms_are_read_beside_a_training_that_writes_half_a_line_and_of_every_model(tmp_path):
    done = [{"kind": "valid", "valid_top1": 50.0, "valid_loss": 1.0}, {"kind": "end", "reason": "finished"}]
    for folder, lines in (("all/2", done), ("all/10", done), ("half/0", [*done[:1], '{"kind":"tr'])):
        (tmp_path / folder).mkdir(parents=True)
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        (tmp_path / folder / "log.jsonl").write_text(text)
    (tmp_path / "text/0").mkdir(parents=True)
    (tmp_path / "text/0/bleu.json").write_text('{"bleu": 1}')
    (tmp_path / "all/10/log.jsonl").write_text((tmp_path / "all/10/log.jsonl").read_text().replace("50.0", "60.0"))
    assert arm_rows.table(tmp_path)[2:] == ["| all | 1 | 55.00 | 1.00 |"]


RUN_LOGGED = Path(__file__).parents[2] / "recipes/tools/run_logged.py"


def run_tool(name, *arguments, **environment):
    tool = Path(__file__).parents[2] / "recipes/tools" / name
    command = [sys.executable, str(tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env={**os.environ, **environment}, timeout=60)


def test_text_that_is_not_utf_8_is_named_and_a_mark_of_byte_order_is_no_text(tmp_path):
    (tmp_path / "a.en").write_bytes("\ufeffOne\nTwo\n".encode())
    assert list(corpus.lines_of(tmp_path / "a.en")) == ["One", "Two"]
    (tmp_path / "a.de").write_bytes("Straße\n".encode("latin-1"))
    with pytest.raises(ValueError, match="a.de is not UTF-8"):
        list(corpus.lines_of(tmp_path / "a.de"))


def test_half_a_download_is_named(tmp_path):
    whole = gzip.compress("".join(f"sentence {i}\n" for i in range(1000)).encode())
    for name, content in (("cut", whole[: len(whole) // 2]), ("no", b"plain"), ("bad", whole[:60] + b"x" * 60)):
        (tmp_path / f"{name}.en.gz").write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.en.gz is cut short, damaged or no gzip file"):
            list(corpus.lines_of(tmp_path / f"{name}.en.gz"))


def test_pairs_of_few_sources_are_said_to_be_that(tmp_path):
    put(tmp_path, "mine.en", *(f"sentence {i % 20}" for i in range(400)))
    put(tmp_path, "mine.fr", *(f"phrase {i}" for i in range(400)))
    put(tmp_path, "._mine.en", "x")
    put(tmp_path, "._mine.fr", "x")  # as macOS leaves them
    done = run_tool("own_text.py", "--from", tmp_path, "--out", tmp_path / "out", "--languages", "en", "fr")
    assert b"has 20 different sources in 400 pairs" in done.stderr
    assert done.returncode == 1


def test_a_letter_that_the_locale_lacks_ends_no_training_and_models_have_their_own_numbers(tmp_path):
    record = '{"epoch": 1, "valid_nll_loss": "1.5", "valid_num_updates": "10"}'
    script = (
        f"import sys; print('2024-01-01 00:00:00 | INFO | valid | {record}', flush=True); "
        "sys.stdout.buffer.write('2024-01-01 00:00:00 | WARNING | x | codistillation: 日本 – x\\ndone\\n'.encode())"
    )
    command = ["--log-dir", tmp_path, "--first-model", "3", "--", sys.executable, "-c", script]
    done = run_tool("run_logged.py", *command, PYTHONIOENCODING="latin-1", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"model 3  ")
    assert (tmp_path / "3/train.log").read_text(encoding="utf-8").endswith("done\n")


def test_a_log_that_a_full_disk_cut_off_goes_on_with_a_new_line(tmp_path):
    log = tmp_path / "0/train.log"
    log.parent.mkdir()
    for before, expected in (("whole\n", "whole\nnew\n"), ("cut of", "cut of\nnew\n"), ("", "new\n")):
        log.write_text(before)
        done = run_tool("run_logged.py", "--log-dir", str(tmp_path), "--", "echo", "new")
        assert done.returncode == 0, done.stderr
        assert log.read_text() == expected


def test_what_is_no_class_is_no_class_and_too_few_images_are_named(tmp_path):
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            for image in range(6):
                put(tmp_path / "images", f"{split}/{label}/{image}.png", "x")
    put(tmp_path / "images", "train/.DS_Store", "x")
    source = ("--from", tmp_path / "images", "--models", "2")
    assert run_tool("split_images.py", *source, "--out", tmp_path / "out").returncode == 0
    few = run_tool("split_images.py", *source, "--out", tmp_path / "few", "--limit", "1")
    assert few.returncode == 1
    assert b"1 images of a class are too few for 2 models; give a larger --limit" in few.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_log_that_cannot_be_written_ends_no_training(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0/train.log").symlink_to("/dev/full")
    code = "print('one', flush=True); print('two', flush=True); open('done', 'w').close()"
    done = subprocess.run(
        [sys.executable, RUN_LOGGED, "--log-dir", tmp_path, "--", sys.executable, "-c", code],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("the log of model 0 ends here, training goes on")) == (0, 1)
    assert (tmp_path / "done").exists()


def test_what_nobody_can_see_is_not_left_running(tmp_path):
    """The screen is gone: a pipe that nobody reads any more."""
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (open('asked', 'w').close(), sys.exit()))"
    )
    code += "; [(print('| WARNING | x', flush=True), time.sleep(0.05)) for _ in range(400)]"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, RUN_LOGGED, "--log-dir", tmp_path, "--", sys.executable, "-c", code],
        cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    os.close(writer)
    assert done.returncode != 0
    assert (tmp_path / "asked").exists()
