"""Several processes, one run: how they find each other, agree, and end together.

Every process runs the same program on its own devices; JAX joins them to one global
set. Outside a cluster that JAX knows (Slurm, Open MPI, Cloud TPU, GKE) the flags
`--coordinator`, `--num_processes` and `--process_id` say who is who.
"""

import json
import os
import re
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from lowrank_jax.errors import UserError
from train.schema import difference
from train.stopping import REQUEUE, PeerLost

T = TypeVar("T")

HEARTBEAT_SECONDS = 30
"""After so long without a sign of life a process counts as dead, and the run ends."""

_OF_PEERS = re.compile(
    "gloo|nccl|connection|peer|socket|heartbeat|coordination|barrier|task"
    "|DEADLINE_EXCEEDED|UNAVAILABLE|ABORTED|CANCELLED",
    re.IGNORECASE,
)
"""What the runtime speaks of where an exchange between processes failed."""
_FAILED_EXCHANGE = re.compile(r"\b(Gloo|NCCL)\b.*(failed|error)", re.IGNORECASE)
"""The same in an exception of another type, as jit raises a ValueError at times."""
_ALONE = "Give --coordinator, --num_processes and --process_id together."


class Flags(NamedTuple):
    """The flags that say which processes a run has."""

    coordinator: flags.FlagHolder[str | None]
    num_processes: flags.FlagHolder[int | None]
    process_id: flags.FlagHolder[int | None]
    detect: flags.FlagHolder[bool]
    timeout: flags.FlagHolder[int]

    def connect(self) -> None:
        """Joins the processes that the flags name, or stays alone without them."""
        connect(
            self.coordinator.value,
            self.num_processes.value,
            self.process_id.value,
            detect=self.detect.value,
            timeout=self.timeout.value,
        )


def define_flags() -> Flags:
    """Defines the flags."""
    return Flags(
        flags.DEFINE_string(
            "coordinator", None, "HOST:PORT of process 0, to run in several processes."
        ),
        flags.DEFINE_integer(
            "num_processes", None, "With --coordinator: how many there are.", 1
        ),
        flags.DEFINE_integer(
            "process_id", None, "With --coordinator: which one this is, from 0.", 0
        ),
        flags.DEFINE_bool(
            "distributed",
            False,
            "Run in the processes that Slurm, Open MPI, Cloud TPU or GKE has started.",
        ),
        flags.DEFINE_integer(
            "coordinator_timeout", 120, "Seconds to wait for the other processes.", 1
        ),
    )


def make_room() -> None:
    """Gives XLA threads enough for the CPU devices that are simulated.

    Its pool has one for each core, a collective holds one for each device until all
    have come: with fewer threads they wait for ever. Must come before the first use of
    a device.
    """
    devices = jax.config.jax_num_cpu_devices
    if devices > 1:
        os.environ.setdefault("NPROC", str(max(2 * devices, os.cpu_count() or 1)))


def connect(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    detect: bool = False,
    timeout: int = 120,
) -> None:
    """Joins the processes of a run; must come before the first use of a device.

    Args:
      coordinator: HOST:PORT of process 0; None to be alone.
      num_processes: How many there are.
      process_id: Which one this is.
      detect: Ask the cluster instead.
      timeout: Seconds to wait for the others; then the program ends with status 75.

    Raises:
      UserError: Flags that do not go together, or a cluster that JAX does not know.
    """
    if not _check(coordinator, num_processes, process_id, detect):
        return
    who = f"process {process_id} of {num_processes}" if coordinator else "this process"
    where = f"the coordinator {coordinator}" if coordinator else "its cluster"
    message = (
        f"stopped: --coordinator: all processes must meet within {timeout} s, got no"
        f" answer for {who} at {where}. Start the others, or correct the address."
    )
    # JAX would abort the process with a stack of C++, whoever is missing
    watch = threading.Timer(timeout, end_process, (message, REQUEUE))
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        text = str(error).splitlines()[0]
        raise UserError(
            "--distributed: must be in a cluster that JAX knows, got"
            f" {text!r}. {_ALONE}"
            if detect
            else f"--coordinator: must be the address of process 0, got {coordinator}"
            f" ({text}). Correct it."
        ) from error
    finally:
        watch.cancel()


