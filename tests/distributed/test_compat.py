"""fairseq with the torch that is installed: decode, resume, and the checks that stay on."""

import argparse
import io
import sys

import numpy as np
import pytest
import torch
from helpers import USER_DIR, environment, free_ports, gloo_ranks, json_logs, run_together, train_command

from fairseq_codistill.config import ConfigError
from fairseq_codistill.fairseq_side import compat

SECONDS = 240
CHECKS_BY_DEFAULT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)


class Surprise:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ("a checkpoint ran code",))


@pytest.fixture(scope="module")
def stock_run(toy_data, tmp_path_factory):
    """Folder of a plain fairseq run whose checkpoint holds a namespace and numpy arrays (from --eval-bleu)."""
    folder = tmp_path_factory.mktemp("stock")
    bleu = ["--eval-bleu", "--eval-bleu-args", '{"beam": 1, "max_len_b": 5}', "--eval-bleu-detok", "space"]
    (result,) = run_together([train_command(toy_data, folder, "--max-update", "4", *bleu)], SECONDS)
    assert result.returncode == 0, result.output
    return folder


def generate(data, checkpoint, *extra):
    return [sys.executable, "-m", "fairseq_cli.generate", str(data), "--cpu", "--path", str(checkpoint),
            "--max-len-b", "5", *extra]  # fmt: skip


def test_user_dir_decodes_a_plain_checkpoint_that_torch_refuses_without_it(toy_data, stock_run):
    checkpoint = stock_run / "checkpoint_last.pt"
    commands = [generate(toy_data, checkpoint, "--user-dir", USER_DIR), generate(toy_data, checkpoint)]
    with_user_dir, without = run_together(commands, SECONDS)
    assert with_user_dir.returncode == 0, with_user_dir.output
    assert "Generate test with beam=5" in with_user_dir.output
    if CHECKS_BY_DEFAULT:
        assert without.returncode != 0
        assert "Weights only load failed" in without.output


def test_user_dir_resumes_on_two_ranks(toy_data, stock_run, tmp_path):
    command = train_command(
        toy_data, tmp_path, "--restore-file", str(stock_run / "checkpoint_last.pt"), "--user-dir", USER_DIR,
        "--max-update", "7", "--no-save", "--max-tokens", "100", "--reset-dataloader",
    )  # fmt: skip
    results = run_together(gloo_ranks(command, 2, free_ports(1)[0]), SECONDS)
    for result in results:
        assert result.returncode == 0, result.output
    assert [log["num_updates"] for log in json_logs(results[0].output, "train_inner")] == [5, 6, 7]


def test_weights_only_stays_on_for_everything_else(tmp_path):
    compat.apply()
    torch.save({"args": argparse.Namespace(value=Surprise())}, tmp_path / "bad.pt")
    with pytest.raises(Exception, match="(?i)weights.?only|unsupported"):
        torch.load(tmp_path / "bad.pt", weights_only=True)
    torch.save({"args": argparse.Namespace(value=3)}, tmp_path / "good.pt")
    assert torch.load(tmp_path / "good.pt", weights_only=True)["args"].value == 3


class Pickled:
    """Pickled as whatever it is told: what a forged checkpoint can hold."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def through_a_checkpoint(value, rename=(b"", b"")):
    """Save in the old format, whose names can be replaced in place, and load with the checks on."""
    compat.apply()
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return torch.load(io.BytesIO(buffer.getvalue().replace(*rename)), weights_only=True)


NAMES_STAND_INS = pytest.mark.skipif(not CHECKS_BY_DEFAULT, reason="this torch lets no name be given to a stand-in")


@NAMES_STAND_INS
@pytest.mark.parametrize("rename", [(b"numpy._core.", b"numpy.core."), (b"numpy.core.", b"numpy._core.")])
def test_numbers_of_numpy_come_back_as_they_were_and_are_saved_as_numpy_saves_them(rename):
    values = {
        "counts": np.array([[5, 3], [2, 1]]),
        "columns": np.asfortranarray(np.arange(6.0, dtype=np.float32).reshape(2, 3)),
        "big_endian": np.array([1, 2, 3], dtype=">i4"),
        "best": np.float64(1.5),
        "flag": np.bool_(True),
    }
    loaded = through_a_checkpoint(values, rename)
    for name, value in values.items():
        assert loaded[name].dtype == value.dtype.newbyteorder("=")  # numpy, too, reads into the machine's byte order
        np.testing.assert_array_equal(loaded[name], value)
    assert (loaded["counts"] + 1).tolist() == [[6, 4], [3, 2]]
    again, file = io.BytesIO(), io.BytesIO()
    torch.save(loaded, again)
    torch.save(values, file)
    again.seek(0)
    file.seek(0)
    names = [torch.serialization.get_unsafe_globals_in_checkpoint(buffer) for buffer in (again, file)]
    assert names[0] == names[1]
    assert b"fairseq_codistill" not in again.getvalue()


def forged_array(dtype, data=b"\0" * 16):
    reconstruct, arguments, _ = np.zeros(2).__reduce__()
    return Pickled(reconstruct, arguments, (1, (2,), dtype, False, data))


@NAMES_STAND_INS
def test_a_forged_numpy_dtype_has_no_effect():
    all_flags = Pickled(np.dtype, ("i8", False, True), (3, "<", None, None, None, -1, -1, 63))
    loaded = through_a_checkpoint(forged_array(all_flags))
    assert not loaded.dtype.hasobject
    assert loaded.tolist() == [0, 0]


@NAMES_STAND_INS
@pytest.mark.parametrize(
    "forged",
    [
        forged_array(Pickled(np.dtype, ("O8", False, True)), [1, 2]),
        forged_array(Pickled(np.dtype, ("V16", False, True))),
        forged_array(Pickled(np.dtype, ("i8", False, True)), [1, 2]),
        forged_array(Pickled(np.dtype, ("i8", False, True)), b"short"),
        Pickled(np.ndarray, ((2,), "O")),
    ],
    ids=["objects", "records", "a list as numbers", "too short", "constructor"],
)
def test_numpy_data_other_than_numbers_is_refused(forged):
    with pytest.raises(Exception, match="a checkpoint holds|a checkpoint makes|buffer size"):
        through_a_checkpoint(forged)


def test_language_models_of_whole_sentences_and_bucketed_batches_find_their_numpy_names():
    from fairseq.data import TokenBlockDataset, data_utils, language_pair_dataset

    compat.apply()
    sentences = [torch.tensor([4, 5, 2]), torch.tensor([6, 2])]
    blocks = TokenBlockDataset(sentences, [3, 2], block_size=None, pad=1, eos=2, break_mode="eos")
    assert [block.tolist() for block in blocks] == [[4, 5, 2], [6, 2]]
    assert language_pair_dataset.np.compat.long is int
    assert data_utils.np.int is int
    assert data_utils.np.arange is np.arange


ENDS_WHILE_LOADING = """
import torch
from fairseq.data.iterators import BufferedIterator
from fairseq_codistill.fairseq_side import compat

