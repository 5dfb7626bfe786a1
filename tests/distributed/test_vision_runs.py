"""Real vision processes: resumed, interrupted, killed, mixed, spread over ranks, and set up wrongly."""

import contextlib
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import free_ports, run_together, start
from PIL import Image
from vision_helpers import codistill_commands, launch_command, records, vision_command

# Nothing in it depends on other images of the batch, so two ranks can be compared with one.
WITHOUT_BATCH_NORM = (
    "--model vit_tiny_patch16_224 --model-kwargs img_size=8 patch_size=4 embed_dim=48 num_heads=3 depth=1"
).split()


def checkpoint(folder):
    return torch.load(folder / "checkpoint_last.pt", weights_only=True)


def addresses_of(num_models):
    return ",".join(f"127.0.0.1:{port}" for port in free_ports(num_models))


@contextlib.contextmanager
def running(commands):
    """The processes of all commands, none of which outlives the block; their outputs are in ``.log`` files."""
    processes = []
    try:
        for command in commands:
            log = Path(command[command.index("--save-dir") + 1].replace("{model}", "launcher")).with_suffix(".log")
            log.touch()
            processes.append(start(command, str(log)))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for_updates(process, folder, count, timeout_s=120):
    """Until a model has logged that many updates."""
    deadline = time.monotonic() + timeout_s
    while not (folder / "log.jsonl").exists() or len(records(folder, "train")) < count:
        assert process.poll() is None, f"it ended with {process.returncode}"
        assert time.monotonic() < deadline, f"no {count} updates in {timeout_s} s"
        time.sleep(0.05)


def assert_equal_states(first, second):
    assert first["elapsed"] == second["elapsed"]
    assert first["model"].keys() == second["model"].keys()
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    momenta = [
        [state["momentum_buffer"] for state in stored["optimizer"]["state"].values()] for stored in (first, second)
    ]
    assert len(momenta[0]) > 0
    assert all(torch.equal(*pair) for pair in zip(*momenta, strict=True))


def test_interrupted_and_resumed_training_is_that_without_a_pause_bit_for_bit(tmp_path):
    """Dropout, augmentation, schedules and momentum are in it; the number of loading processes is not."""
    settings = (
        "--batch-size 16 --augmentation cifar --drop-rate 0.3 --lr-schedule cosine --warmup-epochs 0.2 "
        "--warmup-lr 0.001 --epochs 2 --max-updates 100"
    ).split()
    straight = vision_command(tmp_path / "straight", *settings, "--num-workers", "2")
    paused = vision_command(tmp_path / "paused", *settings)
    with running([straight, paused]) as processes:
        wait_for_updates(processes[1], tmp_path / "paused", 5)
        processes[1].send_signal(signal.SIGTERM)
        assert processes[1].wait(60) == 128 + signal.SIGTERM
        assert processes[0].wait(200) == 0
    stopped_at = checkpoint(tmp_path / "paused")["elapsed"]
    assert 5 <= stopped_at < 100
    assert records(tmp_path / "paused", "end")[-1]["reason"] == "SIGTERM"
    (resumed,) = run_together([paused], timeout_s=120)
    assert resumed.returncode == 0, resumed.output
    assert f"going on from {tmp_path / 'paused' / 'checkpoint_last.pt'}, update {stopped_at}" in resumed.output
    assert_equal_states(checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "paused"))
    ends = [records(tmp_path / name, "valid")[-1] for name in ("straight", "paused")]
    assert ends[0]["distance"] == ends[1]["distance"] > 0  # from the first start, not from the resumption


