"""How a run ends early without a bug: asked to stop, a peer gone, a loss not finite."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, TypeVar

import jax
from jax.experimental import multihost_utils

from train import early
from train.early import REQUEUE

T = TypeVar("T")


class Stopped(RuntimeError):
    """A run ended early; the message says where, and what to do.

    Attributes:
      status: The exit status of a binary that ends so.
    """

    status: ClassVar[int] = 1


class Interrupted(Stopped):
    """The process was asked to stop (SIGTERM, Ctrl-C) and has saved its state."""

    status = REQUEUE


class PeerLost(Stopped):
    """Another process of the run died, or did not come."""

    status = REQUEUE


class NotFinite(Stopped, FloatingPointError):
    """A loss or a gradient is NaN or infinite."""


class StopRequested(Exception):
    """A stop was asked for in the middle of something that is then done anew."""


class StopRequest:
    """Notes SIGTERM, so that the loop can save before it stops.

    Used as a context manager, and polled. A binary answers it at once, and Ctrl-C as
    well (`train.early`). With several processes a signal to one of them stops all at
    the same poll: JAX's coordination service agrees on it, so every process must poll
    as often as every other. Alone, outside the main thread, where Python takes no
    signals, nothing is noted.
    """

    def __init__(self) -> None:
        self._requested = False
        self._polls = 0
        self._together = self._requested_here = False
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> "StopRequest":
        self._together = jax.process_count() > 1
        if threading.current_thread() is not threading.main_thread():
            return self
        if self._together:  # JAX has a handler of its own, of SIGTERM alone
            if early.SIGNALS.watched:
                self._resources.enter_context(early.SIGNALS.noting(self._pass_on))
        elif early.SIGNALS.watched:
            self._resources.enter_context(early.SIGNALS.noting(self._note))
        else:
            before = signal.signal(signal.SIGTERM, self._note)
            self._resources.callback(signal.signal, signal.SIGTERM, before)
        return self

    def _pass_on(self) -> None:
        """Makes Ctrl-C what all processes agree on; may be called twice."""
        if not self._requested_here:
            self._requested_here = True
            os.kill(os.getpid(), signal.SIGTERM)

    def _note(self, *_: Any) -> None:
        self._requested = True

    def poll(self) -> bool:
        """Returns whether the run shall stop now."""
        if self._together and not self._requested:
            self._polls += 1
            sync_point = multihost_utils.reached_preemption_sync_point
            self._requested = sync_point(self._polls)
        return self._requested

    def polled(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items, and raises `StopRequested` when a stop is asked for."""
        for item in items:
            if self.poll():
                raise StopRequested
            yield item

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        alone, self._together = not self._together, False
        self._resources.close()
        if error is None and alone and early.SIGNALS.watched:
            early.SIGNALS.end_if_asked()
