"""Objectives: the cost of a prediction. Lower is better, so positive influence is always helpful.

An objective is a callable ``(outputs, batch) -> (rows,)`` of the model's outputs and the
:class:`~turnover.Batch`, differentiable for the linear method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from turnover.batches import Batch
from turnover.batches.causal import check_causal
from turnover.errors import InputError

Objective = Callable[[Any, Batch], Tensor]


def logits_of(outputs: Any) -> Tensor:
    """The logits in a model's outputs: a tensor, ``.logits``, ``["logits"]`` or the first item."""
    if isinstance(outputs, Tensor):
        return outputs
    candidate = getattr(outputs, "logits", None)
    if candidate is None and isinstance(outputs, Mapping):
        candidate = outputs.get("logits")
    if candidate is None and isinstance(outputs, tuple | list) and outputs:
        candidate = outputs[0]
    if isinstance(candidate, Tensor):
        return candidate
    raise InputError(
        f"no logits in outputs of type {type(outputs).__name__}: pass an objective of your own, a "
        f"callable (outputs, batch) -> (rows,)"
    )


def logits_and_labels(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Float32 logits (rows, classes) and int64 labels (rows,), which are classes."""
    logits, labels = _of_one_shape(outputs, batch)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise InputError(
            f"labels must lie in [0, {logits.shape[1]}), the model's classes, got "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    return logits, labels


def _without_waiting(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """As :func:`logits_and_labels`; on a GPU a row whose label is no class has logits of NaN."""
    if not _where_asking_waits(logits_of(outputs)):
        return logits_and_labels(outputs, batch)
    # NaN is refused with the scores.
    logits, labels = _of_one_shape(outputs, batch)
    known = (labels >= 0) & (labels < logits.shape[1])
    return logits.masked_fill(~known[:, None], torch.nan), labels.clamp(0, logits.shape[1] - 1)


def _where_asking_waits(logits: Tensor) -> bool:
    """Whether a check of values would wait for the device, in every forward."""
    return logits.device.type != "cpu"


def _of_one_shape(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    logits = logits_of(outputs).float()
    labels = batch.labels
    if labels is None:
        raise InputError(_no_labels(batch))
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise InputError(
            f"classification objectives need logits (rows, classes >= 2), got {tuple(logits.shape)}: "
            f"pass an objective of your own for other tasks"
        )
    if labels.is_floating_point() or labels.shape != logits.shape[:1]:
        raise InputError(
            f"labels must be integer classes of shape ({len(logits)},), got {labels.dtype} "
            f"{tuple(labels.shape)}: regression and multi-label targets need your own objective"
        )
    return logits, labels.long()


def _no_labels(batch: Batch) -> str:
    message = "the objective needs labels, and the batch has none: give a list of batches (inputs, labels)"
    if isinstance(batch.inputs, Mapping) and batch.inputs:
        message += (
            f". If they are among its inputs ({', '.join(map(repr, batch.inputs))}), pass adapter=, a "
            f"function from your batch to turnover.Batch(inputs, labels, ids)"
        )
    return message


def costs(objective: Objective, outputs: Any, batch: Batch) -> Tensor:
    """The objective of every row: float32 (rows,)."""
    values = objective(outputs, batch)
    rows = len(batch)
    if not isinstance(values, Tensor) or values.shape != (rows,):
        given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(
            f"the objective returned {given} for {rows} rows; it must be a callable (outputs, batch) -> "
            f"(rows,), without a mean over the rows"
        )
    return values.float()


def cross_entropy(outputs: Any, batch: Batch) -> Tensor:
    """Cross entropy of the labeled class, in nats: float32 (rows,)."""
    logits, labels = _without_waiting(outputs, batch)
    return functional.cross_entropy(logits, labels, reduction="none")


def margin(outputs: Any, batch: Batch) -> Tensor:
    """Minus the log-odds of the labeled class, in nats: float32 (rows,).

    ``logsumexp(other logits) - logit of the label``. Its noise is closer to Gaussian than that of the
    loss, and it does not saturate on confident predictions.
    """
    logits, labels = _without_waiting(outputs, batch)
    labeled = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.logsumexp(dim=1) - labeled


def completion(outputs: Any, batch: Batch) -> Tensor:
    """Minus the log-probability of the labeled tokens, in nats: float32 (rows,).

    For causal language models, with labels as in Hugging Face: logits (rows, tokens, vocabulary), labels
    int64 (rows, tokens). The logits of a token predict the label of the next token, and -100 excludes
    tokens (the prompt, padding). The cost is the sum over a row's tokens; with the instance ids of
    documents, a score is the influence of a document on the whole completion.
    """
    logits, labels = logits_of(outputs), batch.labels
    if labels is None:
        raise InputError(_no_labels(batch))
    if logits.dim() != 3 or labels.is_floating_point() or labels.shape != logits.shape[:2]:
        raise InputError(
            f"a completion needs logits (rows, tokens, vocabulary) and integer labels (rows, tokens), "
            f"got {tuple(logits.shape)} and {labels.dtype} {tuple(labels.shape)}"
            f"{_prompt_tuning_fix(logits, labels)}"
        )
    following = labels[:, 1:].long()  # (rows, tokens - 1)
    labeled = following != -100
    if not bool(labeled.any(dim=1).all()):
        rows = (~labeled.any(dim=1)).nonzero().flatten()
        raise InputError(
            f"rows {rows[:5].tolist()} have no labeled token after the first: label the completion "
            f"with its token ids, and the rest with -100"
        )
    known = following[labeled]
    if not 0 <= int(known.min()) <= int(known.max()) < logits.shape[2]:
        raise InputError(
            f"labels must lie in [0, {logits.shape[2]}), the vocabulary, or be -100; got "
            f"{int(known.min())} to {int(known.max())}"
        )
    check_causal(outputs, batch, labels)
    # Only of the labeled tokens: float32 logits of a whole prompt are large.
    token_costs = functional.cross_entropy(logits[:, :-1][labeled].float(), known, reduction="none")
    row = labeled.nonzero()[:, 0]
    return token_costs.new_zeros(len(labels)).index_add(0, row, token_costs)


def _prompt_tuning_fix(logits: Tensor, labels: Tensor) -> str:
    if logits.dim() != 3 or labels.dim() != 2 or logits.shape[1] <= labels.shape[1]:
        return ""
    more = logits.shape[1] - labels.shape[1]
    return (
        f". If the model adds {more} virtual tokens before the text (prompt tuning), add {more} labels of "
        f"-100 in front"
    )
