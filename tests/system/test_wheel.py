"""What is handed out: source distribution and wheel, built as an index gets them, and the wheel in a fresh environment.

The environment borrows the libraries of the one that runs the tests; nothing is taken from the network.
"""

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"
LEFT_OUT = shutil.ignore_patterns(
    *".git .venv *.egg-info build dist __pycache__ .*_cache .hypothesis checkpoints data-bin demo-output".split()
)


def files_of(folder):
    """Every file below a folder, by its path from there, without what Python leaves behind."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)) for path in paths}


def build(kind, source, out):
    """Build ``sdist`` or ``wheel`` of the folder ``source``; returns the file."""
    out.mkdir()
    subprocess.run([sys.executable, "-c", BUILD, kind, str(out)], cwd=source, check=True, capture_output=True)
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    # A copy: building leaves files behind, and would take what an earlier build left.
    shutil.copytree(ROOT, folder / "copy", ignore=LEFT_OUT)
    return build("sdist", folder / "copy", folder / "out")


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    (top,) = folder.iterdir()
    return top


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory):
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel") / "out")


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """Folder of the programs of a fresh environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    borrowed = [path for path in sys.path if path.rstrip("/").endswith("-packages")]
    # The .pth files of folders that a .pth names are not read: a repository that is installed there stays out.
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    command = "-m pip --quiet --python".split() + [str(folder / "bin/python"), "install", "--no-deps", "--no-index"]
    subprocess.run([sys.executable, *command, str(wheel)], check=True)
    return folder / "bin"


@pytest.fixture
def beside_foreign_vision(tmp_path, monkeypatch):
    """A current folder with a package ``vision`` of somebody else, which fails when it is imported."""
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision/__init__.py").write_text("raise RuntimeError('the foreign vision was imported')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


def ask(*command):
    """Run a program; returns what it printed."""
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.usefixtures("beside_foreign_vision")
def test_the_wheel_works_beside_a_foreign_vision(environment):
    home = Path(ask(environment / "fairseq-codistill-path").strip())
    assert home.is_relative_to(environment.parent)
    assert (home / "tasks/__init__.py").is_file()
    where = "import fairseq_codistill.vision.train as t; print(t.__file__)"
    assert Path(ask(environment / "python", "-c", where).strip()) == home / "vision/train.py"
    assert "wrn16_1_cifar" in ask(environment / "codistill-vision", "--help")


@pytest.mark.usefixtures("beside_foreign_vision")
def test_presets_of_the_wheel_are_found_beside_a_foreign_vision(environment):
    presets = sorted(path.stem for path in (ROOT / "vision/configs").glob("*.yaml"))
    code = (
        "from fairseq_codistill.vision.options import PRESETS, read_config\n"
        "for path in sorted(PRESETS.glob('*.yaml')): print(path.stem, bool(read_config(path.stem)))"
    )
    assert ask(environment / "python", "-c", code).splitlines() == [f"{name} True" for name in presets]
    planned = ask(
        *(environment / "codistill-launch", "--num-models", 2, "--dry-run", "--"),
        *("codistill-vision", "--config", "wrn16_1_cifar", "--dataset", "cifar10:x", "--cpu"),
        *("--seed", "{model+1}", "--save-dir", "out/{model}"),
    )
    assert "--batch-size 128" in planned


@pytest.mark.usefixtures("beside_foreign_vision")
def test_recipes_of_the_wheel_run_from_any_folder(environment):
    home = Path(ask(environment / "codistill-recipe", "--path").strip())
    assert home.is_relative_to(environment.parent)
    said = ask(environment / "codistill-recipe", "own_corpus/train.sh", "--help")
    assert said.startswith("Two models of a language pair of your own")
    planned = ask(
        "env", "DRY_RUN=1", "SMOKE=1", environment / "codistill-recipe", "cifar10/train.sh", "--arm", "codistill"
    )
    assert str(environment / "codistill-vision") in planned


def test_the_same_files_make_the_same_archives_wherever_and_whenever(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    made = []
    for name, moment in (("one", 1_600_000_000), ("another", 1_650_000_000)):
        copy = tmp_path / name / "copy"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        for path in copy.rglob("*"):
            os.utime(path, (moment, moment))
        kinds = ("sdist", "wheel")
        made.append([build(kind, copy, tmp_path / name / kind) for kind in kinds])
    for one, other in zip(*made, strict=True):
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes(), one.name
    with tarfile.open(made[0][0]) as archive:
        assert {(entry.uname, entry.uid, entry.mtime) for entry in archive} == {("", 0, 1_700_000_000)}


def test_every_command_of_the_wheel_says_its_version(environment, wheel):
    version = wheel.name.split("-")[1]
    names = {path.name for path in environment.iterdir() if "codistill" in path.name}
    assert len(names) >= 5
    assert {ask(environment / name, "--version") for name in names} == {f"{name} {version}\n" for name in names}


def test_the_wheel_holds_the_package_its_presets_and_its_marks_for_type_checkers_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"fairseq_codistill/py.typed", "fairseq_codistill/vision/py.typed"} <= names
    homes = {"fairseq_codistill": "fairseq_codistill", "vision": "fairseq_codistill/vision"}
    homes["recipes"] = "fairseq_codistill/recipes"
    assert names >= {f"{home}/{name}" for top, home in homes.items() for name in files_of(ROOT / top)}
    assert {name.split("/")[0].rpartition(".")[2] for name in names} == {"fairseq_codistill", "dist-info"}


def test_the_source_distribution_holds_tests_recipes_and_docs(unpacked):
    for folder in ("tests", "recipes", "examples", "docs", "benchmarks", "fairseq_codistill", "vision"):
        assert files_of(ROOT / folder) == files_of(unpacked / folder), folder
    assert {"README.md", "CHANGELOG.md", "LICENSE", "Makefile"} <= {path.name for path in unpacked.iterdir()}
    assert os.access(unpacked / "recipes/demo/run.sh", os.R_OK)


def test_what_an_index_is_sent_passes_its_check(sdist, wheel):
    pytest.importorskip("twine", reason="comes with the extra dev")
    printed = ask(sys.executable, "-m", "twine", "--no-color", "check", "--strict", sdist, wheel)
    assert printed.count("PASSED") == 2


def test_no_link_of_the_page_on_an_index_leads_nowhere(unpacked):
    index_page = runpy.run_path(str(ROOT / "setup.py"))["index_page"]
    page = (unpacked / "PKG-INFO").read_text(encoding="utf-8").partition("\n\n")[2]
    assert page.startswith("# fairseq-codistill")
    assert index_page(page, "https://host/owner/name") == page, "a relative link is left"
