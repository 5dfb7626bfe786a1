"""What distilling costs the criterion: peak memory and time beside fairseq's stock label-smoothed cross entropy.

    python benchmarks/loss.py [--tokens 3584 --classes 32768 --models 2 4 --dtype fp16 --amp fp16 --out figures.json]

One forward and backward of ``codistillation`` and of ``label_smoothed_cross_entropy`` on the same logits, which exist
already, down to the gradient of these logits. Peers are scripted: their predictions lie there as the codec decoded
them, so nothing is sent and nobody waits (``exchange.py`` measures that). Columns:

    peak       the most bytes that were allocated at one moment during forward and backward, beyond what lay there
               before (the logits, the targets, what the peers sent). The gradient of the logits counts, for both
    with peers the same, and what the peers sent: n − 1 tensors of the size of the logits where it is dense
    time       median of the repeats of wall-clock and of processor time; the two criteria take turns

On the CPU every allocation is seen by torch's profiler, on an accelerator by torch's own allocator there; what the
peers sent lies in host memory in both cases, as the codec leaves it. ``times`` in the table are ratios to the stock
criterion, and the goal is 1.25 in memory and 1.3 in time for dense predictions, 1.02 for sampled ones.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.models import FairseqDecoder, FairseqLanguageModel
from machine import about
from torch import Tensor

from fairseq_codistill.coordinator.codecs.choice import make_codec
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.late import bytes_of
from fairseq_codistill.coordinator.predictions import Exchange
from fairseq_codistill.criterion import CodistillationCriterion, CodistillationCriterionConfig
from fairseq_codistill.fairseq_side.batches import TAG

PAD = 1
LABEL_SMOOTHING = 0.1
CASES = (("fp32", "kl"), ("fp32", "mse"), ("tokens:16", "kl"), ("columns:512", "mse"))
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GOALS = {"dense": {"peak": 1.25, "time": 1.3}, "sampled": {"peak": 1.02, "time": 1.02}}


class GivenLogits(FairseqLanguageModel):
    """A model whose logits are there already."""

    def __init__(self, logits: Tensor):
        super().__init__(FairseqDecoder(SimpleNamespace()))
        self.logits = logits

    def forward(self) -> tuple[Tensor, None]:
        """The logits, (batch, length, num_classes)."""
        return self.logits, None


class ScriptedCoordinator:
    """Peers whose predictions are there already. Takes the place of ``Coordinator`` in the criterion."""

    def __init__(self, predictions: dict[int, Any]):
        self._predictions = predictions

    def is_due(self, elapsed: int) -> bool:
        """At every batch."""
        return True

    def num_behind(self, elapsed: int, within_reach: bool = True) -> int:
        """Nobody is behind."""
        return 0

    def post(self, key: BatchKey, fingerprint: bytes, predictions: Tensor, targets: Tensor | None = None) -> None:
        """Sends nothing."""

    def poll(self, elapsed: int | None = None) -> None:
        """Nobody asks."""

    def collect(self, key: BatchKey | None = None) -> Exchange:
        """What the peers sent."""
        return Exchange(predictions=self._predictions)


def make_batch(
    num_tokens: int, num_classes: int, padding: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(batch, length, num_classes) logits with gradient and (batch, length) targets, ``num_tokens`` of them not pad."""
    generator = torch.Generator().manual_seed(0)
    length = max(d for d in range(1, 33) if num_tokens % d == 0)
    num_pad = round(padding * length)
    batch = num_tokens // length
    logits = 2 * torch.randn(batch, length + num_pad, num_classes, generator=generator)
    target = torch.randint(PAD + 1, num_classes, (batch, length + num_pad), generator=generator)
    target[:, length:] = PAD
    return logits.to(device, dtype).requires_grad_(), target.to(device)


def sent_by_peer(codec_name: str, predictions: Tensor, seed: int) -> Any:
    """What one peer's codec makes of predictions near ``predictions``, decoded, in host memory."""
    codec = make_codec(codec_name, salt=seed)
    theirs = predictions + torch.randn(predictions.shape, generator=torch.Generator().manual_seed(seed))
    return codec.decode(bytes_of(codec.encode(theirs, seed=0)), *theirs.shape, seed=0)


def num_bytes(sent: Any) -> int:
    """Of what a peer sent, decoded."""
    tensors = [sent] if isinstance(sent, Tensor) else [v for v in vars(sent).values() if isinstance(v, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def make_criteria(divergence: str, peers: list[Any]) -> dict[str, Any]:
    """The stock criterion and ours, with the same settings, in training mode."""
    task: Any = SimpleNamespace(target_dictionary=SimpleNamespace(pad=lambda: PAD))
    config = CodistillationCriterionConfig(
        codistill_num_models=len(peers) + 1, codistill_divergence=divergence, label_smoothing=LABEL_SMOOTHING,
        sentence_avg=False, update_freq=[1],
    )  # fmt: skip
    ours = CodistillationCriterion(task, config)
    ours.peers.coordinator = ScriptedCoordinator(dict(enumerate(peers, start=1)))  # type: ignore[assignment]
    stock = LabelSmoothedCrossEntropyCriterion(task, False, LABEL_SMOOTHING)
    return {"stock": stock.train(), "codistillation": ours.train()}


def step(criterion: Any, model: GivenLogits, sample: dict, amp: str) -> None:
    """Forward, under autocast unless ``amp`` is fp32, and backward, down to the gradient of the logits."""
    with torch.autocast(model.logits.device.type, DTYPES[amp], enabled=amp != "fp32"):
        loss, _, figures = criterion(model, sample)
    loss.backward()
    if isinstance(criterion, CodistillationCriterion) and not figures["codistill_peers"]:
        raise RuntimeError("nothing was distilled, so this would measure the loss of one model alone")


def peak_bytes(criterion: Any, model: GivenLogits, sample: dict, amp: str) -> int:
    """Most bytes allocated at one moment of a step, beyond those allocated before it."""
    model.logits.grad = None
    gc.collect()
    if model.logits.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(criterion, model, sample, amp)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(criterion, model, sample, amp)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


def measure_times(
    criteria: dict[str, Any], model: GivenLogits, sample: dict, repeats: int, amp: str
) -> dict[str, dict]:
    """Seconds of every repeat of each criterion, a first one that warms up left out."""
    times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "processor": []} for name in criteria}
    for repeat in range(repeats + 1):
        for name, criterion in criteria.items():
            model.logits.grad = None
            _synchronize(model.logits)
            wall, processor = time.perf_counter(), time.process_time()
            step(criterion, model, sample, amp)
            _synchronize(model.logits)
            if repeat:
                times[name]["wall"].append(time.perf_counter() - wall)
                times[name]["processor"].append(time.process_time() - processor)
    return times


