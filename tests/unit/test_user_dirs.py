"""A user-dir of one's own brings codistillation in with one line, wherever that is and however often it is read."""

import json
import sys

import pytest
from helpers import run_together

OURS = "import fairseq_codistill.tasks\n"
TASK = """
from fairseq.tasks.translation import TranslationConfig, TranslationTask
@register_task("mine", dataclass=TranslationConfig)
class MineTask(TranslationTask):
    pass
"""
BY_NAME = "from fairseq.tasks import register_task\n"
ANOTHER_NAME = "from fairseq.tasks import register_task as register\n" + TASK.replace("@register_task", "@register")
# What is in the folder: path -> content.
USER_DIRS = {
    "before the task": {"__init__.py": OURS + BY_NAME + TASK},
    "after what registers it": {"__init__.py": BY_NAME + OURS + TASK},
    "after what registers it by another name": {
        "__init__.py": ANOTHER_NAME.replace("from fairseq.tasks.tr", OURS + "from fairseq.tasks.tr")
    },
    "after the task": {"__init__.py": BY_NAME + TASK + OURS},
    "in front of a folder of tasks": {"__init__.py": OURS, "tasks/__init__.py": "", "tasks/mine.py": BY_NAME + TASK},
    "in a folder of models, which is read last": {
        "__init__.py": "",
        "tasks/__init__.py": "",
        "tasks/mine.py": BY_NAME + TASK,
        "models/__init__.py": "",
        "models/any.py": OURS,
    },
}
PROGRAM = """
import argparse, json, sys
from fairseq import options, utils
parser = options.get_training_parser()  # imports the user-dir, as fairseq-train does
utils.import_user_module(argparse.Namespace(user_dir=sys.argv[2]))  # and once more
arguments = options.parse_args_and_arch(parser)
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.tasks import TASK_REGISTRY
wrapper = TASK_REGISTRY["codistill_mine"]
print("found", json.dumps([arguments.task, arguments.criterion, arguments.source_lang, "codistillation" in
    CRITERION_REGISTRY, wrapper.__mro__[2].__name__, wrapper.stock_name, "codistill_translation" in TASK_REGISTRY]))
"""


@pytest.mark.parametrize("place", USER_DIRS)
def test_a_task_of_ones_own_can_codistil_wherever_the_line_is(place, tmp_path):
    for path, content in USER_DIRS[place].items():
        (tmp_path / "plugin" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "plugin" / path).write_text(content)
    (tmp_path / "program.py").write_text(PROGRAM)
    arguments = "data --task codistill_mine --criterion codistillation --arch transformer --source-lang en"
    command = [sys.executable, str(tmp_path / "program.py"), "--user-dir", str(tmp_path / "plugin"), *arguments.split()]
    (result,) = run_together([command], 120)
    assert result.returncode == 0, result.output
    (found,) = [line for line in result.output.splitlines() if line.startswith("found ")]
    assert json.loads(found.removeprefix("found ")) == [
        "codistill_mine", "codistillation", "en", True, "MineTask", "mine", True
    ]  # fmt: skip
