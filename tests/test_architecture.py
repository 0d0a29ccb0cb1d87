"""Who may import whom, what the library keeps out, and that the README maps it all."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TREES = (
    *("lowrank_jax", "train", "configs", "benchmarks", "launch", "examples"),
    "notebooks",
)

LAYERS = (
    {"errors", "placement", "version"},
    {"blocks"},
    {"linalg", "rules", "ranks", "folds", "optimizer_state", "purity", "pieces"}
    | {"nnx_internals"},
    {"cost", "ranked", "metadata", "families", "times"} | {"latency_files"},
    {"factors"},
    {"forms"},
    {"layers"},
    {"paths"},
    {"active", "factorization", "calibration", "counting", "penalties", "projections"},
    {"samplers", "surgery", "contents", "rank_major"},
    {"steps", "storage"},
    {
        "checkpoint",
        "elastic",
        "export",
        "latency",
        "selection",
        "shrinking",
        "summary",
    },
    {"lowrank_jax"},
)
"""Parts of the library, lowest first: each may import the ones above it in this list.

Within a set nobody imports another. `layers`, `penalties`, `samplers` and `selection`
are packages, whose files may import one another; `lowrank_jax` is the package's own
`__init__`.
"""
FORBIDDEN = {
    "absl",
    "benchmarks",
    "configs",
    "examples",
    "launch",
    "ml_collections",
    "starlette",
    "tensorflow",
    "tensorflow_datasets",
    "tests",
    "tfds",
    "train",
    "uvicorn",
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
    outside = ("configs", "benchmarks", "examples", "launch", "tests", "orbax")
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in files("train")
        for module, line in imports(path)
        if module.split(".")[0] in outside
    ]
    assert not wrong, "\n".join(wrong)


def test_models_know_nothing_of_low_rank():
    """They are plain Flax NNX; surgery puts low rank in. Errors they may share."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in files("train/models")
        for module, line in imports(path)
        if module.split(".")[0] == "lowrank_jax" and module != "lowrank_jax.errors"
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


TASK_FILES = ("train/data/", "train/models/", "train/tasks/")
TEXT_FILES = tuple(
    f"train/{name}.py" for name in ("generate", "generation", "translating", "writing")
)
"""What may speak of text beside these."""

IMAGE_WORDS = r"images?|labels?|num_classes|accurac(?:y|ies)"
TEXT_WORDS = r"tokens|prompts?|perplexity|vocab_size"
TASK_WORDS = re.compile(
    rf"(?<![a-z])({IMAGE_WORDS}|{TEXT_WORDS})(?![a-z])", re.IGNORECASE
)


def words_of(path: Path) -> Iterator[tuple[str, int]]:
    """Every name, argument and attribute of a file and every line of its strings."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        line = getattr(node, "lineno", 0)
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(getattr(node, field, None), str):
                yield getattr(node, field), line
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for number, text in enumerate(node.value.split("\n")):
                yield text, line + number


def test_only_its_task_knows_what_a_batch_means():
    """Images, labels, tokens: data sources, models, tasks, and what writes text."""
    inside, wrong = 0, []
    for path in files("train"):
        name = str(path.relative_to(ROOT))
        for text, line in words_of(path):
            words = set(TASK_WORDS.findall(text))
            if name.startswith("train/report/") and name.endswith("plots.py"):
                words -= {"label", "labels"}  # matplotlib's, of axes and legends
            if words and name.startswith(TASK_FILES + TEXT_FILES):
                inside += 1
            elif words:
                wrong.append(f"{name}:{line}: {text.strip()}")
    assert inside >= 100  # the walk sees them
    assert not wrong, "\n".join(wrong)


MOST_LINES, MOST_LINES_OF_FUNCTION, MOST_OWN_IMPORTS = 400, 60, 7
FIRST = "train.early"
"""What every binary begins with, before its imports; it is not counted among them."""
LONG_ON_PURPOSE = {"train_and_evaluate"}
"""The training loop reads top to bottom."""


def test_files_and_functions_are_short():
    """What must be read to change one thing."""
    wrong = []
    for path in files(*TREES):
        text, name = path.read_text(), path.relative_to(ROOT)
        if len(text.splitlines()) > MOST_LINES:
            wrong.append(f"{name}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MOST_LINES_OF_FUNCTION and node.name not in LONG_ON_PURPOSE:
                    wrong.append(f"{name}:{node.lineno}: {node.name}, {lines} lines")
    assert not wrong, "\n".join(wrong)


def own_imports(path: Path) -> set[str]:
    """The modules of ours that a file imports."""
    return {module for module, _ in imports(path) if is_ours(module)}


def test_no_import_goes_in_a_circle():
    """Neither in the library nor in the application, nor from one to the other."""
    graph = {name_of(path): own_imports(path) for path in files(*TREES)}
    assert "lowrank_jax.errors" in graph["train.registry"]  # the walk sees them
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_a_file_of_the_application_needs_few_others():
    """Other files of train/, that is; the library is one thing, used by its parts."""
    needs = {
        str(path.relative_to(ROOT)): sorted(
            module
            for module in own_imports(path)
            if module.startswith("train.") and module != FIRST
        )
        for path in files("train")
    }
    wrong = {k: v for k, v in needs.items() if len(v) > MOST_OWN_IMPORTS}
    assert not wrong, "\n".join(
        f"{name} imports {len(modules)}: {', '.join(modules)}"
        for name, modules in wrong.items()
    )
    assert max(map(len, needs.values())) > 3  # the walk sees them


def test_orbax_lives_in_one_file():
    users = {
        str(path.relative_to(ROOT))
        for path in files(*TREES)
        for module, _ in imports(path)
        if module.split(".")[0] == "orbax"
    }
    assert len(users) == 1, sorted(users)


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
