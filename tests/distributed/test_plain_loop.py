"""Codistiller in real processes: a loop of one's own against Algorithm 1 written out, resumed, killed, on two ranks."""

import copy
import re
import signal
import sys
import time
from pathlib import Path

import plain_loop
import pytest
import torch
from helpers import environment, free_ports, run_together, start

from fairseq_codistill import CoordinatedBatches

LOOP = str(Path(plain_loop.__file__))
NUM_BATCHES = 20


def place(model, ports, **extra):
    """The environment that codistill-launch gives a model; one model alone has no need of it."""
    if len(ports) == 1:
        return environment(**extra)
    return environment(
        CODISTILL_NUM_MODELS=str(len(ports)),
        CODISTILL_MODEL_INDEX=str(model),
        CODISTILL_ADDRESSES=",".join(f"127.0.0.1:{port}" for port in ports),
        **{"CODISTILL_CODEC": "fp32", **extra},
    )


def run_models(tmp_path, name, *options, num_models=2, ranks=1, timeout_s=120, ports=None, per_model=None, **settings):
    """A whole run; what each model wrote."""
    ports = ports or free_ports(num_models, ranks)
    meeting = free_ports(num_models)
    settings = {f"CODISTILL_{key.upper()}": str(value) for key, value in settings.items()}
    commands, places = [], []
    for model in range(num_models):
        for rank in range(ranks):
            commands.append([sys.executable, LOOP, str(tmp_path / f"{name}{model}"), str(model + 1), *options])
            commands[-1] += (per_model or {}).get(model, [])
            torchrun = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            torchrun = {**torchrun, "MASTER_PORT": str(meeting[model])} if ranks > 1 else {}
            places.append(place(model, ports, **settings, **torchrun))
    for result in run_together(commands, timeout_s, places):
        assert result.returncode == 0, result.output
    return [torch.load(tmp_path / f"{name}{model}", weights_only=True) for model in range(num_models)]


def reference(num_models, weight, interval=1, update_freq=1, ranks=1, exchange="predictions", taught_by=()):
    """Algorithm 1 in one process: plain loops, one row at a time, SGD by hand, no loss of the package."""
    data = plain_loop.make_data().tensors
    models = []
    for model in range(num_models):
        torch.manual_seed(model + 1)
        models.append(plain_loop.make_model(0.0))
    frozen = [plain_loop.make_teacher(entry) for entry in taught_by]
    speeds = [[torch.zeros_like(p) for p in model.parameters()] for model in models]
    orders = [
        CoordinatedBatches(plain_loop.NUM_SAMPLES, plain_loop.BATCH_SIZE, 7, rank, ranks) for rank in range(ranks)
    ]
    losses, totals, copies = [[] for _ in models], [0.0 for _ in models], models
    for number in range(NUM_BATCHES):
        updates, micro_batch = divmod(number, update_freq)
        due = updates % interval == 0
        if exchange == "checkpoints" and due and micro_batch == 0:
            copies = [copy.deepcopy(model) for model in models]
        teachers = copies if exchange == "checkpoints" else models
        for i, model in enumerate(models):
            of_ranks = []
            for order in orders:
                order.move_to(number)
                samples = next(iter(order))
                total = torch.zeros(())
                for sample in samples:
                    mine = model(data[0][sample])
                    total = total + torch.logsumexp(mine, 0) - mine[data[1][sample]]
                    for j, teacher in enumerate(teachers):
                        if j != i and (due or exchange == "checkpoints"):
                            theirs = teacher(data[0][sample]).detach()
                            total = total + weight / (num_models - 1) * (mine - theirs).square().sum() / len(mine)
                    for teacher, its_weight in frozen:
                        theirs = teacher.eval()(data[0][sample]).detach()
                        total = total + its_weight * (mine - theirs).square().sum() / len(mine)
                of_ranks.append(total / len(samples))
            losses[i].append(float(of_ranks[0].detach()))
            totals[i] = totals[i] + sum(of_ranks) / ranks / update_freq
        if micro_batch == update_freq - 1:
            for i, model in enumerate(models):
                gradients = torch.autograd.grad(totals[i], list(model.parameters()))
                for parameter, gradient, speed in zip(model.parameters(), gradients, speeds[i], strict=True):
                    speed.mul_(0.9).add_(gradient)
                    parameter.data = parameter.data - 0.1 * speed
                totals[i] = 0.0
    return losses, [model.state_dict() for model in models]


