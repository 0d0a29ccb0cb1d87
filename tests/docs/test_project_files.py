"""Files that other programs read: the citation, the changelog, templates, hooks."""

import datetime
import re
from pathlib import Path

import pytest
import yaml

from lowrank_jax import __version__

ROOT = Path(__file__).parents[2]
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
INPUTS = ("input", "textarea", "dropdown", "checkboxes")


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def test_the_citation_is_of_this_version():
    """What the format demands (CFF 1.2.0), and no address that nobody has given."""
    citation = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert str(citation["cff-version"]) == "1.2.0" and citation["type"] == "software"
    assert citation["authors"] == [{"name": "The lowrank_jax authors"}]
    assert citation["version"] == __version__
    assert isinstance(citation["date-released"], datetime.date)
    assert not {"doi", "url", "repository-code", "identifiers"} & citation.keys()


def test_the_changelog_has_this_version_and_its_date():
    """Unreleased first, then versions from new to old, each with what changed."""
    text = (ROOT / "CHANGELOG.md").read_text()
    heads = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    assert heads[0] == ("Unreleased", "")
    versions = [tuple(map(int, version.split("."))) for version, _ in heads[1:]]
    assert versions == sorted(versions, reverse=True)
    released = str(read(ROOT / "CITATION.cff")["date-released"])
    assert heads[1] == (__version__, released)
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_is_one_that_issues_can_have(path):
    """Names, and fields of known types with ids of their own."""
    form = read(path)
    assert {"name", "description", "body"} <= form.keys()
    fields = form["body"]
    ids = [field["id"] for field in fields]
    assert len(set(ids)) == len(ids) > 1
    for field in fields:
        assert field["type"] in INPUTS and field["attributes"]["label"]
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_there_are_forms_for_bugs_methods_and_questions():
    assert [path.stem for path in FORMS] == ["bug", "method", "question"]
    bug = FORMS[0].read_text()
    for word in ("lr.__version__", "--config", "train.status", "--verbosity=1"):
        assert word in bug


def test_hooks_come_from_no_other_host():
    """They run the ruff of `.venv`, by the two commands of `make lint`."""
    repos = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    hooks = repos[0]["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    commands = [" ".join(hook["entry"].split()[:2]) for hook in hooks]
    assert commands == [".venv/bin/ruff check", ".venv/bin/ruff format"]
