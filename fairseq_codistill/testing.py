"""Owns scripted peers: a model that is not there, played by a thread, and the faults that a network is full of.

For tests, ours and users'. A :class:`ScriptedPeer` listens on real sockets where ``--codistill-addresses`` says that
its model is, and answers each message of a real job with predictions that a function makes up. It trains nothing and
never takes a fingerprint of its own: it repeats that of the message it answers.

::

    def predict(key, shape):
        return torch.full(shape, 2.0)

    with ScriptedPeer(1, "127.0.0.1:29600,127.0.0.1:29700", predict, faults={(1, 3, 0): Fault.DROP}) as peer:
        ...  # run model 0 against it, in this process or another
    assert (1, 3, 0) in peer.received[0]
"""

import enum
import json
import threading
import time
from collections.abc import Callable, Mapping

from torch import Tensor

from fairseq_codistill.coordinator.codecs import CODECS, CODECS_BY_CODE
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.wire import EMPTY_FINGERPRINT, Kind, Message, WireError, parse, run_id_from
from fairseq_codistill.coordinator.zmq_transport import ZeroMqTransport, parse_addresses

Predict = Callable[[BatchKey, tuple[int, int]], Tensor]


class Fault(enum.Enum):
    """What a scripted peer does wrong at a data position."""

    DROP = "never answers"
    LATE = "answers once the job has gone on to its next position"
    GOODBYE = "says goodbye instead, and never answers again"
    VANISH = "falls silent from here on, without a goodbye"
    RESTART = "says hello as a new process does, then answers"
    GARBAGE = "sends noise, a damaged message and one of another run, then answers"
    MISALIGNED = "answers for another batch"


