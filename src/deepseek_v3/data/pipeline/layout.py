"""Where a run keeps what, below its output folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """The folders of a run. Everything in `work` is removed once the run is complete."""

    output: Path

    @property
    def work(self) -> Path:
        return self.output / ".work"

    @property
    def run_file(self) -> Path:
        return self.work / "run.json"

    @property
    def manifest(self) -> Path:
        return self.output / "manifest.json"

    def parts(self, number: int) -> Path:
        """The finished parts of a pass."""
        return self.work / f"pass-{number}"

    def decisions(self, number: int, stage: str) -> Path:
        """What a corpus stage decided before pass `number`."""
        return self.work / f"decisions-{number}" / stage

    @property
    def shards(self) -> Path:
        """Finished output files, until the run is complete."""
        return self.work / "shards"
