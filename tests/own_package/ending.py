"""A binary that ends in each of several ways, `--end` says in which."""

from absl import flags
from ml_collections import config_flags

from lowrank_jax.errors import MissingFile, UserError
from train import binary
from train.stopping import Interrupted, NotFinite


def _fail(error: Exception) -> None:
    raise error


def _disk() -> None:
    with open("/dev/full", "w") as file:
        file.write("0")


def _driver() -> None:
    try:
        raise ValueError("RESOURCE_EXHAUSTED: ... [os_error_code='28']")
    except ValueError as error:
        raise RuntimeError("save failed") from error


ENDS = {
    "": lambda: print("done"),
    "user": lambda: _fail(UserError("--rank: must be >= 0, got -1. Raise it.")),
    "missing": lambda: _fail(MissingFile("--checkpoint: must be there, got x.")),
    "value": lambda: _fail(ValueError("a bug in my model")),
    "file": lambda: _fail(FileNotFoundError("a bug in my data")),
    "stopped": lambda: _fail(Interrupted("stopped at step 3; run it again.")),
    "nan": lambda: _fail(NotFinite("loss: must be finite, got NaN at step 3.")),
    "disk": _disk,
    "driver": _driver,
}

if __name__ == "__main__":
    _END = flags.DEFINE_string("end", "user", "What to end with.")
    config_flags.DEFINE_config_file("config", None, "Config.")
    binary.run(lambda: ENDS[_END.value](), examples=("own_package.ending --end=user",))
