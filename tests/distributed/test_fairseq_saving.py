"""Real fairseq runs on a disk that is full: what stands under a checkpoint's name is whole, and one line says why."""

import contextlib
import os
import subprocess

import pytest
from helpers import codistill_command, json_logs, load_checkpoint, run_together

PAGE = 4096


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many bytes; root only."""
    with contextlib.ExitStack() as stack:

        def mount(num_bytes):
            folder = tmp_path / "disk"
            folder.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes // PAGE * PAGE}", "none", str(folder)]
            if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
                pytest.skip("only root can mount a small file system, and not everywhere")
            stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
            return folder

        yield mount


def train(data, folder, num_updates):
    """One model, which saves after every update: under a name of its own, and as the last one."""
    command = codistill_command(
        data, folder, 0, "", "--seed", "1", "--disable-validation", "--max-update", str(num_updates),
        "--save-interval-updates", "1",
    )  # fmt: skip
    return run_together([command], 120)[0]


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


def updates_in(path):
    return load_checkpoint(path)["optimizer_history"][-1]["num_updates"]


def assert_one_line(result, *parts, returncode=1):
    assert result.returncode == returncode, result.output[-3000:]
    assert "Traceback" not in result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("fairseq-train: error: ")]
    for part in parts:
        assert part in line


def test_a_full_disk_leaves_whole_checkpoints_and_one_line(toy_data, tmp_path, small_disk):
    assert train(toy_data, tmp_path / "roomy", 1).returncode == 0
    size = (tmp_path / "roomy/checkpoint_last.pt").stat().st_size
    disk = small_disk(int(size * 3.5))  # one checkpoint, its copy and the next one; not a copy of that

    result = train(toy_data, disk / "run", 3)
    full = "No space left on device"
    assert_one_line(result, "disk/run/checkpoint_last.pt", full, "the one before it is still there")
    assert len(json_logs(result.output, "train_inner")) == 2
    assert files_of(disk / "run") == ["checkpoint_1_1.pt", "checkpoint_1_2.pt", "checkpoint_last.pt"]
    assert updates_in(disk / "run/checkpoint_1_2.pt") == 2
    assert updates_in(disk / "run/checkpoint_last.pt") == 1

    result = train(toy_data, disk / "run", 3)  # goes on from there: now the first of the files finds no room
    assert_one_line(result, full)
    (disk / "run/checkpoint_1_1.pt").unlink()
    assert files_of(disk / "run") == ["checkpoint_1_2.pt", "checkpoint_last.pt"]
    assert updates_in(disk / "run/checkpoint_last.pt") == 1
    (disk / "run/checkpoint_1_2.pt").unlink()
    assert train(toy_data, disk / "run", 2).returncode == 0
    assert updates_in(disk / "run/checkpoint_last.pt") == 2


def test_an_unwritable_folder_is_one_line_before_training(toy_data, tmp_path):
    (tmp_path / "file").touch()
    result = train(toy_data, tmp_path / "file/run", 1)
    assert_one_line(result, "--save-dir", "file/run", "cannot be written to: Not a directory", returncode=2)
    assert not json_logs(result.output, "train_inner")


def test_a_second_try_begins_with_an_empty_file(toy_data, tmp_path, monkeypatch):
    """fairseq wrote it behind what the first had written: nothing that can be read."""
    import torch
    from fairseq import checkpoint_utils

    from fairseq_codistill.fairseq_side import saving

    saving.write_whole_checkpoints()
    monkeypatch.setattr(saving, "PAUSE_S", 0.0)
    save, tries = torch.save, []

    def failing_once(obj, file):
        tries.append(obj)
        if len(tries) == 1:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(obj, file)

    monkeypatch.setattr(torch, "save", failing_once)
    checkpoint_utils.torch_persistent_save({"number": 1}, str(tmp_path / "checkpoint_last.pt"))
    assert torch.load(tmp_path / "checkpoint_last.pt", weights_only=True) == {"number": 1}
    assert files_of(tmp_path) == ["checkpoint_last.pt"]
