"""The phase that runs: its state and compiled step, and what changes them in between:
shrinking, the end of a phase, the beginning of the next."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from lowrank_jax import calibration, checkpoint, optimizer_state, shrinking
from lowrank_jax.active import get_ranks
from lowrank_jax.errors import UserError
from lowrank_jax.ranks import Ranks
from train import actions, evaluation, step
from train.data import pipeline
from train.phases import Phase, build_phase, needs_initial_stable_ranks, stable_ranks
from train.report import logs
from train.state import build_model, join_model, model_cost, new_state, split_model

Memory = dict[str, Any]
"""What a run remembers beside its arrays, as JSON values in the checkpoint: "phase" and
"phase_start", "history" of the phase's condition and the step at which it "ended" the
phase, "target_ranks" that were selected, "initial_stable_ranks"."""

SCORED_BATCHES = 2
"""Validation batches on which a search scores each candidate."""


class Session:
    """Trains one phase after the other.

    Args:
      config: The whole config as plain values.
      data: The data set.
      prepare: From a key (None for evaluation) and pixels to the model's input.
      model: The model to start or go on with.
      saved: The checkpoint to go on from, if there is one.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        data: pipeline.Dataset,
        prepare: Callable[..., Any],
        model: nnx.Module,
        saved: checkpoint.Saved | None,
    ):
        self._config, self._data, self._prepare = config, data, prepare
        self._root_key = jax.random.key(config["seed"])
        self.steps_per_epoch = data.steps_per_epoch(config["data"]["batch_size"])
        if saved is None:
            initial = None
            if needs_initial_stable_ranks(config):
                fresh = self._fresh_model() if config["init_from"] else model
                initial = stable_ranks(fresh)
            self.memory: Memory = {
                "phase": 0,
                "phase_start": 0,
                "history": [],
                "ended": None,
                "target_ranks": None,
                "initial_stable_ranks": initial,
            }
            self._begin(model, 0)
            self._measure(0)
        elif "run" not in saved.metadata:
            raise UserError(
                f"--workdir: must hold a run of this version, got {saved.path}, which"
                " does not say what phase it is in. Start a new run with"
                " config.init_from."
            )
        else:
            self.memory = saved.metadata["run"]
            self._begin(model, saved.step)
            restored = checkpoint.restore(saved, self.items())
            self.state = self.state._replace(
                opt_state=restored["opt_state"], sampler_state=restored["sampler"]
            )

    def _fresh_model(self) -> nnx.Module:
        """What the run would start from without `init_from`."""
        return build_model(
            self._config,
            self._data.image_shape,
            self._data.num_classes,
            allow_imports=None,
        )

    def items(self) -> dict[str, Any]:
        """What a checkpoint holds beside the model."""
        return {"opt_state": self.state.opt_state, "sampler": self.state.sampler_state}

    def model(self) -> nnx.Module:
        """The model as it is, in evaluation mode, at all its ranks."""
        return join_model(self.structure, self.state.params, self.state.model_state)

    def finished(self, step: int) -> bool:
        """Whether the last phase is over."""
        return self._is_last and step >= self._end

    def last_step(self) -> int:
        """The last step of the run, should no later phase end early."""
        end = self._end
        for index in range(self.memory["phase"] + 1, len(self._config["phases"])):
            end = self._build(index, end).end
        return end

    def train_step(self, step: int, batch: Any) -> dict[str, Any]:
        """Trains on one batch; returns metrics that are still on the device."""
        patterns = len(self._train_steps)
        epoch = (step - self.phase.start) // self.steps_per_epoch
        self.state, metrics = self._train_steps[epoch % patterns](self.state, batch)
        return metrics

    def changes(self, step: int) -> bool:
        """Whether `change` has something to do after this step."""
        condition = self.phase.condition
        measures = condition and not (step - self.phase.start) % condition.every_steps
        return bool(measures) or self._shrinks(step) or step >= self._end

    def change(self, step: int) -> None:
        """Shrinks, measures the phase's condition, and goes on to the next phase."""
        if self._shrinks(step):
            self._shrink()
        self._measure(step)
        if step >= self._end:
            self._finish(step)

    def frontier(self) -> list[evaluation.Figures]:
        """Figures on the validation split at the config's fractions; none without a
        split."""
        if not self._data.sizes["validation"]:
            return []
        model = self.model()
        return evaluation.sweep(
            self._evaluate,
            self.state.params,
            self.state.model_state,
            get_ranks(model),
            self._config["eval_fractions"],
            self._validation_batches,
            model_cost(model, self._data.image_shape),
            self._calibrate,
        )

    @property
    def _is_last(self) -> bool:
        return self.memory["phase"] == len(self._config["phases"]) - 1

    def _build(self, index: int, start: int) -> Phase:
        targets = self.memory["target_ranks"]
        after_this = index > self.memory["phase"]
        return build_phase(
            self._config,
            index,
            start,
            self.steps_per_epoch,
            {} if targets is None and after_this else targets,
        )

    def _begin(self, model: nnx.Module, step: int) -> None:
        """Starts the memory's phase, with a new optimizer state."""
        self.phase = self._build(self.memory["phase"], self.memory["phase_start"])
        ended = self.memory["ended"]
        self._end = self.phase.end if ended is None else ended
        self.structure, self.state = new_state(
            model, self.phase.optimizer, self.phase.sampler, step
        )
        self._compile()

    def _compile(self) -> None:
        """Steps and evaluation for the shapes at hand; compiled when first called."""
        phase, structure = self.phase, self.structure
        self._train_steps = [
            step.make_train_step(
                structure,
                phase.optimizer,
                phase.sampler,
                phase.penalties,
                self._prepare,
                self._root_key,
                distill=phase.distill,
                label_weight=phase.label_weight,
                passes_loss=phase.passes_loss,
                projections=phase.projections,
                trainable=None if pattern.pattern == ".*" else pattern,
                phase_start=phase.start,
            )
            for pattern in phase.trainable
        ]
        prepare = functools.partial(self._prepare, None)
        self._evaluate = evaluation.make_evaluator(structure, prepare)
        self._calibrate = None
        count = self._config["recalibration_batches"]
        if count and calibration.has_batch_norm(self.model()):
            self._calibrate = evaluation.make_calibrator(
                structure,
                prepare,
                lambda: evaluation.training_batches(self._data, self._config, count),
            )

    def _validation_batches(self) -> Any:
        return self._data.eval_batches(
            "validation", self._config["data"]["eval_batch_size"]
        )

    def _shrinks(self, step: int) -> bool:
        shrink = self.phase.shrink
        if shrink is None:
            return False
        return step % (shrink["every_epochs"] * self.steps_per_epoch) == 0

    def _shrink(self) -> None:
        """Cuts the state by the phase's rule, if a rank falls."""
        model, rule = self.model(), self.phase.shrink
        old = get_ranks(model)
        new = shrinking.tail_ranks(
            model, threshold=rule["threshold"], multiple=rule["multiple"]
        )
        if new == old:
            return
        shrunk = shrinking.shrink(
            model, new, self.state.opt_state, self.phase.optimizer
        )
        for path in old:
            if old[path] != new[path]:
                logs.say(f"shrink {path}: rank {old[path]} -> {new[path]}")
        for part in shrunk.restarted:
            logs.say(f"shrink: the optimizer's {part} starts anew")
        self._adopt(shrunk.model)
        self.state = self.state._replace(opt_state=shrunk.opt_state)

    def _adopt(self, model: nnx.Module) -> None:
        """Goes on with a model of other shapes; optimizer and sampler start anew."""
        self.structure, self.state = new_state(
            model, self.phase.optimizer, self.phase.sampler, int(self.state.step)
        )
        self._compile()

    def _measure(self, step: int) -> None:
        """Notes the phase's condition where it is due; a condition that is met ends the
        phase here."""
        condition = self.phase.condition
        if condition is None or (step - self.phase.start) % condition.every_steps:
            return
        self.memory["history"].append(condition.measure(self.model()))
        if step > self.phase.start and condition.is_met(self.memory["history"]):
            logs.say(f"phase {self.phase.name}: its condition is met at step {step}")
            self._end = self.memory["ended"] = step

    def _finish(self, step: int) -> None:
        """The phase's actions, then the next phase, if there is one."""
        index, specs = self.memory["phase"] + 1, self._config["phases"]
        kept = index < len(specs) and specs[index]["optimizer_state"] == "kept"
        model, opt_state = self.model(), self.state.opt_state
        for name, action in self.phase.on_end:
            old, change = model, action(model, self._context())
            model = change.model
            if change.target_ranks is not None:
                self.memory["target_ranks"] = change.target_ranks
                logs.say(f"{name}: target ranks {change.target_ranks}")
            elif change.kind != "same":
                logs.say(f"{name}: ranks {get_ranks(model)}")
            if kept:
                opt_state, restarted = actions.carry_opt_state(
                    change.kind, old, model, opt_state, self.phase.optimizer
                )
                for part in restarted:
                    reason = actions.REASONS[change.kind]
                    logs.say(f"{name}: the optimizer's {part} starts anew, as {reason}")
        if index == len(specs):
            if self.phase.on_end:
                self._adopt(model)
            return
        self.memory |= {
            "phase": index,
            "phase_start": step,
            "history": [],
            "ended": None,
        }
        self._begin(model, step)
        if kept:
            opt_state = optimizer_state.restart_schedules(
                opt_state, self.state.opt_state
            )
            self.state = self.state._replace(opt_state=opt_state)
        how = "goes on" if kept else "starts anew"
        logs.say(f"phase {self.phase.name} at step {step}; the optimizer {how}")
        self._measure(step)

    def _context(self) -> actions.Context:
        return actions.Context(
            functools.partial(model_cost, image_shape=self._data.image_shape),
            self._scorer if self._data.sizes["validation"] else None,
            self._recalibrate,
            self.memory["initial_stable_ranks"],
            self.memory["target_ranks"],
            preview=False,
        )

    def _scorer(self, model: nnx.Module) -> Callable[[Sequence[Ranks]], list[float]]:
        """Minus the loss on held-out images, normalized by their own statistics."""
        structure, params, model_state = split_model(model)
        evaluate = evaluation.make_evaluator(
            structure, functools.partial(self._prepare, None), batch_statistics=True
        )
        batches = list(itertools.islice(self._validation_batches(), SCORED_BATCHES))
        whole = [batch for batch in batches if batch["weight"].all()]
        batches = whole or batches  # padding would enter the statistics

        def score(candidates: Sequence[Ranks]) -> list[float]:
            return [
                -evaluate(params, model_state, ranks, batches)["loss"]
                for ranks in candidates
            ]

        return score

    def _recalibrate(self, model: nnx.Module, batches: int) -> nnx.Module:
        prepare = functools.partial(self._prepare, None)
        images = (
            prepare(batch["image"])
            for batch in evaluation.training_batches(self._data, self._config, batches)
        )
        return calibration.recalibrate_batch_norm(model, images)
