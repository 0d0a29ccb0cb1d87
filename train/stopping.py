"""How a run ends early without a bug: asked to stop, or a loss is not finite."""

import signal
import threading
from typing import Any


class Stopped(RuntimeError):
    """A run ended early; the message says where, and what to do."""


class Interrupted(Stopped):
    """The process was asked to stop (SIGTERM) and has saved its state."""


class NotFinite(Stopped, FloatingPointError):
    """A loss is NaN or infinite."""


class StopRequest:
    """Notes SIGTERM, so that the loop can save before it stops.

    Used as a context manager. Outside the main thread, where Python takes no signals,
    nothing is noted.
    """

    requested = False

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_: Any) -> None:
        self.requested = True

    def __exit__(self, *_: Any) -> None:
        if hasattr(self, "_before"):
            signal.signal(signal.SIGTERM, self._before)
