"""Damaged, incomplete and replaced checkpoint folders, and folders beside files in the directory of a run."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import pickle
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_v3.utils import files
from deepseek_v3.utils.checkpointing import reader
from deepseek_v3.utils.checkpointing.directory import (
    CheckpointDirectory,
    is_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from deepseek_v3.utils.checkpointing.safetensors_file import map_bytes
from deepseek_v3.utils.checkpointing.sharded import ShardedWriter, load_sharded
from deepseek_v3.utils.errors import CheckpointError
from deepseek_v3.utils.files import sha256_of_file

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TENSORS = "rank_00000.safetensors"
INDEX = "index.json"


def state(step: int) -> dict[str, Any]:
    return {"step": step, "model": {"weight": torch.full((3, 2), float(step)), "count": torch.tensor(step)}}


def save_folder(checkpoints: CheckpointDirectory, step: int) -> Path:
    with ShardedWriter(checkpoints, None) as writer:
        return writer.save(step, state(step)).path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("deepseek_v3")]


def assert_refused(folder: Path, match: str) -> None:
    """Loads in both ways; each raises an error of one line that names the folder."""
    for load in (load_checkpoint, lambda path: load_sharded(path, {"model.weight": torch.zeros(3, 2)}, None)):
        with pytest.raises(CheckpointError, match=match) as error:
            load(folder)
        assert str(folder) in str(error.value)
        assert "\n" not in str(error.value)


def with_index(folder: Path, change: Callable[[dict[str, Any]], None], version: int = 1) -> None:
    """Writes an index with a right checksum and wrong contents."""
    index = json.loads((folder / INDEX).read_text())
    change(index)
    body = json.dumps({name: index[name] for name in index if name not in ("version", "sha256")})[1:].encode()
    head = f'{{"version":{version},"sha256":"{hashlib.sha256(body).hexdigest()}",'.encode()
    (folder / INDEX).write_bytes(head + body)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(CheckpointDirectory(tmp_path, keep=9), 5)


# Bytes


@pytest.mark.parametrize("name", [INDEX, TENSORS])
def test_every_flipped_byte_is_found(name: str, folder: Path) -> None:
    path, bit = folder / name, random.Random(0)
    good = path.read_bytes()
    for offset in range(len(good)):
        damaged = bytearray(good)
        damaged[offset] ^= 1 << bit.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"{name}: (is damaged|does not begin|has version)"):
            load_checkpoint(folder)


@pytest.mark.parametrize("name", [INDEX, TENSORS])
def test_a_file_cut_short_is_named(name: str, folder: Path) -> None:
    path = folder / name
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=rf"{name}: .*copy it again, or load an older one"):
            load_checkpoint(folder)


def test_a_file_cut_short_is_named_without_its_checksum_too(folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{TENSORS}: has \d+ bytes, expected \d+; copy it again"):
        load_checkpoint(folder, verify=False)


@pytest.mark.parametrize("name", [INDEX, TENSORS])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    assert_refused(folder, rf"{name}: there is no such file; give the path of")


def test_a_file_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == TENSORS:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert_refused(folder, rf"{TENSORS}: cannot be read: Permission denied; expected")


def test_a_folder_that_is_deleted_while_it_is_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def delete(path: Path) -> str:
        shutil.rmtree(path.parent)
        return sha256_of_file(path)

    monkeypatch.setattr(reader, "sha256_of_file", delete)
    with pytest.raises(CheckpointError, match=rf"{TENSORS}: there is no such file"):
        load_checkpoint(folder)


def test_a_file_deleted_before_it_is_mapped_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def delete(path: Path, num_bytes: int) -> Tensor:
        path.unlink()
        return map_bytes(path, num_bytes)

    monkeypatch.setattr(reader, "map_bytes", delete)
    assert_refused(folder, rf"{TENSORS}: (cannot be mapped into memory|there is no such file)")


def test_a_folder_in_place_of_a_file_is_named(folder: Path) -> None:
    (folder / TENSORS).unlink()
    (folder / TENSORS).mkdir()
    assert_refused(folder, rf"{TENSORS}: cannot be read: Is a directory; expected")


def test_links_to_files_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / TENSORS).rename(tmp_path / "elsewhere")
    (folder / TENSORS).symlink_to(tmp_path / "elsewhere")
    assert load_checkpoint(folder)["step"] == 5
    (tmp_path / "elsewhere").unlink()
    assert_refused(folder, rf"{TENSORS}: there is no such file")


def test_files_outside_the_checkpoint_are_not_read(folder: Path) -> None:
    (folder / "rank_00007.safetensors").write_text("not mine")
    (folder / "notes.txt").write_text("mine")
    assert load_checkpoint(folder)["step"] == 5


# Code


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "the code in the checkpoint ran")


@pytest.mark.parametrize("name", [".metadata", TENSORS, INDEX])
@pytest.mark.parametrize("verify", [True, False])
def test_no_pickle_is_ever_read(name: str, verify: bool, folder: Path, tmp_path: Path) -> None:
    bomb, sign = pickle.dumps(Bomb(tmp_path / "sign")), tmp_path / "sign"
    pickle.loads(bomb)
    assert sign.exists()
    sign.unlink()
    size = (folder / name).stat().st_size if (folder / name).exists() else 0
    (folder / name).write_bytes(bomb.ljust(size, b"\0"))
    with suppress(CheckpointError):
        load_checkpoint(folder, verify=verify)
    with suppress(CheckpointError):
        tensors = {"model.weight": torch.zeros(3, 2), "model.count": torch.tensor(0)}
        load_sharded(folder, tensors, None, verify=verify)
    assert not sign.exists()


# Indexes with a right checksum and wrong contents


def test_another_version_is_named(folder: Path) -> None:
    with_index(folder, lambda _: None)
    assert load_checkpoint(folder)["step"] == 5
    with_index(folder, lambda _: None, version=2)
    assert_refused(folder, r"index.json: has version 2, this program reads version 1; load it with the version")


def chunk(index: dict[str, Any]) -> dict[str, Any]:
    return index["tensors"]["model.weight"]["chunks"][0]


WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "above": (lambda index: chunk(index).update(file="../rank_00000.safetensors"), "should match pattern"),
    "elsewhere": (lambda index: chunk(index).update(file="/etc/passwd"), "should match pattern"),
    "key": (
        lambda index: index["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}}),
        "should match pattern",
    ),
    "unknown file": (lambda index: chunk(index).update(file="rank_1.safetensors"), "not among the files"),
    "beyond the file": (lambda index: chunk(index).update(begin=10**6), "extends beyond the end"),
    "beyond the shape": (lambda index: chunk(index).update(offsets=[1, 0]), "chunk beyond its shape"),
    "other axes": (lambda index: chunk(index).update(offsets=[0]), "with other axes than its shape"),
    "missing numbers": (
        lambda index: chunk(index).update(sizes=[2, 2]),
        r"'model.weight' has the element at \[2, 0\] in no chunk",
    ),
    "negative": (lambda index: chunk(index).update(begin=-8), "greater than or equal to 0"),
    "type": (
        lambda index: index["tensors"]["model.weight"].update(dtype="F128"),
        "has dtype 'F128', expected one of",
    ),
    "field": (lambda index: index.update(more=1), "Extra inputs are not permitted"),
    "no field": (lambda index: index.pop("plain"), "plain: Field required"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_inconsistent_index_is_refused(case: str, folder: Path) -> None:
    change, message = WRONG[case]
    with_index(folder, change)
    assert_refused(folder, rf"index\.json: .*({message}).*; copy it again, or load an older one")


# The directory of a run


def test_latest_skips_damaged_folders_and_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = CheckpointDirectory(tmp_path, keep=9)
    save_folder(checkpoints, 1)
    checkpoints.save(2, state(2))
    save_folder(checkpoints, 3)
    checkpoints.file_of(2).write_bytes(b"damaged")
    (checkpoints.folder_of(3) / INDEX).unlink()
    (tmp_path / "checkpoint_step_4").mkdir()
    assert checkpoints.steps() == [1, 2, 3, 4]
    with caplog.at_level(logging.WARNING):
        path, found = checkpoints.latest()
    assert (path, found["step"]) == (checkpoints.folder_of(1), 1)
    assert [message.split(":")[0].split("/")[-2:] for message in lines_of(caplog)] == [
        ["checkpoint_step_4", INDEX],
        ["checkpoint_step_3", INDEX],
        [tmp_path.name, "checkpoint_step_2.pt"],
    ]


def test_retention_counts_folders_and_files_alike(tmp_path: Path) -> None:
    others = ["checkpoint_step_01", "checkpoint_step_1.bak", "checkpoint_step_x", ".checkpoint_step_1.mine"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint_step_0").write_text("a file where a folder would be")
    checkpoints = CheckpointDirectory(tmp_path, keep=2)
    save_folder(checkpoints, 1)
    checkpoints.save(2, state(2))
    save_folder(checkpoints, 3)
    assert checkpoints.steps() == [2, 3]
    checkpoints.save(4, state(4))
    assert names(tmp_path) == sorted([*others, "checkpoint_step_0", "checkpoint_step_3", "checkpoint_step_4.pt"])


def test_each_step_has_one_form(tmp_path: Path) -> None:
    checkpoints = CheckpointDirectory(tmp_path, keep=2)
    checkpoints.save(1, state(1))
    save_folder(checkpoints, 1)
    assert names(tmp_path) == ["checkpoint_step_1"]
    checkpoints.save(1, state(1))
    assert names(tmp_path) == ["checkpoint_step_1.pt"]


def test_a_step_saved_again_replaces_the_folder(tmp_path: Path) -> None:
    checkpoints = CheckpointDirectory(tmp_path, keep=2)
    (save_folder(checkpoints, 1) / TENSORS).unlink()
    save_folder(checkpoints, 1)
    assert checkpoints.latest()[1]["step"] == 1
    assert names(tmp_path) == ["checkpoint_step_1"]


def test_a_file_with_the_name_of_a_folder_is_left_alone(tmp_path: Path) -> None:
    checkpoints = CheckpointDirectory(tmp_path, keep=2)
    mine = [tmp_path / "checkpoint_step_1", tmp_path / ".checkpoint_step_2.outdated"]
    for path in mine:
        path.write_text("mine")
    with pytest.raises(CheckpointError, match="checkpoint_step_1: cannot be written: Not a directory"):
        save_folder(checkpoints, 1)
    assert [path.read_text() for path in mine] == ["mine", "mine"]


def test_a_new_run_refuses_a_directory_with_folders(tmp_path: Path) -> None:
    checkpoints = CheckpointDirectory(tmp_path, keep=2)
    save_folder(checkpoints, 400)
    with pytest.raises(CheckpointError, match="already holds checkpoints up to step 400"):
        checkpoints.refuse_if_used()


def test_a_folder_is_never_seen_half_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = CheckpointDirectory(tmp_path, keep=1)
    save_folder(checkpoints, 1)
    remove = shutil.rmtree
    seen: list[list[int]] = []

    def look_and_remove(path: Path, **options: Any) -> None:
        seen.append(checkpoints.steps())
        remove(path, **options)

    monkeypatch.setattr(files.shutil, "rmtree", look_and_remove)
    save_folder(checkpoints, 2)
    assert seen[-1] == [2]
    assert names(tmp_path) == ["checkpoint_step_2"]


def test_a_failed_removal_is_logged_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = CheckpointDirectory(tmp_path, keep=1)
    save_folder(checkpoints, 1)

    def refuse(path: Path, **options: Any) -> None:
        if path.exists():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING):
        broken.setattr(files.shutil, "rmtree", refuse)
        save_folder(checkpoints, 2)
    assert "checkpoint_step_1: is outdated and cannot be removed: Permission denied" in lines_of(caplog)[0]
    assert checkpoints.steps() == [2]
    save_folder(checkpoints, 3)
    assert names(tmp_path) == ["checkpoint_step_3"]


@pytest.mark.parametrize("suffix", ["partial", "outdated"])
def test_the_next_save_removes_a_folder_half_renamed(suffix: str, tmp_path: Path) -> None:
    checkpoints = CheckpointDirectory(tmp_path, keep=5)
    save_folder(checkpoints, 1).rename(tmp_path / f".checkpoint_step_1.{suffix}")
    assert checkpoints.steps() == []
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoints.latest()
    save_folder(checkpoints, 2)
    assert names(tmp_path) == ["checkpoint_step_2"]


def test_a_checkpoint_is_told_from_a_directory_of_them(folder: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "mine.pt", state(1))
    renamed = folder.rename(tmp_path / "best")
    (tmp_path / "checkpoint_step_9").mkdir()
    assert is_checkpoint(tmp_path / "mine.pt")
    assert is_checkpoint(tmp_path / "none.pt")
    assert is_checkpoint(renamed)
    assert is_checkpoint(tmp_path / "checkpoint_step_9")
    assert not is_checkpoint(tmp_path)
