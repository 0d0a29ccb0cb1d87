"""How a search for ranks is getting on."""

import math
import sys
import time

from train import distributed

SECONDS_BETWEEN_LINES = 5.0


class SearchProgress:
    """Tells on stderr of a search that takes long, every few seconds."""

    def __init__(self) -> None:
        self._began = self._told = time.monotonic()
        self._count, self._best = 0, -math.inf

    def scored(self, score: float) -> None:
        """Counts one more rank vector, with minus its loss."""
        self._count += 1
        self._best = max(self._best, score)
        now = time.monotonic()
        if now - self._told < SECONDS_BETWEEN_LINES:
            return
        self._told = now
        rate = self._count / max(now - self._began, 1e-9)
        if distributed.is_first():
            print(
                f"search: {self._count} rank vectors, {rate:.3g} a second, loss"
                f" {-self._best:.4g} at best",
                file=sys.stderr,
            )
