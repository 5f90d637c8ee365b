"""Opens the tokens that a config names: token shards, or Megatron-LM datasets."""

from __future__ import annotations

from pathlib import Path

from deepseek_v3.config.data_config import TokenFiles
from deepseek_v3.data.tokens.holdout import DEFAULT_SHARE
from deepseek_v3.data.tokens.megatron_dataset import is_dataset
from deepseek_v3.data.tokens.megatron_source import MegatronSource
from deepseek_v3.data.tokens.shards import TokenShards
from deepseek_v3.data.tokens.source import TokenSource
from deepseek_v3.utils.errors import DataError


def open_source(files: TokenFiles, section: str = "data", verify: bool = True) -> TokenSource:
    """Opens the tokens of one source; `section` is the place of its fields in the config, for messages.

    `files.path` is a folder of token shards; a folder of two Megatron-LM datasets, `train` and `holdout`, as
    `dsv3 tokenize --format megatron` writes it; or the prefix of one dataset. `verify` reads all tokens once to
    check them. Raises DataError if they are missing or damaged, or if a field does not go with their format.
    """
    path = files.path
    if path.is_dir() and not is_dataset(path / "train"):
        _refuse_options(files, section)
        return TokenShards.open(path, verify)
    if path.is_dir():
        if files.holdout is not None or files.holdout_path is not None:
            raise DataError(
                f"{path}: holds the datasets train and holdout; leave {section}.holdout and {section}.holdout_path "
                f"out, or set {section}.path to {path / 'train'}"
            )
        return MegatronSource(path / "train", files.tokenizer or path, path / "holdout", verify)
    holdout = files.holdout_path or (DEFAULT_SHARE if files.holdout is None else files.holdout)
    return MegatronSource(path, _tokenizer_of(files, section), holdout, verify)


def _refuse_options(files: TokenFiles, section: str) -> None:
    """Raises DataError if a field for Megatron-LM datasets is given for token shards."""
    given = [name for name in ("tokenizer", "holdout", "holdout_path") if getattr(files, name) is not None]
    if given:
        raise DataError(
            f"{files.path}: is a folder of token shards, which have their own tokenizer and hold-out; leave "
            f"{' and '.join(f'{section}.{name}' for name in given)} out, which are for Megatron-LM datasets"
        )


def _tokenizer_of(files: TokenFiles, section: str) -> Path:
    """The tokenizer that the config names, or the folder of the dataset, if it holds one."""
    if files.tokenizer is not None:
        return files.tokenizer
    if not (files.path.parent / "tokenizer.json").exists():
        raise DataError(
            f"{files.path}: no tokenizer.json lies beside this Megatron-LM dataset; name the one that made its ids "
            f"with {section}.tokenizer"
        )
    return files.path.parent
