"""Log-probabilities of tokens, as the two forms of OpenAI's API show them."""

from __future__ import annotations

from typing import Any

from deepseek_v3.data.tokens.tiktoken_encoder import BYTE_OF_CHARACTER
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.inference.engine.generation_request import Request


def completion_logprobs(
    tokenizer: Tokenizer, request: Request, tokens: slice, offset: int
) -> tuple[dict[str, Any], int]:
    """The `logprobs` of some generated tokens in a completion, and the offset in the text after them.

    `offset` is that of the first token. It counts the characters of single tokens, so it is not exact behind a
    character that several tokens share.
    """
    ids, chosen = request.generated[tokens], request.logprobs[tokens]
    offsets = []
    for id_ in ids:
        offsets.append(offset)
        offset += len(tokenizer.decode([id_]))
    found = {
        "tokens": [_shown(tokenizer, id_) for id_ in ids],
        "token_logprobs": [each.logprob for each in chosen],
        "top_logprobs": [{_shown(tokenizer, id_): value for id_, value in each.top} for each in chosen],
        "text_offset": offsets,
    }
    return found, offset


def chat_logprobs(tokenizer: Tokenizer, request: Request, tokens: slice) -> list[dict[str, Any]]:
    """The `logprobs.content` of some generated tokens in a chat."""
    return [
        {
            **_token(tokenizer, id_, each.logprob),
            "top_logprobs": [_token(tokenizer, other, value) for other, value in each.top],
        }
        for id_, each in zip(request.generated[tokens], request.logprobs[tokens], strict=True)
    ]


def _shown(tokenizer: Tokenizer, id_: int) -> str:
    """The text of a token, or its bytes as OpenAI's API shows them if they are no whole characters."""
    text = tokenizer.decode([id_])
    if "\ufffd" not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes(tokenizer, id_))


def _token(tokenizer: Tokenizer, id_: int, logprob: float) -> dict[str, Any]:
    return {"token": tokenizer.decode([id_]), "logprob": logprob, "bytes": list(token_bytes(tokenizer, id_))}


def token_bytes(tokenizer: Tokenizer, id_: int) -> bytes:
    """The bytes of a token's text: exact for byte-level tokens, even for a part of a character."""
    token = tokenizer.token(id_)
    is_byte_level = any(step["type"] == "ByteLevel" for step in tokenizer.decoder_steps)
    if is_byte_level and token is not None and id_ not in tokenizer.markers:
        return bytes(BYTE_OF_CHARACTER[sign] for sign in token)
    return tokenizer.decode([id_]).encode()
