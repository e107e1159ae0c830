"""How metapt.py is built: chapters in reading order, a core that can be cut out, no domain where none belongs."""

import ast
import io
import re
import symtable
import sys
import tokenize
import types

import pytest
import torch
from tools import ROOT

import metapt

TEXT = (ROOT / "metapt.py").read_text()
LINES = TEXT.splitlines()
TREE = ast.parse(TEXT)
STARTS = {int(match[1]): number for number, line in enumerate(LINES, 1) if (match := re.match(r"# (\d)\. ", line))}


def chapter_of(line: int) -> int:
    return max((chapter for chapter, start in STARTS.items() if start <= line), default=1)


def chapter(number: int) -> str:
    """The text of a chapter, with the rule above its title and without the one above the next."""
    after = [start for start in STARTS.values() if start > STARTS[number]]
    return "\n".join(LINES[STARTS[number] - 2 : min(after, default=len(LINES) + 2) - 2]) + "\n"


def defined(statement: ast.stmt) -> set[str]:
    """The names that a statement binds in the module."""
    table = symtable.symtable(ast.unparse(statement), "", "exec")
    return {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}


def used(table: symtable.SymbolTable) -> set[str]:
    """The names of the module that a statement uses, at once or in a body that runs later."""
    here = {s.get_name() for s in table.get_symbols()
            if s.is_referenced() and (s.is_global() or table.get_type() == "module")}  # fmt: skip
    return here.union(*(used(child) for child in table.get_children()))


def test_the_chapters_stand_in_order_and_each_uses_only_what_stands_above_it():
    assert list(STARTS) == [2, 3, 4, 5, 6, 7, 8, 9]
    first = {}  # name → the chapter that defines it first
    for statement in TREE.body:
        for name in defined(statement):
            first.setdefault(name, chapter_of(statement.lineno))
    late = []
    for statement in TREE.body:
        here, names = chapter_of(statement.lineno), used(symtable.symtable(ast.unparse(statement), "", "exec"))
        late += [f"chapter {here} uses {n} of chapter {first[n]}" for n in sorted(names) if first.get(n, 0) > here]
    assert {"hypergradient", "Domain", "Training", "finetune", "Images", "Run", "progress_bar", "main"} <= set(first)
    assert late == []


def test_the_core_is_at_most_450_lines_and_imports_torch_and_the_standard_library_alone():
    assert len(chapter(2).splitlines()) <= 450
    assert {name.partition(".")[0] for name in imported(chapter(2))} <= {"torch", *sys.stdlib_module_names}


def test_the_core_runs_where_it_is_pasted():
    pasted = types.ModuleType("pasted")
    exec(compile(chapter(2), "pasted.py", "exec"), vars(pasted))  # noqa: S102
    torch.manual_seed(0)
    theta, psi, phi = ({"w": torch.randn(3, dtype=torch.float64)} for _ in range(3))
    losses = (
        lambda theta, phi: ((theta["w"] - phi["w"]) ** 2 * torch.arange(1, 4)).sum() / 2,
        lambda theta, psi: ((theta["w"] * psi["w"]).sum() - 1) ** 2,
        lambda theta, psi: ((theta["w"] * psi["w"]).sum() - 2) ** 2,
    )
    for optimizer, method in [(o, m) for o in ("sgd", "adam") for m in ("identity", "neumann", "cg", "nystrom")]:
        found, expected = (
            module.hypergradient(*losses, theta, psi, phi, unroll=module.Unroll(2, 0.1, optimizer=optimizer),
                                 solver=module.Solver(method, terms=3, damping=0.1))
            for module in (pasted, metapt)
        )  # fmt: skip
        assert torch.equal(found.phi["w"], expected.phi["w"]) and found.phi["w"].any()


def code_lines(text: str) -> int:
    """Lines with code on them: neither empty, nor a comment, nor of a docstring."""
    quiet = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = {line for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in quiet
             for line in range(token.start[0], token.end[0] + 1)}  # fmt: skip
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_the_file_is_short_enough_to_be_read():
    counted = '"""One\n\ntwo."""\n\n# three\nx = [\n    1,  # four\n]\n\n\ndef f():\n    "five"\n    return """six\nseven"""\n'
    assert code_lines(counted) == 6
    assert len(LINES) <= 2441  # 2,300 before ranks, bfloat16, compiling and fewer waits came: it should be that again
    assert code_lines(TEXT) <= 1832  # 1,700 then
    assert max(map(len, LINES)) <= 160


# Every part of a built-in domain's name, and every name in code that has one; "noise" in prose is English.
WORDS = {word for name in metapt.DOMAINS for word in name.split("-")}


def words_of(token: tokenize.TokenInfo) -> set[str]:
    """The words of an identifier, a string or a comment in lower case: DigitsNoise and digits_noise have two."""
    words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", token.string)}
    prose = token.type == tokenize.COMMENT or (token.type == tokenize.STRING and " " in token.string.strip())
    return words - {"noise"} if prose else words


@pytest.mark.parametrize("number", [2, 3, 4, 5, 7, 8, 9])
def test_a_chapter_of_all_domains_names_none(number):
    """Chapter 9 does in tables."""
    assert WORDS == {"digits", "mnist", "rotation", "noise", "affine", "ppi", "ecg"}
    tables = [s for s in TREE.body if isinstance(s, ast.Assign) and isinstance(s.value, ast.Dict)]
    table_lines = {line for s in tables for line in range(s.lineno, s.end_lineno + 1) if number == 9}
    found = [f"line {token.start[0]}: {token.string[:60]}"
             for token in tokenize.generate_tokens(io.StringIO(TEXT).readline)
             if chapter_of(token.start[0]) == number and token.start[0] not in table_lines
             and words_of(token) & WORDS]  # fmt: skip
    assert found == []


def imported(text: str) -> set[str]:
    """The modules that a text imports."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {
        node.module or "" if isinstance(node, ast.ImportFrom) else alias.name for node in nodes for alias in node.names
    }


@pytest.mark.parametrize("path", sorted((ROOT / "data_scripts").glob("*.py")), ids=lambda path: path.name)
def test_data_scripts_need_no_metapt(path):
    assert not any(name.partition(".")[0] == "metapt" for name in imported(path.read_text()))


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "domains").glob("*.py")), ids=lambda path: path.name)
def test_domain_files_use_nothing_that_a_file_of_the_users_cannot(path):
    names = {node.attr for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "metapt"}  # fmt: skip
    assert names and not [name for name in names if name.startswith("_")]
    assert "bench" not in {name.partition(".")[0] for name in imported(path.read_text())}
