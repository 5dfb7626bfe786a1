"""Draws curves.png from the logs beside it: python draw.py"""

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
}
figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True)
for name, (label, colour, style) in ARMS.items():
    lines = [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]
    for axis, split in zip(axes, ("train", "valid"), strict=True):
        points = [(int(x[f"{split}_num_updates"]), float(x[f"{split}_nll_loss"])) for x in lines if x["split"] == split]
        axis.plot(*zip(*points, strict=True), style, color=colour, label=label)
axes[0].set(title="training", xlabel="updates", ylabel="NLL per token (bits)", ylim=(1.4, 5))
axes[1].set(title="validation", xlabel="updates", ylim=(2.2, 3.5))
axes[1].legend(fontsize=8)
figure.tight_layout()
figure.savefig(HERE / "curves.png", dpi=120)
