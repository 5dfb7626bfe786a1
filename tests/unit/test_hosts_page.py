"""docs/hosts.md names tests that run the host of their column, adapters are thin, and each says what to install."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "hosts.md").read_text()
# Column -> the files of tests/ that run this host; a loop without fairseq, as in test_faults.py, is no test of fairseq.
FILES = {
    "fairseq": [
        "distributed/test_fairseq_traps.py",
        "distributed/test_mixed.py",
        "distributed/test_own_data.py",
        "distributed/test_reference.py",
        "distributed/test_resume.py",
        "distributed/test_split_step.py",
        "distributed/test_taught_models.py",
        "distributed/test_two_models.py",
        "golden/test_golden.py",
    ],
    "`codistill-vision`": [
        "distributed/test_own_data.py",
        "distributed/test_taught_models.py",
        "distributed/test_vision_*.py",
        "golden/test_golden.py",
        "unit/test_vision_engine.py",
    ],
    "timm's task": ["distributed/test_timm.py"],
    "Hugging Face trainer": [
        "distributed/test_mixed.py",
        "distributed/test_transformers.py",
        "unit/test_transformers_trainer.py",
    ],
    "a loop of one's own": [
        "distributed/test_own_data.py",
        "distributed/test_plain_loop.py",
        "distributed/test_simulation.py",
        "unit/test_codistiller.py",
        "unit/test_lookahead.py",
    ],
}
ADAPTERS = sorted((ROOT / "fairseq_codistill" / "integrations").glob("*.py"))


def test_every_cell_of_the_page_has_a_test_of_its_host_or_a_reason():
    heading = next(line for line in PAGE.splitlines() if line.startswith("| | "))
    assert cells_of(heading) == list(FILES)
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "`test_" in line]
    assert len(rows) >= 11
    for row in rows:
        cells = cells_of(row)
        assert len(cells) == 5, row
        assert all(re.match(r"`test_\w+`(, `test_\w+`)?$|– ", cell) for cell in cells), row
        for cell, (host, names) in zip(cells, FILES.items(), strict=True):
            for test in re.findall(r"`(test_\w+)`", cell):
                assert test in defined_in(names), f"{host}: {test} is in none of {names}"
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert named <= (exist := defined_in(["**/test_*.py"])), named - exist


def cells_of(row):
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def defined_in(names):
    sources = "\n".join(path.read_text() for name in names for path in (ROOT / "tests").glob(name))
    return set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))


def test_an_adapter_is_thin():
    assert {path.stem for path in ADAPTERS} >= {"transformers_trainer", "timm_task", "fairseq_batches"}
    for path in ADAPTERS:
        assert len(path.read_text().splitlines()) <= 200, path


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_importing_the_package_and_the_options_pulls_in_no_host():
    hosts = {"fairseq", "timm", "transformers", "accelerate", "peft", "torchvision"}
    found = run(
        "import sys, fairseq_codistill, fairseq_codistill.integrations.transformers_arguments as options\n"
        "from fairseq_codistill import Codistiller, CoordinatedBatches\n"
        f"options.CodistillArguments().config(); print(sorted({hosts} & set(sys.modules)))"
    )
    assert found.stdout == "[]\n", found.stderr


@pytest.mark.parametrize(
    ("module", "missing", "install"),
    [
        ("transformers_trainer", "transformers", "pip install 'fairseq-codistill[transformers]'"),
        ("timm_task", "timm.task", "pip install 'timm>=1.0.31'"),
    ],
)
def test_a_host_that_is_not_installed_is_an_error_that_names_what_to_install(module, missing, install):
    found = run(f"import sys; sys.modules[{missing!r}] = None; import fairseq_codistill.integrations.{module}")
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError")
    assert install in last
