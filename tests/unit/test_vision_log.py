"""What a run tells: JSON lines, TensorBoard where it is installed, a progress bar where there is a terminal."""

import io
import json
import logging
import sys
import types

import pytest
from fairseq_codistill.vision.log import RunLog


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def make_log(folder, is_first=True, with_bar=False):
    return RunLog(folder, is_first, start=0, stop=20, updates_per_epoch=8, with_bar=with_bar)


def test_every_record_is_a_line_with_its_time_and_place(tmp_path):
    log = make_log(tmp_path)
    log.write("start", 0, options={"lr": 0.1})
    log.write("train", 10, loss=2.5)
    log.close()
    again = make_log(tmp_path)  # resumed
    again.write("end", 20, reason="finished")
    again.close()
    start, train, end = lines(tmp_path)
    assert (start["kind"], start["options"]) == ("start", {"lr": 0.1})
    assert (train["kind"], train["update"], train["epoch"], train["loss"]) == ("train", 10, 1.25, 2.5)
    assert end["reason"] == "finished"
    assert start["time"] <= train["time"] <= end["time"]


def test_a_number_that_is_not_finite_is_null_and_its_line_is_json(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    log = make_log(tmp_path)
    log.write("train", 10, loss=float("nan"), lr=0.1, options={"a": [float("inf")]})
    log.close()
    text = (tmp_path / "log.jsonl").read_text()
    (record,) = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert (record["loss"], record["lr"], record["options"]) == (None, 0.1, {"a": [None]})
    assert "loss not finite  lr 0.1" in caplog.text


@pytest.mark.parametrize("rest", ["", '{"kind": "train", "lo', "x" * 200_000])
def test_half_a_line_of_a_killed_run_is_cut_off_before_the_next_one(tmp_path, rest):
    log = make_log(tmp_path)
    log.write("train", 10, loss=2.5)
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(rest)
    again = make_log(tmp_path)
    again.write("train", 11, loss=2.0)
    again.close()
    assert [line["update"] for line in lines(tmp_path)] == [10, 11]


def test_files_of_tensorboard_that_cannot_be_opened_end_no_training(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("of somebody else")
    log = make_log(tmp_path)
    log.write("train", 10, loss=2.5)
    log.close()
    assert lines(tmp_path)[0]["loss"] == 2.5
    assert "TensorBoard's files cannot be written" in caplog.text


def test_a_log_of_half_a_line_alone_begins_anew(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"kind": "st')
    log = make_log(tmp_path)
    log.write("start", 0)
    log.close()
    assert [line["kind"] for line in lines(tmp_path)] == ["start"]


def test_other_ranks_and_runs_that_save_nothing_leave_no_file(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for folder, is_first in ((tmp_path, False), (None, True)):
        log = make_log(folder, is_first)
        log.write("valid", 10, valid_top1=50.0)
        log.close()
    assert not list(tmp_path.iterdir())
    assert [record.message for record in caplog.records] == ["valid: epoch 1.25 update 10  valid_top1 50"]


def test_tensorboard_gets_the_numbers_where_it_is_installed(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, name, value, update):
            written.append((name, value, update))

        def close(self):
            written.append("closed")

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = make_log(tmp_path)
    log.write("start", 0, versions={"torch": "2"})
    log.write("train", 5, loss=1.5, lr=0.1)
    log.close()
    assert written == [str(tmp_path / "tensorboard"), ("train/loss", 1.5, 5), ("train/lr", 0.1, 5), "closed"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_bar_shows_images_a_second_on_a_terminal_only(tmp_path, monkeypatch, is_terminal):
    screen = io.StringIO()
    screen.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", screen)
    log = make_log(tmp_path, with_bar=True)
    for _ in range(20):
        log.advance(images_per_s=123.4)
    log.write("train", 20, loss=1.0)
    log.close()
    assert ("123 images/s" in screen.getvalue()) == is_terminal
    assert ("20/20" in screen.getvalue()) == is_terminal
    assert ("loss 1" in screen.getvalue()) == is_terminal  # elsewhere it goes to the log of the process


def test_a_full_disk_costs_tensorboard_and_not_the_run(tmp_path, monkeypatch, caplog):
    class SummaryWriter:
        def __init__(self, folder):
            pass

        def add_scalar(self, name, value, update):
            raise OSError(28, "No space left on device")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    log = make_log(tmp_path)
    log.write("train", 5, loss=1.5)
    log.write("train", 6, loss=1.4)
    log.close()
    assert [line["loss"] for line in lines(tmp_path)] == [1.5, 1.4]
    assert caplog.text.count("No space left on device") == 1
