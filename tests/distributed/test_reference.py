"""Two real processes against Algorithm 1 written out in one, and the identities that follow from it."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import codistill_command, free_ports, load_checkpoint, recorded_command, run_together, train_command

NUM_UPDATES = 20
LEARNING_RATE = 0.02
SETTINGS = (
    f"--optimizer sgd --lr {LEARNING_RATE} --lr-scheduler fixed --clip-norm 0 --dropout 0 --attention-dropout 0 "
    f"--activation-dropout 0 --max-tokens 128 --max-update {NUM_UPDATES} --label-smoothing 0.1 --disable-validation"
).split()


def parameters(save_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(save_dir / "checkpoint_last.pt")["model"]


def reference(
    data: Path, tmp_path: Path, num_models: int, weight: float, interval: int, exchange: str, taught_by=(), seed=7
) -> tuple[list[list[float]], list[dict]]:
    """Algorithm 1 in one process: plain loops, one token at a time, no code of the package."""
    from fairseq import options, tasks, utils
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    argv = train_command(data, tmp_path / "unused", *SETTINGS, "--criterion", "label_smoothed_cross_entropy")[3:]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), argv))
    models = []
    for index in range(num_models):
        np.random.seed(index + 1)
        utils.set_torch_seed(index + 1)
        task = tasks.setup_task(cfg.task)
        models.append(task.build_model(cfg.model).train())
    task.load_dataset("train")
    optimizers = [torch.optim.SGD(model.parameters(), lr=LEARNING_RATE) for model in models]
    losses: list[list[float]] = [[] for _ in models]
    epoch, teachers = 1, models
    while len(losses[0]) < NUM_UPDATES:
        batches = task.get_batch_iterator(
            task.dataset("train"), max_tokens=128, max_positions=(1024, 1024), seed=seed, epoch=epoch
        ).next_epoch_itr(shuffle=True)
        for batch in batches:
            if len(losses[0]) == NUM_UPDATES:
                break
            due = len(losses[0]) % interval == 0
            pad = task.target_dictionary.pad()
            if exchange == "checkpoints":  # every batch, from the copies of the last exchange
                teachers = copy.deepcopy(models) if due else teachers
                step(models, teachers, optimizers, batch, weight, losses, pad, taught_by)
            else:
                step(models, models, optimizers, batch, weight if due else 0.0, losses, pad, taught_by)
        epoch += 1
    return losses, [model.state_dict() for model in models]


def step(models, teachers, optimizers, batch, weight, losses, pad, taught_by):
    logits = [model(**batch["net_input"])[0] for model in models]
    taught = [teacher(**batch["net_input"])[0].detach() for teacher in teachers]
    frozen = [(teacher(**batch["net_input"])[0].detach(), its_weight) for teacher, its_weight in taught_by]
    for i, model_logits in enumerate(logits):
        total = torch.zeros(())
        num_tokens = 0
        for row, targets in enumerate(batch["target"].tolist()):
            for column, target in enumerate(targets):
                if target == pad:
                    continue
                mine = model_logits[row, column]
                vocab = mine.numel()
                lprobs = mine - torch.logsumexp(mine, 0)
                smooth = -lprobs.sum() + lprobs[target]
                total = total - 0.9 * lprobs[target] + 0.1 * smooth / (vocab - 1)
                for j, peer_logits in enumerate(taught):
                    if j != i:
                        difference = mine - peer_logits[row, column]
                        total = total + weight / (len(logits) - 1) * (difference**2).sum() / vocab
                for frozen_logits, its_weight in frozen:
                    total = total + its_weight * ((mine - frozen_logits[row, column]) ** 2).sum() / vocab
                num_tokens += 1
        losses[i].append(float(total) / num_tokens)
        optimizers[i].zero_grad()
        (total / num_tokens).backward()
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize(
    ("num_models", "interval", "exchange"),
    [
        (2, 1, "predictions"),
        pytest.param(3, 1, "predictions", marks=pytest.mark.slow),
        (2, 5, "predictions"),
        (3, 5, "checkpoints"),
    ],
)
def test_real_processes_follow_algorithm_1(toy_data, tmp_path, num_models, interval, exchange):
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(num_models, 1))
    weight = 3.0
    commands = [
        recorded_command(
            codistill_command(
                toy_data, tmp_path / str(i), i, addresses, "--seed", str(i + 1), "--codistill-data-seed", "7",
                "--codistill-codec", "fp32", "--codistill-weight", str(weight),
                "--codistill-interval", str(interval), "--codistill-exchange", exchange,
                *(["--codistill-replica-wait"] if exchange == "checkpoints" else []), *SETTINGS,
            ),
            tmp_path / f"losses{i}.json",
        )
        for i in range(num_models)
    ]  # fmt: skip
    for result in run_together(commands, timeout_s=200):
        assert result.returncode == 0, result.output
    expected_losses, expected_parameters = reference(toy_data, tmp_path, num_models, weight, interval, exchange)
    for i in range(num_models):
        losses = json.loads((tmp_path / f"losses{i}.json").read_text())
        assert losses == pytest.approx(expected_losses[i], abs=1e-5)
        for name, value in parameters(tmp_path / str(i)).items():
            torch.testing.assert_close(value, expected_parameters[i][name], atol=1e-5, rtol=0, msg=name)


def test_weight_0_and_one_model_equal_the_stock_criterion_bit_for_bit(toy_data, tmp_path):
    ports = ",".join(f"127.0.0.1:{port}" for port in free_ports(2, 1))
    common = [*SETTINGS, "--seed", "5", "--dropout", "0.3"]  # which orders the data, too, where fairseq is alone
    stock = train_command(toy_data, tmp_path / "stock", *common, "--criterion", "label_smoothed_cross_entropy")
    alone = codistill_command(toy_data, tmp_path / "alone", 0, "", *common, "--codistill-num-models", "1")
    alone += ["--codistill-data-seed", "5"]
    nothing = ["--codistill-weight", "0", "--codistill-data-seed", "5"]
    weight_0 = codistill_command(toy_data, tmp_path / "weight0", 0, ports, *common, *nothing)
    its_peer = codistill_command(toy_data, tmp_path / "peer", 1, ports, *common, *nothing, "--seed", "6")
    names = ["stock", "alone", "weight0", "peer"]
    commands = [
        recorded_command(command, tmp_path / f"{name}.json")
        for name, command in zip(names, [stock, alone, weight_0, its_peer], strict=True)
    ]
    for result in run_together(commands, timeout_s=200):
        assert result.returncode == 0, result.output
    expected = json.loads((tmp_path / "stock.json").read_text())
    assert len(expected) == NUM_UPDATES
    assert all(math.isfinite(loss) for loss in expected)
    for name in ("alone", "weight0"):
        assert json.loads((tmp_path / f"{name}.json").read_text()) == expected
        for key, value in parameters(tmp_path / name).items():
            assert torch.equal(value, parameters(tmp_path / "stock")[key]), (name, key)
