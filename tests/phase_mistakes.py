"""What the phases of a config can get wrong; its layers are low-rank, without `s`."""

from typing import Any

from config_mistakes import named

BEAM = named("beam", measure="params", fraction=0.5, width=1, steps=2)
FIRST = "(only)"
KEPT = "config.phases[1] (only): optimizer_state"


def penalties(name: str, **args: Any) -> list[dict[str, Any]]:
    return [named(name, **args)]


def ends_with(name: str, **args: Any) -> list[dict[str, Any]]:
    return [named(name, **args)]


MISTAKES: dict[str, tuple[str | dict[str, Any], Any, tuple[str, ...]]] = {
    "penalty on s without s": (
        "phases/0/penalties",
        penalties("hoyer", weight=0.1),
        (FIRST, "head", "with_s"),
    ),
    "target rank above the layer's": (
        "phases/0/penalties",
        penalties("modified_stable_rank", weight=1.0, target_ranks={"head": 5}),
        (FIRST, "head", "4", "5"),
    ),
    "target ranks of another layer": (
        "phases/0/penalties",
        penalties("modified_stable_rank", weight=1.0, target_ranks={"had": 2}),
        (FIRST, "had", "hidden/0"),
    ),
    "targets that nobody selects": (
        "phases/0/penalties",
        penalties("modified_stable_rank", weight=1.0, target_ranks="selected"),
        ("(only)", "penalties", "'selected'", "'select'"),
    ),
    "unknown projection": (
        "phases/0/projections",
        penalties("spectral_norm"),
        ("config.phases[0] (only)", "projections: name", "stable_rank_normalization"),
    ),
    "unknown condition": (
        "phases/0/until",
        {"steps": 4, "condition": named("bored")},
        ("until: name", "stable_ranks_stand_still", "'bored'"),
    ),
    "arguments of a condition": (
        "phases/0/until",
        {"steps": 4, "condition": named("stable_ranks_stand_still", every_steps=0)},
        ("until", "every_steps", "0"),
    ),
    "a condition without a limit": (
        "phases/0/until",
        {"condition": named("stable_ranks_stand_still", every_steps=1)},
        ("(only): until", "'steps'"),
    ),
    "to an epoch that is over": (
        "phases/1/until",
        {"to_epoch": 1},
        ("(only)", "until", "step 4", "Raise it"),
    ),
    "another optimizer that is kept": (
        {"phases/1/optimizer_state": "kept", "phases/1/optimizer/clip_norm": 1.0},
        None,
        (KEPT, "'kept'", "clip_norm"),
    ),
    "a state that is kept from nothing": (
        "phases/0/optimizer_state",
        "kept",
        ("config.phases[0] (only)", "optimizer_state", "'new'"),
    ),
    "an optimizer state of another word": (
        "phases/0/optimizer_state",
        "old",
        ("(only): optimizer_state", "one of 'new', 'kept', got 'old'"),
    ),
    "no parameter to train": (
        "phases/0/trainable",
        ["kernel"],
        (FIRST, "trainable", "'kernel'", "head/factors/u"),
    ),
    "a pattern that is none": (
        "phases/0/trainable",
        ["("],
        ("config.phases[0] (only)", "trainable", "regular expression", "'('"),
    ),
    "nothing to train": ("phases/0/trainable", [], ("(only): trainable", "[]")),
    "unknown action": (
        "phases/0/on_end",
        ends_with("distil"),
        ("config.phases[0] (only)", "on_end: name", "canonicalize", "'distil'"),
    ),
    "rules of an action without a layer": (
        "phases/0/on_end",
        [named("merge"), named("factorize", rules=[["bod", "full"], [".*", "dense"]])],
        (FIRST, "on_end (factorize)", "'bod'", "hidden/0"),
    ),
    "share of energy of an action": (
        "phases/0/on_end",
        ends_with("truncate", selector=named("energy", value=1.5)),
        (FIRST, "on_end (truncate)", "energy", "1.5"),
    ),
    "rank file of an action": (
        "phases/0/on_end",
        ends_with("truncate", selector=named("ranks", value={"head": 9})),
        (FIRST, "on_end (truncate)", "head", "4", "9"),
    ),
    "unknown selector": (
        "phases/0/on_end",
        ends_with("select", selector=named("best")),
        (FIRST, "on_end", "beam", "'best'"),
    ),
    "a selector that is no mapping": (
        "phases/0/on_end",
        ends_with("select", selector="beam"),
        (FIRST, "on_end", "'args', 'name'"),
    ),
    "a budget below rank 1": (
        "phases/0/on_end",
        ends_with("select", selector=named("macs_fraction", value=0.01)),
        (FIRST, "on_end (select)", "macs_fraction", "0.01"),
    ),
    "ranks that nobody selected": (
        "phases/0/on_end",
        ends_with("truncate", selector=named("selected")),
        (FIRST, "on_end (truncate)", "'select'"),
    ),
    "a family that nobody selected": (
        "phases/0/sampler",
        named("matryoshka", fractions=(1.0, 0.5), family="selected"),
        (FIRST, "sampler", "'select_family'"),
    ),
    "a family by another name": (
        "phases/0/sampler",
        named("matryoshka", fractions=(1.0, 0.5), family="chosen"),
        (FIRST, "sampler", "family", "'chosen'"),
    ),
    "a family of the whole": (
        "phases/0/on_end",
        ends_with("select_family", fractions=(1.0, 0.5)),
        (FIRST, "on_end", "fractions", "1.0"),
    ),
    "a search without held-out images": (
        {
            "phases/0/on_end": ends_with("select", selector=BEAM),
            "data/validation_examples": 0,
        },
        None,
        (FIRST, "on_end (select)", "beam", "held-out training data"),
    ),
    "a sampler for a dense model": (
        {
            "phases/0/sampler": named("sandwich", passes=3),
            "rank_rules": [[".*", "dense"]],
        },
        None,
        (FIRST, "sampler", "dense model", "'full'"),
    ),
    "a rank per example between three factors": (
        {
            "phases/0/sampler": named("per_example", batch_size=65),
            "rank_rules": [[".*", {"depth": 3}]],
        },
        None,
        (FIRST, "per example", "canonicalize"),
    ),
    "a sampler without layers to sample": (
        {"phases/0/sampler": named("single_layer"), "rank_rules": [[".*", "dense"]]},
        None,
        (FIRST, "sampler", "dense model"),
    ),
    "a penalty on a dense model": (
        {
            "phases/0/penalties": penalties("group_lasso", weight=0.1),
            "rank_rules": [[".*", "dense"]],
        },
        None,
        (FIRST, "penalties", "dense model"),
    ),
    "a projection beside a factor at rest": (
        {
            "phases/0/projections": penalties(
                "stable_rank_normalization", stable_rank=2.0
            ),
            "phases/0/trainable": [".*/u"],
        },
        None,
        (FIRST, "trainable", "projections"),
    ),
    "decay of nothing": (
        {
            "phases/0/optimizer/weight_decay": 0.1,
            "phases/0/optimizer/decayed": "kernel",
        },
        None,
        (FIRST, "optimizer.decayed", "'kernel'", "head/factors/u"),
    ),
    "a stable rank of another fold": (
        {
            "phases/0/on_end": [
                named("factorize_at_stable_rank", rules=[[".*", {"scheme": 2}]])
            ],
            "rank_rules": [[".*", "dense"]],
        },
        None,
        ("config.phases[0] (only)", "on_end", "scheme"),
    ),
    "a stable rank of what is low-rank": (
        "phases/0/on_end",
        ends_with("factorize_at_stable_rank", rules=[[".*", "full"]]),
        (FIRST, "on_end (factorize_at_stable_rank)", "dense model", "hidden/0"),
    ),
    "s in a deep product": (
        "rank_rules",
        [[".*", {"depth": 3, "with_s": True}]],
        ("config.rank_rules", "head", "depth", "with_s"),
    ),
    "a scheme of a linear layer": (
        "rank_rules",
        [[".*", {"scheme": 2}]],
        ("config.rank_rules", "head", "scheme is for convolutions"),
    ),
}