@pytest.mark.parametrize(
    ("num_models", "ranks", "options", "settings"),
    [
        (2, 1, [], {}),
        (3, 1, [], {"interval": 5}),
        (2, 1, ["--update-freq", "2"], {"interval": 2}),
        (2, 2, ["--workers", "1"], {}),
        (2, 1, [], {"exchange": "checkpoints", "interval": 4, "replica_wait": 1}),
        (2, 1, ["--update-freq", "2", "--split"], {"interval": 2, "parts": 4}),
        (2, 2, ["--split"], {"parts": 2}),
        (2, 1, ["--split"], {"exchange": "checkpoints", "interval": 4, "replica_wait": 1, "parts": 2}),
    ],
)
def test_a_plain_loop_follows_algorithm_1(tmp_path, num_models, ranks, options, settings):
    given = {"num_models": num_models, "ranks": ranks}
    found = run_models(
        tmp_path, "m", "--batches", str(NUM_BATCHES), *options, **given, **settings, weight=3.0, timeout_s=150
    )
    settings = {name: value for name, value in settings.items() if name not in ("replica_wait", "parts")}
    frequency = int(options[1]) if options and options[0] == "--update-freq" else 1
    losses, parameters = reference(**given, **settings, weight=3.0, update_freq=frequency)
    for i, state in enumerate(found):
        assert [loss for _, loss in state["losses"]] == pytest.approx(losses[i], abs=1e-5)
        for name, value in state["model"].items():
            torch.testing.assert_close(value, parameters[i][name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("num_models", "options", "settings", "taught_by"),
    [
        (1, ["--update-freq", "2"], {}, ["91:0.7", "92:0.7", "93:1.5"]),
        (2, [], {"interval": 3}, ["91:0.7", "92:2.0"]),
        (2, ["--split"], {"parts": 2}, ["91:0.7"]),
    ],
)
def test_teachers_are_terms_of_algorithm_1_alone_and_beside_peers(tmp_path, num_models, options, settings, taught_by):
    teachers = [word for entry in taught_by for word in ("--teacher", entry)]
    found = run_models(tmp_path, "m", *options, *teachers, num_models=num_models, **settings, weight=3.0)
    settings = {name: value for name, value in settings.items() if name not in ("replica_wait", "parts")}
    frequency = int(options[1]) if options and options[0] == "--update-freq" else 1
    losses, parameters = reference(num_models, 3.0, update_freq=frequency, taught_by=taught_by, **settings)
    for i, state in enumerate(found):
        assert [loss for _, loss in state["losses"]] == pytest.approx(losses[i], abs=1e-5)
        for name, value in state["model"].items():
            torch.testing.assert_close(value, parameters[i][name], atol=1e-5, rtol=0, msg=name)


def test_a_taught_loop_is_resumed_bit_for_bit_with_what_is_kept_of_its_teacher(tmp_path):
    common = ["--dropout", "0.3", "--teacher", "91:2"]
    runs = {}
    for name, batches in (("whole", ["20"]), ("part", ["9", "20"])):
        settings = {"teacher_cache": tmp_path / f"{name}.cache", "teacher_codec": "topk:2"}
        for number in batches:
            resume = ["--resume"] if number != batches[0] else []
            (runs[name],) = run_models(tmp_path, name, "--batches", number, *common, *resume, num_models=1, **settings)
    assert runs["whole"]["losses"] == runs["part"]["losses"]
    for name, value in runs["whole"]["model"].items():
        assert torch.equal(value, runs["part"]["model"][name])


@pytest.mark.parametrize("settings", [{}, {"exchange": "checkpoints", "interval": 3, "replica_wait": 1}])
def test_a_resumed_loop_goes_on_bit_for_bit(tmp_path, settings):
    common = ["--dropout", "0.3", "--workers", "1"]
    settings = {**settings, "timeout_s": 240}
    whole = run_models(tmp_path, "whole", "--batches", "20", *common, **settings)
    run_models(tmp_path, "part", "--batches", "9", *common, **settings)
    resumed = run_models(tmp_path, "part", "--batches", "20", "--resume", *common, **settings)
    for one, other in zip(whole, resumed, strict=True):
        assert one["losses"] == other["losses"]
        assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())


