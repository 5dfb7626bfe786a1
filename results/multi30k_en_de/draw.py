"""Draws third/curves.png and full/curves.png from the logs beside them: python draw.py"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ARMS = {
    "plain": ("plain", "black", "-"),
    "all_reduce": ("all_reduce, X = 2", "tab:gray", "-"),
    "kl_1.0": ("2-way, kl, α = 1: model 0", "tab:blue", "-"),
    "kl_1.1": ("2-way, kl, α = 1: model 1", "tab:blue", "--"),
    "mse_0.3_growing.0": ("2-way, mse, α = 0.3 × 1.1: model 0", "tab:orange", "-"),
    "mse_0.3_growing.1": ("2-way, mse, α = 0.3 × 1.1: model 1", "tab:orange", "--"),
}
LIMITS = {"third": ((1.4, 6), (3, 5)), "full": ((1.4, 5), (2.2, 3.5))}  # of the axes: training, validation

for folder, limits in LIMITS.items():
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    for name, (label, colour, style) in ARMS.items():
        log = HERE / folder / f"{name}.jsonl"
        if not log.exists():  # not every arm was trained on all pairs
            continue
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for axis, split in zip(axes, ("train", "valid"), strict=True):
            own = [line for line in lines if line["split"] == split]
            points = [(int(line[f"{split}_num_updates"]), float(line[f"{split}_nll_loss"])) for line in own]
            axis.plot(*zip(*points, strict=True), style, color=colour, label=label)
    axes[0].set(title="training", xlabel="updates", ylabel="NLL per token (bits)", ylim=limits[0])
    axes[1].set(title="validation", xlabel="updates", ylim=limits[1])
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / folder / "curves.png", dpi=120)
