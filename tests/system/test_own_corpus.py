"""recipes/own_corpus from text files to translations: one command on embedded data, and one a model over a socket."""

import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.recipes, pytest.mark.timeout(1200)]
SCRIPT = Path(__file__).parents[2] / "recipes/own_corpus/train.sh"


def start(*arguments, **env):
    return subprocess.Popen(
        ["bash", str(SCRIPT), *map(str, arguments)], env={**os.environ, "SMOKE": "1", **env},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def said(process, code=0):
    text = process.communicate()[0]
    assert process.returncode == code, text[-6000:]
    return text


def test_one_command_leads_from_text_to_two_models_and_their_translations(tmp_path):
    text = said(start("--out", tmp_path / "out", "--link", "20mbit"))
    assert "model: tiny (2 + 2 layers of 64)" in text
    assert "exchange: --codistill-codec" in text
    assert "measured over the last of 12" in text
    assert text.count("chrF ") >= 2
    for model in "01":
        scores = json.loads((tmp_path / "out" / model / "bleu.json").read_text())
        assert scores["signature"].startswith("nrefs:1")
        assert scores["chrf_signature"].startswith("nrefs:1")
    paragraphs = (tmp_path / "out/translations.txt").read_text().split("\n\n")
    assert len(paragraphs) == 25
    assert [line.split("  ")[0] for line in paragraphs[0].splitlines()] == ["source", "reference", "model 0", "model 1"]
    assert (tmp_path / "out/report/report.html").is_file()


def test_a_training_does_not_go_on_with_other_text_or_other_symbols(tmp_path):
    """Symbols are numbered by how often they occur: what was learned of one would be taken for another."""
    text = tmp_path / "text"
    text.mkdir()

    def write(count):
        for end, word in (("en", "number"), ("fr", "nombre")):
            lines = [f"{word} {first} {second}" for first in range(count) for second in range(20)]
            (text / f"mine.{end}").write_text("\n".join(lines) + "\n")

    write(20)
    common = ("--source", "en", "--target", "fr", "--from", text, "--out", tmp_path / "out")
    said(start(*common, DRY_RUN="1"))
    write(21)
    said(start(*common, DRY_RUN="1"))  # nothing has been trained
    (tmp_path / "out/0").mkdir()
    (tmp_path / "out/0/checkpoint_last.pt").touch()
    dictionary = (tmp_path / "out/data/bin/dict.fr.txt").read_bytes()
    said(start(*common, DRY_RUN="1"))
    assert (tmp_path / "out/data/bin/dict.fr.txt").read_bytes() == dictionary
    write(22)
    text_of = (tmp_path / "out/data/raw/train.en").read_text()
    refused = said(start(*common), code=1)
    assert f"the text in {text} is not that of the training in {tmp_path / 'out'}; give another --out" in refused
    assert (tmp_path / "out/data/raw/train.en").read_text() == text_of
    assert (tmp_path / "out/data/bin/dict.fr.txt").read_bytes() == dictionary
    write(21)
    other_way = ("--source", "fr", "--target", "en", "--from", text, "--out", tmp_path / "out")
    assert "the direction (fr-en instead of en-fr) is not that of the training" in said(start(*other_way), code=1)
    (tmp_path / "out/choices.txt").write_text("of the training\n")
    said(start(*common, "--codec", "tokens:16", DRY_RUN="1"))
    assert (tmp_path / "out/choices.txt").read_text() == "of the training\n"
    (tmp_path / "out/data/vocab_size").write_text("77\n")
    assert "instead of 77, it is not that of the training" in said(start(*common), code=1)
    assert (tmp_path / "out/data/bin/dict.fr.txt").read_bytes() == dictionary


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def test_each_model_on_a_machine_of_its_own_is_one_command_there(tmp_path):
    (tmp_path / "text").mkdir()
    for end, word in (("en", "number"), ("fr", "nombre")):
        lines = [f"{word} {first} {second}" for first in range(20) for second in range(20)]
        (tmp_path / f"text/mine.{end}").write_text("\n".join(lines) + "\n")
    keys = tmp_path / "keys"
    command = [Path(sys.executable).with_name("codistill-keys"), keys, "--num-models", "2"]
    subprocess.run(command, check=True, capture_output=True)
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    common = ("--source", "en", "--target", "fr", "--from", tmp_path / "text", "--codec", "tokens:4")
    common += ("--addresses", addresses, "--keys", keys)
    models = [start(*common, "--model", model, "--out", tmp_path / str(model)) for model in (0, 1)]
    for model, process in enumerate(models):
        assert "exchange: --codistill-codec tokens:4" in said(process)
        log = (tmp_path / str(model) / str(model) / "train.log").read_text()
        assert f"met models [{1 - model}]" in log
        assert "codistill_start_timeout=3600.0" in log or "'codistill_start_timeout': 3600.0" in log
        assert "codistill_peers" in log


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--source", "en", "--from", "."], "--source and --target are needed"),
        (["--source", "en", "--target", "en"], "are both 'en'"),
        (["--source", "en", "--target", "fr"], "the embedded text is German and English"),
        (["--from", "/nowhere", "--source", "en", "--target", "fr"], "there is no such folder"),
        (["--model", "0"], "--model, --addresses and --keys go together"),
        (["--model", "0", "--addresses", "a:1", "--keys", "k"], "--addresses names 1 places, and --models is 2"),
    ],
)
def test_what_is_missing_is_told_before_anything_has_run(tmp_path, arguments, told):
    assert told in said(start("--out", tmp_path, *arguments), code=1)


def test_models_on_other_machines_need_to_know_what_lies_between(tmp_path):
    (tmp_path / "keys").mkdir()
    common = ("--out", tmp_path / "out", "--model", "0", "--keys", tmp_path / "keys")
    said_of = {
        "berlin.example:29600,paris.example:29600": "say what lies between, --link SPEED",
        "127.0.0.1:29600,localhost:29601": "--from is needed",  # the next thing that is wrong
    }
    for addresses, told in said_of.items():
        process = start(*common, "--addresses", addresses, "--source", "en", "--target", "de", SMOKE="0")
        assert told in said(process, code=1)


def test_what_is_prepared_is_not_replaced_under_a_training(tmp_path):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out/lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another training, or a dry run, is in" in said(start("--out", tmp_path / "out", DRY_RUN="1"), code=1)
    assert not (tmp_path / "out/data/raw").exists()


def test_a_dry_run_chooses_and_shows_and_trains_nothing(tmp_path):
    text = said(start("--out", tmp_path / "out", "--link", "20mbit", DRY_RUN="1"))
    assert "a dry run does not measure" in text
    assert text.count("fairseq-train ") == 2
    assert "classes: 232 (" in text  # of the text that was prepared
    assert not [*(tmp_path / "out").rglob("checkpoint*"), *(tmp_path / "out").glob("*.log")]
