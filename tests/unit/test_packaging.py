"""The package as it is installed: its user-dir, its version, its scripts, its parts."""

import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import fairseq_codistill
from fairseq_codistill.paths import user_dir

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = (
    *("fairseq-codistill-path", "codistill-keys", "codistill-launch", "codistill-recipe"),
    *("codistill-relay", "codistill-report", "codistill-status", "codistill-vision"),
)


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
    assert scripts == set(SCRIPTS)


def test_one_release_of_fairseq_serves_every_supported_python():
    """One that a current pip installs: the metadata of fairseq 0.12.2 itself are refused from pip 24.1 on."""
    required = importlib.metadata.requires("fairseq-codistill") or []
    assert [line.replace(" ", "") for line in required if line.startswith("fairseq") and "extra" not in line] == [
        "fairseq-fixed==0.12.3.1"
    ]


def script(name):
    """A console script of the environment that runs the tests."""
    return os.path.join(os.path.dirname(sys.executable), name)


@pytest.fixture
def without_frameworks(tmp_path):
    """An environment in which importing what takes seconds fails at once."""
    for name in ("torch", "fairseq", "timm", "torchvision"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_every_command_says_its_version_and_its_help_without_loading_torch(without_frameworks, name, flag):
    script = os.path.join(os.path.dirname(sys.executable), name)
    printed = subprocess.run([script, flag], env=without_frameworks, capture_output=True, text=True, check=True).stdout
    assert printed.startswith(f"usage: {name}" if flag == "--help" else f"{name} {fairseq_codistill.__version__}\n")


def test_wrong_options_of_vision_are_refused_without_loading_torch(without_frameworks):
    script = os.path.join(os.path.dirname(sys.executable), "codistill-vision")
    ended = subprocess.run([script, "--no-save", "--lr", "-1"], env=without_frameworks, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("codistill-vision: error: --lr is -1.0")
    assert ended.stderr.count("\n") == 1


def test_types_are_announced_for_both_parts():
    for folder in (Path(fairseq_codistill.__file__).parent, ROOT / "vision"):
        assert (folder / "py.typed").is_file()


@pytest.fixture(scope="module")
def index_page():
    """The function of setup.py that makes the page of a package index."""
    return runpy.run_path(str(ROOT / "setup.py"))["index_page"]


README = """See [docs](docs/x.md#part), [the paper](https://host/1), [below](#below) and ![curves](docs/a.png).

    models[0](inputs)

```python
models[0](inputs)
```
[`code`](a.py), [`more`](b.py)
"""


def test_links_of_the_readme_are_absolute_on_an_index_where_the_repository_has_an_address(index_page):
    page = index_page(README, "https://host/owner/name/")
    assert page == README.replace("(docs/x", "(https://host/owner/name/blob/HEAD/docs/x").replace(
        "(docs/a", "(https://host/owner/name/raw/HEAD/docs/a"
    ).replace("(a.py", "(https://host/owner/name/blob/HEAD/a.py").replace(
        "(b.py", "(https://host/owner/name/blob/HEAD/b.py"
    )


def test_links_that_would_lead_nowhere_are_text_on_an_index(index_page):
    page = index_page(README, "")
    assert "See docs, [the paper](https://host/1), [below](#below) and curves." in page
    assert page.count("models[0](inputs)") == 2
    assert page.endswith("```\n`code`, `more`\n")


def test_every_folder_with_code_is_a_package_that_will_be_installed():
    packages = re.findall(r'^    "(fairseq_codistill[a-z_.]*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    folders = {
        ".".join([*home, *path.parent.relative_to(ROOT / top).parts])
        for top, home in (("fairseq_codistill", ["fairseq_codistill"]), ("vision", ["fairseq_codistill", "vision"]))
        for path in (ROOT / top).rglob("*.py")
    }
    assert sorted({*folders, "fairseq_codistill.recipes"}) == packages


def test_recipes_are_run_by_name_with_the_python_of_the_command():
    listed = subprocess.run([script("codistill-recipe"), "--list"], capture_output=True, text=True, check=True).stdout
    assert {"own_corpus/train.sh", "demo/run.sh", "multi30k_en_de/prepare.sh"} <= set(listed.split())
    helped = [script("codistill-recipe"), "own_corpus/train.sh", "--help"]
    assert "train.sh --source en" in subprocess.run(helped, capture_output=True, text=True, check=True).stdout
    wrong = subprocess.run([script("codistill-recipe"), "nothing"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "nothing is no recipe; it must be one of" in wrong.stderr


def test_one_version_is_told_everywhere():
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE).group(1)
    newest = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1)
    assert cited == newest == fairseq_codistill.__version__


def test_the_citation_is_of_the_form_that_hosts_read():
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= cited.keys()
    assert cited["license"] == "MIT"
    assert [one["family-names"] for one in cited["references"][0]["authors"]][0] == "Sodhani"


def test_the_image_is_linted():
    linter = script("hadolint")
    if not os.path.exists(linter):
        pytest.skip("hadolint is not installed; the extra dev brings it")
    ended = subprocess.run([linter, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "")


def test_the_name_that_average_had_still_works_and_says_where_it_is():
    command = [sys.executable, "-m", "fairseq_codistill.average", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0
    assert "--checkpoint-dir" in ended.stdout
    assert "call python -m fairseq_codistill.fairseq_side.average" in ended.stderr
