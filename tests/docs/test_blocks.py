"""Every block of code and every command of the documentation runs."""

import ast
import re
from pathlib import Path

import page_links
import pages
import pytest
from pages import ROOT, Block, blocks

from docs.tools.binaries import BINARIES, ask

FAST = {"docs/concepts.md", "docs/guides/own_loop.md"}
"""Pages of a few seconds that nothing else runs; those with commands train: minutes."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> list[Block]:
    return blocks(path.read_text(), name_of(path))


PAGES = [
    pytest.param(path, marks=[] if name_of(path) in FAST else pytest.mark.slow)
    for path in pages.pages()
    if "```" in path.read_text()
]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_a_page_runs(path: Path, tmp_path: Path):
    """From top to bottom, as a reader would, in a folder beside the repository."""
    pages.run(read(path), pages.scratch(tmp_path))


def test_every_command_is_one_that_the_programs_take():
    """Programs, flags, configs and their arguments, places in configs, make's targets;
    in blocks that are not run, too."""
    found = {name_of(path): read(path) for path in pages.pages()}
    calls = [
        command
        for page in found.values()
        for block in page
        if block.language == "bash"
        for command in pages.commands(block.text)
    ]
    assert len(calls) > 20  # the walk sees them
    wrong = [p for name, page in found.items() for p in pages.problems(name, page)]
    assert not wrong, "\n".join(wrong)


OTHERS_FLAGS = ("launch/README.md", "docs/notebooks/", "docs/LOG.md", "docs/faults.md")
OTHERS_FLAGS += ("docs/results.md", "docs/scaling.md")
"""Pages that speak of flags of Slurm, Jupyter, XLA and the benchmarks as well."""


def test_every_flag_in_the_text_is_one_of_ours():
    """Of some binary; which one, the text around says."""
    programs = ask(*BINARIES).values()
    named = {
        (name_of(path), flag)
        for path in pages.pages()
        if not name_of(path).startswith(OTHERS_FLAGS)
        for flag in page_links.flags_in_prose(path.read_text())
    }
    assert len(named) > 40  # the walk sees them
    assert not [one for one in named if not any(p.takes(one[1]) for p in programs)]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=name_of)
def test_the_commands_in_the_heads_of_configs(path: Path):
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    found = re.search(r"^Command: +(.*?)(?=^\w+:|\Z)", doc, re.M | re.S)
    assert found or path.stem in ("__init__", "common", "sizes", "text")
    script = " ".join(found[1].split()) if found else ""
    for command in pages.commands(script):
        assert not list(pages.command_problems(command))


# What the checks are for: pages that are wrong.


def page(text: str) -> list[Block]:
    return blocks(text, "page.md")


def in_bash(command: str, comment: str = "") -> str:
    return f"{comment}\n```bash\n{command}\n```\n"


TRAIN = "python -m train.main --config=configs/nested.py --workdir=runs/x"


def test_blocks_are_found_with_their_place():
    """In lists, too; files, smoke and skip are known."""
    (first, second, third) = page(
        "text\n```python\nx = 1\n```\n- item\n\n  ```python\n"
        "  # file: mine.py\n  y = 2\n  ```\n<!-- test: smoke -->\n\n"
        f"```bash\n{TRAIN}\n```\n"
    )
    assert (first.where, first.text, first.file) == ("page.md:3", "x = 1\n", None)
    assert (second.text, second.file) == ("# file: mine.py\ny = 2\n", "mine.py")
    assert "--config=configs/nested.py:smoke --workdir" in third.script
    (block,) = page(in_bash(TRAIN, "<!-- test: skip, it takes a pod -->"))
    assert block.skipped == "it takes a pod"


@pytest.mark.parametrize(
    "config, smoked",
    [
        ("--config=a.py", "--config=a.py:smoke"),
        ("--config=a.py:cpu,lasso=1e-4 -x", "--config=a.py:cpu,lasso=1e-4,smoke -x"),
        ("--config=a.py:smoke", "--config=a.py:smoke"),
        (
            "--config=a.py --b --config=c.py",
            "--config=a.py:smoke --b --config=c.py:smoke",
        ),
    ],
)
def test_smoke_is_put_into_configs(config, smoked):
    assert Block("", "bash", config, smoke=True).script == smoked


@pytest.mark.parametrize(
    "text, reason",
    [
        ("```sh\nls\n```\n", "must be one of"),
        ("```pycon\n>>> 1\n```\n", "must be one of"),
        ('```python title="x"\n1\n```\n', "nothing follows"),
        (in_bash("ls", "<!-- test: slow -->"), "unknown test comment"),
        (in_bash("ls", "<!-- test: skip -->"), "needs a reason"),
        (in_bash("ls", "<!-- test: smoke -->"), "no config"),
        (in_bash(TRAIN + ":smoke", "<!-- test: smoke, why -->"), "needs a reason"),
        ("<!-- test: skip, why -->\n```text\nx\n```\n", "it is not run"),
        ("<!-- test: skip, why -->\nwords\n", "without a block"),
        ("```python\nx = 1\n", "not closed"),
    ],
)
def test_a_page_that_hides_something_is_refused(text, reason):
    with pytest.raises(AssertionError, match=reason):
        page(text)


@pytest.mark.parametrize(
    "command, problem",
    [
        (TRAIN, None),
        (TRAIN + " --config.data.batch_size=64 --config.phases[0].sizes=static", None),
        ("python -m train.truncate --checkpoint=a --norecalibrate --macs=0.5", None),
        ("python -m launch.local --num_processes=2 -- " + TRAIN + " --x", "flag --x"),
        ("make docs && python -m mkdocs --version", None),
        ("lowrank train --config=configs/nested.py:smoke --workdir=runs/x", None),
        (TRAIN + " --worker=2", "no flag --worker"),
        (TRAIN.replace("nested.py", "nestde.py"), "no config configs/nestde.py"),
        (TRAIN.replace("nested.py", "nested.py:smok"), "smok"),
        (TRAIN + " --config.data.batchsize=64", "has no --config.data.batchsize"),
        (TRAIN + " \\\n  --config.phases[3].sizes=static", "has no --config.phases"),
        ("python -m train.trian --config=configs/nested.py", "no program"),
        ("python -m train.evaluate --config=configs/nested.py", "no flag --config"),
        ("make quickstrat", "no target"),
        ("lowrank trian --x", "no program"),
        (TRAIN + " # --worker=2", None),
        ("echo '\n' && " + TRAIN + " --worker=2", "no flag"),
    ],
)
def test_commands_are_held_to_the_programs(command, problem):
    found = pages.problems("page.md", page(in_bash(command)))
    assert found == [] if problem is None else problem in "".join(found), found


def test_flags_in_the_text_are_found():
    """In code, not in blocks; a place in a config is not one."""
    text = "`--one=2`, `x --two` `--config.seed=1` --three\n```bash\n`a --four`\n```\n"
    assert page_links.flags_in_prose(text) == ["one", "two", "config"]


def test_flags_of_skipped_blocks_are_checked():
    wrong = in_bash(TRAIN + " --worker=2", "<!-- test: skip, it takes a pod -->")
    assert pages.problems("page.md", page(wrong))


@pytest.mark.parametrize(
    "text, said",
    [
        ("```python\nimport lowrank_jaxx\n```\n", "No module named 'lowrank_jaxx'"),
        ("```python\nx = 1\n```\n```python\nassert x == 2\n```\n", '"page.md", line 5'),
        (in_bash("cat nothing.txt | wc -l"), "page.md:3: ended with status 1"),
    ],
)
def test_a_page_that_does_not_run_fails(text, said, tmp_path: Path):
    with pytest.raises(AssertionError) as failure:
        pages.run(page(text), pages.scratch(tmp_path))
    assert said in str(failure.value)


def test_a_page_runs_in_order_in_one_namespace(tmp_path: Path):
    """Python sees what the shell wrote and the other way round; files are there."""
    folder = pages.scratch(tmp_path)
    text = (
        "```python\n# file: mine.py\nNUMBER = 3\n```\n```bash\necho 4 > four.txt\n```\n"
        "```python\nimport mine\n\nx = mine.NUMBER + int(open('four.txt').read())\n"
        "```\n"
        "```python\nopen('seven.txt', 'w').write(str(x))\n```\n"
        "```bash\ntest $(cat seven.txt) = 7\npython -c 'import train'\n```\n"
    )
    pages.run(page(text), folder)
    assert (folder / "seven.txt").read_text() == "7"


def test_a_page_cannot_write_into_the_repository(tmp_path: Path):
    """Its folders are links there."""
    found = page("```python\n# file: configs/mine.py\nx = 1\n```\n")
    with pytest.raises(AssertionError, match="not in the scratch folder"):
        pages.run(found, pages.scratch(tmp_path))
