"""The command `dsv3 chat`: a conversation with a model in the terminal, or with lines that are piped in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from deepseek_v3.inference.chat_session import ChatSession
from deepseek_v3.inference.chat_template import ChatTemplate, Message, read_template, template_of
from deepseek_v3.inference.conversation import Conversation
from deepseek_v3.inference.generate import DeviceOption, KvOption, PrecisionOption, StoredPrecision, TopPOption
from deepseek_v3.inference.generator import Generator
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.interop.load_model import load_for_inference
from deepseek_v3.utils.command_line import integer_option, number_option, print_next_steps
from deepseek_v3.utils.distributed.launch import select_device
from deepseek_v3.utils.errors import GenerationError
from deepseek_v3.utils.logging import configure_logging


def chat(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint, a folder of them, or a Hugging Face directory.")],
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Continue each line as text, without a chat template.")
    ] = False,
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja file in place of the tokenizer's chat template.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="NUMBER", parser=integer_option(1), help="The most tokens of an answer.")
    ] = 512,
    temperature: Annotated[
        float, typer.Option(metavar="NUMBER", parser=number_option, help="0: always the most probable token.")
    ] = SamplingConfig.temperature,
    top_p: TopPOption = SamplingConfig.top_p,
    seed: Annotated[
        int, typer.Option(metavar="NUMBER", parser=integer_option(0), help="The same seed gives the same answers.")
    ] = SamplingConfig.seed,
    kv: KvOption = None,
    precision: PrecisionOption = StoredPrecision.AUTO,
    device: DeviceOption = "auto",
) -> None:
    """Talk with a model in the terminal."""
    configure_logging(stderr=True)
    if plain and (system is not None or chat_template is not None):
        raise GenerationError("found --plain with --system or --chat-template, which plain text has no place for")
    sampling = SamplingConfig(temperature, top_p, seed=seed, max_new_tokens=max_new_tokens)
    source = None if chat_template is None else read_template(chat_template)
    saved = load_for_inference(checkpoint, select_device(device), precision.value)
    generator = Generator(saved.model, saved.tokenizer, kv=kv)
    if not plain and source is None and template_of(saved.tokenizer) is None:
        raise GenerationError(
            f"{checkpoint}: its tokenizer has no chat template, so it only continues text; add --plain to do that "
            "line by line, name a template by --chat-template FILE, or use `dsv3 generate --prompt TEXT`"
        )
    generator.kv_cache.pages_that_fit()  # says what fits before the first message, and not in an answer
    template = None if plain else ChatTemplate(saved.tokenizer, source)
    context = saved.model.config.max_position_embeddings
    encode = partial(encode_plainly, generator) if template is None else template.prompt
    conversation = Conversation(encode, context, reserved=min(max_new_tokens, context // 2))
    conversation.system = system
    ChatSession(generator, conversation, sampling, has_template=not plain).run()
    same = [] if device == "auto" else ["--device", device]
    print_next_steps(["dsv3", "serve", "--checkpoint", checkpoint, *same], err=True)


def encode_plainly(generator: Generator, messages: Sequence[Message]) -> list[int]:
    """The ids of everything that was written as one text, in which each line of the user begins a line."""
    text = ""
    for message in messages:
        begins_a_line = not text or text.endswith("\n") or message["role"] == "assistant"
        text += message["content"] if begins_a_line else f"\n{message['content']}"
    return generator.encode(text)[0]
