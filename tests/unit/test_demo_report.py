"""The report of a run: what it reads from the logs is what the logs say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_codistill.demo import report
from fairseq_codistill.report import runlog

REPOSITORY = Path(__file__).parents[2]
STAMP = "2024-01-01 00:00:00 | INFO | "


def write_log(folder, mbit=(2.0, 4.0), updates=(10, 40)):
    """A log of two epochs as fairseq writes it."""
    lines = [f"{STAMP}fairseq_cli.train | num. shared model params: 1,010 (num. trained: 1,000)"]
    for epoch, (sent, num_updates) in enumerate(zip(mbit, updates, strict=True), start=1):
        inner = {"epoch": epoch, "loss": "3.5", "codistill_mse": "0.5", "num_updates": str(num_updates)}
        train = {"epoch": epoch, "train_codistill_mbit": str(sent), "train_num_updates": str(num_updates)}
        valid = {
            "epoch": epoch,
            "valid_loss": str(4 - epoch),
            "valid_nll_loss": str(3 - epoch),
            "valid_num_updates": str(num_updates),
            "valid_best_loss": None,
        }
        for kind, record in (("train_inner", inner), ("valid", valid), ("train", train)):
            lines.append(f"{STAMP}{kind} | {json.dumps(record)}")
        lines.append(f"{STAMP}fairseq_cli.train | {{'not': 'a record'}}")
    folder.mkdir(parents=True)
    (folder / "train.log").write_text("\n".join(lines) + "\n")


def test_log_lines_become_figures_without_the_prefix_of_their_kind():
    kind, record = runlog.parse_line(f'{STAMP}valid | {{"epoch": 3, "valid_nll_loss": "1.25", "valid_best": null}}\n')
    assert kind == "valid"
    assert record == {"epoch": 3.0, "nll_loss": 1.25}


@pytest.mark.parametrize("line", ["", f"{STAMP}train | done", f'{STAMP}train | {{"epoch": 1', "valid | {}"])
def test_other_lines_are_no_figures(line):
    assert runlog.parse_line(line) is None


def test_bits_are_averaged_over_updates_not_over_epochs(tmp_path):
    write_log(tmp_path / "0", mbit=(2.0, 4.0), updates=(10, 40))
    assert runlog.read_log(tmp_path / "0" / "train.log").megabits_per_update == pytest.approx((10 * 2 + 30 * 4) / 40)


def test_report_sets_bits_sent_beside_those_of_all_reduce(tmp_path):
    for model in (0, 1):
        write_log(tmp_path / str(model), mbit=(0.032, 0.032))
    (tmp_path / "1" / "bleu.json").write_text('{"bleu": 61.5, "signature": "nrefs:1"}')
    first, second = report.write_report(tmp_path)
    assert first.all_reduce_megabits_per_update == pytest.approx(2 * 1000 * 32 / 1e6)
    assert first.times_fewer_bits == pytest.approx(2.0)
    assert (first.bleu, second.bleu) == (None, 61.5)
    assert first.best_valid_nll_bits == 1.0
    assert first.best_valid_ppl == 2.0
    table = (tmp_path / "report.md").read_text()
    assert "| 1 | 61.50 |" in table
    assert "nrefs:1" in table
    assert json.loads((tmp_path / "report.json").read_text())["models"][1]["bleu"] == 61.5
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_log_without_a_finished_epoch_is_an_error(tmp_path):
    write_log(tmp_path / "0", mbit=(), updates=())
    with pytest.raises(ValueError, match="no finished epoch"):
        report.write_report(tmp_path)


def test_a_model_below_the_wanted_bleu_fails_the_report(tmp_path, monkeypatch):
    write_log(tmp_path / "0")
    (tmp_path / "0" / "bleu.json").write_text('{"bleu": 12.0, "signature": "nrefs:1"}')
    monkeypatch.setattr(sys, "argv", ["report", "--run", str(tmp_path), "--min-bleu", "60"])
    with pytest.raises(SystemExit, match="models below 60 BLEU: 0"):
        report.main()


def test_labelled_lines_go_to_the_log_of_their_model_and_the_exit_code_stays(tmp_path):
    script = "print('[model 1] one'); print('[model 0 rank 1] zero'); print('plain'); raise SystemExit(3)"
    command = [sys.executable, REPOSITORY / "recipes/tools/run_logged.py", "--log-dir", tmp_path, "--"]
    ended = subprocess.run([*command, sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 3
    assert "training failed" in ended.stderr
    assert (tmp_path / "1/train.log").read_text() == "one\n"
    assert (tmp_path / "0/train.rank1.log").read_text() == "zero\n"
    assert (tmp_path / "0/train.log").read_text() == "plain\n"


def score(tmp_path, generated, reference):
    (tmp_path / "gen").write_text(generated)
    (tmp_path / "ref").write_text(reference)
    command = [sys.executable, REPOSITORY / "recipes/tools/score.py", "--generated", tmp_path / "gen"]
    command += ["--reference", tmp_path / "ref", "--json", tmp_path / "json"]
    return subprocess.run(command, capture_output=True, text=True)


def test_translations_are_scored_in_the_order_of_the_corpus(tmp_path):
    generated = "S-1\tx\nD-1\t-0.1\tthe cat sat on the mat\nD-0\t-0.2\tone two three four five\n"
    ended = score(tmp_path, generated, "one two three four five\nthe cat sat on the mat\n")
    record = json.loads((tmp_path / "json").read_text())
    assert record["bleu"] == 100.0
    assert record["signature"] in ended.stdout
    assert "version:" in record["signature"]


def test_missing_translations_are_an_error_not_a_low_score(tmp_path):
    ended = score(tmp_path, "D-0\t-0.2\tone two\n", "one two\nthree four\n")
    assert ended.returncode != 0
    assert "1 sentences where the reference has 2" in ended.stderr
