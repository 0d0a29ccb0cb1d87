"""BSR (Eo et al., 2021): beam search for ranks, then a modified stable rank aimed at
them.

Command:  python -m train.main --config=configs/bsr.py --workdir=runs/bsr
Variants: :fraction=0.125 for another budget, :weight=0.1 for the penalty's,
          :cifar10 for ResNet-56
Hardware: 2 CPU cores
Time:     1 minute
Result:   docs/results.md, the table of all methods

Three phases: dense training; the stable-rank penalty on the factors, at full rank,
towards the ranks that the beam chose for this share of the MACs; fine-tuning at these
ranks. Details of the beam and the weight are our reading, the paper's are not public.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config; `fraction` is the share of the dense MACs to keep."""
    options = common.options(
        arg,
        cifar10=common.Option(False, "ResNet-56 on CIFAR-10"),
        fraction=common.Option(0.25, "budget, as a share of the dense MACs"),
        weight=common.Option(float, "of the penalty"),
    )
    smoke, cifar10 = options["smoke"], options["cifar10"]
    config = common.resnet(56, batch_size=128) if cifar10 else common.mnist_lenet()
    config.rank_rules = ((".*", "dense"),)
    make = common.cifar10_sgd if cifar10 else common.lenet_optimizer
    default = 0.01 if cifar10 else 0.1
    weight = default if options["weight"] is None else options["weight"]
    epochs = (100, 100, 100) if cifar10 else (2, 2, 2)
    beam = common.named(
        "beam", measure="macs", fraction=options["fraction"], width=3, steps=20
    )
    stable_rank = common.named(
        "modified_stable_rank",
        weight=weight,
        target_ranks="selected",
        power=2,
        every_steps=20 if cifar10 else 1,
    )
    recalibrate = (common.named("recalibrate", batches=50),) if cifar10 else ()
    config.phases = (
        common.phase(
            name="pretrain",
            until=common.length(epochs[0], smoke=smoke),
            optimizer=make(),
            on_end=(
                common.named("factorize", rules=((".*", "full"),)),
                common.named("select", selector=beam),
            ),
        ),
        common.phase(
            name="stable_rank",
            until=common.length(epochs[1], smoke=smoke),
            penalties=(stable_rank,),
            optimizer=make(constant=True, warmup_steps=0),
            optimizer_state="kept",
            on_end=(
                common.named("canonicalize"),
                common.named("truncate", selector=common.named("selected")),
                *recalibrate,
            ),
        ),
        common.phase(
            name="fine_tune",
            until=common.length(epochs[2], smoke=smoke),
            optimizer=make(),
            on_end=(common.named("canonicalize"),),
        ),
    )
    return config
