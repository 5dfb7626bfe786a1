"""Owns the way of a payload off an accelerator: into pinned memory, by a stream of its own, while the step goes on.

Not measured on a GPU, nor run on one: the tests have streams that are late on purpose.
"""

import collections
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fairseq_codistill.coordinator.buffers import Buffers
from fairseq_codistill.coordinator.late import Event, LatePayload

NUM_SLOTS = 4  # payloads under way whose memory is used again; pinning more takes milliseconds
Copy = Callable[[list[tuple[Tensor, Tensor]]], Event]


def pinned(num_bytes: int) -> "np.ndarray":
    """Fresh pinned memory."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()


class SideStream:
    """Copies to pinned memory behind what has been computed so far, and beside what will be.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)

    def __call__(self, pairs: list[tuple[Tensor, Tensor]]) -> Event:
        """Start copying, for every (here, there), flat uint8 tensors of equal length; the event is their end."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for here, there in pairs:
                here.copy_(there, non_blocking=True)
                there.record_stream(self._stream)  # its memory is not given away before
            event = torch.cuda.Event(blocking=True)  # whoever waits sleeps
            event.record(self._stream)
        return event


class Offload:
    """A ring of slots in pinned memory.

    A slot is used again when neither the copy into it nor a transport that sends from it needs it: until then one of
    them holds a view. Where all are in use the payload gets memory of its own, since a post never waits; how many there
    can be is bounded by ``--codistill-max-queue-mb``, beyond which a transport drops what it is given.

    Args:
        copy: starts copies, all of them in one order.
        allocate: makes memory of so many bytes.
        num_slots: kept.
    """

    def __init__(self, copy: Copy, allocate: Callable[[int], "np.ndarray"] = pinned, num_slots: int = NUM_SLOTS):
        self._copy = copy
        self._buffers = Buffers(num_slots, allocate, min_bytes=0)
        self._under_way: collections.deque[tuple[LatePayload, list[tuple[Tensor, Tensor]]]] = collections.deque()

    def start(self, tensors: Sequence[Tensor]) -> LatePayload:
        """The tensors' bytes, one after the other.

        Args:
            tensors: of any dtypes; nobody may change them afterwards. Those on the CPU are copied at once.
        """
        while self._under_way and self._under_way[0][0].is_there:
            self._under_way.popleft()
        sources = [values.contiguous().view(-1).view(torch.uint8) for values in tensors if values.numel()]
        view = self._buffers.take(sum(map(len, sources)))
        pairs, start = [], 0
        for there in sources:
            here = torch.frombuffer(view, dtype=torch.uint8, count=len(there), offset=start)
            start += len(there)
            if there.device.type == "cpu":
                here.copy_(there)
            else:
                pairs.append((here, there))
        payload = LatePayload(view, self._copy(pairs))
        self._under_way.append((payload, pairs))
        return payload
