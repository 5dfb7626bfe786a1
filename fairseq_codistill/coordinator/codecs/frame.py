"""Owns the model behind counted draws: what is said of a row, in which order, and how likely each of it is.

A row says how often its target was drawn, how many other classes were, which, and how often each. The tables begin
with next to nothing and with the targets of the batch, and learn from the rows before, a few times in a message: both
sides do the same to the same whole numbers, so no table travels. It knows neither logits nor bytes.
"""

import dataclasses

import numpy as np

from fairseq_codistill.coordinator.codecs.codec import CodecError
from fairseq_codistill.coordinator.codecs.coder import Coder, Ints
from fairseq_codistill.coordinator.codecs.multisets import longest, num_multisets, rank, unrank

FIRST_ROWS = 32  # that are coded before anything is learned; then as many as there were, and so on
LEARNED = 16  # what one observation adds to a table that starts with ones
OF_TARGET, OF_OTHER = 2, 4  # likewise for the table of classes: a target of the batch, another class that was drawn
NUM_BUCKETS = 16  # of classes, about equally likely: which of them a row's classes lie in is said without their order
LONGEST = longest(NUM_BUCKETS)


@dataclasses.dataclass
class Frame:
    """What was drawn, without the order of the draws.

    Attributes:
        of_target: (R,) how often each row's target was drawn.
        num_others: (R,) how many other classes were.
        classes: (N,) these, row after row, ascending in each.
        counts: (N,) how often each was drawn, 1 or more.
    """

    of_target: Ints
    num_others: Ints
    classes: Ints
    counts: Ints


def code(
    coder: Coder, frame: Frame | None, num_draws: int, num_classes: int, targets: Ints | None, num_rows: int
) -> Frame:
    """Write a frame, or read it.

    Args:
        coder: in either direction.
        frame: to be written; None to read one.
        num_draws: K, of every row.
        num_classes: C.
        targets: (R,) that both sides hold; None where they hold none.
        num_rows: R.

    Returns:
        the frame.

    Raises:
        CodecError: the message has no frame.
    """
    model = _Model(coder, num_draws, num_classes, targets)
    parts, start, item = [], 0, 0
    while start < num_rows:
        stop = min(num_rows, max(2 * start, FIRST_ROWS))
        rows, piece = slice(start, stop), None
        if frame is not None:
            items = slice(item, item + int(frame.num_others[rows].sum()))
            piece = Frame(frame.of_target[rows], frame.num_others[rows], frame.classes[items], frame.counts[items])
            item = items.stop
        parts.append(model.code(piece, stop - start))
        start = stop
    empty = np.empty(0, np.int64)
    columns = zip(*(dataclasses.astuple(part) for part in parts), strict=True) if parts else [[empty]] * 4
    return Frame(*(np.concatenate(column) for column in columns))


