"""The standard library is a corpus of megabytes, the same on every machine with the same Python."""

import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from deepseek_v3.data.sample_corpora import stdlib_documents


@pytest.fixture(scope="module")
def documents():
    return list(stdlib_documents())


def test_modules_come_first_and_each_is_its_source(documents):
    by_id = {document.id: document.text for document in documents}
    root = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse.py", "json/decoder.py", "asyncio/base_events.py"):
        assert by_id[name] == (root / name).read_bytes().decode()
    assert len(by_id) == len(documents)


def test_every_topic_of_the_reference_is_a_document(documents):
    found = {document.id: document.text for document in documents if document.id.startswith("pydoc_data/")}
    assert found == {f"pydoc_data/topics/{name}": text for name, text in topics.items()}


def test_tests_and_installed_packages_are_left_out(documents):
    parts = {part for document in documents for part in Path(document.id).parts}
    assert parts.isdisjoint({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def test_no_document_names_the_machine(documents):
    assert not any(Path(document.id).is_absolute() for document in documents)
    prefixes = {sysconfig.get_config_var("prefix"), str(Path.home())} - {None, "/", "/usr", "/usr/local", "/root"}
    for document in documents:
        assert not any(prefix in document.text for prefix in prefixes), document.id


def test_the_order_is_fixed(documents):
    modules = [document.id for document in documents if not document.id.startswith("pydoc_data/")]
    assert modules == sorted(modules, key=lambda name: Path(name).parts)
    assert [document.id for document in stdlib_documents()] == [document.id for document in documents]


def test_it_is_megabytes_of_text(documents):
    assert sum(len(document.text) for document in documents) > 5_000_000


def test_build_records_and_other_encodings_are_left_out(tmp_path, monkeypatch):
    files = {
        "a.py": "a = 1",
        "b/c.py": "c = 1",
        "empty.py": "\n",
        "notes.txt": "no module",
        "_sysconfigdata__linux_x86_64.py": "paths of the builder",
        "config-3.11-x86_64-linux-gnu/python-config.py": "paths of the builder",
        "site-packages/numpy.py": "installed",
        "b/tests/test_c.py": "a test",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    found = [document.id for document in stdlib_documents() if not document.id.startswith("pydoc_data/")]
    assert found == ["a.py", "b/c.py"]
