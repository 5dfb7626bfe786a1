"""timm's task in real processes: two lines in its script, Algorithm 1 written out, resumed, on two ranks."""

import copy
import math
import re
import sys
import time

import pytest
import timm_loop
import torch
from helpers import free_ports, start
from hosts import LOOPS, place, run_models

from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.integrations.timm_task import CodistillationTask, coordinate

PAGE = (LOOPS.parents[1] / "docs" / "timm.md").read_text()
hosts = pytest.mark.hosts


@pytest.fixture
def patched(tmp_path):
    """timm's script in small, with the lines of the page put in."""
    added, taken, put = re.search(r"```diff\n\+(.*)\n-(.*)\n\+(.*)\n```", PAGE).groups()
    source = (LOOPS / "timm_loop.py").read_text()
    assert source.count(taken + "\n") == 1
    source = source.replace(taken + "\n", put + "\n").replace("import argparse\n", f"import argparse\n{added}\n")
    (tmp_path / "train.py").write_text(source)
    return str(tmp_path / "train.py")


def batches_of(rank, ranks, count, mixup=0.0):
    """The first batches that rank gets, as a loader of its own makes them."""
    loader = timm_loop.make_loader(mixup=mixup)
    batches = coordinate(loader, 1, lambda: None)
    batches.rank, batches.table = rank, type(batches.table)(timm_loop.NUM_SAMPLES, 1, timm_loop.BATCH_SIZE, ranks, 1)
    found = []
    while len(found) < count:
        found += list(loader)
        batches.move_to(len(found))
    return found[:count]


def reference(weight, interval=1, ranks=1, accumulate=1, exchange="predictions", mixup=0.0, epochs=2):
    """Algorithm 1 in one process: a row at a time, SGD by hand, no loss of the package or of timm."""
    models = []
    for model in range(2):
        torch.manual_seed(model + 1)
        models.append(timm_loop.Classifier())
    speeds = [[torch.zeros_like(p) for p in model.parameters()] for model in models]
    per_epoch = timm_loop.NUM_SAMPLES // (timm_loop.BATCH_SIZE * ranks)
    of_ranks = [batches_of(rank, ranks, epochs * per_epoch, mixup) for rank in range(ranks)]
    losses, totals, copies = [[], []], [0.0, 0.0], models
    for number in range(epochs * per_epoch):
        due, in_epoch = number % interval == 0, number % per_epoch
        if exchange == "checkpoints" and due:
            copies = [copy.deepcopy(model) for model in models]
        teachers = copies if exchange == "checkpoints" else models
        for i, model in enumerate(models):
            found = []
            for batches in of_ranks:
                inputs, targets = batches[number]
                total = torch.zeros(())
                for row in range(len(inputs)):
                    mine = model(inputs[row : row + 1])[0]
                    lprobs = mine - torch.logsumexp(mine, 0)
                    total = total - (lprobs[targets[row]] if targets.dim() == 1 else (targets[row] * lprobs).sum())
                    if due or exchange == "checkpoints":
                        theirs = teachers[1 - i](inputs[row : row + 1])[0].detach()
                        total = total + weight * (mine - theirs).square().sum() / len(mine)
                found.append(total / len(inputs))
            losses[i].append(float(found[0].detach()))
            totals[i] = totals[i] + sum(found) / ranks / accumulate
        if (in_epoch + 1) % accumulate == 0 or in_epoch + 1 == per_epoch:
            for i, model in enumerate(models):
                gradients = torch.autograd.grad(totals[i], list(model.parameters()))
                for parameter, gradient, speed in zip(model.parameters(), gradients, speeds[i], strict=True):
                    speed.mul_(0.9).add_(gradient)
                    parameter.data = parameter.data - 0.02 * speed
                totals[i] = 0.0
    return losses, [model.state_dict() for model in models]


def test_an_epoch_begins_once_also_where_a_loader_with_workers_asks_twice():
    begun = []
    loader = timm_loop.make_loader(workers=1)
    batches = coordinate(loader, 1, lambda: begun.append(batches.elapsed))
    for _ in range(3):
        batches.move_to(batches.elapsed + len(list(loader)))
    assert begun == [0, len(batches), 2 * len(batches)]


