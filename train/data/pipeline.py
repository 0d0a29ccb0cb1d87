"""Batches of named arrays: shuffled without end for training, in fixed order to
evaluate.

Training batch number `step` is a pure function of (seed, step): a run resumes at any
step with no iterator state to save. What the arrays mean is the task's affair.
"""

import dataclasses
import functools
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import grain
import numpy as np

from lowrank_jax.errors import UserError
from train import registry
from train.data import DATASETS, sources
from train.report import logs

Batch = dict[str, np.ndarray]
T = TypeVar("T")

SPLITS = ("train", "validation", "test")
# Fixed, so that the held-out examples do not depend on a run's seed.
_VALIDATION_SEED = 20_240


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some rows of a source, in a fixed order."""

    source: sources.Source
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: np.ndarray) -> Batch:
        return self.source.take(self.rows[indices])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set in three disjoint splits.

    Args:
      name: as given to `load_dataset`.
      facts: what the source knows, as JSON (see `sources.RawDataset`).
      splits: the examples of "train", "validation" and "test".
    """

    name: str
    facts: Mapping[str, Any]
    splits: Mapping[str, Subset] = dataclasses.field(repr=False)

    @property
    def sizes(self) -> dict[str, int]:
        """Returns the number of examples by split."""
        return {split: len(subset) for split, subset in self.splits.items()}

    def steps_per_epoch(self, batch_size: int) -> int:
        """Returns the number of full batches in a pass; the remainder is dropped.

        Raises:
          ValueError: `batch_size` is not in [1, training examples].
        """
        size = len(self.splits["train"])
        if not 1 <= batch_size <= size:
            raise UserError(
                f"{self.name}: batch_size must be in [1, {size}] (the training "
                f"examples), got {batch_size}. Change it."
            )
        return size // batch_size

    def train_batches(
        self,
        batch_size: int,
        *,
        seed: int,
        start_step: int = 0,
        rows: np.ndarray | None = None,
    ) -> Iterator[Batch]:
        """Yields batches start_step, start_step + 1, ... without end.

        Args:
          batch_size: examples of a batch, b.
          seed: of the order.
          start_step: the first batch.
          rows: which rows of every batch to read, such as those of this process;
            None for all.

        Returns:
          Dicts of the source's arrays, b rows of each; a new permutation every
          epoch.
        """
        steps_per_epoch = self.steps_per_epoch(batch_size)
        if seed < 0 or start_step < 0:
            raise UserError(
                f"{self.name}: seed and start_step must be at least 0, got seed {seed} "
                f"and start_step {start_step}."
                " Raise them."
            )
        train = self.splits["train"]

        def batch_at(step: int) -> Batch:
            epoch, position = divmod(step, steps_per_epoch)
            order = _epoch_order(seed, epoch, len(train))
            batch = order[position * batch_size :][:batch_size]
            return train.batch(batch if rows is None else batch[rows])

        return _read_in_order(batch_at, start_step, sys.maxsize, train.source.streams)

    def eval_batches(
        self,
        split: str,
        batch_size: int,
        *,
        multiple_of: int = 1,
        rows: np.ndarray | None = None,
    ) -> Iterator[Batch]:
        """Yields every example of `split` once, in fixed order.

        Args:
          split: "train", "validation" or "test".
          batch_size: examples of a batch, b.
          multiple_of: pads every batch to a multiple of this, so that it divides.
          rows: which rows of every (padded) batch to read, rising; None for all.

        Returns:
          Dicts as in training with "weight" float32 (b,): 0 for the rows that pad the
          last batch; elsewhere the source's own weight, 1 if it has none.
        """
        if split not in SPLITS:
            raise KeyError(
                f"{self.name}: split must be one of {SPLITS}, got {split!r}."
                " Choose one."
            )
        subset = self.splits[split]
        if not len(subset):
            raise UserError(
                f"{self.name}: split {split!r} must hold examples, got 0. Set "
                "validation_examples above 0."
            )
        if batch_size < 1:
            raise UserError(
                f"{self.name}: batch_size must be at least 1, got {batch_size}."
            )

        padded_size = -(-batch_size // multiple_of) * multiple_of
        rows = np.arange(padded_size) if rows is None else rows

        def batch_at(step: int) -> Batch:
            start = step * batch_size
            stop = min(start + batch_size, len(subset))
            own = start + rows[rows < stop - start]
            batch = subset.batch(own)
            batch.setdefault("weight", np.ones(len(own), np.float32))
            return {name: _pad(array, len(rows)) for name, array in batch.items()}

        steps = -(-len(subset) // batch_size)
        return _read_in_order(batch_at, 0, steps, subset.source.streams)


def load_dataset(
    name: str | Callable[..., Mapping],
    *,
    data_dir: str = "",
    validation_examples: int = 0,
    train_examples: int = 0,
    args: Mapping[str, Any] | None = None,
) -> Dataset:
    """Opens a data set and holds a validation split out of its training examples.

    Nothing is decoded before the first batch. A split of at most 1 GiB is then decoded
    once per process and kept in memory; a larger one is read as it is needed.

    Args:
      name: "digits" (ships with scikit-learn), the name of a prepared TFDS image
        classification set ("mnist", "cifar10", "cifar10:3.0.2"), one of
        `train.data.DATASETS`, which take args, or a function that
        returns {"train": {name: array, ...}, "test": {...}}, a row an example, and
        under "facts" what else it knows. Names are those that the task reads;
        "weight" is how much an example counts.
      data_dir: where TFDS sets lie; "" means TFDS_DATA_DIR, else
        ~/tensorflow_datasets.
      validation_examples: size of the validation split; which examples it holds
        depends on this number and the data set alone.
      train_examples: how many of the others to learn from, the same ones in every run;
        0 for all.
      args: keyword arguments of the function, or of one of `DATASETS`.

    Raises:
      MissingFile: the set is not prepared in `data_dir`; says how to.
      UserError: arrays that do not fit together, a TFDS set that is not images with
        labels, or nothing left to train on.
    """
    raw = sources.open_dataset(name, data_dir=data_dir, args=args)
    train, validation = _split(raw, validation_examples, train_examples)
    splits = {
        "train": Subset(raw.train, train),
        "validation": Subset(raw.train, validation),
        "test": _whole(raw.test),
    }
    if raw.validation is not None:
        splits["validation"] = _whole(raw.validation)
    return Dataset(raw.name, raw.facts, splits)


def _split(
    raw: sources.RawDataset, validation_examples: int, train_examples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns which rows to learn from, and which are held out of them."""
    size, left = len(raw.train), len(raw.train) - validation_examples
    if raw.validation is not None and validation_examples:
        raise UserError(
            f"{raw.name}: validation_examples must be 0, as the set has a validation"
            f" split of its own, got {validation_examples}. Set it to 0."
        )
    if not 0 <= validation_examples < size:
        raise UserError(
            f"{raw.name}: validation_examples must be in [0, {size - 1}], got "
            f"{validation_examples}. It is taken out of the {size} training examples."
        )
    if not 0 <= train_examples <= left:
        raise UserError(
            f"{raw.name}: train_examples must be in [0, {left}], the training examples"
            f" less those of validation, got {train_examples}. Use 0 for all of them."
        )
    order = np.random.default_rng(_VALIDATION_SEED).permutation(size)
    # Sorted rows read neighbouring records when a set is streamed.
    validation = np.sort(order[:validation_examples])
    train = np.sort(order[validation_examples:][: train_examples or left])
    return train, validation


def complete(
    spec: Mapping[str, Any], *, allow_imports: Sequence[str] | None
) -> dict[str, Any]:
    """Writes out the default arguments of a data set that is a function, named by a
    table or by its import path."""
    known = spec["name"] in DATASETS
    if not known and not _is_import_path(spec["name"]):
        return dict(spec)
    completed = registry.complete(
        {"name": spec["name"], "args": spec["args"]},
        DATASETS,
        supplied={"data_dir"} if known else (),
        allow_imports=allow_imports,
    )
    return {**spec, **completed}


def _whole(source: sources.Source) -> Subset:
    """All rows of a source."""
    return Subset(source, np.arange(len(source)))


def _is_import_path(name: str) -> bool:
    """ "package.module:function", but not "cifar10:3.0.2"."""
    return ":" in name and not name.rpartition(":")[2][:1].isdigit()


def load_data(
    spec: Mapping[str, Any], *, allow_imports: Sequence[str] | None
) -> Dataset:
    """Opens the data set of a config's `data` section.

    Args:
      spec: The section.
      allow_imports: Packages that its name may be imported from; None for any.

    Raises:
      UserError: As `load_dataset`, or the name stands for nothing.
    """
    name = spec["name"]
    if _is_import_path(name):
        name = registry.resolve(name, DATASETS, allow_imports=allow_imports)
    with logs.stage(f"reading data set {spec['name']}"):
        return load_dataset(
            name,
            data_dir=spec["data_dir"],
            validation_examples=spec["validation_examples"],
            train_examples=spec["train_examples"],
            args=spec["args"],
        )


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def _pad(array: np.ndarray, size: int) -> np.ndarray:
    missing = size - len(array)
    return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))


def _read_in_order(
    batch_at: Callable[[int], Batch], start: int, stop: int, streams: bool
) -> Iterator[Batch]:
    """Yields batch_at(start), ..., batch_at(stop - 1).

    What comes from disk is read ahead by grain, several batches at a time.
    """
    if not streams:
        return (batch_at(step) for step in range(start, stop))
    reads = grain.MapDataset.range(start, stop).map(lambda step: batch_at(int(step)))
    return iter(
        reads.to_iter_dataset(grain.ReadOptions(num_threads=8, prefetch_buffer_size=8))
    )


def prefetch(iterator: Iterable[T], size: int = 2) -> Iterator[T]:
    """Runs `iterator` in a background thread, at most `size` items ahead.

    An exception of `iterator` is raised where the item would have come. Closing the
    returned generator stops the thread and closes `iterator`.
    """
    if size < 1:
        raise UserError(f"prefetch: size must be at least 1, got {size}. Raise it.")
    return _prefetch(iterator, size)


def _prefetch(iterator: Iterable[T], size: int) -> Iterator[T]:
    items: queue.Queue = queue.Queue(size)
    stopped = threading.Event()
    end = object()

    def put(item: Any) -> None:
        while not stopped.is_set():
            try:
                return items.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in iterator:
                put((item, None))
                if stopped.is_set():
                    break
            put((end, None))
        except BaseException as error:  # raised again in the consumer
            put((end, error))
        finally:
            if hasattr(iterator, "close"):
                iterator.close()

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stopped.set()
        thread.join()
