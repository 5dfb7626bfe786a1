"""The Hugging Face trainer in real processes: against Algorithm 1 written out, resumed, killed, sharded, in parts."""

import copy
import re
import sys
import time

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import preloaded
import transformers_loop
from helpers import free_ports, start
from hosts import LOOPS, place, run_models

from fairseq_codistill.sampling import Timetable

preloaded.preload(preloaded.HUGGING_FACE)
LOOP, NUM_UPDATES = "transformers_loop.py", 20
hosts = pytest.mark.hosts


def batches_of(rank, ranks):
    """The samples of each batch of a rank in an epoch: dealt in turn, and filled from the front as accelerate does."""
    size, table = transformers_loop.BATCH_SIZE, Timetable(transformers_loop.NUM_SAMPLES, 1, 1, 1, 1)

    def of_epoch(epoch):
        order = table.order(epoch + 1)
        batches = [order[first : first + size] for first in range(0, len(order), size)]
        while len(batches) % ranks:
            batches.append(batches[len(batches) % ranks - 1])
        return batches[rank::ranks]

    return of_epoch


def rows_of(model, kind, samples):
    """The logits and targets of every row that counts, one at a time."""
    data = transformers_loop.make_data()
    shift = 0 if kind == "encoder-decoder" else 1
    collate = transformers_loop.collate if shift else transformers_loop.collate_for_encoder_decoder
    batch = collate([data[sample] for sample in samples])
    logits, labels = model(**batch).logits, batch["labels"]
    for row in range(len(samples)):
        for column in range(shift, labels.size(1)):
            if labels[row, column] != -100:
                yield logits[row, column - shift], int(labels[row, column])


def reference(kind, num_models=2, weight=3.0, interval=1, accumulate=1, ranks=1, exchange="predictions", smoothing=0.0):
    """Algorithm 1 in one process: plain loops, one row at a time, SGD by hand, no loss of anybody else."""
    models = [transformers_loop.make_model(kind, model + 1) for model in range(num_models)]
    of_ranks, copies = [batches_of(rank, ranks) for rank in range(ranks)], models
    per_epoch = len(of_ranks[0](0))
    updates = [(epoch, first) for epoch in range(NUM_UPDATES) for first in range(0, per_epoch, accumulate)]
    losses = [[] for _ in models]
    for number, (epoch, first) in enumerate(updates[:NUM_UPDATES]):
        due = number % interval == 0
        if exchange == "checkpoints" and due:
            copies = [copy.deepcopy(model) for model in models]
        teachers = copies if exchange == "checkpoints" else models
        micro_batches = range(first, min(first + accumulate, per_epoch))
        found = []
        for i, model in enumerate(models):
            totals, num_rows = [], 0
            for micro_batch in micro_batches:
                for of_epoch in of_ranks:
                    samples, total = of_epoch(epoch)[micro_batch], torch.zeros(())
                    others = [
                        [logits.detach() for logits, _ in rows_of(teacher, kind, samples)]
                        for j, teacher in enumerate(teachers)
                        if j != i and (due or exchange == "checkpoints")
                    ]
                    for row, (mine, target) in enumerate(rows_of(model, kind, samples)):
                        num_rows += 1
                        lprobs = mine - torch.logsumexp(mine, 0)
                        total = total - (1 - smoothing) * lprobs[target] - smoothing * lprobs.mean()
                        for theirs in others:
                            difference = (mine - theirs[row]).square().sum() / len(mine)
                            total = total + weight / (num_models - 1) * difference
                    totals.append(total)
            losses[i] += [float(total.detach()) / num_rows * ranks for total in totals[::ranks]]
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            found.append((trained, torch.autograd.grad(sum(totals) / num_rows, trained)))
        for trained, gradients in found:
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.data = parameter.data - 0.1 * gradient
    return losses, models


@pytest.mark.parametrize(
    ("kind", "ranks", "options", "settings"),
    [
        ("causal", 1, ["--accumulate", "2"], {"interval": 2}),
        pytest.param("causal", 2, ["--accumulate", "2", "--workers", "1"], {}, marks=hosts),
        pytest.param("causal", 2, ["--fsdp"], {}, marks=hosts),
        pytest.param("causal", 1, [], {"exchange": "checkpoints", "interval": 4, "replica_wait": 1}, marks=hosts),
        pytest.param("encoder-decoder", 1, ["--smoothing", "0.1"], {"interval": 3}, marks=hosts),
        pytest.param("encoder-decoder", 2, ["--accumulate", "2"], {}, marks=hosts),
        pytest.param("lora", 1, [], {}, marks=hosts),
        pytest.param("lora", 2, ["--fsdp"], {}, marks=hosts),
    ],
)
def test_the_hugging_face_trainer_follows_algorithm_1(tmp_path, kind, ranks, options, settings):
    given = dict(zip(options[::2], options[1::2], strict=False))
    found, _ = run_models(tmp_path, LOOP, "m", "--kind", kind, *options, ranks=ranks, weight=3.0, **settings)
    losses, models = reference(
        kind, ranks=ranks, accumulate=int(given.get("--accumulate", 1)), smoothing=float(given.get("--smoothing", 0)),
        **{name: value for name, value in settings.items() if name != "replica_wait"},
    )  # fmt: skip
    for i, state in enumerate(found):
        assert [loss for _, loss in state["losses"]] == pytest.approx(losses[i], abs=1e-5)
        parameters = dict(models[i].named_parameters())
        shards = [name for name in parameters if "lora" not in name] if "--fsdp" in options else []
        assert sorted(state["sharded"]) == sorted(shards)
        assert set(parameters) <= set(state["model"])
        for name, value in parameters.items():
            torch.testing.assert_close(state["model"][name], value.detach(), atol=1e-5, rtol=0, msg=name)


