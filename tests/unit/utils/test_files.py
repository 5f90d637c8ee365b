"""A file that cannot be written is refused before the work whose results it would hold."""

import os
from pathlib import Path

import pytest

from deepseek_v3.utils.files import new_file_problem, output_file_problem


def test_a_new_file_in_any_folder_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "x.json", tmp_path / "new" / "folder" / "x.json", Path("x.json"), Path("new/x.json")):
        assert new_file_problem(path) is None


def test_what_exists_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path, tmp_path / "link"):
        assert "exists and is left as it is" in str(new_file_problem(path))


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert f"{tmp_path / 'file'} is no folder" in str(new_file_problem(tmp_path / "file" / "a" / "x.json"))


def test_a_folder_without_write_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != tmp_path)  # root may write anywhere
    assert f"nothing can be added to {tmp_path};" in str(new_file_problem(tmp_path / "new" / "x.json"))


def test_an_existing_file_may_be_replaced_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    assert output_file_problem(tmp_path / "file") is None
    assert output_file_problem(tmp_path / "new" / "x.json") is None
    assert output_file_problem(tmp_path) == "is no regular file; choose another file"
    assert f"{tmp_path / 'file'} is no folder" in str(output_file_problem(tmp_path / "file" / "x.json"))
