"""Owns the table and the figure of slow_links.py."""

from pathlib import Path


def table(result: dict) -> str:
    """Markdown: a line a method, a column a rate.

    Args:
        result: of one workload.
    """
    rates = result["rates_mbit_s"]
    heads = ["method", "Mbit an update", "interface / counted", "less packet headers"]
    heads += ["unlimited" if rate is None else f"{rate:g} Mbit/s" for rate in rates]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in result["rows"]:
        if not row["cells"]:
            lines.append(f"| {row['name']} | failed |" + " |" * (len(heads) - 2))
            continue
        mbit = next((cell["counted_mbit"] for cell in row["cells"] if cell["counted_mbit"]), 0.0)
        ratios = [_speed(cell) for cell in row["cells"]]
        agreements = [_agreement(row, name) for name in ("interface_mbit", "payload_mbit")]
        lines.append("| " + " | ".join([row["name"], f"{mbit:,.3g}" if mbit else "–", *agreements, *ratios]) + " |")
    limits = ", ".join(f"{limit:.2f}" for limit in result["limits_updates_per_s"])
    delay = f", {result['delay_ms']:g} ms one way" if result.get("delay_ms") else ""
    lines += [
        "",
        f"{result['workload']}{delay}: speed over the limit, which was {limits} updates/s, taken among the methods.",
    ]
    return "\n".join(lines)


def _speed(cell: dict) -> str:
    error = f" ± {cell['ratio_error']:.2f}" if cell["ratio_error"] is not None else ""
    return f"{'' if cell['by'] == 'updates' else '~'}{cell['ratio']:.3f}{error}"


def _agreement(row: dict, name: str) -> str:
    """The first rate at which whole updates were timed and bytes counted."""
    for cell in row["cells"]:
        if cell["by"] == "updates" and cell[name] and cell["counted_mbit"]:
            return f"{cell[name] / cell['counted_mbit']:.3f}"
    return "–"


def draw(results: list[dict], path: Path) -> None:
    """Speed over the limit against the rate of the link, a line a method, a panel a workload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(results), figsize=(8.5 * len(results), 5), squeeze=False)
    for panel, result in zip(panels[0], results, strict=True):
        for row in result["rows"]:
            ratios = [cell["ratio"] for cell in row["cells"]]
            is_ours = row["name"].startswith("codistillation")
            errors = [cell["ratio_error"] or 0.0 for cell in row["cells"]]
            style = "o-" if is_ours else "s--"
            panel.errorbar(range(len(ratios)), ratios, errors, fmt=style, capsize=3, label=row["name"])
        rates = ["unlimited" if rate is None else f"{rate:g}" for rate in result["rates_mbit_s"]]
        panel.set_xticks(range(len(rates)), rates)
        delay = f", {result['delay_ms']:g} ms one way" if result.get("delay_ms") else ""
        panel.set_xlabel(f"link between two hosts, Mbit/s{delay}")
        panel.set_ylabel("updates a second, over no communication")
        panel.set_ylim(bottom=0)
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set_title(result["workload"])
        panel.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
