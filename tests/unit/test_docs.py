"""The pages of the documentation: their links lead somewhere, and the names that they print exist."""

import importlib
import re
from pathlib import Path

import pytest

from helpers import ROOT

PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
IMPORT = re.compile(r"^from (deepseek_v3[\w.]*) import ([\w, ]+)$", re.MULTILINE)
FILE = re.compile(r"`((?:src|tests|docs|scripts|benchmarks|configs)/[\w./-]+\.\w+)`")
# A module named as in `planning/memory.py`, below src/deepseek_v3.
MODULE = re.compile(
    r"`((?:utils|ops|config|planning|charts|mla|moe|data|model|training|inference|interop|evaluation|benchmark)/[\w/]+\.py)`"
)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors that a viewer gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for link in LINK.findall(text_of(page)):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_imports_and_files_that_a_page_names_exist(page: Path) -> None:
    text = text_of(page)
    missing = [
        f"{module}.{name.strip()}"
        for module, names in IMPORT.findall(text)
        for name in names.split(",")
        if not hasattr(importlib.import_module(module), name.strip())
    ]
    missing += [file for file in FILE.findall(text) if not (ROOT / file).exists()]
    missing += [file for file in MODULE.findall(text) if not (ROOT / "src" / "deepseek_v3" / file).exists()]
    assert missing == []


def test_every_page_is_in_the_index() -> None:
    linked = {
        (ROOT / "docs" / link.split("#")[0]).resolve()
        for link in LINK.findall(text_of(ROOT / "docs" / "README.md"))
    }
    pages = {
        page for page in PAGES if page.parent.name != "adr" and "docs" in page.parts and page.name != "README.md"
    }
    assert pages <= linked
