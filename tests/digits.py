"""Handwritten digits with a tenth of the labels wrong, and networks trained on them."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import turnover

ROWS, TESTS, UNITS = 240, 40, 1024


@dataclass(frozen=True)
class Digits:
    """Training rows, which of their labels are wrong, and test rows."""

    x: Tensor
    y: Tensor
    wrong: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def train(self) -> TensorDataset:
        return TensorDataset(self.x, self.y)

    @property
    def test(self) -> TensorDataset:
        return TensorDataset(self.test_x, self.test_y)


def load() -> Digits:
    datasets = pytest.importorskip("sklearn.datasets", reason="pip install scikit-learn")
    x, right = datasets.load_digits(return_X_y=True)
    x, right = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(right)
    wrong = torch.arange(ROWS) % 10 == 3
    y = torch.where(wrong, (right[:ROWS] + 1 + torch.arange(ROWS) % 9) % 10, right[:ROWS])
    rest = slice(ROWS, ROWS + TESTS)
    return Digits(x[:ROWS], y, wrong, x[rest], right[rest])


def plain(digits: Digits) -> nn.Module:
    """A network trained without masks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    _fit(model, digits, None, None)
    return model


def masked(digits: Digits, ids: Tensor) -> turnover.Network:
    """A network trained under masks of the ids."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, UNITS), nn.ReLU(), nn.Linear(UNITS, 10, bias=False))
    network = turnover.attach(model, ["mlp"], turnover.MaskSpec(seed=0))
    _fit(model, digits, network, ids)
    return network


def _fit(
    model: nn.Module, digits: Digits, network: turnover.Network | None, ids: Tensor | None
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(80):
        if network is None or ids is None:
            loss = nn.functional.cross_entropy(model(digits.x), digits.y)
        else:
            with network.exposed(ids):
                loss = nn.functional.cross_entropy(model(digits.x), digits.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def loader(data: TensorDataset, **options: object) -> DataLoader:
    return DataLoader(data, batch_size=64, **options)


def shown(package: str, digits: Digits) -> dict[str, object]:
    """Runs the example of ``docs/integrations.md``; what it leaves behind."""
    page = (Path(__file__).parent.parent / "docs" / "integrations.md").read_text()
    found = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    code = next(one for one in found if f"turnover.integrations.{package}" in one)
    ids = torch.arange(ROWS)
    names: dict[str, object] = {
        "torch": torch,
        "turnover": turnover,
        "x": digits.x,
        "y": digits.y,
        "ids": ids,
        "x_test": digits.test_x,
        "y_test": digits.test_y,
        "model": plain(digits),
        "net": masked(digits, ids),
        "train_batches": [(digits.x, digits.y, ids)],
        "held_out_batches": [(digits.test_x, digits.test_y)],
    }
    exec(compile(code, f"docs/integrations.md, {package}", "exec"), names)
    return names
