"""What tests of the coordinator share: several of them in this process, over real sockets."""

import threading

import pytest
import torch
from helpers import free_ports

from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator.coordinator import Coordinator
from fairseq_codistill.coordinator.introductions import Identity

BATCH = bytes(range(16))


def identity(model, **changes):
    values = {"settings": {"--max-tokens": 9}, "remarks": {"fairseq version": "x"}, "parameters_digest": str(model)}
    return Identity(**{**values, "seed": model, **changes})


def config(model, addresses, **changes):
    values = {"codistill_timeout": 20.0, "codistill_start_timeout": 20.0, "codistill_codec": "fp32", **changes}
    return CodistillationConfig(
        codistill_num_models=len(addresses.split(",")), codistill_model_index=model, codistill_addresses=addresses,
        **values,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def open_coordinators(monkeypatch):
    """Closes whatever a test leaves open, so that no socket outlives it."""
    opened = []
    original = Coordinator.__init__

    def remembered(self, *args, **kwargs):
        original(self, *args, **kwargs)
        opened.append(self)

    monkeypatch.setattr(Coordinator, "__init__", remembered)
    yield
    for coordinator in opened:
        coordinator._mailbox._transport.close(0)


def run_models(jobs):
    """Run one function a model, each in its thread; returns what each returned or raised."""
    outcomes = [None] * len(jobs)

    def run(index):
        try:
            outcomes[index] = jobs[index]()
        except Exception as error:
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a model hangs"
    return outcomes


def addresses_for(num_models):
    return ",".join(f"127.0.0.1:{port}" for port in free_ports(num_models))


def predictions_of(model, position):
    return torch.full((3, 4), float(10 * model + position))
