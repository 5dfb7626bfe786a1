"""Owns the one thread that several models share: whose turn it is, whose random numbers, and where messages lie.

A model that waits for a message lets the others go on until they have had their turn too. So nothing depends on time,
and a run is the same however often it is repeated. It never looks into a message.
"""

import collections
import random
import time
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import torch

from fairseq_codistill.coordinator.transports.transport import Transport
from fairseq_codistill.coordinator.wire import Header

Frames = tuple[bytes | memoryview, bytes | memoryview]
NAP_S = 0.01  # between two looks for a message that nobody is going to send


class Stage:
    """Lets models go on in turns. A model is a generator: each ``next`` is a turn.

    Args:
        play: (model index, its transport) -> the model.
        num_models: n.
    """

    def __init__(self, play: Callable[[int, Transport], Generator[None, None, None]], num_models: int):
        inboxes: list[collections.deque[Frames]] = [collections.deque() for _ in range(num_models)]
        self._models = [play(i, MemoryTransport(i, inboxes, self._let_others_go_on)) for i in range(num_models)]
        self._random_states = [random_state()] * num_models
        self._num_turns = [0] * num_models
        self._waiting: list[int] = []  # the one whose turn it is comes last, those that wait for it before

    def play(self, num_turns: int) -> None:
        """So many turns of every model."""
        for turn in range(num_turns):
            for model in range(len(self._models)):
                if self._num_turns[model] == turn:
                    self._go_on(model)

    def close(self) -> None:
        """End all models, wherever they are. May be called twice."""
        for model in self._models:
            model.close()

    def _go_on(self, model: int) -> None:
        outside = random_state()
        set_random_state(self._random_states[model])
        self._waiting.append(model)
        try:
            next(self._models[model], None)
        finally:
            self._num_turns[model] += 1
            self._waiting.remove(model)
            self._random_states[model] = random_state()
            set_random_state(outside)

    def _let_others_go_on(self) -> bool:
        """Whether another model had a turn to take."""
        turn, found = self._num_turns[self._waiting[-1]], False
        for model, taken in enumerate(self._num_turns):
            if model not in self._waiting and taken <= turn:
                self._go_on(model)
                found = True
        return found


class MemoryTransport(Transport):
    """One model's end of what all models of a stage share.

    Args:
        model: index of the model.
        inboxes: of all models.
        let_others_go_on: called when a message is waited for; whether anybody did.
    """

    def __init__(self, model: int, inboxes: list[collections.deque[Frames]], let_others_go_on: Callable[[], bool]):
        self._inbox, self._inboxes = inboxes[model], inboxes
        self._let_others_go_on = let_others_go_on

    def send(self, peer_model: int, header: Header, payload: bytes | memoryview) -> bool:
        self._inboxes[peer_model].append((bytes(header), bytes(payload)))  # a copy: the sender's tensor may change
        return True

    def receive(self, timeout_s: float) -> Frames | None:
        if not self._inbox and timeout_s > 0 and not self._let_others_go_on():
            time.sleep(min(NAP_S, timeout_s))  # for nothing: this wait ends with a timeout
        return self._inbox.popleft() if self._inbox else None

    def close(self, linger_s: float) -> None:
        self._inbox.clear()


def random_state() -> tuple[Any, ...]:
    """Of everything that a training loop usually draws from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()


def set_random_state(state: tuple[Any, ...]) -> None:
    """What :func:`random_state` gave."""
    cpu, cuda, python, numpy = state
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    np.random.set_state(numpy)
