"""Finding the files of an input: each once, with a name that does not depend on the form of the input."""

from __future__ import annotations

import os
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepseek_v3.data.formats.batches import FileRange, ReadOptions
from deepseek_v3.data.formats.file_types import format_of
from deepseek_v3.data.formats.inputs import Inputs, check_unchanged, find_inputs
from deepseek_v3.data.formats.reading import read_range, split_file
from deepseek_v3.data.formats.streams import split_suffix
from deepseek_v3.utils.errors import DataError
from helpers.formats import rows, texts, write


@pytest.fixture
def corpus(tmp_path):
    for name in ("b.jsonl", "a/x.jsonl", "a/y.txt", "a/deep/z.parquet", "c/x.jsonl.gz"):
        write(tmp_path / "corpus" / name, name)
    for name in (".hidden.txt", ".git/config.txt", "a/__pycache__/m.py", "picture.png", "a/table.xlsx"):
        write(tmp_path / "corpus" / name, name)
    return tmp_path / "corpus"


@pytest.fixture
def store():
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield memory
    memory.store.clear()


def names(inputs: Inputs) -> list[str]:
    return [file.name for file in inputs.files]


def error_of(given: object) -> str:
    with pytest.raises(DataError) as caught:
        find_inputs(given)
    message = str(caught.value)
    assert "\n" not in message
    return message


def _known(name: str) -> tuple[str, str | None] | None:
    """The name of the format and of the compression, if the format is known."""
    compression = split_suffix(name)[1]
    found = format_of(name)
    return found and (found.name, compression and compression.name)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.jsonl", ("json_lines", None)),
        ("A.NDJSON.ZSTD", ("json_lines", "zst")),
        ("a.json.xz", ("json", "xz")),
        ("a.b.parquet", ("parquet", None)),
        ("a.feather", ("arrow", None)),
        ("folder.gz/a.ipc", ("arrow", None)),
        ("CC-MAIN-1.warc.gz", ("warc", "gz")),
        ("CC-MAIN-1.warc.wet.gz", ("warc", "gz")),
        ("notes.md", ("text", None)),
        ("main.CPP", ("text", None)),
        ("README", ("text", None)),
        ("README.bz2", ("text", "bz2")),
        ("page.html.gz", ("text", "gz")),
        ("a.parquet.gz", None),
        ("a.tar.gz", ("tar", "gz")),
        ("a.tgz", ("tar", "gz")),
        ("a.txz", ("tar", "xz")),
        ("dewiki-pages-articles1.xml-p1p41242.bz2", ("mediawiki", "bz2")),
        ("a.xml-part", None),
        ("a.ipynb", ("notebook", None)),
        ("a.csv.gz", ("csv", "gz")),
        ("a.png", None),
        ("v1.2", None),
    ],
)
def test_the_suffix_determines_the_format(name, found):
    assert _known(name) == found


def test_a_folder_is_searched_and_skipped_files_are_listed(corpus):
    files, ignored = find_inputs(corpus)
    assert [file.name for file in files] == ["a/deep/z.parquet", "a/x.jsonl", "a/y.txt", "b.jsonl", "c/x.jsonl.gz"]
    assert [(one.name, one.reason) for one in ignored] == [
        ("a/table.xlsx", "no format is known by the suffix '.xlsx'"),
        ("picture.png", "no format is known by the suffix '.png'"),
    ]
    for file in files:
        status = Path(file.path).stat()
        assert (file.size, file.modified) == (status.st_size, str(status.st_mtime_ns))
        assert not file.is_remote


SIDE_FILES = (
    *("README.md", "readme", "LICENSE", "LICENSE.txt", "sub/NOTICE", "_SUCCESS", "_committed_12", "_started_12"),
    *("_metadata", "dataset_info.json", "state.json", "SHA256SUMS", "checksums.txt", "_metadata.json"),
)


def write_files(folder: Path, *names: str) -> Path:
    for name in names:
        write(folder / name, name)
    return folder


@pytest.mark.parametrize("data", ["a.jsonl.gz", "sub/a.parquet", "sub/x/a.arrow", "sub/a.json"])
def test_files_that_accompany_data_are_no_documents(tmp_path, data):
    side_files = [name for name in SIDE_FILES if "sub" in data or "/" not in name]
    write_files(
        tmp_path, data, "sub/notes.txt", "_part.jsonl", "_delta_log/0.json", "_temporary/b.parquet", *side_files
    )
    files, ignored = find_inputs(tmp_path)
    assert names(Inputs(files, [])) == sorted([data, "sub/notes.txt", "_part.jsonl"])
    assert [one.name for one in ignored] == sorted([*side_files, "_delta_log/", "_temporary/"])


def test_files_of_those_names_without_data_are_documents(tmp_path):
    write_files(tmp_path, "README.md", "LICENSE", "code/__init__.py", "code/README", "_notes.txt")
    files, ignored = find_inputs(tmp_path)
    assert (len(files), ignored) == (5, [])


