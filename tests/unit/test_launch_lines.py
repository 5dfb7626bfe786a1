"""What the launcher shows of a job's output: whole lines, bars that draw over themselves, readers that are slow."""

import os
import re
import subprocess
import sys
import threading
import time

import pytest

from fairseq_codistill.launch.lines import BAR_S, Lines, Splitter


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_lines_come_when_they_end_and_the_rest_at_the_end(clock):
    splitter = Splitter(clock=clock)
    assert splitter.feed(b"one\ntwo\r\n  \nth") == [b"one", b"two", b"  "]
    clock.now += 2 * BAR_S
    assert splitter.feed(b"re") == []  # a line that is slow, and no bar
    assert splitter.feed(b"e\n\n") == [b"three", b""]
    assert splitter.feed(b"four") == []
    assert splitter.close() == [b"four"]
    assert splitter.close() == []


def test_a_bar_is_shown_now_and_then_and_as_it_was_at_its_end(clock):
    splitter = Splitter(clock=clock)
    shown = []
    for percent in range(101):
        clock.now += 1.0
        shown += splitter.feed(b"\r%3d%%|####    " % percent)
    assert len(shown) == pytest.approx(101 / BAR_S, abs=2)
    assert shown[0].startswith(b"  ")
    assert shown == sorted(shown)
    assert splitter.feed(b"\r          \r") == []  # cleared, as a bar is that does not stay
    assert splitter.feed(b"\nepoch 1\n") == [b"100%|####    ", b"epoch 1"]


@pytest.mark.parametrize("bar", ["\r%5d%%|####", "%5d%%|####\r"])
def test_of_a_bar_nothing_is_kept_but_what_is_shown_last(clock, bar):
    splitter = Splitter(clock=clock)
    shown = []
    for step in range(20_000):
        clock.now += 0.1
        shown += splitter.feed(bar.encode() % step)
    assert len(shown) == pytest.approx(2000 / BAR_S, abs=10)
    assert all(len(line) == 11 for line in shown)
    assert sum(map(len, splitter._pieces)) < 50
    assert splitter.close() == [b"19999%|####"]


def test_a_line_of_many_megabytes_takes_no_longer_than_it_has_to(clock):
    splitter = Splitter(clock=clock)
    began = time.process_time()
    for _ in range(1000):
        assert splitter.feed(b"x" * 2**16) == []
    (line,) = splitter.feed(b"\n")
    assert len(line) == 1000 * 2**16
    assert time.process_time() - began < 5.0


def test_a_line_end_that_is_cut_in_two_is_one(clock):
    splitter = Splitter(clock=clock)
    assert splitter.feed(b"one\r") == []
    assert splitter.feed(b"\ntwo\n") == [b"one", b"two"]


def test_the_rank_that_stands_before_a_line_stays_before_what_is_shown_of_it(clock):
    splitter = Splitter(re.compile(rb" *(\d+): "), clock)
    assert splitter.feed(b"3: \r 10%\r 20%\n") == [b"3:  20%"]
    splitter.feed(b"3: \r 30%")
    splitter.feed(b"\r 40%")
    assert splitter.feed(b"\r 50%\n4: x\n") == [b"3:  50%", b"4: x"]


def test_a_reader_that_is_slow_at_a_pipe_that_does_not_wait_loses_no_line():
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    errors, taken = [], []

    def read():
        time.sleep(0.3)
        while text := os.read(read_end, 1000):
            taken.append(text)

    reader = threading.Thread(target=read)
    reader.start()
    lines = Lines(write_end, errors.append)
    for number in range(5000):
        lines.write_line("[model 0] ", b"%d " % number + b"x" * 50)
    os.close(write_end)
    reader.join()
    os.close(read_end)
    assert errors == []
    found = b"".join(taken).splitlines()
    assert [int(line.split()[2]) for line in found] == list(range(5000))


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_a_stream_that_is_closed_puts_nothing_into_the_logs(tmp_path, closed):
    script = "import sys; print('out', sys.argv[1]); print('err', sys.argv[1], file=sys.stderr)"
    command = [sys.executable, "-m", "fairseq_codistill.launch.cli", "--num-models", "2", "--log-dir", str(tmp_path)]
    command += ["--", sys.executable, "-c", script, "{model}"]

    def close():
        for descriptor in closed:
            os.close(descriptor)

    ended = subprocess.run(command, preexec_fn=close, env={**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"}, timeout=60)
    assert ended.returncode == 0
    for model in (0, 1):
        lines = (tmp_path / f"model-{model}.log").read_text().splitlines()
        assert sorted(line for line in lines if not line.startswith("[launch] ")) == [f"err {model}", f"out {model}"]
        assert all(f"model {model}" in line for line in lines if line.startswith("[launch] "))
