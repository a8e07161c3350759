"""What turn-over dropout takes from torch's private names, and what is said where one is missing."""

from __future__ import annotations

import pytest
import torch

import turnover
from turnover import InputError
from turnover.dropout import torch_private


def test_autograd_numbers_its_nodes_in_order_and_tells_the_one_that_runs() -> None:
    x = torch.ones(3, requires_grad=True)
    first = torch.autograd._get_sequence_nr()
    y = x * 2
    assert y.grad_fn._sequence_nr() == first
    assert torch.autograd._get_sequence_nr() == first + 1
    assert torch._C._current_graph_task_id() == -1
    seen = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, given):
            return given.clone()

        @staticmethod
        def backward(ctx, gradient):
            node = torch._C._current_autograd_node()
            seen.append((node._sequence_nr(), torch._C._current_graph_task_id()))
            return gradient

    noted = Noted.apply(y)
    noted.sum().backward()
    ((number, task),) = seen
    assert number == noted.grad_fn._sequence_nr()
    assert task != -1


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch.autograd, "_get_sequence_nr"),
        (torch._C, "_current_autograd_node"),
        (torch._C, "_current_graph_task_id"),
        (torch.nn.modules.dropout, "_DropoutNd"),
    ],
)
def test_a_torch_without_one_is_refused_before_anything_is_masked(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    torch_private.check_torch.cache_clear()
    with monkeypatch.context() as patch:
        patch.delattr(owner, name)
        with pytest.raises(InputError, match=rf"torch \S+ has no torch\.\S*{name}.*torch>=2.6,<3"):
            turnover.attach(torch.nn.Sequential(torch.nn.Linear(2, 2)), "0")
    turnover.attach(torch.nn.Sequential(torch.nn.Linear(2, 2)), "0")
