"""README's own example runs as it stands, and its links lead somewhere."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")]
    + [*ROOT.glob("recipes/*/README.md"), *ROOT.glob("results/*/README.md")]
)


def test_the_example_trains_as_it_stands(tmp_path, capsys, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    torch.manual_seed(0)
    inputs = torch.randn(256, 4)
    targets = (inputs[:, 0] > 0).long()
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    dataset = TensorDataset(inputs, targets, torch.arange(256))
    monkeypatch.chdir(tmp_path)
    given = {"torch": torch, "DataLoader": DataLoader, "dataset": dataset, "model": model, "optimizer": optimizer}
    exec(example, given)
    assert (model(inputs).argmax(dim=1) == targets).float().mean() > 0.95
    assert torch.load("model-0.pt", weights_only=True)["peers"]["count"] == 40
    assert len(capsys.readouterr().out.splitlines()) == 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_examples_and_roles_of_docstrings_are_markdown_on_the_site():
    pytest.importorskip("griffe", reason="comes with the extra docs")
    as_markdown = runpy.run_path(str(ROOT / "docs/docstrings.py"))["as_markdown"]
    text = "See :class:`~a.b.C` and :mod:`a.b`.\n\n>>> f(1)\n[[2, 2]]\n\nMore."
    assert as_markdown(text) == "See `C` and `a.b`.\n\nExamples:\n    >>> f(1)\n    [[2, 2]]\n\nMore."
