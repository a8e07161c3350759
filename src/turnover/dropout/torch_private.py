"""The private names of torch that masks and their audit depend on, looked up before anything runs."""

from __future__ import annotations

from functools import cache
from operator import attrgetter

import torch

from turnover.errors import InputError

NAMES = (
    "autograd._get_sequence_nr",
    "_C._current_autograd_node",
    "_C._current_graph_task_id",
    "nn.modules.batchnorm._BatchNorm",
    "nn.modules.conv._ConvNd",
    "nn.modules.dropout._DropoutNd",
)
_OF_NODES = "_sequence_nr"


@cache
def check_torch() -> None:
    """Whether this torch has them.

    Raises:
        InputError: one is missing; it is named.
    """
    missing = [name for name in NAMES if not _has(name)]
    node = torch.ones((), requires_grad=True).clone().grad_fn
    if not hasattr(node, _OF_NODES):
        missing.append(f"autograd.graph.Node.{_OF_NODES}")
    if missing:
        raise InputError(
            f"torch {torch.__version__} has no torch.{missing[0]}, which turn-over dropout needs: pip "
            f"install 'torch>=2.6,<3', or a newer turnover"
        )


def _has(name: str) -> bool:
    try:
        attrgetter(name)(torch)
    except AttributeError:
        return False
    return True
