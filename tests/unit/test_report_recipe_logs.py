"""What a recipe keeps of its models, and of what the launcher says of them, is read as its launcher's own logs are."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from test_report_logs import LABEL, LOGS, NOW, cut, put

from fairseq_codistill.report.model import Ending
from fairseq_codistill.report.reading import read_log
from fairseq_codistill.report.runs import find_runs
from fairseq_codistill.report.state import model_state

RUN_LOGGED = Path(__file__).parents[2] / "recipes/tools/run_logged.py"


def test_a_recipe_keeps_what_the_launcher_says_of_a_model_under_the_number_of_its_folder(tmp_path):
    """The real launcher, whose model 1 is killed; a second start of the recipe goes on in the same folder."""
    text = [LABEL.sub("", line) for line in (LOGS / "simple.log").read_text().splitlines() if "[model 1]" in line]
    stop = next(i for i, line in enumerate(text) if "| valid |" in line) + 1
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    put(tmp_path / "said", "".join(re.sub(r"^\d{4}-\S+ \S+", stamp, line) + "\n" for line in text[:stop]))
    program = (
        "import os, signal, sys; print(open(sys.argv[1]).read(), flush=True); "
        "os.kill(os.getpid(), signal.SIGKILL) if sys.argv[2:] == ['1'] else None"
    )
    launch = [sys.executable, "-m", "fairseq_codistill.launch.cli", "--num-models", "2", "--log-dir", "none", "--"]
    models = [sys.executable, "-c", program, str(tmp_path / "said"), "{model}"]
    run_logged = [sys.executable, str(RUN_LOGGED), "--log-dir", str(tmp_path / "run"), "--first-model", "2", "--"]
    done = subprocess.run([*run_logged, *launch, *models], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    states = [(model.index, model_state(model, time.time())) for model in find_runs(tmp_path / "run")[0].models]
    assert [(index, state.word, state.why) for index, state in states] == [
        (2, "live", states[0][1].why), (3, "failed", "killed by SIGKILL")
    ]  # fmt: skip
    (model,) = find_runs(tmp_path / "run/3/train.log")[0].models
    assert len([what for _, _, what in model.incidents if "SIGKILL" in what]) == 1
    done = subprocess.run([*run_logged, *launch, *models[:-1], "0"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [model_state(model, time.time()).word for model in find_runs(tmp_path / "run")[0].models] == ["live", "live"]


def test_a_recipe_that_is_started_again_is_live_before_its_first_stamp(tmp_path):
    log = tmp_path / "run/0/train.log"
    put(log, cut(tmp_path, "", 60, NOW).files[0].read_text())
    said = "[launch] model 0: killed by SIGKILL; the other models go on without it\n"
    for more, word in ((said, "failed"), ("[launch] model 0: CODISTILL_X=1 fairseq-train x\n", "live")):
        with log.open("a") as file:
            file.write(more)
        os.utime(log, (NOW, NOW))
        assert model_state(find_runs(tmp_path / "run")[0].models[0], NOW).word == word


def test_a_launchers_whole_output_in_a_numbered_folder_keeps_its_models_apart(tmp_path):
    said = "[launch] model 0: killed by SIGKILL; the other models go on without it\n"
    others = "".join(line for line in (LOGS / "simple.log").read_text().splitlines(True) if "[model 1]" in line)
    put(tmp_path / "0/train.log", said + others)  # it ended before its first line
    assert read_log(tmp_path / "0/train.log")[0, 0].ending == Ending("failed", "killed by SIGKILL")
    put(tmp_path / "0/train.log", f"going\n{(LOGS / 'simple.log').read_text()}{said}")
    logs = read_log(tmp_path / "0/train.log")
    assert logs[0, 0].ending == Ending("failed", "killed by SIGKILL")
    assert logs[1, 0].ending != logs[0, 0].ending
