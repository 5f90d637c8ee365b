"""Rules of the house that ruff, mypy and import-linter cannot state: names, sizes, folders and words."""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from deepseek_v3.utils.optional import OPTIONAL_LIBRARIES
from helpers import ROOT

SOURCE, TESTS = ROOT / "src" / "deepseek_v3", ROOT / "tests"
# Modules that send tokens between ranks; nothing else in the four model folders may know torch.distributed.
EXCHANGES = ("all_to_all", "deepep", "exchange", "expert_parallel", "select_dispatcher", "symmetric_memory")
RECURRING = {
    *("__init__", "__main__", "reference", "triton", "check", "formats", "filter", "index", "errors", "command"),
    *("engine", "wide_gradient"),
}
LONGEST_MODULE, SHORT_MODULE, MOST_SHORT_MODULES, LONGEST_TEST_NAME = 350, 50, 30, 60
# Modules that import an optional library, or another one of these, at their top; else only functions import them.
NEED_THEIR_LIBRARY = {
    "benchmark/peers/torchtitan_0_2.py",
    "benchmark/peers/torchtitan_0_3.py",
    "data/deduplication/kernels/numba_kernels.py",
    "evaluation/harness.py",
    "inference/server/app.py",
    "inference/server/event_stream.py",
    "inference/server/http_server.py",
    "ops/cross_entropy/triton.py",
    "ops/early_launch/triton.py",
    "ops/expert_choice/triton.py",
    "ops/few_rows/triton.py",
    "ops/fp8/cuda/__init__.py",
    "ops/fp8/cuda/check.py",
    "ops/fp8/triton.py",
    "ops/fp8_gemm/triton.py",
    "ops/mla_decode/cuda/__init__.py",
    "ops/mla_decode/cuda/check.py",
    "ops/mla_decode/triton.py",
    "ops/moe_permute/triton.py",
    "ops/multi_tensor/triton.py",
    "ops/rotary/triton.py",
    "ops/swiglu/triton.py",
    "ops/router_gemm/triton.py",
    "ops/top_k/triton.py",
    "training/parallel/deepspeed_engine.py",
}
# Distributions whose package has another name, and packages that another one brings along as a part of itself.
IMPORT_NAMES = {"pyyaml": "yaml", "typing-extensions": "typing_extensions"}
PARTS = {"pydantic_core"}
KERNELS = ("triton", "numba_kernels", "numpy_kernels")  # a kernel is not cut in two to be short
# Words of older names and texts, for which no engineer of this field would search.
RETIRED_NAMES = r"so manieth|noticeboard|whereabouts|homeward|\bwhoever\b|\blegs are\b"


def modules() -> list[Path]:
    """Every module of the package but the `__init__.py`s."""
    return [path for path in sorted(SOURCE.rglob("*.py")) if path.stem != "__init__"]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes(tree: ast.AST) -> list[ast.AST]:
    return list(ast.walk(tree))


@cache
def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and full name of everything that is imported."""
    found = []
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
            found += [(node.lineno, name) for name in names]
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines_in(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("folder", ["ops", "mla", "moe", "model"])
def test_model_code_knows_nothing_of_ranks(folder: str) -> None:
    paths = [path for path in (SOURCE / folder).rglob("*.py") if path.stem not in EXCHANGES]
    assert paths
    assert [relative(path) for path in paths if "torch.distributed" in dict(imports(tree_of(path))).values()] == []


def libraries(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and import name of every library that is imported, the standard library and this package aside."""
    for line, name in imports(tree):
        library = name.partition(".")[0]
        if library not in sys.stdlib_module_names and library != "deepseek_v3":
            yield line, library


def functions(tree: ast.AST) -> Iterator[ast.AST]:
    return (node for node in nodes(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def test_only_functions_import_optional_libraries() -> None:
    found = []
    for path in modules():
        if path.relative_to(SOURCE).as_posix() in NEED_THEIR_LIBRARY:
            continue
        tree = tree_of(path)
        inside = {line for function in functions(tree) for line, _ in libraries(function)}
        found += [
            f"{relative(path)}:{line} imports {library}"
            for line, library in libraries(tree)
            if library in OPTIONAL_LIBRARIES and line not in inside
        ]
    assert found == []


def test_modules_that_need_a_library_are_imported_by_functions() -> None:
    modules = (path.removesuffix(".py").removesuffix("/__init__") for path in NEED_THEIR_LIBRARY)
    names = {f"deepseek_v3.{module.replace('/', '.')}" for module in modules}
    found = []
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).as_posix() in NEED_THEIR_LIBRARY:
            continue
        tree = tree_of(path)
        inside = {line for function in functions(tree) for line, _ in imports(function)}
        found += [
            f"{relative(path)}:{line}" for line, name in imports(tree) if name in names and line not in inside
        ]
    assert found == []


def test_functions_import_no_base_library() -> None:
    hidden = [
        f"{relative(path)}:{line} imports {library}"
        for path in modules()
        for function in functions(tree_of(path))
        for line, library in libraries(function)
        if library not in OPTIONAL_LIBRARIES
    ]
    assert hidden == []


def test_no_module_is_imported_by_a_string() -> None:
    names = {"import_module", "importlib.import_module", "__import__"}
    found = []
    for path in SOURCE.rglob("*.py"):
        tree = tree_of(path)
        called = {ast.unparse(node.func) for node in nodes(tree) if isinstance(node, ast.Call)}
        if (called | {name for _, name in imports(tree)}) & names:
            found.append(relative(path))
    assert found == []


def test_every_library_is_a_declared_dependency() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.search(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert declared is not None
    base = {IMPORT_NAMES.get(name, name) for name in re.findall(r'"([\w-]+)', declared[1])}
    imported = {library for path in SOURCE.rglob("*.py") for _, library in libraries(tree_of(path))}
    assert imported - set(OPTIONAL_LIBRARIES) - PARTS == base
    extras = set(re.findall(r"^([\w-]+) = \[", project.partition("optional-dependencies")[2], re.MULTILINE))
    assert {extra for extra in OPTIONAL_LIBRARIES.values() if extra} <= extras


def test_a_file_name_recurs_only_where_its_folder_qualifies_it() -> None:
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


def test_names_of_tests_are_short() -> None:
    long = [
        f"{relative(path)}: {name}"
        for path in sorted(TESTS.rglob("test_*.py"))
        for name in re.findall(r"^ *(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        if len(name) > LONGEST_TEST_NAME
    ]
    assert long == []


def test_the_language_is_that_of_the_field() -> None:
    texts = [path for folder in ("src", "tests", "docs") for path in (ROOT / folder).rglob("*.*")]
    found = [
        f"{relative(path)}:{number}"
        for path in sorted(texts)
        if path.suffix in (".py", ".md") and path.name != Path(__file__).name and path.parent.name != "adr"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(RETIRED_NAMES, line, re.IGNORECASE)
    ]
    assert found == []
