"""The phases of a run: what each trains with, and how it ends.

A phase is a value, built once from its config and passed whole to whoever runs it. One
field of `Phase` says all there is to say of a config key: its type, how its value is
checked and built, how its defaults are written out. What depends on the run (the step
at which the phase begins, ranks that were selected before) is bound when it begins.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optax

from lowrank_jax import errors
from lowrank_jax.errors import UserError
from lowrank_jax.families import Family
from lowrank_jax.penalties import PENALTIES
from lowrank_jax.projections import PROJECTIONS
from lowrank_jax.ranks import Ranks
from lowrank_jax.rules import compile_pattern
from lowrank_jax.samplers import SAMPLERS, RankSampler
from train import actions, optim, registry, schema
from train.shrinks import SHRINK, Shrink, build_shrink
from train.teachers import TEACHERS, Teacher
from train.until import UNTIL, Until, build_until, complete_until


class Field(NamedTuple):
    """One key of a phase's config.

    Args:
      schema: Its type.
      build: From the checked value to what the phase holds; raises UserError.
      complete: The value with all default arguments written out.
      inner: Schema of what a mapping may hold, or of every entry of a list, where the
        type says less; None for values without keys.
    """

    schema: Any
    build: Callable[[Any], Any] = lambda value: value
    complete: Callable[[Any], Any] = lambda value: value
    inner: Any = None


def _has(kind: type) -> Callable[[Any], bool]:
    """Whether a value has the fields of a NamedTuple."""
    return lambda value: all(hasattr(value, name) for name in kind._fields)


def _is_teacher(value: Any) -> bool:
    return value is None or _has(Teacher)(value)


def _acts(value: Any) -> bool:
    """Whether a value is a penalty or a projection, with a state or without."""
    return callable(value) or (hasattr(value, "init") and hasattr(value, "apply"))


def _choice(table: Mapping[str, Any], check: Callable[[Any], bool]) -> Field:
    """A choice from a table; the check says whether what it makes is of the kind."""
    return Field(
        schema.NAMED,
        lambda spec: registry.build_checked(spec, table, check),
        lambda spec: registry.complete(spec, table),
    )


def _choices(
    table: Mapping[str, Any],
    check: Callable[[Any], bool],
    complete: Callable[[Any], Any] | None = None,
) -> Field:
    """Several choices from a table, each with its name."""

    def build(specs: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
        return tuple(
            (spec["name"], registry.build_checked(spec, table, check)) for spec in specs
        )

    complete = complete or (lambda spec: registry.complete(spec, table))

    def complete_all(specs: Sequence[Any]) -> list[Any]:
        for spec in specs:
            errors.raise_all(schema.compare(spec, schema.NAMED, "every entry"))
        return [complete(spec) for spec in specs]

    return Field(list, build, complete_all, schema.NAMED)


def _one_of(*words: str) -> Field:
    """One of a few words."""

    def build(word: str) -> str:
        if word not in words:
            raise UserError(errors.unknown("a known word", word, words))
        return word

    return Field(str, build)


def _key(field: Field) -> Any:
    return dataclasses.field(metadata={"field": field})


class Selected(NamedTuple):
    """What actions at the ends of phases chose for later ones.

    Args:
      target_ranks: What "selected" stands for in penalties and selectors; None before
        `select`.
      family: What it stands for in samplers, and which ranks a size has in evaluation;
        None before `select_family`.
    """

    target_ranks: Ranks | None = None
    family: Family | None = None

    def after(self, action: actions.Action, choice: Any) -> "Selected":
        """Returns what is selected after an action: its choice, or no family any more
        where the layers have become others.

        Args:
          action: At the end of a phase.
          choice: What it chose.
        """
        if action.selects:
            return self._replace(**{action.selects: choice})
        if action.kind in (actions.Kind.FACTORIZED, actions.Kind.MERGED):
            return self._replace(family=None)
        return self


def _build_patterns(texts: Sequence[str]) -> tuple[re.Pattern[str], ...]:
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(
            "must be regular expressions, one for each epoch in turn, got"
            f" {texts}. Use ('.*',) to train everything."
        )
    return tuple(compile_pattern(text) for text in texts)


def _build_weights(weights: Sequence[float]) -> tuple[float, ...]:
    if not all(
        schema.is_number(weight) and 0 <= weight < math.inf for weight in weights
    ):
        raise UserError(
            f"must hold finite numbers of at least 0, got {weights}. Correct it."
        )
    return tuple(float(weight) for weight in weights)


def _build_parts(count: int) -> int:
    if count < 1:
        raise UserError(f"must be at least 1, got {count}. Use 1 for whole batches.")
    return count


NOTHING_SELECTED = Selected()


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of a run.

    Args:
      name: As in the config.
      until: When it ends.
      sampler: Ranks for each step.
      sizes: "masked", or "static" where passes run on factors that are cut.
      pass_parts: Equal parts of the batch, of which each pass after the first has its
        own, drawn anew each step; 1 for all examples in every pass.
      teacher: What sampled passes learn from beside the targets, or None.
      passes_loss: How the losses of the passes after the first add up: "mean", "sum".
      pass_weights: What the loss of each pass is multiplied by; none: 1.
      penalties: Added to the loss; by name, each made once its targets are known.
      projections: Applied to the factors after each update, by name.
      trainable: Which parameters are trained, one pattern for each epoch in turn.
      optimizer: Makes the optimizer for a number of steps.
      optimizer_state: "new", or "kept" from the phase before.
      shrink: When and how ranks are cut, or None.
      on_end: Changes of the model after the last step, by name.
    """

    name: str = _key(Field(str))
    until: Until = _key(Field(dict, build_until, complete_until, UNTIL))
    sampler: RankSampler = _key(_choice(SAMPLERS, _has(RankSampler)))
    sizes: str = _key(_one_of("masked", "static"))
    pass_parts: int = _key(Field(int, _build_parts))
    teacher: Teacher | None = _key(_choice(TEACHERS, _is_teacher))
    passes_loss: str = _key(_one_of("mean", "sum"))
    pass_weights: tuple[float, ...] = _key(Field(list, _build_weights))
    penalties: tuple[Any, ...] = _key(_choices(PENALTIES, _acts)._replace(build=tuple))
    projections: tuple[Any, ...] = _key(_choices(PROJECTIONS, _acts))
    trainable: tuple[re.Pattern[str], ...] = _key(Field(list, _build_patterns))
    optimizer: optim.Optimizer = _key(
        Field(optim.SCHEMA, optim.Optimizer.build, optim.complete)
    )
    optimizer_state: str = _key(_one_of("new", "kept"))
    shrink: Shrink | None = _key(Field(dict, build_shrink, inner=SHRINK))
    on_end: tuple[tuple[str, actions.Action], ...] = _key(
        _choices(actions.ACTIONS, _has(actions.Action), actions.complete)
    )

    def rungs(self, ranks: Ranks) -> Sequence[Ranks]:
        """Lists the ranks of the passes that are cut; none where all are masked.

        Args:
          ranks: The model's.
        """
        return self.sampler.rungs(ranks) if self.sizes == "static" else ()

    @property
    def passes(self) -> int:
        """How many passes a step makes, that of the teacher counted."""
        sampler, teacher = self.sampler, self.teacher
        taught = teacher is not None and teacher.full_pass and not sampler.full_first
        return sampler.passes + taught

    def begin(
        self, start: int, end: int, selected: Selected = NOTHING_SELECTED
    ) -> "Running":
        """Binds the phase to the run.

        Args:
          start: Step at which it begins.
          end: Step after the last; with a condition, the latest that is possible.
          selected: In earlier phases.
        """
        with errors.at("penalties"):
            penalties = tuple(
                registry.build_checked(
                    _with_targets(spec, selected.target_ranks), PENALTIES, _acts
                )
                for spec in self.penalties
            )
        with errors.at("optimizer"):
            optimizer = self.optimizer.make(end - start)
        with errors.at("sampler"):
            phase = self._bound(selected.family)
        return Running(phase, start, end, penalties, optimizer)

    def _bound(self, family: Family | None) -> "Phase":
        """The phase with the family in its sampler, where that asks for it."""
        if self.sampler.bind is None:
            return self
        if family is None:
            raise UserError(
                "family 'selected' needs an action 'select_family' at the end of an"
                " earlier phase, got none. Add one, or give ranks by fraction."
            )
        return dataclasses.replace(self, sampler=self.sampler.bind(family))


