"""Owns what the test of the claim runs, and in which order: settings, arms, the grid, the choice from it.

Pure functions from finished rows to the next run: a campaign that was killed goes on where it stopped, and nothing is
chosen by hand in between. ``results/claim/PLAN.md`` is this file in words; change both or neither.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]

RATES = (0.1, 0.2, 0.4)
RATE_LIMITS = (0.025, 1.6)  # how far an arm goes on by factors of 2 whose best rate is at the edge
WEIGHT_DECAYS = {  # at the start, from the first drop of the learning rate on, from the second on
    "1e-4": (1e-4, 1e-4, 1e-4),
    "5e-4": (5e-4, 5e-4, 5e-4),
    "1e-4-falling": (1e-4, 1e-5, 0.0),
    "5e-4-falling": (5e-4, 1e-5, 0.0),
}
ALPHAS = (0.3, 1.0, 3.0)
BASELINES = ("plain", "all_reduce")
CODISTILLED = ("mse", "kl")
TUNING_SEED = 1
SEEDS = (2, 3, 4)
METRICS = ("top1", "nll")
# The tuned drops (18, 38, 44 of 45 epochs) and Goyal's warm-up (5 of 90), as shares of the training.
DROPS = (18 / 45, 38 / 45, 44 / 45)
WARM_UP = 5 / 90
# A gap counts from here on: in points and nats (0.05 bits), and in standard errors.
LEAST_GAP = {"top1": 2.0, "nll": 0.05 * math.log(2)}
LEAST_ERRORS = 4.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model and a length of training.

    Attributes:
        name: of the rows.
        train_images: also the name of the folder of images.
        model: that is trained.
        epochs: E/2, the runs through the data of a codistilled model; all_reduce has E.
        always: codistil even where there is no gap to close.
        like: take weight decays and alphas from what was chosen in that setting.
        decays: of the weights, that are tried.
        batch_size: of one model.
    """

    name: str
    train_images: int
    model: str
    epochs: int
    always: bool = False
    like: str = ""
    decays: tuple[str, ...] = tuple(WEIGHT_DECAYS)
    batch_size: int = 64

    @property
    def updates_per_epoch(self) -> int:
        """Of a codistilled model."""
        return self.train_images // self.batch_size


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("a", 10_000, "wrn16_1", 45, always=True, decays=("1e-4", "5e-4-falling")),
        Setting("a_short", 10_000, "wrn16_1", 9),
        Setting("a_short_wide", 10_000, "wrn16_2", 9),
        Setting("b_short", 40_000, "wrn16_1", 9),
        Setting("b", 40_000, "wrn16_1", 45, always=True, like="b_short"),
    )
}
# A gap is likeliest where training is short, and it is cheapest there; then the paper's geometry, then more data.
ORDER = (
    ("a_short", "baselines"), ("a_short", "codistilled"), ("a", "baselines"), ("a", "codistilled"),
    ("a", "plain_2k"), ("b_short", "baselines"), ("b_short", "codistilled"),
    ("a_short_wide", "baselines"), ("a_short_wide", "codistilled"), ("b", "baselines"), ("b", "codistilled"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: one process, or two that teach each other."""

    setting: str
    stage: str  # "tune" or "final"
    arm: str
    seed: int
    init: int  # 0, or 1 for one model that begins where the second of a pair does
    lr: float
    weight_decay: str
    alpha: float = 0.0

    @property
    def name(self) -> str:
        """The folder of the run."""
        alpha = f"_alpha{self.alpha:g}" if self.alpha else ""
        return (
            f"{self.setting}/{self.stage}/{self.arm}/lr{self.lr:g}_wd{self.weight_decay}{alpha}/{self.seed}_{self.init}"
        )

    @property
    def num_models(self) -> int:
        """Processes."""
        return 2 if self.arm in CODISTILLED else 1

    def first_seed(self) -> int:
        """Seed of the first model's initialisation, as in ``recipes/common.sh``."""
        return 100 * (self.seed - 1) + 1 + self.init

    def options(self, data: str) -> list[str]:
        """Options of ``codistill-vision`` for every model of the run; seed, folder and peers apart.

        Args:
            data: folder that holds ``<train_images>/train``, ``val`` and ``test``.
        """
        setting = SETTINGS[self.setting]
        epochs, batch, stretch = setting.epochs, setting.batch_size, 1.0
        if self.arm == "plain_2k":
            epochs *= 2
        elif self.arm == "all_reduce":  # one process with the batch of two, through the data twice as often
            batch *= 2
            stretch = setting.updates_per_epoch / (setting.train_images // batch)
        drops = [f"{share * epochs:.6g}" for share in DROPS]
        decays = [f"{value:g}" for value in WEIGHT_DECAYS[self.weight_decay]]
        options = {
            "--dataset": [f"cifar10:{data}/{setting.train_images}"], "--model": [setting.model],
            "--augmentation": ["cifar"], "--image-size": ["16"], "--batch-size": [str(batch)],
            "--epochs": [str(epochs)], "--stretch": [f"{stretch:.6g}"], "--optimizer": ["sgd"], "--momentum": ["0.9"],
            "--lr": [f"{self.lr:g}"], "--lr-batch-size": ["0"], "--warmup-epochs": [f"{WARM_UP * epochs:.6g}"],
            "--warmup-lr": [f"{min(self.lr, 0.1):g}"], "--lr-schedule": ["step"], "--lr-milestones": drops,
            "--lr-decay": ["0.1"], "--weight-decay": decays, "--weight-decay-milestones": drops[:2],
            "--amp": ["bf16"], "--eval-epochs": [f"{epochs / 3:.6g}"], "--save-updates": ["60"],
            "--log-updates": ["117"], "--num-workers": ["0"], "--codistill-data-seed": [str(self.seed)],
        }  # fmt: skip
        if self.num_models > 1:
            options |= {
                "--codistill-num-models": ["2"], "--codistill-divergence": [self.arm], "--codistill-codec": ["fp32"],
                "--codistill-weight": [f"{self.alpha:g}"], "--codistill-timeout": ["3600"],
                "--codistill-start-timeout": ["3600"],
            }  # fmt: skip
        flat = [word for flag, values in options.items() for word in (flag, *values)]
        return [*flat, "--channels-last", "--cpu", "--no-progress-bar"]


def run_of(row: Row) -> Run:
    """The run that a row is of."""
    return Run(**{field.name: row[field.name] for field in dataclasses.fields(Run)})


def goodness(row: Row, metric: str, part: str) -> float:
    """Larger is better; training that diverged is worst.

    Args:
        row: of a finished run.
        metric: ``top1`` (percent) or ``nll`` (nats).
        part: ``held_out`` or ``test``.
    """
    value = row[part][metric]
    if value is None or not math.isfinite(value):
        return -math.inf
    return value if metric == "top1" else -value


def choice(rows: list[Row], setting: str, arm: str, metric: str) -> Run | None:
    """The best run of an arm on the held-out images; None where nothing was tuned."""
    tuned = [row for row in rows if (row["setting"], row["stage"], row["arm"]) == (setting, "tune", arm)]
    return run_of(max(tuned, key=lambda row: goodness(row, metric, "held_out"))) if tuned else None


def gap(rows: list[Row], setting: str, metric: str) -> tuple[float, float]:
    """How far one model alone is behind all_reduce on the test images, and the standard error of that."""
    spreads = []
    for arm in ("all_reduce", "plain"):
        values = final_values(rows, setting, arm, metric)
        spreads.append((statistics.fmean(values), statistics.variance(values) / len(values)))
    (large, large_error), (alone, alone_error) = spreads
    return large - alone, math.sqrt(large_error + alone_error)


def final_values(rows: list[Row], setting: str, arm: str, metric: str) -> list[float]:
    """:func:`goodness` on the test images of every final run of an arm, with the settings chosen for this metric."""
    best = choice(rows, setting, arm, metric)
    assert best is not None
    return [
        goodness(row, metric, "test")
        for row in rows
        if (row["setting"], row["stage"], row["arm"]) == (setting, "final", arm) and _same_point(run_of(row), best)
    ]


def counts(rows: list[Row], setting: str, metric: str) -> bool:
    """Whether there is a gap to close: large enough, and larger than its error."""
    size, error = gap(rows, setting, metric)
    return size >= LEAST_GAP[metric] and size >= LEAST_ERRORS * error


def pending(rows: list[Row]) -> Iterator[Run]:
    """The runs that are missing, in order, as far as the rows decide them. Take the first, run it, and ask again."""
    done = {run_of(row) for row in rows}
    for name, part in ORDER:
        setting = SETTINGS[name]
        if part == "codistilled":
            arms: tuple[str, ...] = CODISTILLED
            if not setting.always and not any(counts(rows, name, metric) for metric in METRICS):
                continue
        else:
            arms = BASELINES if part == "baselines" else (part,)
        missing = [run for arm in arms for run in tuning(rows, setting, arm) if run not in done]
        if not missing:
            missing = [run for arm in arms for run in final(rows, setting, arm) if run not in done]
        yield from missing
        if missing:
            return  # what comes next may depend on them


def tuning(rows: list[Row], setting: Setting, arm: str) -> list[Run]:
    """The grid of one arm, on one seed: rates x weight decays, then for the best of each metric other alphas, and
    further rates where the best one is at the edge."""
    alphas = (1.0,) if arm in CODISTILLED else (0.0,)
    decays = setting.decays
    if setting.like:
        chosen = [best for metric in METRICS if (best := choice(rows, setting.like, arm, metric))]
        decays = tuple(sorted({run.weight_decay for run in chosen})) or decays
        alphas = tuple(sorted({run.alpha for run in chosen})) or alphas
    runs = [
        Run(setting.name, "tune", arm, TUNING_SEED, 0, rate, decay, alpha)
        for decay in decays
        for rate in RATES
        for alpha in alphas
    ]
    done = {run_of(row) for row in rows}
    if not done.issuperset(runs):
        return runs
    for metric in METRICS:
        best = choice(rows, setting.name, arm, metric)
        assert best is not None
        if arm in CODISTILLED and not setting.like:
            runs += [dataclasses.replace(best, alpha=alpha) for alpha in ALPHAS]
        tried = [run.lr for run in done if dataclasses.replace(run, lr=best.lr) == best]
        if best.lr == max(tried) and 2 * best.lr <= RATE_LIMITS[1]:
            runs.append(dataclasses.replace(best, lr=2 * best.lr))
        if best.lr == min(tried) and best.lr / 2 >= RATE_LIMITS[0]:
            runs.append(dataclasses.replace(best, lr=best.lr / 2))
    return list(dict.fromkeys(runs))


def final(rows: list[Row], setting: Setting, arm: str) -> list[Run]:
    """The chosen settings with the other seeds. One model alone begins once where each model of a pair does."""
    runs = []
    for metric in METRICS:
        best = choice(rows, setting.name, arm, metric)
        if best is not None:
            inits = (0, 1) if arm == "plain" else (0,)
            runs += [dataclasses.replace(best, stage="final", seed=seed, init=init) for seed in SEEDS for init in inits]
    return list(dict.fromkeys(runs))


def _same_point(run: Run, other: Run) -> bool:
    return (run.lr, run.weight_decay, run.alpha) == (other.lr, other.weight_decay, other.alpha)
