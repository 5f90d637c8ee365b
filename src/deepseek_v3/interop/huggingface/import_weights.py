"""Checks weights under the names of the released checkpoint, and reads them block by block into a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.interop.huggingface.fp8_weights import scales_name, scales_problems, type_name
from deepseek_v3.interop.huggingface.names import Part, layer_of, parts_of, shared_copies
from deepseek_v3.interop.huggingface.rotary_rows import rows_of_halves
from deepseek_v3.interop.huggingface.tensor_source import CPU, TensorDict, TensorSource
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.ops.fp8 import E4M3, dequantize_128x128
from deepseek_v3.utils.checkpointing.checks import TensorInfo
from deepseek_v3.utils.errors import CheckpointError
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.text import format_value

_MOST_NAMES = 3  # names that a message lists of one kind of problem
WEIGHT_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_ROWS_AT_ONCE = 2**12  # rows of a copy that are compared with the original at a time
# Tables that some releases store and every program computes from the config.
_COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

_log = get_logger("Weights")


class ReleasedWeights:
    """Released weights that fit a model of `config`, read by this project's parameter names.

    The routed experts may be separate, as in released checkpoints, or stacked, as in the state of a model of
    Transformers 5. A weight in FP8 (e4m3) needs its scales, `<name>_scale_inv`, one per 128×128 block. The copies
    of embedding and head in MTP layers may be missing; if present, they must equal the originals, which is checked
    unless `compare_copies` is false. If the last MTP layers are missing as a whole, `config` has fewer of them than
    the one given, with a warning, or an error with `require_mtp`. Without `interleaved`, the rotary rows are in the
    order of `rope_interleave: false`, and are put into this project's order.

    Raises CheckpointError with all problems: missing and unexpected names, wrong shapes, types that weights cannot
    have, FP8 without scales, and copies that differ.
    """

    def __init__(
        self,
        source: TensorSource,
        config: ModelConfig,
        *,
        require_mtp: bool = False,
        compare_copies: bool = True,
        interleaved: bool = True,
    ) -> None:
        self._source, self._interleaved = source, interleaved
        depth = _num_mtp_layers(config, source.tensors)
        if depth < config.num_nextn_predict_layers:
            _report_missing_mtp(source, config, depth, require_mtp)
        self.config = config.model_copy(update={"num_nextn_predict_layers": depth})
        self.shapes = _shapes(self.config, source.name)
        self._stacked = {name for name in self.shapes if self._is_stacked(name)}
        problems = [*self._problems(self._expected())]
        if compare_copies and not problems:
            problems += self._copy_problems()
        if problems:
            raise CheckpointError(f"{source.name} do not fit the model: {'; '.join(_shorten(problems))}")

    @property
    def name(self) -> str:
        """The source of the weights, for messages."""
        return self._source.name

    @property
    def stored_dtype(self) -> torch.dtype:
        """The type in which the embedding is stored; bfloat16 if that is FP8, which no release has it in."""
        dtype = self._source.tensors["model.embed_tokens.weight"].dtype
        return torch.bfloat16 if dtype == E4M3 else dtype

    @torch.no_grad()
    def read_into(self, target: Tensor, name: str, starts: Sequence[int] | None = None) -> None:
        """Fills `target`, of any float type on any device, with a block of the parameter `name`.

        The block begins at `starts`, by default at the beginning, and has the shape of `target`. Reads only the
        rows of the block, and of a stack one expert at a time.
        """
        starts = tuple(starts or (0,) * target.ndim)
        if target.ndim < 3:
            rows = range(starts[0], starts[0] + target.shape[0])
            target.copy_(_columns(self._values(name, rows, target.device), target, starts[1:]))
            return
        parts: dict[int | None, list[Part]] = {}
        for part in () if name in self._stacked else parts_of(name, self.shapes[name]):
            parts.setdefault(part.expert, []).append(part)
        for expert, values in enumerate(target, start=starts[0]):
            if not parts:
                self._read_stacked(values, name, expert, starts[1:])
            for part in parts.get(expert, ()):
                first = max(part.rows.start, starts[1])
                last = min(part.rows.stop, starts[1] + len(values))
                if first < last:
                    own = range(first - part.rows.start, last - part.rows.start)
                    block = values[first - starts[1] : last - starts[1]]
                    block.copy_(_columns(self._values(part.name, own, block.device), block, starts[2:]))

    def _values(self, released: str, rows: range, device: torch.device) -> Tensor:
        """Rows of a released tensor on `device`, in this project's order; float32 if it is in FP8."""
        order = None if self._interleaved else rows_of_halves(released, self.config)
        if order is None or not rows:
            return self._stored_values(released, rows, device)
        places = order[rows.start : rows.stop]
        first = int(places.min())
        stored = self._stored_values(released, range(first, int(places.max()) + 1), device)
        return stored[(places - first).to(device)]

    def _stored_values(self, released: str, rows: range, device: torch.device) -> Tensor:
        tensor = self._source.read(released, rows, device)
        if tensor.dtype != E4M3:
            return tensor
        scales = self._source.read(scales_name(released), device=device)
        return dequantize_128x128(tensor, scales, torch.float32, rows.start)

    def _read_stacked(self, target: Tensor, name: str, expert: int, starts: Sequence[int]) -> None:
        """Fills a block of one expert's matrix from a stack that the source holds."""
        one, rows = range(expert, expert + 1), slice(starts[0], starts[0] + len(target))
        values = self._source.read(name, one, target.device)[0]
        if values.dtype == E4M3:
            scales = self._source.read(scales_name(name), one, target.device)[0]
            values = dequantize_128x128(values, scales, torch.float32)
        target.copy_(_columns(values[rows], target, starts[1:]))

    def _is_stacked(self, name: str) -> bool:
        """Whether the source has this parameter as one tensor, and no tensor of a single expert of it."""
        parts = parts_of(name, self.shapes[name])
        return name in self._source.tensors and not any(
            part.name in self._source.tensors for part in parts if part.expert is not None
        )

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """The shape of every released tensor that the model needs."""
        expected = {}
        for name, shape in self.shapes.items():
            if name in self._stacked:
                expected[name] = shape
                continue
            for part in parts_of(name, shape):
                rows = (len(part.rows),)
                expected[part.name] = (*rows, *shape[1 if part.expert is None else 2 :])
        return expected

    def _problems(self, expected: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        copies, found = shared_copies(self.config), self._source.tensors
        yield from _name_problems(expected, found, copies)
        for name, tensor in found.items():
            shape = expected.get(copies.get(name, name))
            if shape is not None:
                yield from self._tensor_problems(name, tensor, shape)

    def _tensor_problems(self, name: str, tensor: TensorInfo, shape: tuple[int, ...]) -> Iterator[str]:
        if tensor.shape != shape:
            yield f"{format_value(name)}: found shape {tensor.shape}, expected {shape}"
        elif not self._source.has_values(name):
            yield f"{name}: has a shape but no values (device meta); load it to a real device"
        elif tensor.dtype == E4M3:
            scales = self._source.tensors.get(scales_name(name))
            yield from scales_problems(name, tensor, scales)
            if scales is not None and not self._source.has_values(scales_name(name)):
                yield f"{scales_name(name)}: has a shape but no values (device meta); load it to a real device"
        elif tensor.dtype not in WEIGHT_TYPES:
            types = ", ".join(map(type_name, WEIGHT_TYPES))
            found = type_name(tensor.dtype)
            yield f"{name}: found type {found}, expected {types}, or {type_name(E4M3)} with scales"

    def _copy_problems(self) -> list[str]:
        return [
            f"{copy} differs from {original}, which this model shares with it"
            for copy, original in shared_copies(self.config).items()
            if copy in self._source.tensors and original in self._source.tensors and self._differ(copy, original)
        ]

    def _differ(self, copy: str, original: str) -> bool:
        num_rows = self._source.tensors[original].shape[0]
        for first in range(0, num_rows, _ROWS_AT_ONCE):
            rows = range(first, min(num_rows, first + _ROWS_AT_ONCE))
            one, other = (self._values(name, rows, CPU) for name in (copy, original))
            if not ((one == other) | (one.isnan() & other.isnan())).all():  # NaN is found when it is loaded
                return True
        return False


@torch.no_grad()
def load_released(model: DeepSeekV3, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors by released name into `model`, converted to the model's type and device.

    A model on the meta device is moved to the CPU. The tensors are as `ReleasedWeights` takes them; if the last MTP
    layers are missing as a whole, they are removed from the model, with a warning.

    Raises CheckpointError with all problems, before anything is changed.
    """
    weights = ReleasedWeights(TensorDict(tensors), model.config)
    if weights.config != model.config:
        model.keep_mtp_layers(weights.config.num_nextn_predict_layers)
    state = model.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        state = model.to_empty(device="cpu").state_dict()
    for name, target in state.items():
        weights.read_into(target, name)


def _shapes(config: ModelConfig, source: str) -> dict[str, tuple[int, ...]]:
    """The shape of every weight and routing bias of a model. Raises CheckpointError for sizes beyond any memory."""
    try:
        with torch.device("meta"):
            state = DeepSeekV3(config).state_dict()
    except RuntimeError as error:
        raise CheckpointError(
            f"{source}: the sizes in config.json are larger than any memory: {str(error).splitlines()[0]}; correct "
            "them"
        ) from None
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _columns(rows: Tensor, target: Tensor, starts: Sequence[int]) -> Tensor:
    """The columns of some rows, from `starts` on, that fill a block with the shape of `target`."""
    for axis, start in enumerate(starts, start=1):
        rows = rows.narrow(axis, start, target.shape[axis])
    return rows


def _num_mtp_layers(config: ModelConfig, names: Iterable[str]) -> int:
    """The number of MTP layers up to the last one with any tensor among `names`; at most the config's."""
    last = max((layer_of(name) for name in names if not _COMPUTED.fullmatch(name)), default=-1)
    return min(max(last + 1 - config.num_hidden_layers, 0), config.num_nextn_predict_layers)


def _report_missing_mtp(source: TensorSource, config: ModelConfig, depth: int, require: bool) -> None:
    """Warns that the weights hold only `depth` of the MTP layers of the config, or raises CheckpointError."""
    found = (
        f"{source.name} hold {depth} of the {config.num_nextn_predict_layers} MTP layers of the config and "
        f"nothing of model.layers.{config.num_hidden_layers + depth}"
    )
    if require:
        raise CheckpointError(
            f"{found}; expected all of them: get the original release, since Transformers leaves them out when it "
            "saves a model, or load without requiring MTP layers"
        )
    _log.warning("%s; the model continues with num_nextn_predict_layers = %d", found, depth)


def _name_problems(
    expected: Mapping[str, object], found: Mapping[str, TensorInfo], copies: Mapping[str, str]
) -> Iterator[str]:
    scales = {scales_name(name) for name, tensor in found.items() if tensor.dtype == E4M3}
    missing = sorted(expected.keys() - found.keys() - copies.keys())
    unexpected = sorted(found.keys() - expected.keys() - copies.keys() - scales)
    unexpected = [name for name in unexpected if not _COMPUTED.fullmatch(name)]
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            listed = ", ".join(map(format_value, names[:_MOST_NAMES]))
            yield f"{len(names)} {kind}: {listed}{', …' if len(names) > _MOST_NAMES else ''}"


def _shorten(problems: list[str]) -> list[str]:
    more = len(problems) - 2 * _MOST_NAMES
    return problems if more <= 0 else [*problems[: 2 * _MOST_NAMES], f"and {more} more problems"]
