"""The test of the claim: what it runs next, when a gap counts, and what its tables say."""

import copy
import dataclasses
import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_codistill.advice import check_timeout
from fairseq_codistill.config import CodistillationConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes/claim"))
import grid
import images
import settings
import summary


def row(run, top1, nll):
    figures = {"top1": top1, "nll": nll, "nll_bits": nll / math.log(2), "ece": 5.0}
    parts = {"held_out": figures, "test": figures}
    return {**vars(run), **parts}


@functools.cache
def campaign(score):
    """All rows of a campaign whose runs come out as ``score(run)``: (top-1, NLL)."""
    rows = []
    while runs := list(grid.pending(rows)):
        rows += [row(run, *score(run)) for run in runs]
        assert len(rows) < 2000
    return rows


def score(run):
    best_rate = {"all_reduce": 0.4}.get(run.arm, 0.2)
    base = {"plain": 60.0, "plain_2k": 63.0, "all_reduce": 63.0}.get(run.arm, 62.0)
    top1 = base - abs(math.log2(run.lr / best_rate)) - 0.1 * (run.regularisation != "wd1e-4") + 0.01 * run.seed
    return top1, 2 - top1 / 100


def options(run):
    """The options of a run, by flag."""
    found = {}
    for word in images.options(run, Path("DATA")):
        if word.startswith("--"):
            values = found.setdefault(word, [])
        else:
            values.append(word)
    return found


@pytest.mark.parametrize("setting", [name for name, one in settings.SETTINGS.items() if one.kind == "images"])
def test_every_arm_makes_the_updates_of_the_setting(setting):
    made = {}
    for arm in ("plain", "all_reduce", "mse", "plain_2k", *settings.FOUR):
        flags = options(grid.Run(setting, "tune", arm, 1, 0, 0.1, "wd1e-4", 1.0))
        batch, stretch = int(flags["--batch-size"][0]), float(flags["--stretch"][0])
        updates_per_epoch = round(
            settings.SETTINGS[setting].train_images // (batch * settings.ARMS[arm].devices) * stretch
        )
        made[arm] = updates_per_epoch * float(flags["--epochs"][0])
    made["plain_2k"] /= 2
    assert set(made.values()) == {made["plain"]}
    if setting == "a":
        assert made["plain"] == 7020


def test_no_arm_waits_longer_for_a_peer_than_its_own_ranks_for_each_other():
    for arm, made in settings.ARMS.items():
        flags = options(grid.Run("smoke", "tune", arm, 1, 0, 0.1, "wd5e-4", 1.0))
        if made.models > 1:
            config = CodistillationConfig(codistill_timeout=float(flags["--codistill-timeout"][0]))
            check_timeout(config, None if made.devices == 1 else 600.0)


def test_all_reduce_sees_the_data_twice_as_often_as_a_codistilled_model():
    flags = {
        arm: options(grid.Run("a", "tune", arm, 1, 0, 0.1, "wd5e-4-falling", 1.0)) for arm in ("mse", "all_reduce")
    }
    assert [flags[arm]["--batch-size"] for arm in ("mse", "all_reduce")] == [["64"], ["128"]]
    assert [float(flags[arm]["--stretch"][0]) for arm in ("mse", "all_reduce")] == [1, 2]
    for arm in flags:
        assert flags[arm]["--lr-milestones"] == ["18", "38", "44"]
        assert flags[arm]["--weight-decay"] == ["0.0005", "1e-05", "0"]
        assert flags[arm]["--weight-decay-milestones"] == ["18", "38"]


def test_every_arm_is_tuned_on_the_same_grid_and_the_edge_is_followed():
    rows = campaign(score)
    runs = [grid.run_of(r) for r in rows if r["stage"] == "tune" and r["setting"] == "a_short"]
    tuned = {arm: {run for run in runs if run.arm == arm} for arm in ("plain", "all_reduce", "mse", "kl")}
    points = {arm: {(run.lr, run.regularisation) for run in runs if run.alpha in (0, 1)} for arm, runs in tuned.items()}
    assert points["plain"] == points["mse"] == points["kl"]
    assert points["all_reduce"] - points["plain"] == {(0.8, "wd1e-4")}
    assert {run.alpha for run in tuned["kl"]} == {0.3, 1.0, 3.0}
    assert all(run.seed == settings.TUNING_SEED for runs in tuned.values() for run in runs)


