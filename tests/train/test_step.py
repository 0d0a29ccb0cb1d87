"""One training step by itself: its passes, its losses and its teacher."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from reference import relative_error
from steps import (
    full_teacher,
    log_softmax,
    logits_at,
    matryoshka,
    named,
    step_parts,
)

from lowrank_jax import checkpoint
from lowrank_jax.active import set_ranks
from train.state import model_state_of


class TestDistillation:
    @pytest.mark.parametrize("target_weight", [0.0, 0.25])
    @pytest.mark.parametrize("passes_loss", ["mean", "sum"])
    @pytest.mark.parametrize("weights", [(), (0.5, 2.0, 3.0)])
    def test_losses_by_numpy(self, target_weight, passes_loss, weights):
        """The first pass learns from the labels, the others from it and the labels."""
        fractions = (1.0, 0.5, 0.25)
        network, _, state, batch, step = step_parts(
            "mlp",
            matryoshka(*fractions),
            teacher=full_teacher(target_weight),
            passes_loss=passes_loss,
            pass_weights=weights,
        )
        logs_of = [
            log_softmax(logits_at(network, f, batch["image"])) for f in fractions
        ]
        labels = np.asarray(batch["label"])
        hard = [-one[np.arange(6), labels].mean() for one in logs_of]
        soft = [-(np.exp(logs_of[0]) * one).sum(-1).mean() for one in logs_of]
        others = [
            target_weight * h + (1 - target_weight) * s
            for h, s in zip(hard[1:], soft[1:], strict=True)
        ]
        _, metrics = step(state, batch)
        found = [float(metrics[f"loss_pass_{n}"]) for n in range(3)]
        np.testing.assert_allclose(found, [hard[0], *others], rtol=1e-5)
        first, *weighed = np.multiply([hard[0], *others], weights or (1, 1, 1))
        added = np.mean(weighed) if passes_loss == "mean" else np.sum(weighed)
        np.testing.assert_allclose(metrics["loss"], first + added, rtol=1e-5)

    def test_the_teacher_gets_no_gradient(self):
        """The gradient is that of the formula with the targets as constants."""
        network, structure, state, batch, step = step_parts(
            "mlp", matryoshka(1.0, 0.5), teacher=full_teacher()
        )
        targets = jnp.asarray(
            np.exp(log_softmax(logits_at(network, 1.0, batch["image"]))), jnp.float32
        )
        half = {"head": 5, "hidden/0": 8}

        def formula(params: Any) -> jax.Array:
            model = structure.merge(params, state.model_state, jax.random.key(0))
            full = jax.nn.log_softmax(model(batch["image"]))
            loss = -full[jnp.arange(6), batch["label"]].mean()
            set_ranks(model, half)
            student = jax.nn.log_softmax(model(batch["image"]))
            return loss - (targets * student).sum(axis=-1).mean()

        expected = jax.grad(formula)(state.params)
        before = jax.tree.map(np.array, state.params)
        after, _ = step(state, batch)
        for key, gradient in checkpoint.flatten(expected).items():
            old = checkpoint.flatten(before)[key]
            new = checkpoint.flatten(after.params)[key]
            assert relative_error(old - np.asarray(new), gradient) < 2e-5, key

    def test_a_full_pass_is_added_to_a_sampler_without_one(self):
        sampler = named("uniform_fraction", fractions=(0.25,))
        network, _, state, batch, step = step_parts(
            "mlp", sampler, teacher=full_teacher()
        )
        full, quarter = (
            log_softmax(logits_at(network, f, batch["image"])) for f in (1.0, 0.25)
        )
        _, metrics = step(state, batch)
        expected = -(np.exp(full) * quarter).sum(axis=-1).mean()
        np.testing.assert_allclose(metrics["loss_pass_1"], expected, rtol=1e-5)

    def test_the_first_pass_alone_updates_batch_norm(self):
        network, _, state, batch, step = step_parts(
            "convnet", matryoshka(1.0, 0.5, 0.25)
        )
        alone = nnx.clone(network)
        alone.train()
        alone(batch["image"])
        expected = checkpoint.flatten(model_state_of(alone))
        before = {
            k: np.array(x) for k, x in checkpoint.flatten(state.model_state).items()
        }
        after, _ = step(state, batch)
        found = checkpoint.flatten(after.model_state)
        assert found.keys() == expected.keys() and found
        for key, array in expected.items():
            assert relative_error(found[key], array) < 1e-6, key
            assert np.any(before[key] != np.asarray(found[key])), key


class TestAccumulation:
    @pytest.mark.parametrize(
        "sampler",
        [
            named("sandwich", passes=3, smallest=0.5),
            named("per_example", batch_size=6),
        ],
        ids=lambda sampler: sampler["name"],
    )
    def test_parts_make_the_step_of_the_whole_batch(self, sampler):
        """A part counts by the weight of its examples; a row runs at its own rank."""
        updates, losses = [], []
        for parts in (1, 3):
            _, _, state, batch, step = step_parts("mlp", sampler, parts=parts)
            batch["weight"] = jnp.arange(6, dtype=jnp.float32)
            state, metrics = step(state, batch)
            updates.append(ravel_pytree(state.params)[0])
            losses.append(metrics["loss"])
        assert relative_error(updates[1], updates[0]) <= 1e-6
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