def test_copies_of_the_peers_are_exchanged_saved_and_teach_on_after_a_pause(tmp_path):
    """The last exchange before the pause is at 20, the next one after it at 40: the saved copies teach in between."""
    settings = (
        "--batch-size 8 --codistill-exchange checkpoints --codistill-interval 20 --codistill-replica-wait".split()
    )

    def train(folder, num_updates):
        length = ["--batch-size", "8", "--max-updates", str(num_updates)]
        commands = codistill_commands(tmp_path / folder, addresses_of(2), *settings, *length)
        for result in run_together(commands, timeout_s=150):
            assert result.returncode == 0, result.output

    train("straight", 45)
    train("paused", 30)
    train("paused", 45)
    for model in "01":
        first, second = (checkpoint(tmp_path / folder / model) for folder in ("straight", "paused"))
        assert_equal_states(first, second)
        assert first["replicas"]["elapsed"] == {str(1 - int(model)): 40}
        logged = records(tmp_path / "paused" / model, "train")
        assert [record["codistill_staleness"] for record in logged] == [update % 20 for update in range(45)]
        assert {record["codistill_peers"] for record in logged} == {1}
        num_values = sum(tensor.numel() for tensor in first["model"].values())
        sent = [record["codistill_mbit"] for record in logged if record["codistill_mbit"]]
        assert sent == pytest.approx([num_values * 32e-6] * 3, rel=0.02)


def test_checkpoints_of_another_architecture_are_refused_before_training(tmp_path):
    settings = ["--codistill-exchange", "checkpoints", "--max-updates", "3"]
    commands = codistill_commands(tmp_path, addresses_of(2), *settings)
    commands[1] += ["--model", "wrn10_2"]
    for result in run_together(commands, timeout_s=60):
        assert result.returncode == 2
        assert "architecture (checkpoints need the same; --codistill-exchange predictions does not)" in result.output


def test_a_model_that_is_told_to_stop_says_goodbye_and_the_other_goes_on_at_once(tmp_path):
    commands = codistill_commands(
        tmp_path, addresses_of(2), "--epochs", "1", "--codistill-timeout", "300", "--batch-size", "8"
    )
    with running(commands) as processes:
        wait_for_updates(processes[1], tmp_path / "1", 5)
        processes[1].send_signal(signal.SIGTERM)
        assert processes[1].wait(60) == 128 + signal.SIGTERM
        assert processes[0].wait(200) == 0
    assert checkpoint(tmp_path / "1")["elapsed"] >= 5
    trained = records(tmp_path / "0", "train")
    assert len(trained) == 1437 // 8
    assert trained[0]["codistill_peers"] == 1
    assert trained[-1]["codistill_peers"] == 0


def test_a_model_that_is_killed_costs_the_other_its_term_and_not_its_training(tmp_path):
    commands = codistill_commands(
        tmp_path, addresses_of(2), "--epochs", "1", "--codistill-timeout", "2", "--batch-size", "8"
    )
    with running(commands) as processes:
        wait_for_updates(processes[1], tmp_path / "1", 5)
        processes[1].kill()
        assert processes[0].wait(200) == 0
    trained = records(tmp_path / "0", "train")
    assert len(trained) == 1437 // 8
    assert [trained[at]["codistill_peers"] for at in (0, -1)] == [1, 0]
    assert trained[-1]["codistill_skipped"] == 1
    assert records(tmp_path / "0", "end")[-1]["reason"] == "finished"


