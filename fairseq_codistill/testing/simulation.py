"""Owns simulated runs: n models in one process that learn what they would learn in processes of their own.

Coordinator, codecs and losses are the real ones; only the transport is a list in memory. It never measures time: the
figure ``codistill_wait_ms`` means nothing here.
"""

import contextlib
import dataclasses
import itertools
import random
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fairseq_codistill.codistiller import Codistiller
from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.transports.transport import Transport
from fairseq_codistill.sampling import CoordinatedBatches, Numbered
from fairseq_codistill.testing.stage import Stage

_numbers = itertools.count(1)  # no simulation is taken for a model that was in the one before


@dataclasses.dataclass
class Simulation:
    """What became of n models; every list has one entry a model.

    Attributes:
        models: trained.
        losses: of every update, cross entropy + α · D, in nats.
        figures: of every update, by the names of the log, see :meth:`Codistiller.figures`.
        bits: that the model sent in an update, on average, to all its peers together.
        scores: what ``evaluate`` said of it; empty without.
    """

    models: list[nn.Module]
    losses: list[list[float]]
    figures: list[list[dict[str, float]]]
    bits: list[float]
    scores: list[Any]

    @torch.no_grad()
    def agreement(self, inputs: Tensor) -> float:
        """Share of the predictions for ``inputs`` at which two models say the same class, on average over all pairs.

        Args:
            inputs: a batch, as the models take it.
        """
        classes = [model.eval()(inputs).argmax(-1) for model in self.models]
        pairs = list(itertools.combinations(classes, 2))
        return sum(float((one == other).float().mean()) for one, other in pairs) / max(len(pairs), 1)


def simulate(
    num_models: int,
    make_model: Callable[[int], nn.Module],
    dataset: Dataset,
    *,
    batch_size: int,
    num_updates: int,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    data_seed: int = 1,
    seed: int = 1,
    evaluate: Callable[[nn.Module], Any] | None = None,
    **settings: Any,
) -> Simulation:
    """Train n models that teach each other, in lock-step, in this process and thread.

    Each has random numbers of its own, of torch, numpy and ``random``, seeded with ``seed`` + its index as a process
    would be before it makes its model; those of the caller stay as they are.

    Args:
        num_models: n.
        make_model: index -> model; classes come last in what it predicts.
        dataset: of (input, target) as a plain loop's; targets are int64 and -100 where nothing is to be predicted.
        batch_size: samples in one update of one model.
        num_updates: of each model.
        make_optimizer: model -> its optimizer.
        data_seed: of the order of the batches, the same for all models.
        seed: of model 0.
        evaluate: called with each model after training, in evaluation mode and without gradient.
        **settings: of codistillation, as :class:`Codistiller` takes them.

    Raises:
        ConfigError: a setting that cannot work, or models that do not fit together.

    >>> data = torch.utils.data.TensorDataset(torch.eye(4), torch.arange(4))
    >>> run = simulate(2, lambda i: nn.Linear(4, 4), data, batch_size=2, num_updates=3, codec="int8",
    ...     make_optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    >>> len(run.losses), len(run.losses[0]), run.bits[0] == run.bits[1]
    (2, 3, True)
    """
    if settings.get("lookahead") or settings.get("update_freq", 1) != 1:
        raise ConfigError(
            "simulate() makes one update of each batch and looks at no next one: leave lookahead and update_freq out"
        )
    addresses = ",".join(f"memory:{index}" for index in range(num_models))
    # What a peer does not send in its turn never comes: no need to wait for it as long as over a network.
    patience = {"timeout": 1.0, "start_timeout": 1.0}
    place = {"num_models": num_models, "addresses": addresses}
    settings = {**patience, "run_id": f"simulation {next(_numbers)}", **settings, **place, "data_seed": data_seed}
    models: dict[int, nn.Module] = {}
    losses: list[list[float]] = [[] for _ in range(num_models)]
    figures: list[list[dict[str, float]]] = [[] for _ in range(num_models)]

    def play(index: int, transport: Transport) -> Generator[None, None, None]:
        random.seed(seed + index)
        np.random.seed(seed + index)
        torch.manual_seed(seed + index)
        models[index] = model = make_model(index)
        optimizer = make_optimizer(model)
        batches = CoordinatedBatches(len(dataset), batch_size, data_seed, rank=0, world_size=1)  # type: ignore[arg-type]
        loader = DataLoader(Numbered(dataset), batch_sampler=batches)
        with Codistiller(rank=0, world_size=1, transport=transport, model_index=index, **settings) as peers:
            peers.meet(model, loader)
            yield
            while True:
                for inputs, targets, ids in loader:
                    losses[index].append(_update(peers, model, optimizer, inputs, targets, ids))
                    figures[index].append(peers.figures())
                    if len(losses[index]) == num_updates:
                        return
                    yield

    with contextlib.closing(Stage(play, num_models)) as stage:
        stage.play(1 + num_updates)
    trained = [models[index] for index in range(num_models)]
    with torch.no_grad():
        scores = [] if evaluate is None else [evaluate(model.eval()) for model in trained]
    bits = [1e6 * sum(update["codistill_mbit"] for update in own) / max(num_updates, 1) for own in figures]
    return Simulation(trained, losses, figures, bits, scores)


def _update(
    peers: Codistiller,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    ids: Tensor,
) -> float:
    device = next(model.parameters()).device
    inputs, targets = inputs.to(device), targets.to(device)
    loss = peers.loss(model(inputs), targets, ids, forward=lambda copy: copy(inputs))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())
