"""The command that turns raw text into a clean corpus: `dsv3 preprocess`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from deepseek_v3.config.data_config import DEFAULT_TOKENS
from deepseek_v3.config.loading import load_section
from deepseek_v3.config.preprocess_config import PreprocessConfig
from deepseek_v3.data.pipeline.executors import preload_workers
from deepseek_v3.data.pipeline.run_folder import RunFolder
from deepseek_v3.utils.command_line import override_options, print_next_steps
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.files import unused_path
from deepseek_v3.utils.logging import configure_logging, get_logger


def preprocess(
    config: Annotated[Path, typer.Option(help="YAML file of the run; configs/data_config.yaml shows all options.")],
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, such as workers=4.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Only read share I (from 0) of N, as one job of an array."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Do the rest of the work once all shares are read.")
    ] = False,
) -> None:
    """Clean, deduplicate and filter raw text, with a reason for every document that is dropped."""
    configure_logging()
    settings = load_section(PreprocessConfig, config, override or [])
    if settings.engine == "local" and settings.workers != 1:
        preload_workers(settings)
    # The fork server imports these modules, too; importing them here at the same time saves a second.
    from deepseek_v3.data.pipeline.resume import count_finished
    from deepseek_v3.data.pipeline.run import run_pipeline

    log = get_logger("Preprocess")
    try:
        manifest = run_pipeline(settings, shard=_parse_shard(shard), merge=merge)
    except KeyboardInterrupt:
        finished = count_finished(RunFolder(settings.output_dir))
        kept = "Stopped; %d finished parts are kept in %s; the same command resumes the run"
        log.info(kept, finished, settings.output_dir)
        words = ["dsv3", "preprocess", "--config", config, *override_options(override)]
        print_next_steps([*words, *(["--shard", shard] if shard else []), *(["--merge"] if merge else [])])
        raise
    if not manifest:
        log.info("share %s is read; once all shares are, run again with --merge", shard)
        print_next_steps(["dsv3", "preprocess", "--config", config, *override_options(override), "--merge"])
        return
    log.info(_summary(manifest["counts"]))
    log.info("%s: data/, dropped/, quarantine/, manifest.json, stats.json, report.html", settings.output_dir)
    if not manifest["counts"]["kept"]:
        log.warning(
            "no document is left to tokenize; %s shows which stage dropped them and why: change `pipeline` or the "
            "limits of that stage, and choose another output_dir",
            settings.output_dir / "report.html",
        )
        return
    clean, tokens = settings.output_dir / "data", unused_path(DEFAULT_TOKENS)
    print_next_steps(["dsv3", "tokenize", "--input", clean, "--vocab-size", 32768, "--output", tokens])


def _summary(counts: dict[str, Any]) -> str:
    line = (
        f"{counts['input']:,} records = {counts['kept']:,} kept + {counts['dropped']:,} dropped + "
        f"{counts['quarantined']:,} quarantined"
    )
    return line + (f"; {counts['copies']:,} copies" if counts["copies"] else "")


def _parse_shard(shard: str | None) -> tuple[int, int] | None:
    if shard is None:
        return None
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard)
    if not match:
        raise ConfigError(f"--shard {shard}: expected I/N, such as 0/8")
    return int(match[1]), int(match[2])
