"""Labels of causal language models: check that they fit the shift by one token in a completion's cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from turnover.batches import Batch, named
from turnover.errors import InputError

_ALIGNED_OUTPUTS = ("MaskedLMOutput", "TokenClassifierOutput", "Seq2SeqLMOutput")
"""Outputs of models whose logits predict the token at their own position."""
_NOT_TOKENS = ("attention_mask", "token_type_ids", "position_ids", "special_tokens_mask")
_IDS = "input_ids"
_FIX = (
    "a completion's cost is for causal language models, whose labels are their own input tokens, -100 "
    "outside the completion, and are shifted here by one token. For labels at their own position (masked "
    "tokens, tags, an encoder-decoder's) or shifted already, pass an objective of your own: lambda outputs, "
    "batch: torch.nn.functional.cross_entropy(outputs.logits.transpose(1, 2), batch.labels, "
    "reduction='none').sum(1)"
)


def check_causal(outputs: Any, batch: Batch, labels: Tensor) -> None:
    """Refuse labels that the shift by one token would pair with the wrong logits.

    A label must be the input token at its position. The last token of a row may differ: its label asks for
    the cost of another word there, and no later token has seen it.

    Args:
        outputs: outputs of the model.
        batch: the model's inputs.
        labels: int64 (rows, tokens), -100 outside the completion.
    """
    mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, Mapping) else None
    if type(outputs).__name__ in _ALIGNED_OUTPUTS:
        raise InputError(f"the model returns a {type(outputs).__name__}: {_FIX}")
    attended = torch.ones_like(labels, dtype=torch.bool)  # (rows, tokens)
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        attended = (mask != 0).to(labels.device)
    # The last token of a text that is not padding.
    position = attended.long() * torch.arange(1, labels.shape[1] + 1, device=labels.device)
    free = torch.zeros_like(attended).scatter_(1, position.argmax(dim=1, keepdim=True), True)
    free[:, 0] = True  # no logits predict the first token
    tokens = _tokens(batch.inputs, labels)
    wrong = {
        name: (labels != -100) & (labels != value.to(labels.device)) & ~free
        for name, value in tokens.items()
    }
    if wrong and all(bool(one.any()) for one in wrong.values()):
        name, positions = next(iter(wrong.items()))
        row, token = positions.nonzero()[0].tolist()
        raise InputError(
            f"the label of row {row}, token {token} is {int(labels[row, token])}, and the model's input "
            f"{name + ' ' if name else ''}there is {int(tokens[name][row, token])}: {_FIX}"
        )
    ended = attended.long().flip(1).cumsum(dim=1).flip(1) == 0  # only padding is here and follows
    padded = (labels[:, 1:] != -100) & ended[:, :-1]
    if bool(padded.any()):
        row, token = padded.nonzero()[0].tolist()
        raise InputError(
            f"row {row}, token {token + 1} is padding (its attention_mask is 0) and has the label "
            f"{int(labels[row, token + 1])}, so padding would count as part of the completion: set the "
            f"labels of padding to -100"
        )


def _tokens(inputs: Any, labels: Tensor) -> dict[str, Tensor]:
    """Inputs that may be the model's tokens, by name."""
    candidates = dict(named(inputs))
    if _IDS in candidates:
        candidates = {_IDS: candidates[_IDS]}
    return {
        name: value
        for name, value in candidates.items()
        if name not in _NOT_TOKENS
        and not (value.is_floating_point() or value.dtype == torch.bool)
        and value.shape == labels.shape
    }