def test_a_package_with_its_json_files_is_read_whole(tmp_path):
    sources = [
        *("lodash/_arrayMap.js", "lodash/_Hash.js", "lodash/map.js", "lodash/README.md", "lodash/LICENSE"),
        *(
            "tool/_version.py",
            "tool/__init__.py",
            "tool/README.md",
            "tool/tests/cases.jsonl",
            "tool/tests/_util.py",
        ),
        *("docs/_sidebar.md", "docs/_posts/2020-01-01.md", "docs/CHANGELOG.md"),
    ]
    described = ["lodash/package.json", "lodash/tsconfig.json", "lodash/_SUCCESS"]
    files, ignored = find_inputs(write_files(tmp_path, *sources, *described))
    assert [file.name for file in files if not file.name.endswith(".json")] == sorted([*sources, "lodash/_SUCCESS"])
    assert ignored == []


def test_the_outputs_of_earlier_runs_are_no_documents(tmp_path):
    run = (
        "manifest.json",
        "stats.json",
        "report.html",
        "data/0.parquet",
        "dropped/0.parquet",
        "quarantine/0.parquet",
    )
    write_files(tmp_path, "raw/a.jsonl", "raw/new/a.txt", *(f"raw/old/{name}" for name in run))
    write_files(tmp_path / "raw" / "tokens", "index.json", "tokenizer.json", "train/0.bin")
    for given in ("raw", "raw/**/*.*"):
        files, ignored = find_inputs(str(tmp_path / given))
        assert [file.name for file in files] == ["a.jsonl", "new/a.txt"]
        assert [one.name for one in ignored] == ["old/", "tokens/"]
    assert names(find_inputs(tmp_path / "raw" / "old")) == ["data/0.parquet"]
    assert names(find_inputs(tmp_path / "raw" / "old" / "data")) == ["0.parquet"]
    (tmp_path / "link").symlink_to(tmp_path / "raw" / "new")
    files, ignored = find_inputs(tmp_path / "raw", tmp_path / "link")
    assert [file.name for file in files] == ["a.jsonl"]
    assert (str(tmp_path / "link"), "is in the output_dir of this run") in ignored


def test_one_file_is_an_input(corpus):
    ((file,), ignored) = find_inputs(str(corpus / "a" / "y.txt"))
    assert (file.name, file.path, ignored) == ("y.txt", str(corpus / "a" / "y.txt"), [])


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.jsonl", ["b.jsonl"]),
        ("*/x.*", ["a/x.jsonl", "c/x.jsonl.gz"]),
        ("**/*.jsonl", ["a/x.jsonl", "b.jsonl"]),
        ("**", ["a/deep/z.parquet", "a/x.jsonl", "a/y.txt", "b.jsonl", "c/x.jsonl.gz"]),
        ("[ac]", ["a/deep/z.parquet", "a/x.jsonl", "a/y.txt", "c/x.jsonl.gz"]),
        ("a/d?ep/*", ["z.parquet"]),
        ("a/*", ["deep/z.parquet", "x.jsonl", "y.txt"]),
    ],
)
def test_patterns_match_files_and_folders(corpus, pattern, found):
    found_names = names(find_inputs(f"{corpus}/{pattern}"))
    assert found_names == ([f"deep/{name}" for name in found] if pattern == "a/d?ep/*" else found)


def test_a_relative_pattern_starts_here(corpus, monkeypatch):
    monkeypatch.chdir(corpus)
    ((file,), _) = find_inputs("*.jsonl")
    assert (file.name, file.path) == ("b.jsonl", str(corpus / "b.jsonl"))


def test_an_existing_name_with_wildcards_is_a_name(tmp_path):
    path = write(tmp_path / "part[1].txt", "a")
    assert names(find_inputs(path)) == ["part[1].txt"]


def test_overlapping_inputs_in_any_order_are_read_once(corpus):
    given = [str(corpus / "a"), f"{corpus}/**/*.jsonl", str(corpus / "b.jsonl")]
    found = find_inputs(given)
    assert names(found) == ["a/x.jsonl", "b.jsonl", "deep/z.parquet", "y.txt"]
    for _ in given:
        given.append(given.pop(0))
        assert find_inputs(given) == found


def test_links_are_followed_once_and_broken_links_are_listed(tmp_path):
    folder = tmp_path / "corpus"
    write(folder / "a.txt", "a")
    write(tmp_path / "elsewhere" / "b.txt", "b")
    (folder / "up").symlink_to(folder)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "dangling.txt").symlink_to(tmp_path / "missing")
    os.mkfifo(folder / "pipe")
    found = find_inputs(folder)
    assert names(found) == ["a.txt", "linked/b.txt"]
    assert [(one.name, one.reason) for one in found.ignored] == [
        ("dangling.txt", "is a broken link, or not a regular file"),
        ("pipe", "is a broken link, or not a regular file"),
    ]


def test_a_name_that_is_not_utf8_is_listed(tmp_path):
    write(tmp_path / "a.txt", "a")
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("b")
    found = find_inputs(tmp_path)
    assert names(found) == ["a.txt"]
    assert [(one.name, one.reason) for one in found.ignored] == [("caf?.txt", "its name is not UTF-8; rename it")]


