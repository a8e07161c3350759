"""Runs in the environment that has pyDVL: method, layers, what is asked, file to read, file to write."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from pydvl.influence import InfluenceMode
from pydvl.influence.torch import EkfacInfluence, NystroemSketchInfluence
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

_RANK = 50
_REGULARISATION = 1e-2


def layer(name: str, *sizes: Any) -> nn.Module:
    made: nn.Module = getattr(nn, name)(*sizes)
    return made


def main() -> None:
    method, layers, asked, given, made = sys.argv[1:]
    torch.manual_seed(0)
    data = load_file(given)
    model = nn.Sequential(*(layer(*one) for one in json.loads(layers)))
    weights = {k.removeprefix("model."): v for k, v in data.items() if k.startswith("model.")}
    model.load_state_dict(weights)
    model.eval()
    x, y, test_x, test_y = (data[k] for k in ("train_x", "train_y", "test_x", "test_y"))
    start = time.perf_counter()
    influence: Any
    if method == "nystroem":
        influence = NystroemSketchInfluence(
            model, nn.functional.cross_entropy, regularization=_REGULARISATION, rank=_RANK
        )
    else:
        influence = EkfacInfluence(
            model, update_diagonal=True, hessian_regularization=_REGULARISATION
        )
    influence = influence.fit(DataLoader(TensorDataset(x, y), batch_size=250))
    fitted = time.perf_counter()
    if method == "nystroem":  # eigenvectors and eigenvalues
        numbers = (sum(p.numel() for p in model.parameters()) + 1) * _RANK
    else:
        kept = influence.ekfac_representation
        numbers = sum(
            one.numel() for part in (kept.evecs_a, kept.evecs_g, kept.diags) for one in part
        )
    parts = [
        influence.influences(test_x, test_y, *part, mode=InfluenceMode.Up).detach()
        for part in zip(x.split(500), y.split(500), strict=True)
    ]
    scored = time.perf_counter()
    found = {
        "scores": torch.cat(parts, dim=1).float().contiguous(),
        "seconds": torch.tensor([fitted - start, scored - fitted]),
        "stored": torch.tensor(4 * numbers),
    }
    if asked == "pairs and self":
        own = [
            influence.influences(*part, *part, mode=InfluenceMode.Up).detach().diagonal().clone()
            for part in zip(x.split(250), y.split(250), strict=True)
        ]
        found["own"] = torch.cat(own).float().contiguous()
    save_file(found, made)


if __name__ == "__main__":
    main()
