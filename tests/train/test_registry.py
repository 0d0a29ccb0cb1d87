"""Names resolve to functions, and only to those that the user lets in."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.models import MODELS
from train.registry import resolve

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
    build = resolve("model", name, MODELS, allow_imports=allow_imports)
    assert f"{build.__module__}:{build.__name__}" == MODELS[name]


@pytest.mark.parametrize(
    "name", ["lenett", "", "my.module", "a:", ":build", "a:b:c", "..a:b", "a b:c"]
)
def test_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError) as error:
        resolve("model", name, TABLE, allow_imports=None)
    assert str(error.value).startswith(
        "config.model.name: must be one of lenet, mlp or an import path "
        f"'package.module:function', got {name!r}. "
    )


@pytest.mark.parametrize("allow", [None, ["registry_test_package"]])
def test_allowed_path_is_imported(package, allow):
    function = resolve("model", f"{package}.good:build", TABLE, allow_imports=allow)
    assert function() == 1


@pytest.mark.parametrize(
    "allow", [[], ["other"], ["registry_test_package.good"], "xregistry_test_packagex"]
)
def test_refused_path_is_not_imported(package, allow):
    with pytest.raises(ValueError, match=rf"--allow_imports={package}\."):
        resolve("model", f"{package}.good:build", TABLE, allow_imports=allow)
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
        resolve("model", path, TABLE, allow_imports=None)
    message = str(error.value)
    assert message.startswith("config.model.name: must be the import path of a func")
    assert path in message and reason in message


def test_bug_inside_the_module_is_not_hidden(package):
    with pytest.raises(AttributeError, match="NoneType"):
        resolve("model", f"{package}.buggy:build", TABLE, allow_imports=None)
