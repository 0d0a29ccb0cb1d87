"""What a binary does before it imports JAX, which takes seconds: it says that it
starts, and answers SIGTERM and Ctrl-C at once from then on.

Python runs a handler between two of its instructions, and a compilation is one of them.
So a thread waits for signals beside the program, by the pipe that the interpreter
writes their numbers to, and says at once what will happen:

- while modules are imported, the program ends there and then;
- where a run notes the request (`noting`), it saves before its next step and ends;
- anywhere else the program ends when Python comes to it, and tidies up;
- a second signal, two seconds after the first or later, ends it at once.

The exit status is `REQUEUE` in each case: started again, a run goes on, and what has
nothing to go on from begins anew. A process that is forked answers for itself.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

REQUEUE = 75
"""The exit status of a run that goes on when it is started again: EX_TEMPFAIL of
sysexits.h. Launchers start it anew on this status, and on death by a signal."""

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
"""The signals that ask to stop, as they are called in messages."""
SAVING = "saving at the next step, then stopping (exit status 75)"
STOPPING = "stopping (exit status 75)"
AT_ONCE = "stopping at once, without saving (exit status 75)"
_SECONDS_TO_SECOND = 2.0
"""A terminal and a launcher may send the same request within a moment."""


class Signals:
    """What a program does when it is asked to stop; a process has one."""

    def __init__(self) -> None:
        self._asked: float | None = None
        self._importing, self._handled = True, False
        self._note: Callable[[], None] | None = None
        self._answered = threading.Event()
        self.watched = False

    def watch(self) -> None:
        """Answers signals from here on, in the main thread of a program."""
        if self.watched or threading.current_thread() is not threading.main_thread():
            return
        self.watched = True
        os.register_at_fork(
            before=_hold, after_in_parent=_let_go, after_in_child=_forget
        )
        numbers, sink = os.pipe()
        os.set_blocking(sink, False)
        signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
        for number in NAMES:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` asks
                signal.signal(number, self._handle)
        threading.Thread(target=self._wait, args=(numbers,), daemon=True).start()

    def end_if_asked(self) -> None:
        """Ends the program where a request was noted, but too late for a run to see."""
        if self._handled:
            self._end()

    def imported(self) -> None:
        """Lets the program tidy up from here on, when it is asked to stop."""
        self._importing = False
        if self._handled:
            self._end()

    @contextlib.contextmanager
    def noting(self, note: Callable[[], None]) -> Iterator[None]:
        """Has requests noted, instead of ending the program.

        Args:
          note: Called for each; may be called by another thread, and twice.
        """
        self._note = note
        try:
            yield
        finally:
            self._note = None

    def _wait(self, numbers: int) -> None:
        while True:
            for number in os.read(numbers, 1):
                if number in NAMES:
                    self._answer(NAMES[signal.Signals(number)])

    def _answer(self, name: str) -> None:
        """Says at once what becomes of a request; runs beside the program."""
        now, name = time.monotonic(), f"\n{name}" if os.isatty(2) else name
        if self._asked is not None:
            if now - self._asked >= _SECONDS_TO_SECOND:
                tell(f"{name} again: {AT_ONCE}")
                os._exit(REQUEUE)
            return
        self._asked = now
        if self._importing:
            tell(f"{name}: {STOPPING}")
            os._exit(REQUEUE)
        note = self._note
        if note is not None:
            note()
        tell(f"{name}: {SAVING if note is not None else STOPPING}")
        self._answered.set()

    def _handle(self, *_: Any) -> None:
        """Ends the program, or notes; runs when Python comes to it."""
        self._handled = True
        if self._note is not None:
            self._note()
        elif not self._importing:
            self._end()

    def _end(self) -> None:
        self._answered.wait(timeout=1.0)  # the line comes before the end
        sys.exit(REQUEUE)


_OWN = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}
"""What Python does on a signal by itself."""
_held = threading.local()


def _hold() -> None:
    """Holds signals back while the process forks."""
    _held.before = signal.pthread_sigmask(signal.SIG_BLOCK, NAMES)


def _let_go() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _held.before)


def _forget() -> None:
    """Leaves signals to a forked process itself; what it would write, its parent would
    take for its own."""
    signal.set_wakeup_fd(-1)
    for number, own in _OWN.items():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, own)
    _let_go()


SIGNALS = Signals()


def begin(program: str) -> None:
    """Begins a program: the first line, and signals.

    Nothing is said where JAX is there already, to those who want help only, and by the
    other processes of several.

    Args:
      program: Its name, as in "train.main".
    """
    words = " ".join(sys.argv[1:])
    quiet = "--help" in words or ("--process_id" in words and "_id=0" not in words)
    SIGNALS.watch()
    if "jax" not in sys.modules and not quiet:
        tell(f"{program}: importing JAX ...")


def tell(line: str) -> None:
    """Writes a line on stderr by one call of the system, past whatever is locked."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
