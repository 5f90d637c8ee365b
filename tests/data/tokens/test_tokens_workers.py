"""Encoding in several processes gives the same bytes in bounded memory, and leaves no process."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from deepseek_v3.data.documents import Document
from deepseek_v3.data.tokens import encoding
from deepseek_v3.data.tokens.encoding import CorpusEncoder, encode_batches
from deepseek_v3.data.tokens.index import CorpusOptions
from deepseek_v3.data.tokens.tokenize_corpus import tokenize_corpus
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.utils.errors import DataError
from helpers.jobs import HANGS

TEXTS = [f"Document {i}: " + "Grüße, <|endoftext|> 世界! " * (i % 7) for i in range(300)]
OPTIONS = CorpusOptions(source="corpus", text_field="text", holdout=0.2, fim_rate=0.5, seed=0)


@pytest.fixture(autouse=True)
def _processes_from_the_first_batch_on(monkeypatch):
    monkeypatch.setattr(encoding, "_ALONE_CHARACTERS", 1)
    monkeypatch.setattr("deepseek_v3.data.tokens.tokenize_corpus._BATCH_CHARACTERS", 500)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


def build(documents, output: Path, monkeypatch, **options) -> None:
    monkeypatch.setattr("deepseek_v3.data.tokens.tokenize_corpus.stdlib_documents", documents)
    defaults = {"tokenizer": None, "holdout": 0.2, "fim_rate": 0.5, "seed": 0}
    tokenize_corpus("python-stdlib", output, vocab_size=300, **{**defaults, **options})


def read_documents():
    return (Document(str(i), text) for i, text in enumerate(TEXTS))


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, monkeypatch):
    for workers in (1, 2, 3):
        build(read_documents, tmp_path / str(workers), monkeypatch, workers=workers, shard_tokens=700)
    assert len(files_of(tmp_path / "1")) > 8
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2") == files_of(tmp_path / "3")


def test_a_small_corpus_stays_in_this_process(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_ALONE_CHARACTERS", 10**6)
    monkeypatch.setattr(encoding, "WorkerPool", None)
    build(read_documents, tmp_path / "out", monkeypatch, workers=8)


@pytest.fixture
def own_workers():
    """Lists the processes that the test has started, without those of the session."""
    before = multiprocessing.active_children()
    return lambda: [process for process in multiprocessing.active_children() if process not in before]


def test_little_is_read_ahead(tokenizer, own_workers):
    read = 0

    def batches():
        nonlocal read
        for start in range(0, len(TEXTS), 3):
            read += 1
            yield TEXTS[start : start + 3]

    encoder = CorpusEncoder(tokenizer, OPTIONS)
    with closing(encode_batches(encoder, batches(), 2)) as encoded:
        for number, batch in enumerate(encoded, start=1):
            expected = encoder.encode(TEXTS[3 * number - 3 : 3 * number])
            assert [ids.tolist() for _, ids, _ in batch.documents()] == [
                ids.tolist() for _, ids, _ in expected.documents()
            ]
            assert read <= number + 4
    assert number == read == 100
    assert not own_workers()


def test_a_killed_worker_is_reported_and_leaves_nothing(tmp_path, monkeypatch, own_workers):
    def documents():
        killed = False
        for document in [*read_documents()] * 9:
            yield document
            workers = own_workers()
            if workers and not killed:
                os.kill(workers[0].pid, signal.SIGKILL)
                killed = True

    with pytest.raises(DataError, match="a worker process was killed, perhaps for lack of memory"):
        build(documents, tmp_path / "out", monkeypatch, workers=2)
    assert not list(tmp_path.iterdir())
    assert not own_workers()


def test_a_fault_in_the_source_ends_the_workers(tmp_path, monkeypatch, own_workers):
    passes = 0

    def documents():
        nonlocal passes
        passes += 1
        yield from read_documents()
        if passes == 3:  # the first chooses the hold-out, the second trains the tokenizer
            assert len(own_workers()) == 2
            raise DataError("the last line is bad")

    with pytest.raises(DataError, match="the last line is bad"):
        build(documents, tmp_path / "out", monkeypatch, workers=2)
    assert not list(tmp_path.iterdir())
    assert not own_workers()


def test_no_workers_are_refused(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="workers = 0: expected at least 1"):
        build(read_documents, tmp_path / "out", monkeypatch, workers=0)


def test_workers_load_no_torch():
    program = "import sys; import deepseek_v3.data.tokens.encoding; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "False"


ENDLESS = """
import itertools, multiprocessing, signal
from deepseek_v3.data.tokens import encoding
from deepseek_v3.data.tokens.encoding import CorpusEncoder, encode_batches
from deepseek_v3.data.tokens.index import CorpusOptions
from deepseek_v3.data.tokens.tokenizer import Tokenizer

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    encoding._ALONE_CHARACTERS = 1
    options = CorpusOptions(source="x", text_field="text", holdout=0.1, fim_rate=0.0, seed=0)
    encoder = CorpusEncoder(Tokenizer.train([], 260), options)
    for number, _ in enumerate(encode_batches(encoder, itertools.repeat(["some text"] * 100), 2)):
        if number == 3:
            print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent_however_it_ends(tmp_path, how):
    program = tmp_path / "endless.py"
    program.write_text(ENDLESS)
    parent = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    assert all(is_running(worker) for worker in workers)
    parent.send_signal(how)
    errors = parent.communicate(timeout=HANGS)[1]
    assert errors.count("KeyboardInterrupt\n") == (how == signal.SIGINT)
    deadline = time.monotonic() + HANGS
    while any(is_running(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(worker) for worker in workers)


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
