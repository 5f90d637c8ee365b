"""Rules of the house that import-linter cannot state."""

import ast
from pathlib import Path

import pytest

from helpers import ROOT

SOURCE = ROOT / "src" / "deepseek_v3"
KNOWS_RANKS = SOURCE / "moe" / "deepep"


def _imported_modules(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize("room", ["ops", "mla", "moe", "model"])
def test_model_code_knows_nothing_of_ranks(room: str) -> None:
    files = [path for path in (SOURCE / room).rglob("*.py") if KNOWS_RANKS not in path.parents]
    assert files
    offenders = [str(path) for path in files if "torch.distributed" in _imported_modules(path)]
    assert offenders == []


def test_no_import_hides_in_a_function() -> None:
    hidden = []
    for path in SOURCE.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                hidden += [
                    f"{path.name}:{node.lineno}"
                    for node in ast.walk(function)
                    if isinstance(node, (ast.Import, ast.ImportFrom))
                ]
    assert hidden == []
