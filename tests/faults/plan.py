"""Which faults a campaign tries, and how often: a table, dealt out by weight."""

from collections.abc import Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """A kind of fault at a kind of place.

    Args:
      kind: What happens; its first word is the signal, where it is one.
      place: Of `moments.PLACES`, or "any time".
      weight: How often, of all.
      processes: How many the run has.
      victims: How many of them get the signal.
    """

    kind: str
    place: str
    weight: int
    processes: int = 1
    victims: int = 1


ROWS = (
    Row("SIGKILL", "any time", 20),
    Row("SIGKILL", "start", 4),
    Row("SIGKILL", "step", 8),
    Row("SIGKILL", "log", 6),
    Row("SIGKILL", "save", 8),
    Row("SIGKILL", "files", 16),
    Row("SIGKILL", "writing", 10),
    Row("SIGKILL", "evaluation", 8),
    Row("SIGKILL", "shrink", 8),
    Row("SIGKILL", "phase end", 8),
    Row("SIGTERM", "any time", 8),
    Row("SIGTERM", "step", 5),
    Row("SIGTERM", "save", 4),
    Row("SIGTERM", "files", 5),
    Row("SIGTERM", "evaluation", 8),
    Row("SIGTERM", "shrink", 6),
    Row("SIGTERM", "phase end", 8),
    Row("SIGKILL of one of two", "any time", 8, 2, 1),
    Row("SIGKILL of one of two", "step", 4, 2, 1),
    Row("SIGKILL of one of two", "save", 4, 2, 1),
    Row("SIGKILL of both", "any time", 4, 2, 2),
    Row("SIGKILL of both", "files", 4, 2, 2),
    Row("SIGTERM to one of two", "any time", 4, 2, 1),
    Row("SIGTERM to one of two", "evaluation", 2, 2, 1),
    Row("SIGTERM to both", "any time", 4, 2, 2),
    Row("flipped bit", "newest checkpoint", 12),
    Row("cut-off file", "newest checkpoint", 8),
    Row("full disk", "any time", 8),
    Row("read-only disk", "next start", 4),
)
"""All of them; the weights add up to 206."""


def deal(count: int, rows: Sequence[Row] = ROWS) -> list[Row]:
    """Returns the rows of so many runs: at each, the one that is furthest behind its
    share, so that every prefix of the list is in proportion, too."""
    dealt = [0] * len(rows)
    total = sum(row.weight for row in rows)
    order = []
    for number in range(1, count + 1):
        behind = [
            row.weight * number / total - done
            for row, done in zip(rows, dealt, strict=True)
        ]
        index = max(range(len(rows)), key=behind.__getitem__)
        dealt[index] += 1
        order.append(rows[index])
    return order
