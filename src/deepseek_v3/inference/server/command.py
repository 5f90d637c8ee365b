"""The command `dsv3 serve`: a server for the model of a checkpoint, with the API of OpenAI's."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from deepseek_v3.config.text_files import read_text
from deepseek_v3.inference.chat_template import ChatTemplate, read_template, template_of
from deepseek_v3.inference.generate import (
    DeviceOption,
    InvariantOption,
    KvOption,
    PrecisionOption,
    SpeculateOption,
    StoredPrecision,
)
from deepseek_v3.inference.generator import Generator
from deepseek_v3.inference.server.service import ServedModel, ServerLimits, Service
from deepseek_v3.interop.load_model import load_for_inference
from deepseek_v3.mla.kv_compression import PagePool, pages_of
from deepseek_v3.model.pretrained import LoadedModel
from deepseek_v3.ops.mla_decode.formats import PAGE
from deepseek_v3.utils.command_line import integer_option
from deepseek_v3.utils.distributed.launch import select_device
from deepseek_v3.utils.errors import ConfigError, GenerationError
from deepseek_v3.utils.logging import configure_logging, get_logger
from deepseek_v3.utils.optional import is_installed, missing_library

KEY_VARIABLE = "DSV3_API_KEY"
_MOST_KEY_BYTES = 4096

_log = get_logger("Server")


def serve(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint, a folder of them, or a Hugging Face directory.")],
    host: Annotated[
        str, typer.Option(help="The address to listen at; 0.0.0.0 for the whole network.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="NUMBER", parser=integer_option(0, 65535), help="0: any free port.")
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            help=f"A key that clients must send. Others can see it in ps: better {KEY_VARIABLE}=… or a file."
        ),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file that holds the key.")] = None,
    model_name: Annotated[
        str | None, typer.Option(help="The model's name for clients; by default that of the checkpoint.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja file in place of the tokenizer's chat template.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER", parser=integer_option(2), help="The most tokens of a prompt with its answer."
        ),
    ] = None,
    max_running: Annotated[
        int, typer.Option(metavar="NUMBER", parser=integer_option(1), help="Completions computed together.")
    ] = 32,
    max_waiting: Annotated[
        int, typer.Option(metavar="NUMBER", parser=integer_option(0), help="Completions that may wait beside them.")
    ] = 256,
    max_body: Annotated[
        int, typer.Option(metavar="BYTES", parser=integer_option(1), help="The longest request.")
    ] = 4 * 2**20,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER",
            parser=integer_option(1),
            help="Room of the cache; by default for max-running whole contexts, or what fits.",
        ),
    ] = None,
    stop_seconds: Annotated[
        int,
        typer.Option(
            metavar="NUMBER", parser=integer_option(0), help="How long answers may go on after Ctrl-C or SIGTERM."
        ),
    ] = 30,
    kv: KvOption = None,
    speculate: SpeculateOption = 0,
    batch_invariant: InvariantOption = False,
    precision: PrecisionOption = StoredPrecision.AUTO,
    device: DeviceOption = "auto",
) -> None:
    """Serve a model over HTTP, with OpenAI's API and a page to try it."""
    configure_logging(stderr=True)
    _require_libraries()
    from deepseek_v3.inference.server.http_server import address_of, bind

    key = read_key(api_key, api_key_file)
    if api_key is not None:
        _log.warning(f"others on this machine can read --api-key in ps; {KEY_VARIABLE} and --api-key-file hide it")
    template = None if chat_template is None else read_template(chat_template)
    with bind(host, port) as bound:  # before the weights are read, which takes long
        saved = load_for_inference(checkpoint, select_device(device), precision.value, mtp_layers=min(speculate, 1))
        name = model_name or checkpoint.resolve().name or "model"
        limits = _limits(saved, context, max_running, max_waiting, max_body)
        generator = Generator(saved.model, saved.tokenizer, max_running, False, kv, speculate, batch_invariant)
        service = _service(saved, name, template, limits, generator, cache_tokens)
        local = bound.getsockname()[0] in ("127.0.0.1", "::1")
        if key is None and not local:
            _log.warning(f"everyone who reaches {host} can use the model; set {KEY_VARIABLE} to ask for a key")
        asyncio.run(
            _serve(service, bound, key, local, stop_seconds, lambda: _announce(service, address_of(bound), key))
        )
    if service.failure is not None:
        raise GenerationError(f"the engine failed: {service.failure}; the log above says where")
    _log.info("stopped in order")


