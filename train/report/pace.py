"""How fast a run trains: its steps and their seconds, without what is no training."""

import time


class Pace:
    """A clock that runs while a run trains.

    It stands while something is compiled, evaluated, saved or changed. Steps run behind
    the program: who measures has waited for the last one.
    """

    def __init__(self) -> None:
        self._steps, self._seconds = 0, 0.0
        self._since: tuple[int, float] | None = None

    @property
    def runs(self) -> bool:
        """Whether the clock runs."""
        return self._since is not None

    def go(self, step: int) -> None:
        """Goes on, from a step on; nothing if it runs."""
        if self._since is None:
            self._since = (step, time.monotonic())

    def measure(self, step: int) -> tuple[int, float]:
        """Returns all steps so far and their seconds."""
        if self._since is not None:
            now = time.monotonic()
            self._steps += step - self._since[0]
            self._seconds += now - self._since[1]
            self._since = (step, now)
        return self._steps, self._seconds

    def stop(self, step: int) -> None:
        """Stands from a step on, until `go`."""
        self.measure(step)
        self._since = None
