"""The temperatures of the test of the claim: what is fitted, on which images, and what is compared then."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from helpers import codistill_command, json_logs, run_together
from torch.nn.functional import cross_entropy
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes/claim"))
import grid
import rescaled
import text

NUM_CLASSES, EACH = 4, 60


def predictions(temperature, seed):
    """Logits of images whose labels are drawn from their probabilities, times a temperature; labels in order."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(NUM_CLASSES).repeat_interleave(EACH)
    logits = 2 * torch.randn(len(targets), NUM_CLASSES, generator=generator)
    drawn = logits.softmax(dim=1).multinomial(1, generator=generator).squeeze(1)
    rolled = (torch.arange(NUM_CLASSES) + (targets - drawn).unsqueeze(1)).remainder(NUM_CLASSES)
    turned = torch.empty_like(logits).scatter_(1, rolled, logits)  # so that what was drawn is the label
    return temperature * turned, targets


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_was_put_in_is_found_and_no_other_is_better(temperature):
    logits, targets = predictions(temperature, 1)
    found = rescaled.fit_temperature(logits, targets)
    assert found == pytest.approx(temperature * rescaled.fit_temperature(*predictions(1.0, 1)), rel=1e-3)
    assert found == pytest.approx(temperature, rel=0.25)
    best = cross_entropy(logits.double() / found, targets)
    for other in (0.9, 1.1):
        assert cross_entropy(logits.double() / (other * found), targets) > best


def test_the_temperature_is_of_the_held_out_images_and_accuracy_stays():
    parts = {"held_out": predictions(3.0, 2), "test": predictions(1.0, 3)}
    logits, targets = ({part: both[i] for part, both in parts.items()} for i in (0, 1))
    found = rescaled.rescaled(logits, targets)
    assert found["temperature"] == rescaled.fit_temperature(*parts["held_out"])
    assert found["nll_rescaled"] == pytest.approx(
        float(cross_entropy(logits["test"].double() / found["temperature"], targets["test"]))
    )
    assert found["nll_rescaled"] > found["nll"]  # the test images wanted another one
    assert found["top1"] == pytest.approx(100 * float((logits["test"].argmax(1) == targets["test"]).double().mean()))