def _check(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    detect: bool,
) -> bool:
    """Returns whether there is something to join."""
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if detect:
        if any(given):
            raise UserError(
                "--distributed: must be alone, got --coordinator, --num_processes or"
                " --process_id beside it. Drop one or the other."
            )
        return True
    if any(given) and not all(given):
        raise UserError(
            "--coordinator: needs --num_processes and --process_id, got"
            f" {coordinator!r}, {num_processes} and {process_id}. {_ALONE}"
        )
    if not any(given):
        return False
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(
            f"--coordinator: must be HOST:PORT, got {coordinator!r}. Write it as"
            " 10.0.0.1:1234."
        )
    if process_id >= num_processes:
        raise UserError(
            f"--process_id: must be in [0, {num_processes - 1}], got {process_id}."
            " Count from 0."
        )
    return True


def is_first() -> bool:
    """Returns whether this process is the one that writes and speaks, process 0.

    Asks without starting a backend, which a lone process may yet want to set up.
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def has_peers() -> bool:
    """Returns whether the program runs in several processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def exchange(value: Any) -> list[Any]:
    """Returns the JSON values of all processes, in their order.

    Every process must call it as often as every other.
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.pad(text, (0, int(sizes.max()) - text.size))
    rows = multihost_utils.process_allgather(padded)
    return [
        json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)
    ]


def together(check: Callable[[], T]) -> T:
    """Runs a check in every process; where one fails, all do.

    Args:
      check: Must not wait for other processes.

    Raises:
      UserError: Its own, or that another process has one.
    """
    failure: Exception | None = None
    result: Any = None
    try:
        result = check()
    except Exception as error:
        failure = error
    messages = exchange(failure and f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    others = {index: text for index, text in enumerate(messages) if text is not None}
    for index, text in others.items():
        raise UserError(f"process {index} of {len(messages)} has stopped: {text}")
    return result


def check_same(about: dict[str, Any]) -> None:
    """Checks that all processes were started alike.

    Args:
      about: JSON values by name, such as the config and the versions.

    Raises:
      UserError: Naming the processes that differ from process 0, and in what.
    """
    first, *others = exchange(about)
    lines = [
        f"process {index}: {line} (in process 0)"
        for index, theirs in enumerate(others, 1)
        for key, value in first.items()
        for line in difference(theirs[key], value, key)
    ]
    if lines:
        raise UserError(
            "processes: must run the same config with the same versions on the same"
            " data, got\n  "
            + "\n  ".join(lines)
            + "\nStart all of them with the same command, on copies of the same files."
        )


def end_process(message: str, status: int) -> None:
    """Ends this process at once, without waiting for the others.

    Python's own way out waits for all processes to shut down together.
    """
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def peer_lost(error: BaseException | None) -> PeerLost | None:
    """Returns what an exception says of a dead peer, None if nothing."""
    if not has_peers():
        return None
    while error is not None:
        lines = str(error).splitlines() or [""]
        of_runtime = isinstance(error, jax.errors.JaxRuntimeError | TimeoutError)
        failed = of_runtime and _OF_PEERS.search(lines[0])
        if failed or _FAILED_EXCHANGE.search(lines[0]):
            return PeerLost(
                f"processes: all must live, got a failed exchange in process"
                f" {jax.process_index()} of {jax.process_count()} ({lines[0]}). Start"
                " the run again; it goes on from its last checkpoint."
            )
        error = error.__cause__ or error.__context__
    return None


def leave_lost_peer(kind: Any, error: BaseException | None, trace: Any) -> None:
    """Ends this process at once where an exception says that a peer is dead.

    For `ExitStack.push`, above what would be closed: closing waits for all processes.
    """
    lost = peer_lost(error)
    if lost is not None:
        end_process(f"stopped: {lost}", lost.status)
