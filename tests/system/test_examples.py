"""The examples run as their texts say, in a small form."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment, json_logs, load_checkpoint, run_together

EXAMPLES = Path(__file__).parents[2] / "examples"
LAUNCH = [sys.executable, "-m", "fairseq_codistill.launch.cli", "--num-models", "2", "--"]
# Programs are found on PATH, as in an environment that is active.
PLACE = environment(PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin")
LINE = re.compile(
    r"model (\d)  epoch +(\d+)  test accuracy ([\d.]+)  agreement with peers in training ([\d.]+)  "
    r"bits an update ([\d,]+)"
)


def run(*command):
    (result,) = run_together([list(map(str, command))], 240, PLACE)
    assert result.returncode == 0, result.output
    return result.output


def said(output):
    """Model -> epoch, accuracy, agreement, bits of its last line."""
    found = {}
    for model, *numbers in LINE.findall(output):
        found[int(model)] = [float(number.replace(",", "")) for number in numbers]
    return found


def test_two_models_of_the_plain_loop_learn_digits_and_teach_each_other():
    models = said(run(*LAUNCH, "python", EXAMPLES / "plain_pytorch.py", "--epochs", 8))
    assert sorted(models) == [0, 1]
    for epoch, accuracy, agreement, bits in models.values():
        assert epoch == 8
        assert accuracy > 0.8
        assert agreement > 0.8
        assert 50 * 10 * 16 < bits < 50 * 10 * 16 + 1000  # a batch of 50, ten classes in fp16, and a header


def test_the_plain_loop_started_by_itself_trains_alone():
    models = said(run(sys.executable, EXAMPLES / "plain_pytorch.py", "--epochs", 8))
    assert list(models) == [0]
    assert models[0][1] > 0.8
    assert models[0][2:] == [0.0, 0.0]


def test_the_plain_loop_is_short():
    assert len((EXAMPLES / "plain_pytorch.py").read_text().splitlines()) <= 60


def test_a_simulation_prints_bits_and_agreement_of_every_codec_and_draws_them(tmp_path):
    output = run(sys.executable, EXAMPLES / "simulate.py", "--updates", 20, "--out", tmp_path / "plot.png")
    rows = [line.split() for line in output.splitlines() if re.fullmatch(r"\S+ +\d+ +[\d,]+ +[\d.]+ +[\d.]+", line)]
    assert [(row[0], int(row[1])) for row in rows] == [
        ("none", 0),
        *((codec, interval) for codec in ("fp16", "int8", "topk:2", "tokens:1") for interval in (1, 4, 16)),
    ]
    bits = [float(row[2].replace(",", "")) for row in rows]
    assert bits[0] == 0
    assert bits[1] > bits[4] > bits[7] > bits[10] > 0
    assert (tmp_path / "plot.png").stat().st_size > 5_000


@pytest.mark.slow
def test_without_matplotlib_a_simulation_still_prints_its_table(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    out = tmp_path / "plot.png"
    command = [sys.executable, str(EXAMPLES / "simulate.py"), "--updates", "2", "--out", str(out)]
    place = {**PLACE, "PYTHONPATH": str(tmp_path)}  # read when Python starts, so not in a fork
    ended = subprocess.run(command, env=place, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert "tokens:1 16" in ended.stdout
    assert not out.exists()


@pytest.mark.hosts
def test_two_translation_models_of_transformers_teach_each_other_and_tell_their_bleu(tmp_path):
    pytest.importorskip("transformers")
    output = run(
        *LAUNCH, "python", EXAMPLES / "transformers_translation.py", "--num_pairs", 300, "--vocabulary", 200, "--width",
        32, "--num_train_epochs", 2, "--logging_steps", 5, "--output_dir", tmp_path, "--use_cpu",
    )  # fmt: skip
    assert len(re.findall(r"^\[model [01]\] model [01]  BLEU [\d.]+  nrefs:1\|.*version:", output, re.MULTILINE)) == 2
    peers = re.findall(r"'codistill_peers': '?([\d.]+)", output)
    assert len(peers) >= 6
    assert set(peers) <= {"1", "1.0"}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.slow
def test_a_translation_model_is_trained_alike_whatever_its_batches_are_cut_in(tmp_path, smoothing):
    pytest.importorskip("transformers")
    norms = []
    for size, accumulated in ((16, 1), (4, 4)):
        output = run(
            sys.executable, EXAMPLES / "transformers_translation.py", "--num_pairs", 100, "--vocabulary", 100,
            "--width", 16, "--max_steps", 1, "--logging_steps", 1, "--output_dir", tmp_path, "--use_cpu",
            "--per_device_train_batch_size", size, "--gradient_accumulation_steps", accumulated,
            "--label_smoothing_factor", smoothing,
        )  # fmt: skip
        (norm,) = re.findall(r"'grad_norm': '?([\d.]+)", output)
        norms.append(float(norm))
    assert norms[1] == pytest.approx(norms[0], rel=0.3)  # but for dropout


@pytest.mark.hosts
def test_two_adapters_of_one_model_learn_and_a_folder_is_taken(tmp_path):
    pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    small = ("--num_train_epochs", 2, "--output_dir", tmp_path / "out", "--use_cpu")  # an evaluation after each
    assert_both_learned(run(*LAUNCH, "python", EXAMPLES / "transformers_lora.py", *small))

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).save_pretrained(tmp_path / "model")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"?": 0, "to": 1, "be": 2, "or": 3, "not": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("to be or not to be " * 300)
    own = ("--model", tmp_path / "model", "--text", tmp_path / "text", "--length", 16)
    assert_both_learned(run(*LAUNCH, "python", EXAMPLES / "transformers_lora.py", *small, *own))


def assert_both_learned(output):
    found = re.findall(r"model ([01])  loss of unseen text ([\d.]+) -> ([\d.]+)  agreement [\d.]+", output)
    assert sorted(model for model, *_ in found) == ["0", "1"]
    assert all(float(after) < float(before) for _, before, after in found), found


@pytest.fixture(scope="module")
def own_plugin(tmp_path_factory):
    """What two models printed that were trained with the user-dir of the examples, and the folder they wrote."""
    folder = tmp_path_factory.mktemp("plugin")
    command = [
        *LAUNCH, "fairseq-train", "--user-dir", EXAMPLES / "custom_user_dir", "--task", "codistill_python_source",
        "--valid-modules", "bisect", "--train-modules", "heapq", "--arch", "char_gru", "--width", 16,
        "--criterion", "codistillation", "--codistill-divergence", "kl", "--optimizer", "adam", "--lr", "0.01",
        "--batch-size", 16, "--max-epoch", 2, "--seed", "{model+1}", "--save-dir", folder / "{model}", "--cpu",
        "--num-workers", 0, "--log-format", "json", "--no-progress-bar", "--no-epoch-checkpoints",
    ]  # fmt: skip
    return run(*command), folder


def test_a_user_dir_of_ones_own_codistils_its_own_task_and_model(own_plugin):
    output, _ = own_plugin
    for model in (0, 1):
        lines = "\n".join(line for line in output.splitlines() if line.startswith(f"[model {model}]"))
        logs = json_logs(lines, "train")
        assert len(logs) == 2
        assert logs[-1]["train_codistill_peers"] == 1
        assert logs[-1]["train_codistill_skipped"] == 0
        assert logs[-1]["train_nll_loss"] < logs[0]["train_nll_loss"]
        assert 0 < logs[-1]["train_codistill_agreement"] <= 1


def test_its_checkpoint_names_the_task_of_the_user_dir_itself(own_plugin):
    checkpoint = load_checkpoint(own_plugin[1] / "0" / "checkpoint_last.pt")
    assert checkpoint["cfg"]["task"]["_name"] == "python_source"
    assert checkpoint["cfg"]["model"]["_name"] == "char_gru"


def test_codistillation_comes_into_the_user_dir_with_one_line():
    sources = [path.read_text() for path in (EXAMPLES / "custom_user_dir").rglob("*.py")]
    lines = [line for source in sources for line in source.splitlines() if "fairseq_codistill" in line]
    assert [line.split("  #")[0] for line in lines] == ["import fairseq_codistill.tasks"]
