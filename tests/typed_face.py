"""A user's script, for type checkers: what the public face returns is known.

Never run. A wrong call that a checker does not see is an error too, by the `type:
ignore` beside it, which must not be unused.
"""

from typing import assert_type

import jax
import optax
from flax import nnx

import lowrank_jax as lr


class MyModel(nnx.Module):
    """Somebody's model."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(6, 16, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self.up(inputs)

    def width(self) -> int:
        return 16


def script() -> None:
    """What the user wrote."""
    model = lr.factorize(MyModel(rngs=nnx.Rngs(0)))
    assert_type(model, MyModel)
    assert_type(model.width(), int)

    small = lr.truncate(model, lr.ranks_for(model, params_fraction=0.5))
    assert_type(small, MyModel)
    assert_type(lr.merge(small), MyModel)
    assert_type(lr.canonicalize(model), MyModel)

    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    assert_type(lr.shrink(model, {"up": 2}, optimizer).model, MyModel)

    lr.checkpoint.save("saved", model)
    saved = lr.checkpoint.open_checkpoint("saved")
    assert_type(lr.checkpoint.load(saved, model, ranks={"up": 2}), MyModel)

    assert_type(lr.find_factors(model), dict[str, lr.Factors])
    assert_type(lr.summary(model).stored, int)
    assert_type(lr.__version__, str)
    with lr.at_ranks(model, {"up": 3}):
        assert_type(model(jax.numpy.ones((1, 6))), jax.Array)

    lr.factorize(3)  # type: ignore[type-var]  # no model
    lr.truncate(model, "half")  # type: ignore[arg-type]  # no ranks
    lr.truncate(model, {"up": 2}, shape="gauge")  # type: ignore[call-arg]  # no option
