"""How a vision run ends: its exit code, its one line, and what it leaves in its folder."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import environment, run_together
from PIL import Image
from test_vision_runs import addresses_of, running, wait_for_updates
from torchvision.datasets import ImageFolder
from vision_helpers import codistill_commands, launch_command, records, vision_command

from fairseq_codistill.sampling import Timetable

TINY = "--batch-size 16 --max-updates 24".split()


def run(command, timeout_s=120):
    (result,) = run_together([command], timeout_s=timeout_s)
    return result


def error_lines(output):
    """What a user sees besides the log."""
    return [line for line in output.splitlines() if line.startswith("codistill-vision: ")]


def assert_one_line(result, returncode, *parts):
    assert result.returncode == returncode, result.output
    assert "Traceback" not in result.output
    (line,) = error_lines(result.output)
    for part in parts:
        assert part in line


def with_limit(command, num_bytes):
    """The command, for which every file is full after that many bytes."""
    code = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({num_bytes},) * 2); "
    code += "sys.argv = sys.argv[1:]; runpy.run_module('vision.train', run_name='__main__')"
    at = command.index("vision.train")
    return [command[0], "-c", code, *command[at:]]


def test_a_disk_that_is_full_leaves_the_last_whole_checkpoint_and_one_line(tmp_path):
    folder = tmp_path / "run"
    assert run(vision_command(folder, *TINY)).returncode == 0
    size = (folder / "checkpoint_last.pt").stat().st_size
    longer = vision_command(folder, *TINY, "--max-updates", "30", "--save-updates", "1")
    assert (folder / "log.jsonl").stat().st_size < size // 2
    assert_one_line(run(with_limit(longer, size // 2)), 1, "checkpoint_last.pt", "the one before it is still there")
    assert torch.load(folder / "checkpoint_last.pt", weights_only=True)["elapsed"] == 24
    assert not list(folder.glob("*.tmp"))
    assert "checkpoint_last.pt" in records(folder, "end")[-1]["reason"]
    assert run(longer).returncode == 0
    assert torch.load(folder / "checkpoint_last.pt", weights_only=True)["elapsed"] == 30


@pytest.mark.slow
def test_a_log_that_cannot_be_written_ends_in_a_whole_line(tmp_path):
    command = with_limit(vision_command(tmp_path / "run", *TINY), 6000)
    assert_one_line(run(command), 1, "log.jsonl")
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines][:2] == ["start", "train"]


def test_an_unwritable_folder_is_one_line_before_training(tmp_path):
    (tmp_path / "file").touch()
    assert_one_line(run(vision_command(tmp_path / "file" / "run")), 2, "--save-dir", "cannot be written to")


def test_a_hook_that_begins_with_an_epoch_is_told_the_update(tmp_path):
    timing = "--epochs 3 --stretch 2 --max-updates 0 --batch-size 500 --hook-start-epochs 1.5".split()
    assert run(vision_command(tmp_path / "run", *timing)).returncode == 0
    (start,) = records(tmp_path / "run", "start")
    assert start["options"]["hook_start"] == records(tmp_path / "run", "end")[-1]["update"] / 2


def test_a_loss_that_is_not_finite_ends_training_and_keeps_what_was_finite(tmp_path):
    folder = tmp_path / "run"
    assert run(vision_command(folder, *TINY)).returncode == 0
    diverging = vision_command(folder, *TINY, *"--max-updates 200 --save-updates 1 --lr 1e30 --lr-batch-size 0".split())
    assert_one_line(run(diverging), 1, "not finite in 10 updates in a row", "--max-nonfinite is 10")
    stored = torch.load(folder / "checkpoint_last.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in stored["model"].values())
    assert stored["elapsed"] >= 24
    for line in (folder / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert records(folder, "train")[-1]["loss"] is None
    assert records(folder, "end")[-1]["reason"].startswith("failed: the loss was not finite")


def test_parameters_that_are_not_finite_at_the_end_are_no_success(tmp_path):
    settings = "--max-updates 5 --lr 1e30 --lr-batch-size 0".split()
    assert_one_line(run(vision_command(tmp_path / "run", *settings)), 1, "not finite at the end")
    assert not (tmp_path / "run/checkpoint_best.pt").exists()


def make_images(folder):
    """Two classes of 40 JPEGs to train on and of two to validate with."""
    for split, count in (("train", 40), ("val", 2)):
        for label in "ab":
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{number}.jpg")


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.slow
def test_the_ranks_of_a_model_share_the_check_and_leave_out_the_same(tmp_path):
    make_images(tmp_path / "images")
    paths = [Path(path) for path, _ in ImageFolder(str(tmp_path / "images/train")).samples]
    for at in (4, 7, 50):  # of both ranks' shares
        cut_off(paths[at])
    settings = ["--dataset", f"imagefolder:{tmp_path}/images", *"--image-size 8 --batch-size 4 --epochs 1".split()]
    command = launch_command(tmp_path, 2, 2, *settings, "--skip-broken", "--ema-decay", "0.9")
    result = run(command)
    assert result.returncode == 0, result.output
    for model in "01":
        (start,) = records(tmp_path / model, "start")
        assert (start["images"], start["images_left_out"], start["world_size"]) == (77, 3, 2)
        trained = records(tmp_path / model, "train")
        assert {(record["codistill_peers"], record["codistill_skipped"]) for record in trained} == {(1, 0)}
        assert set(json.loads((tmp_path / model / "checked_images.json").read_text())["broken"]) == {
            str(paths[at]) for at in (4, 7, 50)
        }


def test_a_truncated_image_costs_no_update_that_was_made(tmp_path):
    make_images(tmp_path / "images")
    at = Timetable(80, divisor=1, batch_size=4, world_size=1, data_seed=1).order(1)[30]  # in update 7
    broken = Path(ImageFolder(str(tmp_path / "images/train")).samples[at][0])
    cut_off(broken)
    settings = ["--dataset", f"imagefolder:{tmp_path}/images", *"--image-size 8 --batch-size 4 --epochs 1".split()]
    result = run(vision_command(tmp_path / "run", *settings, "--num-workers", "1"))
    assert_one_line(result, 1, f"{broken} cannot be read", "truncated")
    assert len(records(tmp_path / "run", "train")) == 7
    assert torch.load(tmp_path / "run/checkpoint_last.pt", weights_only=True)["elapsed"] == 7
    skipping = run(vision_command(tmp_path / "other", *settings, "--skip-broken"))
    assert skipping.returncode == 0, skipping.output
    assert f"1 of 84 images are broken and left out: {broken}" in skipping.output
    (start,) = records(tmp_path / "other", "start")
    assert (start["images"], start["images_left_out"]) == (79, 1)


def test_a_truncated_image_of_any_rank_costs_no_update_that_was_made(tmp_path):
    make_images(tmp_path / "images")
    at = Timetable(80, divisor=1, batch_size=4, world_size=2, data_seed=1).order(1)[6 * 8 + 5]  # in update 6, of rank 1
    cut_off(Path(ImageFolder(str(tmp_path / "images/train")).samples[at][0]))
    settings = ["--dataset", f"imagefolder:{tmp_path}/images", *"--image-size 8 --batch-size 4 --epochs 1".split()]
    result = run(launch_command(tmp_path, 1, 2, *settings))
    assert result.returncode == 1, result.output
    assert "cannot be read" in result.output
    assert torch.load(tmp_path / "0/checkpoint_last.pt", weights_only=True)["elapsed"] == 6
    reason = records(tmp_path / "0", "end")[-1]["reason"]  # of rank 0, which lost its other rank
    assert reason.startswith("failed: ")
    assert "cannot be read" not in reason
    assert not list((tmp_path / "0").glob("*.tmp"))


def test_what_comes_after_an_interrupted_training_is_not_run(tmp_path):
    command = " ".join(vision_command(tmp_path / "run", "--batch-size", "16", "--epochs", "100"))
    shell = f"{command} & pid=$!; until grep -q '\"train\"' {tmp_path}/run/log.jsonl 2>/dev/null; do sleep 0.1; done; "
    shell += "kill -TERM $pid; wait $pid && echo evaluate"
    result = run(["bash", "-c", shell])
    assert result.returncode == 128 + signal.SIGTERM, result.output
    assert "evaluate" not in result.output.splitlines()
    assert (tmp_path / "run/checkpoint_last.pt").exists()
    assert records(tmp_path / "run", "end")[-1]["reason"] == "SIGTERM"


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_to_the_whole_group_ends_in_a_checkpoint_not_in_dead_workers(tmp_path, number):
    """As Ctrl-C in a terminal and a scheduler's kill of a job do: every process of the group gets it, workers too."""
    settings = "--batch-size 16 --epochs 100 --num-workers 2 --save-updates 5".split()
    with open(tmp_path / "output", "wb") as output:
        process = subprocess.Popen(
            vision_command(tmp_path / "run", *settings),
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for_updates(process, tmp_path / "run", 8)
        os.killpg(process.pid, number)
        returncode = process.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    said = (tmp_path / "output").read_text()
    assert returncode == 128 + number, said
    assert "Traceback" not in said
    stored = torch.load(tmp_path / "run/checkpoint_last.pt", weights_only=True)
    assert stored["elapsed"] == len(records(tmp_path / "run", "train"))
    assert records(tmp_path / "run", "end")[-1]["reason"] == signal.Signals(number).name
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_a_peer_that_is_silent_and_saves(tmp_path, number):
    """The peer is stopped, not dead: nothing tells that it will not answer, and the timeout is far off."""
    settings = "--batch-size 16 --epochs 100 --codistill-timeout 3000".split()
    commands = codistill_commands(tmp_path, addresses_of(2), *settings)
    with running(commands) as processes:
        wait_for_updates(processes[0], tmp_path / "0", 5)
        processes[1].send_signal(signal.SIGSTOP)
        wait_until_still(tmp_path / "0")
        processes[0].send_signal(number)
        assert processes[0].wait(60) == 128 + number
    logged = records(tmp_path / "0", "train")
    assert torch.load(tmp_path / "0/checkpoint_last.pt", weights_only=True)["elapsed"] == len(logged)
    assert logged[-1]["codistill_peers"] == 0
    assert records(tmp_path / "0", "end")[-1]["reason"] == signal.Signals(number).name


def wait_until_still(folder, timeout_s=60):
    """Until a model makes no more updates: it waits."""
    deadline, before = time.monotonic() + timeout_s, -1
    while (now := len(records(folder, "train"))) != before:
        assert time.monotonic() < deadline
        before = now
        time.sleep(2)


def test_a_model_that_meets_nobody_ends_in_one_line(tmp_path):
    alone = codistill_commands(tmp_path, addresses_of(2), "--codistill-start-timeout", "2")[0]
    assert_one_line(run(alone), 1, "met none of the other models", "--codistill-require-peers never")
    assert not records(tmp_path / "0", "train")
    assert records(tmp_path / "0", "end")[-1]["reason"].startswith("failed: model 0 met none")


def test_an_evaluation_that_a_signal_came_before_is_made_on_resumption(tmp_path):
    """The signal is noticed at the update that the evaluation is due at: then there is no time for one."""
    folder = tmp_path / "run"
    command = vision_command(folder, *"--batch-size 16 --epochs 1 --eval-epochs 0.5 --log-updates 1".split())
    every = round(0.5 * Timetable(1437, 1, 16, 1, 1, 1.0).updates_per_epoch)
    assert run([*command, "--max-updates", str(every - 1)]).returncode == 0
    stored = torch.load(folder / "checkpoint_last.pt", weights_only=True)
    assert stored["evaluated_at"] == stored["elapsed"] == every - 1
    # What a training leaves that was told to stop at update `every`, before it evaluated.
    torch.save({**stored, "elapsed": every}, folder / "checkpoint_last.pt")
    assert run([*command, "--max-updates", str(every + 3)]).returncode == 0
    assert [record["update"] for record in records(folder, "valid")] == [every - 1, every, every + 3]


def test_a_last_evaluation_that_was_cut_off_is_made_by_the_next_start(tmp_path):
    folder = tmp_path / "run"
    command = vision_command(folder, *TINY)
    assert run(command).returncode == 0
    (evaluated,) = records(folder, "valid")
    stored = torch.load(folder / "checkpoint_last.pt", weights_only=True)
    torch.save({**stored, "evaluated_at": 0, "best_top1": -1.0}, folder / "checkpoint_last.pt")  # as before it
    for _ in range(2):
        assert run(command).returncode == 0
    again = records(folder, "valid")[1:]
    assert [record["valid_loss"] for record in again] == [evaluated["valid_loss"]]
    assert torch.load(folder / "checkpoint_last.pt", weights_only=True)["best_top1"] == evaluated["valid_top1"]
