"""Runs on a folder with every format and every kind of damage: no record is lost, each drop has a reason."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from deepseek_v3.config.preprocess_config import BUILT_IN_STAGES
from deepseek_v3.data.pipeline.registry import STAGES
from deepseek_v3.data.pipeline.run import run_pipeline
from deepseek_v3.data.sample_corpora import write_damaged_corpus
from deepseek_v3.data.stages import Outcome
from deepseek_v3.utils.errors import ConfigError, DataError
from helpers.pipeline import SHEET, digests, pipeline_config, rows_of, write_lines

ALL_STAGES = [*BUILT_IN_STAGES]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("input") / "corpus"
    return folder, write_damaged_corpus(folder, 400)


@pytest.fixture(scope="module")
def finished(damaged: tuple[Path, dict[str, int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("output") / "clean"
    run_pipeline(pipeline_config(str(damaged[0]), output, SHEET))
    return output


def test_the_registry_has_every_built_in_stage_by_its_name() -> None:
    assert [*STAGES] == ALL_STAGES == [stage.name for stage in STAGES.values()]


def test_each_broken_record_is_quarantined_with_its_reason(
    damaged: tuple[Path, dict[str, int]], finished: Path
) -> None:
    found = Counter[str]()
    for row in rows_of(finished, "quarantine"):
        found[row["reason"]] += 1
        assert row["source"]
        assert row["error"]
    assert dict(found) == damaged[1]


def test_the_counts_of_the_manifest_add_up_to_the_input(finished: Path) -> None:
    counts = json.loads((finished / "manifest.json").read_text())["counts"]
    assert counts["kept"] == len(rows_of(finished, "data"))
    assert counts["dropped"] == len(rows_of(finished, "dropped"))
    assert counts["input"] == counts["kept"] + counts["dropped"] + counts["quarantined"]
    assert counts["kept"] > 300


def test_dropped_documents_have_stage_reason_and_figures(finished: Path) -> None:
    dropped = rows_of(finished, "dropped")
    kept = {row["id"] for row in rows_of(finished, "data")}
    assert {row["stage"] for row in dropped} == {"deduplication", "quality_filtering"}
    for row in dropped:
        assert row["reason"]
        assert isinstance(json.loads(row["figures"]), dict)
        assert row["id"] not in kept
    assert len({row["id"] for row in dropped}) == len(dropped)


def test_a_duplicate_names_the_document_that_stays(finished: Path) -> None:
    everyone = {row["id"] for row in rows_of(finished, "data")} | {
        row["id"] for row in rows_of(finished, "dropped")
    }
    duplicates = [row for row in rows_of(finished, "dropped") if row["reason"] == "near_duplicate"]
    assert len(duplicates) >= 40
    for row in duplicates:
        figures = json.loads(row["figures"])
        assert figures["duplicate_of"] in everyone - {row["id"]}
        assert figures["similarity"] >= 0.8


def test_the_input_order_is_kept_and_work_files_are_removed(finished: Path) -> None:
    places = [(row["source"], row["place"]) for row in rows_of(finished, "data")]
    assert places == sorted(places)
    names = sorted(path.name for path in finished.iterdir())
    assert names == ["data", "dropped", "manifest.json", "quarantine", "report.html", "stats.json"]


def test_metadata_is_kept(finished: Path) -> None:
    numbered = [row for row in rows_of(finished, "data") if row["id"].startswith("doc-")]
    for row in numbered:
        assert json.loads(row["metadata"]) == {"number": int(row["id"][4:])}


def test_a_complete_run_is_left_as_it_is(damaged: tuple[Path, dict[str, int]], finished: Path) -> None:
    before = digests(finished)
    manifest = run_pipeline(pipeline_config(str(damaged[0]), finished, SHEET, workers=2))
    assert manifest == json.loads((finished / "manifest.json").read_text())
    assert digests(finished) == before


def test_other_options_do_not_touch_a_complete_run(damaged: tuple[Path, dict[str, int]], finished: Path) -> None:
    with pytest.raises(DataError, match="began with another pipeline"):
        run_pipeline(pipeline_config(str(damaged[0]), finished, ["preliminary_cleaning"]))


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": "One."}])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match=r"holds thesis\.tex and no unfinished run"):
        run_pipeline(pipeline_config(str(source), tmp_path / "out", SHEET))


def test_an_output_folder_inside_the_input_is_not_read(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": f"Document number {n}."} for n in range(9)])
    (tmp_path / "README.md").write_text("Read me.")
    config = pipeline_config(str(tmp_path), tmp_path / "clean", ["preliminary_cleaning"])
    manifest = run_pipeline(config)
    assert manifest["counts"]["kept"] == 9
    assert [file["name"] for file in manifest["ignored"]] == ["README.md"]
    assert run_pipeline(config) == manifest
    other = run_pipeline(pipeline_config(str(tmp_path), tmp_path / "other", ["preliminary_cleaning"]))
    assert other["counts"]["input"] == 9
    assert [file["name"] for file in other["ignored"]] == ["README.md", "clean/"]


@pytest.mark.parametrize("shard", [None, (0, 2)])
def test_a_refused_run_leaves_nothing_behind(tmp_path: Path, shard: tuple[int, int] | None) -> None:
    good = write_lines(tmp_path / "a.jsonl", [{"text": "One."}])
    bad = write_lines(tmp_path / "b.jsonl", [{"word": "One."}])
    with (tmp_path / "huge.jsonl").open("wb") as file:
        file.truncate(2**43)
    for source, fields in (
        (bad, {}),
        (tmp_path / "huge.jsonl", {}),
        (tmp_path / "huge.jsonl", {"work_unit_size": 1}),
        (good, {"memory": "1MB"}),
        (good, {"previous_runs": [str(tmp_path / "none")], "pipeline": ["deduplication"]}),
    ):
        pipeline = fields.pop("pipeline", SHEET)
        with pytest.raises((ConfigError, DataError)):
            run_pipeline(pipeline_config(str(source), tmp_path / "out", pipeline, **fields), shard=shard)
        assert not (tmp_path / "out").exists(), (source, fields)


def test_a_changed_input_file_is_noticed(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in" / "a.jsonl", [{"text": f"Document number {n}."} for n in range(9)])
    config = pipeline_config(str(tmp_path / "in"), tmp_path / "out", ["preliminary_cleaning"])
    run_pipeline(config, shard=(0, 1))
    write_lines(source, [{"text": f"Another document {n}."} for n in range(9)])
    with pytest.raises(DataError, match=r"input file a\.jsonl was changed since the run began"):
        run_pipeline(config)
    write_lines(tmp_path / "in" / "b.jsonl", [{"text": "New."}])
    source.unlink()
    with pytest.raises(DataError, match=r"input file a\.jsonl is gone"):
        run_pipeline(config)


def test_a_changed_file_of_a_stage_is_noticed(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [{"text": f"Document number {n}."} for n in range(9)])
    questions = write_lines(
        tmp_path / "sets" / "questions.jsonl", [{"text": "What is the number of a document, and who asks?"}]
    )
    config = pipeline_config(
        str(tmp_path / "in"),
        tmp_path / "out",
        ["decontamination"],
        decontamination={"evaluation": [str(tmp_path / "sets")]},
    )
    run_pipeline(config, shard=(0, 1))
    write_lines(questions, [{"text": "What else is the number of a document, and who asks?"}])
    with pytest.raises(DataError, match=r"the file .*questions\.jsonl was changed since the run began"):
        run_pipeline(config)
    questions.rename(tmp_path / "sets" / "more.jsonl")
    with pytest.raises(DataError, match=r"the file .*more\.jsonl is new"):
        run_pipeline(config)


def test_common_sentences_of_evaluation_sets_do_not_count(tmp_path: Path) -> None:
    sentence = "Permission is hereby granted free of charge to any person obtaining a copy of this software"
    asked = "How many sheep are left if all but nine of seventeen sheep of a farmer run away today?"
    rows = [{"text": f"{sentence}. File {n} is {'x' * (n % 7)}. {asked if n == 50 else ''}"} for n in range(400)]
    write_lines(tmp_path / "in" / "a.jsonl", rows[:150])
    write_lines(tmp_path / "in" / "b.jsonl", rows[150:])
    write_lines(tmp_path / "sets.jsonl", [{"text": sentence}, {"text": asked}])
    found = {}
    for workers, size in ((1, "1MB"), (2, "16KB")):
        config = pipeline_config(
            str(tmp_path / "in"),
            tmp_path / f"out{workers}",
            ["preliminary_cleaning", "decontamination", "mixing"],
            decontamination={"evaluation": [str(tmp_path / "sets.jsonl")]},
            workers=workers,
            work_unit_size=size,
        )
        assert run_pipeline(config)["counts"]["dropped"] == 1
        found[workers] = [rows_of(config.output_dir, folder) for folder in ("data", "dropped")]
        stats = json.loads((config.output_dir / "stats.json").read_text())
        figures = next(stage["figures"] for stage in stats["stages"] if stage["name"] == "decontamination")
        assert (figures["spared_documents"], figures["common"][0]["documents"]) == (399, 400)
        assert "Common texts in evaluation sets" in (config.output_dir / "report.html").read_text()
    assert found[1] == found[2]
    assert [row["reason"] for row in found[1][1]] == ["evaluation_text"]


@pytest.mark.parametrize("pipeline", [[], ["preliminary_cleaning"], ["exact_deduplication"], ALL_STAGES])
def test_any_list_of_stages_runs(tmp_path: Path, pipeline: list[str]) -> None:
    rows = [{"text": f"The {word} was seen and heard by all of us."} for word in ("cat", "dog", "cat", "bird")]
    write_lines(tmp_path / "in" / "a.jsonl", rows)
    write_lines(tmp_path / "evaluation.jsonl", [{"text": "Nothing of this is in the corpus, is it, not at all."}])
    config = pipeline_config(
        str(tmp_path / "in"),
        tmp_path / "out",
        pipeline,
        decontamination={"evaluation": [str(tmp_path / "evaluation.jsonl")]},
    )
    counts = run_pipeline(config)["counts"]
    assert counts["input"] == 4 == counts["kept"] + counts["dropped"]


def test_an_input_without_a_single_good_record_ends_well(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{\n")
    counts = run_pipeline(pipeline_config(str(tmp_path / "bad.jsonl"), tmp_path / "out", SHEET))["counts"]
    assert counts == {"input": 1, "kept": 0, "dropped": 0, "quarantined": 1, "copies": 0}


def test_a_stage_above_max_drop_warning_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": "The same."} for _ in range(10)])
    manifest = run_pipeline(pipeline_config(str(source), tmp_path / "out", ["exact_deduplication"]))
    assert manifest["alarms"] == [{"stage": "exact_deduplication", "removed": 0.9, "limit": 0.5}]
    assert "removed 90.0% of its documents" in caplog.text


def test_a_stage_that_loses_a_document_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepseek_v3.data.preliminary_cleaning import PreliminaryCleaner

    honest = PreliminaryCleaner.apply

    def careless(self: PreliminaryCleaner, batch: object) -> Outcome:
        result = honest(self, batch)
        result.kept_rows[0] = False
        return result

    monkeypatch.setattr(PreliminaryCleaner, "apply", careless)
    source = write_lines(tmp_path / "a.jsonl", [{"text": "One document."}])
    with pytest.raises(AssertionError, match="preliminary_cleaning lost 1 documents"):
        run_pipeline(pipeline_config(str(source), tmp_path / "out", ["preliminary_cleaning"]))


def test_too_little_memory_for_one_worker_is_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": "One."}])
    with pytest.raises(ConfigError, match=r"memory = 1000000: one worker takes about"):
        run_pipeline(pipeline_config(str(source), tmp_path / "out", SHEET, memory="1MB"))


def test_an_input_larger_than_the_disk_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "huge.jsonl").open("wb") as file:
        file.truncate(2**43)
    with pytest.raises(DataError, match="GB on disk during the run, and"):
        run_pipeline(pipeline_config(str(tmp_path / "huge.jsonl"), tmp_path / "out", SHEET))
    assert not (tmp_path / "out" / "data").exists()


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_code_with_other_operators_is_not_similar(tmp_path: Path, threshold: float) -> None:
    lines = [f"value_{n} = left_{n} + right_{n} * scale_{n} - offset_{n}" for n in range(60)]
    texts = {
        "one": lines,
        "other": [line.replace("+", "-").replace("*", "/") for line in lines],
        "spaced": [line.replace(" ", "  ") for line in lines],
    }
    for name, written in texts.items():
        for suffix in ("py", "txt"):
            path = tmp_path / "in" / suffix / f"{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(written))
    options = {"threshold": threshold}
    run_pipeline(pipeline_config(str(tmp_path / "in"), tmp_path / "out", ["deduplication"], deduplication=options))
    kept = sorted(row["source"] for row in rows_of(tmp_path / "out", "data"))
    assert kept == ["py/one.py", "py/other.py", "txt/one.txt"]