@hosts
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--accumulate", "2"], {}),
        (["--kind", "encoder-decoder"], {"exchange": "checkpoints", "interval": 3, "replica_wait": 1}),
    ],
)
def test_a_resumed_trainer_goes_on_bit_for_bit(tmp_path, options, settings):
    common = ["--dropout", "0.3", "--workers", "1", "--save-every", "9", *options]
    whole, _ = run_models(tmp_path, LOOP, "whole", *common, **settings)
    # The same command: the first time there is nothing to go on from.
    run_models(tmp_path, LOOP, "part", "--updates", "9", "--resume", *common, **settings)
    resumed, _ = run_models(tmp_path, LOOP, "part", "--resume", *common, **settings)
    for one, other in zip(whole, resumed, strict=True):
        assert [loss for loss in one["losses"] if loss[0] >= 9] == other["losses"]
        assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())


@hosts
def test_a_resumed_trainer_of_two_ranks_goes_on_bit_for_bit(tmp_path):
    common = ["--dropout", "0.3", "--save-every", "9"]
    whole, _ = run_models(tmp_path, LOOP, "whole", *common, ranks=2)
    run_models(tmp_path, LOOP, "part", "--updates", "9", *common, ranks=2)
    resumed, _ = run_models(tmp_path, LOOP, "part", "--resume", *common, ranks=2)
    for one, other in zip(whole, resumed, strict=True):
        assert [loss for loss in one["losses"] if loss[0] >= 9] == other["losses"]
        assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())


@hosts
@pytest.mark.parametrize("settings", [{}, {"exchange": "checkpoints", "interval": 4, "replica_wait": 1}])
def test_models_in_bf16_teach_each_other(tmp_path, settings):
    found, _ = run_models(tmp_path, LOOP, "m", "--bf16", **settings, **({} if settings else {"codec": "bf16"}))
    for state in found:
        logs = [log for log in state["log"] if "loss" in log]
        assert all(log["codistill_peers"] == 1 and log["codistill_skipped"] == 0 for log in logs)
        assert all(log["codistill_mse"] > 0 for log in logs)  # a copy that is the model itself would differ in nothing
        assert logs[-1]["loss"] < logs[0]["loss"]


@hosts
@pytest.mark.parametrize(
    ("codec", "divergence"), [("tokens:16", "kl"), ("topk:4", "kl"), ("columns:4", "mse"), ("int8", "kl")]
)
def test_the_trainer_takes_every_kind_of_codec(tmp_path, codec, divergence):
    found, _ = run_models(tmp_path, LOOP, "m", "--updates", "4", codec=codec, divergence=divergence)
    for state in found:
        assert all(log["codistill_peers"] == 1 for log in state["log"] if "loss" in log)


def wait_for(condition, what):
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def heard(log):
    """The updates at which a trainer had the predictions of its peer."""
    return [int(number) for number in re.findall(r"^(\d+) 1\.0$", log.read_text(), re.MULTILINE)]


@hosts
def test_a_killed_trainer_comes_back_and_skips_to_where_the_other_is(tmp_path):
    ports, until = free_ports(2), tmp_path / "until"
    places = [place(model, ports, timeout=1, start_timeout=120) for model in range(2)]
    common = [
        "--updates",
        "100000",
        "--samples",
        "4000",
        "--save-every",
        "20",
        "--accumulate",
        "2",
        "--until",
        str(until),
    ]
    files, logs = [str(tmp_path / f"m{model}") for model in range(2)], [tmp_path / name for name in ("0", "1", "back")]
    commands = [[sys.executable, str(LOOPS / LOOP), files[model], str(model + 1), *common] for model in range(2)]
    for log in logs:
        log.touch()
    running = [start(commands[0], str(logs[0]), places[0])]
    try:
        killed = start([*commands[1], "--kill-after", "50"], str(logs[1]), places[1])
        running.append(killed)
        assert killed.wait(120) == -9
        wait_for(lambda: "\n700 0.0\n" in logs[0].read_text(), "the survivor has gone on alone, into another epoch")
        running.append(start([*commands[1], "--resume"], str(logs[2]), places[1]))
        wait_for(lambda: heard(logs[2]), "it exchanges again")
        wait_for(lambda: heard(logs[0])[-1] > 700, "the survivor hears it")
        saved = lambda: [int(path.name.split("-")[1]) for path in (tmp_path / "m1.files").glob("checkpoint-*")]  # noqa: E731
        wait_for(lambda: max(saved()) > 700, "it saves where the other is")
        until.touch()
        assert [running[0].wait(120), running[2].wait(120)] == [0, 0]
    finally:
        for process in running:
            process.kill()
    assert heard(logs[2])[0] > 700  # saved at 40, it left out what lies between
