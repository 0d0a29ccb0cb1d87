"""What every key of a config means, in a line: for `--help` and the documentation.

Imports nothing, so that a page can be made of it anywhere. A test holds its keys to
those of the schema (`train.config.keys`), and the defaults that it names to
configs/common.py. `[]` stands for every entry of a list.
"""

from collections.abc import Mapping

_NAME = "a name, or 'package.module:function' of your own."

MEANINGS: Mapping[str, str] = {
    "seed": "Seed of initialization, order of the data and ranks, from 0 up.",
    "mesh": "Devices along each axis of the mesh; they multiply to those there are.",
    "mesh.data": "Parts of the batch, a copy of the model each; -1: what is left."
    " Default: -1.",
    "mesh.fsdp": "Parts of the batch, and of parameters and optimizer state; -1: what"
    " is left. Default: 1.",
    "mesh.tensor": "Parts of every layer's width; -1: what is left. Default: 1.",
    "data": "The data set, and how many of its examples a step takes.",
    "data.name": f"Data set: {_NAME}",
    "data.args": "Its arguments, where it takes some.",
    "data.data_dir": "Folder of prepared sets; '': TFDS_DATA_DIR, else"
    " ~/tensorflow_datasets. Default: ''.",
    "data.batch_size": "Examples of a training step, over all devices.",
    "data.eval_batch_size": "Examples of a batch in evaluation. Default: 500.",
    "data.validation_examples": "Training examples held out to judge the run; 0: none,"
    " or the set's own split.",
    "data.train_examples": "Of the others, how many to learn from; 0: all. Default: 0.",
    "task": "What is learned, and how it is judged.",
    "task.name": f"Task: {_NAME}",
    "task.args": "Its arguments; mean and std of a classification are those of the data"
    " set where they are ().",
    "model": "The plain dense model that the rules make low-rank.",
    "model.name": f"Model: {_NAME}",
    "model.args": "Its arguments, such as widths; defaults are written out.",
    "rank_rules": "Ordered pairs (regex of layer paths, rule), the first match counts:"
    " 'full', 'dense', or a mapping with max_rank, rank_fraction, scheme, with_s,"
    " depth, init, form, param. Default: (('.*', 'full'),).",
    "init_from": "Checkpoint whose weights the run starts from; '': new ones."
    " Default: ''.",
    "phases": "What is trained in turn, one mapping for each phase.",
    "phases[].name": "Name of the phase, for logs and messages.",
    "phases[].until": "How long the phase is: exactly one of steps, epochs, to_epoch.",
    "phases[].until.steps": "So many steps, at least 1.",
    "phases[].until.epochs": "So many passes over the training examples, at least 1.",
    "phases[].until.to_epoch": "To this epoch, counted from the start of the run.",
    "phases[].until.condition": "What ends the phase sooner, if given.",
    "phases[].until.condition.name": f"Condition: {_NAME}",
    "phases[].until.condition.args": "Its arguments.",
    "phases[].sampler": "Which ranks the layers have in each pass of a step.",
    "phases[].sampler.name": f"Sampler: {_NAME} Default: 'full'.",
    "phases[].sampler.args": "Its arguments. Default: {}.",
    "phases[].sizes": "'masked': lower ranks by a mask; 'static': by cut factors, which"
    " cost what their size costs. Default: 'masked'.",
    "phases[].pass_parts": "Parts of the batch, of which each pass after the first has"
    " its own; 1: whole batches. Default: 1.",
    "phases[].teacher": "What passes at lower ranks learn from beside the targets.",
    "phases[].teacher.name": f"Teacher: {_NAME} Default: 'none'.",
    "phases[].teacher.args": "Its arguments, such as target_weight in [0, 1]."
    " Default: {}.",
    "phases[].passes_loss": "'mean' or 'sum' of the losses of the passes after the"
    " first. Default: 'mean'.",
    "phases[].pass_weights": "What the loss of each pass is multiplied by; (): 1 for"
    " all. Default: ().",
    "phases[].penalties": "Functions of the factors added to the loss. Default: ().",
    "phases[].penalties[].name": f"Penalty: {_NAME}",
    "phases[].penalties[].args": "Its arguments, such as weight.",
    "phases[].projections": "What is applied to the factors after every update."
    " Default: ().",
    "phases[].projections[].name": f"Projection: {_NAME}",
    "phases[].projections[].args": "Its arguments.",
    "phases[].trainable": "Regexes of whole parameter paths that are trained, one for"
    " each epoch in turn. Default: ('.*',).",
    "phases[].optimizer": "Optimizer with its schedule, decay and clipping.",
    "phases[].optimizer.name": f"Optimizer: {_NAME}",
    "phases[].optimizer.args": "Its arguments, as optax names them. Default: {}.",
    "phases[].optimizer.learning_rate": "Peak learning rate, from 0 up.",
    "phases[].optimizer.schedule": "Learning rate over the steps of the phase.",
    "phases[].optimizer.schedule.name": f"Schedule: {_NAME} Default: 'constant'.",
    "phases[].optimizer.schedule.args": "Its arguments, such as warmup_steps."
    " Default: {'warmup_steps': 0}.",
    "phases[].optimizer.weight_decay": "Weight decay, from 0 up; decoupled where the"
    " optimizer is (adamw). Default: 0.0.",
    "phases[].optimizer.decayed": "Regex of whole parameter paths that decay."
    " Default: '.*/(kernel|embedding|u|v|middle)'.",
    "phases[].optimizer.decay_columns": "'all' columns of the factors decay, or the"
    " 'active' ones of a step. Default: 'all'.",
    "phases[].optimizer.clip_norm": "Largest global norm of a gradient; 0: no clipping."
    " Default: 0.0.",
    "phases[].optimizer_state": "'new', or 'kept' from the phase before."
    " Default: 'new'.",
    "phases[].shrink": "When ranks are cut while the phase runs; {}: never."
    " Default: {}.",
    "phases[].shrink.every_epochs": "Epochs between cuts; 0 where every_steps says.",
    "phases[].shrink.every_steps": "Steps between cuts; 0 where every_epochs says.",
    "phases[].shrink.threshold": "Least importance of the columns from one on that"
    " keeps it, from 0 up.",
    "phases[].shrink.multiple": "Ranks are rounded up to a multiple of this; 1: exact.",
    "phases[].shrink.least_share": "Least share of the parameters that is worth a cut,"
    " in [0, 1); 0: any.",
    "phases[].on_end": "Changes of the model after the last step, in order."
    " Default: ().",
    "phases[].on_end[].name": f"Action: {_NAME}",
    "phases[].on_end[].args": "Its arguments.",
    "accumulation_steps": "Parts in which a batch is computed, to save memory."
    " Default: 1.",
    "steps_per_call": "Steps in one call of the device, to save time between them."
    " Default: 1.",
    "compute_dtype": "'float32', or 'bfloat16' for products in half the precision."
    " Default: 'float32'.",
    "log_every_steps": "Steps between two lines of metrics. Default: 50.",
    "eval_every_epochs": "Epochs between evaluations; 0: by steps, and at the end."
    " Default: 1.",
    "eval_every_steps": "Steps between evaluations; 0: by epochs, and at the end."
    " Default: 0.",
    "eval_fractions": "Fractions of the ranks that are evaluated, in (0, 1]."
    " Default: (1.0, 0.5, 0.25, 0.125).",
    "recalibration_batches": "Training batches for BatchNorm's statistics before every"
    " evaluation; 0: as trained. Default: 0.",
    "scoring_batches": "Validation batches on which a search scores ranks. Default: 2.",
    "checkpoint_every_epochs": "Epochs between checkpoints; 0: not by epochs."
    " Default: 1.",
    "checkpoint_every_steps": "Steps between checkpoints; 0: not by steps. Default: 0.",
    "checkpoint_every_minutes": "Minutes between checkpoints; 0: not by time."
    " Default: 0.0.",
    "keep_checkpoints": "How many of the last checkpoints are kept, at least 1."
    " Default: 2.",
    "keep_best": "How many of the best by the headline figure are kept as well."
    " Default: 1.",
}
"""A line for each key; "Default: VALUE." at its end, in Python, where configs/common.py
has one."""

NAMES: Mapping[str, str] = {
    "task.name": "train.tasks:TASKS",
    "model.name": "train.models:MODELS",
    "phases[].until.condition.name": "train.until:CONDITIONS",
    "phases[].sampler.name": "lowrank_jax.samplers:SAMPLERS",
    "phases[].teacher.name": "train.teachers:TEACHERS",
    "phases[].penalties[].name": "lowrank_jax.penalties:PENALTIES",
    "phases[].projections[].name": "lowrank_jax.projections:PROJECTIONS",
    "phases[].optimizer.name": "train.optim:OPTIMIZERS",
    "phases[].optimizer.schedule.name": "train.optim:SCHEDULES",
    "phases[].on_end[].name": "train.actions:ACTIONS",
}
"""Where the table of names that a key takes stands, as `module:TABLE`."""
