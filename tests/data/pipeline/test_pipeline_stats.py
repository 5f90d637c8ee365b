"""Statistics add up in any order of the parts, and damaged parts are found."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.data.documents import record_batch
from deepseek_v3.data.pipeline.run_folder import finish_part, is_intact, read_part
from deepseek_v3.data.pipeline.stats import Stats, source_groups
from deepseek_v3.data.stages import Drop, outcome
from deepseek_v3.utils.files import atomic_folder

TEXTS = st.lists(st.text(max_size=40), max_size=12)


def _batch(texts: list[str], start: int = 0) -> pa.RecordBatch:
    places = range(start, start + len(texts))
    sources = [("web/a.jsonl", "web/b.jsonl", "c.txt")[place % 3] for place in places]
    return record_batch([str(place) for place in places], texts, sources, places, [None] * len(texts))


def _stats(texts: list[str], start: int) -> Stats:
    stats = Stats()
    batch = _batch(texts, start)
    drops = [Drop(row, "long", {"found": len(text)}) for row, text in enumerate(texts) if len(text) > 20]
    result = outcome("length", batch, drops, {"score": [len(text) / 40 for text in texts]})
    stats.stage("length", batch, result)
    stats.kept(result.kept, 7 * result.kept.num_rows)
    return stats


@given(st.lists(TEXTS, max_size=5), st.randoms())
def test_parts_add_up_in_any_order(parts: list[list[str]], chooser: object) -> None:
    all_stats = []
    start = 0
    for texts in parts:
        all_stats.append(_stats(texts, start).to_json())
        start += len(texts)
    sums = []
    for _ in range(2):
        total = Stats()
        for stats in all_stats:
            total.add(Stats.from_json(stats))
        sums.append(total.to_json())
        chooser.shuffle(all_stats)  # type: ignore[attr-defined]
    assert sums[0] == sums[1]


def test_stage_counts_by_documents_bytes_reason_and_source() -> None:
    texts = ["short", "ä" * 30, "long " * 10, "kept as well"]
    counts = _stats(texts, 0).counts
    stage = counts["stages"]["length"]
    assert stage["in"] == {"documents": 4, "bytes": 5 + 60 + 50 + 12}
    assert stage["out"] == {"documents": 2, "bytes": 5 + 12}
    assert stage["reasons"] == {"long": {"documents": 2, "bytes": 110}}
    assert stage["sources"] == {"web": {"in": 3, "out": 2}, "c.txt": {"in": 1, "out": 0}}
    assert stage["observed"]["score"]["before"] == {"0.12": 1, "0.75": 1, "1.2": 1, "0.3": 1}
    assert stage["observed"]["score"]["after"] == {"0.12": 1, "0.3": 1}
    assert counts["kept"]["documents"] == 2
    assert counts["kept"]["tokens"] == 14


def test_samples_hold_the_text_and_the_figures() -> None:
    samples = _stats(["x" * 700], 0).samples["length/long"]
    assert samples[0]["text"] == "x" * 600
    assert samples[0]["characters"] == 700
    assert samples[0]["figures"] == '{"found":700}'


def test_a_source_is_its_first_folder_or_itself() -> None:
    assert source_groups(pa.array(["a/b/c", "d", "a/e"])) == ["a", "d", "a"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "part"
    try:
        with atomic_folder(target, keep_existing=True) as partial:
            (partial / "file").write_text("half")
            raise OSError("no space")
    except OSError:
        pass
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(target, keep_existing=True) as partial:
        (partial / "file").write_text("whole")
        written = finish_part(target, partial, 3, 5, (0, 12))
    assert read_part(target) == written
    with atomic_folder(target, keep_existing=True) as partial:
        (partial / "file").write_text("a second worker did the same work")
    assert is_intact(written)
    (target / "file").write_text("whale")
    assert not is_intact(written)
    (target / "file").unlink()
    assert not is_intact(written)
    assert read_part(tmp_path / "nothing") is None
