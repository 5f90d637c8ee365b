"""Text to token ids and back: byte-level BPE, trained here or read from any `tokenizer.json`."""

from __future__ import annotations

import json as json_text
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from deepseek_v3.config.data_config import MAX_VOCABULARY
from deepseek_v3.config.text_files import printable_path
from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.documents import check_unicode
from deepseek_v3.data.tokens.long_pieces import CUT
from deepseek_v3.data.tokens.tiktoken_encoder import DEEPSEEK, NotExpressibleError, TiktokenEncoder
from deepseek_v3.data.tokens.tokenizer_config import ends_in_folder, read_tokenizer_config, special_token
from deepseek_v3.data.tokens.vocabulary import (
    check_complete,
    check_ids,
    flatten_steps,
    is_byte_level,
    keeps_every_byte,
    removing_step,
    sentencepiece_bytes,
)
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.files import atomic_write, read_regular_file
from deepseek_v3.utils.logging import get_logger

_MARKERS = ("<|endoftext|>", "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")

# The names of end-of-text, and of the three FIM markers, in published tokenizers.
_END_OF_TEXT = (
    "<|endoftext|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
)
_FIM = (
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)

_MAX_FILE_BYTES = 2**28  # the largest tokenizer.json that is read; the largest published ones have about 30 MB

_log = get_logger("Tokens")


MIN_VOCABULARY = len(_MARKERS) + 256


class FimMarkers(NamedTuple):
    """The ids of the markers before the prefix, before the suffix, and before the middle."""

    begin: int
    hole: int
    end: int


