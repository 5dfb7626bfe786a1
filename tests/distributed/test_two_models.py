"""Whole runs of several real fairseq-train processes: what they log, when they refuse, what they leave behind."""

import collections
import re
import shutil
import sys
import time

import pytest
import torch
from helpers import (
    NUM_PARTS,
    TINY_MODEL,
    USER_DIR,
    codistill_command,
    environment,
    free_ports,
    gloo_ranks,
    json_logs,
    make_toy_data,
    run_together,
    start,
    train_command,
)

from fairseq_codistill.fairseq_side import compat

SECONDS = 240


def addresses(num_models: int = 2, world_size: int = 1) -> str:
    return ",".join(f"127.0.0.1:{port}" for port in free_ports(num_models, world_size))


def load(path) -> dict:
    compat.apply()
    return torch.load(path, map_location="cpu")


def test_early_stop_says_goodbye_and_the_other_goes_on(toy_data, tmp_path):
    where = addresses()
    short = codistill_command(
        toy_data, tmp_path / "0", 0, where, "--seed", "1", "--max-update", "8", "--validate-interval-updates", "2"
    )
    long = codistill_command(toy_data, tmp_path / "1", 1, where, "--seed", "2", "--max-update", "14", "--no-save")
    first, second = run_together([short, long], SECONDS)
    assert first.returncode == 0, first.output
    assert second.returncode == 0, second.output
    assert "model 0 is finished (was present): it said goodbye" in second.output
    peers = [log["codistill_peers"] for log in json_logs(second.output, "train_inner")]
    assert peers == [1] * 8 + [0] * 6
    skipped = [log["codistill_skipped"] for log in json_logs(second.output, "train_inner")]
    assert skipped == [0] * 8 + [NUM_PARTS] * 6
    assert len(json_logs(first.output, "valid")) >= 4
    assert all("valid_codistill_loss" not in log for log in json_logs(first.output, "valid"))


def test_two_ranks_a_model_exchange_every_micro_batch_of_ragged_shards(toy_data, tmp_path):
    where, ports = addresses(2, 2), free_ports(2)
    settings = ["--max-tokens", "90", "--update-freq", "2", "--max-epoch", "2", "--codistill-codec", "fp32"]
    commands = []
    for model in range(2):
        command = codistill_command(toy_data, tmp_path / str(model), model, where, "--seed", str(model + 1), *settings)
        commands += gloo_ranks(command, 2, ports[model])
    results = run_together(commands, SECONDS)
    for result in results:
        assert result.returncode == 0, result.output
        assert "misaligned" not in result.output
    logs = [json_logs(results[rank].output, "train_inner") for rank in (0, 2)]
    assert len(logs[0]) == len(logs[1]) > 4
    for mine, theirs in zip(*logs, strict=True):
        # The divergence is symmetric, so the models, each summing over its two ranks, must log the same.
        assert mine["codistill_mse"] == pytest.approx(theirs["codistill_mse"], rel=1e-3, abs=2e-4)
        assert mine["codistill_peers"] == 1
        assert mine["codistill_skipped"] == 0
        assert mine.keys() == theirs.keys()


def test_an_interval_counts_updates_over_epochs_and_takes_all_micro_batches(toy_data, tmp_path):
    where = addresses()
    settings = ["--update-freq", "2", "--max-epoch", "3", "--codistill-interval", "3", "--codistill-codec", "tokens:4"]
    commands = [
        codistill_command(
            toy_data, tmp_path / str(model), model, where, "--seed", str(model + 1), "--codistill-divergence", "kl",
            *settings,
        )
        for model in range(2)
    ]  # fmt: skip
    for result in run_together(commands, SECONDS):
        assert result.returncode == 0, result.output
        logs = json_logs(result.output, "train_inner")
        updates_per_epoch = sum(log["epoch"] == 1 for log in logs)
        assert updates_per_epoch % 3, "this test needs an interval that does not divide the epoch"
        assert [log["codistill_peers"] for log in logs] == [float(index % 3 == 0) for index in range(len(logs))]
        assert all((log["codistill_mbit"] > 0) == (index % 3 == 0) for index, log in enumerate(logs))
        assert all(0 < log["codistill_loss"] < 20 for log in logs[::3])


@pytest.mark.parametrize(
    ("differing", "message"),
    [
        (["--codistill-data-seed", "2"], "--codistill-data-seed: "),
        (["--max-tokens", "150"], "--max-tokens: "),
        (["--update-freq", "2"], "--update-freq: "),
        (["--codistill-codec", "int8"], "--codistill-codec: "),
        (["--train-subset", "valid"], "batches per epoch: "),
        (["--seed", "1"], "start from identical parameters"),
    ],
)
def test_models_that_do_not_fit_are_refused_on_both_sides(toy_data, tmp_path, differing, message):
    where = addresses()
    commands = [
        codistill_command(toy_data, tmp_path / "0", 0, where, "--seed", "1", "--max-update", "30"),
        codistill_command(toy_data, tmp_path / "1", 1, where, "--seed", "2", "--max-update", "30", *differing),
    ]
    for result in run_together(commands, SECONDS):
        assert result.returncode != 0
        assert message in result.output


