"""Real vision processes whose updates are made of several batches, are averaged over time, and mix their images."""

import signal

import pytest
import torch
from helpers import run_together
from test_vision_runs import (
    WITHOUT_BATCH_NORM,
    addresses_of,
    assert_equal_states,
    checkpoint,
    running,
    wait_for_updates,
)
from vision_helpers import codistill_commands, launch_command, records, vision_command


def run_all(commands, timeout_s=200):
    for result in run_together(commands, timeout_s=timeout_s):
        assert result.returncode == 0, result.output


@pytest.mark.parametrize("extra", ["", "--codistill-interval 3", "--codistill-exchange checkpoints"])
def test_codistilled_updates_of_two_batches_are_those_of_one_of_twice_the_size(tmp_path, extra):
    settings = [*WITHOUT_BATCH_NORM, *"--max-updates 7 --augmentation cifar --lr-batch-size 0".split(), *extra.split()]
    settings += ["--codistill-replica-wait"] if "checkpoints" in extra else []
    whole, parts = (
        codistill_commands(tmp_path / name, addresses_of(2), *settings, *sizes.split())
        for name, sizes in (("whole", "--batch-size 16"), ("parts", "--batch-size 8 --update-freq 2"))
    )
    run_all(whole)
    run_all(parts)
    for model in "01":
        expected, found = (checkpoint(tmp_path / name / model) for name in ("whole", "parts"))
        assert expected["elapsed"] == found["elapsed"] == 7
        for name, value in found["model"].items():
            torch.testing.assert_close(value, expected["model"][name], atol=1e-5, rtol=1e-4, msg=name)
        expected, found = (records(tmp_path / name / model, "train") for name in ("whole", "parts"))
        assert [record["update"] for record in found] == list(range(1, 8))
        for key in ("loss", "top1", "lr"):
            assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], rel=1e-4), key
        exchanged = [record for record in found if record.get("codistill_peers")]
        assert {record["codistill_peers"] for record in exchanged} == {1}
        assert {record["codistill_skipped"] for record in exchanged} == {0}
        if not extra:
            wanted = [record["codistill_mbit"] for record in expected]
            assert [record["codistill_mbit"] for record in found] == pytest.approx(wanted, rel=0.2)


@pytest.mark.slow
def test_ranks_average_the_gradients_of_all_batches_of_an_update(tmp_path):
    settings = [*WITHOUT_BATCH_NORM, *"--max-updates 5 --augmentation cifar --lr-batch-size 0".split()]
    one = launch_command(tmp_path / "one", 1, 1, *settings, "--batch-size", "32")
    four = launch_command(tmp_path / "four", 1, 2, *settings, "--batch-size", "8", "--update-freq", "2")
    run_all([one])
    run_all([four])
    expected, found = (checkpoint(tmp_path / name / "0")["model"] for name in ("one", "four"))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_another_number_of_batches_in_an_update_is_refused_before_training(tmp_path):
    commands = codistill_commands(tmp_path, addresses_of(2), "--batch-size", "8")
    commands[1] += ["--update-freq", "2"]
    for result in run_together(commands, timeout_s=120):
        assert result.returncode == 2
        assert "--update-freq" in result.output


def test_mixed_and_averaged_training_goes_on_as_without_a_pause_bit_for_bit(tmp_path):
    settings = (
        "--batch-size 8 --update-freq 2 --ema-decay 0.9 --mixup 0.4 --cutmix 1 --auto-augment rand-m9-mstd0.5 "
        "--drop-rate 0.2 --max-updates 60 --epochs 2"
    ).split()
    straight = vision_command(tmp_path / "straight", *settings, "--num-workers", "1")
    paused = vision_command(tmp_path / "paused", *settings)
    with running([straight, paused]) as processes:
        wait_for_updates(processes[1], tmp_path / "paused", 4)
        processes[1].send_signal(signal.SIGTERM)
        assert processes[1].wait(60) == 128 + signal.SIGTERM
        assert processes[0].wait(200) == 0
    assert 4 <= checkpoint(tmp_path / "paused")["elapsed"] < 60
    run_all([paused])
    first, second = checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "paused")
    assert_equal_states(first, second)
    assert first["model_ema"].keys() == first["model"].keys()
    assert all(torch.equal(value, second["model_ema"][name]) for name, value in first["model_ema"].items())
    assert not all(torch.equal(value, first["model"][name]) for name, value in first["model_ema"].items())


