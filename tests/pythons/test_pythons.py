"""The first and the last supported Python: fresh environment, current pip, ``pip install .``, the distributed tests.
Not part of the suite, since it downloads and builds; run it with::

    PYTHONS="python3.10 python3.13" PYTHONS_OUT=pythons python -m pytest -m pythons tests/pythons

``PYTHONS`` names the interpreters, ``PYTHONS_OUT`` the folder of the logs. ``PYTHONS_ENVIRONMENTS`` is a folder that
keeps the environments, named after the interpreters' versions; one that is there gets what it lacks.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.pythons, pytest.mark.timeout(0)]
ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/distributed", "tests/unit/test_criterion.py")
LEFT_OUT = shutil.ignore_patterns(
    *".git .venv *.egg-info build dist __pycache__ .*_cache .hypothesis checkpoints data-bin demo-output".split()
)
VERSIONS = """
import importlib.metadata as m, platform, sys
print("Python", platform.python_version())
names = "pip fairseq-codistill fairseq-fixed torch torchvision timm omegaconf hydra-core numpy pyzmq pytest"
print(*(f"{name} {m.version(name)}" for name in names.split()), sep="\\n")
"""


def interpreters():
    return os.environ.get("PYTHONS", "python3.10 python3.13").split()


@pytest.mark.parametrize("interpreter", interpreters())
def test_the_distributed_tests_pass_in_a_fresh_environment(interpreter, tmp_path):
    if shutil.which(interpreter) is None:
        pytest.skip(f"{interpreter} is not installed; PYTHONS names the interpreters")
    asked = [interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    environment = Path(os.environ.get("PYTHONS_ENVIRONMENTS", tmp_path)).resolve() / version
    python = environment / "bin/python"
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    out = Path(os.environ.get("PYTHONS_OUT", tmp_path)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"python{version}.log").open("w") as log:

        def run(*command):
            log.write(f"$ {' '.join(command)}\n".replace(f"{environment}/bin/", "").replace(str(tmp_path), "..."))
            log.flush()
            ended = subprocess.run(command, cwd=copy, stdout=log, stderr=subprocess.STDOUT)
            assert ended.returncode == 0, f"{' '.join(command)} failed; its output is in {log.name}"

        if not python.exists():
            run(interpreter, "-m", "venv", str(environment))
        run(str(python), "-m", "pip", "install", "--quiet", "--upgrade", "pip")
        run(str(python), "-m", "pip", "install", "--quiet", ".[test]")
        shutil.rmtree(copy / "fairseq_codistill")  # what is installed is tested, not the folder beside the tests
        run(str(python), "-c", VERSIONS)
        run(str(python), "-m", "pytest", "--numprocesses", "2", "--dist", "loadfile", "--verbose", *TESTS)
    print((out / f"python{version}.log").read_text().splitlines()[-1], file=sys.stderr)
