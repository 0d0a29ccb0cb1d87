"""Trains a config: `python -m train.main --config=configs/X.py --workdir=DIR`.

Ends with one line of JSON: `{"workdir", "step", "frontier": [...]}`.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from train import logs
from train import train as train_lib

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with :argument after it (such as :smoke)."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; the same command goes on with a stopped run."
)


def run(main) -> None:
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
        except (FloatingPointError, train_lib.Interrupted) as error:
            sys.exit(f"stopped: {error}")

    app.run(guarded)


def _main() -> None:
    result = train_lib.train_and_evaluate(_CONFIG.value, _WORKDIR.value)
    logs.emit({"workdir": _WORKDIR.value, **result})


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    run(_main)
