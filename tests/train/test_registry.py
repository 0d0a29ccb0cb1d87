"""Names resolve to functions, and only to those that the user lets in."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowrank_jax.errors import UserError, at
from train.models import MODELS
from train.registry import build, call, complete, resolve

TABLE = {"lenet": "train.models.lenet:build", "mlp": "train.models.mlp:build"}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of a package on the path that nothing has imported yet."""
    name = "registry_test_package"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "good.py").write_text("CONSTANT = 3\ndef build(): return 1\n")
    (tmp_path / name / "needy.py").write_text("import registry_test_absent\n")
    (tmp_path / name / "buggy.py").write_text("(None).shape\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[module]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("allow_imports", [None, []])
def test_short_names_need_no_permission(name, allow_imports):
    build = resolve(name, MODELS, allow_imports=allow_imports)
    assert f"{build.__module__}:{build.__name__}" == MODELS[name]


@pytest.mark.parametrize(
    "name", ["net", "", "my.module", "a:", ":build", "a:b:c", "..a:b", "a b:c"]
)
def test_unknown_name_gives_the_nearest_one_or_all(name):
    with pytest.raises(ValueError) as error:
        resolve(name, TABLE, allow_imports=None)
    meant = "Did you mean 'lenet'?" if name == "net" else "Choose one, or give the"
    listed = "" if name == "net" else ", one of 'lenet', 'mlp'"
    assert str(error.value).startswith(
        "name: must be a known name or an import path 'package.module:function'"
        f"{listed}, got {name!r}. {meant}"
    )


@pytest.mark.parametrize("allow", [None, ["registry_test_package"]])
def test_allowed_path_is_imported(package, allow):
    function = resolve(f"{package}.good:build", TABLE, allow_imports=allow)
    assert function() == 1


@pytest.mark.parametrize(
    "allow", [[], ["other"], ["registry_test_package.good"], "xregistry_test_packagex"]
)
def test_refused_path_is_not_imported(package, allow):
    with pytest.raises(ValueError, match=rf"--allow_imports={package}\."):
        resolve(f"{package}.good:build", TABLE, allow_imports=allow)
    assert not [m for m in sys.modules if m.split(".")[0] == package]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("registry_test_absent.module:build", "No module named"),
        ("registry_test_package.absent:build", "No module named"),
        ("registry_test_package.needy:build", "No module named 'registry_test_absent'"),
        ("registry_test_package.good:absent", "good has no function 'absent'"),
        ("registry_test_package.good:CONSTANT", "good has no function 'CONSTANT'"),
    ],
)
def test_failed_import_is_one_clear_error(package, path, reason):
    with pytest.raises(ValueError) as error:
        resolve(path, TABLE, allow_imports=None)
    message = str(error.value)
    assert message.startswith("name: must be the import path of a func")
    assert path in message and reason in message


def test_bug_inside_the_module_is_not_hidden(package):
    with pytest.raises(AttributeError, match="NoneType"):
        resolve(f"{package}.buggy:build", TABLE, allow_imports=None)


def model(shape, *, width: int = 3, sizes=(1, 2), act=print, mode=None, rngs=None):
    """Stands for someone's own model."""
    if width < 0:
        raise UserError("width: must be >= 0.")
    if width == 7:
        raise ValueError("a bug of the model")
    return shape, width, sizes, rngs


def open_ended(*layers, scale=float("inf"), **rest):
    return layers, scale, rest


CHOICES = {"model": model, "open": open_ended}


class TestBuild:
    def test_positional_supplied_and_given(self):
        spec = {"name": "model", "args": {"width": 5}}
        assert build(spec, CHOICES, (8, 8), rngs=1) == ((8, 8), 5, (1, 2), 1)
        assert call(model, (8, 8), width=1)[1] == 1

    @pytest.mark.parametrize(
        "args, reason",
        [
            ({"widht": 3}, "an argument of model, got 'widht'. Did you mean 'width'?"),
            ({"shape": 3}, "arguments of model (['width', "),
            ({}, "missing a required argument: 'shape'"),
        ],
    )
    def test_arguments_that_do_not_fit(self, args, reason):
        """The caller's place comes first; the nearest known argument is given."""
        positional = ((8, 8),) if args else ()
        with pytest.raises(UserError) as error, at("config.model"):
            build({"name": "model", "args": args}, CHOICES, *positional)
        message = str(error.value)
        assert message.startswith("config.model: args: must be a")
        assert reason in message

    def test_mistakes_and_bugs_pass_through(self):
        """What the function raises is its own; a bug is not made a user's mistake."""
        with pytest.raises(UserError, match=r"^config.model: width: must be >= 0"):
            with at("config.model"):
                build({"name": "model", "args": {"width": -1}}, CHOICES, 0)
        with pytest.raises(ValueError, match="^a bug of the model$") as error:
            with at("config.model"):
                build({"name": "model", "args": {"width": 7}}, CHOICES, 0)
        assert type(error.value) is ValueError


class TestComplete:
    def test_defaults_are_written_out(self):
        """Those that JSON holds, and not what the caller gives."""
        spec = complete(
            {"name": "model", "args": {"width": 5}},
            CHOICES,
            positional=1,
            supplied=("rngs",),
        )
        args = {"width": 5, "sizes": [1, 2], "mode": None}
        assert spec == {"name": "model", "args": args}
        assert json.loads(json.dumps(spec)) == spec
        again = complete(spec, CHOICES, positional=1, supplied=("rngs",))
        assert again == spec

    def test_the_given_spec_stays_as_it_is(self):
        spec = {"name": "model", "args": {}}
        complete(spec, CHOICES, positional=1)
        assert spec == {"name": "model", "args": {}}

    def test_open_ended_arguments(self):
        spec = {"name": "open", "args": {"depth": 3}}
        assert complete(spec, CHOICES) == spec

    def test_of_a_table_of_import_paths(self):
        spec = complete(
            {"name": "adam", "args": {"b1": 0.8}},
            {"adam": "optax:adam"},
            supplied=("learning_rate",),
        )
        assert spec["args"]["b1"] == 0.8 and spec["args"]["b2"] == 0.999
        assert "learning_rate" not in spec["args"]

    def test_unknown_ones_are_all_named(self):
        """One that the caller gives itself is none of the config's."""
        args = {"widht": 3, "rngs": 0, "shape": 1, "width": 2}
        with pytest.raises(UserError) as error:
            complete(
                {"name": "model", "args": args},
                CHOICES,
                positional=1,
                supplied=("rngs",),
            )
        listed = "one of 'width', 'sizes', 'act', 'mode', got"
        assert str(error.value).splitlines() == [
            "args: must be an argument of model, got 'widht'. Did you mean 'width'?",
            f"args: must be an argument of model, {listed} 'rngs'. Choose one.",
            f"args: must be an argument of model, {listed} 'shape'. Choose one.",
        ]