@pytest.mark.slow
def test_a_model_that_is_killed_and_started_again_skips_to_the_other_and_teaches_again(tmp_path):
    commands = codistill_commands(
        tmp_path, addresses_of(2), *"--epochs 6 --batch-size 16 --save-updates 1 --codistill-timeout 1".split()
    )
    num_updates = 6 * (1437 // 16)
    with running(commands) as processes:
        wait_for_updates(processes[1], tmp_path / "1", 5)
        processes[1].kill()
        processes[1].wait()
        wait_for_updates(processes[0], tmp_path / "0", 40)
        with running(commands[1:]) as (restarted,):
            assert restarted.wait(150) == 0
            assert processes[0].wait(150) == 0
    peers = [record["codistill_peers"] for record in records(tmp_path / "0", "train")]
    assert len(peers) == num_updates
    assert peers[0] == peers[-1] == 1
    assert min(peers) == 0
    assert len(records(tmp_path / "1", "start")) == 2
    assert sum(record["skipped"] for record in records(tmp_path / "1", "skip")) > 20
    last = records(tmp_path / "1", "train")[-1]
    assert (last["update"], last["codistill_peers"]) == (num_updates, 1)
    assert records(tmp_path / "0", "skip") == []


@pytest.mark.slow
def test_models_of_different_architecture_teach_each_other(tmp_path):
    commands = codistill_commands(
        tmp_path, addresses_of(2), *"--image-size 32 --batch-size 4 --max-updates 3 --model resnet18".split()
    )
    commands[1] += ["--model", "resnet50"]
    for result in run_together(commands, timeout_s=180):
        assert result.returncode == 0, result.output
    sizes = [records(tmp_path / str(i), "start")[0]["parameters"] for i in range(2)]
    assert sizes[0] < 12e6 < 20e6 < sizes[1]
    trained = [records(tmp_path / str(i), "train") for i in range(2)]
    for mine, theirs in zip(*trained, strict=True):
        assert mine["codistill_peers"] == theirs["codistill_peers"] == 1
        assert mine["codistill_mse"] == pytest.approx(theirs["codistill_mse"], rel=1e-5)
        assert mine["codistill_mse"] > 0


@pytest.mark.slow
def test_two_ranks_of_a_model_are_one_rank_with_twice_the_batch(tmp_path):
    settings = [*WITHOUT_BATCH_NORM, *"--max-updates 6 --augmentation cifar --lr-batch-size 0".split()]
    one = launch_command(tmp_path / "one", 2, 1, *settings, "--batch-size", "16")
    two = launch_command(tmp_path / "two", 2, 2, *settings, "--batch-size", "8")
    for command in (one, two):
        (result,) = run_together([command], timeout_s=200)
        assert result.returncode == 0, result.output
    for model in ("0", "1"):
        expected, found = (checkpoint(tmp_path / run / model)["model"] for run in ("one", "two"))
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4, msg=name)
        expected, found = (records(tmp_path / run / model, "train") for run in ("one", "two"))
        for key in ("loss", "codistill_mse", "top1", "codistill_agreement"):
            assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], rel=1e-4)
        assert {r["codistill_peers"] for r in found} == {1}
        assert found[0]["codistill_mbit"] < expected[0]["codistill_mbit"]  # of one device
        assert records(tmp_path / "two" / model, "valid")[-1]["valid_images"] == 360


def test_the_ranks_of_a_model_stop_at_the_same_update_when_the_launcher_is_told_to(tmp_path):
    command = launch_command(tmp_path, 1, 2, "--epochs", "100", "--batch-size", "8")
    with running([command]) as (launcher,):
        wait_for_updates(launcher, tmp_path / "0", 5)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(60) == 128 + signal.SIGTERM
    stopped_at = checkpoint(tmp_path / "0")["elapsed"]
    assert stopped_at >= 5
    assert records(tmp_path / "0", "end")[-1]["update"] == stopped_at


@pytest.mark.parametrize(
    "hook",
    [
        "powersgd --hook-start 2",
        pytest.param("post_localsgd --hook-start 2 --localsgd-period 2", marks=pytest.mark.slow),
    ],
)
def test_the_communication_hooks_of_torch_train_one_model_on_two_ranks(tmp_path, hook):
    settings = f"--epochs 2 --batch-size 32 --lr-batch-size 0 --lr 0.1 --comm-hook {hook}".split()
    (result,) = run_together([launch_command(tmp_path, 1, 2, *settings)], timeout_s=150)
    assert result.returncode == 0, result.output
    trained = [record["loss"] for record in records(tmp_path / "0", "train")]
    assert sum(trained[-4:]) < 0.9 * sum(trained[:4])