class Endless:
    def __len__(self):
        return 10**9

    def __iter__(self):
        while True:
            yield torch.LongTensor(list(range(20))).sum().item()

if {mended}:
    compat.apply()
batches = BufferedIterator({size}, Endless())
assert next(batches) == 190
"""


@pytest.mark.parametrize(
    "size", [pytest.param(2, id="waits for room", marks=pytest.mark.slow), pytest.param(10**9, id="inside torch")]
)
def test_a_process_that_ends_while_batches_are_loaded_exits_with_0(size):
    script = ENDS_WHILE_LOADING.format(mended=True, size=size)
    for result in run_together([[sys.executable, "-c", script]] * 2, timeout_s=120):
        assert result.returncode == 0, result.output


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="this Python lets such threads hang instead")
@pytest.mark.slow
def test_fairseq_alone_aborts_when_it_ends_while_batches_are_loaded():
    script = ENDS_WHILE_LOADING.format(mended=False, size=10**9)
    results = run_together([[sys.executable, "-c", script]] * 3, timeout_s=120)
    assert any(result.returncode != 0 for result in results), "mended upstream: end_loading_threads can go"


def test_nan_gradients_are_reported_as_such(toy_data, tmp_path):
    command = train_command(
        toy_data, tmp_path, "--user-dir", USER_DIR, "--optimizer", "sgd", "--lr", "1e20", "--max-update", "9"
    )
    (result,) = run_together([command], SECONDS)
    assert result.returncode != 0
    assert "gradients are Nan/Inf" in result.output
    assert "StopIteration" not in result.output


def test_a_buffer_that_fairseq_leaves_as_its_memory_was_holds_a_zero(monkeypatch):
    """As in fairseq 0.12.2, where whether an fp16 checkpoint was sent depended on what the memory held before."""
    from fairseq.modules.sinusoidal_positional_embedding import SinusoidalPositionalEmbedding

    def init(self):
        torch.nn.Module.__init__(self)
        self.register_buffer("_float_tensor", torch.full((1,), 1e30))

    monkeypatch.setattr(SinusoidalPositionalEmbedding, "__init__", init)
    compat.clear_dtype_buffers()
    compat.clear_dtype_buffers()
    assert SinusoidalPositionalEmbedding()._float_tensor.tolist() == [0.0]


def test_an_encoder_layer_that_was_loaded_takes_no_way_that_torch_has_changed():
    """Which fairseq 0.12.2 does once ``load_to_BT`` is true; later releases do not know the name."""
    from fairseq.modules.transformer_layer import TransformerEncoderLayerBase

    compat.apply()
    layer = TransformerEncoderLayerBase.__new__(TransformerEncoderLayerBase)
    torch.nn.Module.__init__(layer)
    layer.load_to_BT = True  # as 0.12.2 does when it loads a checkpoint
    assert layer.load_to_BT is False


@pytest.mark.parametrize(("variables", "refused"), [({"WORLD_SIZE": "2"}, True), ({"WORLD_SIZE": "1"}, False)])
def test_torchrun_that_would_train_independent_models_is_refused(monkeypatch, variables, refused):
    for name, value in {"MASTER_ADDR": "x", "MASTER_PORT": "1", "RANK": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    if refused:
        with pytest.raises(ConfigError, match="WORLD_SIZE is 2.*codistill-launch"):
            compat.check_world(1)
    else:
        compat.check_world(1)
    compat.check_world(2)


def test_a_cluster_that_only_happens_to_set_world_size_is_left_alone(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "16")
    compat.check_world(1)
    assert environment()["WORLD_SIZE"] == "16"
