"""Who may import whom, what the library keeps out, and that the README maps it all."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TREES = ("lowrank_jax", "train", "configs", "benchmarks")

LAYERS = (
    {"errors", "linalg", "optimizer_state", "version", "storage"},
    {"ranks", "rules", "folds"},
    {"cost", "ranked"},
    {"factors"},
    {"forms", "projections"},
    {"layers", "selection"},
    {"paths"},
    {"active", "factorization", "calibration", "counting", "penalties", "samplers"},
    {"surgery", "checkpoint"},
    {"shrinking"},
    {"lowrank_jax"},
)
"""Parts of the library, lowest first: each may import the ones above it in this list.

Within a set nobody imports another. `layers` and `selection` are packages, whose files
may import one another; `lowrank_jax` is the package's own `__init__`.
"""
FORBIDDEN = {
    "absl",
    "benchmarks",
    "configs",
    "ml_collections",
    "tensorflow",
    "tensorflow_datasets",
    "tests",
    "tfds",
    "train",
}


def files(*trees: str) -> list[Path]:
    return [path for tree in trees for path in sorted((ROOT / tree).rglob("*.py"))]


def name_of(path: Path) -> str:
    """The module's dotted name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, wherever in it, with the line.

    `from a import b` counts as `a.b` where that is a file of ours, else as `a`.
    """
    package = name_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if is_ours(inner) else base), node.lineno


def is_ours(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def part_of(module: str) -> str:
    """The library's part to which a module belongs: `layers` for
    `lowrank_jax.layers.conv`."""
    return (module.split(".") + ["lowrank_jax"])[1] if "." in module else "lowrank_jax"


def level_of(part: str) -> int:
    return next((n for n, parts in enumerate(LAYERS) if part in parts), -1)


def test_every_file_of_the_library_has_a_place():
    """A new file is put into the table above before it imports anything."""
    parts = {part_of(name_of(path)) for path in files("lowrank_jax")}
    assert parts and not [part for part in parts if level_of(part) < 0]


def test_imports_go_one_way():
    """design.md section 2: only from a later part to an earlier one."""
    edges, wrong = set(), []
    for path in files("lowrank_jax"):
        importer = part_of(name_of(path))
        for module, line in imports(path):
            if module.split(".")[0] != "lowrank_jax":
                continue
            imported = part_of(module)
            edges.add((importer, imported))
            inside = importer == imported and (ROOT / "lowrank_jax" / importer).is_dir()
            if level_of(imported) >= level_of(importer) and not inside:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {module}")
    assert not wrong, "\n".join(wrong)
    assert {("factors", "linalg"), ("surgery", "layers")} <= edges  # the walk sees them


def test_the_library_knows_nothing_of_the_application():
    """No flags, no configs, no data loaders, and orbax in one file only."""
    wrong = []
    for path in files("lowrank_jax"):
        banned = FORBIDDEN | ({"orbax"} if path.name != "storage.py" else set())
        for module, line in imports(path):
            if module.split(".")[0] in banned:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {module}")
    assert not wrong, "\n".join(wrong)


def test_the_application_knows_no_config_and_no_orbax():
    """Configs are values that are handed in; checkpoints go through the library."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in files("train")
        for module, line in imports(path)
        if module.split(".")[0] in ("configs", "benchmarks", "tests", "orbax")
    ]
    assert not wrong, "\n".join(wrong)


def test_models_know_nothing_of_low_rank():
    """They are plain Flax NNX; surgery puts low rank in."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in files("train/models")
        for module, line in imports(path)
        if module.split(".")[0] == "lowrank_jax"
    ]
    assert not wrong, "\n".join(wrong)


def test_no_hidden_defaults_and_nothing_is_unpickled():
    """Every key that the code reads is in the config file; files hold data, not
    code."""
    wrong = []
    for path in files("lowrank_jax", "train"):
        for module, line in imports(path):
            if module.split(".")[0] in ("pickle", "dill", "cloudpickle", "shelve"):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {module}")
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            allow_pickle = any(
                keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False"
                for keyword in node.keywords
            )
            if re.search(r"config(\.\w+)*\.get$", call) or allow_pickle:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {call}(")
    assert not wrong, "\n".join(wrong)


def test_there_is_no_drawer_for_odds_and_ends():
    """A helper with two callers goes to the lowest module that owns its noun."""
    drawers = {"utils", "util", "helpers", "misc", "common_utils"}
    assert not [path for path in files(*TREES) if path.stem in drawers]


def test_importing_the_library_starts_no_backend():
    """Else `jax.distributed.initialize` fails in whoever imports it first."""
    code = (
        "import importlib, pkgutil, lowrank_jax\n"
        "for m in pkgutil.walk_packages(lowrank_jax.__path__, 'lowrank_jax.'):\n"
        "    importlib.import_module(m.name)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized(), 'an array made on import'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tree", TREES)
def test_the_readme_maps_every_file(tree):
    """Each Python file but `__init__.py` is named, by its path or its name."""
    readme = (ROOT / "README.md").read_text()
    missing = [
        str(path.relative_to(ROOT))
        for path in files(tree)
        if path.name != "__init__.py"
        and not re.search(rf"(?<![\w.]){re.escape(path.name)}(?!\w)", readme)
    ]
    assert not missing, missing
