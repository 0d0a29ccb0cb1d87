"""The training step: sample ranks, one or more passes, penalties, update; one jit."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from lowrank_jax.active import set_ranks
from lowrank_jax.paths import find_factors
from lowrank_jax.penalties import Penalty
from lowrank_jax.projections import Projection
from lowrank_jax.samplers import RankSampler, SampledRanks
from train.state import Structure, TrainState, model_state_of

Batch = Mapping[str, Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def normalize(
    mean: Sequence[float], std: Sequence[float]
) -> Callable[[UInt8[Array, "b x y c"]], Float[Array, "b x y c"]]:
    """Pixels to numbers of mean 0 and deviation 1, by constants per channel."""
    shift, scale = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)

    def prepare(images: UInt8[Array, "b x y c"]) -> Float[Array, "b x y c"]:
        shape = (1,) * (images.ndim - 1) + (-1,)
        return (images.astype(jnp.float32) - shift.reshape(shape)) / scale.reshape(
            shape
        )

    return prepare


def make_train_step(
    structure: Structure,
    optimizer: optax.GradientTransformation,
    sampler: RankSampler,
    penalties: Sequence[Penalty],
    prepare: Callable[[PRNGKeyArray, Array], Array],
    root_key: PRNGKeyArray,
    *,
    distill: bool = False,
    label_weight: float = 1.0,
    passes_loss: str = "mean",
    projections: Sequence[Projection] = (),
    trainable: re.Pattern[str] | None = None,
    phase_start: int = 0,
) -> Step:
    """The jitted step of a phase.

    Loss of the first pass: cross-entropy with the labels. Of each further one: the
    same, or when distilling `label_weight` times that plus `1 - label_weight` times the
    cross-entropy with the first pass's softmax, through which no gradient flows
    (Horvath et al., 2021). The first pass is the full model whenever there are several;
    it alone updates BatchNorm, the others use their own batch statistics.

    Args:
      structure: The model's structure.
      optimizer: Of the phase.
      sampler: Of the phase.
      penalties: Added to the loss.
      prepare: From a key and the batch's pixels to the model's input.
      root_key: Everything random in step n comes from `fold_in(root_key, n)`.
      distill: Train sampled passes towards the full pass; adds one if there is none.
      label_weight: Share of the labels in a distilled pass, in [0, 1].
      passes_loss: Whether the "mean" or the "sum" of the further passes' losses is
        added to the first's.
      projections: Applied to the factors after the update.
      trainable: Parameters whose whole path matches are trained, None for all. The
        others get no gradient and no update; their moments go on as after a zero
        gradient.
      phase_start: Step at which the phase began; penalties and projections count from
        there.
    """

    def freeze(tree: Any, frozen: Callable[[Array], Array]) -> Any:
        def one(key_path: Any, leaf: Array) -> Array:
            key = jax.tree_util.keystr(key_path, simple=True, separator="/")
            return leaf if trainable.fullmatch(key) else frozen(leaf)

        return tree if trainable is None else jax.tree.map_with_path(one, tree)

    def project(params: Any, state: TrainState) -> Any:
        if not projections:
            return params
        model = structure.merge(params, state.model_state, root_key)
        factors = find_factors(model)
        for projection in projections:
            projection(factors, state.step - phase_start)
        return nnx.as_pure(nnx.state(model, nnx.Param))

    def loss_of(params: Any, state: TrainState, batch: Batch, passes: Any, key: Any):
        params = freeze(params, jax.lax.stop_gradient)
        image_key, model_key = jax.random.split(key)
        inputs, labels = prepare(image_key, batch["image"]), batch["label"]
        losses, teacher, first_logits, new_state = [], None, None, None
        for ranks in passes:
            model = structure.merge(params, state.model_state, model_key)
            set_ranks(model, ranks)
            logits = model(inputs)
            loss = _cross_entropy(logits, labels)
            if teacher is None:
                first_logits, new_state = logits, model_state_of(model)
                teacher = jax.lax.stop_gradient(jax.nn.softmax(logits))
            elif distill:
                soft = optax.softmax_cross_entropy(logits, teacher).mean()
                loss = label_weight * loss + (1 - label_weight) * soft
            losses.append(loss)
        others = losses[1:]
        share = 1 / len(others) if others and passes_loss == "mean" else 1
        total = losses[0] + share * sum(others)
        factors = find_factors(model)
        phase_step = state.step - phase_start
        penalty = sum((p(factors, phase_step) for p in penalties), jnp.float32(0))
        accuracy = jnp.mean(jnp.argmax(first_logits, axis=-1) == labels)
        metrics = {"loss": total, "penalty": penalty, "accuracy": accuracy}
        metrics |= {f"loss_pass_{n}": loss for n, loss in enumerate(losses)}
        return total + penalty, (new_state, metrics)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        rank_key, key = jax.random.split(jax.random.fold_in(root_key, state.step))
        ranks, sampler_state = sampler.sample(state.sampler_state, rank_key)
        passes = _passes(ranks, sampler)
        if distill and not sampler.full_first:
            passes.insert(0, {})  # the structure's own ranks, all that is allocated
        grads, (model_state, metrics) = jax.grad(loss_of, has_aux=True)(
            state.params, state, batch, passes, key
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = freeze(updates, jnp.zeros_like)
        params = project(optax.apply_updates(state.params, updates), state)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        new = TrainState(state.step + 1, params, model_state, opt_state, sampler_state)
        return new, metrics

    return jax.jit(step, donate_argnums=0)


def _passes(ranks: SampledRanks, sampler: RankSampler) -> list[SampledRanks]:
    if sampler.passes == 1:
        return [ranks]
    return [
        {path: rank[n] for path, rank in ranks.items()} for n in range(sampler.passes)
    ]


def _cross_entropy(
    logits: Float[Array, "b o"], labels: Int[Array, " b"]
) -> Float[Array, ""]:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
