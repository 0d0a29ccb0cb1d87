"""Surgery on a model whose arrays span processes; writes all numbers to a file.

Run as `several_processes.py PROCESSES ID PORT FILE`, once for each ID: 4 devices.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

SCRIPT = Path(__file__).resolve()
DEVICES = 4


def main(processes: int, process_id: int, port: int, path: Path) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES // processes)
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        num_processes=processes,
        process_id=process_id,
        initialization_timeout=60,
    )
    np.savez(path, **numbers())


def numbers() -> dict[str, np.ndarray]:
    """What every step of surgery gives, and what reads a model reads, by name."""
    import optax  # after the distributed runtime: its import must not start a backend
    from flax import nnx
    from meshes import fitting, mesh_of, put, spread
    from two_layers import Net, pure_params

    import lowrank_jax as lr
    from lowrank_jax import placement
    from lowrank_jax.factorization import kernel_matrices
    from lowrank_jax.selection import curves

    mesh = mesh_of((1, 2, 2))
    dense = spread(Net(nnx.Rngs(0)), mesh)
    for layer in (dense.first, dense.groups):
        kernel = layer.kernel
        axes = {kernel.ndim - 2: "fsdp", kernel.ndim - 1: "tensor"}
        kernel.set_value(put(kernel[...], mesh, *fitting(kernel.shape, mesh, axes)))
    assert processes_of(dense.first.kernel) == jax.process_count()
    model = lr.factorize(dense)
    assert processes_of(model.first.factors.u) == jax.process_count()
    lr.set_ranks(model, {"first": 5})
    optimizer = optax.adam(1e-2)
    state = jax.tree.map(lambda x: x + 1, optimizer.init(pure_params(model)))
    state = placement.beside(state, nnx.state(model))
    ranks = lr.tail_ranks(model, threshold=0.5)
    shrunk = lr.shrink(model, ranks, state, optimizer)
    cut = lr.truncate(model, {"first": 3, "groups": [1, 2]})
    even = lr.truncate(model, {"first": 2, "groups": 2})
    found = {
        "factorized": model,
        "shrunk": shrunk.model,
        "state": shrunk.opt_state,
        "canonical": lr.canonicalize(model),
        "cut": cut,
        "gauge": lr.truncate(even, {}, form="gauge"),
        "merged": lr.merge(cut),
        "merged gauge": lr.merge(lr.truncate(even, {}, form="gauge")),
        "read": {
            "ranks": [lr.get_ranks(m) for m in (model, cut)],
            "tail": ranks,
            "energy": lr.ranks_for(model, energy=0.9),
            "importances": curves.column_importances(lr.find_factors(cut)),
            "stable": curves.stable_ranks(kernel_matrices(model)),
            "dense": curves.stable_ranks(kernel_matrices(dense)),
            "effective": [row.effective_rank for row in lr.summary(model).rows],
            "finite": placement.all_finite(model.first.factors.u[...]),
        },
    }
    leaves = jax.tree.leaves_with_path({k: arrays_of(v) for k, v in found.items()})
    return {jax.tree_util.keystr(p): placement.to_host(leaf) for p, leaf in leaves}


def processes_of(array: Any) -> int:
    """Over how many processes an array is spread."""
    return len({device.process_index for device in array.sharding.device_set})


def arrays_of(tree: Any) -> Any:
    from flax import nnx

    if isinstance(tree, nnx.Module):
        return nnx.as_pure(nnx.state(tree))
    return tree


if __name__ == "__main__":
    count, number, port, file = sys.argv[1:]
    main(int(count), int(number), int(port), Path(file))