@pytest.mark.parametrize("better", ["wd5e-4-falling", "wd5e-4"])
@pytest.mark.parametrize("arm", ["plain", "all_reduce", "mse"])
def test_a_later_weight_decay_is_tried_in_every_arm_at_its_best_point_and_chosen_where_it_is_better(arm, better):
    rows = []
    while missing := [
        run for run in grid.tuning(rows, settings.SETTINGS["a"], arm) if run not in map(grid.run_of, rows)
    ]:
        top1, nll = score(missing[0])
        rows.append(row(missing[0], top1 + (missing[0].regularisation == better), nll))
    best_rate = 0.4 if arm == "all_reduce" else 0.2
    tried = {(run.lr, run.regularisation) for run in map(grid.run_of, rows)}
    assert {(best_rate, "wd5e-4"), (best_rate, "wd5e-4-falling")} <= tried
    assert grid.choice(rows, "a", arm, "top1").regularisation == better


@pytest.mark.parametrize(
    ("better", "tried"),
    [("0", {"0", "0.1", "0.2"}), ("0.1", {"0", "0.1", "0.2"}), ("0.2", {"0", "0.1", "0.2", "0.3"})],
)
def test_more_dropout_is_tried_where_the_largest_is_the_best(better, tried):
    rows = []
    while missing := [
        run for run in grid.tuning(rows, settings.SETTINGS["text_third"], "plain") if run not in map(grid.run_of, rows)
    ]:
        best = missing[0].regularisation == f"dropout{better}"
        rows.append(row(missing[0], 0.0, 3.5 if best else 3.6))
        rows[-1]["held_out"] = {"nll_bits": 3.5 if best else 3.6}
    assert {run.regularisation for run in map(grid.run_of, rows)} == {f"dropout{value}" for value in tried}


def test_plain_runs_begin_where_both_models_of_a_pair_do():
    rows = campaign(score)
    finals = [grid.run_of(r) for r in rows if r["stage"] == "final" and r["setting"] == "a"]
    seeds = {arm: sorted(run.first_seed() for run in finals if run.arm == arm) for arm in ("plain", "mse")}
    assert seeds == {"plain": [101, 102, 201, 202, 301, 302], "mse": [101, 201, 301]}


def test_only_settings_with_a_gap_are_codistilled_and_a_campaign_ends():
    rows = campaign(score)
    assert {r["setting"] for r in rows if r["arm"] == "mse"} == set(settings.SETTINGS) - {"gpu", "smoke"}

    def without_gap(run):
        top1, _ = score(run)
        return (62.0 if run.arm == "all_reduce" else top1), 1.5

    rows = campaign(without_gap)
    always = {name for name, setting in settings.SETTINGS.items() if setting.always} - {"gpu", "smoke"}
    assert {r["setting"] for r in rows if r["arm"] == "mse"} == always
    # Without what is to be taken over from the short training: the decays of its baselines, and a choice of alpha.
    ours = [r for r in rows if (r["setting"], r["arm"], r["stage"]) == ("b", "mse", "tune")]
    assert {r["alpha"] for r in ours} == set(settings.ALPHAS)
    assert {r["regularisation"] for r in ours} == {
        grid.choice(rows, "b_short", "plain", metric).regularisation for metric in ("top1", "nll")
    }


def test_an_arm_that_is_tuned_goes_on_beside_one_that_is_not_and_what_comes_next_waits_for_both():
    rows = campaign(score)
    first = next(n for n, r in enumerate(rows) if r["setting"] == "a")
    tuned = [r for r in rows if (r["setting"], r["arm"], r["stage"]) == ("a", "plain", "tune")]
    missing = list(grid.pending(rows[:first] + tuned))
    stages = [run.stage for run in missing]
    assert {(run.setting, run.arm, run.stage) for run in missing} == {
        ("a", "all_reduce", "tune"),
        ("a", "plain", "final"),
    }
    assert stages == sorted(stages, reverse=True)  # the tuning first: more depends on it


