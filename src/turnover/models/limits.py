"""Limits of text encoders: positions and vocabulary, found by running them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from turnover.errors import InputError
from turnover.models.encoders import token_of

_FEW, _MORE = 4, 8
"""Lengths of two texts, in tokens, that show which indices grow with the position."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Limits of an encoder.

    Attributes:
        positions: most tokens of a text; ``None``: no limit is known.
        vocabulary: number of token ids; ``None``: not known.
    """

    positions: int | None = None
    vocabulary: int | None = None

    def check(
        self, tokens: Sequence[Sequence[int]], keys: Sequence[str], max_tokens: int, tokenizer: Any
    ) -> None:
        """Refuse texts without tokens, with more tokens than positions, or with tokens without embedding."""
        for key, text in zip(keys, tokens, strict=True):
            if not text:
                raise InputError(
                    f"the text {key!r} has no token: the tokenizer leaves nothing of it"
                )
            if self.positions is not None and len(text) > self.positions:
                raise InputError(
                    f"--max-tokens is {max_tokens}, the model has {self.positions} positions, and the text "
                    f"{key!r} has {len(text)} tokens or more: fit with --max-tokens {self.positions}"
                )
            if self.vocabulary is not None and max(text) >= self.vocabulary:
                one = max(text)
                raise InputError(
                    f"the text {key!r} has the token {tokenizer.convert_ids_to_tokens(one)!r}, number {one} "
                    f"of the tokenizer, and the model has {self.vocabulary} embeddings: use the tokenizer "
                    f"of the model, or save the model with resize_token_embeddings"
                )


def limits_of(encoder: Any, max_tokens: int) -> Limits:
    """Limits of an encoder, as far as they matter for texts of up to ``max_tokens``."""
    vocabulary = vocabulary_of(encoder)
    token = token_of(encoder)
    positions = None
    for candidate in _tables_of_positions(encoder, token):
        # A table may hold bounded distances instead, or more rows than the encoder accepts tokens.
        if candidate < max_tokens and not _takes(encoder, token, candidate + 1):
            positions = candidate
            break
    return Limits(positions, vocabulary)


def vocabulary_of(encoder: Any) -> int | None:
    """Number of tokens with an embedding; ``None`` if it is not known."""
    try:
        table = encoder.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    asked = getattr(encoder.config, "vocab_size", None)
    rows = len(table.weight) if isinstance(table, nn.Embedding) else None
    return rows if rows == asked else None


def _tables_of_positions(encoder: Any, token: int) -> list[int]:
    """Possible numbers of positions: rows of tables whose last row in use moves with the last token."""
    few, more = _Lookups(), _Lookups()
    for lookups, tokens in ((few, _FEW), (more, _MORE)):
        with lookups:
            if not _takes(encoder, token, tokens):
                return []
    return sorted(
        rows - (last - (_FEW - 1))
        for (rows, last), (_, later) in zip(few.seen, more.seen, strict=False)
        if later - last == _MORE - _FEW
    )


def _takes(encoder: Any, token: int, tokens: int) -> bool:
    """Whether the encoder runs on a text of so many tokens."""
    inputs = torch.full((1, tokens), token)
    try:
        with torch.no_grad():
            encoder(input_ids=inputs, attention_mask=torch.ones_like(inputs))
    except Exception:  # noqa: BLE001 - of any model
        _log.debug("the encoder fails on %d tokens", tokens, exc_info=True)
        return False
    return True


class _Lookups(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the rows of every embedding table in use, and the largest index looked up."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default and args[1].numel():
            self.seen.append((len(args[0]), int(args[1].max())))
        return func(*args, **(kwargs or {}))
