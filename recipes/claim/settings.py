"""Owns what the test of the claim compares: metrics and margins, arms, settings, and the order in which they come.

``results/claim/PLAN.md`` is this file in words; change both or neither. Which run comes next says ``grid.py``, how
an arm is trained by ``images.py`` and ``text.py``.
"""

import dataclasses
import math
from typing import Any

ALPHAS = (0.3, 1.0, 3.0)
BASELINES = ("plain", "all_reduce")
TUNING_SEED = 1
LEAST_ERRORS = 4.0  # standard errors that a gap must have, to count
# How far an arm goes on, by factors of 2 beyond the ends of the grid, where its best learning rate is at the edge.
BEYOND = 4


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure by which settings are chosen and arms compared.

    Attributes:
        label: with its unit.
        digits: that are shown.
        sign: 1 where larger is better, -1 where smaller.
        least_gap: between one model alone and all_reduce, from which on there is something to close.
        margin: within which codistillation and all_reduce are the same.
    """

    label: str
    digits: int
    sign: int
    least_gap: float
    margin: float


METRICS = {
    "top1": Metric("top-1 (%)", 2, 1, 2.0, 0.5),
    "nll": Metric("NLL (nats)", 4, -1, 0.05 * math.log(2), 0.02),
    "nll_bits": Metric("NLL (bits)", 4, -1, 0.05, 0.02),
}
# Shown beside, never decided by: label and digits.
FIGURES = {"ece": ("ECE (%)", 2), "bleu": ("BLEU", 2), "chrf": ("chrF", 2), "epochs": ("epochs", 1)}


@dataclasses.dataclass(frozen=True)
class Arm:
    """How one arm differs from one model alone on one device.

    Attributes:
        models: that teach each other.
        devices: ranks of one model; each has the batch of the setting.
        batch: of a process, in batches of the setting: all_reduce is one process with the batch of all its devices.
        updates: in those of one model alone.
        rate: factor of the grid's learning rates.
        divergence: between the models.
        codec: of their predictions.
        burn_in: share of the training after which the models begin to teach each other.
        temperature: that divides the logits of both sides (the divergence is times its square).
        alphas: of a remedy, in place of those of the setting.
    """

    models: int = 1
    devices: int = 1
    batch: int = 1
    updates: int = 1
    rate: int = 1
    divergence: str = ""
    codec: str = "fp32"
    burn_in: float = 0.0
    temperature: float = 1.0
    alphas: tuple[float, ...] = ()


ARMS = {
    "plain": Arm(),
    "plain_2k": Arm(updates=2),
    "all_reduce": Arm(batch=2),
    "mse": Arm(models=2, divergence="mse"),
    "kl": Arm(models=2, divergence="kl"),
    "tokens": Arm(models=2, divergence="kl", codec="tokens:16"),
    # Four devices: with one model, with two of two devices each, with four.
    "all_reduce_4": Arm(batch=4, rate=2),
    "kl_x2": Arm(models=2, devices=2, rate=2, divergence="kl"),
    "kl_4": Arm(models=4, divergence="kl"),
    # What might help where kl does not close the gap: a weaker term, a late start, soft targets, the other directions.
    "kl_weak": Arm(models=2, divergence="kl", alphas=(0.03, 0.1)),
    "kl_late": Arm(models=2, divergence="kl", burn_in=0.5, alphas=(0.3, 1.0)),
    "kl_soft": Arm(models=2, divergence="kl", temperature=2.0, alphas=(0.1, 0.3)),
    "js": Arm(models=2, divergence="js", alphas=(0.3, 1.0)),
    "reverse_kl": Arm(models=2, divergence="reverse_kl", alphas=(0.1, 0.3)),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model, its data and a length of training.

    Attributes:
        name: of the rows.
        kind: ``images`` or ``text``.
        data: name of the folder of the data.
        model: that is trained.
        epochs: runs through the data of one model alone and of one of two; text: at most, it ends when validation does
            not improve.
        regularisations: that are tried: weight decay of images, dropout of text.
        later: regularisations that are tried at the best point of those.
        next_to: another regularisation, by the one beside which it is tried where that is the best.
        rates: learning rates that are tried.
        alphas: of the distillation term; the first trials have 1 where it is among them.
        codistilled: arms.
        metrics: by which settings are chosen, an arm once by each.
        shown: further figures of the rows.
        always: codistil even where there is no gap to close.
        start: arm whose chosen learning rate and regularisation the other codistilled arms have, in place of a grid of
            their own; only alpha is tried.
        like: take regularisations and alphas from what was chosen in that setting.
        beside: setting that differs in the regularisations that are tried alone: the tables have each arm at the better
            of both as well.
        seeds: of the final runs.
        edges: go on where the best learning rate is at the edge.
        train_images: of the folder (images).
        image_size: pixels (images).
        batch_size: of one device (images).
    """

    name: str
    kind: str
    data: str
    model: str
    epochs: int
    regularisations: tuple[str, ...]
    later: tuple[str, ...] = ()
    next_to: dict[str, str] = dataclasses.field(default_factory=dict)
    rates: tuple[float, ...] = (0.1, 0.2, 0.4)
    alphas: tuple[float, ...] = ALPHAS
    codistilled: tuple[str, ...] = ("mse", "kl")
    metrics: tuple[str, ...] = ("top1", "nll")
    shown: tuple[str, ...] = ("ece",)
    always: bool = False
    start: str = ""
    like: str = ""
    beside: str = ""
    seeds: tuple[int, ...] = (2, 3, 4)
    edges: bool = True
    train_images: int = 0
    image_size: int = 16
    batch_size: int = 64

    @property
    def updates_per_epoch(self) -> int:
        """Of one model alone (images)."""
        return self.train_images // self.batch_size