def measure(codec: str, divergence: str, num_models: int, args: argparse.Namespace) -> dict:
    """One line of the table."""
    device = torch.device(args.device)
    logits, target = make_batch(args.tokens, args.classes, args.padding, device, DTYPES[args.dtype])
    mine = logits.detach()[target.ne(PAD)].cpu().float()
    peers = [sent_by_peer(codec, mine, seed) for seed in range(1, num_models)]
    del mine
    model, criteria = GivenLogits(logits), make_criteria(divergence, peers)
    sample = {"net_input": {}, "target": target, "ntokens": args.tokens}
    sample[TAG] = {"key": (1, 0, 0), "elapsed": 0, "fingerprint": b""}
    peaks = {name: peak_bytes(criterion, model, sample, args.amp) for name, criterion in criteria.items()}
    times = measure_times(criteria, model, sample, args.repeats, args.amp)
    median = {
        name: {clock: statistics.median(values) for clock, values in clocks.items()} for name, clocks in times.items()
    }
    kind = "dense" if codec == "fp32" else "sampled"
    line = {
        "codec": codec, "divergence": divergence, "models": num_models, "kind": kind,
        "logits_bytes": num_bytes(logits), "peers_bytes": sum(map(num_bytes, peers)), "peak_bytes": peaks,
        "median_s": median, "times_s": times, "goal": GOALS[kind],
        "peak_ratio": peaks["codistillation"] / peaks["stock"],
        "wall_ratio": median["codistillation"]["wall"] / median["stock"]["wall"],
        "processor_ratio": median["codistillation"]["processor"] / median["stock"]["processor"],
    }  # fmt: skip
    line["is_met"] = {
        "peak": line["peak_ratio"] <= GOALS[kind]["peak"],
        "time": line["wall_ratio"] <= GOALS[kind]["time"],
    }
    return line


def print_line(line: dict) -> None:
    """As a row of a Markdown table."""
    stock, ours = line["peak_bytes"]["stock"], line["peak_bytes"]["codistillation"]
    seconds = line["median_s"]
    cells = [
        line["codec"], line["divergence"], line["models"],
        f"{stock / 2**20:,.1f}", f"{ours / 2**20:,.1f}", f"{(ours + line['peers_bytes']) / 2**20:,.1f}",
        f"{line['peak_ratio']:.2f}", f"{line['goal']['peak']:.2f}",
        f"{seconds['stock']['wall']:.3f}", f"{seconds['codistillation']['wall']:.3f}",
        f"{line['wall_ratio']:.2f}", f"{line['processor_ratio']:.2f}", f"{line['goal']['time']:.2f}",
    ]  # fmt: skip
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """What the figures depend on."""
    return about(
        device=torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
        threads=torch.get_num_threads(),
        tokens=args.tokens,
        classes=args.classes,
        padding=args.padding,
        repeats=args.repeats,
        dtype=args.dtype,
        amp=args.amp,
        label_smoothing=LABEL_SMOOTHING,
    )


def _synchronize(logits: Tensor) -> None:
    if logits.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    """Measure every case, print a table, write JSON."""
    parser = argparse.ArgumentParser(description="peak memory and time of the criterion beside the stock one")
    parser.add_argument("--tokens", type=int, default=3584, help="target tokens that are not padding; 3584")
    parser.add_argument("--classes", type=int, default=32768, help="vocabulary; 32768")
    parser.add_argument("--models", type=int, nargs="+", default=[2, 4], help="n; 2 and 4")
    parser.add_argument("--padding", type=float, default=0.0, help="padding positions for each target token; 0")
    parser.add_argument("--repeats", type=int, default=7, help="steps timed for each criterion and row; 7")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU; 1")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="of the logits")
    parser.add_argument("--amp", default="fp32", choices=list(DTYPES), help="of autocast in forward; fp32: none")
    parser.add_argument("--out", help="write the figures to this JSON file")
    parser.add_argument("--tiny", action="store_true", help="a small batch, to see that it works")
    args = parser.parse_args()
    if args.tiny:
        args.tokens, args.classes, args.repeats = 4096, 600, 2
    torch.set_num_threads(args.threads)
    settings = settings_of(args)
    print(", ".join(f"{key} {value}" for key, value in settings.items()) + "\n")
    print("| codec | D | n | stock peak (MiB) | peak (MiB) | with peers (MiB) | peak, times | goal "
          "| stock (s) | time (s) | wall, times | processor, times | goal |")  # fmt: skip
    print("|" + "---|" * 13)
    lines = []
    for num_models in args.models:
        for codec, divergence in CASES:
            lines.append(measure(codec, divergence, num_models, args))
            print_line(lines[-1])
    if args.out:
        Path(args.out).write_text(json.dumps({"about": settings, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
