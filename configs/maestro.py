"""Maestro (Horvath et al., 2024): ordered dropout, group lasso, shrinking every epoch.

Command:  python -m train.main --config=configs/maestro.py --workdir=runs/maestro
Variants: :lasso=2.5e-3 for another lambda, :dense for dense under the same recipe,
          :compare for the recipe of the table of all methods, :cifar10 for ResNet-18
          and :cifar10,vgg for VGG-19
Hardware: 2 CPU cores
Time:     2 minutes on an idle machine
Result:   LeNet on MNIST, test accuracy 98.4 with 32 % of the parameters (dense: 98.9)

On CIFAR-10 the published recipe: SGD 0.1, x0.1 at half and three quarters of 300
epochs, batch 128, lambda 16e-6, threshold 1e-5 after every epoch.
"""

from ml_collections import ConfigDict

from configs import common
from lowrank_jax.errors import UserError


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config; `lasso` is the papers' lambda."""
    options = common.options(
        arg,
        lasso=common.Option(float, "lambda of the group lasso"),
        dense=common.Option(False, "dense, under the same recipe"),
        compare=common.Option(False, "the recipe of the table of all methods"),
        cifar10=common.CIFAR10,
        vgg=common.Option(False, "with cifar10: VGG-19"),
    )
    smoke, dense, cifar10 = options["smoke"], options["dense"], options["cifar10"]
    if options["vgg"] and not cifar10:
        raise UserError(
            f"config argument: vgg needs cifar10 beside it, got {arg!r}. Add it."
        )
    lambdas = {"lenet": 2**-4 / 100, "compare": 2**-3 / 100, "cifar10": 16e-6}
    setting = "cifar10" if cifar10 else "compare" if options["compare"] else "lenet"
    lasso = lambdas[setting] if options["lasso"] is None else options["lasso"]
    config = common.resnet(18, batch_size=128) if cifar10 else common.mnist_lenet()
    if options["vgg"]:
        config.model = common.named("vgg", depth=19)
    epochs, optimizer = (
        15,
        common.lenet_optimizer(constant=True, warmup_steps=0, learning_rate=0.01),
    )
    if setting == "cifar10":
        epochs, optimizer = 300, common.cifar10_sgd()
    elif setting == "compare":
        epochs, optimizer = common.LENET_EPOCHS, common.lenet_optimizer()
    config.rank_rules = ((".*", "dense" if dense else "full"),)
    penalty = common.named("hierarchical_group_lasso", weight=lasso)
    shrink = {"every_epochs": 1, "every_steps": 0, "threshold": 1e-5, "multiple": 1}
    # published: every cut at once; compiling a small network takes epochs of it
    shrink["least_share"] = 0.0 if cifar10 else 0.25
    config.phases = (
        common.phase(
            name="maestro",
            until=common.length(epochs, smoke=smoke),
            sampler=common.named("full" if dense else "single_layer"),
            penalties=() if dense else (penalty,),
            optimizer=optimizer,
            shrink={} if dense else shrink,
        ),
    )
    return config