def test_a_wrong_input_is_named(corpus, tmp_path):
    assert "nothing was given" in error_of([])
    assert error_of(corpus / "nowhere").startswith(f"{corpus}/nowhere: does not exist")
    assert error_of(f"{corpus}/nowhere/*.txt").startswith(f"{corpus}/nowhere/*.txt: does not exist")
    assert "holds no text: expected .jsonl" in error_of(f"{corpus}/*.warc")
    assert "holds no text: found only picture.png" in error_of(corpus / "picture.png")
    assert "write ** between slashes" in error_of(f"{corpus}/**.jsonl")
    (tmp_path / "empty").mkdir()
    assert "holds no text" in error_of([str(corpus), str(tmp_path / "empty")])


def test_two_files_of_one_name_are_refused(corpus):
    one, other = corpus / "a" / "x.jsonl", write(corpus / "d" / "x.jsonl", "")
    message = error_of([str(corpus / "a"), str(corpus / "d")])
    assert message.startswith(f"{one} and {other}: would both be called 'x.jsonl'")


def test_an_unreadable_folder_is_named(corpus, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert error_of(corpus) == f"{corpus}: cannot be read: Permission denied"


def test_stores_are_searched_and_read(store):
    lines = b"".join(b'{"text": "line %d"}\n' % number for number in range(9))
    store.pipe(
        {"/bucket/a/x.jsonl": lines, "/bucket/b.txt": b"text", "/bucket/.hidden/c.txt": b"", "/bucket/d.png": b""}
    )
    files, ignored = find_inputs("memory://bucket")
    assert [(file.name, file.path, file.size) for file in files] == [
        ("a/x.jsonl", "memory:///bucket/a/x.jsonl", len(lines)),
        ("b.txt", "memory:///bucket/b.txt", 4),
    ]
    assert [one.name for one in ignored] == ["d.png"]
    assert all(file.modified and file.is_remote for file in files)
    assert split_file(files[0], 20) == [FileRange(files[0])]
    with store.open("/bucket/c.parquet", "wb") as file:
        pq.write_table(pa.table({"text": ["one", "two"]}), file, row_group_size=1)
    ((columnar,), _) = find_inputs("memory://bucket/c.parquet")
    assert [one.start for one in split_file(columnar, 1)] == [0, 1]
    assert texts(rows(list(read_range(split_file(columnar, 1)[1], ReadOptions())))[0]) == ["two"]
    found = [list(read_range(FileRange(file), ReadOptions())) for file in files]
    assert texts(rows(found[0])[0]) == [f"line {number}" for number in range(9)]
    assert texts(rows(found[1])[0]) == ["text"]
    assert names(find_inputs("memory://bucket/**/*.jsonl")) == ["a/x.jsonl"]
    assert names(find_inputs("memory://bucket/b.txt")) == ["b.txt"]
    assert "nothing was found there" in error_of("memory://bucket/nowhere")


def test_files_of_a_web_server_have_their_size(tmp_path):
    write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            for given in (f"{address}/a.jsonl", f"{address}/"):
                (file,) = find_inputs(given).files
                assert (file.name, file.size) == ("a.jsonl", 14)
                check_unchanged(file)
                assert texts(rows(list(read_range(FileRange(file), ReadOptions())))[0]) == ["a"]
            write(tmp_path / "a.jsonl", '{"text": "another"}\n')
            with pytest.raises(DataError, match="changed while it was read"):
                check_unchanged(file)
            (tmp_path / "a.jsonl").unlink()
            with pytest.raises(DataError, match="vanished while it was read"):
                check_unchanged(file)
        finally:
            server.shutdown()
            thread.join()


def test_only_a_failing_store_raises_for_an_object(store, monkeypatch):
    store.pipe("/bucket/a.jsonl", b'{"text": "a"}\n')
    (file,) = find_inputs("memory://bucket/a.jsonl").files
    store.rm("/bucket/a.jsonl")
    assert rows(list(read_range(FileRange(file), ReadOptions())))[1][0]["reason"] == "unreadable"

    def fail(*_, **__):
        raise TimeoutError("no answer")

    monkeypatch.setattr(fsspec, "open", fail)
    with pytest.raises(DataError, match=r"memory:///bucket/a.jsonl: cannot be read: no answer; start again"):
        list(read_range(FileRange(file), ReadOptions()))


def test_addresses_of_local_files_are_paths(corpus):
    assert find_inputs(f"file://{corpus}") == find_inputs(corpus)
    assert find_inputs(f"file://{corpus}/**/*.jsonl") == find_inputs(f"{corpus}/**/*.jsonl")


def test_a_library_that_a_store_needs_is_named(monkeypatch):
    def missing(_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("deepseek_v3.data.formats.inputs.url_to_fs", missing)
    assert error_of("s3://bucket/a").endswith("Install s3fs to access S3; run `pip install s3fs`")
    assert error_of("odd://bucket/a").endswith("Install s3fs to access S3; install what it names")


def test_an_unknown_kind_of_address_is_named():
    assert error_of("nosuch://bucket/a").startswith("nosuch://bucket/a: cannot be opened: Protocol not known")
