"""Draws curves.png from the logs beside it and, for the dense codecs, those of the Multi30k results: python draw.py"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
DENSE = HERE.parent / "multi30k_en_de/third"
KL = {
    "kl, fp16 (dense)": (DENSE / "kl_1", "black"),
    "kl, tokens:16": (HERE / "tokens_16", "tab:blue"),
    "kl, tokens:8": (HERE / "tokens_8", "tab:green"),
    "kl, tokens:4": (HERE / "tokens_4", "tab:orange"),
    "kl, tokens:2": (HERE / "tokens_2", "tab:purple"),
    "kl, tokens:1": (HERE / "tokens_1", "tab:red"),
}
MSE = {
    "mse, fp16 (dense)": (DENSE / "mse_0.3_growing", "black"),
    "mse, columns:256": (HERE / "columns_256", "tab:blue"),
    "mse, columns:64": (HERE / "columns_64", "tab:red"),
}


def valid_nll(path: Path) -> tuple[list[int], list[float]]:
    """Updates and validation NLL in bits, an epoch each."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    valid = [line for line in lines if line["split"] == "valid"]
    return [int(x["valid_num_updates"]) for x in valid], [float(x["valid_nll_loss"]) for x in valid]


figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
for axis, arms, title in ((axes[0], KL, "kl, α = 1"), (axes[1], MSE, "mse, α = 0.3 × 1.1 an epoch")):
    for label, (base, colour) in arms.items():
        for model, style in (("0", "-"), ("1", "--")):
            axis.plot(*valid_nll(base.with_name(f"{base.name}.{model}.jsonl")), style, color=colour,
                      label=label if model == "0" else None)  # fmt: skip
    axis.set(title=title, xlabel="updates", ylim=(3, 8))
    axis.legend(fontsize=8)
axes[0].set_ylabel("validation NLL per token (bits)")
figure.tight_layout()
figure.savefig(HERE / "curves.png", dpi=120)
