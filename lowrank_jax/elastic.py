"""One model at several sizes: chosen call by call, on one set of weights.

Factors are kept rank-major, so that what a size keeps of an array is its beginning,
without gaps. Every size has programs of its own, compiled before the first call, one
for each of a few batch sizes; a call chooses one, and nothing is traced or compiled
then. Everything that has no rank (biases, norms, dense layers) is the same array in all
of them. How a program gets the beginning of an array:

- As a *view*: an array of its own whose memory is the beginning of the other's. Nothing
  is copied in a call but the kernels of convolutions, which XLA turns round. JAX can
  make views of what lies in the memory of the host, so on CPUs.
- As a *slice* of the whole array, in the program. On CPUs XLA copies it in every call,
  or multiplies by it more slowly where there is one row (jax 0.10.2: 2 to 5 times the
  time); what it does on accelerators has not been measured.

Both hold what the largest size holds. The ranks of a size are constants of its
programs, in which nothing is masked.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from lowrank_jax import rank_major
from lowrank_jax.active import check_ranks, rank_limits, set_ranks
from lowrank_jax.errors import UserError, at, raise_all
from lowrank_jax.nnx_internals import split
from lowrank_jax.paths import find_factors, find_rank_arrays
from lowrank_jax.ranked import Rank
from lowrank_jax.ranks import Ranks, RankValue, largest, lowest

Forward: TypeAlias = Callable[..., Any]
"""`forward(model, *inputs)`: arrays whose first axis is the batch."""


class _Size(NamedTuple):
    """A size: its ranks, its factors by key (rank-major), its other arrays, and the
    function of these and the inputs that its programs compile."""

    ranks: dict[str, RankValue]
    factors: dict[str, Array]
    others: list[Array]
    run: Callable[..., Any]


class Elastic:
    """A model in evaluation mode that runs at any of several sizes.

    `elastic(x)` runs the default size, `elastic(x, size="half")` another one; both give
    what `truncate(model, sizes["half"])` gives. Sizes need not be nested in each other:
    each is a prefix of every factor. A batch between two of `batches` is filled up with
    zeros to the next larger one, so rows must not depend on each other, as they do not
    in evaluation. Calls may come from several threads.

    On the device it holds what the largest size holds, and statistics that sizes have
    of their own. It shares arrays with the model that it is made of, so donate none of
    them, and let go of the model, which holds `u` once more.

    Args:
      model: A low-rank model, its arrays on one device.
      sizes: Ranks of each size, by its name; layers that are not named keep theirs. The
        first is the default.
      *example: The model's inputs, arrays or their shapes and dtypes; their first axis
        is the batch.
      batches: How many rows programs are compiled for.
      forward: How to run the model, `model(*inputs)` by default; what it returns has
        the batch as its first axis.
      statistics: `nnx.BatchStat` state of sizes that have their own, as of
        `nnx.state(recalibrate_batch_norm(...), nnx.BatchStat)`; the others have the
        model's.
      views: Whether sizes are views, else slices; None for what the device has.

    Raises:
      UserError: Nothing of the model can be cut, ranks above the active ones, or any
        other unfit argument.

    >>> from lowrank_jax import factorize
    >>> model = factorize(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    >>> x = np.ones((1, 8), np.float32)
    >>> elastic = Elastic(model, {"whole": {}, "half": {"": 2}}, x)
    >>> elastic(x, size="half").shape
    (1, 4)
    """

    def __init__(
        self,
        model: nnx.Module,
        sizes: Mapping[str, Ranks],
        *example: jax.ShapeDtypeStruct | Array | np.ndarray,
        batches: Sequence[int] = (1,),
        forward: Forward = lambda model, *inputs: model(*inputs),
        statistics: Mapping[str, nnx.State] | None = None,
        views: bool | None = None,
    ):
        statistics = statistics or {}
        _check(model, sizes, example, batches, statistics)
        self._batches = sorted(batches)
        self._example = [
            jax.ShapeDtypeStruct(x.shape[1:], jax.dtypes.canonicalize_dtype(x.dtype))
            for x in example
        ]
        ranks = {name: _ranks_of(name, model, given) for name, given in sizes.items()}
        on_cpu = next(iter(_devices(model))).platform == "cpu"
        if views and not on_cpu:
            raise UserError(
                "views: must be of arrays in the host's memory, got a model on"
                f" {_devices(model)}. Leave it out, for slices."
            )
        most = {
            path: max(largest(of[path]) for of in ranks.values())
            for path in find_factors(model)
        }
        self._buffers = factors = rank_major.rank_major(model, most)
        self._sizes = {}
        for name, chosen in ranks.items():
            if views or (views is None and on_cpu):
                factors = rank_major.views(model, self._buffers, chosen)
            statistic = statistics.get(name)
            run, others = _function(model, chosen, statistic, forward, on_cpu)
            self._sizes[name] = _Size(chosen, factors, others, run)
        self._programs = {
            (name, rows): self._compile(one, rows)
            for name, one in self._sizes.items()
            for rows in self._batches
        }
        self.size = next(iter(sizes))

    @property
    def sizes(self) -> dict[str, dict[str, RankValue]]:
        """Returns the ranks of all layers of each size, by its name."""
        return {name: dict(size.ranks) for name, size in self._sizes.items()}

    @property
    def batches(self) -> list[int]:
        """Returns how many rows programs are compiled for, rising."""
        return list(self._batches)

    @property
    def size(self) -> str:
        """The size of calls that name none; another name switches it at once."""
        return self._default

    @size.setter
    def size(self, name: str) -> None:
        self._check_size(name)
        self._default = name

    @property
    def nbytes(self) -> int:
        """Returns the bytes of all weights of all sizes."""
        others = [array for size in self._sizes.values() for array in size.others]
        held = {id(array): array for array in [*self._buffers.values(), *others]}
        return sum(array.nbytes for array in held.values())

    def program(self, size: str, rows: int) -> jax.stages.Compiled:
        """Returns what runs a size on a compiled batch, to look at its memory, say."""
        self._check_size(size)
        if rows not in self._batches:
            raise UserError(
                f"rows: must be one of {self._batches}, which are compiled, got {rows}."
                " Choose one."
            )
        return self._programs[size, rows]

    def __call__(self, *inputs: Array | np.ndarray, size: str | None = None) -> Any:
        """Runs the model.

        Args:
          *inputs: As the example, for a batch of at most the largest compiled one.
          size: Which size; None for the default.

        Returns:
          What the forward function returns, as arrays of NumPy.

        Raises:
          UserError: An unknown size, or inputs that no program is compiled for.
        """
        name = self._default if size is None else size
        self._check_size(name)
        given = [np.asarray(one) for one in inputs]
        count = self._check_inputs(given)
        rows = next(rows for rows in self._batches if rows >= count)
        one = self._sizes[name]
        padded = [_padded(array, rows) for array in given]
        outputs = self._programs[name, rows](one.factors, one.others, *padded)
        return jax.tree.map(lambda array: np.asarray(array)[:count], outputs)

    def _compile(self, size: _Size, rows: int) -> jax.stages.Compiled:
        specs = [jax.ShapeDtypeStruct((rows, *x.shape), x.dtype) for x in self._example]
        lowered = jax.jit(size.run).lower(size.factors, size.others, *specs)
        shapes = [array.shape for array in jax.tree.leaves(lowered.out_info)]
        if not shapes or any(shape[:1] != (rows,) for shape in shapes):
            raise UserError(
                f"forward: must return arrays with a row for each of {rows} inputs, got"
                f" shapes {shapes}. Keep the batch as the first axis."
            )
        return lowered.compile()

    def _check_size(self, name: str) -> None:
        if not isinstance(name, str) or name not in self._sizes:
            raise UserError(
                f"size: must be one of {list(self._sizes)}, got {name!r}. Choose one."
            )

    def _check_inputs(self, inputs: Sequence[np.ndarray]) -> int:
        """Returns how many rows inputs have, if there is a program for them."""
        found = [(x.shape[1:], x.dtype) if x.ndim else (None, x.dtype) for x in inputs]
        wanted = [(x.shape, x.dtype) for x in self._example]
        counts = {len(x) for x in inputs if x.ndim}
        fits = found == wanted and len(counts) == 1
        if not fits or not 1 <= (count := counts.pop()) <= self._batches[-1]:
            shapes = ", ".join(_shown("b", *one) for one in wanted)
            given = ", ".join(f"{x.dtype}{list(x.shape)}" for x in inputs)
            raise UserError(
                f"inputs: must be {shapes} with b in [1, {self._batches[-1]}], got"
                f" {given or 'none'}. Nothing is compiled in a call: send fewer rows at"
                " a time, or make one with larger batches."
            )
        return count


def _check(
    model: nnx.Module,
    sizes: Mapping[str, Ranks],
    example: Sequence[Any],
    batches: Sequence[int],
    statistics: Mapping[str, Any],
) -> None:
    """Raises UserError for arguments that fit no model, and for one without factors."""
    if not isinstance(sizes, Mapping) or isinstance(batches, int):
        raise UserError(
            "sizes, batches: must be a mapping of names to ranks and a list of whole"
            f" numbers, got {sizes!r} and {batches!r}. Give these."
        )
    problems = []
    if not sizes:
        problems.append("sizes: must be at least one, got none. Name its ranks.")
    if not example or not all(getattr(one, "shape", ()) for one in example):
        problems.append(
            "example: must be the model's inputs, each with the batch as its first"
            f" axis, got {example}. Give them."
        )
    whole = all(type(rows) is int and rows > 0 for rows in batches)
    if not batches or not whole or len(set(batches)) < len(batches):
        problems.append(
            "batches: must be whole numbers above 0, none twice, got"
            f" {batches!r}. Give one or more."
        )
    if unknown := [name for name in statistics if name not in sizes]:
        problems.append(
            f"statistics: must be of the sizes {list(sizes)}, got some of {unknown}."
            " Name those."
        )
    if not find_rank_arrays(model):
        problems.append(
            "model: must have factored layers, which alone have lower ranks, got a"
            f" {type(model).__name__} without (merged and gauge-aligned layers have"
            " one rank). Take the model that it was made from."
        )
    for name in statistics.keys() & sizes.keys():
        own, given = _shapes(nnx.state(model, nnx.BatchStat)), _shapes(statistics[name])
        if own != given:
            problems.append(
                f"statistics[{name!r}]: must be a model's nnx.BatchStat state, of"
                f" {own}, got {given}. Give nnx.state(..., nnx.BatchStat) of this one."
            )
    if len(devices := _devices(model)) != 1:
        problems.append(
            "model: must have its arrays on one device, got them on"
            f" {sorted(map(str, devices))}. Put it on one by jax.device_put."
        )
    raise_all(problems)


def _shapes(state: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays of a state by path."""
    return {
        jax.tree_util.keystr(path): np.shape(leaf)
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def _devices(model: nnx.Module) -> set[jax.Device]:
    """The devices that the arrays of a model are on; none where it is abstract."""
    arrays = jax.tree.leaves(nnx.state(model))
    if not all(isinstance(array, jax.Array) for array in arrays):
        return set()
    return set().union(*(array.devices() for array in arrays))


def _ranks_of(name: str, model: nnx.Module, ranks: Ranks) -> dict[str, RankValue]:
    """The ranks of all layers at a size, plain and in the shape of their stacks."""
    active = {path: limits.active for path, limits in rank_limits(model).items()}
    with at(f"sizes[{name!r}]"):
        chosen = check_ranks(model, ranks)
    return {path: lowest(chosen.get(path, rank), rank) for path, rank in active.items()}


def _function(
    model: nnx.Module,
    ranks: Mapping[str, RankValue],
    statistics: nnx.State | None,
    forward: Forward,
    on_cpu: bool,
) -> tuple[Callable[..., Any], list[Array]]:
    """Returns `run(factors, others, *inputs)` of a size, and the others.

    Factors are by key and rank-major, of this size's rank or more. Its ranks are
    constants of the program, in which nothing is masked then.
    """
    model = nnx.clone(model)
    model.eval()
    if statistics is not None:
        nnx.update(model, statistics)
    for found in find_rank_arrays(model).values():
        variable = found.variable
        variable.set_value(jax.ShapeDtypeStruct(variable.shape, variable.dtype))
    graphdef, active, rest = split(model, Rank, ...)
    leaves, tree = jax.tree.flatten(rest)
    others = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

    def run(
        factors: Mapping[str, Array], others: Sequence[Array], *inputs: Array
    ) -> Any:
        given = iter(others)
        filled = [next(given) if isinstance(x, jax.Array) else x for x in leaves]
        model = nnx.merge(graphdef, active, jax.tree.unflatten(tree, filled), copy=True)
        rank_major.put(model, factors, ranks)
        set_ranks(model, ranks)
        if on_cpu:
            rank_major.multiply_from_left(model)
        return forward(model, *inputs)

    return run, others


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    """The array with rows of zeros after its own."""
    if len(array) == rows:
        return array
    padded = np.zeros((rows, *array.shape[1:]), array.dtype)
    padded[: len(array)] = array
    return padded


def _shown(batch: str, shape: Sequence[int], dtype: Any) -> str:
    return f"{dtype}[{', '.join(map(str, (batch, *shape)))}]"
