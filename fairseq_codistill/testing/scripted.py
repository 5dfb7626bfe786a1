"""Owns scripted peers: a model that is not there, and the faults that a network is full of. For tests, ours and users'.

A :class:`Script` answers each message of a real job with predictions that a function makes up, for the batch of that
message: it repeats the fingerprint and never takes one of its own. It plays over real sockets, in a thread, against a
job in this process or another::

    script = Script(1, "127.0.0.1:29600,127.0.0.1:29700", lambda key, logits: logits + 1, {(1, 3, 0): Fault.MISALIGNED})
    with ScriptedPeer(script):
        ...  # run model 0
    assert (1, 3, 0) in script.received[0]

or without sockets, where its answers are there at once: ``Coordinator(config, transport=ScriptedTransport(script))``.
A job does not wait for a peer that is away. Over sockets it is therefore chance whether a peer that was late once is in
time again; without sockets it always is.
"""

import enum
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fairseq_codistill.coordinator.codecs.choice import make_codec
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.late import bytes_of
from fairseq_codistill.coordinator.predictions import Steps
from fairseq_codistill.coordinator.transports.addresses import parse_addresses
from fairseq_codistill.coordinator.transports.transport import Transport
from fairseq_codistill.coordinator.transports.zeromq import ZeroMqTransport
from fairseq_codistill.coordinator.wire import EMPTY_FINGERPRINT, Header, Kind, Message, parse, run_id_from

Frames = tuple[bytes | memoryview, bytes | memoryview]


class Fault(enum.Enum):
    """What a scripted peer does wrong at a data position."""

    DROP = "never answers"
    LATE = "answers only once the job has gone on to its next position"
    GOODBYE = "says goodbye instead, and never answers again"
    VANISH = "falls silent from here on, without a goodbye"
    RESTART = "says hello as a new process does, then answers"
    GARBAGE = "sends noise, a damaged message and one of another run, then answers"
    MISALIGNED = "answers for another batch"


class Script:
    """What one rank of a model that is not there says. It knows neither sockets nor threads.

    It takes over the settings that a job announces, so that the two fit; its parameters and its seed are others.

    Args:
        model_index: the model it plays.
        addresses: ``--codistill-addresses`` of the jobs, with an entry for each of the n models.
        predict: (key, logits) -> the peer's logits for that batch, of the same shape (num_rows, num_classes). It is
            given those of the job; return something else, since a peer that is identical hides mistakes. NaN and
            infinities may be in it.
        faults: data position -> what goes wrong there. Plain tuples (epoch, position, micro-batch) do as keys.
        rank: its rank inside the model.
        codec: how predictions travel, here and in the jobs: one that sends every logit (fp32, fp16, bf16, int8).
        run_id: ``--codistill-run-id`` of the jobs, if they set one.
        hello: replaces parts of what it announces (``settings``, ``parameters_digest``, ``seed``, ...).

    Attributes:
        received: model -> {position: logits posted by that model, as they travelled}, in order of arrival.
        goodbyes: model -> the reason it gave.
    """

    def __init__(
        self,
        model_index: int,
        addresses: str,
        predict: Callable[[BatchKey, Tensor], Tensor],
        faults: Mapping[tuple[int, int, int], Fault] | None = None,
        rank: int = 0,
        codec: str = "fp32",
        run_id: str = "",
        hello: Mapping[str, Any] | None = None,
    ):
        self.model_index, self.addresses, self.rank = model_index, addresses, rank
        self.num_models = len([entry for entry in addresses.split(",") if entry.strip()])
        self.received: dict[int, dict[BatchKey, Tensor]] = {j: {} for j in range(self.num_models) if j != model_index}
        self.goodbyes: dict[int, str] = {}
        self._predict, self._codec, self._run_id = predict, make_codec(codec), run_id_from(run_id or addresses)
        self._faults = {BatchKey(*key): fault for key, fault in (faults or {}).items()}
        self._hello = dict(hello or {})
        self._hellos: dict[int, dict[str, Any]] = {}  # of the jobs
        self._num_restarts = 0
        self._late: dict[int, list[Message]] = {j: [] for j in self.received}
        self._is_silent = False

    def answers(self, header: bytes | memoryview, payload: bytes | memoryview) -> list[Frames]:
        """What the model says to a message; all of it goes to the sender.

        Raises:
            WireError: the message is damaged. A job never sends such a one.
        """
        message = parse(header, payload)
        job = message.model
        if message.kind is Kind.GOODBYE:
            self.goodbyes[job] = json.loads(bytes(payload))["reason"]
            return []
        if message.kind is Kind.HELLO:
            self._hellos[job] = json.loads(bytes(payload))
            return [] if self.model_index in self._hellos[job]["seen"] else [self._say_hello(job)]
        decoded = self._codec.decode(payload, message.num_rows, message.num_classes, seed=0)
        self.received[job][message.key] = logits = (decoded.logits() if isinstance(decoded, Steps) else decoded).float()
        return [] if self._is_silent else self._predictions(message, logits)

    def _predictions(self, message: Message, logits: Tensor) -> list[Frames]:
        job, fault = message.model, self._faults.get(message.key)
        frames: list[Frames] = [(late.header(), late.payload) for late in self._late[job]]
        self._late[job].clear()
        if fault in (Fault.GOODBYE, Fault.VANISH):
            self._is_silent = True
            goodbye = self._json(Kind.GOODBYE, {"reason": "scripted", "incarnation": self._incarnation})
            return [*frames, goodbye] if fault is Fault.GOODBYE else frames
        payload = bytes_of(self._codec.encode(self._predict(message.key, logits.clone()), seed=0))
        fingerprint = EMPTY_FINGERPRINT if fault is Fault.MISALIGNED else message.fingerprint
        what = (message.key, fingerprint, message.num_rows, message.num_classes, self._codec.code)
        answer = Message(Kind.PREDICTIONS, self.model_index, self.rank, self._run_id, payload, *what)
        if fault is Fault.LATE:
            self._late[job].append(answer)
        if fault in (Fault.DROP, Fault.LATE):
            return frames
        if fault is Fault.RESTART:
            self._num_restarts += 1
            frames.append(self._say_hello(job))
        header = answer.header()
        if fault is Fault.GARBAGE:
            foreign = Message(Kind.PREDICTIONS, self.model_index, self.rank, run_id_from("foreign"), payload, *what)
            damaged = header[:-1] + bytes([header[-1] ^ 1])
            frames += [(b"noise", b"noise"), (damaged, payload), (foreign.header(), payload)]
        return [*frames, (header, payload)]

    def _say_hello(self, job: int) -> Frames:
        own = {"parameters_digest": f"scripted {self.model_index}", "seed": -1 - self.model_index, "seen": [job]}
        return self._json(Kind.HELLO, {**self._hellos[job], **own, "incarnation": self._incarnation, **self._hello})

    @property
    def _incarnation(self) -> str:
        return f"scripted {self._num_restarts}"

    def _json(self, kind: Kind, value: dict[str, Any]) -> Frames:
        message = Message(kind, self.model_index, self.rank, self._run_id, json.dumps(value).encode())
        return message.header(), message.payload