def _require_libraries() -> None:
    for library in ("fastapi", "uvicorn"):
        if not is_installed(library):
            raise GenerationError(missing_library("dsv3 serve", library))


def read_key(key: str | None, file: Path | None) -> str | None:
    """The key that clients have to send: the option, or the content of the file, or the environment variable.

    Raises ConfigError for two of them, and for a key that does not fit in a header.
    """
    if key is not None and file is not None:
        raise ConfigError("found --api-key and --api-key-file, expected one of the two")
    if file is not None:
        key = read_text(file, _MOST_KEY_BYTES).strip()
    key = os.environ.get(KEY_VARIABLE) if key is None else key
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError("the API key is empty or holds other than printable ASCII characters; choose another one")
    return key


def _limits(
    saved: LoadedModel, context: int | None, max_running: int, max_waiting: int, max_body: int
) -> ServerLimits:
    longest = saved.model.config.max_position_embeddings
    if context is not None and context > longest:
        raise ConfigError(
            f"--context {context:,}: expected at most the model's max_position_embeddings = {longest:,}"
        )
    return ServerLimits(context or longest, max_running, max_waiting, max_body)


def _service(
    saved: LoadedModel,
    name: str,
    template: str | None,
    limits: ServerLimits,
    generator: Generator,
    cache_tokens: int | None,
) -> Service:
    tokenizer = saved.tokenizer
    has_template = template is not None or template_of(tokenizer) is not None
    chat = ChatTemplate(tokenizer, template) if has_template else None
    pool = _new_pool(generator, limits, cache_tokens)
    return Service(ServedModel(name, tokenizer, chat, saved.model.config.vocab_size), generator, pool, limits)


def _new_pool(generator: Generator, limits: ServerLimits, cache_tokens: int | None) -> PagePool:
    """The cache. Raises GenerationError if it cannot hold one text of the whole context."""
    fitting = generator.kv_cache.pages_that_fit()
    wanted = limits.max_running * pages_of(limits.context) if cache_tokens is None else pages_of(cache_tokens)
    number = min(wanted, fitting)
    if number < pages_of(limits.context):
        cause = "--cache-tokens gives" if wanted <= fitting else "the memory that is free has"
        raise GenerationError(
            f"{cause} room for {number * PAGE:,} tokens in the cache, fewer than one text of {limits.context:,} "
            f"needs; serve shorter ones with --context {max(number * PAGE, 2)}, or give the cache more room"
        )
    return generator.kv_cache.new_pool(number)


async def _serve(
    service: Service,
    bound: socket.socket,
    key: str | None,
    local: bool,
    seconds: float,
    on_ready: Callable[[], None],
) -> None:
    from deepseek_v3.inference.server.app import create_app
    from deepseek_v3.inference.server.http_server import StopRequest, serve_until_stopped

    stop = StopRequest()

    def on_signal(number: int) -> None:
        again = (
            "ending open answers now"
            if stop.begin.is_set()
            else f"open answers may take {seconds:g} s; once more to stop at once"
        )
        _log.info(f"{signal.Signals(number).name}: {again}")
        stop.request()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    await serve_until_stopped(create_app(service, key, local), service, bound, stop, seconds, on_ready)


def _announce(service: Service, address: str, key: str | None) -> None:
    """Prints what is served, and the commands to try it."""
    limits, chat = service.limits, service.model.template is not None
    _log.info(
        f"serving {service.model.name} at {address}: {limits.context:,} tokens of context, {limits.max_running} "
        f"completions at a time, {limits.max_waiting} more may wait, "
        f"{'with a' if chat else 'without a'} chat template"
    )
    endpoint, body = ("chat/completions", '{"messages": [{"role": "user", "content": "Hello"}], "stream": true}')
    if not chat:
        endpoint, body = ("completions", '{"prompt": "def main(", "max_tokens": 32, "stream": true}')
    header = "" if key is None else f' -H "Authorization: Bearer ${KEY_VARIABLE}"'
    curl = f"curl -N {address}/v1/{endpoint}{header} -H 'Content-Type: application/json' -d '{body}'"
    with suppress(OSError):  # a closed pipe: the server serves all the same
        typer.echo(f"Next:\n  open {address}/ in a browser\n  {curl}")
