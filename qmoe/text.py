"""Streaming of text: tokens come one by one, text goes out in pieces that are certain."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from transformers.generation.streamers import BaseStreamer

# What a byte-level tokenizer decodes to while the bytes of a character are incomplete.
_REPLACEMENT = "\ufffd"


class _Decoded(NamedTuple):
    """How far the tokens of a text are decoded."""

    text: str = ""
    context: int = 0  # tokens[context:certain] are the few before
    certain: int = 0  # text holds what tokens[:certain] decode to


class Text:
    """The new tokens of one text, and the text as far as it is certain.

    A token is decoded together with the few before it, since what it decodes to can depend on them
    (a leading space, a character of several tokens); what those decode to alone is then taken off.

    Attributes:
        tokens: the new tokens, the end-of-text token included.
        done: whether the text has ended.
        limit: tokens after which it ends, where that has been said.
    """

    def __init__(
        self,
        tokenizer: Any,
        eos: Iterable[int],
        stop_strings: list[str],
        emit: Callable[[str], None] | None,
    ) -> None:
        """Begin a text.

        Args:
            tokenizer: decodes the tokens.
            eos: the tokens that end a text.
            stop_strings: strings that end it.
            emit: called with each piece; None where nobody listens.
        """
        self.tokenizer = tokenizer
        self.eos = frozenset(eos)
        self.stop_strings = stop_strings
        self.emit = emit
        self.tokens: list[int] = []
        self.done = False
        self.limit: int | None = None
        # Replaced as a whole: an interrupt finds it before a piece or after it, never between.
        self._decoded = _Decoded()

    @property
    def text(self) -> str:
        """The text as far as it is certain; all of it after :meth:`finish`."""
        return self._decoded.text

    def end_at(self, count: int) -> None:
        """Let the text end with its token ``count``, the last that there is or is to come."""
        self.limit = count
        self.done |= len(self.tokens) >= count

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens up to the end of this text; what follows is padding of the batch."""
        for token in tokens:
            if self.done:
                return
            self.tokens.append(token)
            self.done = token in self.eos or len(self.tokens) == self.limit
            if self.emit is not None or self.stop_strings:
                piece = self._advance()
                # A stop string ends in the last piece, so the whole text need not be searched.
                self.done |= any(
                    s in self.text[-(len(s) + len(piece)) :] for s in self.stop_strings
                )
                self._give_out(piece)

    def finish(self) -> None:
        """Give out what was held back: an incomplete character at the very end."""
        self.done = True
        self._give_out(self._advance(last=True))

    def cut(self) -> None:
        """End the text where an interrupt found it; nobody listens any more."""
        self.emit = None
        self.finish()

    def _advance(self, last: bool = False) -> str:
        """Decode as far as is certain.

        Returns:
            the new piece.
        """
        text, context, certain = self._decoded
        known = self._decode(self.tokens[context:certain])
        decoded = self._decode(self.tokens[context:])
        if len(decoded) <= len(known) or (decoded.endswith(_REPLACEMENT) and not last):
            return ""
        piece = decoded[len(known) :]
        self._decoded = _Decoded(text + piece, certain, len(self.tokens))
        return piece

    def _give_out(self, piece: str) -> None:
        if piece and self.emit is not None:
            self.emit(piece)

    def _decode(self, tokens: list[int]) -> str:
        # Tidying spaces would change text that has been given out already.
        return self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class Streamer(BaseStreamer):
    """Deals transformers' new tokens to the texts they belong to."""

    def __init__(self, texts: list[Text]) -> None:
        self.texts = texts
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Take the tokens of a step; those of the first call are the prompts."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        # (texts,), or (1, n) from strategies that accept several tokens in a step
        rows = value.reshape(len(self.texts), -1).tolist()
        for text, tokens in zip(self.texts, rows, strict=True):
            text.extend(tokens)

    def end(self) -> None:
        """Do nothing: nothing is held here."""
