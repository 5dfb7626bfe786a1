"""Logs of runs that go on, made by code, for the tests of what shows them: two models or eight, one of them dead."""

import json
import math
import time
from pathlib import Path


def line(at, text, level="INFO", name="train"):
    """A line of fairseq's log at ``at`` (seconds since 1970)."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at))} | {level} | {name} | {text}\n"


def inner(at, model, update, num_peers=1, codec="fp16"):
    """Figures of training, falling as they do."""
    loss = 9.5 * math.exp(-update / 700) + 3.1 + 0.06 * model + 0.12 * math.sin(update / 37 + model)
    figures = {
        "epoch": 1 + update // 100,
        "nll_loss": f"{loss:.3f}",
        "codistill_mse": f"{0.4 * math.exp(-update / 900) + 0.05 * abs(math.sin(update / 53 + model)):.4f}",
        "codistill_agreement": f"{0.9 - 0.75 * math.exp(-update / 500):.4f}",
        "codistill_weight": "1",
        "codistill_peers": f"{num_peers:g}",
        "codistill_wait_ms": f"{14 + 9 * abs(math.sin(update / 29 + 2 * model)) + model:.3f}",
        "codistill_mbit": f"{12.4 * num_peers:.3f}",
        "num_updates": str(update),
        "lr": f"{0.005 * min(1, update / 500) * min(1, math.sqrt(500 / max(update, 1))):.6f}",
        "wps": f"{11800 + 300 * math.sin(update / 17 + model):.1f}",
        "ups": f"{3.1 + 0.1 * math.sin(update / 17 + model):.2f}",
    }
    return line(at, json.dumps(figures), name="train_inner")


def valid(at, model, update):
    """Figures of a validation."""
    figures = {
        "valid_nll_loss": f"{9 * math.exp(-update / 600) + 2.6 + 0.05 * model:.3f}",
        "valid_num_updates": str(update),
    }
    return line(at, json.dumps(figures), name="valid")


def settings(at, model, num_models):
    """What fairseq prints of its options, and the model's size."""
    named = f"{{'_name': None, 'task': Namespace(seed={model + 1}, codistill_num_models={num_models}, "
    named += f"codistill_model_index={model}, codistill_codec='fp16', arch='transformer_iwslt_de_en')}}"
    size = "num. shared model params: 1,010,000 (num. trained: 1,000,000)"
    return line(at, named, name="fairseq_cli.train") + line(at, size, name="fairseq_cli.train")


def peer(at, model, state, was, why):
    """That another model changed its state."""
    level = "WARNING" if state == "away" else "INFO"
    text = f"codistillation: model {model} is {state} (was {was}): {why}"
    return line(at, text, level, "fairseq_codistill.coordinator.peers")


def make_run(folder: Path, num_models=2, num_updates=1200, now=None, dead=None):
    """A run of ``num_models`` in ``folder``, live at ``now``, a log a model; ``dead`` is a model that was killed.

    Returns:
        seconds since 1970 of the last line.
    """
    now = time.time() if now is None else now
    began = now - 0.33 * num_updates - 5
    folder.mkdir(parents=True, exist_ok=True)
    for model in range(num_models):
        lines = [settings(began, model, num_models)]
        others = [other for other in range(num_models) if other != model]
        lines += [peer(began + 2, other, "present", "expected", "first contact") for other in others]
        for update in range(20, num_updates + 1, 20):
            at = began + 5 + 0.33 * update
            is_dead = dead is not None and update > num_updates // 2
            if is_dead and model == dead:
                break
            if is_dead and update - 20 <= num_updates // 2:
                why = "nothing for epoch 7 position 13 micro-batch 0 in 10.0 s (its latest: epoch 7 position 12 "
                lines.append(
                    peer(at, dead, "away", "present", why + "micro-batch 0); nobody waits for it until it is back")
                )
            lines.append(inner(at, model, update, len(others) - is_dead))
            if update % 100 == 0:
                lines.append(valid(at, model, update))
        if model == dead:
            lines.append(f"[launch] model {model} failed: rank 0 killed by SIGKILL; the others go on without it\n")
        (folder / f"model-{model}.log").write_text("".join(lines))
    return now
