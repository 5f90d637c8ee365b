"""Data sets as Hugging Face's library and hub lay them out: the data are read, and nothing beside them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepseek_v3.data.formats.inputs import find_inputs
from deepseek_v3.data.formats.reading import read_documents
from deepseek_v3.data.formats.side_files import evaluation_splits, missing_files
from deepseek_v3.data.pipeline.run import run_pipeline
from helpers.formats import write
from helpers.pipeline import pipeline_config, rows_of

SPLITS = {"train": 3, "test": 1}


def table(name: str) -> pa.Table:
    return pa.table({"text": [f"{name} {row}" for row in range(2)], "label": [0, 1]})


def write_arrow(path: Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table(name).schema) as writer:
        writer.write_table(table(name))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The files of `DatasetDict.save_to_disk`, after a `map` of the loaded data set."""
    folder = tmp_path / "saved"
    write(folder / "dataset_dict.json", json.dumps({"splits": list(SPLITS)}))
    for split, shards in SPLITS.items():
        names = [f"data-{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]
        for name in names:
            write_arrow(folder / split / name, f"{split} {name[5:10]}")
        write(folder / split / "state.json", json.dumps({"_data_files": [{"filename": name} for name in names]}))
        write(folder / split / "dataset_info.json", json.dumps({"features": {"text": {"dtype": "string"}}}))
    write_arrow(folder / "train" / "cache-340c5a658b47d116.arrow", "mapped")
    write_arrow(folder / "train" / "cache-73a758854c89f0e0_00001_of_00002.arrow", "mapped")
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """The files of a data set on the hub."""
    folder = tmp_path / "hub"
    write(folder / "README.md", "---\nlicense: mit\n---\n# A card\n")
    write(folder / ".gitattributes", "x")
    for split, shards in SPLITS.items():
        for number in range(shards):
            path = folder / "data" / f"{split}-{number:05d}-of-{shards:05d}.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(table(f"{split} {number:05d}"), path)
    return folder


TEXTS = [
    f"{split} {number:05d} {row}" for split in sorted(SPLITS) for number in range(SPLITS[split]) for row in (0, 1)
]


@pytest.mark.parametrize("layout", ["saved", "hub"])
def test_all_splits_are_read_and_nothing_beside_them(layout: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(layout)
    assert [document.text for document in read_documents(folder, warn=False)] == TEXTS
    train = folder / "train" if layout == "saved" else f"{folder}/data/train-*"
    assert [document.text for document in read_documents(train, warn=False)] == TEXTS[2:]


def test_caches_and_descriptions_are_named(saved: Path, hub: Path) -> None:
    reasons = {one.name: one.reason for one in find_inputs(saved).ignored}
    beside = "accompanies data files, and holds no documents"
    cache = "is a cache of the library datasets, and no part of the data set"
    assert reasons == {
        "dataset_dict.json": beside,
        **{f"{split}/{name}.json": beside for split in SPLITS for name in ("dataset_info", "state")},
        "train/cache-340c5a658b47d116.arrow": cache,
        "train/cache-73a758854c89f0e0_00001_of_00002.arrow": cache,
    }
    assert [tuple(one) for one in find_inputs(hub).ignored] == [("README.md", beside)]


def test_files_that_are_missing_are_named(saved: Path, hub: Path) -> None:
    (saved / "train" / "data-00001-of-00003.arrow").unlink()
    missing = ("train/data-00001-of-00003.arrow", "is missing: only 2 of 3 numbered files are there")
    assert missing in find_inputs(saved).ignored
    assert missing not in find_inputs(saved / "test").ignored
    (hub / "data" / "train-00000-of-00003.parquet").unlink()
    (hub / "data" / "train-00002-of-00003.parquet").unlink()
    reason = "is missing: only 1 of 3 numbered files are there"
    assert ("data/train-00000-of-00003.parquet", reason) in find_inputs(hub).ignored
    assert find_inputs(f"{hub}/data/train-00001-*").ignored == []
    assert (
        missing_files(["a-00000-of-00002.arrow", "a-00001-of-00002.arrow", "b-00000-of-00001.parquet", "c"]) == {}
    )


def test_a_run_warns_of_splits_for_evaluation(tmp_path: Path, hub: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run_pipeline(pipeline_config(str(hub), tmp_path / "out", ["preliminary_cleaning"]))
    assert "test: are splits for evaluation, and are read like all others" in caplog.text
    sources = {row["source"] for row in rows_of(tmp_path / "out", "data")}
    assert "data/test-00000-of-00001.parquet" in sources
    assert evaluation_splits(["a/train-00000-of-00001.parquet", "validation/data-00000-of-00001.arrow"]) == [
        "validation"
    ]
    assert evaluation_splits(["test/a.txt", "latest-00000-of-00001.parquet"]) == []


def test_what_the_library_itself_saves_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_dict({"text": ["one", "two", "three"], "tags": [["a"], [], ["b", "c"]]})
    saved.save_to_disk(tmp_path / "saved", num_shards=2)
    assert [document.text for document in read_documents(tmp_path / "saved", warn=False)] == ["one", "two", "three"]
