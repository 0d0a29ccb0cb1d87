"""What the binaries share: how they start, and how a user's mistake ends them."""

import sys
from collections.abc import Callable

from absl import app, logging

from train.loop import Interrupted


def run(main: Callable[[], None]) -> None:
    """Runs a binary; a user's mistake ends it with its message, not a traceback."""

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"flags must begin with --, got {argv[1:]}.")
        logging.set_verbosity(logging.WARNING)  # orbax tells every file at INFO
        try:
            main()
        except (ValueError, FileNotFoundError, FileExistsError) as error:
            logging.debug("where it came from", exc_info=True)
            sys.exit(f"error: {error}")
        except (FloatingPointError, Interrupted) as error:
            sys.exit(f"stopped: {error}")

    app.run(guarded)
