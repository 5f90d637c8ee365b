"""Opens the tokens that a config names: token shards, or Megatron-LM datasets."""

from __future__ import annotations

from pathlib import Path

from deepseek_v3.config.data_config import DataConfig, TokenFiles
from deepseek_v3.data.tokens.holdout import DEFAULT_SHARE
from deepseek_v3.data.tokens.index import INDEX_FILE
from deepseek_v3.data.tokens.megatron_dataset import is_dataset
from deepseek_v3.data.tokens.megatron_source import MegatronSource
from deepseek_v3.data.tokens.mixture import TokenMixture
from deepseek_v3.data.tokens.shards import TokenShards
from deepseek_v3.data.tokens.source import RunTokens, TokenSource
from deepseek_v3.utils.errors import DataError


def open_tokens_of(data: DataConfig) -> RunTokens:
    """Opens the tokens of a run: the source at `data.path`, or the mixture of `data.sources`.

    Raises DataError if a source cannot be used, as `open_source` says, or if their tokenizers differ.
    """
    if not data.sources:
        return open_source(data, verify=data.verify_checksums)
    return TokenMixture(
        [source.name for source in data.sources],
        [source.weight for source in data.sources],
        [
            open_source(source, f"data.sources.{number}", data.verify_checksums, len(data.sources))
            for number, source in enumerate(data.sources)
        ],
    )


def open_source(files: TokenFiles, section: str = "data", verify: bool = True, readers: int = 1) -> TokenSource:
    """Opens the tokens of one source; `section` is the place of its fields in the config, for messages.

    `files.path` is a folder of token shards; a folder of two Megatron-LM datasets, `train` and `holdout`, as
    `dsv3 tokenize --format megatron` writes it; or the prefix of one dataset. `verify` reads all tokens once to
    check them. `readers` is the number of sources that the run keeps open. Raises DataError if tokens are missing
    or damaged, or if a field does not go with their format.
    """
    path = files.path
    if not files.exist:
        raise DataError(
            f"{path}: no token shards here, and no Megatron-LM dataset; write them with dsv3 tokenize --input "
            f"FOLDER --vocab-size 32768 --output {path}, or name others with {section}.path"
        )
    if path.is_dir() and is_dataset(path / "train"):
        if files.holdout is not None or files.holdout_path is not None:
            raise DataError(
                f"{path}: holds the datasets train and holdout; leave {section}.holdout and {section}.holdout_path "
                f"out, or set {section}.path to {path / 'train'}"
            )
        return MegatronSource(path / "train", files.tokenizer or path, path / "holdout", verify)
    if path.is_dir() and ((path / INDEX_FILE).exists() or not is_dataset(path)):
        _refuse_options(files, section)
        return TokenShards.open(path, verify, readers)
    if files.holdout_path is not None and files.holdout_path.absolute() == path.absolute():
        raise DataError(
            f"{path}: is both {section}.path and {section}.holdout_path, so it would be measured on what it was "
            f"trained on; name another dataset, or give a share as {section}.holdout"
        )
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