@pytest.mark.parametrize(
    ("ranks", "options", "settings"),
    [
        (1, ["--workers", "1", "--model-ema"], {"interval": 2}),
        pytest.param(2, ["--epochs", "4"], {}, marks=hosts),
        pytest.param(2, ["--epochs", "4", "--torchcompile", "eager"], {}, marks=hosts),
        pytest.param(1, ["--grad-accum-steps", "3"], {}, marks=hosts),
        pytest.param(1, ["--mixup", "0.5", "--workers", "2"], {}, marks=hosts),
        pytest.param(1, [], {"exchange": "checkpoints", "interval": 4, "replica_wait": 1}, marks=hosts),
    ],
)
def test_timms_task_follows_algorithm_1(tmp_path, patched, ranks, options, settings):
    given = dict(zip(options[::2], options[1::2], strict=False))
    found, _ = run_models(tmp_path, patched, "m", *options, ranks=ranks, weight=3.0, **settings)
    losses, parameters = reference(
        3.0, ranks=ranks, accumulate=int(given.get("--grad-accum-steps", 1)), mixup=float(given.get("--mixup", 0)),
        epochs=int(given.get("--epochs", 2)),
        **{name: value for name, value in settings.items() if name != "replica_wait"},
    )  # fmt: skip
    assert found[0]["batches"] == found[1]["batches"]  # to the last pixel, though the models' seeds differ
    assert len({pixels for pixels, _ in found[0]["batches"]}) == len(losses[0]) >= 20  # augmented anew in each pass
    for i, state in enumerate(found):
        assert state["keys"] == ["codistill_loss", "loss", "output", "task_loss"]
        assert state["losses"] == pytest.approx(losses[i], abs=1e-5)
        for name, value in state["state_dict"].items():
            torch.testing.assert_close(value, parameters[i][name], atol=1e-5, rtol=0, msg=name)
        if "--model-ema" in options:
            assert not torch.equal(state["state_dict_ema"]["4.bias"], state["state_dict"]["4.bias"])


@hosts
@pytest.mark.parametrize("settings", [{}, {"exchange": "checkpoints", "interval": 3, "replica_wait": 1}])
def test_a_resumed_task_goes_on_bit_for_bit(tmp_path, patched, settings):
    whole, _ = run_models(tmp_path, patched, "whole", "--epochs", "3", **settings)
    half, _ = run_models(tmp_path, patched, "part", "--epochs", "1", **settings)
    resumed, _ = run_models(
        tmp_path, patched, "part", "--epochs", "3", "--resume", str(tmp_path / "part{model}"), **settings
    )
    for one, first, other in zip(whole, half, resumed, strict=True):
        assert one["losses"] == first["losses"] + other["losses"]
        assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())


def wait_for(condition, what):
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def epochs_with(log, peers):
    return len(re.findall(rf"codistillation: .*\bpeers {peers}\b", log.read_text()))


@hosts
def test_a_killed_task_comes_back_and_begins_where_the_other_is(tmp_path, patched):
    ports, until, saved = free_ports(2), tmp_path / "until", str(tmp_path / "saved")
    places = [place(model, ports, timeout=1, start_timeout=120) for model in range(2)]
    common = ["--epochs", "100000", "--until", str(until)]
    logs = [tmp_path / name for name in ("0", "1", "back")]
    for log in logs:
        log.touch()
    of_model = [[sys.executable, patched, str(tmp_path / f"m{model}"), str(model + 1), *common] for model in range(2)]
    running = [start(of_model[0], str(logs[0]), places[0])]
    try:
        killed = start([*of_model[1], "--save", saved, "--kill-after-epoch", "3"], str(logs[1]), places[1])
        running.append(killed)
        assert killed.wait(120) == -9
        wait_for(lambda: epochs_with(logs[0], 0) > 20, "the survivor has gone on alone")
        heard = epochs_with(logs[0], 1)
        running.append(start([*of_model[1], "--resume", saved], str(logs[2]), places[1]))
        wait_for(lambda: epochs_with(logs[2], 1) > 2, "it exchanges again")
        wait_for(lambda: epochs_with(logs[0], 1) > heard, "the survivor hears it")
        until.touch()
        assert [running[0].wait(120), running[2].wait(120)] == [0, 0]
    finally:
        for process in running:
            process.kill()
    skipped = re.findall(r"the other models are ahead; skipped (\d+) batches", logs[2].read_text())
    assert int(skipped[0]) >= 20 * 10  # ten batches an epoch


