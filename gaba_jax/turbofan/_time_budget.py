"""Ending a run in time, also within an epoch."""

_AT_ONCE = 10.0  # seconds of updates between two looks at the clock
_FIRST_EVALUATION = 30.0  # seconds at most: it compiles too


class Budget:
    """How many updates to do before the next look at the clock, and when it is time to end.

    Args:
      minutes: for the whole run; None is without end.

    Raises:
      ValueError: ``minutes`` is not positive.
    """

    def __init__(self, minutes: float | None):
        if minutes is not None and not minutes > 0:
            raise ValueError(f"budget={minutes} must be positive, in minutes.")
        self._seconds = None if minutes is None else 60 * minutes
        self._chunks = 0
        self._each = 0.0  # seconds of an update, once one was measured without compiling
        self._evaluations = 0
        self._evaluation = 0.0  # seconds that the one at the end will take, as far as is known

    def at_once(self, so_far: float, most: int) -> int:
        """Updates to do now, at least 1 and at most ``most``; ``so_far`` in seconds."""
        if self._seconds is None:
            return most
        if self._each == 0.0:
            return 1 if self._chunks < 2 else most
        room = min(_AT_ONCE, self._seconds - self._evaluation - so_far)
        return max(1, min(most, int(room / self._each)))

    def note(self, updates: int, seconds: float) -> None:
        """What the updates of one chunk took; the first compiles."""
        self._chunks += 1
        if self._chunks > 1:
            self._each = seconds / updates

    def note_evaluation(self, seconds: float) -> None:
        """What the evaluation at the end will take, judged by one of fewer windows."""
        self._evaluations += 1
        first = self._evaluations == 1
        self._evaluation = min(seconds, _FIRST_EVALUATION) if first else seconds

    def over(self, so_far: float) -> bool:
        """Whether not even one more update fits."""
        if self._seconds is None:
            return False
        return so_far + self._each + self._evaluation > self._seconds