def test_models_that_mix_and_augment_teach_each_other(tmp_path):
    settings = "--batch-size 8 --max-updates 6 --mixup 0.4 --auto-augment rand-m9-mstd0.5 --ema-decay 0.9".split()
    run_all(codistill_commands(tmp_path, addresses_of(2), *settings))
    mine, theirs = (records(tmp_path / model, "train") for model in "01")
    assert [r["codistill_mse"] for r in mine] == pytest.approx([r["codistill_mse"] for r in theirs], rel=1e-5)
    assert {(r["codistill_peers"], r["codistill_skipped"]) for r in mine + theirs} == {(1, 0)}


def test_parts_of_mixed_batches_are_trained_on_as_the_whole(tmp_path):
    settings = [*WITHOUT_BATCH_NORM, *"--max-updates 6 --augmentation cifar --mixup 0.4 --batch-size 6".split()]
    settings += "--update-freq 2 --codistill-interval 2 --codistill-codec fp32".split()
    for name, parts in (("whole", "1"), ("parts", "4")):
        run_all(codistill_commands(tmp_path / name, addresses_of(2), *settings, "--codistill-parts", parts))
    for model in "01":
        expected, found = (checkpoint(tmp_path / name / model)["model"] for name in ("whole", "parts"))
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0, msg=name)
        expected, found = (records(tmp_path / name / model, "train") for name in ("whole", "parts"))
        for key in ("loss", "nll_loss", "codistill_loss"):
            assert [r.get(key, 0) for r in found] == pytest.approx([r.get(key, 0) for r in expected], rel=1e-4), key
        assert {r["codistill_peers"] for r in found if r.get("codistill_mbit", 0)} == {1}
        assert sum(r.get("codistill_mbit", 0) for r in found) > sum(
            r.get("codistill_mbit", 0) for r in expected
        )  # more headers


def test_a_model_with_batch_normalisation_is_not_cut_and_says_so(tmp_path):
    (result, _) = run_together(
        codistill_commands(tmp_path, addresses_of(2), "--max-updates", "2", "--batch-size", "4"), timeout_s=120
    )
    assert result.returncode == 0, result.output
    assert "batches stay in one part: the model has batch normalisation" in result.output


def both_ways(folder, *extra):
    """A pair whose predictions are sent when due, and one that sends them ahead."""
    settings = "--max-updates 5 --augmentation cifar --mixup 0.4 --batch-size 6 --update-freq 2 --warmup-lr 0".split()
    for name, more in (("when_due", []), ("ahead", ["--codistill-lookahead"])):
        addresses = addresses_of(2)
        run_all(codistill_commands(folder / name, addresses, *settings, "--codistill-codec", "fp32", *extra, *more))


def test_images_sent_ahead_are_those_sent_when_due_where_nothing_is_learned_meanwhile(tmp_path):
    both_ways(tmp_path, "--lr", "0")  # batch normalisation: its statistics must not move
    for model in "01":
        expected, found = (records(tmp_path / name / model, "train") for name in ("when_due", "ahead"))
        for key in ("loss", "codistill_loss", "codistill_peers", "codistill_skipped"):
            assert [record[key] for record in found] == [record[key] for record in expected], key
        expected, found = (checkpoint(tmp_path / name / model) for name in ("when_due", "ahead"))
        assert_equal_states(found, expected)


def test_images_sent_ahead_are_predicted_before_the_update_between(tmp_path):
    both_ways(tmp_path, "--lr", "0.1", "--warmup-epochs", "0")
    for model in "01":
        when_due, ahead = (
            [record["loss"] for record in records(tmp_path / name / model, "train")] for name in ("when_due", "ahead")
        )
        assert ahead[0] == when_due[0]  # nothing was learned yet
        assert ahead != when_due
