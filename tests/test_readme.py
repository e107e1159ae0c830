"""README.md: its commands, options and links exist, its excerpts stand in the examples."""

import re

import pytest
from tools import ROOT, main_in

import metapt

README = (ROOT / "README.md").read_text()
EXAMPLES = {path.name: path.read_text() for path in (ROOT / "bench" / "examples").glob("*.py")}
PAGES = [
    ROOT / "README.md",
    ROOT / "bench" / "README.md",
    *sorted((ROOT / "bench" / "docs").glob("*.md")),
]


def test_the_two_commands_stand_on_lines_of_their_own():
    for command in ("python metapt.py meta", "pytest"):
        assert f"pip install -r requirements.txt && {command}" in README.splitlines()


def test_what_it_shows_of_the_examples_stands_there():
    excerpts = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(excerpts) == len(EXAMPLES) == 2
    for excerpt in excerpts:
        assert any(excerpt in text for text in EXAMPLES.values()), excerpt


def test_its_commands_know_their_options(tmp_path):
    (tmp_path / "my_domain.py").write_text(EXAMPLES["my_domain.py"])
    lines = re.findall(r"python metapt\.py ((?:meta|pretrain|finetune|eval) [^#`\n]+)", README)
    assert len(lines) >= 8
    for line in lines:
        command, *arguments = line.split()
        named = []
        if arguments and arguments[0] in (*metapt.DOMAINS, "my_domain.py"):
            named = arguments[:1]
        help_text = main_in(tmp_path, command, *named, "--help")[1]
        unknown = [o for o in re.findall(r"--[a-z-]+", line) if o not in help_text]
        assert unknown == [], line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link
