"""SVD training (Yang et al., 2020): orthogonal factors, sparse scales, energy pruning.

Command:  python -m train.main --config=configs/svd_training.py --workdir=runs/svd
Variants: :l1 for L1 instead of Hoyer, :spatial for k x 1 and 1 x k convolutions,
          :sparsity=0.1,energy=1e-3 for other weights, :cifar10 for ResNet-20,
          :cifar10,depth=32 (or 56, 18)
Hardware: 2 CPU cores
Time:     1 minute
Result:   docs/results.md, the table of all methods

Four phases: full rank with orthogonality; sparsity on s; energy pruning; fine-tuning
without sparsity. On CIFAR-10 the published recipe (Adam 1e-3, batch 100, 164 epochs,
x0.1 at 81 and 122, the paper's weight of Hoyer and removed energy by depth; fc stays
dense). How the epochs fall on the phases is our reading: 41 and 123, then 164 of
fine-tuning; so are the weights for ResNet-18, which the paper does not have.
"""

import functools

from ml_collections import ConfigDict

from configs import common
from lowrank_jax.errors import UserError

LENET = {"hoyer": (0.05, 0.03), "l1": (0.01, 0.03)}
"""Weight and removed energy for LeNet, chosen on held-out images (docs/LOG.md)."""

HOYER = {18: (0.03, 0.03), 20: (0.1, 0.1), 32: (0.03, 0.005), 56: (0.001, 0.003)}
"""Weight for ResNets, channel-wise and spatial-wise."""


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config; `sparsity` is the weight on s, `energy` the removed share."""
    options = common.options(
        arg,
        cifar10=common.Option(False, "ResNet on CIFAR-10"),
        l1=common.Option(False, "L1 on s in the place of Hoyer"),
        spatial=common.Option(False, "k x 1 and 1 x k convolutions"),
        depth=common.Option(20, "with cifar10: of the ResNet, 18, 20, 32 or 56"),
        sparsity=common.Option(float, "weight of the penalty on s"),
        energy=common.Option(float, "share of the energy that is pruned"),
    )
    smoke, cifar10 = options["smoke"], options["cifar10"]
    depth, spatial = options["depth"], options["spatial"]
    if cifar10 and depth not in HOYER:
        raise UserError(
            f"config argument: depth must be of {sorted(HOYER)}, got {depth}."
            " Choose one."
        )
    config = common.resnet(depth, batch_size=100) if cifar10 else common.mnist_lenet()
    layer = {"with_s": True, "scheme": 2 if spatial else 0}
    config.rank_rules = ((r"(.*/)?(conv|stem|shortcut).*", layer),) + (
        (("head", "dense"),) if cifar10 else ((".*", {"with_s": True}),)
    )
    kind = "l1" if options["l1"] else "hoyer"
    default = LENET[kind]
    if cifar10:
        weight = 0.3 if kind == "l1" else HOYER[depth][spatial]
        default = weight, 3e-6 if kind == "hoyer" and not spatial else 0.1
    given = options["sparsity"], options["energy"]
    sparsity, energy = (
        b if a is None else a for a, b in zip(given, default, strict=True)
    )
    config.phases = _phases(kind, sparsity, energy, cifar10=cifar10, smoke=smoke)
    return config


def _phases(kind: str, sparsity: float, energy: float, *, cifar10: bool, smoke: bool):
    """Orthogonality in all, sparsity in the second; pruning at its end."""
    orthogonality = common.named("orthogonality", weight=1.0)
    prune = (
        common.named("canonicalize"),
        common.named("truncate", selector=common.named("energy", value=1 - energy)),
    )
    if cifar10:
        epochs = (41, 123, 164)
        prune = (*prune, common.named("recalibrate", batches=50))
        optimizers = tuple(
            common.optimizer("adam", learning_rate=1e-3, schedule=schedule)
            for schedule in (
                common.named("constant", warmup_steps=0),
                common.steps_down(factor=0.1, at_fractions=(40 / 123, 81 / 123)),
                common.steps_down(factor=0.1, at_fractions=(81 / 164, 122 / 164)),
            )
        )
    else:
        epochs = (2, 2, 2)
        # Hoyer's gradient grows as s falls: without clipping one seed of three diverged
        make = functools.partial(
            common.lenet_optimizer, weight_decay=0.0, clip_norm=1.0
        )
        optimizers = (
            make(constant=True),
            make(constant=True, warmup_steps=0),
            make(),
        )
    lengths = [common.length(n, smoke=smoke) for n in epochs]
    return (
        common.phase(
            name="full_rank",
            until=lengths[0],
            penalties=(orthogonality,),
            optimizer=optimizers[0],
        ),
        common.phase(
            name="sparsify",
            until=lengths[1],
            penalties=(orthogonality, common.named(kind, weight=sparsity)),
            optimizer=optimizers[1],
            optimizer_state="kept",
            on_end=prune,
        ),
        common.phase(
            name="fine_tune",
            until=lengths[2],
            penalties=(orthogonality,),
            optimizer=optimizers[2],
            on_end=(common.named("canonicalize"),),
        ),
    )
