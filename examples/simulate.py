"""Bits against agreement of two models, for four codecs and three intervals: simulated in one process, in a minute.

Of the labels that the models learn from three in ten are wrong; a model alone learns many of the mistakes by heart.

    python examples/simulate.py

With matplotlib a plot is written, ``simulate.png``; without it the table is all there is.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from fairseq_codistill.testing import Simulation, simulate

CODECS = ("fp16", "int8", "topk:2", "tokens:1")
INTERVALS = (1, 4, 16)  # T: an exchange at every T-th update


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=800)
    parser.add_argument("--out", default="simulate.png", help="where the plot goes")
    options = parser.parse_args()
    torch.set_num_threads(1)  # models this small are faster that way

    images, classes = load_digits(return_X_y=True)
    images, classes = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(classes)
    generator = torch.Generator().manual_seed(1)
    is_wrong = torch.rand(len(classes), generator=generator) < 0.3
    labels = torch.where(is_wrong, torch.randint(0, 10, classes.shape, generator=generator), classes)

    def run(**settings: object) -> Simulation:
        return simulate(
            num_models=2,
            make_model=lambda index: nn.Sequential(
                nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
            ),
            dataset=TensorDataset(images[::2], labels[::2]),
            batch_size=50,
            num_updates=options.updates,
            make_optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=3e-3),
            evaluate=lambda model: float((model(images[1::2]).argmax(1) == classes[1::2]).float().mean()),
            divergence="kl",
            **{"weight": 3.0, **settings},
        )

    print("codec     T  bits an update  agreement  accuracy")
    apart = run(weight=0.0)
    curves: dict[str, list[tuple[float, float]]] = {}
    for codec, interval, found in [
        ("none", 0, apart),
        *((codec, interval, run(codec=codec, interval=interval)) for codec in CODECS for interval in INTERVALS),
    ]:
        agreement, accuracy = found.agreement(images[1::2]), sum(found.scores) / len(found.scores)
        print(f"{codec:8} {interval:2} {found.bits[0]:15,.0f} {agreement:10.3f} {accuracy:9.3f}", flush=True)
        curves.setdefault(codec, []).append((found.bits[0], agreement))
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.axhline(curves.pop("none")[0][1], linestyle=":", color="gray", label="nothing exchanged")
    for codec, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=codec)
    axes.set(xscale="log", xlabel="bits a model sends in an update", ylabel="predictions on which the models agree")
    axes.legend()
    figure.savefig(options.out, dpi=150)
    print(f"plot: {options.out}")


if __name__ == "__main__":
    main()