def test_models_of_different_depth_and_width_teach_each_other(toy_data, tmp_path):
    where = addresses()
    other = "--encoder-layers 2 --encoder-embed-dim 48 --decoder-embed-dim 48 --decoder-layers 2".split()
    commands = [
        codistill_command(toy_data, tmp_path / "0", 0, where, "--seed", "1", "--max-update", "6"),
        codistill_command(toy_data, tmp_path / "1", 1, where, "--seed", "1", "--max-update", "6", *other),
    ]
    for result in run_together(commands, SECONDS):
        assert result.returncode == 0, result.output
        assert [log["codistill_peers"] for log in json_logs(result.output, "train_inner")] == [1] * 6
    small, large = (load(tmp_path / name / "checkpoint_last.pt")["model"] for name in "01")
    assert small["encoder.embed_tokens.weight"].size(1) == 32
    assert large["encoder.embed_tokens.weight"].size(1) == 48


def test_another_dictionary_is_refused_by_name(toy_data, tmp_path):
    other = make_toy_data(tmp_path / "data", num_train=50, extra_words=["ten", "zehn"])
    where = addresses()
    commands = [
        codistill_command(toy_data, tmp_path / "0", 0, where, "--seed", "1"),
        codistill_command(other, tmp_path / "1", 1, where, "--seed", "2"),
    ]
    for result in run_together(commands, SECONDS):
        assert result.returncode != 0
        assert "target dictionary: " in result.output


def test_other_sentences_are_never_distilled_from_and_end_both_runs(toy_data, tmp_path):
    other = make_toy_data(tmp_path / "data", shift=1, dictionary=toy_data)
    where = addresses()
    commands = [
        codistill_command(toy_data, tmp_path / "0", 0, where, "--seed", "1"),
        codistill_command(other, tmp_path / "1", 1, where, "--seed", "2"),
    ]
    for result in run_together(commands, SECONDS):
        assert result.returncode != 0
        assert "3 batches in a row differ" in result.output
        assert "compare the data files" in result.output
        assert all(log["codistill_peers"] == 0 for log in json_logs(result.output, "train_inner"))


@pytest.fixture(scope="module")
def finished_run(toy_data, tmp_path_factory):
    """Folder with the checkpoints of two codistilled models after 6 updates, in ``0`` and ``1``."""
    folder = tmp_path_factory.mktemp("finished")
    where = addresses()
    commands = [
        codistill_command(toy_data, folder / str(i), i, where, "--seed", str(i + 1), "--max-update", "6")
        for i in range(2)
    ]
    for result in run_together(commands, SECONDS):
        assert result.returncode == 0, result.output
    return folder


def test_checkpoint_names_stock_task_and_criterion_only(finished_run):
    checkpoint = load(finished_run / "0" / "checkpoint_last.pt")
    assert checkpoint["cfg"]["task"]["_name"] == "translation"
    assert checkpoint["cfg"]["criterion"]["_name"] == "label_smoothed_cross_entropy"
    assert checkpoint["optimizer_history"][-1]["criterion_name"] == "LabelSmoothedCrossEntropyCriterion"
    assert "codistill" not in str(checkpoint["cfg"])


