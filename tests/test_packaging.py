"""The wheel and the sdist, built and installed in an environment of their own."""

import ast
import email
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

import lowrank_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
APPLICATION = ("train", "configs", "launch")
COPIED = ("lowrank_jax", *APPLICATION, "benchmarks", "examples", "notebooks", "tests")
EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]

OUTSIDE = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
"""Variables of a process that knows nothing of this checkout."""


class Built(NamedTuple):
    """Both distributions."""

    wheel: Path
    sdist: Path


class Environment(NamedTuple):
    """A virtual environment with the wheel in it."""

    folder: Path

    def run(self, *command: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Runs one of its programs from a folder of its own, without this checkout."""
        done = subprocess.run(
            [self.folder / "bin" / command[0], *command[1:]],
            cwd=self.folder,
            env=OUTSIDE,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """Built from a copy, so that nothing is left in this folder."""
    source, folder = (tmp_path_factory.mktemp(name) for name in ("source", "dist"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
        elif path.name in COPIED:
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, source / path.name, ignore=ignore)
    command = ["-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return Built(wheel, sdist)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Environment:
    """A fresh environment with the wheel. It sees what else is installed here, after
    its own; an editable install of this project it does not, since Python reads the
    `.pth` files of a folder that a `.pth` file names no more."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    pip = ["-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet"]
    command = [sys.executable, *pip, "--no-deps", "--no-index", built.wheel]
    subprocess.run(command, cwd=folder, env=OUTSIDE, check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    here = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "here.pth").write_text("".join(f"{path}\n" for path in here))
    return Environment(folder)


def test_the_wheel_is_the_library(built):
    """Every file of the package, its marker for type checkers, and nothing else."""
    names = set(zipfile.ZipFile(built.wheel).namelist())
    wanted = {
        path.relative_to(ROOT).as_posix() for path in ROOT.glob("lowrank_jax/**/*.py")
    } | {"lowrank_jax/py.typed", "lowrank_command.py"}
    about = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - about == wanted


def test_the_sdist_builds_the_same_and_tells_what_it_is(built):
    """The package, what builds it, and what a reader of the archive looks for."""
    with tarfile.open(built.sdist) as archive:
        members = [member.name for member in archive if member.isfile()]
    names = {name.split("/", 1)[1] for name in members}
    library = {
        name for name in zipfile.ZipFile(built.wheel).namelist() if "-info/" not in name
    }
    papers = {"README.md", "LICENSE", "pyproject.toml"}
    papers |= {name for name in ("CHANGELOG.md",) if (ROOT / name).exists()}
    assert library | papers <= names
    others = {name.split("/")[0] for name in names - library - papers}
    assert others <= {"lowrank_jax.egg-info", "MANIFEST.in", "PKG-INFO", "setup.cfg"}


def test_the_metadata_say_what_is_needed(built):
    """The library needs six packages; all others come with an extra that is named."""
    with zipfile.ZipFile(built.wheel) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith("-info/METADATA"))
        metadata = email.message_from_bytes(wheel.read(name))
        points = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert metadata["Version"] == lowrank_jax.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    needed = [one for one in metadata.get_all("Requires-Dist") if "extra" not in one]
    names = {re.match(r"[\w-]+", one)[0] for one in needed}
    assert names == {"jax", "flax", "optax", "orbax-checkpoint", "jaxtyping", "numpy"}
    extras = {"export", "train", "serve", "test", "docs"}
    assert extras <= set(metadata.get_all("Provides-Extra"))
    assert "lowrank = lowrank_command:main" in points
    assert metadata.get_payload().startswith("# lowrank_jax")


def test_requirements_are_the_library_and_the_application():
    """requirements.txt is what the two commands install, line for line."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    written = [line.partition("#")[0].strip() for line in lines]
    train = [one for one in EXTRAS["train"] if one != "lowrank_jax[export]"]
    assert len(train) == len(EXTRAS["train"]) - 1
    assert written == [*PROJECT["dependencies"], *train, *EXTRAS["export"]]


def test_what_is_imported_is_declared():
    """Of the library by its dependencies, of the application with the extra `train`."""
    of_module = importlib.metadata.packages_distributions()
    library = names(PROJECT["dependencies"])
    export = names(EXTRAS["export"])
    train = names(EXTRAS["train"]) | library | export
    for trees, declared in ((("lowrank_jax",), library), (APPLICATION, train)):
        wrong = {
            module: sorted(distributions)
            for module in imported(*trees)
            if not declared & (distributions := set(map(normal, of_module[module])))
        }
        assert not wrong
    assert {"jax", "optax"} <= imported("lowrank_jax")  # the walk sees them
    assert {"sklearn", "PIL"} <= imported("train")


def imported(*trees: str) -> set[str]:
    """Top-level modules, others than ours, that files of these folders import."""
    found = set()
    for path in (path for tree in trees for path in ROOT.glob(f"{tree}/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    ours = {path.name for path in ROOT.iterdir() if path.is_dir()}
    return found - ours - sys.stdlib_module_names


def names(requirements: list[str]) -> set[str]:
    return {normal(re.match(r"[\w.-]+", one)[0]) for one in requirements}


def normal(name: str) -> str:
    """A name as packaging compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