@pytest.fixture
def campaign(tmp_path):
    """Runs and data of three seeds: one model alone from two starts, all_reduce over-confident, two models not."""
    for part in ("val", "test"):
        for label in range(NUM_CLASSES):
            folder = tmp_path / f"data/10000/{part}/{label}"
            folder.mkdir(parents=True)
            for image in range(EACH):
                to_pil_image(torch.zeros(3, 1, 1)).save(folder / f"{image}.png")
    rows = []

    def add(setting, arm, seed, init, temperature, regularisation="wd5e-4", num_models=1, kept=True):
        alpha = 0.3 if num_models > 1 else 0.0
        run = grid.Run(setting, "final", arm, seed, init, 0.2, regularisation, alpha)
        rows.append({**vars(run), "held_out": {}, "test": {}})
        if kept:
            folder = tmp_path / "runs" / run.name
            folder.mkdir(parents=True)
            for number, part in enumerate(("held_out", "test")):
                seeds = [1000 * number + 10 * seed + init + model for model in range(num_models)]
                models = [predictions(temperature * (1 + seed / 100), one)[0] for one in seeds]
                torch.save(torch.stack(models).half(), folder / f"{part}.logits.pt")

    for seed in (2, 3, 4):
        for init in (0, 1):
            add("a", "plain", seed, init, 1.5)
        add("a", "all_reduce", seed, 0, 3.0)
        add("a_heavy", "all_reduce", seed, 0, 2.0, "wd1e-3", kept=seed > 2)
        add("a", "mse", seed, 0, 1.0, num_models=2)
    tuned = grid.Run("a", "tune", "plain", 1, 0, 0.2, "wd5e-4", 0.0)
    rows += [{**vars(tuned), "held_out": {}, "test": None}, {**vars(tuned), "lr": 0.4, "held_out": {}, "test": None}]
    (tmp_path / "runs" / tuned.name).mkdir(parents=True)  # the other left nothing
    torch.save(predictions(3.0, 9)[0][None].half(), tmp_path / "runs" / tuned.name / "held_out.logits.pt")
    (tmp_path / "runs/runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_every_final_run_that_left_predictions_has_a_row_and_two_models_one_for_both(campaign):
    rows = rescaled.rows_of(campaign / "runs", campaign / "data")
    (tuned,) = [row for row in rows if row["stage"] == "tune"]
    rows.remove(tuned)
    logits, targets = predictions(3.0, 9)
    assert rescaled.in_halves(logits, targets) < float(cross_entropy(logits, targets)) - 0.2
    assert tuned["held_out_nll_rescaled"] == pytest.approx(rescaled.in_halves(logits, targets), abs=1e-3)
    assert "test" not in tuned
    counted = {(r["setting"], r["arm"], r["models"]): sum(r["arm"] == o["arm"] and r["models"] == o["models"]
               and r["setting"] == o["setting"] for o in rows) for r in rows}  # fmt: skip
    assert counted == {
        ("a", "plain", 1): 6, ("a", "plain", 2): 3, ("a", "all_reduce", 1): 3, ("a_heavy", "all_reduce", 1): 2,
        ("a", "mse", 1): 3, ("a", "mse", 2): 3,
    }  # fmt: skip
    one = next(r for r in rows if (r["arm"], r["models"], r["seed"]) == ("mse", 1, 2))
    both = next(r for r in rows if (r["arm"], r["models"], r["seed"]) == ("mse", 2, 2))
    stored = torch.load(campaign / "runs/a/final/mse/lr0.2_wd5e-4_alpha0.3/2_0/test.logits.pt").double()
    targets = torch.arange(NUM_CLASSES).repeat_interleave(EACH)
    assert one["nll"] == pytest.approx(float(sum(cross_entropy(model, targets) for model in stored) / 2))
    together = stored.softmax(dim=2).mean(dim=0).log()
    assert both["nll"] == pytest.approx(float(cross_entropy(together, targets)))
    pair = next(r for r in rows if (r["arm"], r["models"], r["seed"]) == ("plain", 2, 3))
    starts = [torch.load(campaign / f"runs/a/final/plain/lr0.2_wd5e-4/3_{init}/test.logits.pt")[0] for init in (0, 1)]
    together = torch.stack(starts).double().softmax(dim=2).mean(dim=0).log()
    assert pair["nll"] == pytest.approx(float(cross_entropy(together, targets)))


def test_the_page_has_each_arm_at_its_better_setting_and_compares_what_is_rescaled(campaign):
    rows = rescaled.rows_of(campaign / "runs", campaign / "data")
    for row in rows:
        if row["stage"] == "tune":
            continue
        if row["arm"] == "all_reduce":
            row["held_out_nll_rescaled"] = 0.5 if row["setting"] == "a" else 0.6
            row["nll"], row["nll_rescaled"] = 9.0, 0.7 + row["seed"] / 1000
        elif row["arm"] == "mse":
            row["nll_rescaled"] = 0.8 + row["seed"] / 1000
    found = rescaled.chosen(rows, ("a", "a_heavy"), 1)
    assert {row["setting"] for row in found["all_reduce"]} == {"a"}
    text = rescaled.page(rows)
    assert "| all_reduce | 0.2, wd5e-4 | 3 |" in text
    assert (
        "- mse: rescaled NLL -0.1000 (95 %: -0.1023 to -0.0977; by seed -0.1000 to -0.1000) below that of all_reduce."
        in text
    )
    assert "- two models, mse: rescaled NLL" in text
    assert "- all_reduce: rescaled NLL" in text
    assert "below that of mse" not in text
    assert (
        f"| plain | 0.2, wd5e-4 | {next(r for r in rows if r['stage'] == 'tune')['held_out_nll_rescaled']:.4f} |"
        in text
    )


def test_a_point_of_which_seeds_are_missing_is_not_chosen(campaign):
    rows = rescaled.rows_of(campaign / "runs", campaign / "data")
    for row in rows:
        if row["setting"] == "a_heavy":  # of which two seeds of three are there
            row["held_out_nll_rescaled"] = 0.0
    assert {row["setting"] for row in rescaled.chosen(rows, ("a", "a_heavy"), 1)["all_reduce"]} == {"a"}
    second = next(r for r in rows if (r["arm"], r["models"], r["seed"], r["init"]) == ("plain", 1, 4, 1))
    assert "plain" in rescaled.chosen(rows, ("a", "a_heavy"), 1)
    rows.remove(second)  # of one model alone both starts of a seed are its value
    assert "plain" not in rescaled.chosen(rows, ("a", "a_heavy"), 1)
    assert "plain" in rescaled.chosen(rows, ("a", "a_heavy"), 2)


def test_rows_of_runs_whose_predictions_are_gone_stay(campaign, monkeypatch):
    args = ["--runs", str(campaign / "runs"), "--data", str(campaign / "data"), "--out", str(campaign / "out")]
    monkeypatch.setattr("sys.argv", ["rescaled.py", *args])
    rescaled.main()
    file = campaign / "out/rescaled.jsonl"
    first = [json.loads(line) for line in file.read_text().splitlines()]
    again = "a/final/mse/lr0.2_wd5e-4_alpha0.3/2_0/test.logits.pt"
    for path in (campaign / "runs").rglob("*.logits.pt"):
        if "final/mse" not in str(path) and "final/plain" not in str(path):
            path.unlink()
    (campaign / "runs/a/final/plain/lr0.2_wd5e-4/4_1/test.logits.pt").unlink()  # of the two one is left
    changed = torch.load(campaign / "runs" / again)
    torch.save(changed + 3 * torch.randn(changed.shape).half(), campaign / "runs" / again)
    rescaled.main()
    second = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row for row in first if row not in second] == [
        row for row in first if (row["arm"], row["seed"]) == ("mse", 2)
    ]
    assert len(second) == len(first)
    assert (campaign / "out/rescaled.md").read_text() == rescaled.page(second)


