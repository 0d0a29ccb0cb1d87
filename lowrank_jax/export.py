"""Models as files of other programs: safetensors, and StableHLO.

A safetensors file has the arrays, and in its header what a checkpoint says of itself:
the ranks, the rules that make the structure, and what the caller adds. A StableHLO
artefact (`jax.export`) is a program with the weights inside, for a batch of any size;
whatever runs StableHLO runs it, without this library. Both need packages that
`pip install 'lowrank_jax[export]'` brings.
"""

import functools
import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import export

from lowrank_jax import placement
from lowrank_jax.active import set_ranks
from lowrank_jax.contents import at_ranks, contents, differences, flatten, model_items
from lowrank_jax.errors import MissingFile, UserError
from lowrank_jax.metadata import check_metadata
from lowrank_jax.nnx_internals import split
from lowrank_jax.paths import Model, find_factors, find_rank_arrays
from lowrank_jax.pieces import check_seal
from lowrank_jax.ranks import largest, name_of

_MISREAD = (AttributeError, KeyError, TypeError, ValueError, RecursionError)
"""What a file of another kind may raise where it is read, beside safetensors' own;
mistakes named by our own checks are among them."""
PLATFORMS = ("cpu", "cuda", "tpu")
_ABOUT = "lowrank_jax"  # the header's key for all that a checkpoint says of itself


