"""Which training instances made this network predict that, and what would change without them?

Influence of training instances by turn-over dropout (Kobayashi et al. 2020, arXiv 2012.04207), with
the noise floor of every number.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from turnover import fairness, objectives
from turnover.batches import Batch, WithIds
from turnover.dropout.blocks import Blocks
from turnover.dropout.head import WideHead
from turnover.dropout.hidden import HiddenPredictions, hidden_predictions
from turnover.dropout.masks import MaskSpec
from turnover.dropout.network import Network, attach
from turnover.dropout.sites import Site
from turnover.errors import BindingError, InputError
from turnover.ids import content_ids, ghost_ids, string_ids
from turnover.influence.auto import Auto
from turnover.influence.estimator import Influence
from turnover.influence.exact import Exact
from turnover.influence.gram import Gram
from turnover.influence.linear import Linear
from turnover.influence.rerank import Rerank
from turnover.labels import LabelErrors, label_errors
from turnover.results.reader import open_result
from turnover.results.result import Result

if TYPE_CHECKING:
    from turnover.tasks.attribute import attribute

__version__ = "0.1.0"

__all__ = [
    "Auto",
    "Batch",
    "BindingError",
    "Blocks",
    "Exact",
    "Gram",
    "HiddenPredictions",
    "Influence",
    "InputError",
    "LabelErrors",
    "Linear",
    "MaskSpec",
    "Network",
    "Rerank",
    "Result",
    "Site",
    "WideHead",
    "WithIds",
    "attach",
    "attribute",
    "content_ids",
    "fairness",
    "ghost_ids",
    "hidden_predictions",
    "label_errors",
    "objectives",
    "open_result",
    "string_ids",
]


def __getattr__(name: str) -> Any:
    if (
        name == "attribute"
    ):  # reads files and models, which scoring a network in memory does not need
        return importlib.import_module("turnover.tasks.attribute").attribute
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
