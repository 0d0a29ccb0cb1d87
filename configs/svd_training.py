"""SVD training (Yang et al., 2020): orthogonal factors, sparse scales, energy pruning.

Command:  python -m train.main --config=configs/svd_training.py --workdir=runs/svd
Variants: :l1 for L1 instead of Hoyer, :spatial for k x 1 and 1 x k convolutions,
          :sparsity=0.1,energy=1e-3 for other weights, :cifar10 for ResNet-20
Hardware: 2 CPU cores
Time:     1 minute
Result:   docs/results.md, the table of all methods

Four phases: full rank with orthogonality; sparsity on s; energy pruning; fine-tuning
without sparsity. On CIFAR-10 the published recipe for ResNet-20 (Adam 1e-3, batch 100,
164 epochs, x0.1 at 81 and 122; Hoyer 0.1, removed energy 3e-6; fc stays dense); how its
epochs fall on the phases is our reading: 164 of orthogonality and sparsity from the
start, then 164 of fine-tuning.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """The config; `sparsity` is the weight on s, `energy` the removed share."""
    options = common.options(
        arg, cifar10=False, l1=False, spatial=False, sparsity=0.0, energy=0.0
    )
    smoke, cifar10 = options["smoke"], options["cifar10"]
    kind = "l1" if options["l1"] else "hoyer"
    default = {"hoyer": (0.1, 3e-6), "l1": (0.3, 0.1)} if cifar10 else LENET
    sparsity = options["sparsity"] or default[kind][0]
    energy = options["energy"] or default[kind][1]
    config = common.resnet(20, batch_size=100) if cifar10 else common.mnist_lenet()
    scheme = 2 if options["spatial"] else 0
    config.rank_rules = (
        *((("head", "dense"),) if cifar10 else ()),
        ("(.*/)?(conv|stem|shortcut).*", {"with_s": True, "scheme": scheme}),
        *(() if cifar10 else ((".*", {"with_s": True}),)),
    )
    orthogonality = common.named("orthogonality", weight=1.0)
    sparse = (orthogonality, common.named(kind, weight=sparsity))
    prune = (
        common.named("canonicalize"),
        common.named("truncate", selector=common.named("energy", value=1 - energy)),
    )

    def phase(name, epochs, penalties, optimizer, **more):
        until = common.length(epochs, smoke=smoke)
        return common.phase(
            name=name, until=until, penalties=penalties, optimizer=optimizer, **more
        )

    last = (common.named("canonicalize"),)
    if cifar10:
        steps = common.steps_down(factor=0.1, at_fractions=(81 / 164, 122 / 164))
        adam = common.optimizer("adam", learning_rate=1e-3, schedule=steps)
        prune = (*prune, common.named("recalibrate", batches=50))
        config.phases = (
            phase("sparsify", 164, sparse, adam, on_end=prune),
            phase("fine_tune", 164, (orthogonality,), adam, on_end=last),
        )
        return config
    early = common.lenet_optimizer(constant=True, weight_decay=0.0)
    sequel = common.lenet_optimizer(constant=True, warmup_steps=0, weight_decay=0.0)
    late = common.lenet_optimizer(weight_decay=0.0)
    config.phases = (
        phase("full_rank", 2, (orthogonality,), early),
        phase("sparsify", 2, sparse, sequel, optimizer_state="kept", on_end=prune),
        phase("fine_tune", 2, (orthogonality,), late, on_end=last),
    )
    return config


LENET = {"hoyer": (0.1, 0.03), "l1": (0.01, 0.03)}
"""Weight and removed energy for LeNet, chosen on held-out images (docs/LOG.md)."""