class ScriptedTransport(Transport):
    """Plays a script inside the job, without sockets: what it answers lies there when ``send`` returns."""

    def __init__(self, script: Script):
        self._script = script
        self._inbox: list[Frames] = []

    def send(self, peer_model: int, header: Header, payload: bytes | memoryview) -> bool:
        if peer_model != self._script.model_index:
            return False  # nobody else is there
        self._inbox += self._script.answers(bytes(header), payload)
        return True

    def receive(self, timeout_s: float) -> Frames | None:
        return self._inbox.pop(0) if self._inbox else None

    def close(self, linger_s: float) -> None:
        self._inbox.clear()


class ScriptedPeer:
    """Plays a script over real sockets, in a thread, while the ``with`` block lasts.

    Args:
        script: what to play. ``script.predict`` is called in the thread; what it raises is raised at the end of the
            block.
        world_size: X of the run.

    Raises:
        ConfigError: on entering the block: the address of the model is in use.
    """

    def __init__(self, script: Script, world_size: int = 1):
        self._script, self._world_size = script, world_size
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"scripted-model-{script.model_index}", daemon=True)

    def __enter__(self) -> Script:
        script = self._script
        table = parse_addresses(script.addresses, script.num_models, self._world_size)
        self._transport = ZeroMqTransport(
            table[script.model_index][script.rank], {j: table[j][script.rank] for j in script.received}
        )
        self._thread.start()
        return script

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                frames = self._transport.receive(0.05)
                if frames is not None:
                    job = parse(*frames).model
                    for answer in self._script.answers(*frames):
                        self._send(job, *answer)
        except BaseException as error:
            self._error = error
        finally:
            self._transport.close(1.0)

    def _send(self, job: int, header: bytes | memoryview, payload: bytes | memoryview) -> None:
        """Retry for a moment: the connection back to a job that has just come up may still be on its way."""
        deadline = time.monotonic() + 10
        while not self._transport.send(job, bytes(header), payload):
            if self._stop.is_set() or time.monotonic() > deadline:
                return
            self._stop.wait(0.01)