@pytest.mark.slow
def test_local_steps_are_averaged_before_an_evaluation_which_is_that_of_what_is_saved(tmp_path):
    settings = "--lr 0.02 --lr-batch-size 0 --batch-size 16 --max-updates 40 --eval-epochs 1000".split()
    hook = "--comm-hook post_localsgd --hook-start 2 --localsgd-period 1000".split()
    (result,) = run_together([launch_command(tmp_path, 1, 2, *settings, *hook)], timeout_s=150)
    assert result.returncode == 0, result.output
    file = tmp_path / "0" / "checkpoint_last.pt"
    stored = torch.load(file, weights_only=True)
    stored["options"]["devices_per_model"], stored["evaluated_at"] = 1, 0  # for one process, which evaluates it again
    torch.save(stored, file)
    (result,) = run_together([vision_command(tmp_path / "0", "--seed", "1", *settings)], timeout_s=150)
    assert result.returncode == 0, result.output
    by_two, by_one = records(tmp_path / "0", "valid")
    assert by_two["valid_loss"] == pytest.approx(by_one["valid_loss"], rel=1e-5)
    assert by_two["valid_top1"] == by_one["valid_top1"]


@pytest.mark.slow
def test_powersgd_over_gloo_trains_a_model_that_takes_more_than_one_bucket(tmp_path):
    settings = "--model wrn10_4 --batch-size 8 --max-updates 12 --eval-epochs 1000 --comm-hook powersgd --hook-start 2"
    (result,) = run_together([launch_command(tmp_path, 1, 2, *settings.split())], timeout_s=150)
    assert result.returncode == 0, result.output
    assert len(records(tmp_path / "0", "train")) == 12


def test_another_data_seed_is_refused_before_training(tmp_path):
    commands = codistill_commands(tmp_path, addresses_of(2))
    commands[1] += ["--codistill-data-seed", "2"]
    for result in run_together(commands, timeout_s=120):
        assert result.returncode == 2
        assert "make equal: --codistill-data-seed: " in result.output
    assert not records(tmp_path / "0", "train")


def test_training_does_not_go_on_with_other_batches(tmp_path):
    settings = ["--max-updates", "1"]
    changed = vision_command(tmp_path, *settings, "--batch-size", "16")
    for command, returncode in ((vision_command(tmp_path, *settings), 0), (changed, 2)):
        (result,) = run_together([command], timeout_s=120)
        assert result.returncode == returncode, result.output
    assert "--batch-size is 16, but" in result.output
    assert "was trained with 32" in result.output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--momentum", "0.5"], "--momentum is 0.5, but"),
        (["--weight-decay", "0"], "a training with none and one with some do not go on from each other"),
        (["--norm-weight-decay"], "--norm-weight-decay is True, but"),
    ],
)
def test_training_does_not_go_on_with_settings_that_the_checkpoint_would_overrule(tmp_path, settings, message):
    (result,) = run_together([vision_command(tmp_path, "--max-updates", "1")], timeout_s=120)
    assert result.returncode == 0, result.output
    (result,) = run_together([vision_command(tmp_path, "--max-updates", "2", *settings)], timeout_s=120)
    assert result.returncode == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_the_same_settings_on_other_pixels_are_never_distilled_from(tmp_path):
    for model in (0, 1):
        for split, count in (("train", 12), ("val", 2)):
            for label in ("a", "b"):
                folder = tmp_path / f"images{model}/{split}/{label}"
                folder.mkdir(parents=True)
                for number in range(count):
                    pixels = np.full((8, 8, 3), 10 * number + (label == "a"), np.uint8)
                    pixels[0, 0, 0] += model  # one value of one pixel differs
                    Image.fromarray(pixels).save(folder / f"{number}.png")
    commands = codistill_commands(
        tmp_path, addresses_of(2), *"--image-size 8 --augmentation none --batch-size 4 --epochs 2".split()
    )
    for model, command in enumerate(commands):
        command += ["--dataset", f"imagefolder:{tmp_path}/images{model}"]
    results = run_together(commands, timeout_s=120)
    assert [result.returncode for result in results].count(1) >= 1  # the other one may see the goodbye first
    assert any("3 batches in a row differ" in result.output for result in results)
    for model in ("0", "1"):
        assert all(record.get("codistill_peers", 0) == 0 for record in records(tmp_path / model, "train"))