class ScriptedPeer:
    """Plays one rank of one model. Use it as a context manager, or call :meth:`start` and :meth:`stop`.

    It takes over the settings that the job announces, so that the two fit; its parameters and seed are others.

    Args:
        model_index: the model it plays.
        addresses: ``--codistill-addresses`` of the job, with an entry for each of the n models.
        predict: (key, (num_rows, num_classes)) -> logits of that shape, what the peer predicts for the batch. Return
            something else than the job's own predictions: identical ones hide mistakes. NaN and infinities may be in
            it. Called in the peer's thread.
        faults: data position -> what goes wrong there. Plain tuples (epoch, position, micro-batch) do as keys.
        rank: rank inside the model.
        world_size: X of the run.
        codec: how its predictions travel.
        run_id: ``--codistill-run-id`` of the job, if it sets one.
        hello: replaces parts of what it announces (``settings``, ``parameters_digest``, ``seed``, ...), to be refused.

    Attributes:
        received: model -> {position: logits that this model posted}, as they travelled. Positions in order of arrival.
        goodbyes: model -> the reason it gave when it said goodbye.
    """

    def __init__(
        self,
        model_index: int,
        addresses: str,
        predict: Predict,
        faults: Mapping[tuple[int, int, int], Fault] | None = None,
        rank: int = 0,
        world_size: int = 1,
        codec: str = "fp32",
        run_id: str = "",
        hello: Mapping[str, object] | None = None,
    ):
        num_models = len([entry for entry in addresses.split(",") if entry.strip()])
        table = parse_addresses(addresses, num_models, world_size)
        self._peers = {model: ranks[rank] for model, ranks in enumerate(table) if model != model_index}
        self._listen = table[model_index][rank]
        self._model, self._rank, self._run_id = model_index, rank, run_id_from(run_id or addresses)
        self._predict, self._codec = predict, CODECS[codec]
        self._faults = {BatchKey(*key): fault for key, fault in (faults or {}).items()}
        self._hello = dict(hello or {})
        self._theirs: dict[str, object] = {}  # hello of the job
        self._incarnation = 0
        self._held: list[tuple[int, Message]] = []  # late answers
        self._silent = False
        self.received: dict[int, dict[BatchKey, Tensor]] = {model: {} for model in self._peers}
        self.goodbyes: dict[int, str] = {}
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"scripted-model-{model_index}", daemon=True)

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self) -> "ScriptedPeer":
        """Listen and begin to answer.

        Raises:
            ConfigError: its address is in use.
        """
        self._transport = ZeroMqTransport(self._listen, self._peers)
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread and free the address; raises what went wrong in it (an error of ``predict``, say)."""
        self._stop.set()
        self._thread.join(30)
        if self._error is not None:
            raise self._error

    def __enter__(self) -> "ScriptedPeer":
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Return as soon as ``condition()`` holds; it is looked at again after every message.

        Raises:
            TimeoutError: it does not hold after ``timeout_s`` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._error is not None or condition(), timeout_s):
                raise TimeoutError(f"not so after {timeout_s} s; received so far: {self.received}")

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                frames = self._transport.receive(0.05)
                if frames is not None:
                    self._handle(parse(*frames))
                    with self._changed:
                        self._changed.notify_all()
        except BaseException as error:  # told to the test by stop()
            self._error = error
        finally:
            self._transport.close(1.0)
            with self._changed:
                self._changed.notify_all()

    def _handle(self, message: Message) -> None:
        if message.run_id != self._run_id or message.model not in self._peers or message.rank != self._rank:
            raise WireError(f"message of run {message.run_id.hex()}, model {message.model}, rank {message.rank}")
        if message.kind is Kind.GOODBYE:
            self.goodbyes[message.model] = json.loads(bytes(message.payload))["reason"]
        elif message.kind is Kind.HELLO:
            self._theirs = json.loads(bytes(message.payload))
            if self._model not in self._theirs["seen"]:
                self._say_hello(message.model)
        else:
            logits = CODECS_BY_CODE[message.codec].decode(message.payload, message.num_rows, message.num_classes)
            self.received[message.model][message.key] = logits.clone()
            if not self._silent:
                self._answer(message)

    def _answer(self, message: Message) -> None:
        job, fault = message.model, self._faults.get(message.key)
        held, self._held = [late for late in self._held if late[0] == job], [x for x in self._held if x[0] != job]
        for _, late in held:
            self._send(job, late)
        if fault in (Fault.GOODBYE, Fault.VANISH):
            self._silent = True
            if fault is Fault.GOODBYE:
                self._send(job, self._message(Kind.GOODBYE, json.dumps({"reason": "scripted"}).encode()))
            return
        if fault is Fault.RESTART:
            self._incarnation += 1
            self._say_hello(job)
        shape = (message.num_rows, message.num_classes)
        fingerprint = message.fingerprint if fault is not Fault.MISALIGNED else EMPTY_FINGERPRINT
        answer = self._message(
            Kind.PREDICTIONS, self._codec.encode(self._predict(message.key, shape)), message.key, fingerprint, *shape
        )
        if fault is Fault.LATE:
            self._held.append((job, answer))
        elif fault is not Fault.DROP:
            if fault is Fault.GARBAGE:
                self._send_garbage(job, answer)
            self._send(job, answer)

    def _message(self, kind: Kind, payload: bytes | memoryview, *what: object) -> Message:
        codec = {"codec": self._codec.code} if kind is Kind.PREDICTIONS else {}
        return Message(kind, self._model, self._rank, self._run_id, payload, *what, **codec)  # type: ignore[arg-type]

    def _say_hello(self, job: int) -> None:
        hello = {**self._theirs, "parameters_digest": f"scripted {self._model}", "seed": -1 - self._model}
        hello.update(incarnation=f"scripted {self._incarnation}", seen=[job])
        self._send(job, self._message(Kind.HELLO, json.dumps({**hello, **self._hello}).encode()), must=False)

    def _send_garbage(self, job: int, answer: Message) -> None:
        header, payload = answer.header(), bytes(answer.payload)
        foreign = Message(Kind.PREDICTIONS, self._model, self._rank, run_id_from("another run"), payload, answer.key)
        damaged = bytes([header[0] ^ 255]) + header[1:]
        for noise in ((b"noise", b"noise"), (damaged, payload), (foreign.header(), payload)):
            self._transport.send(job, *noise)

    def _send(self, job: int, message: Message, must: bool = True) -> None:
        """``must``: the connection is up by now; a hello comes again until it is answered."""
        deadline = time.monotonic() + 10
        while not self._transport.send(job, message.header(), message.payload):
            if not must or self._stop.is_set() or time.monotonic() > deadline:
                return
            self._stop.wait(0.01)
