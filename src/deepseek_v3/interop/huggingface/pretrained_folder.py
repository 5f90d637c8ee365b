"""Loads a model from a Hugging Face directory, and saves one as such a directory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch.distributed.tensor import DTensor

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.text_files import printable_path, read_json_object
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.interop.huggingface.export_weights import write_weights
from deepseek_v3.interop.huggingface.fp8_weights import QUANTIZATION_CONFIG, is_quantized, type_name
from deepseek_v3.interop.huggingface.import_weights import WEIGHT_TYPES, ReleasedWeights
from deepseek_v3.interop.huggingface.names import to_released_names
from deepseek_v3.interop.huggingface.released_config import CONFIG, released_config, write_configs
from deepseek_v3.interop.huggingface.tensor_source import WEIGHTS_FILE, WEIGHTS_INDEX, TensorFolder
from deepseek_v3.model.backends import select_backends
from deepseek_v3.model.pretrained import allocate_weights, prepare_for_inference
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.ops.fp8 import BLOCK
from deepseek_v3.utils.checkpointing.checks import non_finite, non_finite_summary
from deepseek_v3.utils.checkpointing.directory import is_checkpoint
from deepseek_v3.utils.errors import CheckpointError, ConfigError, DataError
from deepseek_v3.utils.files import atomic_folder, fsync_directory, remove_partials
from deepseek_v3.utils.locks import hold_lock
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.progress import ProgressDisplay
from deepseek_v3.utils.text import format_value

SHARD_SIZE = "5GB"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
Quantization = Literal["fp8"]
_READERS = 8  # threads; each holds one tensor

_log = get_logger("Weights")


def is_huggingface_folder(path: Path) -> bool:
    """Whether a folder has a Hugging Face config or weights."""
    return any(os.path.lexists(path / name) for name in (CONFIG, WEIGHTS_FILE, WEIGHTS_INDEX))


def open_pretrained(
    directory: str | Path, *, require_mtp: bool = False, compare_copies: bool = True
) -> ReleasedWeights:
    """Opens the weights of a Hugging Face directory: reads and checks its config and the headers of its files.

    Raises ConfigError if `config.json` describes a model that this project does not build, and CheckpointError if
    the weights cannot be read or do not fit it, as `TensorFolder` and `ReleasedWeights` say.
    """
    folder = Path(directory)
    if not os.path.isdir(folder):  # noqa: PTH112 -- False for names too long
        raise CheckpointError(
            f"{printable_path(folder)}: is no folder, expected a directory in Hugging Face's format; download a "
            "model of the Hub first"
        )
    if is_checkpoint(folder) and not is_huggingface_folder(folder):
        raise CheckpointError(
            f"{printable_path(folder)}: is a checkpoint of this project, expected a directory in Hugging Face's "
            "format; use it as it is, or export it first"
        )
    fields = read_json_object(folder / CONFIG)
    interleaved = fields.get("rope_interleave", True) not in (False, None)
    if not interleaved:
        del fields["rope_interleave"]  # the rows are reordered as they are read
    config = ModelConfig.from_released(fields, folder / CONFIG)
    return ReleasedWeights(
        TensorFolder(folder),
        config,
        require_mtp=require_mtp,
        compare_copies=compare_copies,
        interleaved=interleaved,
    )


def load_pretrained(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    require_mtp: bool = False,
) -> DeepSeekV3:
    """Loads a released model, or one that Transformers or `save_pretrained` wrote, in evaluation mode.

    The weights get `dtype`, by default the type that the embedding is stored in; routers keep at least float32. The
    weights are read tensor by tensor to `device`: memory holds the model and a few tensors. MTP layers that the
    config states and the files lack are left out with a warning; `require_mtp` refuses that.

    Raises ConfigError and CheckpointError as `open_pretrained` does, and CheckpointError if weights are not finite.
    """
    return load_opened(open_pretrained(directory, require_mtp=require_mtp), dtype, torch.device(device))


@torch.no_grad()
def load_opened(
    weights: ReleasedWeights,
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    for_inference: bool = False,
    mtp_layers: int = 0,
) -> DeepSeekV3:
    """Builds the model of opened weights, as `load_pretrained` does.

    `for_inference` prepares it, with `mtp_layers`, as `prepare_for_inference` says. Raises CheckpointError if it
    does not fit in the memory of the device.
    """
    with torch.device("meta"):
        model = DeepSeekV3(weights.config)
    dtype = dtype or weights.stored_dtype
    _check_dtype(dtype)
    if for_inference:
        prepare_for_inference(model, dtype, mtp_layers)
    else:
        model.to(dtype)
    state = allocate_weights(model, device, weights.name)
    total = sum(tensor.nbytes for tensor in state.values())
    reading = ThreadPoolExecutor(_READERS)
    with ProgressDisplay() as display, display.task("Loading", total, "bytes", _log) as task, reading as threads:
        waiting = {threads.submit(weights.read_into, target, name): target for name, target in state.items()}
        for done in as_completed(waiting):
            done.result()
            task.advance(waiting[done].nbytes)
    if bad := non_finite(state):
        raise CheckpointError(f"{weights.name}: {non_finite_summary(bad)}; get the files again, or another release")
    model.compute_dtype = dtype
    select_backends(model, device)
    return model.eval()


@torch.no_grad()
def save_pretrained(
    model: DeepSeekV3,
    directory: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    quantization: Quantization | None = None,
    max_shard_size: int | str = SHARD_SIZE,
) -> None:
    """Writes a directory that Transformers, vLLM, SGLang and llama.cpp's converter read.

    It holds config.json, the weights as safetensors, and with `tokenizer` its files and generation_config.json.
    Weights get `dtype`, by default each its own; `quantization="fp8"` writes what the release has in FP8 as e4m3
    with 128×128 scales, and the rest in bfloat16 by default. `max_shard_size` is in bytes, or a text such as `5GB`.

    The directory appears complete or not at all. Raises CheckpointError if it exists, if it cannot be written, if
    the model is sharded over ranks or holds NaN or infinity, also only after the conversion to `dtype`, or if the
    tokenizer has more ids than the model, and ConfigError for another
    `dtype`, `quantization` or `max_shard_size`.
    """
    max_shard_bytes = _bytes(max_shard_size)
    if quantization not in (None, "fp8"):
        raise ConfigError(f"quantization = {format_value(quantization)}: expected None or 'fp8'")
    if dtype is None and quantization:
        dtype = torch.bfloat16
    main_dtype = dtype or model.head_weight_VD.dtype
    _check_dtype(main_dtype)
    _check_model(model, tokenizer)
    if quantization:
        _warn_of_cut_blocks(model)
    fields = released_config(model.config, type_name(main_dtype), QUANTIZATION_CONFIG if quantization else None)
    with new_folder(Path(directory)) as partial:
        write_weights(partial, model, dtype, quantization is not None, max_shard_bytes)
        write_configs(partial, fields, tokenizer, model.config.max_position_embeddings)


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig, source: object) -> None:
    """Raises CheckpointError if a tokenizer has more ids than the model's vocabulary."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{source}: the tokenizer has {tokenizer.vocab_size:,} ids, expected at most the model's vocab_size = "
            f"{config.vocab_size:,}; use the tokenizer that the model was trained with"
        )


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to fill, which becomes `path`; it appears complete or not at all, and one process writes it.

    Removes what processes that were killed have left of it. Raises CheckpointError if `path` exists, if another
    process writes it, or if it cannot be written.
    """
    refuse_existing(path)
    with ExitStack() as stack:
        try:
            lock = path.with_name(f".{path.name}.lock")
            stack.enter_context(hold_lock(lock, path, "choose another directory"))
        except (DataError, ValueError) as error:
            raise CheckpointError(str(error)) from error
        refuse_existing(path)  # another process may have finished it before this one got the lock
        try:
            remove_partials(path)
            with atomic_folder(path) as partial:
                yield partial
                fsync_directory(partial)
            fsync_directory(path.parent)
        except OSError as error:
            raise CheckpointError(
                f"{printable_path(path)}: cannot be written: {error.strerror or error}; make room, or choose "
                "another directory"
            ) from error


def refuse_existing(path: Path) -> None:
    """Raises CheckpointError if a file or folder that is to be written exists."""
    if os.path.lexists(path):
        raise CheckpointError(
            f"{printable_path(path)}: exists and is left as it is; remove it, or choose another directory"
        )


def _check_model(model: DeepSeekV3, tokenizer: Tokenizer | None) -> None:
    state = model.state_dict().values()
    if any(isinstance(tensor, DTensor) for tensor in state):
        raise CheckpointError(
            "the model is sharded over ranks, expected a whole one; save a checkpoint, and run dsv3 export on it"
        )
    if any(tensor.is_meta for tensor in state):
        raise CheckpointError("the model is on the meta device and has no weights; load or initialise it first")
    if tokenizer is not None:
        check_tokenizer(tokenizer, model.config, "the model")


def _warn_of_cut_blocks(model: DeepSeekV3) -> None:
    """Warns of weights whose last blocks are smaller than 128×128, which other programs do not all read.

    Those of `kv_a_proj_with_mqa` do not count: the release has 576 rows there.
    """
    cut = [
        f"{name} ({tensor.shape[0]}×{tensor.shape[1]})"
        for name, tensor in to_released_names(model.config, model.state_dict()).items()
        if is_quantized(name) and "kv_a_proj" not in name and any(size % BLOCK for size in tensor.shape)
    ]
    if cut:
        _log.warning(
            f"{len(cut):,} of the weights in FP8 have a side that is no multiple of {BLOCK}, such as {cut[0]}: "
            "this project reads them, vLLM refuses them, and Transformers may read them with wrong scales"
        )


def _check_dtype(dtype: torch.dtype) -> None:
    """Raises ConfigError for a type that weights without scales cannot have."""
    if dtype not in WEIGHT_TYPES:
        expected = ", ".join(map(str, WEIGHT_TYPES))
        raise ConfigError(f"dtype = {dtype!r}: expected {expected}")


def _bytes(size: int | str) -> int:
    """A number of bytes, from a number or a text such as `500MB`, `5GB` or `4GiB`."""
    match = re.fullmatch(r"(\d{1,15})\s*([A-Z]*)", str(size).strip().upper(), re.ASCII)
    number = int(match[1]) * _UNITS.get(match[2], 0) if match else 0
    if number < 1:
        raise ConfigError(f"max_shard_size = {format_value(size)}: expected a size such as 500MB or 5GB")
    return number
