"""How much there is to read, and how densely it is written: six files, extras and README have budgets."""

import ast
import io
import tokenize
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

SIX = "masking.py model.py data.py evaluate.py pretrain.py finetune.py".split()
EXTRAS = sorted(path.name for path in (ROOT / "extras").glob("*.py"))
NO_TOKENS = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip


class Size(NamedTuple):
    """What a source costs its readers."""

    lines: int
    code: int  # lines with tokens
    tokens: int  # without comments, docstrings and line breaks
    expressions: int  # packed ones: conditional expressions, lambdas, walruses
    statements: int  # packed ones: a tuple assigned to a tuple; a tuple or a test that is a statement


def is_tuple_statement(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, (ast.Tuple, ast.Compare, ast.BoolOp))


def is_packed_assignment(node: ast.AST) -> bool:
    if not isinstance(node, ast.Assign):
        return False
    return isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple)


def measure(source: str) -> Size:
    nodes = list(ast.walk(ast.parse(source)))
    in_docstring = set()
    expressions = 0
    statements = 0
    for node in nodes:
        expressions += isinstance(node, (ast.IfExp, ast.Lambda, ast.NamedExpr))
        statements += is_tuple_statement(node) or is_packed_assignment(node)
        has_body = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if has_body and ast.get_docstring(node) is not None:
            in_docstring.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    tokens = 0
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_docstring = token.type == tokenize.STRING and token.start[0] in in_docstring
        if token.type not in NO_TOKENS and not is_docstring:
            tokens += 1
            code.update(range(token.start[0], token.end[0] + 1))
    return Size(len(source.splitlines()), len(code), tokens, expressions, statements)


def sizes(folder: Path, names: list[str]) -> dict[str, Size]:
    return {name: measure((folder / name).read_text()) for name in names}


def total(found: dict[str, Size]) -> Size:
    return Size(*map(sum, zip(*found.values())))


def test_what_is_measured():
    source = '''"""Of the module,
in two lines."""
a, b = 1, (  # 9 tokens
    "text"
)
a, b = b  # 5
a, b  # 3


def f(x):  # 6
    """Says nothing."""
    (y := x)  # 5
    return (lambda: 1 if x else y)  # 10
'''
    expected = Size(lines=13, code=8, tokens=9 + 5 + 3 + 6 + 5 + 10, expressions=3, statements=2)
    assert measure(source) == expected


def test_the_six_files_are_short():
    found = sizes(ROOT, SIX)
    assert max(size.tokens for size in found.values()) <= 4_000
    assert max(size.lines for size in found.values()) <= 520
    assert total(found).tokens <= 19_000
    assert total(found).lines <= 2_650


def test_the_six_files_are_plain():
    found = sizes(ROOT, SIX)
    for name, size in found.items():
        assert size.tokens <= 11.0 * size.code or name == "masking.py", name
    whole = total(found)
    assert whole.tokens <= 10.7 * whole.code
    assert whole.expressions <= 35
    assert whole.statements <= 5


def test_extras_are_plain():
    whole = total(sizes(ROOT / "extras", EXTRAS))
    assert whole.tokens <= 12.0 * whole.code
    assert whole.statements <= 20


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 330
    assert len(text.split()) <= 2_400


def sources() -> list[str]:
    """Our sources, relative to the clone, in which others may keep their own."""
    paths = [*(ROOT / "extras").rglob("*.py"), *(ROOT / "tests").glob("*.py")]
    return [*SIX, *sorted(str(path.relative_to(ROOT)) for path in paths)]


@pytest.mark.parametrize("path", sources())
def test_no_statement_is_a_tuple(path):
    """Nor a comparison, nor an "and" or "or": those do several things in one."""
    nodes = ast.walk(ast.parse((ROOT / path).read_text()))
    assert [node.lineno for node in nodes if is_tuple_statement(node)] == []


# --- attributes -------------------------------------------------------------------------------------------


def attributes_made(node: ast.AST, owner: str) -> set[str]:
    """Names of the attributes of `owner` that are assigned somewhere in a piece of code."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            if isinstance(part.value, ast.Name) and part.value.id == owner:
                found.add(part.attr)
    return found


def made_late(source: str) -> list[str]:
    """Attributes of its classes that a source makes outside of their __init__; of Run also as `run.x = `."""
    tree = ast.parse(source)
    late = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            parts = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
            made = set()
            if "__init__" in parts:
                made = attributes_made(parts["__init__"], "self")
            assigned = attributes_made(node, "self")
            if node.name == "Run":
                assigned |= attributes_made(tree, "run")
            late += [f"{node.name}.{name}" for name in sorted(assigned - made)]
    return late


def test_every_attribute_is_made_in_init():
    bad = "class Run:\n def __init__(self):\n  self.a, self.b = 1, 2\n"
    bad += " def f(self):\n  self.c, self.a = 3, 4\nrun.d = 5"
    assert made_late(bad) == ["Run.c", "Run.d"]
    source = "\n".join((ROOT / name).read_text() for name in SIX)
    assert source.count("class ") > 20
    assert made_late(source) == []
