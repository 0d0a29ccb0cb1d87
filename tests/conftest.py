"""Tests are the strictest place: 8 simulated devices, no silent rank promotion.

Most of the time of a small test is XLA's compilation, so most optimisations are off
(what is tested is mathematics and contracts, not speed) and compiled programs are kept
from one run and one clone to the next, in ~/.cache/lowrank_jax or where
JAX_COMPILATION_CACHE_DIR says. The settings stand in the environment too, so that
binaries that tests start have them.
"""

import os
import zlib
from pathlib import Path

import jax
import pytest

from train import xla_flags

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "jax_disable_most_optimizations": True,
    "jax_compilation_cache_dir": os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache/lowrank_jax")
    ),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
"""What tests and the binaries that they start compile with."""

for name, value in SETTINGS.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(int(value) if isinstance(value, bool) else value)
jax.config.update("jax_num_cpu_devices", 8)
os.environ.setdefault("NPROC", "16")  # XLA's threads: a collective of 8 holds 8
xla_flags.leave_products_apart()  # as binaries do
jax.config.update("jax_numpy_rank_promotion", "raise")
# a run is on one of them, where a test does not ask for more (`support.devices`)
jax.config.update("jax_default_device", jax.devices()[0])

LONG = {
    "tests/examples/test_serve_digits.py",
    "tests/faults/test_campaign.py",
    "tests/fuzz/test_malformed_commands.py",
    "tests/fuzz/test_malformed_configs.py",
    "tests/fuzz/test_malformed_metadata.py",
    "tests/fuzz/test_malformed_ranks.py",
    "tests/launch/test_files.py",
    "tests/launch/test_sweep.py",
    "tests/lowrank_jax/test_elastic.py",
    "tests/lowrank_jax/test_layers_contract.py",
    "tests/lowrank_jax/test_layers_transforms.py",
    "tests/lowrank_jax/test_layers_twins.py",
    "tests/lowrank_jax/test_maestro_parity.py",
    "tests/lowrank_jax/test_maestro_theory.py",
    "tests/lowrank_jax/test_optimizer_state.py",
    "tests/lowrank_jax/test_reference_faults.py",
    "tests/lowrank_jax/test_reference_faults_training.py",
    "tests/test_configs.py",
    "tests/test_packaging.py",
    "tests/train/test_binary.py",
    "tests/train/test_checks.py",
    "tests/train/test_command_line.py",
    "tests/train/test_encoder_decoder.py",
    "tests/train/test_ending.py",
    "tests/train/test_generation.py",
    "tests/train/test_loop.py",
    "tests/train/test_models.py",
    "tests/train/test_own_task.py",
    "tests/train/test_parts.py",
    "tests/train/test_phases.py",
    "tests/train/test_processes.py",
    "tests/train/test_sharded_runs.py",
    "tests/train/test_step.py",
    "tests/train/test_text_runs.py",
    "tests/train/test_transformer.py",
    "tests/train/test_translation.py",
    "tests/train/test_truncation.py",
}
"""Files that `make test-fast` leaves out: each takes more than 20 s on one core."""


TABLES = {
    "tests/lowrank_jax/test_any_model.py",
    "tests/lowrank_jax/test_gauge.py",
    "tests/lowrank_jax/test_layers_contract.py",
    "tests/lowrank_jax/test_layers_transforms.py",
    "tests/lowrank_jax/test_layers_twins.py",
    "tests/lowrank_jax/test_linalg.py",
    "tests/lowrank_jax/test_middle_factors.py",
    "tests/lowrank_jax/test_middle_models.py",
    "tests/lowrank_jax/test_optimizer_state.py",
    "tests/lowrank_jax/test_penalties.py",
    "tests/lowrank_jax/test_penalties_mechanisms.py",
    "tests/lowrank_jax/test_placement.py",
    "tests/lowrank_jax/test_rules_of.py",
    "tests/lowrank_jax/test_samplers.py",
    "tests/lowrank_jax/test_shrinking.py",
    "tests/lowrank_jax/test_surgery.py",
    "tests/test_configs.py",
    "tests/train/test_loop.py",
    "tests/train/test_model_counts.py",
    "tests/train/test_models.py",
    "tests/train/test_parts.py",
    "tests/train/test_phases.py",
    "tests/train/test_truncation.py",
}
"""Files that hold every row of a table to the same contract. `make test` takes a
fourteenth of the pairs of a test and a row, spread over both by name, `make test-slow`
the rest: with all of them it takes 25 minutes where nothing is compiled yet."""


WHOLE = {"test_it_trains_end_to_end"}
"""Tests in these files whose rows are not drawn: they name the slow ones themselves."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of the files above as long or slow."""
    for item in items:
        if not item.path.is_relative_to(ROOT):
            continue
        path = item.path.relative_to(ROOT).as_posix()
        if path in LONG:
            item.add_marker(pytest.mark.long)
        name, _, row = item.name.partition("[")
        drawn = path in TABLES and row and name not in WHOLE
        if drawn and zlib.crc32(item.name.encode()) % 14:
            item.add_marker(pytest.mark.slow)
