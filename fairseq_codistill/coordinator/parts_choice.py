"""Owns the decision in how many parts to cut: from what waiting costs and how long a step takes, window by window.

It knows no peer and no position; who has to follow a decision, and from where on, is agreed on elsewhere.
"""

from fairseq_codistill.config import MOST_PARTS

WORTH_SAVING = 0.03  # share of the time that waiting may take before a split is tried
LEAST_GAIN = 0.01  # of a step: what a split must bring to be kept
RECHECK_WINDOWS = 16  # after so many, fewer parts are tried again: a link may have become faster
MOST_PATIENCE = 64  # windows between two trials that bring nothing


class PartsChoice:
    """What is in force is measured; another number is tried for a window, and kept if steps are shorter by it.

    How long a step takes counts, not how much of it is waiting: who waits for a slower model gains nothing by a split,
    and small parts may compute more slowly. A machine that others use as well drifts, so a split that was given up is
    judged once more by the mean of the windows before and after it.

    >>> choice = PartsChoice()
    >>> choice.next(1, wait_share=0.01, step_s=0.5), choice.next(1, wait_share=0.2, step_s=0.5)
    (1, 2)
    >>> choice.next(2, wait_share=0.0, step_s=0.4), choice.next(2, wait_share=0.0, step_s=0.4)
    (2, 2)
    """

    def __init__(self) -> None:
        self._base: tuple[int, float] | None = None  # parts and seconds of a step before the trial under way
        self._given_up: tuple[int, float, float] | None = None  # parts, seconds of a step with them and before them
        self._hold, self._patience, self._age = 0, 1, 0

    def next(self, parts: int, wait_share: float, step_s: float) -> int:
        """In how many parts to cut from now on.

        Args:
            parts: in force in the window that has ended.
            wait_share: of its time, the least of all models: that of the slowest, which all others wait for anyway.
            step_s: seconds from one exchange to the next.
        """
        base, self._base = self._base, None
        if base is not None and base[0] != parts:
            self._age = 0
            allowed = 1 - LEAST_GAIN if parts > base[0] else 1 + LEAST_GAIN
            if step_s <= base[1] * allowed:
                self._patience = 1
                return parts
            if parts > base[0]:
                self._hold, self._patience = self._patience, min(2 * self._patience, MOST_PATIENCE)
                self._given_up = (parts, step_s, base[1])
            return base[0]
        given_up, self._given_up = self._given_up, None
        if given_up is not None and given_up[1] <= (given_up[2] + step_s) / 2 * (1 - LEAST_GAIN):
            self._hold, self._patience, self._age = 0, 1, 0
            return given_up[0]
        self._age += 1
        if self._hold:
            self._hold -= 1
        elif wait_share > WORTH_SAVING and parts < MOST_PARTS:
            return self._try(parts, 2 * parts, step_s)
        if parts > 1 and self._age >= RECHECK_WINDOWS:
            return self._try(parts, parts // 2, step_s)
        return parts

    def _try(self, parts: int, other: int, step_s: float) -> int:
        self._base = (parts, step_s)
        return other
