"""The split step in real runs: the parameters of one part, whatever wraps the model or accumulates its gradients."""

import pytest
import torch
from helpers import codistill_command, free_ports, gloo_ranks, json_logs, load_checkpoint, run_together

NUM_UPDATES = 20
SETTINGS = (
    f"--optimizer sgd --lr 0.02 --lr-scheduler fixed --clip-norm 0 --dropout 0 --attention-dropout 0 "
    f"--activation-dropout 0 --max-tokens 128 --max-update {NUM_UPDATES} --label-smoothing 0.1 --disable-validation "
    "--codistill-weight 3 --codistill-codec fp32"
).split()


def trained(data, folder, *extra, ranks=1):
    """Parameters of both models, and the traffic that they logged."""
    ports = free_ports(2, ranks)
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
    commands = []
    for model, meeting in enumerate(free_ports(2)):
        settings = [*SETTINGS, "--seed", str(model + 1), *extra]
        command = codistill_command(data, folder / str(model), model, addresses, *settings)
        commands += [command] if ranks == 1 else gloo_ranks(command, ranks, meeting)
    for result in run_together(commands, timeout_s=200):
        assert result.returncode == 0, result.output
    return [load_checkpoint(folder / str(model) / "checkpoint_last.pt")["model"] for model in range(2)]


@pytest.mark.parametrize(
    ("parts", "extra", "settings"),
    [
        pytest.param("2", [], {}, marks=pytest.mark.slow),
        # Of the 31 batches of an epoch rank 1 has 15 and a dummy.
        pytest.param("2", ["--codistill-interval", "3", "--update-freq", "2"], {"ranks": 2}, marks=pytest.mark.slow),
        # Odd parts, and a batch of two sentences: too small.
        pytest.param("4", ["--batch-size", "5", "--update-freq", "2"], {}, marks=pytest.mark.slow),
    ],
)
def test_parts_end_at_the_parameters_of_one_part(toy_data, tmp_path, parts, extra, settings):
    whole = trained(toy_data, tmp_path / "whole", *extra, **settings)
    split = trained(toy_data, tmp_path / "split", *extra, "--codistill-parts", parts, **settings)
    for one, other in zip(whole, split, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, atol=1e-6, rtol=0, msg=name)


def test_parts_in_half_precision_with_a_loss_scale_end_where_one_part_does(toy_data, tmp_path):
    """As near as fp16 is, whose gradients are rounded part by part; the parameters go 1.2 to 1.3 far."""
    extra = ["--fp16", "--fp16-init-scale", "64", "--fp16-no-flatten-grads"]  # flat ones need a GPU
    whole = trained(toy_data, tmp_path / "whole", *extra)
    split = trained(toy_data, tmp_path / "split", *extra, "--codistill-parts", "2")
    for one, other in zip(whole, split, strict=True):
        apart = torch.cat([(one[name] - other[name]).float().flatten() for name in one])
        assert 0 < apart.norm() < 0.01


def test_copies_of_the_peers_leave_a_batch_whole(toy_data, tmp_path):
    extra = ["--codistill-exchange", "checkpoints", "--codistill-replica-wait", "--codistill-interval", "3"]
    whole = trained(toy_data, tmp_path / "whole", *extra)
    split = trained(toy_data, tmp_path / "split", *extra, "--codistill-parts", "2")
    for one, other in zip(whole, split, strict=True):
        assert all(torch.equal(other[name], value) for name, value in one.items())


def test_a_resumed_run_of_parts_with_dropout_goes_on_bit_for_bit(toy_data, tmp_path):
    extra = ["--codistill-parts", "2", "--dropout", "0.3", "--codistill-divergence", "kl"]
    extra += ["--codistill-codec", "tokens:4"]
    whole = trained(toy_data, tmp_path / "whole", *extra)
    trained(toy_data, tmp_path / "parted", *extra, "--max-update", "9")
    resumed = trained(toy_data, tmp_path / "parted", *extra)
    for one, other in zip(whole, resumed, strict=True):
        assert all(torch.equal(other[name], value) for name, value in one.items())


@pytest.mark.parametrize(
    ("extra", "ranks"),
    [(["--update-freq", "2", "--codistill-interval", "2"], 1), pytest.param([], 2, marks=pytest.mark.slow)],
)
def test_what_is_sent_ahead_is_what_would_be_sent_when_due_where_nothing_is_learned_meanwhile(
    toy_data, tmp_path, extra, ranks
):
    found = {}
    for name, more in (("when_due", []), ("ahead", ["--codistill-lookahead"])):
        ports, meetings = free_ports(2, ranks), free_ports(2)
        addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
        settings = [*SETTINGS, "--lr", "0", "--max-update", "12", "--log-interval", "1", "--log-format", "json", *extra]
        commands = []
        for model, meeting in enumerate(meetings):
            command = codistill_command(
                toy_data, tmp_path / name / str(model), model, addresses, *settings, "--seed", str(model + 1), *more
            )
            commands += [command] if ranks == 1 else gloo_ranks(command, ranks, meeting)
        results = run_together(commands, timeout_s=200)
        assert all(result.returncode == 0 for result in results), results[0].output
        found[name] = [json_logs(results[model * ranks].output, "train_inner") for model in range(2)]
    for ahead, when_due in zip(found["ahead"], found["when_due"], strict=True):
        for key in ("loss", "codistill_loss", "codistill_peers", "codistill_skipped", "codistill_mbit"):
            assert [log[key] for log in ahead] == [log[key] for log in when_due], key
    assert max(log["codistill_loss"] for log in found["ahead"][0]) > 0
