"""The tables and figures of the paper's rows, from logs written here; and the small form of CIFAR-10."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes/tools"))
import paper_figure
import shrink_images

TOOLS = Path(paper_figure.__file__).parent


def write_run(
    folder, top1_by_model, *, mbit=0.0, world_size=1, parameters=1000, kind="resnet18", finished=True, **options
):
    """One seed: every model evaluated once, after 10 updates of which each sent ``mbit``."""
    for model, top1 in enumerate(top1_by_model):
        place = folder / str(model)
        place.mkdir(parents=True)
        name = kind if isinstance(kind, str) else kind[model]
        start = {"kind": "start", "update": 0, "parameters": parameters, "world_size": world_size, "classes": 10}
        train = {"kind": "train", "update": 10, "nll_loss": 2.0, "distance": 3.0, "codistill_mbit": mbit}
        valid = {"kind": "valid", "update": 10, "valid_top1": top1}
        records = [start | {"options": {"model": name} | options}, train, valid]
        (place / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if finished:
        (folder / "finished.txt").write_text("")


def run(tmp_path, *arguments):
    command = [sys.executable, str(TOOLS / "paper_figure.py"), "--out", str(tmp_path / "fig"), "--title", "T"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


def test_mean_and_standard_error_are_over_seeds_of_the_mean_over_models(tmp_path):
    write_run(tmp_path / "two/1", [50.0, 52.0], mbit=2.0)
    write_run(tmp_path / "two/2", [54.0, 56.0], mbit=2.0)
    arm = paper_figure.read_arm("2-way", tmp_path / "two")
    [(update, spread)] = arm.curve("valid")
    assert update == 10
    assert spread.mean == 53.0
    assert spread.error == pytest.approx(2.0)  # 51 and 55: standard deviation 2.83, over the root of 2
    assert arm.spread(paper_figure.megabits_per_update).mean == 2.0


def test_all_reduce_sends_twice_its_parameters_and_one_device_nothing(tmp_path):
    write_run(tmp_path / "many/1", [50.0], world_size=2)
    write_run(tmp_path / "one/1", [50.0])
    many, one = (paper_figure.read_arm(name, tmp_path / name) for name in ("many", "one"))
    assert many.spread(paper_figure.megabits_per_update).mean == pytest.approx(2 * 32 * 1000 / 1e6)
    assert one.spread(paper_figure.megabits_per_update).mean == 0


def test_what_stays_in_one_server_counts_for_one_model_alone_as_little_as_for_those_that_codistil(tmp_path):
    """Eight devices each; all_reduce has sixteen, in two servers."""
    write_run(tmp_path / "all/1", [50.0], world_size=16)
    write_run(tmp_path / "two/lr=0.1/1", [50.0, 52.0], mbit=2.0, world_size=8)
    write_run(tmp_path / "one/1", [50.0], world_size=8)
    arms = (
        "--arm",
        "all_reduce",
        tmp_path / "all",
        "--arm",
        "T = 1",
        tmp_path / "two/lr=0.1",
        "--arm",
        "one",
        tmp_path / "one",
    )
    ended = run(tmp_path, *map(str, arms), "--kind", "bits")
    assert ended.returncode == 0, ended.stderr
    records = {
        record["arm"]: record["Mbit an update"]["mean"] for record in json.loads((tmp_path / "fig.json").read_text())
    }
    assert records == {"all_reduce": pytest.approx(2 * 32 * 1000 / 1e6), "T = 1": 2.0, "one": 0.0}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"comm_hook": "fp16"}, 2 * 16 * 1000 / 1e6),
        # 4 of the 10 updates average all numbers, the other 6 those of one update in 2
        ({"comm_hook": "post_localsgd", "localsgd_period": 2, "hook_start": 4}, 2 * 32 * 1000 * (4 + 6 / 2) / 10 / 1e6),
    ],
)
def test_hooks_send_less_than_all_reduce(tmp_path, options, expected):
    write_run(tmp_path / "arm/1", [50.0], world_size=2, **options)
    assert paper_figure.read_arm("a", tmp_path / "arm").spread(paper_figure.megabits_per_update).mean == pytest.approx(
        expected
    )


def test_powersgd_sends_two_factors_of_every_matrix(tmp_path):
    hook = {"comm_hook": "powersgd", "powersgd_rank": 1, "hook_start": 0}
    write_run(tmp_path / "arm/1", [50.0], world_size=2, kind="wrn10_1", **hook)
    sent = paper_figure.read_arm("a", tmp_path / "arm").spread(paper_figure.megabits_per_update).mean
    # The last convolution has 64 x (64 x 3 x 3) numbers, its factors of rank 1 have 64 + 576; and so on for all.
    assert 2 * 32 * (64 + 576) / 1e6 < sent < 2 * 32 * 10_000 / 1e6


def test_a_seed_that_has_not_finished_is_left_out(tmp_path):
    write_run(tmp_path / "arm/1", [50.0])
    write_run(tmp_path / "arm/2", [10.0], finished=False)
    assert [r.name for r in paper_figure.read_arm("a", tmp_path / "arm").runs] == ["1"]


def test_an_arm_without_a_finished_seed_is_an_error_that_names_it(tmp_path):
    write_run(tmp_path / "arm/1", [10.0], finished=False)
    ended = run(tmp_path, "--arm", "a", str(tmp_path / "arm"))
    assert ended.returncode != 0
    assert "no seed that was trained to its end" in ended.stderr
    assert str(tmp_path / "arm") in ended.stderr


@pytest.mark.parametrize("kind", ["curves", "bits", "arms"])
def test_figure_table_and_json_are_written(tmp_path, kind):
    write_run(tmp_path / "all/1", [60.0], world_size=2)
    write_run(tmp_path / "two/1", [50.0, 52.0], mbit=0.032)
    arms = ("--arm", "all_reduce", str(tmp_path / "all"), "--arm", "2-way, T = 1", str(tmp_path / "two"))
    ended = run(tmp_path, *arms, "--kind", kind)
    assert ended.returncode == 0, ended.stderr
    assert "| 2-way, T = 1 | 1 | 51.00 | 2.000 | 3.0 | 0.0320 | 2.0 |" in (tmp_path / "fig.md").read_text()
    assert json.loads((tmp_path / "fig.json").read_text())[1]["times_fewer_bits"] == pytest.approx(2.0)
    assert (tmp_path / "fig.png").stat().st_size > 5000
    assert "<svg" in (tmp_path / "fig.svg").read_text()


def test_models_of_different_architecture_have_lines_of_their_own(tmp_path):
    write_run(tmp_path / "mixed/1", [50.0, 60.0], kind=["resnet18", "resnet50"])
    write_run(tmp_path / "mixed/2", [52.0, 60.0], kind=["resnet18", "resnet50"])
    arms = paper_figure.split_by_architecture(paper_figure.read_arm("mixed", tmp_path / "mixed"))
    assert [arm.label for arm in arms] == ["mixed: resnet18", "mixed: resnet50"]
    assert [arm.curve("valid")[0][1].mean for arm in arms] == [51.0, 60.0]


def test_bleu_is_in_the_table_once_every_model_has_one(tmp_path):
    write_run(tmp_path / "two/1", [50.0, 52.0])
    arm = paper_figure.read_arm("n = 2", tmp_path / "two")
    (tmp_path / "two/1/0/bleu_average.json").write_text('{"bleu": 30.0}')
    assert arm.bleu() is None
    (tmp_path / "two/1/1/bleu_average.json").write_text('{"bleu": 32.0}')
    assert arm.bleu().mean == 31.0


@pytest.mark.parametrize(("split", "force", "code"), [(52.0, "0", 0), (54.0, "0", 1), (54.0, "1", 0)])
def test_a_figure_ends_where_what_it_is_about_cannot_be_seen(tmp_path, split, force, code):
    write_run(tmp_path / "all/1", [56.0])
    write_run(tmp_path / "split/1", [split - 1, split + 1])
    command = [sys.executable, str(TOOLS / "lead.py"), "--points", "3", str(tmp_path / "all"), str(tmp_path / "split")]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "FORCE": force})
    assert ended.returncode == code, ended.stderr
    assert f"{56 - split:+.2f} points, 3 wanted" in ended.stdout


def shrink(monkeypatch, *arguments):
    """``shrink_images.py`` here: another process would take seconds to import torch."""
    monkeypatch.setattr(sys, "argv", ["shrink_images.py", *map(str, arguments)])
    shrink_images.main()


def write_images(folder, train=6, test=2):
    from PIL import Image

    for split, count in (("train", train), ("test", test)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(folder / split / name / f"{number}.png")


def test_images_of_somebody_else_are_never_removed_whatever_lies_beside_them(tmp_path, monkeypatch):
    write_images(tmp_path / "from")
    write_images(tmp_path / "theirs")
    (tmp_path / "theirs/settings.txt").write_text("of a camera")
    with pytest.raises(SystemExit, match="is not from here; give another folder"):
        shrink(monkeypatch, "--from", tmp_path / "from", "--out", tmp_path / "theirs", "--train-images", 6)
    assert len(list((tmp_path / "theirs").rglob("*.png"))) == 16


@pytest.mark.parametrize(("train", "held_out"), [(12, 2), (10, 4), (6, 1)])
def test_fewer_images_to_hold_out_than_asked_for_are_an_error_before_anything_is_removed(
    tmp_path, monkeypatch, train, held_out
):
    """Else the test images, the next that are there, would choose the settings."""
    write_images(tmp_path / "from")
    settings = ["--from", tmp_path / "from", "--out", tmp_path / "out"]
    shrink(monkeypatch, *settings, "--train-images", 4, "--held-out", 4)
    with pytest.raises(SystemExit, match=f"--held-out is {held_out}, but beside --train-images {train} there are"):
        shrink(monkeypatch, *settings, "--train-images", train, "--held-out", held_out)
    assert len(list((tmp_path / "out/val").rglob("*.png"))) == 4


def test_small_images_keep_the_share_of_every_class(tmp_path, monkeypatch):
    from PIL import Image

    for split, count in (("train", 6), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "from" / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(tmp_path / "from" / split / name / f"{number}.png")
    settings = ["--from", tmp_path / "from", "--train-images", 6]
    shrink(monkeypatch, *settings, "--out", tmp_path / "small")
    kept = {split: sorted((tmp_path / "small" / split).rglob("*.png")) for split in ("train", "test")}
    assert [sum(path.parent.name == name for path in kept["train"]) for name in ("0", "1")] == [3, 3]
    assert len(kept["test"]) == 4
    assert Image.open(kept["train"][0]).size == (16, 16)
    assert not (tmp_path / "small/val").exists()
    shrink(monkeypatch, *settings, "--held-out", 4, "--out", tmp_path / "parted")
    parted = {split: {path.name for path in (tmp_path / "parted" / split).rglob("*.png")} for split in ("train", "val")}
    assert parted["train"] == {path.name for path in kept["train"]}
    assert len(parted["val"]) == 4
    assert not parted["train"] & parted["val"]


def test_small_images_of_other_settings_are_made_anew_and_nothing_else_is_removed(tmp_path, monkeypatch):
    from PIL import Image

    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "from" / split / name).mkdir(parents=True)
            for number in range(6):
                Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(tmp_path / "from" / split / name / f"{number}.png")

    settings = ["--from", tmp_path / "from", "--train-images"]
    for train, held_out in ((4, 4), (8, 2)):
        shrink(monkeypatch, *settings, train, "--held-out", held_out, "--out", tmp_path / "small")
        found = {part: {path.name for path in (tmp_path / "small" / part).rglob("*.png")} for part in ("train", "val")}
        assert {part: len(names) for part, names in found.items()} == {"train": train, "val": held_out}
        assert not found["train"] & found["val"]
    with pytest.raises(SystemExit, match="give another folder"):  # where the images themselves are
        shrink(monkeypatch, *settings, 4, "--out", tmp_path / "from")
    assert len(list((tmp_path / "from").rglob("*.png"))) == 24


def test_bits_are_compared_with_all_reduce_of_models_of_the_same_size_only(tmp_path):
    write_run(tmp_path / "all/1", [50.0], world_size=2)
    write_run(tmp_path / "two/1", [50.0, 52.0], mbit=0.0064)
    write_run(tmp_path / "large/1", [50.0, 52.0], mbit=0.0064, parameters=9000)
    reference, *others = (paper_figure.read_arm(name, tmp_path / name) for name in ("all", "two", "large"))
    _, records = paper_figure.table([reference, *others], reference)
    assert [record["times_fewer_bits"] for record in records] == [1.0, pytest.approx(10.0), None]


def test_updates_that_a_model_did_not_make_stand_below_the_table(tmp_path):
    write_run(tmp_path / "two/1", [50.0, 52.0])
    with (tmp_path / "two/1/1/log.jsonl").open("a") as log:
        log.write(json.dumps({"kind": "skip", "update": 8, "skipped": 3}) + "\n")
    said = "codistillation: the other models are ahead; skipped 3 updates' worth of batches, from update 5 to 8"
    (tmp_path / "two/1/1/train.log").write_text(f"2026-11-30 03:00:00,000 | WARNING | vision.engine | {said}\n")
    markdown, _ = paper_figure.table([paper_figure.read_arm("2-way", tmp_path / "two")], None)
    assert markdown.endswith("\n\n2-way: models that were behind skipped 3 updates.\n")