IMPORTED = """
import json, sys
import flax.nnx, jax, optax
before = {name.split(".")[0] for name in sys.modules}
import lowrank_jax
added = {name.split(".")[0] for name in sys.modules} - before
print(json.dumps({"added": sorted(added), "file": lowrank_jax.__file__}))
"""


def test_the_installed_library_runs_the_first_example(installed):
    """From the wheel alone, in another folder; its import brings nothing heavy."""
    lines = installed.run("python", "-c", IMPORTED + EXAMPLE).stdout.splitlines()
    about = json.loads(lines[0])
    assert Path(about["file"]).is_relative_to(installed.folder)
    check_light(about["added"])
    assert "factored" in "".join(lines[1:])


def check_light(added: Sequence[str]) -> None:
    """Asserts which packages an import brings beside what jax, flax and optax do: no
    orbax, no safetensors, no flags, nothing of the application."""
    packages = {*added} - sys.stdlib_module_names
    assert {"lowrank_jax"} <= packages <= {"lowrank_jax", "jaxtyping", "wadler_lindig"}


def test_the_installed_command_knows_its_version_and_its_limits(installed):
    """The binaries are in the repository: without it the command says how to get
    them."""
    version = installed.run("lowrank", "--version").stdout
    assert version == f"lowrank_jax {lowrank_jax.__version__}\n"
    done = installed.run("lowrank", "train", "--workdir=runs", status=1)
    (line,) = done.stderr.splitlines()
    (site,) = installed.folder.glob("lib/python*/site-packages")
    assert not done.stdout and line == (
        "error: lowrank train: must run from a clone of the repository, which has the"
        f" binaries, got the library alone in {site}. Clone the repository, and run pip"
        " install --editable '.[train]' in it."
    )


def test_a_users_type_checker_knows_the_public_face(installed):
    """From the installed wheel: what goes in as somebody's model comes out as one. The
    README's first example has no mistake either."""
    (installed.folder / "example.py").write_text(EXAMPLE)
    shutil.copy(ROOT / "tests/typed_face.py", installed.folder)
    (installed.folder / "mypy.ini").write_text(MYPY)
    python = installed.folder / "bin/python"
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", python, *SCRIPTS],
        cwd=installed.folder,
        env=OUTSIDE,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"Success: no issues found in {len(SCRIPTS)} source files\n"


SCRIPTS = ("example.py", "typed_face.py")
MYPY = f"""
[mypy]
check_untyped_defs = True
warn_unused_ignores = True
cache_dir = {Path.home() / ".cache/lowrank_jax/mypy"}
[mypy-optax.*]
ignore_missing_imports = True
"""


def test_exports_name_the_extra_that_they_need(monkeypatch, tmp_path):
    """Where safetensors or flatbuffers is missing, one line says what to install."""
    jax, nnx = pytest.importorskip("jax"), pytest.importorskip("flax.nnx")
    from lowrank_jax import export

    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    (tmp_path / "file").write_bytes(b"")
    example = jax.ShapeDtypeStruct((1, 2), "float32")
    calls = {
        "safetensors": [
            lambda: export.save_safetensors(tmp_path / "model", model),
            lambda: export.read_safetensors(tmp_path / "file"),
        ],
        "flatbuffers": [
            lambda: export.to_stablehlo(model, example),
            lambda: export.from_stablehlo(b""),
        ],
    }
    for package, functions in calls.items():
        for module in (package, f"{package}.numpy"):
            monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
        for function in functions:
            with pytest.raises(lowrank_jax.UserError) as caught:
                function()
            assert str(caught.value) == (
                f"lowrank_jax.export: must have the package {package}, got an"
                " environment without it. Run pip install 'lowrank_jax[export]'."
            )


@pytest.mark.slow
def test_pip_installs_the_library_alone(built, tmp_path):
    """From an index, into an environment with nothing in it: the example runs, and what
    the application needs is not there."""
    venv.create(tmp_path, with_pip=True)
    environment = Environment(tmp_path)
    environment.run("python", "-m", "pip", "install", "--quiet", str(built.wheel))
    (site,) = tmp_path.glob("lib/python*/site-packages")
    absent = ("tensorflow_datasets", "matplotlib", "sklearn", "safetensors")
    assert not [name for name in absent if (site / name).exists()]
    lines = environment.run("python", "-c", IMPORTED + EXAMPLE).stdout.splitlines()
    check_light(json.loads(lines[0])["added"])
    assert "factored" in "".join(lines[1:])
    environment.run("python", "-c", SAVES)


SAVES = """
import lowrank_jax as lr
from flax import nnx
model = lr.factorize(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
lr.checkpoint.save("saved", model)
saved = lr.checkpoint.open_checkpoint("saved")
assert lr.get_ranks(lr.checkpoint.load(saved, model)) == {"": 3}
from lowrank_jax import export
try:
    export.save_safetensors("model", model)
except lr.UserError as error:
    assert "lowrank_jax[export]" in str(error)
else:
    raise AssertionError("safetensors must not be there")
"""
