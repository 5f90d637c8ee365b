"""The messages of a conversation, and the prompt that they make within the model's context."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deepseek_v3.inference.chat_template import Message
from deepseek_v3.utils.errors import GenerationError


class Conversation:
    """Messages of a user and answers, in turns, with a system message in front if there is one.

    `encode` turns messages into the ids of a prompt. `context` is the most tokens of a prompt with its answer, of
    which `reserved` are kept free for the answer.
    """

    def __init__(self, encode: Callable[[Sequence[Message]], list[int]], context: int, reserved: int) -> None:
        self._encode, self._context, self._reserved = encode, context, reserved
        self._messages: list[Message] = []
        self.system: str | None = None

    def reset(self) -> None:
        """Forgets what was said; the system message stays."""
        self._messages = []

    def ask(self, text: str) -> tuple[list[int], int]:
        """Adds a message of the user; returns the prompt, and how many of the oldest turns it no longer holds.

        Turns are dropped, also from the conversation, until the answer has room. Raises GenerationError, and adds
        nothing, if the message alone is too long, or if the template refuses the messages.
        """
        kept = [*self._messages, {"role": "user", "content": text}]
        ids = self._encode(self._with_system(kept))
        num_dropped = 0
        while len(ids) + self._reserved > self._context:
            if len(kept) == 1:
                raise GenerationError(
                    f"the message makes a prompt of {len(ids):,} tokens, expected at most "
                    f"{self._context - self._reserved:,} of the context of {self._context:,}, so that an answer "
                    "has room; shorten it"
                )
            kept, num_dropped = kept[2:], num_dropped + 1
            ids = self._encode(self._with_system(kept))
        self._messages = kept
        return ids, num_dropped

    def answer(self, text: str) -> None:
        """Adds the answer to the last message."""
        self._messages = [*self._messages, {"role": "assistant", "content": text}]

    def room(self, ids: Sequence[int]) -> int:
        """The most tokens that can follow a prompt."""
        return self._context - len(ids)

    def _with_system(self, messages: list[Message]) -> list[Message]:
        return messages if self.system is None else [{"role": "system", "content": self.system}, *messages]
