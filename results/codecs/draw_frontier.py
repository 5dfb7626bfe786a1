"""Draws frontier.png, validation NLL against bits at the same updates, from the logs here and of the Multi30k results.

python draw_frontier.py prints the table as well.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
THIRD = HERE.parent / "multi30k_en_de/third"
ALL_REDUCE_MBIT = 2 * 1_043_456 * 32e-6  # the paper's formula, 2 · b_model
ARMS = {  # label -> (logs of its models without suffix, colour)
    "one model": ([THIRD / "plain"], "black"),
    "all_reduce, X = 2": ([THIRD / "all_reduce"], "tab:gray"),
    "fp16, kl": ([THIRD / "kl_1.0", THIRD / "kl_1.1"], "tab:blue"),
    "fp16, mse": ([THIRD / "mse_0.3_growing.0", THIRD / "mse_0.3_growing.1"], "tab:orange"),
    **{
        name.replace("_", ":"): ([HERE / f"{name}.{model}" for model in (0, 1)], colour)
        for name, colour in {
            "columns_256": "tab:olive", "columns_64": "tab:brown", "tokens_16": "tab:green", "tokens_8": "tab:cyan",
            "tokens_4": "tab:purple", "tokens_2": "tab:pink", "tokens_1": "tab:red",
        }.items()
    },
    **{
        label: ([HERE / f"{name}.{model}" for model in (0, 1)], colour)
        for name, label, colour in (
            ("tokens_16_every_10", "tokens:16, T = 10", "limegreen"),
            ("checkpoints_58", "checkpoints, T = 58", "navy"),
        )
        if (HERE / f"{name}.0.jsonl").exists()
    },
}  # fmt: skip


def at(path: Path, updates: int) -> tuple[float, float] | None:
    """Validation NLL in bits and Mbit an update at a number of updates, None where the run did not get there."""
    lines = [json.loads(line) for line in path.with_name(path.name + ".jsonl").read_text().splitlines()]
    valid = [x for x in lines if x["split"] == "valid" and int(x["valid_num_updates"]) == updates]
    if not valid:
        return None
    mbit = [float(x["train_codistill_mbit"]) for x in lines if x["split"] == "train" and "train_codistill_mbit" in x]
    return float(valid[-1]["valid_nll_loss"]), sum(mbit) / len(mbit) if mbit else 0.0


figure, axes = plt.subplots(1, 2, figsize=(11, 4.4))
for axis, updates in zip(axes, (464, 1740), strict=True):
    for label, (logs, colour) in ARMS.items():
        found = [figures for path in logs if (figures := at(path, updates)) is not None]
        if not found:
            continue
        nll = [each[0] for each in found]
        mbit = ALL_REDUCE_MBIT if label.startswith("all_reduce") else sum(each[1] for each in found) / len(found)
        print(f"{updates} updates: {label}: {' / '.join(f'{value:.3f}' for value in nll)} bits, {mbit:.3g} Mbit")
        if mbit:
            axis.plot([mbit] * len(nll), nll, "o", color=colour, label=label)
        else:
            axis.axhline(nll[0], color=colour, linestyle=":", label=label)
    axis.set(title=f"after {updates:,} updates", xlabel="sent by a device (Mbit an update)", xscale="log")
    axis.grid(alpha=0.25)
axes[0].set_ylabel("validation NLL per token (bits)")
axes[0].legend(fontsize=8)
figure.tight_layout()
figure.savefig(HERE / "frontier.png", dpi=120)
