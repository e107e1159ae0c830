"""bench/README.md is an index of pages, which are readable in an editor; commands exist."""

import importlib
import importlib.util
import re

import pytest
import typer
from typer.testing import CliRunner

from bench.stored import ROOT

INDEX = ROOT / "bench" / "README.md"
PAGES = sorted((ROOT / "bench" / "docs").glob("*.md"))
COMMAND = r"python -m (bench\.[a-z_.]+)((?: [^`\n;)]+)?)"


def commands() -> list[tuple[str, str]]:
    """Every `python -m bench.X ...` of README.md, of the index and of the pages."""
    texts = [path.read_text() for path in (ROOT / "README.md", INDEX, *PAGES)]
    found = {pair for text in texts for pair in re.findall(COMMAND, text)}
    return sorted(found)


def test_the_index_has_every_page_once():
    linked = re.findall(r"\(docs/([a-z-]+)\.md\)", INDEX.read_text())
    assert sorted(linked) == sorted(page.stem for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_a_question_a_set_up_and_short_lines(page):
    lines = page.read_text().splitlines()
    assert lines[0].startswith("# ") and lines[0].endswith("?")
    assert "## Set-up" in lines
    assert [line for line in lines if len(line) > 110] == []


def test_no_two_files_of_bench_have_one_name():
    paths = [path for path in (ROOT / "bench").rglob("*") if path.is_file()]
    hidden = (".", "__pycache__")
    names = [p.name for p in paths if not any(part.startswith(hidden) for part in p.parts)]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


@pytest.mark.parametrize(("module", "words"), commands(), ids=lambda value: value.strip())
def test_a_command_exists_and_knows_its_options(module, words):
    assert importlib.util.find_spec(module), module
    loaded = None if ".examples." in module else importlib.import_module(module)
    app = getattr(loaded, "app", None)
    if app is None and hasattr(loaded, "main"):
        app = typer.Typer()
        app.command()(loaded.main)
    if app is None:  # it has no options
        assert not words.strip()
        return
    arguments = words.split()
    group = typer.main.get_command(app)
    subcommand = []
    if arguments and arguments[0] in getattr(group, "commands", {}):
        subcommand = arguments[:1]
    result = CliRunner().invoke(app, [*subcommand, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    options = [word for word in arguments if word.startswith("--")]
    assert [o for o in options if o.partition("=")[0] not in result.output] == []
