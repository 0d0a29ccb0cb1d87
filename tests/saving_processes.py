"""One of several processes that save and read checkpoints, started by a test.

`python tests/saving_processes.py PORT COUNT INDEX TASK FOLDER ...`: the processes form
a mesh of two devices each. The tasks: `save` writes steps 1 and 2, `damage` turns over
a bit of what the last process wrote of step 2, `read` prints the digest of the latest
step that can be read, and the errors of those that cannot.
"""

import hashlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lowrank_jax import checkpoint, factorize
from lowrank_jax.errors import DamagedCheckpoint

SPECS = {"u": ("data", None), "v": (None, "data")}


def build() -> nnx.Module:
    return factorize(nnx.Dict(layer=nnx.Linear(24, 16, rngs=nnx.Rngs(0))))


def sharding(mesh: jax.sharding.Mesh, path: tuple) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-1]
    return NamedSharding(mesh, PartitionSpec(*SPECS.get(name, ())))


def digest(tree) -> str:
    """Of all numbers, wherever they are."""
    whole = hashlib.sha256()
    for key, array in sorted(checkpoint.flatten(tree).items()):
        values = multihost_utils.process_allgather(array, tiled=True)
        whole.update(key.encode() + np.asarray(values).tobytes())
    return whole.hexdigest()


def save(folder: str, mesh: jax.sharding.Mesh) -> None:
    graphdef, params, rest = nnx.split(build(), nnx.Param, ...)
    params = jax.tree.map_with_path(
        lambda path, x: jax.device_put(x, sharding(mesh, path)), nnx.as_pure(params)
    )
    writer = checkpoint.CheckpointWriter(folder, keep=2)
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    for step in (1, 2):
        items = {"local": {"step": jnp.int32(step)}}  # each process has one of its own
        writer.save(step, nnx.merge(graphdef, params, rest, copy=True), {}, items)
        print(f"step {step}: {digest(params)}")
        params = bump(params)
    writer.close()


def damage(folder: str, mesh: jax.sharding.Mesh) -> None:
    if jax.process_index() == 0:
        file = Path(folder) / f"2/params/process_{jax.process_count() - 1}.bin"
        data = bytearray(file.read_bytes())
        data[5] ^= 1
        file.write_bytes(data)
    multihost_utils.sync_global_devices("damaged")


def read(folder: str, mesh: jax.sharding.Mesh) -> None:
    graphdef, params, rest = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
    templates = jax.tree.map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding(mesh, path)
        ),
        nnx.as_pure(params),
    )
    model = nnx.merge(graphdef, templates, rest)
    for path in checkpoint.complete_steps(folder):
        try:
            found = checkpoint.load(checkpoint.open_checkpoint(path), model)
        except DamagedCheckpoint as error:
            print(f"damaged: {error}")
            continue
        params = checkpoint.model_items(found)["params"]
        print(f"step {path.name}: {digest(params)}")
        return


if __name__ == "__main__":
    port, count, index, *tasks = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 2)
    if int(count) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
    mesh = jax.make_mesh((2 * int(count),), ("data",), axis_types=(AxisType.Auto,))
    for task, folder in zip(tasks[::2], tasks[1::2], strict=True):
        {"save": save, "damage": damage, "read": read}[task](folder, mesh)