def wait_for(condition, what):
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def heard(log):
    """The batches at which a loop had the predictions of its peer."""
    return [int(number) for number in re.findall(r"^(\d+) 1\.0$", log.read_text(), re.MULTILINE)]


def test_a_loop_that_waits_for_a_peer_saves_when_it_is_asked_to_end(tmp_path):
    """The peer stands still; a wait would last five minutes."""
    ports, files, logs = free_ports(2), [str(tmp_path / name) for name in "ab"], [tmp_path / name for name in "01"]
    running = []
    try:
        for model in range(2):
            logs[model].touch()
            command = [sys.executable, LOOP, files[model], str(model + 1), "--batches", "1000000", "--save-on-sigterm"]
            running.append(start(command, str(logs[model]), place(model, ports)))
        wait_for(lambda: all(heard(log) for log in logs), "both exchange")
        running[1].send_signal(signal.SIGSTOP)
        wait_for(lambda: is_still(logs[0]), "the other waits for it")
        running[0].send_signal(signal.SIGTERM)
        assert running[0].wait(20) == 128 + signal.SIGTERM
        saved = torch.load(files[0], weights_only=True)
        assert saved["peers"]["count"] == len(saved["losses"]) > 0
    finally:
        for process in running:
            process.kill()


def is_still(log):
    before = log.read_text()
    time.sleep(1.0)
    return log.read_text() == before


def test_a_killed_loop_comes_back_and_skips_to_where_the_other_is(tmp_path):
    ports, until = free_ports(2), tmp_path / "until"
    settings = {"CODISTILL_TIMEOUT": "1", "CODISTILL_START_TIMEOUT": "60"}
    common = ["--batches", "1000000", "--save-every", "20", "--until", str(until)]
    files, logs = [str(tmp_path / f"m{model}") for model in range(2)], [tmp_path / name for name in ("0", "1", "back")]
    commands = [[sys.executable, LOOP, files[model], str(model + 1), *common] for model in range(2)]
    for log in logs:
        log.touch()
    running = [start(commands[0], str(logs[0]), place(0, ports, **settings))]
    try:
        killed = start([*commands[1], "--kill-after", "50"], str(logs[1]), place(1, ports, **settings))
        running.append(killed)
        assert killed.wait(60) == -9
        wait_for(lambda: "\n500 0.0\n" in logs[0].read_text(), "the survivor has gone on alone")
        running.append(start([*commands[1], "--resume"], str(logs[2]), place(1, ports, **settings)))
        wait_for(lambda: " 1.0\n" in logs[2].read_text(), "it exchanges again")
        wait_for(lambda: heard(logs[0])[-1] > 500, "the survivor hears it")
        until.touch()
        assert [running[0].wait(60), running[2].wait(60)] == [0, 0]
    finally:
        for process in running:
            process.kill()
    for log in (logs[0], logs[2]):  # saved at 40, it left out what lies between, and both hear each other again
        assert heard(log)[0 if log is logs[2] else -1] > 500
