"""Owns the lines of a job between its pipe and where they are shown: cut at line ends, bars thinned out, written whole.

What a line says is not looked at here.
"""

import os
import re
import select
import threading
import time
from collections.abc import Callable

BAR_S = 5.0  # how often a bar that is drawn over itself is shown


class Lines:
    """Writes whole lines of many threads to one file descriptor. When that fails, lines are lost, no training.

    Unbuffered: what a buffer still holds for a reader that is gone fails once more at the end of the process.

    Args:
        descriptor: stays open.
        on_error: told once, of the first line that could not be written.
        patience_s: seconds that a line waits for whoever reads, a terminal that is paused or a pipe that is full; then
            it is lost. None: as long as it takes.
    """

    def __init__(
        self,
        descriptor: int,
        on_error: Callable[[OSError], None] | None = None,
        patience_s: float | None = None,
    ):
        self.descriptor, self._patience_s = descriptor, patience_s
        self._on_error = on_error
        self._lock = threading.Lock()
        self._is_closed = False

    def write_line(self, prefix: str, line: bytes) -> None:
        rest = memoryview(prefix.encode() + line.rstrip(b"\r\n") + b"\n")
        with self._lock:
            if self._is_closed:
                return
            try:
                if self._patience_s is not None and not select.select([], [self.descriptor], [], self._patience_s)[1]:
                    return
                while rest:
                    rest = rest[self._write(rest) :]
                return
            except OSError as error:
                self._is_closed, reason = True, error
        if self._on_error is not None:
            self._on_error(reason)

    def _write(self, text: memoryview) -> int:
        try:
            return os.write(self.descriptor, text)
        except BlockingIOError:  # whoever made the pipe does not wait at it; its reader is slow, not gone
            select.select([], [self.descriptor], [])
            return 0


class Splitter:
    """Bytes as they come, cut into lines.

    What ends with a carriage return alone is a progress bar that draws over itself: of those one is shown now and
    then, and the last one before a line ends, which is what a terminal would show.

    Args:
        label: of who wrote a line, at its beginning, which stays with what is shown of it.
        clock: seconds.
    """

    def __init__(self, label: "re.Pattern[bytes] | None" = None, clock: Callable[[], float] = time.monotonic):
        self._label = label
        self._clock = clock
        self._pieces: list[bytes] = []  # of a line that has not ended
        self._shown_at = clock()

    def feed(self, text: bytes) -> list[bytes]:
        """The lines that ended in it, or before; without their ends."""
        first, *others = text.split(b"\n")
        self._pieces.append(first)
        found = []
        for piece in others:
            found.append(self._take())
            self._pieces = [piece]
        if found:
            self._shown_at = self._clock()
        if b"\r" in self._pieces[-1]:
            found += self._bar()
        return found

    def close(self) -> list[bytes]:
        """What never ended."""
        rest = self._take()
        return [rest] if rest else []

    def _take(self) -> bytes:
        line = b"".join(self._pieces)
        self._pieces = []
        return self._last_drawn(line)

    def _bar(self) -> list[bytes]:
        """Of a line that goes back to its beginning only what it may end as is kept; now and then it is shown."""
        drawn, returned, at_hand = b"".join(self._pieces).rpartition(b"\r")
        self._pieces = [drawn, returned, at_hand]
        if not at_hand and b"\r" not in drawn:
            return []  # the end of a line, perhaps, of which the other half is still to come
        drawn = self._last_drawn(drawn)
        self._pieces[0] = drawn
        if not drawn.strip() or self._clock() - self._shown_at < BAR_S:
            return []
        self._shown_at = self._clock()
        return [drawn]

    def _last_drawn(self, line: bytes) -> bytes:
        """What a terminal shows of a line that goes back to its beginning: what was written last and is not blank."""
        if b"\r" not in line:
            return line
        label = self._label.match(line) if self._label is not None else None
        start = label.end() if label else 0
        pieces = line[start:].split(b"\r")
        return line[:start] + next((piece for piece in reversed(pieces) if piece.strip()), b"")
