"""What a training without the launcher makes of a second signal: real processes, real signals."""

import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.timeout(60)
SAME_REQUEST_S = 0.5
TRAINING = """
import os, signal, sys, time
from {module} import {name}
import {module} as module
module.SAME_REQUEST_S = {same_request_s}
say = lambda what: os.write(1, what.encode() + b"\\n")
{make}
asked = []
signal.signal(signal.SIGWINCH, lambda *_: asked.append(1))
print("training", flush=True)
while True:
    time.sleep(0.01)
    if asked:
        asked.clear()
        say("alive")
"""
HOSTS = {
    "vision": ("vision.stop", "Stop", "stop = Stop(); stop.is_training = True; stop.interrupt = say"),
    "fairseq": (
        "fairseq_codistill.fairseq_side.stopping", "Stopping",
        "stop = Stopping(say); stop.install(); stop.begin(); stop._is_saving = 'saving' in sys.argv",
    ),
}  # fmt: skip


def start(host, *arguments):
    module, name, make = HOSTS[host]
    code = TRAINING.format(module=module, name=name, make=make, same_request_s=SAME_REQUEST_S)
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "training\n"
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == "SIGTERM\n"  # the first signal was taken
    return child


def lives_on(child):
    """Whether its loop answers, after what came before: Python takes the signal of the lowest number first."""
    child.send_signal(signal.SIGWINCH)
    return child.stdout.readline() == "alive\n"


@pytest.mark.parametrize("host", HOSTS)
def test_only_an_interrupt_that_comes_later_ends_a_training_at_once(host):
    child = start(host)
    try:
        child.send_signal(signal.SIGINT)  # at once: the same request, as whoever signals a whole job repeats it
        assert lives_on(child)
        time.sleep(SAME_REQUEST_S)
        child.send_signal(signal.SIGTERM)  # schedulers repeat this one
        assert lives_on(child)
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=20)
        assert child.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    finally:
        child.kill()
        child.communicate()


def test_fairseq_is_not_ended_while_it_saves():
    child = start("fairseq", "saving")
    try:
        time.sleep(SAME_REQUEST_S)
        child.send_signal(signal.SIGINT)
        assert lives_on(child)
    finally:
        child.kill()
        child.communicate()
