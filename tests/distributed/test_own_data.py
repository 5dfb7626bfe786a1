"""Data that never leave: checkpoints over data of one's own, and transfer sets, in real processes of every loop."""

import copy
import json
import re
import shutil

import plain_loop
import pytest
import torch
from helpers import (
    USER_DIR,
    codistill_command,
    free_ports,
    json_logs,
    make_toy_data,
    recorded_command,
    run_together,
)
from test_plain_loop import run_models
from test_reference import LEARNING_RATE, SETTINGS, parameters
from torch.utils.data import DataLoader, TensorDataset
from vision_helpers import codistill_commands, records

from fairseq_codistill import Codistiller, CoordinatedBatches
from fairseq_codistill.sampling import Numbered
from fairseq_codistill.testing import Script, ScriptedTransport

NUM_BATCHES, WEIGHT = 18, 3.0
OWN = (33, 50)  # samples of each model; an even number of batches, for updates of two


def batches_of(num_samples, batch_size, seed, number):
    order = CoordinatedBatches(num_samples, batch_size, seed, 0, 1)
    order.move_to(number)
    return next(iter(order))


def reference(form, interval, update_freq):
    """Both forms written out, one row at a time: SGD with momentum by hand, no loss of the package."""
    own = [plain_loop.make_data(OWN[i], i + 1).tensors for i in range(2)]
    shared = plain_loop.make_data(plain_loop.NUM_SHARED, 99).tensors
    models, totals, losses = [], [0.0, 0.0], [[], []]
    for i in range(2):
        torch.manual_seed(i + 1)
        models.append(plain_loop.make_model(0.0))
    speeds = [[torch.zeros_like(p) for p in model.parameters()] for model in models]
    for number in range(NUM_BATCHES):
        update, micro_batch = divmod(number, update_freq)
        is_due = update % interval == 0
        if form == "checkpoints" and is_due and micro_batch == 0:
            copies = [copy.deepcopy(model) for model in models]
        for i, model in enumerate(models):
            total = torch.zeros(())
            samples = batches_of(OWN[i], plain_loop.BATCH_SIZE, i + 1, number)
            for sample in samples:
                mine = model(own[i][0][sample])
                total = total + torch.logsumexp(mine, 0) - mine[own[i][1][sample]]
                if form == "checkpoints":
                    theirs = copies[1 - i](own[i][0][sample]).detach()
                    total = total + WEIGHT * (mine - theirs).square().sum() / len(mine)
            total = total / len(samples)
            if form == "transfer" and is_due:
                place = update // interval * update_freq + micro_batch
                chosen = batches_of(plain_loop.NUM_SHARED, plain_loop.SHARED_BATCH_SIZE, 7, place)
                for sample in chosen:
                    mine, theirs = (one(shared[0][sample]) for one in (model, models[1 - i]))
                    distance = (mine - theirs.detach()).square().sum() / len(mine)
                    total = total + WEIGHT * distance / len(chosen)
            losses[i].append(float(total.detach()))
            totals[i] = totals[i] + total / update_freq
        if micro_batch == update_freq - 1:
            for i, model in enumerate(models):
                gradients = torch.autograd.grad(totals[i], list(model.parameters()))
                for parameter, gradient, speed in zip(model.parameters(), gradients, speeds[i], strict=True):
                    speed.mul_(0.9).add_(gradient)
                    parameter.data = parameter.data - 0.1 * speed
                totals[i] = 0.0
    return losses, [model.state_dict() for model in models]


def run_own(tmp_path, name, batches, *options, **settings):
    """Both models of the plain loop, with data of their own; what each wrote."""
    per_model = {model: ["--own-data", str(OWN[model])] for model in range(2)}
    return run_models(
        tmp_path, name, "--batches", str(batches), *options, per_model=per_model, weight=WEIGHT, **settings
    )


FORMS = {
    "transfer": (["--transfer"], {}),
    "checkpoints": ([], {"exchange": "checkpoints", "own_data": 1, "replica_wait": 1}),
}


