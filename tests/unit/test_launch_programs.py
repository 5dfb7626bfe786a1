"""Which program a command runs, as the launcher sees it: who gets options, and who the environment."""

import pytest

from fairseq_codistill.launch import plan, programs, resources
from fairseq_codistill.launch.plan import last_value


@pytest.mark.parametrize(
    "words",
    [
        ["apptainer", "exec", "--nv", "--bind", "/data", "image.sif", "codistill-vision"],
        ["docker", "run", "--rm", "--gpus", "all", "image", "python", "-m", "fairseq_cli.train"],
        ["docker", "run", "-v", "/w/plugin.py", "image", "fairseq-train"],
        ["apptainer", "exec", "image.sif", "/opt/conda/bin/fairseq-train"],
        ["accelerate", "launch", "--multi_gpu", "codistill-vision"],
        ["torchrun", "-m", "fairseq_cli.train"],
        ["numactl", "-N", "0", "-m", "0", "fairseq-train"],
    ],
)
def test_a_program_behind_others_that_start_it_gets_its_options(words):
    jobs = plan.make_jobs([[*words, "--seed", "1"]] * 2, resources.Ports(7000, 2, 1), None, keys="of-the-run")
    assert [last_value(job.command, "--codistill-model-index") for job in jobs] == ["0", "1"]
    assert not jobs[1].environment.get("CODISTILL_NUM_MODELS")


@pytest.mark.parametrize(
    "words",
    [
        ["python", "my.py", "--like", "fairseq-train"],
        ["python", "-m", "my.loop", "--epochs", "3", "--data", "/data/vision/train"],
        ["python", "-u", "my.py", "/data/vision/train"],
        ["bash", "run.sh", "--epochs", "3", "--data", "/data/vision/train"],
        ["my-train", "--epochs", "3", "--out", "runs/codistill-vision"],
        ["my-train", "runs/codistill-vision"],
    ],
)
def test_what_a_program_of_ones_own_is_told_is_no_program(words):
    job, _ = plan.make_jobs([words] * 2, resources.Ports(7000, 2, 1), None)
    assert job.command == tuple(words)
    assert job.environment["CODISTILL_NUM_MODELS"] == "2"


@pytest.mark.parametrize(
    "command", [["vision/train.py"], ["python", "./vision/train.py"], ["python", "-m", "vision.train"]]
)
def test_a_script_of_ones_own_that_bears_our_name_is_ones_own(command, tmp_path, monkeypatch):
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision/train.py").touch()
    monkeypatch.chdir(tmp_path)
    assert not programs.takes_options(command)
    (tmp_path / "vision/plan.py").touch()  # as ours has it
    assert programs.takes_options(command)
