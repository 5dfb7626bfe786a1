"""Real vision processes against Algorithm 1 written out in one, and the identities that follow from it."""

import copy

import pytest
import torch
from fairseq_codistill.vision.datasets import load_images
from fairseq_codistill.vision.models import make_model
from fairseq_codistill.vision.options import parse_options
from helpers import free_ports, run_together
from vision_helpers import codistill_commands, records, vision_command

from fairseq_codistill.sampling import Timetable

NUM_UPDATES = 11
# A rate at which no ReLU has an input so near zero that the rounding of another processor turns it on or off, after
# which all losses are others (at 0.05, AVX2 and AVX-512 differ by 5e-3; here by 7e-7).
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.02, 0.9, 5e-3
SETTINGS = (
    f"--max-updates {NUM_UPDATES} --batch-size 16 --lr {LEARNING_RATE} --lr-batch-size 0 --weight-decay {WEIGHT_DECAY} "
    f"--momentum {MOMENTUM} --augmentation none --codistill-data-seed 7"
).split()


def stored_parameters(folder):
    return torch.load(folder / "checkpoint_last.pt", weights_only=True)["model"]


def reference(num_models, weight, interval, exchange, replica_mode):
    """Algorithm 1 in one process: plain loops, one image at a time, SGD by hand, no loss of the package.

    With checkpoints the copies are those of the last update that was due, with the statistics of BatchNorm after its
    forward pass; in train mode they predict from the batch's own statistics.
    """
    config = parse_options(["--no-save", "--model", "wrn10_1"])
    images = load_images(config)
    table = Timetable(len(images.train), 1, 16, 1, data_seed=7)
    models = []
    for index in range(num_models):
        torch.manual_seed(index + 1)
        models.append(make_model(config, images.num_classes).train())
    velocities = [[torch.zeros_like(p) for p in model.parameters()] for model in models]
    losses = [[] for _ in models]
    for update in range(NUM_UPDATES):
        chosen = table.order(1)[update * 16 : update * 16 + 16]
        pixels = torch.stack([images.train[i][0].float() / 255 for i in chosen])
        targets = [images.train[i][1] for i in chosen]
        logits = [model((pixels - 0.5) / 0.5) for model in models]
        due = update % interval == 0
        taught = logits
        if exchange == "checkpoints":
            if due:
                copies = [copy.deepcopy(model).train(replica_mode != "eval") for model in models]
            with torch.no_grad():
                taught, due = [model((pixels - 0.5) / 0.5) for model in copies], True
        for i, model in enumerate(models):
            total = torch.zeros(())
            for row, target in enumerate(targets):
                mine = logits[i][row]
                total = total + torch.logsumexp(mine, 0) - mine[target]
                for j in range(num_models):
                    if j != i and due:
                        difference = mine - taught[j][row].detach()
                        total = total + weight / (num_models - 1) * (difference**2).sum() / len(mine)
            losses[i].append(float(total.detach()) / 16)
            for parameter in model.parameters():
                parameter.grad = None
            (total / 16).backward()
        for model, velocity in zip(models, velocities, strict=True):
            for parameter, speed in zip(model.parameters(), velocity, strict=True):
                decay = WEIGHT_DECAY if parameter.dim() > 1 else 0.0
                speed.mul_(MOMENTUM).add_(parameter.grad + decay * parameter.detach())
                parameter.data.sub_(LEARNING_RATE * speed)
    return losses, [model.state_dict() for model in models]


@pytest.mark.parametrize(
    ("interval", "weight", "exchange", "replica_mode"),
    [
        (1, 3.0, "predictions", "auto"),
        (3, 3.0, "predictions", "auto"),
        (3, 3.0, "checkpoints", "auto"),
        (3, 1.0, "checkpoints", "eval"),
    ],
)
def test_real_processes_follow_algorithm_1(tmp_path, interval, weight, exchange, replica_mode):
    num_models = 2
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(num_models))
    extra = [*SETTINGS, "--codistill-weight", str(weight), "--codistill-interval", str(interval)]
    extra += ["--codistill-exchange", exchange, "--codistill-replica-wait", "--codistill-replica-mode", replica_mode]
    for result in run_together(codistill_commands(tmp_path, addresses, *extra), timeout_s=150):
        assert result.returncode == 0, result.output
    expected_losses, expected = reference(num_models, weight, interval, exchange, replica_mode)
    for i in range(num_models):
        losses = [record["loss"] for record in records(tmp_path / str(i), "train")]
        assert losses == pytest.approx(expected_losses[i], abs=1e-5)
        for name, value in stored_parameters(tmp_path / str(i)).items():
            torch.testing.assert_close(value, expected[i][name], atol=1e-5, rtol=0, msg=name)


def test_weight_0_equals_one_model_alone_bit_for_bit(tmp_path):
    alone = vision_command(tmp_path / "alone", *SETTINGS)
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    weight_0 = codistill_commands(tmp_path, addresses, *SETTINGS, "--codistill-weight", "0")
    for result in run_together([alone, *weight_0], timeout_s=150):
        assert result.returncode == 0, result.output
    expected = stored_parameters(tmp_path / "alone")
    for name, value in stored_parameters(tmp_path / "0").items():
        assert torch.equal(value, expected[name]), name