@pytest.mark.parametrize("fails", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    ("settings", "alone"),
    [
        ({"require_peers": "always"}, "no model is left to teach"),
        pytest.param({"exchange": "checkpoints", "interval": 3}, "teaches no more", marks=pytest.mark.slow),
    ],
)
def test_a_task_has_finished_where_its_script_came_to_its_end_and_nowhere_else(
    tmp_path, patched, settings, alone, fails
):
    ports, until, log = free_ports(2), tmp_path / "until", tmp_path / "log"
    places = [place(model, ports, timeout=1, start_timeout=120, **settings) for model in range(2)]
    options = (
        ["--save", str(tmp_path / "nowhere" / "file")] if fails else [],
        ["--epochs", "100000", "--until", str(until)],
    )
    of_model = [[sys.executable, patched, str(tmp_path / f"m{i}"), str(i + 1), *options[i]] for i in range(2)]
    log.touch()
    (tmp_path / "first").touch()
    running = [start(of_model[1], str(log), places[1])]
    try:
        running.append(start(of_model[0], str(tmp_path / "first"), places[0]))
        assert running[1].wait(120) == fails
        wait_for(
            lambda: running[0].poll() is not None or alone in log.read_text() or epochs_with(log, r"\d") > 300,
            "the other one goes on",
        )
        until.touch()
        assert (running[0].wait(120) == 0) == (not fails or "require_peers" not in settings)
    finally:
        for process in running:
            process.kill()
    assert (alone in log.read_text()) == fails
    assert f"it said goodbye: {'its process ended' if fails else 'finished'}" in log.read_text()


@hosts
@pytest.mark.parametrize(("codec", "divergence"), [("tokens:16", "kl"), ("topk:2", "kl"), ("int8", "mse")])
def test_the_task_takes_every_kind_of_codec_in_bf16(tmp_path, patched, codec, divergence):
    found, outputs = run_models(tmp_path, patched, "m", "--amp", codec=codec, divergence=divergence)
    for state, output in zip(found, outputs, strict=True):
        assert len(state["losses"]) == 20
        assert all(map(math.isfinite, state["losses"]))
        assert "differ" not in output
        assert "peers 1" in output
        assert "peers 0" not in output


def test_a_model_alone_sees_other_batches_in_every_epoch():
    loader = timm_loop.make_loader()
    task = task_of(loader).train()
    seen = [[task(*batch)["output"].sum().item() for batch in loader] for _ in range(2)]
    assert not set(seen[0]) & set(seen[1])


def task_of(loader, **settings):
    return CodistillationTask(timm_loop.Classifier(), loader=loader, verbose=False, **settings)


def test_the_task_trains_alone_as_timms_own_does():
    loader = timm_loop.make_loader()
    task = task_of(loader).train()
    inputs, targets = next(iter(loader))
    found = task(inputs, targets)
    assert sorted(found) == ["codistill_loss", "loss", "output", "task_loss"]
    assert found["codistill_loss"] == 0
    torch.testing.assert_close(found["loss"], torch.nn.functional.cross_entropy(found["output"], targets))
    assert task.get_checkpoint_state().keys() == {"state_dict", "task_state"}


@pytest.mark.parametrize(
    ("what", "loader"),
    [
        ("--reprob 0", lambda: timm_loop.make_loader(reprob=0.5)),
        ("--use-multi-epochs-loader", lambda: timm_loop.make_loader(multi_epochs=True)),
        ("is a list", list),
    ],
)
def test_a_loader_whose_batches_cannot_be_shared_is_refused(what, loader):
    with pytest.raises(ConfigError, match=what):
        task_of(loader())


def test_what_cannot_work_in_a_task_is_refused():
    with pytest.raises(ConfigError, match="--codistill-parts is '2'"):
        task_of(timm_loop.make_loader(), config=CodistillationConfig(codistill_parts="2"))
    with pytest.raises(ConfigError, match="--codistill-lookahead is set"):
        task_of(timm_loop.make_loader(), config=CodistillationConfig(codistill_lookahead=True))


def test_timm_can_still_switch_mixing_off():
    loader = timm_loop.make_loader(mixup=0.5)
    coordinate(loader, 1, lambda: None)
    assert loader.mixup_enabled
    loader.mixup_enabled = False
    assert all(set(target.flatten().tolist()) <= {0.0, 1.0} for _, target in loader)
