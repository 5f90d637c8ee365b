"""What a run is checked for before its first step, and the table of what was found."""

from __future__ import annotations

import platform
import shutil
import socket
from collections import defaultdict
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed import ProcessGroup

from deepseek_v3 import __version__
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.source import RunTokens
from deepseek_v3.planning.calibration import calibration
from deepseek_v3.planning.hardware import Device, find_device
from deepseek_v3.planning.layout_search import estimate_layout
from deepseek_v3.planning.memory_check import require_memory
from deepseek_v3.training.disk_space import checkpoint_bytes
from deepseek_v3.utils.distributed.collectives import gather_objects
from deepseek_v3.utils.errors import ConfigError, PlanError
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.machine import usable_memory
from deepseek_v3.utils.text import format_count, format_si, gibibytes, pluralize, table

_GIB = 2**30
_DIGITS = 16  # of a checksum


def check_memory(config: RunConfig, described: Device, force: bool = False) -> None:
    """Raises PlanError for a plan that does not fit in the device's memory; with `force` it is only a warning."""
    try:
        require_memory(config, described)
    except PlanError as error:
        if not force:
            raise PlanError(f"{error}; --force starts it as it is") from None
        get_logger("Plan").warning(f"started by --force although {error}")


def describe_device(device: torch.device, local_ranks: int = 1) -> Device:
    """Describes a device of this machine for the planner, with the memory that is free on it now.

    On a CPU, each of the host's `local_ranks` ranks gets an equal part of the memory. A GPU that the planner does
    not know is described as an A100 with its own memory, and with FP8 if its compute capability has it.
    """
    if device.type == "cpu":
        cpu = find_device("CPU")
        assert cpu is not None
        return cpu.model_copy(update={"memory_gib": usable_memory() / _GIB / local_ranks})
    name = torch.cuda.get_device_name(device)
    found = find_device(name)
    known = found or find_device("A100")
    assert known is not None
    free, _ = torch.cuda.mem_get_info(device)
    changes: dict[str, object] = {"name": name}
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        changes["bfloat16_tflops"] = None
    elif found is None and capability >= (9, 0) and known.bfloat16_tflops:
        changes["fp8_tflops"] = 2 * known.bfloat16_tflops
    described = known.model_copy(update=changes)
    # The planner adds the memory of the context, which is taken already.
    taken = calibration(described).context_bytes
    return described.model_copy(update={"memory_gib": (free + taken) / _GIB})


class Peer(NamedTuple):
    """What one rank says of itself: its host, its device, and the versions that must be equal on all ranks."""

    host: str
    device: str
    versions: str


def log_findings(
    config: RunConfig, described: Device, tokens: RunTokens, group: ProcessGroup | None, device: torch.device
) -> None:
    """Logs what a run has found before its first step, in one table; all ranks of `group` (gloo) call it.

    Raises ConfigError on all ranks if they have different versions of Python, torch or this package.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    versions = f"deepseek_v3 {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    peers = gather_objects(group, Peer(socket.gethostname(), name, versions))
    require_same_versions(peers)
    rows = [["memory", _memory(config, described)], ["disk", _disk(config)], *_data(tokens), *_peers(peers)]
    rows += [["rights", f"{folder} can be written"] for folder in _folders(config)]
    get_logger("Plan").info("\n".join(["Before the first step:", *table(["what", "found"], rows, left=["found"])]))


def require_same_versions(peers: Sequence[Peer]) -> None:
    """Raises ConfigError, with the ranks of each, if the ranks have different versions."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, peer in enumerate(peers):
        ranks[peer.versions].append(rank)
    if len(ranks) > 1:
        found = "; ".join(
            f"{versions} on {pluralize(len(numbers), 'rank')}, the first is rank {numbers[0]} on "
            f"{peers[numbers[0]].host}"
            for versions, numbers in ranks.items()
        )
        raise ConfigError(f"the ranks have different versions: {found}; install the same ones on every host")


def _memory(config: RunConfig, described: Device) -> str:
    layout = estimate_layout(config, described)
    return f"{gibibytes(layout.needed_bytes)} of {described.memory_gib:.1f} GiB that {described.name} has free"


def _disk(config: RunConfig) -> str:
    folder = config.checkpoint.directory
    free, size = shutil.disk_usage(folder).free, checkpoint_bytes(config)
    kept = config.checkpoint.keep
    return f"{format_si(free, 'B')} free for checkpoints of {format_si(size, 'B')}, of which {kept} stay"


def _data(tokens: RunTokens) -> list[list[str]]:
    """The tokens of each source, and the checksums that a resumed run compares."""
    tokenizer, *train = tokens.identity
    rows = [
        ["data", f"{part.source.name}: {format_count(part.source.num_tokens('train'))} training tokens"]
        for part in tokens.parts
    ]
    digest = sha256(" ".join(train).encode()).hexdigest()
    rows.append(["data checksum", digest[:_DIGITS]])
    return [*rows, ["tokenizer", f"{tokens.vocab_size:,} ids, checksum {tokenizer[:_DIGITS]}"]]


def _peers(peers: Sequence[Peer]) -> list[list[str]]:
    hosts = dict.fromkeys(peer.host for peer in peers)
    devices = ", ".join(dict.fromkeys(peer.device for peer in peers))
    reached = f"{pluralize(len(peers), 'rank')} on {pluralize(len(hosts), 'host')} answered: {devices}"
    return [["peers", reached], ["versions", peers[0].versions]]


def _folders(config: RunConfig) -> list[Path]:
    """The folders of the run, which are locked by now and so can be written."""
    return list(dict.fromkeys([config.checkpoint.directory, config.logging.directory]))