class Tokenizer:
    """An immutable tokenizer, built from the text of a `tokenizer.json`.

    Text never becomes a marker: the name of a marker such as end-of-text is encoded like any other characters, and
    no marker is added before or after a text. Safe to use from several threads.

    `ends` are the tokens that end a text, by name or id: the first is the end-of-text marker of a training corpus,
    and generation stops at any of them. An id without a token is left out, with a warning. Without any, the marker
    is the first token with a known name. `config` holds the fields of a `tokenizer_config.json`: special tokens,
    and the chat template if there is one.

    Raises DataError if the JSON is not a tokenizer, if its ids are far larger than the number of its tokens or not
    unique, if it would drop text, if no marker has a known name of end-of-text, if it lacks one of `ends`, or if
    text with the name of the end-of-text marker or of a FIM marker would be encoded as the marker. `source` names
    the tokenizer in the message.
    """

    def __init__(
        self,
        json: str,
        source: str = "tokenizer.json",
        ends: Sequence[str | int] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._json = json
        self.config = config
        self._tokenizer = _build(json, source)
        added = self._tokenizer.get_added_tokens_decoder()
        ids = {token.content: id_ for id_, token in added.items()}
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.ends = self._ids_of(ends, source) or tuple(ids[name] for name in _END_OF_TEXT if name in ids)[:1]
        if not self.ends:
            raise DataError(
                f"{source}: has no end-of-text marker; expected one of {', '.join(_END_OF_TEXT)}; name another as "
                "eos_token in the tokenizer_config.json of its folder and give the folder, or by --end-of-text of "
                "`dsv3 tokenize`"
            )
        self.end_of_text: int = self.ends[0]
        self._check_begin(source)
        fim = next((names for names in _FIM if ids.keys() >= set(names)), None)
        self.fim = FimMarkers(*(ids[name] for name in fim)) if fim else None
        for id_ in (self.end_of_text, *(self.fim or ())):
            name = str(self._tokenizer.id_to_token(id_))
            if id_ in self._encode_with_tokenizers([name])[0]:
                raise DataError(
                    f"{source}: encodes the text {name!r} as the marker of that name; "
                    "use a tokenizer that tells the two apart, such as any byte-level BPE"
                )

    def _check_begin(self, source: str) -> None:
        """Raises DataError if the config has a marker put before every text that is not in the vocabulary."""
        config = self.config or {}
        marker = special_token(config, "bos_token")
        if marker and config.get("add_bos_token") and self._tokenizer.token_to_id(marker) is None:
            raise DataError(
                f"{source}: has no token {marker!r} to begin a text, which its tokenizer_config.json names as "
                "bos_token; correct it"
            )

    def _ids_of(self, ends: Sequence[str | int], source: str) -> tuple[int, ...]:
        """The different ids of the tokens that end a text. Raises DataError for a name that no token has."""
        ids: dict[int, None] = {}
        for end in ends:
            id_ = self._tokenizer.token_to_id(end) if isinstance(end, str) else end
            if id_ is None:
                raise DataError(
                    f"{source}: has no token {end!r} to end a text; name one of its tokens as end-of-text"
                )
            if not 0 <= id_ < self.vocab_size or self._tokenizer.id_to_token(id_) is None:
                _log.warning(f"{source}: has no token of id {id_}, so generation cannot stop there")
            else:
                ids[id_] = None
        return tuple(ids)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Trains byte-level BPE on `texts`, in one pass; the same texts give the same tokenizer.

        Pre-tokens are cut after 256 characters, in training and encoding, so the time is linear in the text.

        The vocabulary has 4 markers, 256 bytes and as many merges as `vocab_size` allows, or fewer if no further
        pair occurs twice in the texts. Raises DataError if `vocab_size` is less than 260.
        """
        check_vocab_size(vocab_size)
        tokenizer = HuggingFaceTokenizer(models.BPE())
        tokenizer.pre_tokenizer = _pre_tokenizer()
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(_MARKERS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str())

    @classmethod
    def from_json(cls, json: str, source: str = "tokenizer.json") -> Tokenizer:
        """Builds a tokenizer from the text of a `tokenizer.json`; `source` names it in errors."""
        return cls(json, source)

    @classmethod
    def load(cls, path: str | Path, ends: Sequence[str | int] = ()) -> Tokenizer:
        """Reads a `tokenizer.json`, or a folder with one, such as a Hugging Face directory.

        The other files of a folder name the tokens that end a text, unless `ends` does. Warns if the pre-tokenizer
        removes characters.
        """
        path, config = Path(path), None
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            text = read_regular_file(file, _MAX_FILE_BYTES, "a tokenizer.json").decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: is not UTF-8 at byte {error.start}; expected a tokenizer.json") from None
        except ValueError as error:
            raise DataError(f"{printable_path(file)}: {error}") from None
        if path.is_dir():
            config = read_tokenizer_config(path)
            ends = ends or ends_in_folder(path, config)
        tokenizer = cls(text, str(file), ends, config)
        if step := removing_step(tokenizer._fields):
            _log.warning(
                f"{file}: its pre-tokenizer ({step}) removes the characters at which it cuts text, so no id stands "
                "for them; use a byte-level tokenizer to keep all text"
            )
        return tokenizer

    def to_json(self) -> str:
        """The text of the `tokenizer.json` that was read or trained."""
        return self._json

    def save(self, path: str | Path) -> None:
        """Writes a `tokenizer.json`, which Transformers can read as well."""
        with atomic_write(Path(path)) as partial:
            partial.write_bytes(self._json.encode("utf-8"))

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Raises DataError if it holds a lone surrogate."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts. Raises DataError if one holds a lone surrogate.

        tiktoken encodes them on one core; if it does not support this tokenizer, the tokenizers library encodes
        them in parallel. The ids are the same.
        """
        for text in texts:
            check_unicode(text, "text to encode")
        tiktoken = self._tiktoken
        if tiktoken is None:
            return self._encode_with_tokenizers(texts)
        return [
            tiktoken.encode(text) if tiktoken.can_encode(text) else self._encode_with_tokenizers([text])[0]
            for text in texts
        ]

    @cached_property
    def text_start(self) -> int:
        """The token before a text that is scored: the begin-of-text marker if there is one, else end-of-text."""
        marker = special_token(self.config or {}, "bos_token")
        id_ = self._tokenizer.token_to_id(marker) if marker else None
        return self.end_of_text if id_ is None else id_

    @cached_property
    def prompt_start(self) -> tuple[int, ...]:
        """The ids that the tokenizer puts before a prompt, such as a begin-of-text marker; none by default."""
        marker = special_token(self.config or {}, "bos_token")
        if self.config is not None and self.config.get("add_bos_token") is not None:
            id_ = self._tokenizer.token_to_id(marker) if marker and self.config["add_bos_token"] else None
            return () if id_ is None else (id_,)
        with_markers, without = (self._tokenizer.encode("a", add_special_tokens=each).ids for each in (True, False))
        return tuple(with_markers[: with_markers.index(without[0])]) if without else ()

    def has_the_ids_of(self, other: Tokenizer) -> bool:
        """Whether every id stands for the same token in both tokenizers."""
        ours, theirs = (each._tokenizer.get_vocab(with_added_tokens=True) for each in (self, other))
        return ours == theirs

    @property
    def _fields(self) -> dict[str, Any]:
        """The `tokenizer.json` as the library writes it, including the types that a file may omit."""
        fields: dict[str, Any] = json_text.loads(self._tokenizer.to_str())
        return fields

    @cached_property
    def _tiktoken(self) -> TiktokenEncoder | None:
        try:
            return TiktokenEncoder(self._tokenizer)
        except NotExpressibleError as reason:
            _log.debug("text is encoded by the tokenizers library, not by tiktoken: %s", reason)
            return None

    def _encode_with_tokenizers(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    @cached_property
    def byte_lengths(self) -> Int64Array:
        """The bytes of UTF-8 text that each id encodes: int64 [vocab_size]; 0 for markers.

        Exact if `is_byte_exact`; otherwise the length of the id's token in the vocabulary.
        """
        byte_level = is_byte_level(self._fields)
        lengths = np.zeros(self.vocab_size, np.int64)
        for piece, id_ in self._tokenizer.get_vocab(with_added_tokens=False).items():
            lengths[id_] = len(piece) if byte_level else sentencepiece_bytes(piece)
        for id_, token in self._tokenizer.get_added_tokens_decoder().items():
            lengths[id_] = len(token.content.encode()) if token.content.isspace() else 0
        return lengths

    @cached_property
    def is_byte_exact(self) -> bool:
        """Whether the `byte_lengths` of a text's ids sum to its bytes: byte-level BPE that does not change text."""
        return keeps_every_byte(self._fields)

    @property
    def markers(self) -> dict[int, str]:
        """The names of the special tokens by id, in the order of the ids; no text is encoded as one of them."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {id_: added[id_].content for id_ in sorted(added) if added[id_].special}

    def token(self, id_: int) -> str | None:
        """The token of an id in the vocabulary; None for an unknown id."""
        return self._tokenizer.id_to_token(id_)

    @cached_property
    def decoder_steps(self) -> list[dict[str, Any]]:
        """The steps of decoding, as in a `tokenizer.json`; empty if tokens are joined by spaces."""
        return flatten_steps(self._fields["decoder"])

    def decode(self, ids: Sequence[int], skip_markers: bool = False) -> str:
        """The text of ids: markers by name unless skipped, invalid UTF-8 as U+FFFD; unknown ids are skipped."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_markers)


def check_vocab_size(vocab_size: int) -> None:
    """Raises DataError if a tokenizer of this size cannot be trained."""
    if vocab_size > MAX_VOCABULARY:
        raise DataError(f"vocab_size = {vocab_size:,}: expected at most {MAX_VOCABULARY:,}")
    if vocab_size < MIN_VOCABULARY:
        raise DataError(
            f"vocab_size = {vocab_size} is too small: {len(_MARKERS)} markers and 256 bytes need {MIN_VOCABULARY}"
        )


def min_tokens(text: str) -> int:
    """The least number of tokens of a document for any tokenizer of `Tokenizer.train`: no token crosses a split."""
    return len(_pre_tokenizer().pre_tokenize_str(text)) + 1


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (*DEEPSEEK, CUT)]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _build(json: str, source: str) -> HuggingFaceTokenizer:
    check_ids(json, source)
    try:
        tokenizer = HuggingFaceTokenizer.from_str(json)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 -- the library's panics are not of type Exception
        raise DataError(f"{source}: is not a tokenizer of the tokenizers library: {error}") from None
    check_complete(json_text.loads(tokenizer.to_str()), source)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # The library would find a marker in text unless it is declared special. Runs of white space, which some
    # vocabularies add in the same way, are text and stay as they are.
    added = tokenizer.get_added_tokens_decoder().values()
    names = [token.content for token in added if not token.content.isspace()]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.encode_special_tokens = True
    return tokenizer