def test_a_part_of_tuning_alone_waits_for_what_it_starts_from_and_leaves_the_final_runs_to_a_later_one():
    kinds = [(r["arm"], r["stage"]) for r in campaign(score) if r["setting"] == "text_third"]
    in_order = list(dict.fromkeys(kinds))
    assert in_order[:2] == [("plain", "tune"), ("kl", "tune")]
    assert in_order.index(("kl", "final")) > in_order.index(("all_reduce", "final"))
    started = [r for r in campaign(score) if (r["setting"], r["arm"], r["stage"]) == ("text_third", "kl", "tune")]
    best = grid.choice(campaign(score), "text_third", "plain", "nll_bits")
    assert {(r["lr"], r["regularisation"]) for r in started} == {(best.lr, best.regularisation)}
    last_tuned = max(n for n, kind in enumerate(kinds) if kind == ("plain", "tune"))
    assert last_tuned < kinds.index(("kl", "tune"))


def test_an_arm_is_judged_by_a_metric_once_all_runs_that_were_chosen_for_it_are_there():
    def of_two_minds(run):
        top1, nll = score(run)
        alpha = (run.arm == "kl") * run.alpha  # 0.3 is the best in top-1, 1 in NLL
        return top1 - 0.001 * alpha, nll - 0.01 * alpha

    rows = campaign(of_two_minds)
    finals = [r for r in rows if (r["setting"], r["stage"], r["arm"]) == ("a", "final", "kl")]
    assert {r["alpha"] for r in finals} == {0.3, 1.0}
    assert finals[-1]["alpha"] == 1.0
    rows = [r for r in rows if r is not finals[-1]]
    lines = {metric: summary.conclusions(rows, "a", metric) for metric in ("top1", "nll")}
    assert "- kl: not run." in lines["nll"]
    assert any(line.startswith("- kl − all_reduce") for line in lines["top1"])


def test_of_two_settings_every_arm_is_shown_where_held_out_data_prefer_it():
    def run_rows(name, arm, held_out, test):
        setting = settings.SETTINGS[name]
        alpha = 0.3 if settings.ARMS[arm].models > 1 else 0.0
        tune = grid.Run(name, "tune", arm, 1, 0, 0.2, setting.regularisations[0], alpha)
        found = [row(tune, held_out, 1.0)]
        for run in grid.final(found, setting, arm):
            found.append(row(run, test + run.seed / 10, 1.0))
        return found

    rows = run_rows("a", "all_reduce", 60.0, 70.0) + run_rows("a_heavy", "all_reduce", 61.0, 50.0)
    rows += run_rows("a", "mse", 60.0, 55.0) + run_rows("a_heavy", "mse", 59.0, 80.0)
    _, all_reduce, mse = summary.at_the_better(rows, ("a", "a_heavy"), "top1")
    assert all_reduce.startswith("- all_reduce (learning rate 0.2, wd1e-3): 50.30 ± 0.06.")
    assert mse.startswith("- mse (learning rate 0.2, wd5e-4-falling): 55.30 ± 0.06. mse − all_reduce: +5.00 ")
    rows.remove(
        rows[-5]
    )  # a final run of mse in `a`, where it was better: nothing is said of an arm that is not finished
    assert len(summary.at_the_better(rows, ("a", "a_heavy"), "top1")) == 2


