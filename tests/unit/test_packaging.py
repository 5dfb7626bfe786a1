"""The package as it is installed: its user-dir, its version, its scripts, its parts."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import fairseq_codistill
from fairseq_codistill.paths import user_dir

ROOT = Path(__file__).resolve().parents[2]


def test_the_path_script_prints_the_user_dir_from_any_folder(tmp_path):
    script = os.path.join(os.path.dirname(sys.executable), "fairseq-codistill-path")
    printed = subprocess.run([script], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert printed == str(Path(fairseq_codistill.__file__).parent) + "\n"
    # fairseq imports a --user-dir by its folder's name, and the tasks in it
    assert Path(user_dir()).name == "fairseq_codistill"
    assert (Path(user_dir()) / "tasks" / "__init__.py").is_file()


def test_the_distribution_has_the_version_of_the_package_and_every_script():
    distribution = importlib.metadata.distribution("fairseq-codistill")
    assert distribution.version == fairseq_codistill.__version__
    scripts = {script.name for script in distribution.entry_points if script.group == "console_scripts"}
    assert scripts == {
        "fairseq-codistill-path",
        "codistill-keys",
        "codistill-launch",
        "codistill-report",
        "codistill-vision",
    }


def test_fairseq_is_pinned_on_every_supported_python():
    required = importlib.metadata.requires("fairseq-codistill") or []
    assert sorted(line.replace(" ", "") for line in required if line.startswith("fairseq") and "extra" not in line) == [
        'fairseq-fixed==0.12.3.1;python_version>="3.11"',
        'fairseq==0.12.2;python_version<"3.11"',
    ]


def test_every_folder_with_code_is_a_package_that_will_be_installed():
    packages = re.findall(r'^    "(fairseq_codistill[a-z_.]*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    folders = {
        ".".join([*home, *path.parent.relative_to(ROOT / top).parts])
        for top, home in (("fairseq_codistill", ["fairseq_codistill"]), ("vision", ["fairseq_codistill", "vision"]))
        for path in (ROOT / top).rglob("*.py")
    }
    assert sorted(folders) == packages
