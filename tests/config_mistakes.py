"""A good config of one phase, and its mistakes: keys, types, values and names."""

import math
from typing import Any

import support

from configs import common


def make_config() -> dict[str, Any]:
    """A good config of one phase, as plain values."""
    phase = common.phase(
        name="only",
        until={"steps": 4},
        sampler={"name": "full", "args": {}},
        optimizer=common.optimizer("sgd", learning_rate=0.1),
    )
    model = {"name": "mlp", "args": {"hidden": (4,)}}
    return support.make_config(phase, model=model, checkpoint_every_epochs=2, seed=0)


def named(name: str, **args: Any) -> dict[str, Any]:
    return {"name": name, "args": args}


SHRINK = {
    "every_epochs": 1,
    "every_steps": 0,
    "threshold": 1e-3,
    "multiple": 1,
    "least_share": 0.0,
}
RANKS = {"head": 4, "hidden/0": 4}

# what is wrong: place, value (or several of them), parts of the message
MISTAKES: dict[str, tuple[str | dict[str, Any], Any, tuple[str, ...]]] = {
    "unknown key": (
        "sede",
        1,
        ("config: every key must be known", "'sede'. Did you mean 'seed'?"),
    ),
    "unknown key of data": (
        "data/batchsize",
        1,
        ("config.data: every key must be", "'batchsize'. Did you mean 'batch_size'?"),
    ),
    "unknown key of a phase": (
        "phases/0/epochs",
        3,
        ("config.phases[0]: every key must be", "'epochs'"),
    ),
    "unknown key of an optimizer": (
        "phases/0/optimizer/momentum",
        0.9,
        ("config.phases[0].", "optimizer: every key must be", "'momentum'"),
    ),
    "unknown key of a schedule": (
        "phases/0/optimizer/schedule/warmup",
        1,
        ("config.phases[0].", "schedule: every key must be", "'warmup'"),
    ),
    "missing key": ("seed", ..., ("config: must have", "'seed'")),
    "missing key of a phase": (
        "phases/0/sampler",
        ...,
        ("config.phases[0]: must have", "'sampler'"),
    ),
    "text for a number": (
        "data/batch_size",
        "many",
        ("config.data.batch_size: must be of type int", "'many'"),
    ),
    "bool for a number": ("seed", True, ("config.seed: must be of type int", "True")),
    "number for a mapping": ("model", 3, ("config.model: must be a mapping", "3")),
    "phase that is no mapping": ("phases/0", 3, ("config.phases[0]: must be", "3")),
    "value that is no JSON": (
        "model/args/hidden",
        {1},
        ("config.model.args.hidden: must hold JSON", "a set"),
    ),
    "negative seed": ("seed", -1, ("seed", "-1")),
    "no batch": ("data/batch_size", 0, ("config.data.batch_size", "at least 1", "0")),
    "batch above the data": ("data/batch_size", 261, ("batch_size", "260", "261")),
    "too much validation": (
        "data/validation_examples",
        1437,
        ("validation_examples", "1436", "1437"),
    ),
    "never logged": ("log_every_steps", 0, ("config.log_every_steps", "got 0")),
    "no such precision": (
        "compute_dtype",
        "float16",
        ("config.compute_dtype", "bfloat16", "got 'float16'"),
    ),
    "no step at all": ("steps_per_call", 0, ("config.steps_per_call", "got 0")),
    "negative epochs": ("eval_every_epochs", -1, ("config.eval_every_epochs", "-1")),
    "negative steps": ("eval_every_steps", -1, ("config.eval_every_steps", "-1")),
    "nothing kept": ("keep_checkpoints", 0, ("config.keep_checkpoints", "got 0")),
    "fraction of zero": ("eval_fractions", [1.0, 0], ("config.eval_fractions", "0]")),
    "fraction above one": ("eval_fractions", [1.5], ("config.eval_fractions", "1.5")),
    "fraction that is text": (
        "eval_fractions",
        ["1"],
        ("config.eval_fractions", "'1'"),
    ),
    "deviation of zero": ("task/args/std", [0.0], ("config.task: ", "[0.0]")),
    "deviation that is text": ("task/args/std", ["a"], ("config.task: ", "['a']")),
    "mean of three channels": (
        "task/args/mean",
        [1.0, 2.0, 3.0],
        ("config.task: ", "3.0"),
    ),
    "deviation of three channels": (
        "task/args/std",
        [1.0, 2.0, 3.0],
        ("config.task: ",),
    ),
    "mean that is text": ("task/args/mean", ["a"], ("config.task: ", "'a'")),
    "no phases": ("phases", [], ("config.phases: must hold at least one",)),
    "phase without length": (
        "phases/0/until",
        {},
        ("config.phases[0] (only)", "until", "{}"),
    ),
    "phase of two lengths": (
        "phases/0/until",
        {"steps": 3, "epochs": 1},
        (
            "config.phases[0] (only)",
            "until",
        ),
    ),
    "phase of no steps": ("phases/0/until", {"steps": 0}, ("(only): until", "0")),
    "phase of half a step": (
        "phases/0/until",
        {"steps": 0.5},
        ("(only): until", "0.5"),
    ),
    "passes_loss": ("phases/0/passes_loss", "max", ("(only): passes_loss", "'max'")),
    "pass weights": (
        "phases/0/pass_weights",
        [1, -1],
        ("(only): pass_weights", "at least 0", "[1, -1]"),
    ),
    "a weight for each pass": (
        "phases/0/pass_weights",
        [1.0, 0.5],
        ("(only): pass_weights", "each of 1 passes", "[1.0, 0.5]"),
    ),
    "sizes": ("phases/0/sizes", "cut", ("(only): sizes", "'cut'")),
    "incomplete shrink": (
        "phases/0/shrink",
        {"every_epochs": 1},
        ("config.phases[0] (only)", "shrink", "threshold"),
    ),
    "shrink never": (
        "phases/0/shrink",
        {**SHRINK, "every_epochs": 0},
        ("config.phases[0] (only)", "shrink", "at least 1"),
    ),
    "shrink by both clocks": (
        "phases/0/shrink",
        {**SHRINK, "every_steps": 10},
        ("config.phases[0] (only)", "one of every_epochs and every_steps", "10"),
    ),
    "shrink backwards": (
        "phases/0/shrink",
        {**SHRINK, "every_epochs": 0, "every_steps": -1},
        ("config.phases[0] (only)", "one of every_epochs and every_steps", "-1"),
    ),
    "shrink of text": (
        "phases/0/shrink",
        {**SHRINK, "threshold": "small"},
        ("config.phases[0] (only)", "shrink", "'small'"),
    ),
    "shrink that waits for all": (
        "phases/0/shrink",
        {**SHRINK, "least_share": 1.0},
        ("config.phases[0] (only)", "least_share must be in [0, 1)", "1.0"),
    ),
    "shrink every half epoch": (
        "phases/0/shrink",
        {**SHRINK, "every_epochs": "1"},
        ("config.phases[0] (only)", "shrink", "'1'"),
    ),
    "rule that is no pair": ("rank_rules", [".*"], ("config.rank_rules", "'.*'")),
    "rule that matches nothing": (
        "rank_rules",
        [["haed", "dense"], ["hiden/.", "full"], [".*", "full"]],
        ("config.rank_rules", "'haed'", "'hiden/.'", "'hidden/0'"),
    ),
    "layers without a rule": (
        "rank_rules",
        [["no_such_layer|x", "full"]],
        ("config.rank_rules: every layer must be covered", "'head'", "'hidden/0'"),
    ),
    "rule that is no pattern": (
        "rank_rules",
        [["(", "full"]],
        ("config.rank_rules", "'('"),
    ),
    "unknown kind of rule": (
        "rank_rules",
        [[".*", "ful"]],
        ("config.rank_rules", "'ful'"),
    ),
    "negative rank": (
        "rank_rules",
        [[".*", {"max_rank": -1}]],
        ("config.rank_rules", "head", "hidden/0", "-1"),
    ),
    "half a rank": ("rank_rules", [[".*", {"max_rank": 2.5}]], ("rank_rules", "2.5")),
    "rank fraction of two": (
        "rank_rules",
        [[".*", {"rank_fraction": 2.0}]],
        ("config.rank_rules", "head", "2.0"),
    ),
    "unknown model": (
        "model/name",
        "mpl",
        (
            "config.model: name: must be a known name or an import path"
            " 'package.module:function', got 'mpl'. Did you mean 'mlp'?",
        ),
    ),
    "model of no package": (
        "model/name",
        "no_such_package_h7:net",
        ("config.model: name", "no_such_package_h7"),
    ),
    "unknown argument of a model": (
        "model/args/hiden",
        [3],
        ("config.model: args", "'hiden'", "hidden"),
    ),
    "unknown sampler": (
        "phases/0/sampler/name",
        "sandwhich",
        (
            "config.phases[0] (only)",
            "sampler: name",
            "got 'sandwhich'. Did you mean 'sandwich'?",
        ),
    ),
    "unknown argument of a sampler": (
        "phases/0/sampler",
        named("sandwich", pases=3),
        ("config.phases[0] (only)", "sampler: args", "'pases'", "'passes'"),
    ),
    "bad argument of a sampler": (
        "phases/0/sampler",
        named("sandwich", passes=1),
        ("config.phases[0] (only)", "sampler", "passes must be in [2, 64]", "1"),
    ),
    "missing argument of a sampler": (
        "phases/0/sampler",
        named("geometric"),
        ("config.phases[0] (only)", "sampler: args", "decay"),
    ),
    "bad fraction of a sampler": (
        "phases/0/sampler",
        named("uniform_fraction", fractions=[0.5, 1.5]),
        ("config.phases[0] (only)", "1.5"),
    ),
    "family of other layers": (
        "phases/0/sampler",
        named("family", profiles=[{"head": 2}]),
        ("config.phases[0] (only)", "family", "hidden/0"),
    ),
    "family above the rank": (
        "phases/0/sampler",
        named("family", profiles=[{**RANKS, "head": 9}]),
        ("config.phases[0] (only)", "head", "[0, 4]", "9"),
    ),
    "ranks of another batch": (
        "phases/0/sampler",
        named("per_example", batch_size=64),
        ("config.phases[0] (only)", "config.data.batch_size 65", "64"),
    ),
    "unknown teacher": (
        "phases/0/teacher/name",
        "me",
        ("config.phases[0] (only)", "teacher: name", "'me'", "full", "none"),
    ),
    "bad label weight": (
        "phases/0/teacher",
        named("full", target_weight=2.0),
        ("config.phases[0] (only)", "teacher", "target_weight", "2.0"),
    ),
    "unknown penalty": (
        "phases/0/penalties",
        [named("laso", weight=1.0)],
        ("config.phases[0] (only)", "penalties", "'laso'", "hierarchical_group_lasso"),
    ),
    "negative penalty": (
        "phases/0/penalties",
        [named("group_lasso", weight=-1.0)],
        ("(only)", "penalties", "-1.0"),
    ),
    "penalty without arguments": (
        "phases/0/penalties",
        [{"name": "group_lasso"}],
        ("config.phases[0] (only)", "penalties", "'args'"),
    ),
    "unknown optimizer": (
        "phases/0/optimizer/name",
        "sdg",
        ("config.phases[0] (only)", "optimizer: name", "'sdg'. Did you mean 'sgd'?"),
    ),
    "unknown argument of an optimizer": (
        "phases/0/optimizer/args",
        {"momentun": 0.9},
        ("config.phases[0] (only)", "optimizer: args", "'momentun'", "'momentum'"),
    ),
    **{
        f"learning rate of {value}": (
            "phases/0/optimizer/learning_rate",
            value,
            (place, str(value)),
        )
        for value, place in (
            (-0.1, "config.phases[0] (only): optimizer: learning_rate: must be"),
            (math.nan, "config.phases[0].optimizer.learning_rate: must be a finite"),
            (math.inf, "config.phases[0].optimizer.learning_rate: must be a finite"),
        )
    },
    "unknown schedule": (
        "phases/0/optimizer/schedule/name",
        "linear",
        ("config.phases[0] (only)", "schedule: name", "'linear'", "cosine"),
    ),
    "missing argument of a schedule": (
        "phases/0/optimizer/schedule",
        named("cosine", warmup_steps=1),
        ("config.phases[0] (only)", "schedule: args", "final_fraction"),
    ),
    "decayed that is no pattern": (
        "phases/0/optimizer/decayed",
        "(",
        ("config.phases[0] (only)", "optimizer: decayed", "'('"),
    ),
    "unknown augmentation": (
        "task/args/augment",
        [["random_crob", {"padding": 1}]],
        ("augment[0]", "'random_crob'. Did you mean 'random_crop'?"),
    ),
    "bad argument of an augmentation": (
        "task/args/augment",
        [["random_flip", {}], ["random_crop", {"padding": 0}]],
        ("augment[1]", "padding", "0"),
    ),
    "augmentation without mapping": (
        "task/args/augment",
        [["random_crop", 3]],
        ("augment", "random_crop", "3"),
    ),
    "data of no package": (
        "data/name",
        "no_such_package_h7:data",
        ("config.data: name", "no_such_package_h7"),
    ),
    "arguments for digits": ("data/args", {"size": 3}, ("digits", "'size'")),
    "name that is no data set": ("data/name", "../digits", ("data set", "'../digits'")),
}
