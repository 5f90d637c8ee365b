"""Directories appear complete or not at all, from one process, and reading takes the memory of the model."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.interop.huggingface import load_pretrained, save_pretrained
from deepseek_v3.interop.huggingface.import_command import import_checkpoint
from deepseek_v3.model.pretrained import load_checkpoint_model
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.utils.errors import CheckpointError
from deepseek_v3.utils.locks import hold_lock
from helpers.fork_server import CONTEXT
from helpers.models import small_config, small_model

CPU = torch.device("cpu")
Write = Callable[[Path], object]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("source") / "hf"
    tokenizer = Tokenizer.train(["the cat"] * 3, 270)
    save_pretrained(small_model(small_config(vocab_size=280)), path, tokenizer=tokenizer)
    return path


def export(source: Path, path: Path) -> None:
    save_pretrained(load_pretrained(source), path, max_shard_size="100KB")


def import_(source: Path, path: Path) -> None:
    import_checkpoint(source, path)


@pytest.fixture(params=[export, import_], ids=["export", "import"])
def write(request: pytest.FixtureRequest, source: Path) -> Write:
    """Writes a directory of several files."""
    return partial(request.param, source)


def assert_complete(path: Path, source: Path) -> None:
    expected = load_pretrained(source).state_dict()
    hf = (path / "config.json").exists()
    found = (load_pretrained(path) if hf else load_checkpoint_model(path, CPU).model).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def write_until_killed(write: Write, path: Path) -> None:
    """Writes a directory in this process, which dies at the second fsync, with a part of the weights written."""
    left = iter([True])

    def die(descriptor: int) -> None:
        if not next(left, False):
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = die
    write(path)


def test_kill_leaves_nothing_visible_and_the_next_try_works(tmp_path: Path, write: Write, source: Path) -> None:
    # A fork of this process would inherit the locks of torch's threads.
    child = CONTEXT.Process(target=write_until_killed, args=(write, tmp_path / "out"))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_complete(tmp_path / "out", source)


@pytest.mark.parametrize("room", [0, 100, 50_000])
def test_a_full_disk_leaves_nothing(tmp_path: Path, write: Write, room: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"out: cannot be written: .*; (make room, or )?choose another"):
            write(tmp_path / "new" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any(tmp_path.rglob("*[!w]"))


def test_an_fsync_that_fails_leaves_nothing(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match="out: cannot be written: No space left on device; make room, or"):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_left_as_it_is(tmp_path: Path, write: Write) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        with pytest.raises(CheckpointError, match=f"{name}: exists and is left as it is; remove it, or choose"):
            write(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("path", ["file/out", "n" * 300, "s3://bucket/out"])
def test_a_place_that_cannot_be_written_is_named(
    tmp_path: Path, write: Write, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written: .*; choose another directory"):
        write(Path(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_one_process_writes_a_directory(tmp_path: Path, write: Write) -> None:
    with (
        hold_lock(tmp_path / ".out.lock", tmp_path / "out", ""),
        pytest.raises(CheckpointError, match=r"out: .*choose another directory"),
    ):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


MEASURE = """
import gc, sys, torch
from pathlib import Path
from deepseek_v3.interop.huggingface import load_pretrained

def peak():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
for folder, dtype in (("bf16", torch.float32), ("fp8", torch.bfloat16)):
    load_pretrained(f"small_{folder}", dtype=dtype)  # the pages of libraries count when they are first used
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the memory in use
    before = peak()
    model = load_pretrained(folder, dtype=dtype)
    print(peak() - before, sum(tensor.nbytes for tensor in model.state_dict().values()))
    del model
"""


def test_loading_takes_the_memory_of_the_model_and_a_shard(tmp_path: Path) -> None:
    """A model of 25 million parameters, in files of up to 8 MB."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux's /proc")
    widths = {"hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 512}
    for prefix, config in (
        ("", small_config(vocab_size=2048, num_hidden_layers=4, **widths)),
        ("small_", small_config()),
    ):
        model = DeepSeekV3(config).bfloat16()
        save_pretrained(model, tmp_path / f"{prefix}bf16", max_shard_size="8MB")
        save_pretrained(model, tmp_path / f"{prefix}fp8", quantization="fp8", max_shard_size="8MB")
    # With a fixed threshold, memory that is freed goes back to the system, and does not hide what is taken later.
    run = subprocess.run(
        [sys.executable, "-c", MEASURE],
        cwd=tmp_path,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        check=True,
        capture_output=True,
        text=True,
    )
    shard, others = 8 * 10**6, 8 * 10**6
    lines = [tuple(map(int, line.split())) for line in run.stdout.splitlines()]
    assert len(lines) == 2
    for taken, size in lines:
        assert size > 3 * (shard + others)
        assert size < taken <= size + shard + others
