"""The kinds of faults, and how one fault follows from its seed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from deepseek_v3.utils.fault_points import Place

# What strikes a process at a place, or its files before it starts.
Strike = Literal["kill", "terminate", "pause", "stop", "hang", "fill", "forbid", "lose", "lose and kill"]
Damage = Literal["truncate", "flip", "remove"]
Counts = Mapping[int, Mapping[int, Mapping[str, int]]]  # ranks of the run, rank, place: how often it is reached

CHECKPOINT_FILES = {
    1: ("checkpoints/{newest}.pt",),
    2: ("checkpoints/{newest}/*.safetensors", "checkpoints/{newest}/*.json"),
}
TOKEN_FILES = ("tokens/train/*.bin", "tokens/holdout/*.bin", "tokens/tokenizer.json", "tokens/index.json")
LOG_FILES = ("run/config.yaml", "run/metrics.jsonl", "run/events.jsonl")


class Kind(NamedTuple):
    """A kind of fault: at which places a process may be struck, by what, and in runs of how many ranks.

    `ranks` may name a number more than once, to draw it more often. With `damage`, files are damaged between two
    runs, and a strike, if there is any, follows in the next one.
    """

    meaning: str
    strikes: tuple[Strike, ...] = ()
    places: tuple[Place, ...] = ()
    ranks: tuple[int, ...] = (1,)
    damage: tuple[Damage, ...] = ()


_WRITING: tuple[Place, ...] = ("save", "rename", "renamed", "remove")
_MOSTLY_ONE = (1, 1, 1, 2)  # the files of one rank are of more kinds

KINDS: dict[str, Kind] = {
    "kill-step": Kind(
        "kill -9 while tokens are read, in a step, or before a record", ("kill",), ("data", "step", "metrics")
    ),
    "kill-save": Kind(
        "kill -9 when the tensors of a checkpoint are written, and not its checksum", ("kill",), ("save",)
    ),
    "kill-rename": Kind("kill -9 before and after any file gets its name", ("kill",), ("rename", "renamed")),
    "kill-removal": Kind("kill -9 while an outdated checkpoint is deleted", ("kill",), ("remove",)),
    "sigterm-twice": Kind(
        "SIGTERM twice, in a step or while a checkpoint is written", ("terminate",), ("step", *_WRITING)
    ),
    "sigstop": Kind("SIGSTOP, then SIGCONT", ("pause",), ("data", "step", *_WRITING)),
    "disk-full": Kind("the disk is filled during the run", ("fill",), ("step",)),
    "read-only": Kind("the checkpoint folder becomes read-only", ("forbid",), ("step",)),
    "data-vanishes": Kind("a token file is removed during the run", ("lose", "lose and kill"), ("step",)),
    "truncated": Kind("a file is cut short", damage=("truncate",), ranks=_MOSTLY_ONE),
    "bit-flip": Kind("one bit of a file is flipped", damage=("flip",), ranks=_MOSTLY_ONE),
    "missing": Kind("a file is removed", damage=("remove",), ranks=_MOSTLY_ONE),
    "damage-then-kill": Kind(
        "the newest checkpoint is damaged, and the run that replaces it is killed",
        ("kill",),
        ("save", "rename", "renamed"),
        (1, 2),
        ("truncate", "flip"),
    ),
    "rank-dies": Kind("kill -9 of one of two ranks", ("kill",), ("data", "step", *_WRITING), (2,)),
    "rank-stalls": Kind(
        "SIGSTOP of one of two ranks, or a token loader that hangs", ("stop", "hang"), ("data", "step"), (2,)
    ),
}


@dataclass(frozen=True)
class Fault:
    """One fault: everything about it follows from its kind and its seed.

    `strike` hits `rank` of `ranks` when it reaches `place` for the `hit`-th time. `damage` is done to a file that
    matches `file`, at the share `position` of its bytes.
    """

    kind: str
    seed: int
    ranks: int
    strike: Strike | None = None
    place: Place = "step"
    hit: int = 1
    rank: int = 0
    damage: Damage | None = None
    file: str = ""
    position: float = 0.0

    @property
    def ends_in_a_stall(self) -> bool:
        """Whether the struck rank neither ends nor continues."""
        return self.strike in ("stop", "hang")

    def __str__(self) -> str:
        damage = f"{self.damage} {self.file}" if self.damage else ""
        strike = f"{self.strike} at {self.place} {self.hit}" if self.strike else ""
        rank = f" of rank {self.rank}" if self.ranks > 1 and self.strike else ""
        return f"{' then '.join(filter(None, (damage, strike)))}{rank}"


def draw_fault(kind: str, seed: int, counts: Counts) -> Fault:
    """Draws a fault of a kind; `counts` are those of the undisturbed runs."""
    drawn, about = random.Random(f"{kind} {seed}"), KINDS[kind]  # noqa: S311 -- not for secrets
    ranks = drawn.choice(about.ranks)
    damage, position = None, drawn.random()
    file = ""
    if about.damage:
        damage = drawn.choice(about.damage)
        files = CHECKPOINT_FILES[ranks]
        if not about.strikes and ranks == 1:
            files = (*files, *files, *TOKEN_FILES, *LOG_FILES)
        file = drawn.choice(files)
    if not about.strikes:
        return Fault(kind, seed, ranks, damage=damage, file=file, position=position)
    strike = drawn.choice(about.strikes)
    place = "data" if strike == "hang" else drawn.choice(about.places)
    # Only rank 0 renames and removes checkpoints, and a rank without anything to write reaches no `save`.
    rank = drawn.choice([rank for rank in range(ranks) if counts[ranks][rank].get(place)])
    hit = drawn.randint(1, 1 if about.damage else counts[ranks][rank][place])
    return Fault(kind, seed, ranks, strike, place, hit, rank, damage, file, position)