def test_the_page_is_that_of_the_rows_beside_it():
    folder = Path(__file__).parents[2] / "results/claim"
    rows = [json.loads(line) for line in (folder / "rescaled.jsonl").read_text().splitlines()]
    assert rescaled.page(rows) == (folder / "rescaled.md").read_text()


@pytest.fixture(scope="module")
def translations(toy_data, tmp_path_factory):
    """Runs of one model alone from both starts of a seed, of toy sentences; and the data as the recipe lays it."""
    folder = tmp_path_factory.mktemp("text")
    rows, commands = [], []
    for init in (0, 1):
        run = grid.Run("text_third", "final", "plain", 2, init, 0.005, "dropout0.1")
        rows.append({**vars(run), "held_out": {}, "test": {}})
        extra = ["--seed", str(run.first_seed()), "--max-epoch", "2", "--best-checkpoint-metric", "nll_loss"]
        commands.append(codistill_command(toy_data, folder / "runs" / run.name / "0", 0, "", *extra))
    for result, row in zip(run_together(commands, 120), rows, strict=True):
        assert result.returncode == 0, result.output
        row["nll"] = min(float(line["valid_nll_loss"]) for line in json_logs(result.output, "valid"))
    diverged = dataclasses.replace(grid.run_of(rows[0]), seed=3)  # after a checkpoint
    (folder / "runs" / diverged.name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "runs" / diverged.name).symlink_to(folder / "runs" / grid.run_of(rows[0]).name)
    lines = [*rows, {**vars(diverged), "diverged": True}, {"cut": "off"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "runs/runs.jsonl").write_text(text[:-5])
    (folder / "data").mkdir()
    (folder / "data/multi30k_third").symlink_to(toy_data.parent, target_is_directory=True)
    return folder, rows


def test_of_text_the_best_checkpoints_are_asked_and_nll_is_in_bits(translations, monkeypatch):
    folder, rows = translations
    one_seed = dataclasses.replace(rescaled.SETTINGS["text_third"], seeds=(rows[0]["seed"],))
    monkeypatch.setitem(rescaled.SETTINGS, "text_third", one_seed)
    alone = []
    for row in rows:
        one = folder / "runs" / grid.run_of(row).name / "0"
        logits, targets = text.predictions(one, folder / "data/multi30k_third")["held_out"]
        alone.append((logits, targets))
        assert float(cross_entropy(logits, targets)) / math.log(2) == pytest.approx(row["nll"], abs=2e-3)
    found = rescaled.rows_of(folder / "runs", folder / "data")
    assert [(row["models"], row["init"]) for row in found] == [(1, 0), (1, 1), (2, 1)]
    pair = found[-1]
    together = torch.stack([logits.softmax(dim=1) for logits, _ in alone]).mean(dim=0).log()
    temperature = rescaled.fit_temperature(together, alone[0][1])
    assert pair["temperature"] == pytest.approx(temperature, rel=1e-3)
    expected = float(cross_entropy(together / temperature, alone[0][1])) / math.log(2)
    assert pair["held_out_nll_rescaled"] == pytest.approx(expected, rel=1e-4)
    assert "| NLL (bits) |" in rescaled.page(found)
    assert "nats" not in rescaled.page(found)
