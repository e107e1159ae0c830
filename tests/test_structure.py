"""How metapt.py is built: chapters in reading order, a core to cut out, no domain out of place."""

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
TITLE = re.compile(r"# (\d)\. ")
STARTS = {int(TITLE.match(line)[1]): n for n, line in enumerate(LINES, 1) if TITLE.match(line)}
PYTHON_FILES = sorted(
    path
    for folder in ("bench", "data_scripts", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)


def chapter_of(line: int) -> int:
    return max((chapter for chapter, start in STARTS.items() if start <= line), default=1)


def chapter(number: int) -> str:
    """The text of a chapter, with the rule above its title and without the one above the next."""
    after = [start for start in STARTS.values() if start > STARTS[number]]
    end = min(after, default=len(LINES) + 2)
    return "\n".join(LINES[STARTS[number] - 2 : end - 2]) + "\n"


def defined(statement: ast.stmt) -> set[str]:
    """The names that a statement binds in the module."""
    table = symtable.symtable(ast.unparse(statement), "", "exec")
    return {
        symbol.get_name()
        for symbol in table.get_symbols()
        if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
    }


def used(table: symtable.SymbolTable) -> set[str]:
    """The names of the module that a statement uses, at once or in a body that runs later."""
    here = {
        symbol.get_name()
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (symbol.is_global() or table.get_type() == "module")
    }
    return here.union(*(used(child) for child in table.get_children()))


def imported(text: str) -> set[str]:
    """The modules that a text imports."""
    modules = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
        elif isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
    return modules


def top_packages(text: str) -> set[str]:
    return {name.partition(".")[0] for name in imported(text)}


def test_the_chapters_stand_in_order_and_each_uses_only_what_stands_above_it():
    assert list(STARTS) == [2, 3, 4, 5, 6, 7, 8, 9]
    first = {}  # name → the chapter that defines it first
    for statement in TREE.body:
        for name in defined(statement):
            first.setdefault(name, chapter_of(statement.lineno))
    late = []
    for statement in TREE.body:
        here = chapter_of(statement.lineno)
        names = used(symtable.symtable(ast.unparse(statement), "", "exec"))
        late += [f"chapter {here} uses {n} of {first[n]}" for n in names if first.get(n, 0) > here]
    expected = {
        "hypergradient": 2,
        "Domain": 3,
        "DigitsRotation": 4,
        "Training": 5,
        "finetune": 6,
        "Run": 7,
        "progress_bar": 8,
        "main": 9,
    }
    assert {name: first[name] for name in expected} == expected
    assert late == []


def test_the_map_in_the_docstring_names_the_chapters_as_they_are():
    entries = re.findall(r"^    (\d)\. (.+?)(?:  .*)?$", metapt.__doc__, re.MULTILINE)
    assert [int(number) for number, _ in entries] == list(STARTS)
    for number, title in entries:
        assert LINES[STARTS[int(number)] - 1].startswith(f"# {number}. {title}")


def test_there_are_two_blocks_of_imports():
    blocks = set()
    for statement in TREE.body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            blocks.add(chapter_of(statement.lineno))
    assert blocks == {2, 3}


def test_the_core_imports_torch_and_the_standard_library_alone():
    assert top_packages(chapter(2)) <= {"torch", *sys.stdlib_module_names}


def test_no_later_chapter_needs_a_private_name_of_the_core():
    private = {
        name
        for statement in TREE.body
        if chapter_of(statement.lineno) == 2
        for name in defined(statement)
        if name.startswith("_")
    }
    rest = "\n".join(LINES[STARTS[3] - 2 :])
    assert private
    assert not [name for name in private if re.search(rf"(?<![\w.]){name}\b", rest)]


def test_the_core_runs_where_it_is_pasted():
    pasted = types.ModuleType("pasted")
    sys.modules["pasted"] = pasted
    try:
        exec(compile(chapter(2), "pasted.py", "exec"), vars(pasted))
    finally:
        del sys.modules["pasted"]
    torch.manual_seed(0)
    theta, psi, phi = ({"w": torch.randn(3, dtype=torch.float64)} for _ in range(3))
    stiffness = torch.arange(1, 4)

    def pretrain_loss(theta, phi):
        return ((theta["w"] - phi["w"]) ** 2 * stiffness).sum() / 2

    def finetune_loss(theta, psi):
        return ((theta["w"] * psi["w"]).sum() - 1) ** 2

    def validation_loss(theta, psi):
        return ((theta["w"] * psi["w"]).sum() - 2) ** 2

    def phi_gradient(module, optimizer, method):
        return module.hypergradient(
            pretrain_loss,
            finetune_loss,
            validation_loss,
            theta,
            psi,
            phi,
            unroll=module.Unroll(2, 0.1, optimizer=optimizer),
            solver=module.Solver(method, terms=3, damping=0.1),
        ).phi["w"]

    for optimizer in ("sgd", "adam"):
        for method in ("identity", "neumann", "cg", "nystrom"):
            found = phi_gradient(pasted, optimizer, method)
            assert torch.equal(found, phi_gradient(metapt, optimizer, method))
            assert found.any()


def test_the_file_is_written_plainly():
    """One idea a statement: what made readers stop before is not there again."""
    nodes = list(ast.walk(TREE))
    assert max(map(len, LINES)) <= 100
    assert "fmt: skip" not in TEXT and "fmt: off" not in TEXT
    assert not [node.lineno for node in nodes if isinstance(node, ast.NamedExpr)]
    several = [
        node.lineno
        for node in nodes
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
    ]
    assert not several
    positional_booleans = [
        node.lineno
        for node in nodes
        if isinstance(node, ast.Call)
        and any(isinstance(a, ast.Constant) and isinstance(a.value, bool) for a in node.args)
    ]
    assert not positional_booleans


# Every part of a built-in domain's name, and every name in code that has one.
WORDS = {word for name in metapt.DOMAINS for word in name.split("-")}
# In prose these are English, and "sources" is a word of other things too.
ENGLISH = {"noise", "sources", "digits", "rotation"}


def words_of(token: tokenize.TokenInfo) -> set[str]:
    """The words of an identifier, a string or a comment: DigitsNoise has two."""
    found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", token.string)
    words = {word.lower() for word in found}
    is_text = token.type == tokenize.STRING and " " in token.string.strip()
    if token.type == tokenize.COMMENT or is_text:
        return words - ENGLISH
    return words


@pytest.mark.parametrize("number", [2, 3, 5, 6, 7, 8, 9])
def test_a_chapter_of_all_domains_names_none(number):
    """Chapter 9 does in its tables and in the default of DOMAIN."""
    tables = [s for s in TREE.body if isinstance(s, ast.Assign) and isinstance(s.value, ast.Dict)]
    table_lines = {line for s in tables for line in range(s.lineno, s.end_lineno + 1)}
    found = []
    for token in tokenize.generate_tokens(io.StringIO(TEXT).readline):
        line = token.start[0]
        allowed = number == 9 and (line in table_lines or "digits-rotation" in token.string)
        if chapter_of(line) == number and not allowed and words_of(token) & WORDS:
            found.append(f"line {line}: {token.string[:60]}")
    assert found == []


def test_no_two_python_files_of_bench_have_one_name():
    names = [path.name for path in PYTHON_FILES if "bench" in path.relative_to(ROOT).parts]
    twice = {name for name in names if names.count(name) > 1}
    assert twice <= {"__init__.py", "conftest.py"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "data_scripts").glob("*.py")), ids=lambda path: path.name
)
def test_data_scripts_need_no_metapt(path):
    assert "metapt" not in top_packages(path.read_text())


@pytest.mark.parametrize(
    "path", sorted((ROOT / "bench" / "domains").glob("*.py")), ids=lambda path: path.name
)
def test_domain_files_use_nothing_that_a_file_of_the_users_cannot(path):
    text = path.read_text()
    names = {
        node.attr
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "metapt"
    }
    assert not [name for name in names if name.startswith("_")]
    of_bench = {name for name in imported(text) if name.partition(".")[0] == "bench"}
    assert of_bench <= {"bench.domains.target"}