def test_plain_fairseq_decodes_and_continues_a_codistilled_checkpoint(toy_data, finished_run, tmp_path):
    shutil.copytree(finished_run / "0", tmp_path / "0")
    generate = [sys.executable, "-m", "fairseq_cli.generate", str(toy_data), "--cpu", "--path",
                str(tmp_path / "0" / "checkpoint_last.pt"), "--max-len-b", "5"]  # fmt: skip
    go_on = train_command(
        toy_data, tmp_path / "0", "--criterion", "label_smoothed_cross_entropy", "--max-update", "9", "--seed", "1"
    )
    trusting = environment(TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
    (decoded,) = run_together([generate], SECONDS, env=trusting)
    assert decoded.returncode == 0, decoded.output
    assert "Generate test with beam=5" in decoded.output
    (continued,) = run_together([go_on], SECONDS, env=trusting)
    assert continued.returncode == 0, continued.output
    assert json_logs(continued.output, "train_inner")[-1]["num_updates"] == 9


def test_with_the_user_dir_decoding_and_resuming_work_on_every_torch(toy_data, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    generate = [sys.executable, "-m", "fairseq_cli.generate", str(toy_data), "--cpu", "--user-dir", USER_DIR, "--path",
                str(tmp_path / "run" / "1" / "checkpoint_best.pt"), "--max-len-b", "5"]  # fmt: skip
    (decoded,) = run_together([generate], SECONDS)
    assert decoded.returncode == 0, decoded.output
    where = addresses()
    commands = [
        codistill_command(toy_data, tmp_path / "run" / str(i), i, where, "--seed", str(i + 1), "--max-update", "10")
        for i in range(2)
    ]
    for result in run_together(commands, SECONDS):
        assert result.returncode == 0, result.output
        logs = json_logs(result.output, "train_inner")
        assert [log["num_updates"] for log in logs] == [7, 8, 9, 10]
        assert all(log["codistill_peers"] == 1 for log in logs)


def test_fine_tuning_from_one_checkpoint_needs_the_option(toy_data, finished_run, tmp_path):
    start = str(finished_run / "0" / "checkpoint_last.pt")

    def both(*extra):
        where = addresses()
        return run_together(
            [
                codistill_command(
                    toy_data, tmp_path / str(i), i, where, "--seed", str(i + 1), "--max-update", "2",
                    "--finetune-from-model", start, "--no-save", *extra,
                )
                for i in range(2)
            ],
            SECONDS,
        )  # fmt: skip

    for result in both():
        assert result.returncode != 0
        assert "--codistill-allow-identical-init" in result.output
    for result in both("--codistill-allow-identical-init"):
        assert result.returncode == 0, result.output
        assert json_logs(result.output, "train_inner")[-1]["codistill_peers"] == 1


def test_language_modeling_through_the_same_wrapper(tmp_path):
    words = make_toy_data(tmp_path / "text").parent
    preprocess = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source", "--destdir", str(tmp_path / "lm")]
    for split in ("train", "valid", "test"):
        preprocess += [f"--{split}pref", str(words / f"{split}.en")]
    (prepared,) = run_together([preprocess], SECONDS)
    assert prepared.returncode == 0, prepared.output
    model = "--arch transformer_lm --decoder-layers 1 --decoder-embed-dim 32 --decoder-ffn-embed-dim 32 "
    model += "--decoder-attention-heads 2 --share-decoder-input-output-embed --tokens-per-sample 16"
    results = run_together(other_task("language_modeling", tmp_path / "lm", model.split(), tmp_path), SECONDS)
    for result in results:
        assert result.returncode == 0, result.output
        logs = json_logs(result.output, "train_inner")
        assert [log["codistill_peers"] for log in logs] == [1] * 8
        assert all(log["codistill_mse"] > 0 for log in logs)


def test_multilingual_sampling_draws_the_same_batches_through_the_same_wrapper(toy_data, tmp_path):
    extra = "--langs en,de --lang-pairs en-de --sampling-method temperature --sampling-temperature 1.5".split()
    commands = other_task("translation_multi_simple_epoch", toy_data, [*TINY_MODEL, *extra], tmp_path)
    for result in run_together(commands, SECONDS):
        assert result.returncode == 0, result.output
        assert [log["codistill_peers"] for log in json_logs(result.output, "train_inner")] == [1] * 8


def test_epochs_of_different_length_are_trained_on_whole(toy_data, tmp_path):
    """Shards: models in step once took each other to be ahead, and skipped nearly all of a shorter epoch."""
    small = make_toy_data(tmp_path / "small", 40, dictionary=toy_data)
    commands = other_task("translation", f"{toy_data}:{small}", [*TINY_MODEL, "-s", "en", "-t", "de"], tmp_path)
    length = slice(commands[0].index("--max-update"), commands[0].index("--max-update") + 2)
    num_updates = []
    for command in commands:
        command[length] = ["--max-epoch", "3"]
    for result in run_together(commands, SECONDS):
        assert result.returncode == 0, result.output
        assert "skipped" not in result.output.replace("codistill_skipped", "")
        logs = json_logs(result.output, "train_inner")
        assert all(log["codistill_peers"] == 1 for log in logs)
        num_updates.append(collections.Counter(log["epoch"] for log in logs))
    assert num_updates[0] == num_updates[1]
    assert num_updates[0][1] == num_updates[0][3] > num_updates[0][2] + 8


def other_task(task: str, data, extra: list[str], folder) -> list[list[str]]:
    """Two models of another task."""
    where = addresses()
    common = (
        "--cpu --optimizer adam --lr 0.005 --max-tokens 100 --num-workers 0 --required-batch-size-multiple 1 --no-save "
        "--log-format json --log-interval 1 --no-progress-bar --max-update 8 --disable-validation"
    ).split()
    return [
        [
            sys.executable, "-m", "fairseq_cli.train", str(data), *common, *extra, "--user-dir", USER_DIR,
            "--task", f"codistill_{task}", "--criterion", "codistillation", "--codistill-num-models", "2",
            "--codistill-model-index", str(i), "--codistill-addresses", where, "--seed", str(i + 1),
            "--save-dir", str(folder / f"{task}{i}"),
        ]
        for i in range(2)
    ]  # fmt: skip


def test_task_with_a_train_step_of_its_own_is_not_offered(toy_data, tmp_path):
    command = codistill_command(toy_data, tmp_path, 0, addresses(), "--task", "codistill_multilingual_translation")
    (result,) = run_together([command], SECONDS)
    assert result.returncode != 0
    assert "codistill_multilingual_translation" in result.output


def test_checkpoints_are_exchanged_in_the_background_and_teach_every_batch(toy_data, tmp_path):
    where = addresses()
    settings = ["--codistill-exchange", "checkpoints", "--codistill-interval", "4", "--max-epoch", "6"]
    commands = [
        codistill_command(toy_data, tmp_path / str(model), model, where, "--seed", str(model + 1), *settings)
        for model in range(2)
    ]
    results = run_together(commands, SECONDS)
    for result in results:
        assert result.returncode == 0, result.output
        assert "'mismatched_messages': 0" in result.output
        logs = json_logs(result.output, "train_inner")
        taught = [log for log in logs if log["codistill_peers"] == 1]
        assert len(taught) >= len(logs) - 8
        assert taught[-1]["codistill_mse"] > 0
        assert taught[-1]["codistill_agreement"] > 0
        num_parameters = int(re.findall(r"num. trained: ([\d,]+)", result.output)[0].replace(",", ""))
        sent = [log["codistill_mbit"] for log in logs if log["codistill_mbit"] > 0]
        assert sent[0] == pytest.approx(num_parameters * 16e-6, rel=0.01)
        assert len(sent) <= -(-len(logs) // 4)


def test_checkpoints_of_another_architecture_are_refused_with_the_way_out(toy_data, tmp_path):
    where = addresses()
    commands = [
        codistill_command(
            toy_data, tmp_path / str(model), model, where, "--seed", str(model + 1), "--codistill-exchange",
            "checkpoints", "--decoder-layers", str(model + 1), "--no-save",
        )
        for model in range(2)
    ]  # fmt: skip
    for result in run_together(commands, SECONDS):
        assert result.returncode != 0
        assert "architecture (checkpoints need the same; --codistill-exchange predictions does not)" in result.output


def test_over_a_process_group_the_models_train_as_over_zeromq_and_the_default_group_is_untouched(toy_data, tmp_path):
    losses = {}
    for transport in ("zmq", "gloo"):
        where, ports, commands = addresses(2, 2), free_ports(2), []
        for model in range(2):
            command = codistill_command(
                toy_data, tmp_path / transport / str(model), model, where, "--seed", str(model + 1), "--max-update",
                "12", "--codistill-transport", transport, "--no-save", "--max-tokens", "100",
            )  # fmt: skip
            commands += gloo_ranks(command, 2, ports[model])
        results = run_together(commands, SECONDS)
        for result in results:
            assert result.returncode == 0, result.output
        losses[transport] = [
            [(log["loss"], log["codistill_mse"], log["codistill_peers"]) for log in json_logs(output, "train_inner")]
            for output in (results[0].output, results[2].output)
        ]
    assert losses["gloo"] == losses["zmq"]
    assert len(losses["gloo"][0]) == 12
    assert all(peers == 1 for _, _, peers in losses["gloo"][1])


def test_a_model_lost_by_a_process_group_is_one_error_and_the_other_ends_well(toy_data, tmp_path):
    where = addresses()
    commands = [
        codistill_command(
            toy_data, tmp_path / str(model), model, where, "--seed", str(model + 1), "--codistill-transport", "gloo",
            "--max-epoch", "8",
        )
        for model in range(2)
    ]  # fmt: skip
    logs = [tmp_path / f"{model}.log" for model in range(2)]
    for file in logs:
        file.touch()
    survivor, victim = (start(command, str(file)) for command, file in zip(commands, logs, strict=True))
    try:
        while '"epoch": 2' not in logs[0].read_text():
            assert survivor.poll() is None, logs[0].read_text()
            time.sleep(0.02)
        victim.kill()
        survivor.wait(SECONDS)
    finally:
        survivor.kill()
        victim.kill()
    output = logs[0].read_text()
    assert survivor.returncode == 0, output
    assert output.count("model 1 is lost, training goes on without it") == 1
    peers = [log["codistill_peers"] for log in json_logs(output, "train_inner")]
    assert peers[0] == 1
    assert peers[-1] == 0
    assert len(json_logs(output, "train")) == 8