@pytest.mark.parametrize(("form", "interval", "update_freq"), [("transfer", 2, 2), ("checkpoints", 3, 1)])
def test_models_with_data_of_their_own_follow_what_is_written_out(tmp_path, form, interval, update_freq):
    options, settings = FORMS[form]
    options = [*options, "--update-freq", str(update_freq)]
    found = run_own(tmp_path, "m", NUM_BATCHES, *options, **settings, interval=interval)
    losses, expected = reference(form, interval, update_freq)
    for i, state in enumerate(found):
        assert [loss for _, loss in state["losses"]] == pytest.approx(losses[i], abs=1e-5)
        for name, value in state["model"].items():
            torch.testing.assert_close(value, expected[i][name], atol=1e-5, rtol=0, msg=name)


def test_a_loop_with_a_transfer_set_goes_on_bit_for_bit(tmp_path):
    common = ["--transfer", "--dropout", "0.3"]
    whole = run_own(tmp_path, "whole", 20, *common, interval=2)
    run_own(tmp_path, "part", 9, *common, interval=2)
    resumed = run_own(tmp_path, "part", 20, *common, "--resume", interval=2)
    for one, other in zip(whole, resumed, strict=True):
        assert one["losses"] == other["losses"]
        assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Two data folders of other sentences and lengths, with one dictionary and one split in common."""
    folder = tmp_path_factory.mktemp("halves")
    one = make_toy_data(folder / "one", num_train=120)
    two = make_toy_data(folder / "two", num_train=90, seed=5, dictionary=one)
    for which in (one, two):
        for path in one.glob("test.*"):  # the same on both, under another name
            shutil.copy(path, which / path.name.replace("test.", "shared.", 1))
    return one, two


def fairseq_pair(halves, tmp_path, *extra, data=None):
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    return [
        recorded_command(
            codistill_command(
                (data or halves)[i], tmp_path / str(i), i, addresses, "--seed", str(i + 1),
                "--codistill-data-seed", "7", "--codistill-codec", "fp32", "--codistill-weight", str(WEIGHT), *extra,
            ),
            tmp_path / f"losses{i}.json",
        )
        for i in range(2)
    ]  # fmt: skip


def fairseq_reference(halves, tmp_path, form, interval, num_updates):
    from fairseq import options, tasks, utils
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from helpers import train_command

    models, own, shared, losses = [], [], [], [[], []]
    for i, data in enumerate(halves):
        argv = train_command(data, tmp_path / "unused", *SETTINGS, "--criterion", "label_smoothed_cross_entropy")[3:]
        cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), argv))
        utils.set_torch_seed(i + 1)
        task = tasks.setup_task(cfg.task)
        models.append(task.build_model(cfg.model).train())
        for split, into in (("train", own), ("shared", shared)):
            task.load_dataset(split)
            found = []
            for epoch in range(1, 9):
                iterator = task.get_batch_iterator(
                    task.dataset(split), max_tokens=128, max_positions=(1024, 1024), seed=7, epoch=1
                )
                iterator.epoch = epoch
                iterator._cur_epoch_itr = None
                found += list(iterator.next_epoch_itr(shuffle=True, fix_batches_to_gpus=False))
                task.dataset_to_epoch_iter.clear()
            into.append(found)
    pad = task.target_dictionary.pad()
    optimizers = [torch.optim.SGD(model.parameters(), lr=LEARNING_RATE) for model in models]
    for update in range(num_updates):
        if form == "checkpoints" and update % interval == 0:
            copies = [copy.deepcopy(model) for model in models]
        steps = []
        for i, model in enumerate(models):
            total, num_tokens = rows_of(model, own[i][update], pad, copies[1 - i] if form == "checkpoints" else None)
            loss = total / num_tokens
            if form == "transfer" and update % interval == 0:
                batch = shared[i][update // interval]
                term, count = distance(model, models[1 - i], batch, pad)
                loss = loss + WEIGHT * term / count
            losses[i].append(float(loss.detach()))
            steps.append(loss)
        for optimizer, loss in zip(optimizers, steps, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return losses, [model.state_dict() for model in models]


def rows_of(model, batch, pad, teacher):
    logits = model(**batch["net_input"])[0]
    taught = teacher(**batch["net_input"])[0].detach() if teacher is not None else None
    total, count = torch.zeros(()), 0
    for row, targets in enumerate(batch["target"].tolist()):
        for column, target in enumerate(targets):
            if target == pad:
                continue
            mine = logits[row, column]
            lprobs = mine - torch.logsumexp(mine, 0)
            total = total - 0.9 * lprobs[target] + 0.1 * (-lprobs.sum() + lprobs[target]) / (mine.numel() - 1)
            if taught is not None:
                total = total + WEIGHT * ((mine - taught[row, column]) ** 2).sum() / mine.numel()
            count += 1
    return total, count


def distance(model, peer, batch, pad):
    mine, theirs = model(**batch["net_input"])[0], peer(**batch["net_input"])[0].detach()
    is_token = batch["target"].ne(pad)
    return (mine - theirs)[is_token].square().mean(1).sum(), int(is_token.sum())


@pytest.mark.parametrize(
    ("form", "extra"),
    [
        ("transfer", ["--codistill-transfer", "shared"]),
        pytest.param(
            "checkpoints",
            ["--codistill-own-data", "--codistill-exchange", "checkpoints", "--codistill-replica-wait"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_fairseq_models_with_data_of_their_own_follow_what_is_written_out(halves, tmp_path, form, extra):
    commands = fairseq_pair(halves, tmp_path, *SETTINGS, "--codistill-interval", "2", *extra)
    results = run_together(commands, timeout_s=200)
    for result in results:
        assert result.returncode == 0, result.output
    num_updates = len(json.loads((tmp_path / "losses0.json").read_text()))
    losses, expected = fairseq_reference(halves, tmp_path, form, 2, num_updates)
    for i in range(2):
        assert json.loads((tmp_path / f"losses{i}.json").read_text()) == pytest.approx(losses[i], abs=1e-5)
        for name, value in parameters(tmp_path / str(i)).items():
            torch.testing.assert_close(value, expected[i][name], atol=1e-5, rtol=0, msg=name)
    if form == "transfer":
        logs = json_logs(results[0].output, "train_inner")
        assert [log["codistill_peers"] for log in logs[:4]] == [1, 0, 1, 0]


def test_fairseq_goes_on_with_a_transfer_set_bit_for_bit(halves, tmp_path):
    def train(name, until):
        extra = [
            "--codistill-transfer",
            "shared",
            "--codistill-interval",
            "2",
            "--dropout",
            "0.1",
            "--disable-validation",
        ]
        (tmp_path / name).mkdir(exist_ok=True)
        for result in run_together(fairseq_pair(halves, tmp_path / name, *extra, "--max-update", str(until)), 200):
            assert result.returncode == 0, result.output

    train("straight", 24)
    train("stopped", 13)
    train("stopped", 24)
    for model in "01":
        expected, found = (parameters(tmp_path / name / model) for name in ("straight", "stopped"))
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_what_cannot_be_shared_is_one_line_before_training(halves, tmp_path):
    other = make_toy_data(tmp_path / "other", extra_words=["more"])
    cases = [
        ("which is --train-subset", ["--codistill-transfer", "train"], None),
        ("a split that the data folder does not have", ["--codistill-transfer", "nothing"], None),
        ("Use --codistill-exchange checkpoints", ["--codistill-own-data"], None),
        (
            "target dictionary: ",
            ["--codistill-own-data", "--codistill-exchange", "checkpoints"],
            (halves[0], other),
        ),
    ]
    commands, messages = [], []
    for number, (message, extra, data) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        commands += fairseq_pair(halves, folder, "--max-update", "2", *extra, data=data)
        messages += [message] * 2
    for result, message in zip(run_together(commands, 200), messages, strict=True):
        assert result.returncode == 2, result.output
        assert message in [line for line in result.output.splitlines() if "error: " in line][-1]
        assert not json_logs(result.output, "train_inner")


@pytest.mark.parametrize("is_own", [True, False])
def test_nothing_of_the_training_data_is_in_what_a_model_tells_the_others(is_own):
    """Neither their number, nor that of their batches, nor their seed; of data that are shared, all three."""
    num_samples, batch_size, seed = 7919, 8, 77
    script = Script(1, "a:1,b:2", lambda key, logits: logits)
    torch.manual_seed(5)
    model = torch.nn.Linear(2, 3)
    data = Numbered(TensorDataset(torch.zeros(num_samples, 2), torch.zeros(num_samples, dtype=torch.int64)))
    loader = DataLoader(data, batch_sampler=CoordinatedBatches(num_samples, batch_size, seed))
    with Codistiller(
        num_models=2, model_index=0, addresses="a:1,b:2", own_data=is_own, exchange="checkpoints", codec="fp32",
        data_seed=seed, transport=ScriptedTransport(script),
    ) as peers:  # fmt: skip
        peers.meet(model, loader)
    told = set(re.findall(rf"\b({num_samples}|{num_samples // batch_size}|{seed})\b", json.dumps(script._hellos[0])))
    assert told == (set() if is_own else {"7919", "989", "77"})


VISION = (
    "--max-updates 9 --batch-size 16 --lr 0.05 --lr-batch-size 0 --augmentation crop --codistill-interval 2".split()
)


def test_image_models_share_a_transfer_set_and_nothing_else(tmp_path):
    """One trains on other images than the other: fewer of them, in another order."""
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))

    def train(name, updates):
        commands = codistill_commands(
            tmp_path / name, addresses, *VISION, "--dataset", "fake", "--image-size", "8",
            "--transfer-dataset", "digits", "--update-freq", "2", "--max-updates", updates,
        )  # fmt: skip
        commands[0] += ["--fake-images", "700"]
        commands[1] += ["--fake-images", "500"]
        for result in run_together(commands, 150):
            assert result.returncode == 0, result.output

    train("straight", "9")
    train("stopped", "5")
    train("stopped", "9")
    for model in "01":
        logs = records(tmp_path / "straight" / model, "train")
        assert [log["codistill_peers"] for log in logs if "codistill_peers" in log] == [1, 1, 1, 1, 1]
        for log in logs:
            assert log["loss"] == pytest.approx(log["nll_loss"] + log.get("codistill_loss", 0.0), abs=1e-5)
        expected, found = (
            torch.load(tmp_path / name / model / "checkpoint_last.pt", weights_only=True)["model"]
            for name in ("straight", "stopped")
        )
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_image_models_exchange_checkpoints_over_data_of_their_own_and_need_the_same_classes(tmp_path):
    own = ["--codistill-exchange", "checkpoints", "--codistill-own-data", "--dataset", "fake", "--image-size", "8"]
    addresses = [",".join(f"127.0.0.1:{port}" for port in free_ports(2)) for _ in range(2)]
    fits = codistill_commands(tmp_path / "fits", addresses[0], *VISION, *own)
    fits[1] += ["--fake-images", "300", "--batch-size", "8", "--codistill-data-seed", "3"]
    differs = codistill_commands(tmp_path / "differs", addresses[1], *VISION, *own)
    differs[1] += ["--fake-classes", "7"]
    results = run_together([*fits, *differs], 150)
    for result in results[:2]:
        assert result.returncode == 0, result.output
    assert records(tmp_path / "fits" / "0", "train")[-1]["codistill_peers"] == 1
    for result in results[2:]:
        assert result.returncode == 2, result.output
        assert "classes: " in result.output
    assert USER_DIR