def _extra(name: str) -> Any:
    """Returns a module of the extra `export`.

    Raises:
      UserError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"lowrank_jax.export: must have the package {name.partition('.')[0]}, got"
            " an environment without it. Run pip install 'lowrank_jax[export]'."
        ) from error


class Tensors(NamedTuple):
    """A safetensors file of this library.

    Args:
      arrays: By `item/path`.
      metadata: What it says about itself, as a checkpoint does.
    """

    arrays: Mapping[str, np.ndarray]
    metadata: dict[str, Any]


def save_safetensors(
    path: str | os.PathLike,
    model: nnx.Module,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model as a safetensors file, all or nothing.

    The header's "ranks" are the active ranks by path, in JSON, for whoever reads it
    without this library.

    Args:
      path: The file; one that is there is replaced.
      model: The model, with what is allocated of its factors.
      metadata: JSON values to add, such as the config.

    Raises:
      OSError: It could not be written; what was there is there still.
      UserError: Two arrays have one path.
    """
    tensors = _extra("safetensors.numpy")
    flat, about = contents(0, model, metadata or {}, None, None)
    arrays = {
        f"{item}/{key}": np.ascontiguousarray(placement.to_host(array))
        for item, leaves in flat.items()
        for key, array in leaves.items()
    }
    header = {
        "format": "flax",
        "ranks": json.dumps(about["ranks"]),
        _ABOUT: json.dumps(about),
    }
    partial = Path(path).with_name(f".{Path(path).name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(tensors.save(arrays, metadata=header))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_safetensors(path: str | os.PathLike) -> Tensors:
    """Reads a file of `save_safetensors`: its header is checked, nothing is executed.

    Raises:
      UserError: It is not there, or not such a file.
    """
    if not Path(path).is_file():
        raise MissingFile(
            f"file: must be a safetensors file, got {path}, which is not there. Name"
            " one."
        )
    safetensors, tensors = _extra("safetensors"), _extra("safetensors.numpy")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
        about = json.loads(header[_ABOUT])
        check_seal(about)
        check_metadata(about)
        arrays = tensors.load_file(path)
        _check_arrays(arrays, about)
    except (safetensors.SafetensorError, *_MISREAD) as error:
        raise UserError(
            f"file: must be a safetensors file of this library, got {path}"
            f" ({type(error).__name__}: {error}). Export it anew."
        ) from error
    return Tensors(arrays, about)


def load_safetensors(path: str | os.PathLike, model: Model) -> Model:
    """Returns a model with the arrays and ranks of a file of `save_safetensors`.

    Args:
      path: The file.
      model: The model's structure, abstract or not, factorized by the same rules
        (`Tensors.metadata["rank_rules"]`).

    Raises:
      UserError: As `read_safetensors`, or it is of another model; every difference is
        named.
    """
    arrays, about = read_safetensors(path)
    if about["max_ranks"].keys() != find_factors(model).keys():
        raise UserError(
            f"file {path}: low-rank layers must be {sorted(find_factors(model))}, as in"
            f" the model, got {sorted(about['max_ranks'])}. Factorize it by the rules"
            " in the file."
        )
    graphdef, params, rest = split(model, nnx.Param, ...)
    template = at_ranks(model, nnx.as_pure(params), about["max_ranks"])
    items = {"params": template, "model_state": model_items(model)["model_state"]}
    problems = [
        problem
        for name, tree in items.items()
        for problem in differences(name, flatten(tree), about)
    ]
    if problems:
        raise UserError(
            f"file {path}: must be of this model, got {'; '.join(problems)}. Load it"
            " into the model it was made from."
        )
    filled = {name: _filled(name, tree, arrays) for name, tree in items.items()}
    model = nnx.merge(graphdef, filled["params"], rest, copy=True)
    nnx.update(model, filled["model_state"])
    set_ranks(model, about["ranks"])
    return model


def to_stablehlo(
    model: nnx.Module,
    *example: jax.ShapeDtypeStruct | jax.Array,
    platforms: Sequence[str] = PLATFORMS,
    any_rank: bool = False,
) -> bytes:
    """Returns a model as a StableHLO program, its weights inside, in evaluation mode.

    Orders of contraction are those of a large batch.

    Args:
      model: The model; cut and merged as it shall run.
      *example: Its inputs; their first axis is the batch, of any size in the program.
      platforms: What it shall run on.
      any_rank: Make one program for all ranks of 1 and more. It takes the factors as
        its first argument, `factor_arrays` of the model cut to some ranks, and the
        inputs after it; the other weights are inside. All layers run factored.

    Raises:
      UserError: No example, one without a batch, or a model that is not for batches of
        any size.
    """
    if not example or not all(getattr(one, "shape", ()) for one in example):
        raise UserError(
            "example: must be the model's inputs, each with the batch as its first"
            f" axis, got {example}. Give them."
        )
    _extra("flatbuffers")
    given = [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in example]
    model = nnx.clone(model)
    model.eval()
    nnx.eval_shape(lambda model, *inputs: model(*inputs), model, *given)
    graphdef, state = nnx.split(model)

    def forward(given: Mapping[str, jax.Array], *inputs: jax.Array) -> Any:
        model = nnx.merge(graphdef, state, copy=True)
        if any_rank:
            _put_factors(model, given)
        return model(*inputs)

    layers = find_factors(model)
    names = ["batch", *(f"rank{number}" for number in range(len(layers)))]
    batch, *ranks = export.symbolic_shape(",".join(names))
    specs: list[Any] = [
        jax.ShapeDtypeStruct((batch, *one.shape[1:]), one.dtype) for one in example
    ]
    function: Callable[..., Any] = functools.partial(forward, {})
    if any_rank:
        by_path = dict(zip(layers, ranks, strict=True))
        function, specs = forward, [_at_ranks(model, by_path), *specs]
    try:
        exporting = export.export(jax.jit(function), platforms=list(platforms))
        return bytes(exporting(*specs).serialize())
    except (jax.errors.InconclusiveDimensionOperation, TypeError) as error:
        raise UserError(
            f"model: must run on batches of any size, got {type(error).__name__}:"
            f" {error}. Write it without decisions about the batch, and with"
            " inputs.shape[0] for len(inputs)."
        ) from error


def factor_arrays(model: nnx.Module) -> dict[str, jax.Array]:
    """Returns the factors of a cut model, as a program of any rank takes them.

    Raises:
      UserError: A layer is masked, or has no columns.
    """
    layers = find_factors(model)
    for path, factors in layers.items():
        if not 0 < factors.max_rank <= largest(factors.get_rank()):
            raise UserError(
                f"{name_of(path)}: rank must be at least 1, and all that is allocated,"
                f" for a program of any rank, got {factors.get_rank()} of"
                f" {factors.max_rank}. Cut the model to such ranks."
            )
    return {key: x.variable[...] for key, x in find_rank_arrays(model).items()}


def _put_factors(model: nnx.Module, given: Mapping[str, jax.Array]) -> None:
    """Puts factors of any rank in the place of a model's own, all of them active."""
    for key, array in find_rank_arrays(model).items():
        array.variable.set_value(given[key])
    for factors in find_factors(model).values():
        shape = factors.stack_shape
        factors.rank.set_value(jax.numpy.full(shape, factors.max_rank, np.int32))


def _at_ranks(model: nnx.Module, ranks: Mapping[str, Any]) -> Any:
    """The shapes of the factors at ranks that are symbols."""
    specs = {}
    for key, array in find_rank_arrays(model).items():
        shape = list(array.variable.shape)
        for axis in array.axes:
            shape[axis] = ranks[array.layer]
        specs[key] = jax.ShapeDtypeStruct(tuple(shape), array.variable.dtype)
    return specs


def from_stablehlo(program: bytes) -> Any:
    """Returns the function that a program of `to_stablehlo` is: inputs to outputs.

    Raises:
      UserError: It is something else.
    """
    _extra("flatbuffers")
    try:
        return export.deserialize(bytearray(program)).call
    except Exception as error:  # the parser's own, of many kinds
        raise UserError(
            f"program: must be one of to_stablehlo, got {len(program):,} bytes"
            f" ({type(error).__name__}). Export it anew."
        ) from error


def _check_arrays(arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Raises UserError unless the arrays are those that the header speaks of."""
    stored = {key: [list(x.shape), str(x.dtype)] for key, x in arrays.items()}
    named = {
        f"{item}/{key}": value
        for item, leaves in about["arrays"].items()
        for key, value in leaves.items()
    }
    if stored != named:
        different = [key for key in stored | named if stored.get(key) != named.get(key)]
        raise UserError(
            f"arrays: must be those that the header names, got others at {different}."
        )


def _filled(name: str, tree: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The tree with the file's arrays in the place of its own."""

    def array(key_path: Any, leaf: Any) -> jax.Array:
        key = jax.tree_util.keystr(key_path, simple=True, separator="/")
        return jax.numpy.asarray(arrays[f"{name}/{key}"])

    return jax.tree.map_with_path(array, tree)
