"""What every task must hold, a row each."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import relative_error
from task_rows import ROWS, SIZE, batch_of, every_task, make, outputs_of

from lowrank_jax.errors import UserError
from train.tasks import TASKS


def test_every_task_has_a_row():
    assert set(TASKS) <= {row.name for row in ROWS.values()}


@every_task
def test_the_example_fits_the_model_and_the_inputs(row):
    """One unit goes through as a batch does, whatever JSON has made of the model's
    arguments."""
    task, batch = make(row), batch_of(row.facts, SIZE)
    args = json.loads(json.dumps(task.model_args))
    model = row.model(**args, rngs=nnx.Rngs(0))
    for key in (None, jax.random.key(0)):
        inputs = task.inputs(batch, key)
        assert [(x.ndim, x.dtype) for x in inputs] == [
            (x.ndim, x.dtype) for x in task.example
        ]
        assert {len(x) for x in inputs} == {SIZE}
    assert {len(x) for x in task.example} == {1}
    outputs = nnx.eval_shape(lambda *example: model(*example), *task.example)
    unit = () if task.unit == "example" else (1,)
    assert outputs.shape == (1, *unit, 5)
    outputs = nnx.eval_shape(lambda *inputs: model(*inputs), *inputs)
    assert outputs.shape == (SIZE, *row.outputs)
    loss = jax.eval_shape(lambda: task.loss(model(*inputs), batch))
    assert loss.shape == ()


@every_task
def test_inputs_change_with_a_key_alone(row):
    task, batch = make(row), batch_of(row.facts, SIZE)
    plain, again = task.inputs(batch, None)[0], task.inputs(batch, None)[0]
    first, same, second = (
        task.inputs(batch, jax.random.key(seed))[0] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(plain, again)
    np.testing.assert_array_equal(first, same)
    for other in (plain, second):
        assert np.array_equal(first, other) != row.augments


@every_task
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_its_sum_by_weight(row, weighted):
    task, batch, outputs = make(row), batch_of(row.facts, SIZE), outputs_of(row)
    weight = jnp.arange(SIZE) / 4 if weighted else jnp.ones(SIZE)
    if weighted:
        batch["weight"] = weight
    sums = task.sums(outputs, batch)
    assert sums["weight"] == jnp.sum(weight * row.counted(batch))
    loss = task.loss(outputs, batch)
    assert relative_error(sums["loss"] / sums["weight"], loss) <= 1e-6
    figures = task.figures(sums)
    assert relative_error(figures["loss"], loss) <= 1e-6
    assert task.headline in figures and "weight" not in figures
    assert all(type(figure) is float for figure in figures.values())


@every_task
def test_a_weight_of_one_changes_nothing(row):
    task, batch, outputs = make(row), batch_of(row.facts, SIZE), outputs_of(row)
    ones = {**batch, "weight": jnp.ones(SIZE)}
    teacher = outputs_of(row, seed=2)
    for function in (task.loss, lambda *args: task.distill(args[0], teacher, args[1])):
        assert relative_error(function(outputs, ones), function(outputs, batch)) <= 1e-6
    assert task.figures(task.sums(outputs, ones)) == task.figures(
        task.sums(outputs, batch)
    )


@every_task
def test_rows_of_weight_zero_change_nothing(row):
    """In the loss, in what a pupil learns, in the gradients and in the figures."""
    task, outputs, teacher = make(row), outputs_of(row), outputs_of(row, seed=2)
    batch = batch_of(row.facts, SIZE)
    batch["weight"] = jnp.asarray([1.0, 0.5, 2.0, 1.0, 0.0, 0.0])
    kept = {name: array[:4] for name, array in batch.items()}

    def losses(outputs, teacher, batch):
        return jnp.stack(
            [task.loss(outputs, batch), task.distill(outputs, teacher, batch)]
        )

    found, expected = (
        losses(outputs, teacher, batch),
        losses(outputs[:4], teacher[:4], kept),
    )
    assert relative_error(found, expected) <= 1e-6
    assert row.counted(batch)[:4].sum() > 0
    gradients = jax.jacrev(losses)(outputs, teacher, batch)
    assert (gradients[:, 4:] == 0).all() and (gradients[:, :4] != 0).any()
    figures = task.figures(task.sums(outputs, batch))
    for name, figure in task.figures(task.sums(outputs[:4], kept)).items():
        assert relative_error(figures[name], figure) <= 1e-6


@every_task
def test_a_part_in_which_nothing_counts_adds_nothing(row):
    """It is one of several, of equal size, when gradients are accumulated."""
    task, outputs, teacher = make(row), outputs_of(row), outputs_of(row, seed=2)
    batch = {**batch_of(row.facts, SIZE), "weight": jnp.zeros(SIZE)}

    def losses(outputs):
        return task.loss(outputs, batch) + task.distill(outputs, teacher, batch)

    loss, gradient = jax.value_and_grad(losses)(outputs)
    assert loss == 0 and (gradient == 0).all()
    with pytest.raises(UserError, match="data: must hold something that counts"):
        task.figures(task.sums(outputs, batch))


@every_task
def test_sums_add_up_over_batches(row):
    task, batch, outputs = make(row), batch_of(row.facts, SIZE), outputs_of(row)
    whole = task.figures(task.sums(outputs, batch))
    parts = [
        task.sums(outputs[part], {name: array[part] for name, array in batch.items()})
        for part in (slice(0, 3), slice(3, SIZE))
    ]
    added = task.figures(jax.tree.map(lambda *parts: sum(parts), *parts))
    assert whole.keys() == added.keys()
    for name in whole:
        assert relative_error(added[name], whole[name]) <= 1e-6


@every_task
def test_a_pupil_learns_to_agree_with_its_teacher(row):
    """Where both agree the loss is least, and its gradient zero."""
    task, batch, teacher = make(row), batch_of(row.facts, SIZE), outputs_of(row)
    distill = lambda outputs: task.distill(outputs, teacher, batch)  # noqa: E731
    assert jnp.abs(jax.grad(distill)(teacher)).max() <= 1e-7
    assert jnp.abs(jax.grad(distill)(outputs_of(row, seed=2))).max() >= 1e-3
    for seed in range(2, 6):
        assert distill(teacher) < distill(outputs_of(row, seed=seed))
        assert distill(teacher) < distill(teacher + 0.1 * outputs_of(row, seed=seed))


@every_task
def test_the_headline_says_which_is_better(row):
    task, batch = make(row), batch_of(row.facts, SIZE)
    good, bad = (
        task.figures(task.sums(outputs, batch))
        for outputs in (row.perfect(batch), outputs_of(row))
    )
    assert good["loss"] < bad["loss"]
    assert (good[task.headline] > bad[task.headline]) == task.higher_is_better
    assert good[task.headline] != bad[task.headline]


@every_task
def test_tasks_are_traced(row):
    """Under jit as outside it; figures alone are made of numbers."""
    task, batch, outputs = make(row), batch_of(row.facts, SIZE), outputs_of(row)
    key = jax.random.key(0)
    traced, plain = jax.jit(task.inputs)(batch, key), task.inputs(batch, key)
    for ours, theirs in zip(traced, plain, strict=True):
        assert relative_error(ours, theirs) <= 1e-6
    jitted = jax.jit(task.sums)(outputs, batch)
    for name, value in task.sums(outputs, batch).items():
        assert relative_error(jitted[name], value) <= 1e-6