def test_a_gap_counts_by_size_and_by_its_error():
    def rows(noise, distance):
        found = []
        for arm, top1 in (("plain", 60.0), ("all_reduce", 60.0 + distance)):
            tune = grid.Run("a", "tune", arm, 1, 0, 0.2, "wd5e-4")
            found.append(row(tune, top1, 1.0))
            for seed in settings.SETTINGS["a"].seeds:
                found.append(row(grid.Run("a", "final", arm, seed, 0, 0.2, "wd5e-4"), top1 + noise * (seed - 3), 1.0))
        return found

    assert grid.counts(rows(0.1, 3.0), "a", "top1")
    assert not grid.counts(rows(0.1, 1.5), "a", "top1")
    assert not grid.counts(rows(2.0, 3.0), "a", "top1")
    assert not grid.counts(rows(0.1, 3.0), "a", "nll")


def test_of_one_run_no_gap_counts_and_nothing_ends():
    rows = [
        row(grid.Run("a_short", stage, arm, 1, 0, 0.2, "wd5e-4"), top1, 1.0)
        for arm, top1 in (("plain", 50.0), ("all_reduce", 60.0))
        for stage in ("tune", "final")
    ]
    assert grid.gap(rows, "a_short", "top1")[0] == 10.0
    assert not grid.counts(rows, "a_short", "top1")


def test_a_run_that_diverged_is_never_chosen():
    runs = [grid.Run("a", "tune", "plain", 1, 0, rate, "wd1e-4") for rate in (0.1, 0.2)]
    rows = [row(runs[0], 50.0, 1.2), row(runs[1], 10.0, math.nan)]
    assert grid.choice(rows, "a", "plain", "nll") == runs[0]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_points_that_are_equally_good_the_other_metric_decides_and_not_their_order(order):
    runs = [grid.Run("a", "tune", "plain", 1, 0, rate, "wd1e-4") for rate in (0.1, 0.2)]
    rows = [row(runs[0], 73.11000000000001, 1.2), row(runs[1], 73.11, 1.1)]
    assert grid.choice([rows[number] for number in order], "a", "plain", "top1") == runs[1]


def test_a_final_run_that_diverged_decides_nothing_and_is_named(tmp_path):
    rows = copy.deepcopy(campaign(score))
    lost = next(r for r in rows if (r["setting"], r["stage"], r["arm"]) == ("a", "final", "all_reduce"))
    lost["test"] = dict.fromkeys(lost["test"])
    assert not grid.counts(rows, "a", "top1")
    (line,) = (line for line in summary.table(rows, "a", "nll") if line.startswith("| all_reduce |"))
    assert line.count("diverged") == 3
    (line,) = (line for line in summary.conclusions(rows, "a", "nll") if line.startswith("- mse − all_reduce"))
    assert line.partition(". ")[0].endswith("not decided")


def log_of_training(folder, reason):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text(json.dumps({"kind": "end", "reason": reason}) + "\n")


@pytest.mark.parametrize(
    ("reasons", "exit_code", "expected"),
    [
        (["finished", "finished"], 0, "complete"),
        (["finished", "finished"], 1, "failed"),
        (["finished", "peer failed"], 0, "failed"),
        (["SIGTERM", "failed: the loss was not finite in 10 updates in a row"], 1, "diverged"),
        (["failed: parameters are not finite at the end of training", "finished"], 1, "diverged"),
        (["failed: no space left"], 1, "failed"),
    ],
)
def test_how_a_training_ended_is_read_from_every_model(tmp_path, reasons, exit_code, expected):
    for model, reason in enumerate(reasons):
        log_of_training(tmp_path / str(model), reason)
    assert images.state(grid.Run("a", "tune", "mse", 1, 0, 0.1, "wd5e-4", 1.0), tmp_path, exit_code) == expected


def test_of_one_model_alone_a_seed_has_one_value_whatever_its_initialisations():
    rows = []
    for seed, values in ((2, (60.0, 61.0)), (3, (64.0, 65.0)), (4, (62.0, 63.0))):
        rows += [row(grid.Run("a", "final", "plain", seed, i, 0.2, "wd5e-4"), v, 1.0) for i, v in enumerate(values)]
    rows.append(row(grid.Run("a", "tune", "plain", 1, 0, 0.2, "wd5e-4"), 60.0, 1.0))
    assert grid.final_values(rows[::-1], "a", "plain", "top1") == [60.5, 64.5, 62.5]
    (line,) = summary.table(rows, "a", "top1")[2:]
    assert "| 6 | 62.50 ± 1.15 |" in line  # standard error of 60.5, 64.5, 62.5, not of six values


