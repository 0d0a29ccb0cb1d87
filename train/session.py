"""The phase that runs: its state and compiled step, and what changes them in between:
shrinking, the end of a phase, the beginning of the next."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from lowrank_jax import active, checkpoint, optimizer_state, shrinking
from lowrank_jax.errors import UserError
from train import context, ending
from train.compiled import compile_phase
from train.phases import NOTHING_SELECTED, Phase, Selected, place_of
from train.report import logs
from train.run import Run
from train.state import Structure, TrainState, carried_state, new_state

Memory = dict[str, Any]
"""What a run remembers beside its arrays, as JSON values in the checkpoint: "phase" and
"phase_start", "history" of the phase's condition and the step at which it "ended" the
phase, what was "selected" (`train.phases`), "initial_stable_ranks"."""

Done = dict[str, Any]
"""How far the work between two steps has come, for a run that was stopped in it: the
step that was last "evaluated", and whether "changes_due" are still to be made."""


class Session:
    """Trains one phase after the other.

    `run` is what it is about.

    Args:
      run: What it is about.
      phases: Its phases.
      model: The model to start or go on with.
      saved: The checkpoint to go on from, if there is one.
    """

    def __init__(
        self,
        run: Run,
        phases: Sequence[Phase],
        model: nnx.Module,
        saved: checkpoint.Saved | None,
    ):
        self.run, self._phases = run, phases
        self.steps_per_epoch = run.steps_per_epoch
        if saved is None:
            self.memory: Memory = {
                "phase": 0,
                "phase_start": 0,
                "history": [],
                "ended": None,
                "selected": NOTHING_SELECTED._asdict(),
                "initial_stable_ranks": context.initial_stable_ranks(
                    run, phases, model
                ),
            }
            self.done: Done = {"evaluated": None, "changes_due": False}
            self._begin(model, 0)
            self._measure(0)
            return
        remembered = saved.metadata.get("run", {})
        if "done" not in saved.metadata or "selected" not in remembered:
            raise UserError(
                f"--workdir: must hold a run of this version, got {saved.path}, which"
                " does not say all that its phases have done. Start a new run with"
                " config.init_from."
            )
        self.memory, self.done = saved.metadata["run"], saved.metadata["done"]
        self._begin(model, saved.step)
        items = checkpoint.restore(saved, self.state.items())
        self.state = self._layout.put(self.state.with_items(items))

    def num_bytes(self) -> int:
        """Returns the size of what a checkpoint holds."""
        return sum(array.nbytes for array in jax.tree.leaves(self.state))

    def size(self) -> dict[str, int]:
        """Returns which phase runs, and how many parameters it has allocated."""
        params = jax.tree.leaves(self.state.params)
        return {
            "phase": self.memory["phase"],
            "stored": sum(array.size for array in params),
        }

    def about(self) -> dict[str, Any]:
        """Returns what is running, for the status file."""
        return {
            "phase": self.running.phase.name,
            "headline": self.run.task.headline,
            "ranks": active.get_ranks(self.model()),
            "processes": jax.process_count(),
            "devices": self.run.placement.mesh.size,
        }

    def param_names(self) -> list[str]:
        """Returns the paths of the parameters, in the order of their leaves."""
        return list(checkpoint.flatten(self.state.params))

    def model(self) -> nnx.Module:
        """Returns the model as it is, in evaluation mode, at its active ranks."""
        return self.structure.merge(self.state.params, self.state.model_state, None)

    def finished(self, step: int) -> bool:
        """Returns whether the last phase is over."""
        return self._is_last and step >= self._end

    def last_step(self) -> int:
        """Returns the last step of the run, should no later phase end early."""
        end = self._end
        for phase in self._phases[self.memory["phase"] + 1 :]:
            end = phase.until.end(end, self.steps_per_epoch)
        return end

    def compiles(self, step: int, count: int) -> bool:
        """Returns whether so many steps at once are compiled when they are called."""
        return (self._pattern(step), count) not in self._called

    def name_of(self, count: int) -> str:
        """Returns how messages name so many steps at once."""
        steps = "the step" if count == 1 else f"{count} steps at once"
        return f"{steps} of phase {self.running.phase.name}"

    def _pattern(self, step: int) -> int:
        """Which of the phase's patterns says what is trained after a step."""
        epoch = (step - self.running.start) // self.steps_per_epoch
        return epoch % len(self._compiled.train_step)

    def train_step(self, step: int, *batches: Any) -> dict[str, Any]:
        """Trains on one batch, or on several in one call, nothing being due between
        them; returns metrics that are still on the device, with an axis of several."""
        compiled, count = self._compiled, len(batches)
        number = self._pattern(step)
        if count == 1:
            train_step = compiled.train_step[number]
            self.state, metrics = train_step(self.state, *batches)
        else:
            train_steps = compiled.train_steps[number]
            self.state, metrics = train_steps(self.state, batches)
        self._called.add((number, count))
        return metrics

    def steps_at_once(self, step: int, saves: Callable[[int], bool]) -> int:
        """Returns how many steps the next call takes: the config's `steps_per_call`
        from a multiple of it on, where nothing is due before its end; else one.

        It depends on the step alone: a run that starts again takes the same.

        Args:
          step: The first of them.
          saves: Whether a checkpoint is due at a step.
        """
        config = self.run.config
        count, logged = config["steps_per_call"], config["log_every_steps"]

        def due(step: int) -> bool:
            return (
                not step % logged
                or self.changes(step)
                or self.evaluates(step)
                or self._switches(step)
                or saves(step)
            )

        inner = range(step + 1, step + count)
        return 1 if step % count or any(map(due, inner)) else count

    def changes(self, step: int) -> bool:
        """Returns whether `change` has something to do after this step."""
        return self._shrinks(step) or self._measures(step) or step >= self._end

    def change(self, step: int) -> None:
        """Shrinks, measures the phase's condition, and goes on to the next phase.

        Where a stop is asked for in the middle (`StopRequested`), or anything else is
        raised, all is as it was before.
        """
        before = {**vars(self), "memory": copy.deepcopy(self.memory)}
        try:
            if self._shrinks(step):
                self._shrink(step)
            self._measure(step)
            if step >= self._end:
                self._finish(step)
        except BaseException:
            vars(self).update(before)
            raise
        self.done["changes_due"] = False

    def evaluates(self, step: int) -> bool:
        """Returns whether an evaluation is due at a step."""
        config = self.run.config
        every_epoch = config["eval_every_epochs"] * self.steps_per_epoch
        often = (every_epoch, config["eval_every_steps"])
        return step > 0 and any(every and not step % every for every in often)

    def frontier(self) -> list[dict[str, Any]]:
        """Returns figures on the validation split at the config's fractions.

        Empty without a split.
        """
        if not self.run.holds_out:
            return []
        ranks = active.get_ranks(self.model())
        fractions = self.run.config["eval_fractions"]
        family = self._selected().family or ()
        return self._compiled.frontier(self.state, ranks, fractions, family)

    @property
    def _is_last(self) -> bool:
        return self.memory["phase"] == len(self._phases) - 1

    def _begin(self, model: nnx.Module, step: int) -> None:
        """Starts the memory's phase, with a new optimizer state."""
        phase, start = self._phases[self.memory["phase"]], self.memory["phase_start"]
        end = phase.until.end(start, self.steps_per_epoch)
        self.running = phase.begin(start, end, self._selected())
        ended = self.memory["ended"]
        self._end = end if ended is None else ended
        self._adopt(model, *new_state(model, self.running, step))

    def _adopt(
        self, model: nnx.Module, structure: Structure, state: TrainState
    ) -> None:
        """Goes on with a state of a model of other shapes, laid out on the mesh."""
        run, running = self.run, self.running
        self._layout = run.placement.layout(model)
        self.structure, self.state = structure, self._layout.put(state)
        self._compiled = compile_phase(run, running, structure, model)
        self._called: set[tuple[int, int]] = set()

    def _switches(self, step: int) -> bool:
        """Whether other parameters are trained from a step on."""
        elapsed = step - self.running.start
        return len(self._compiled.train_step) > 1 and not elapsed % self.steps_per_epoch

    def _shrinks(self, step: int) -> bool:
        shrink = self.running.phase.shrink
        return bool(shrink) and shrink.due(step, self.steps_per_epoch)

    def _shrink(self, step: int) -> None:
        """Cuts the state by the phase's rule, if a rank falls and it is worth it."""
        model, rule = self.model(), self.running.phase.shrink
        old = active.get_ranks(model)
        new = shrinking.tail_ranks(
            model, threshold=rule.threshold, multiple=rule.multiple
        )
        if new == old:
            return
        share, left = shrinking.share_cut(model, new), self._end - step
        if rule.waits(share, left, self.steps_per_epoch):
            return
        shrunk = shrinking.shrink(
            model, new, self.state.opt_state, self.running.optimizer
        )
        for path in old:
            if old[path] != new[path]:
                logs.say(f"shrink {path}: rank {old[path]} -> {new[path]}")
        for part in shrunk.restarted:
            logs.say(f"shrink: the optimizer's {part} starts anew")
        structure, state = carried_state(shrunk.model, self.running, self.state)
        state = state._replace(opt_state=shrunk.opt_state)
        self._adopt(shrunk.model, structure, state)

    def _measures(self, step: int) -> bool:
        condition = self.running.phase.until.condition
        elapsed = step - self.running.start
        return condition is not None and not elapsed % condition.every_steps

    def _measure(self, step: int) -> None:
        """Notes the phase's condition where it is due.

        A condition that is met ends the phase here.
        """
        if not self._measures(step):
            return
        phase = self.running.phase
        history = self.memory["history"]
        history.append(phase.until.condition.measure(self.model()))
        if step > self.running.start and phase.until.condition.is_met(history):
            logs.say(f"phase {phase.name}: its condition is met at step {step}")
            self._end = self.memory["ended"] = step

    def _finish(self, step: int) -> None:
        """Runs the phase's actions, then begins the next phase, if there is one."""
        index = self.memory["phase"] + 1
        over = index == len(self._phases)
        kept = not over and self._phases[index].optimizer_state == "kept"
        ended = ending.end_phase(
            self.running,
            place_of(index - 1, self.running.phase.name),
            self.model(),
            self.state.opt_state,
            self._context,
            self._selected(),
            keep=kept,
        )
        self.memory["selected"] = ended.selected._asdict()
        if over:
            if self.running.phase.on_end:
                state = new_state(ended.model, self.running, step)
                self._adopt(ended.model, *state)
            return
        self.memory |= {
            "phase": index,
            "phase_start": step,
            "history": [],
            "ended": None,
        }
        self._begin(ended.model, step)
        if kept:
            # moments go on, the learning rate's schedule begins again
            opt_state = optimizer_state.restart_schedules(
                ended.opt_state, self.state.opt_state
            )
            self.state = self._layout.put(self.state._replace(opt_state=opt_state))
        how = "goes on" if kept else "starts anew"
        logs.say(f"phase {self.running.phase.name} at step {step}; the optimizer {how}")
        self._measure(step)

    def _selected(self) -> Selected:
        return Selected(**self.memory["selected"])

    def _context(self, selected: Selected) -> Any:
        initial = self.memory["initial_stable_ranks"]
        return context.in_run(self.run, initial, selected)
