"""Rules of the house that ruff, mypy and import-linter cannot state: names, sizes, folders and words."""

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from helpers import ROOT

SOURCE, TESTS = ROOT / "src" / "deepseek_v3", ROOT / "tests"
# Modules that send tokens between ranks; nothing else in the four model folders may know torch.distributed.
EXCHANGES = ("all_to_all", "deepep", "exchange", "expert_parallel", "select_dispatcher", "symmetric_memory")
RECURRING = {"__init__", "__main__", "reference", "triton", "filter", "index", "errors", "command", "engine"}
LONGEST_MODULE, SHORT_MODULE, MOST_SHORT_MODULES = 350, 50, 30
KERNELS = ("triton", "numba_kernels", "numpy_kernels")  # a kernel is not cut in two to be short


def modules() -> list[Path]:
    """Every module of the package but the `__init__.py`s."""
    return [path for path in sorted(SOURCE.rglob("*.py")) if path.stem != "__init__"]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines_in(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("folder", ["ops", "mla", "moe", "model"])
def test_model_code_knows_nothing_of_ranks(folder: str) -> None:
    paths = [path for path in (SOURCE / folder).rglob("*.py") if path.stem not in EXCHANGES]
    assert paths
    assert [relative(path) for path in paths if "torch.distributed" in dict(imports(tree_of(path))).values()] == []


def test_no_import_hides_in_a_function() -> None:
    hidden = [
        f"{relative(path)}:{line}"
        for path in modules()
        for function in ast.walk(tree_of(path))
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for line, _ in imports(function)
    ]
    assert hidden == []


def test_a_file_name_recurs_only_where_its_folder_says_what_it_is() -> None:
    counts = Counter(path.stem for path in SOURCE.rglob("*.py"))
    assert {name for name, count in counts.items() if count > 1} <= RECURRING


def test_no_module_is_long() -> None:
    paths = [path for path in modules() if path.stem not in KERNELS]
    assert [relative(path) for path in paths if lines_in(path) > LONGEST_MODULE] == []


def test_few_modules_are_short() -> None:
    short = [relative(path) for path in modules() if lines_in(path) < SHORT_MODULE]
    assert len(short) <= MOST_SHORT_MODULES, short


@pytest.mark.parametrize("kind", ["unit", "data"])
def test_test_folders_mirror_the_package(kind: str) -> None:
    source = SOURCE / "data" if kind == "data" else SOURCE
    folders = {path.parent.relative_to(TESTS / kind) for path in (TESTS / kind).rglob("test_*.py")}
    mirrored = {path.parent.relative_to(source) for path in source.rglob("*.py")}
    assert {str(folder) for folder in folders - mirrored} <= {"benchmarks"}  # which lie beside the package


def test_test_files_have_names_of_their_own() -> None:
    counts = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert [name for name, count in counts.items() if count > 1] == []