class Running(NamedTuple):
    """A phase that has begun.

    Args:
      phase: What it trains with.
      start: Its first step.
      end: The step after its last, should no condition end it sooner.
      penalties: Added to the loss.
      optimizer: With its schedule over the phase.
    """

    phase: Phase
    start: int
    end: int
    penalties: tuple[Any, ...]
    optimizer: optax.GradientTransformation


FIELDS: dict[str, Field] = {
    field.name: field.metadata["field"] for field in dataclasses.fields(Phase)
}
SCHEMA = {name: field.schema for name, field in FIELDS.items()}
"""What the config of a phase must hold."""


def keys() -> list[str]:
    """Lists the keys that the config of a phase may have, as `train.config.keys`."""
    found = []
    for name, field in FIELDS.items():
        every = "[]" if field.schema is list else ""
        inner = field.schema if isinstance(field.schema, Mapping) else field.inner
        found += [name, *schema.keys(inner or {}, f"{name}{every}.")]
    return found


def complete(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Writes out every default argument in the config of a phase."""
    completed = {}
    for name, field in FIELDS.items():
        with errors.at(name):
            completed[name] = field.complete(spec[name])
    return completed


def place_of(index: int, name: str) -> str:
    """Returns how messages name a phase."""
    return f"config.phases[{index}] ({name})"


def build_phases(specs: Sequence[Mapping[str, Any]]) -> tuple[Phase, ...]:
    """Builds all phases of a config.

    Raises:
      UserError: Names or arguments that do not exist or do not fit, naming the place.
    """
    phases: list[Phase] = []
    for index, spec in enumerate(specs):
        values = {}
        for name, field in FIELDS.items():
            with errors.at(f"{place_of(index, spec['name'])}: {name}"):
                values[name] = field.build(spec[name])
        phases.append(Phase(**values))
        with errors.at(place_of(index, spec["name"])):
            _check_fit(phases)
    return tuple(phases)


def spans(phases: Sequence[Phase], steps_per_epoch: int) -> list[tuple[int, int]]:
    """Returns the latest start and end of each phase that is possible."""
    found: list[tuple[int, int]] = []
    for index, phase in enumerate(phases):
        start = found[-1][1] if found else 0
        with errors.at(place_of(index, phase.name)):
            found.append((start, phase.until.end(start, steps_per_epoch)))
    return found


def _check_fit(phases: Sequence[Phase]) -> None:
    """Checks the last of these phases against itself and those before it."""
    phase, before = phases[-1], phases[:-1]
    if phase.projections and [p.pattern for p in phase.trainable] != [".*"]:
        raise UserError(
            "trainable: must be ('.*',) beside projections, which move both factors,"
            f" got {[p.pattern for p in phase.trainable]}. Drop one of the two."
        )
    if phase.sizes == "static" and phase.sampler.rungs is None:
        raise UserError(
            "sizes: 'static' needs a sampler that knows its ranks before the step, got"
            " one that draws any. Use 'masked', or matryoshka, family, uniform_fraction"
            " with fractions, or sandwich."
        )
    if phase.pass_parts > 1 and not 2 <= phase.passes <= phase.pass_parts + 1:
        raise UserError(
            "pass_parts: must be 1, or at least the number of passes after the first,"
            f" of which there must be one, got {phase.pass_parts} for {phase.passes}"
            " passes. Change it, or the sampler."
        )
    if phase.pass_weights and len(phase.pass_weights) != phase.passes:
        raise UserError(
            f"pass_weights: must hold a number for each of {phase.passes} passes, or"
            f" none, got {list(phase.pass_weights)}. Change it, or the sampler."
        )
    if phase.optimizer_state == "new":
        return
    if not before or not phase.optimizer.continues(before[-1].optimizer):
        theirs = before[-1].optimizer.spec if before else None
        raise UserError(
            "optimizer_state: 'kept' needs a phase before it with the same optimizer"
            f" but for learning rate and schedule, got {phase.optimizer.spec} after"
            f" {theirs}. Use 'new', or make them equal."
        )


def _with_targets(
    spec: Mapping[str, Any], target_ranks: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """A penalty with the ranks that were selected, where it asks for them."""
    args = spec["args"]
    if "target_ranks" not in args or args["target_ranks"] != "selected":
        return spec
    if target_ranks is None:
        raise UserError(
            "target_ranks 'selected' needs an action 'select' at the end of an earlier"
            " phase, got none. Add one, or give ranks by path."
        )
    return {**spec, "args": {**args, "target_ranks": target_ranks}}