DECAYS = ("wd1e-4", "wd5e-4", "wd1e-4-falling", "wd5e-4-falling")  # in full in images.py


def _images(name: str, train_images: int, model: str, epochs: int, **more: Any) -> Setting:
    decays = more.pop("regularisations", DECAYS)
    return Setting(name, "images", str(train_images), model, epochs, decays, train_images=train_images, **more)


SETTINGS = {
    setting.name: setting
    for setting in (
        _images("a_short", 10_000, "wrn16_1", 9),
        _images(
            "a", 10_000, "wrn16_1", 45, always=True, regularisations=("wd5e-4-falling",), later=("wd5e-4",),
            alphas=(0.3, 1.0), start="mse",
        ),
        # Twice the decay: whether what over-fits in `a` does so for want of it.
        _images(
            "a_heavy", 10_000, "wrn16_1", 45, always=True, regularisations=("wd1e-3",), rates=(0.2, 0.4, 0.8),
            alphas=(0.3,), codistilled=("mse",), beside="a",
        ),
        # A quarter of the images, as many updates: what over-fits.
        _images(
            "a_few", 2_560, "wrn16_1", 176, always=True, regularisations=("wd5e-4", "wd1e-3"), later=("wd2e-3",),
            rates=(0.2, 0.4), alphas=(0.3, 1.0), start="mse",
        ),
        _images("a_short_wide", 10_000, "wrn16_2", 9),
        _images("b_short", 40_000, "wrn16_1", 9),
        _images("b", 40_000, "wrn16_1", 45, always=True, like="b_short"),
        Setting(
            "text", "text", "multi30k", "1+1 layers, 64 wide", 200, ("dropout0.1",), later=("dropout0", "dropout0.2"),
            next_to={"dropout0.2": "dropout0.3"}, rates=(2.5e-3, 5e-3, 1e-2), alphas=(0.1, 0.3, 1.0),
            codistilled=("mse", "kl", "tokens"), metrics=("nll_bits",), shown=("bleu", "chrf", "epochs"), always=True,
            start="plain",
        ),
        # A third of the pairs, and of the cost.
        Setting(
            "text_third", "text", "multi30k_third", "1+1 layers, 64 wide", 200, ("dropout0.1",),
            later=("dropout0", "dropout0.2"), next_to={"dropout0.2": "dropout0.3"}, rates=(5e-3, 1e-2),
            alphas=(0.3, 1.0), codistilled=("kl", "mse", "tokens"), metrics=("nll_bits",),
            shown=("bleu", "chrf", "epochs"), always=True, start="plain",
        ),
        # For one GPU and a quarter of an hour: settings as they are, nothing is tuned but by whoever has longer.
        _images(
            "gpu", 40_000, "wrn16_4", 15, always=True, image_size=32, batch_size=128, rates=(0.2,), alphas=(1.0,),
            regularisations=("wd5e-4",), edges=False,
        ),
        # Says nothing, in a minute: that every arm runs and is evaluated.
        _images(
            "smoke", 320, "wrn10_1", 1, always=True, image_size=32, batch_size=32, rates=(0.1,), alphas=(1.0,),
            regularisations=("wd5e-4",), seeds=(2,), edges=False,
        ),
    )
}  # fmt: skip
# A gap is likeliest where training is short, and it is cheapest there; then the paper's geometry, then text, more data.
# A part is one arm, or a group of them; of one that ends in " tuning" the final runs are in another.
ORDERS = {
    "claim": (
        ("a_short", "baselines"), ("a_short", "codistilled"), ("a", "baselines"), ("a", "mse"),
        ("a_heavy", "baselines"), ("a_heavy", "codistilled"), ("a_short", "remedies"), ("a", "kl"),
        ("a_few", "baselines"), ("a_few", "mse"), ("a_few", "kl"), ("a", "plain_2k"),
        ("text_third", "plain tuning"), ("text_third", "kl tuning"),
        ("text_third", "baselines"), ("text_third", "kl"), ("text_third", "mse"), ("text_third", "tokens"),
        ("b_short", "baselines"), ("b_short", "codistilled"),
        ("text", "baselines"), ("text", "codistilled"), ("b_short", "four"),
        ("a_short_wide", "baselines"), ("a_short_wide", "codistilled"), ("b", "baselines"), ("b", "codistilled"),
    ),
    "gpu": (("gpu", "baselines"), ("gpu", "codistilled"), ("gpu", "plain_2k")),
    "smoke": tuple(("smoke", part) for part in ("baselines", "codistilled", "plain_2k", "four", "remedies")),
}  # fmt: skip
FOUR = ("all_reduce_4", "kl_x2", "kl_4")
REMEDIES = ("kl_weak", "kl_late", "kl_soft", "js", "reverse_kl")
