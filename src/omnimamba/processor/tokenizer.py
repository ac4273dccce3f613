"""Text to ids and back, with control ids that no text can produce.

The file is the base tokenizer alone (gpt-neox-20b for the released model). The special tokens of `config.SPECIAL_TOKENS`
follow its last id by arithmetic and are unknown to it, so a user who types `<|eot|>` gets the ids of those seven
characters. The authors add them to the tokenizer instead, and user text turns into control ids (their defect 16).
"""

import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from omnimamba.config import EOS_TOKEN, SPECIAL_TOKENS, OmniMambaConfig


class TextTokenizer:
    """A base tokenizer with the control ids of a model.

    `tokenizer` is taken over: it is set to read the names of its own special tokens as plain text, without padding or
    truncation. Raises ValueError if its ids are not exactly 0 .. base_vocab_size-1, or its `<|endoftext|>` is not eos_id.
    """

    def __init__(self, tokenizer: Tokenizer, config: OmniMambaConfig) -> None:
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        if set(vocab.values()) != set(range(config.base_vocab_size)):
            raise ValueError(
                f"the tokenizer has {len(vocab)} ids up to {max(vocab.values(), default=0)}, but the model's base_vocab_size is "
                f"{config.base_vocab_size}, ids from 0 without gaps; use the base tokenizer that the model was trained with"
            )
        if vocab.get(EOS_TOKEN) != config.eos_id:
            raise ValueError(f"{EOS_TOKEN} has id {vocab.get(EOS_TOKEN)} in the tokenizer, but the model's eos_id={config.eos_id}")
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.config = config
        self.eos_id = config.eos_id
        self.pad_id = self._special_id("[PAD]")
        self.soi_id = self._special_id("<|soi|>")
        self.eoi_id = self._special_id("<|eoi|>")
        self.sot_id = self._special_id("<|sot|>")
        self.eot_id = self._special_id("<|eot|>")
        self.t2i_id = self._special_id("<|t2i|>")
        self.mmu_id = self._special_id("<|mmu|>")
        # <|eot|> follows a conversation's last answer in the authors' training data
        self.stop_ids = frozenset({self.eos_id, self.eot_id})
        unwritten = set(range(config.base_vocab_size, config.text_vocab_size))
        unwritten |= {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._unwritten_ids = unwritten | self.stop_ids
        self.suppressed_ids = tuple(sorted(unwritten - self.stop_ids))
        """Ids that no text generation may sample: special tokens other than the stop ids, and rows of no token."""
        if self.eos_id in self.encode(EOS_TOKEN):
            raise ValueError(f"{EOS_TOKEN} is not marked special in the tokenizer, so user text could end an answer; set special=true")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], config: OmniMambaConfig) -> "TextTokenizer":
        """The tokenizer of a `tokenizer.json`. ValueError if the file is not one or does not fit `config`."""
        content = Path(path).read_bytes()
        try:
            tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # tokenizers raises the bare Exception class
            raise ValueError(f"{path} is not a tokenizer.json: {_one_line(error)}") from error
        try:
            return cls(tokenizer, config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _special_id(self, token: str) -> int:
        return self.config.base_vocab_size + SPECIAL_TOKENS.index(token)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, all below base_vocab_size and none of them a control id."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"lone surrogate {text[error.start]!r} at character {error.start}; pass valid text") from error
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; eos, special tokens and rows of no token are left out, broken UTF-8 becomes U+FFFD."""
        written = [token_id for token_id in ids if token_id not in self._unwritten_ids]
        return self._tokenizer.decode(written, skip_special_tokens=False)

    def stream(self) -> "TextStream":
        """A decoder for ids that arrive one at a time."""
        return TextStream(self)


class TextStream:
    """Pieces of one growing text: all pieces joined, `flush()` last, equal `decode` of all ids."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=False)
        self._ids: list[int] = []
        self._num_sent = 0

    def push(self, token_id: int) -> str:
        """What `token_id` adds to the text; empty while it ends inside a character."""
        if token_id in self._tokenizer._unwritten_ids:
            return ""
        self._ids.append(token_id)
        piece = self._decoder.step(self._tokenizer._tokenizer, token_id) or ""
        self._num_sent += len(piece)
        return piece

    def flush(self) -> str:
        """The rest of the text, a cut character as U+FFFD. The stream then starts over."""
        rest = self._tokenizer.decode(self._ids)[self._num_sent :]
        self._decoder = DecodeStream(skip_special_tokens=False)
        self._ids.clear()
        self._num_sent = 0
        return rest


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
