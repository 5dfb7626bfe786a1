"""Owns the end-to-end row of ``exchange.py``: a small transformer's step without and with an exchange, in turns.

Two processes, each with a model of its own and the same batches. Both take a step without an exchange (forward, cross
entropy, backward, Adam), then one that exchanges predictions and learns from them, and so on: what else the machine
does meets both alike. With peers the loss is :meth:`Codistiller.loss`, whose cost, or what it saves, is in the row.
"""

import multiprocessing
import statistics
import time
from typing import Any

import torch
from torch import nn

from fairseq_codistill import Codistiller
from fairseq_codistill.config import CodistillationConfig

CLASSES, LENGTH, SENTENCES = 8192, 28, 32
ARMS = ("without", "with")


class SmallTransformer(nn.Module):
    """3 + 3 layers, 256 wide, all embeddings shared."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.embedding = nn.Embedding(num_classes, 256)
        self.layers = nn.Transformer(256, 4, 3, 3, 1024, dropout=0.1, batch_first=True)

    def forward(self, source: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """(batch, length) symbols, twice -> (batch, length, num_classes) logits."""
        mask = nn.Transformer.generate_square_subsequent_mask(previous.size(1), device=previous.device)
        hidden = self.layers(self.embedding(source), self.embedding(previous), tgt_mask=mask, tgt_is_causal=True)
        return hidden @ self.embedding.weight.T


def one_side(model: int, meeting: Any, results: Any, ports: list[int], what: dict[str, Any]) -> None:
    """What both processes do; model 0 hands back seconds of every step, by arm: ``wall`` and ``processor``."""
    torch.set_num_threads(1)
    torch.manual_seed(model)
    device = torch.device(what["device"])
    network = SmallTransformer(what["classes"]).to(device)
    optimizer = torch.optim.Adam(network.parameters(), 1e-4)
    draws = torch.Generator().manual_seed(7)
    seconds: dict[str, dict[str, list[float]]] = {arm: {"wall": [], "processor": []} for arm in ARMS}
    config = CodistillationConfig(
        codistill_num_models=2, codistill_model_index=model, codistill_parts="1",
        codistill_addresses=",".join(f"127.0.0.1:{port}" for port in ports), codistill_codec=what["codec"],
        codistill_divergence=what["divergence"], codistill_transport=what["transport"], codistill_keys=what["keys"],
    )  # fmt: skip
    with Codistiller(config) as peers:
        peers.meet(network, 10**6)
        for turn in range(what["repeats"] + 1):
            shape = (3, what["sentences"], LENGTH)
            source, previous, target = torch.randint(what["classes"], shape, generator=draws).to(device)
            for arm in ARMS:
                meeting.wait()
                _synchronize(device)
                wall, processor = time.perf_counter(), time.process_time()
                with torch.autocast(device.type, what["amp"] or torch.float32, enabled=what["amp"] is not None):
                    logits = network(source, previous)
                if arm == "with":
                    loss = peers.loss(logits, target, range(turn * len(target), (turn + 1) * len(target)))
                else:
                    loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                _synchronize(device)
                if turn:  # the first one warms up
                    seconds[arm]["wall"].append(time.perf_counter() - wall)
                    seconds[arm]["processor"].append(time.process_time() - processor)
        taught = peers.figures()["codistill_peers"]
        assert taught == 1.0, f"a peer's message did not come: {taught} peers a step"
    if model == 0:
        results.put(seconds)
    meeting.wait()


def measure(ports: list[int], **what: Any) -> dict[str, Any]:
    """The row: medians of the steps without and with, and the median of what each pair of steps differs by.

    Args:
        ports: two that are free.
        what: codec, divergence, transport, keys, device, amp (a dtype or None), repeats, classes, sentences.
    """
    context = multiprocessing.get_context("spawn")
    meeting, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=one_side, args=(model, meeting, results, ports, what)) for model in range(2)]
    for process in processes:
        process.start()
    seconds = results.get(timeout=600)
    for process in processes:
        process.join(60)
    row: dict[str, Any] = {"codec": what["codec"], "transport": what["transport"], "seconds": seconds}
    for clock in ("wall", "processor"):
        without, with_exchange = (seconds[arm][clock] for arm in ARMS)
        differences = [b - a for a, b in zip(without, with_exchange, strict=True)]
        row[clock] = {
            "without_s": statistics.median(without),
            "with_s": statistics.median(with_exchange),
            "more": statistics.median(differences) / statistics.median(without),
        }
    return row


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.synchronize()