class _Model:
    """The tables, and what they have learned."""

    def __init__(self, coder: Coder, num_draws: int, num_classes: int, targets: Ints | None):
        self.coder, self.num_draws, self.num_classes = coder, num_draws, num_classes
        self.has_targets = targets is not None
        self.table_of_target = np.ones(num_draws + 1, np.int64)
        self.table_of_number = np.tril(np.ones((num_draws + 1, num_draws), np.int64), -1)  # [draws left, others - 1]
        self.table_of_count = self.table_of_number.copy()  # [most that it can be, count - 1]
        self.table_of_class = np.ones(num_classes, np.int64)
        if targets is not None:
            self.table_of_class += OF_TARGET * np.bincount(targets, minlength=num_classes)

    def code(self, piece: Frame | None, num_rows: int) -> Frame:
        of_target = np.zeros(num_rows, np.int64)
        if self.has_targets:
            given = None if piece is None else piece.of_target
            of_target = self.coder.alike(given, num_rows, self.table_of_target).astype(np.int64)
            self.table_of_target += LEARNED * np.bincount(of_target, minlength=self.num_draws + 1)
        num_others = self._numbers(piece, self.num_draws - of_target)
        counts = self._counts(piece, self.num_draws - of_target, num_others)
        classes = self._classes(piece, num_others)
        return Frame(of_target, num_others, classes, counts)

    def _numbers(self, piece: Frame | None, left: Ints) -> Ints:
        num_others = np.zeros(len(left), np.int64)
        rows = np.flatnonzero(left)
        given = None if piece is None else piece.num_others[rows] - 1
        tables = self.table_of_number[left[rows]]
        found = self.coder.each(given, tables).astype(np.int64)
        np.add.at(self.table_of_number, (left[rows], found), LEARNED)
        num_others[rows] = found + 1
        if bool((num_others > left).any()):
            raise CodecError("payload with more classes in a row than draws")
        return num_others

    def _counts(self, piece: Frame | None, left: Ints, num_others: Ints) -> Ints:
        """Of every other class in turn: what is left is divided between it and those that follow."""
        left, starts = left.copy(), np.cumsum(num_others) - num_others
        counts: Ints = np.zeros(int(num_others.sum()), np.int64)
        for turn in range(int(num_others.max(initial=0))):
            rows = np.flatnonzero(num_others > turn)
            follow = num_others[rows] - turn - 1
            most = left[rows] - follow
            count = np.where(follow == 0, most, 1)
            open_ = np.flatnonzero((follow > 0) & (most > 1))
            given = None if piece is None else piece.counts[starts[rows[open_]] + turn] - 1
            found = self.coder.each(given, self.table_of_count[most[open_]]).astype(np.int64)
            np.add.at(self.table_of_count, (most[open_], found), LEARNED)
            count[open_] = found + 1
            if bool((count > most).any()):
                raise CodecError("payload with more draws in a row than there are")
            counts[starts[rows] + turn] = count
            left[rows] -= count
        return counts

    def _classes(self, piece: Frame | None, num_others: Ints) -> Ints:
        """Of every row first the buckets, of all together, then the class in its bucket."""
        edges = self._edges()
        classes: Ints = np.zeros(int(num_others.sum()), np.int64)
        buckets = np.zeros(len(classes), np.int64)
        if piece is not None:
            classes = piece.classes
            buckets = np.searchsorted(edges, classes, side="right") - 1
        # A row with many classes says them in groups of at most LONGEST.
        row, starts = np.repeat(np.arange(len(num_others)), num_others), np.cumsum(num_others) - num_others
        group = (np.arange(len(classes)) - starts[row]) // LONGEST
        first = np.flatnonzero(np.diff(row * (self.num_draws + 1) + group, prepend=-1))
        lengths = np.diff(first, append=len(classes))
        for length in np.unique(lengths):
            at = first[lengths == length][:, None] + np.arange(length)
            given = None if piece is None else rank(buckets[at], NUM_BUCKETS)
            ranks = self.coder.evenly(given, len(at), num_multisets(NUM_BUCKETS, int(length)))
            if piece is None:
                buckets[at] = unrank(ranks, NUM_BUCKETS, int(length))
        for bucket in range(NUM_BUCKETS):
            items = np.flatnonzero(buckets == bucket)
            if not len(items):
                continue
            low, high = edges[bucket], edges[bucket + 1]
            if low == high:
                raise CodecError("payload with a class that there is not")
            given = None if piece is None else classes[items] - low
            found = self.coder.alike(given, len(items), self.table_of_class[low:high])
            if piece is None:
                classes[items] = found + low
        self.table_of_class += OF_OTHER * np.bincount(classes, minlength=self.num_classes)
        return classes

    def _edges(self) -> Ints:
        """(NUM_BUCKETS + 1,) where the buckets begin and end, each with about its share of the weights."""
        ends = np.cumsum(self.table_of_class)
        shares = ends[-1] * np.arange(1, NUM_BUCKETS) // NUM_BUCKETS
        return np.concatenate([[0], np.searchsorted(ends, shares, side="left") + 1, [self.num_classes]]).clip(
            max=self.num_classes
        )
