"""Every file that a run leaves for a later step is verified by its reader; no changed one reaches the output."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek_v3.data.pipeline import run
from deepseek_v3.data.pipeline.run import run_pipeline
from deepseek_v3.data.sample_corpora import synthetic_documents
from deepseek_v3.utils.errors import DataError
from helpers.pipeline import digests, pipeline_config, undisturbed, write_lines

PIPELINE = ["exact_deduplication", "deduplication"]
UNSEALED = (
    "lock",
    "run.json",
    "claim.json",
    "complete.json",
)  # without content of documents; a change is refused or repaired


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("input") / "in"
    rows = [{"id": number % 20, "text": text} for number, text in enumerate(synthetic_documents(24, seed=1))]
    write_lines(folder / "a.jsonl", [*rows, {"id": "copy", "text": rows[3]["text"]}, {"body": "no text"}])
    write_lines(folder / "b.jsonl", [{"text": rows[5]["text"] + " With one more sentence."}])
    return folder


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return undisturbed(corpus, tmp_path_factory.mktemp("output") / "clean", PIPELINE)


def interrupted(corpus: Path, output: Path, step: str) -> None:
    """Starts a run that stops before `step`."""
    config = pipeline_config(str(corpus), output, PIPELINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, step, _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(config)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def flip(path: Path) -> None:
    """Changes a bit in the middle of a file and keeps its size and times."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def files_of(output: Path) -> list[Path]:
    return [path for path in sorted((output / ".work").rglob("*")) if path.is_file() and path.name not in UNSEALED]


def test_a_changed_intermediate_is_made_again(corpus: Path, expected: dict[str, str], tmp_path: Path) -> None:
    interrupted(corpus, tmp_path / "names", "write_shard")
    names = {path.name: path.relative_to(tmp_path / "names") for path in files_of(tmp_path / "names")}
    assert {"records.arrow", "keeper.npy", "tally.json", "part.json", "hashes.npy", "ids.arrow"} <= names.keys()
    for number, name in enumerate(names.values()):
        output = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "names", output)
        (flip, Path.unlink)[number % 2](output / name)
        run_pipeline(pipeline_config(str(corpus), output, PIPELINE))
        assert digests(output) == expected, name


def test_what_cannot_be_made_again_is_refused(corpus: Path, expected: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    interrupted(corpus, output, "write_outputs")
    config = pipeline_config(str(corpus), output, PIPELINE)
    for path in sorted(files_of(output), key=lambda path: "figures" in path.name):
        if path.parent.parent == output / ".work" / "shards" or "figures" in path.name:
            data = path.read_bytes()
            flip(path)
            with pytest.raises(DataError, match=r"the run wrote it|finished parts are missing"):
                run_pipeline(config)
            path.write_bytes(data)
    run_pipeline(config)
    assert digests(output) == expected


def test_a_change_during_the_run_is_noticed(corpus: Path, tmp_path: Path) -> None:
    def spoil(step: Callable[..., None], pattern: str) -> Callable[..., None]:
        def spoil_and_call(*arguments: Any) -> Any:
            for path in (tmp_path / "out" / ".work").glob(pattern):
                flip(path)
            return step(*arguments)

        return spoil_and_call

    for step, pattern in (
        ("write_shard", "pass-0/*/records.arrow"),
        ("run_global_stages", "pass-0/*/keys/deduplication/signatures.npy"),
        ("write_outputs", "shards/*/part-*.parquet"),
        ("write_outputs", "pass-0/*/quarantined.arrow"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, step, spoil(getattr(run, step), pattern))
            with pytest.raises(DataError, match=r"was changed or removed since the run wrote it"):
                run_pipeline(pipeline_config(str(corpus), tmp_path / "out", PIPELINE))
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("name", ["data/part-00000.parquet", "dropped/part-00000.parquet", "report.html"])
def test_a_removed_output_of_a_complete_run_is_noticed(corpus: Path, tmp_path: Path, name: str) -> None:
    config = pipeline_config(str(corpus), tmp_path / "out", PIPELINE)
    run_pipeline(config)
    (tmp_path / "out" / name).unlink()
    with pytest.raises(DataError, match=f"{name}: was changed or removed since the run was complete"):
        run_pipeline(config)


def test_changed_keys_of_a_previous_run_are_refused(corpus: Path, tmp_path: Path) -> None:
    run_pipeline(pipeline_config(str(corpus), tmp_path / "old", PIPELINE, keep_keys=True))
    config = pipeline_config(str(corpus), tmp_path / "new", PIPELINE, previous_runs=[str(tmp_path / "old")])
    for path in sorted((tmp_path / "old" / "keys").glob("*/*/*.npy")):
        flip(path)
        with pytest.raises(DataError, match=f"{path.name}: was changed or removed since the run wrote it"):
            run_pipeline(config)
        flip(path)
        shutil.rmtree(tmp_path / "new")


def test_half_written_outputs_of_a_killed_run_are_removed(
    corpus: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    interrupted(corpus, tmp_path / "out", "write_outputs")
    for name in ("manifest.json", "stats.json", "report.html"):
        (tmp_path / "out" / f".{name}.12345.partial").write_text("half")
    run_pipeline(pipeline_config(str(corpus), tmp_path / "out", PIPELINE))
    assert digests(tmp_path / "out") == expected
