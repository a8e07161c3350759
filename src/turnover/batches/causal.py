"""Whether labels are those of a causal language model, which a completion's cost shifts by one token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from turnover.batches import Batch, named
from turnover.errors import InputError

_ALIGNED = ("MaskedLMOutput", "TokenClassifierOutput", "Seq2SeqLMOutput")
"""Outputs of models whose logits predict the token at their own place."""
_NO_TOKENS = ("attention_mask", "token_type_ids", "position_ids", "special_tokens_mask")
_IDS = "input_ids"
_FIX = (
    "a completion's cost is for causal language models, whose labels are their own input tokens, -100 "
    "where nothing is asked, and are shifted here by one token. For labels at their own place (masked "
    "tokens, tags, an encoder-decoder's) or shifted already, pass an objective of your own: lambda outputs, "
    "batch: torch.nn.functional.cross_entropy(outputs.logits.transpose(1, 2), batch.labels, "
    "reduction='none').sum(1)"
)


def check_causal(outputs: Any, batch: Batch, labels: Tensor) -> None:
    """Refuse labels that the shift by one token would put beside the wrong logits.

    A label must be the input token at its place. One other is allowed, the last token of a row: it asks
    what another word would cost there, and nothing that follows has seen it.

    Args:
        outputs: of the model.
        batch: what it was called with.
        labels: int64 (rows, tokens), -100 where nothing is asked.

    Raises:
        InputError: outputs of a model that is not causal, or other labels than its input tokens.
    """
    mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, Mapping) else None
    if type(outputs).__name__ in _ALIGNED:
        raise InputError(f"the model gives a {type(outputs).__name__}: {_FIX}")
    candidates = dict(_tokens(batch.inputs, labels))
    wrong = {name: _differing(labels, tokens, mask) for name, tokens in candidates.items()}
    if wrong and all(bool(one.any()) for one in wrong.values()):
        name, places = next(iter(wrong.items()))
        row, token = places.nonzero()[0].tolist()
        raise InputError(
            f"the label of row {row}, token {token} is {int(labels[row, token])}, and the model's input "
            f"{name + ' ' if name else ''}there is {int(candidates[name][row, token])}: {_FIX}"
        )
    _check_padding(labels, mask)


def _check_padding(labels: Tensor, mask: Any) -> None:
    """Refuse labels within the padding after a text, which only padding predicts."""
    if not isinstance(mask, Tensor) or mask.shape != labels.shape:
        return
    there = (mask != 0).long().to(labels.device)
    ended = there.flip(1).cumsum(dim=1).flip(1) == 0  # no word is here or follows
    wrong = (labels[:, 1:] != -100) & ended[:, :-1]
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        raise InputError(
            f"row {row}, token {token + 1} is padding (its attention_mask is 0) and has the label "
            f"{int(labels[row, token + 1])}, so padding would count as part of the completion: set the "
            f"labels of padding to -100"
        )


def _tokens(inputs: Any, labels: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Inputs that may be the model's tokens, with their names."""
    given = named(inputs)
    if any(name == _IDS for name, _ in given):
        given = [(name, value) for name, value in given if name == _IDS]
    for name, value in given:
        if name in _NO_TOKENS or value.is_floating_point() or value.dtype == torch.bool:
            continue
        if value.shape == labels.shape:
            yield name, value


def _differing(labels: Tensor, tokens: Tensor, mask: Any) -> Tensor:
    """Where a label is asked for that is not the token there: bool (rows, tokens)."""
    wrong = (labels != -100) & (labels != tokens.to(labels.device))
    wrong[:, 0] = False  # nothing predicts the first token
    last = torch.zeros_like(wrong)
    there = torch.ones_like(labels)
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        there = mask.to(labels.device).long()
    # The last token that is no padding.
    place = (there != 0).long() * torch.arange(1, labels.shape[1] + 1, device=labels.device)
    last.scatter_(1, place.argmax(dim=1, keepdim=True), True)
    return wrong & ~last