def test_of_two_settings_in_which_an_arm_is_equally_good_the_other_metric_decides():
    rows = [
        row(grid.Run(name, "tune", "plain", 1, 0, 0.2, "wd"), top1, nll)
        for name, top1, nll in (("a", 73.11000000000001, 1.2), ("a_heavy", 73.11, 1.1))
    ]
    assert summary.better_setting(rows, ("a", "a_heavy"), "plain", "top1") == "a_heavy"
    assert summary.better_setting(rows[::-1], ("a", "a_heavy"), "plain", "top1") == "a_heavy"


def test_a_campaign_that_has_just_begun_is_summed_up(tmp_path):
    rows = copy.deepcopy(campaign(score))
    for row in rows:
        for part in ("held_out", "test"):
            row[part] = {**row[part], **dict.fromkeys(settings.FIGURES, 1.0)}
    for count in (1, 60, len(rows)):
        (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
        command = [sys.executable, summary.__file__, "--runs", str(tmp_path), "--out", str(tmp_path / "out")]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
    assert "gap closed" in (tmp_path / "out/summary.md").read_text()


def test_a_remedy_starts_from_what_was_chosen_for_kl():
    tuned = [(0.2, 0.3, 60.0), (0.4, 0.3, 62.0), (0.4, 1.0, 61.0)]
    rows = [
        dataclasses.asdict(grid.Run("a_short", "tune", "kl", 1, 0, lr, "wd5e-4", alpha))
        | {"held_out": {"top1": top1, "nll": top1 / 100}}
        for lr, alpha, top1 in tuned
    ]
    runs = grid.tuning(rows, settings.SETTINGS["a_short"], "kl_late")
    # the best by top-1, then by NLL
    assert [(run.lr, run.alpha) for run in runs] == [(0.4, 0.3), (0.4, 1.0), (0.2, 0.3), (0.2, 1.0)]
    assert options(runs[0])["--codistill-burn-in"] == ["702"]  # half of 9 x 156
    assert options(grid.tuning(rows, settings.SETTINGS["a_short"], "kl_soft")[0])["--codistill-temperature"] == ["2"]


def test_in_text_what_codistils_has_the_point_of_one_model_alone_and_only_alpha_is_tuned():
    setting = settings.SETTINGS["text"]
    rows = [row(run, *score(run)) for run in grid.tuning([], setting, "plain")]
    best = grid.choice(rows, "text", "plain", "nll_bits")
    for arm in setting.codistilled:
        runs = grid.tuning(rows, setting, arm)
        assert [run.alpha for run in runs] == [0.1, 0.3, 1.0]
        assert {(run.arm, run.lr, run.regularisation) for run in runs} == {(arm, best.lr, best.regularisation)}
    assert len(grid.tuning([], setting, "all_reduce")) == len(rows) == 3


def test_kl_has_the_point_of_mse_in_the_long_training_and_alphas_of_its_own():
    rows = [r for r in campaign(score) if r["setting"] == "a" and r["arm"] == "mse"]
    runs = grid.tuning(rows, settings.SETTINGS["a"], "kl")
    best = {(b.lr, b.regularisation) for metric in ("top1", "nll") if (b := grid.choice(rows, "a", "mse", metric))}
    assert {(run.lr, run.regularisation) for run in runs} == best
    assert {run.alpha for run in runs} == {0.3, 1.0}
    assert {run.arm for run in runs} == {"kl"}


def test_where_alpha_1_is_not_tried_the_first_trials_have_what_is():
    first = grid.tuning([], settings.SETTINGS["a_heavy"], "mse")
    assert {(run.alpha, run.regularisation) for run in first} == {(0.3, "wd1e-3")}
    assert {run.alpha for run in grid.tuning([], settings.SETTINGS["a"], "mse")} == {1.0}
