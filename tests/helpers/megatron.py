"""Writes and reads Megatron-LM's datasets with `struct` alone, as the description of the format says."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
SIZES = {"uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "uint16": 2}
DOCUMENTS = [[[1, 2, 3]], [[], [4]], [], [[5, 6], [7], [8, 9, 10, 11]]]  # sequences of each document


def their_write(
    prefix: Path,
    documents: Sequence[Sequence[Sequence[int]]] = DOCUMENTS,
    dtype: str = "int32",
    modes: list[int] | None = None,
) -> Path:
    """Writes a dataset with `struct` alone, as the format's description says."""
    sequences = [sequence for document in documents for sequence in document]
    ends = [0]
    for document in documents:
        ends.append(ends[-1] + len(document))
    pointers, at = [], 0
    for sequence in sequences:
        pointers.append(at)
        at += SIZES[dtype] * len(sequence)
    index = b"MMIDIDX\0\0" + struct.pack("<QB", 1, CODES[dtype]) + struct.pack("<QQ", len(sequences), len(ends))
    index += b"".join(struct.pack("<i", len(sequence)) for sequence in sequences)
    index += struct.pack(f"<{len(pointers)}q", *pointers) + struct.pack(f"<{len(ends)}q", *ends)
    index += bytes(modes or [])
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.idx").write_bytes(index)
    tokens = [token for sequence in sequences for token in sequence]
    Path(f"{prefix}.bin").write_bytes(
        b"".join(token.to_bytes(SIZES[dtype], "little", signed=dtype[0] == "i") for token in tokens)
    )
    return prefix


def their_read(prefix: Path) -> tuple[list[list[list[int]]], str, list[int]]:
    """Reads a dataset with `struct` alone: the sequences of each document, the type and the modes."""
    index, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    magic, version, code, num_sequences, num_ends = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version) == (b"MMIDIDX\0\0", 1)
    dtype = next(name for name, known in CODES.items() if known == code)
    at = 34
    sizes = struct.unpack_from(f"<{num_sequences}i", index, at)
    pointers = struct.unpack_from(f"<{num_sequences}q", index, at + 4 * num_sequences)
    ends = struct.unpack_from(f"<{num_ends}q", index, at + 12 * num_sequences)
    modes = list(index[at + 12 * num_sequences + 8 * num_ends :])
    sequences = []
    for size, pointer in zip(sizes, pointers, strict=True):
        items = [data[pointer + SIZES[dtype] * k :][: SIZES[dtype]] for k in range(size)]
        sequences.append([int.from_bytes(item, "little", signed=dtype[0] == "i") for item in items])
    return [sequences[a:b] for a, b in pairwise(ends)], dtype, modes
