"""Near deduplication against a comparison of all pairs, for any division into parts, and in difficult cases."""

from __future__ import annotations

import pickle
from itertools import combinations
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.config.deduplication_config import DeduplicationConfig, candidate_probability
from deepseek_v3.data.deduplication import MinHashDeduplicator
from deepseek_v3.data.deduplication.lsh import similar_pairs
from deepseek_v3.data.deduplication.reference import jaccard, shingles
from deepseek_v3.data.stages import NumberedPart
from deepseek_v3.utils.errors import ConfigError
from helpers.deduplication import ENOUGH, Run, decide, mark_removed, write_parts

BACK_ENDS = ("numpy", "numba")


def _words(random: Random, count: int) -> list[str]:
    return [f"w{random.randrange(10_000)}" for _ in range(count)]


def _edited(words: list[str], random: Random, places: int) -> list[str]:
    """Replaces some of the words; each replacement changes 5 shingles if it is far enough from the others."""
    edited = list(words)
    for place in random.sample(range(len(words)), places):
        edited[place] = f"x{random.randrange(10_000)}"
    return edited


def _corpus(seed: int, groups: int) -> list[str]:
    """Originals with two edited copies each, whose similarities to the original range from 1 to about 0.5."""
    random = Random(seed)
    texts = []
    for group in range(groups):
        words = _words(random, random.randrange(80, 400))
        most = max(len(words) // 20, 1)
        texts += [" ".join(words), *(" ".join(_edited(words, random, group * most // groups)) for _ in "ab")]
    random.shuffle(texts)
    return texts


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return _corpus(1, 100)


@pytest.fixture(scope="module")
def true_pairs(corpus: list[str]) -> dict[tuple[int, int], float]:
    """The similarities of all pairs of the corpus that share a shingle."""
    sets = [shingles(text) for text in corpus]
    found = {pair: jaccard(sets[pair[0]], sets[pair[1]]) for pair in combinations(range(len(corpus)), 2)}
    return {pair: similarity for pair, similarity in found.items() if similarity > 0}


def _run(texts: list[str], folder: Path, memory: int = ENOUGH, **options: object) -> Run:
    stage = MinHashDeduplicator(**options)
    return decide(
        stage, write_parts(stage, texts, [len(texts) // 3], folder / "parts"), texts, folder / "run", memory
    )


def _clusters(run: Run) -> list[int]:
    kept_for = _kept_for(run)
    return [kept_for.get(document, document) for document in range(len(run.kept) + len(run.dropped))]


def _kept_for(run: Run) -> dict[int, int]:
    """Returns the document kept in place of each dropped one."""
    return {row: int(orjson.loads(drop["figures"])["duplicate_of"][1:]) for row, drop in run.dropped.items()}


@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.9])
def test_bands_find_the_promised_pairs_and_few_others(
    threshold: float, corpus: list[str], true_pairs: dict[tuple[int, int], float], tmp_path: Path
) -> None:
    truth = {pair: similarity for pair, similarity in true_pairs.items() if similarity >= threshold}
    bands = DeduplicationConfig(threshold=threshold).banding()
    promised = sum(candidate_probability(similarity, *bands) for similarity in truth.values())
    everything = _clusters(_run(corpus, tmp_path / "all", threshold=threshold, cluster_threshold=0.0))
    assert len(truth) > 60
    assert sum(everything[one] == everything[other] for one, other in truth) >= promised - 2

    run = _run(corpus, tmp_path / "near", threshold=threshold)
    clusters = _clusters(run)
    linked = [pair for pair in combinations(range(len(corpus)), 2) if clusters[pair[0]] == clusters[pair[1]]]
    assert sum(pair in truth for pair in linked) >= 0.85 * len(linked)
    justified = {document for pair in linked if pair in truth for document in pair}
    assert run.dropped.keys() <= justified
    assert sum({*pair} <= run.kept.keys() for pair in truth) <= 0.02 * len(truth)


def test_pairs_near_the_threshold_are_compared_exactly(tmp_path: Path) -> None:
    random = Random(4)
    texts = []
    for _ in range(150):
        words = _words(random, 200)
        texts += [" ".join(words), " ".join([*words[: random.randrange(160, 180)], *_words(random, 8)])]
    run = _run(texts, tmp_path)
    pairs = [(i, jaccard(shingles(texts[i]), shingles(texts[i + 1]))) for i in range(0, len(texts), 2)]
    assert sum(similarity < 0.8 for _, similarity in pairs) > 30
    assert not [i for i, similarity in pairs if similarity < 0.8 and i + 1 in run.dropped]
    alike = [i for i, similarity in pairs if similarity >= 0.8]
    assert len([i for i in alike if i + 1 in run.dropped]) >= 0.93 * len(alike)  # found by the bands at 0.8


@pytest.mark.parametrize("accelerator", BACK_ENDS)
def test_numpy_and_numba_write_the_same_keys(accelerator: str, tmp_path: Path) -> None:
    texts = [*_corpus(2, 10), "", "ärger über 中文", "x" * 500]
    files = []
    for name in {accelerator, "auto"}:
        parts = write_parts(MinHashDeduplicator(accelerator=name), texts, [7], tmp_path / name)
        files.append([path.read_bytes() for part in parts for path in sorted(part.keys.iterdir())])
    assert files[0] == files[-1]


@settings(max_examples=15)
@given(data=st.data())
def test_near_results_do_not_depend_on_parts_or_task_order(data: st.DataObject) -> None:
    random = Random(data.draw(st.integers(0, 9)))
    words = _words(random, 60)
    edits = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=25))
    texts = [" ".join(_edited(words, random, places)) if places < 5 else "" for places in edits]
    cuts = data.draw(st.lists(st.integers(0, len(texts)), max_size=4))
    memory = data.draw(st.sampled_from([1_500, 10_000]))
    stage = MinHashDeduplicator(num_perm=32, bands=4, threshold=0.7)  # few bands, and so few tasks and files
    with TemporaryDirectory() as name:
        whole = decide(stage, write_parts(stage, texts, [], Path(name, "w")), texts, Path(name, "wr"))
        cut = decide(stage, write_parts(stage, texts, cuts, Path(name, "c")), texts, Path(name, "cr"), memory)
    assert whole == cut


def test_match_tasks_fit_into_memory(tmp_path: Path) -> None:
    stage = MinHashDeduplicator()
    texts = _corpus(3, 40)
    parts = write_parts(stage, texts, [50], tmp_path)
    assert len(stage.match_tasks(parts, ENOUGH)) == 16
    memory = 12_000
    tasks = stage.match_tasks(parts, memory)
    assert len(tasks) == 16 * -(-len(texts) * 500 // memory)
    documents = 0
    for number, task in enumerate(tasks):
        _, band, low, high = task.arguments
        assert low == (0 if number % 5 == 0 else tasks[number - 1].arguments[3])
        documents += sum(
            int(((k := np.load(p.keys / "keys.npy")[band]) >= low).sum() - (k > high - 1).sum()) for p in parts
        )
    assert documents == 16 * len(texts)


def test_refine_tasks_fit_into_memory(tmp_path: Path) -> None:
    texts = _corpus(5, 30)
    whole = _run(texts, tmp_path / "a")
    assert _run(texts, tmp_path / "b", memory=40_000) == whole
    stage = MinHashDeduplicator()
    parts = write_parts(stage, texts, [], tmp_path / "c")
    matches = []
    for number, task in enumerate(stage.match_tasks(parts, ENOUGH)):
        matches.append(tmp_path / f"{number}.npy")
        stage.match(matches[-1], *task.arguments)
    tasks = stage.refine_tasks(parts, 40_000, matches)
    sizes = [len(text.split()) - 4 for text in texts]
    assert len(tasks) > 3
    for task in tasks:
        documents = {*task.arguments[1].tolist(), *task.arguments[2].tolist()}
        assert sum(sizes[document] for document in documents) * 50 <= 40_000 + 2 * 400 * 50


def test_ten_thousand_copies_are_compared_once_each() -> None:
    copies = 10_000
    signatures = np.tile(np.arange(128, dtype=np.uint8), (copies, 1))
    one, other, similarity = similar_pairs(signatures, np.zeros(copies, np.int64), 0.7, 0.9)
    assert one.tolist() == [0] * (copies - 1)
    assert other.tolist() == list(range(1, copies))
    assert (similarity == 1).all()
    unique, _, stats = MinHashDeduplicator().deduplicate(["the same few words again and again"] * copies)
    assert len(unique) == 1
    assert stats["largest_cluster"] == copies


def test_large_buckets_take_linear_work() -> None:
    members = 300
    signatures = np.random.default_rng(0).integers(0, 256, (members, 128), dtype=np.uint8)
    one, other, _ = similar_pairs(signatures, np.zeros(members, np.int64), -1, 0.9)
    assert {*zip(other[one == 0].tolist(), [0] * members, strict=False)} == {(i, 0) for i in range(1, members)}
    assert len(one) <= 16 * members
    pairs = {*zip(one.tolist(), other.tolist(), strict=True)}
    assert len(pairs) == len(one)
    assert {(a, b) for a, b in combinations(range(members), 2) if a < 8 or b - a <= 8} == pairs


def test_scripts_without_spaces() -> None:
    random = Random(0)
    chinese = "".join(chr(random.randrange(0x4E00, 0x9FA5)) for _ in range(300))
    thai = "".join(chr(random.randrange(0x0E01, 0x0E2E)) for _ in range(300))
    texts = [chinese, thai, chinese[:200] + "新" + chinese[201:], thai[:295] + "ก", chinese[::-1]]
    assert MinHashDeduplicator().deduplicate(texts).ids == [0, 1, 4]


def test_empty_tiny_and_huge_documents() -> None:
    huge = " ".join(_words(Random(0), 300_000))
    texts = ["", "…", "one", "One!", "one two", "two one", "", huge, f"{huge} and more", "a b c d", "a b c d e"]
    _, ids, stats = MinHashDeduplicator().deduplicate(texts)
    assert ids == [0, 1, 2, 4, 5, 6, 7, 9, 10]
    assert stats["duplicates"] == 2
    assert MinHashDeduplicator().deduplicate([]).documents == []
    assert MinHashDeduplicator().deduplicate(["alone"]).documents == ["alone"]


def test_cluster_threshold_limits_chains() -> None:
    words = _words(Random(8), 400)
    chain = [" ".join(words[start : start + 200]) for start in range(0, 200, 12)]
    similarities = [jaccard(shingles(chain[0]), shingles(other)) for other in chain[:4]]
    assert similarities == pytest.approx([1, 0.885, 0.782, 0.690], abs=1e-3)
    to_the_end = MinHashDeduplicator(cluster_threshold=0.0).deduplicate(chain)
    assert to_the_end.ids == [0]
    assert to_the_end.stats["largest_cluster"] == len(chain) == 17
    assert MinHashDeduplicator(cluster_threshold=1.0).deduplicate(chain).ids == list(range(0, 17, 2))
    assert MinHashDeduplicator(cluster_threshold=0.74).deduplicate(chain).ids == [0, 3, 5, 7, 9, 11, 13, 15]


def test_keys_of_a_previous_run_drop_its_duplicates(tmp_path: Path) -> None:
    random = Random(11)
    words = _words(random, 300)
    old = [" ".join(_words(random, 200)), " ".join(words)]
    texts = [*old, " ".join(_words(random, 200)), " ".join(_edited(words, random, 3)), " ".join(words)]
    stage = MinHashDeduplicator()
    first, second = write_parts(stage, texts, [2], tmp_path / "parts")
    assert first.records is not None
    first.records.unlink()
    run = decide(stage, [NumberedPart(first.keys, None, 0, 2), second], texts, tmp_path / "run")
    assert run.removed == [3, 4]
    assert _kept_for(run) == {3: 1, 4: 1}
    assert run.figures["documents"] == 3
    assert run.figures["duplicates"] == 2
    assert run.figures["clusters"] == 1
    assert run.figures["examples"] == []


def test_documents_removed_by_a_previous_stage_are_ignored(tmp_path: Path) -> None:
    texts = ["a b c d e f g", "h i j k l m n", "A b c d e f g", "a, b, c, d, e, f, g"]
    stage = MinHashDeduplicator()
    parts = mark_removed(write_parts(stage, texts, [1], tmp_path / "p"), [0], tmp_path)
    run = decide(stage, parts, texts, tmp_path / "r")
    assert run.removed == [3]
    assert run.dropped[3] == {
        "id": "d3",
        "source": "corpus",
        "place": 4,
        "stage": "deduplication",
        "reason": "near_duplicate",
        "figures": '{"duplicate_of":"d2","similarity":1.0}',
        "trigger": None,
    }


def test_near_figures_for_the_report(tmp_path: Path) -> None:
    random = Random(3)
    texts = [" ".join(_words(random, 50)) for _ in range(60)]
    run = _run([*texts, *texts[:30], *texts[:5], *texts[:5]], tmp_path)
    assert run.figures["cluster_sizes"] == {"2-3": 25, "4-7": 5}
    assert run.figures["largest_cluster"] == 4
    assert run.figures["clusters"] == 30
    examples = run.figures["examples"]
    assert len(examples) == len({example["kept"] for example in examples}) == 20
    assert all(example["duplicate"] - example["kept"] == 60 for example in examples)


def test_deduplication_options() -> None:
    stage = pickle.loads(pickle.dumps(MinHashDeduplicator(num_perm=128, threshold=0.9, accelerator="numpy")))
    assert stage.options.threshold == 0.9
    assert not stage.changes_texts
    assert stage.deduplicate(["a b c d e f", "a b c d e f"]).ids == [0]
    with pytest.raises(ConfigError, match="MinHashDeduplicator: threshold"):
        MinHashDeduplicator(threshold=1.5)
