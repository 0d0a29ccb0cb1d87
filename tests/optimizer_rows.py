"""The table of optimizers: what of each is cut, and what starts anew."""

import jax
import optax


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def by_size(params):
    return jax.tree.map(lambda leaf: "wide" if leaf.ndim > 1 else "thin", params)


ELEMENTWISE = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(1e-2),
    "adamw, masked": optax.adamw(1e-2, weight_decay=0.1, mask=matrices),
    "lion": optax.lion(1e-3),
    "nadam": optax.nadam(1e-2),
    "rmsprop": optax.rmsprop(1e-2),
    "rmsprop, centered": optax.rmsprop(1e-2, centered=True, momentum=0.9),
    "rmsprop, corrected": optax.rmsprop(1e-2, bias_correction=True),
    "adagrad": optax.adagrad(0.1),
    "amsgrad": optax.amsgrad(1e-2),
    "adabelief": optax.adabelief(1e-2),
    "clip by value": optax.chain(optax.clip(1e-2), optax.adam(1e-2)),
    "clip by global norm": optax.chain(
        optax.clip_by_global_norm(0.1),
        optax.adamw(optax.cosine_decay_schedule(0.01, 20)),
    ),
    "injected": optax.inject_hyperparams(optax.adam)(
        learning_rate=optax.linear_schedule(0.01, 0.001, 10)
    ),
    "multi steps": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "schedule free": optax.contrib.schedule_free_adamw(1e-2, warmup_steps=2),
    "ema": optax.chain(optax.adam(1e-2), optax.ema(0.9)),
    "apply if finite": optax.apply_if_finite(optax.adam(1e-2), 3),
    "partitioned": optax.partition(
        {"wide": optax.adam(1e-2), "thin": optax.sgd(0.1, momentum=0.9)}, by_size
    ),
}
RESTARTED = {
    "adafactor": (optax.adafactor(1e-2), ["FactoredState"]),
    "muon": (optax.contrib.muon(1e-2), ["MuonState"]),
    "adafactor in a chain": (
        optax.chain(
            optax.ema(0.9), optax.adafactor(1e-2, multiply_by_parameter_scale=False)
        ),
        ["FactoredState"],
    ),
}
