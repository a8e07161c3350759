"""Gram by landmarks: what is kept of exact gram, and a million instances.

Writes ``benchmarks/results/gram_scale.json``. The method was chosen on problems A, B and D
(docs/fidelity.md). Sizes run in processes of their own, so that their peak memory is their own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.fidelity import problems
from benchmarks.fidelity.board import machine
from turnover import Gram, Influence, evaluation
from turnover.batches.loaders import Numbers

RESULTS = Path(__file__).parent / "results" / "gram_scale.json"
SIZES, LANDMARKS, TARGETS, TOP = (62_500, 250_000, 1_000_000), 1000, 1000, 100
FEATURES, HIDDEN, BATCH, DRAWN = 384, 256, 1000, 8
KEPT = 20
Json = dict[str, Any]
Scores = NDArray[np.float32]


def agreement(name: str, data: Path | None) -> Json:
    """How much of exact gram's scores of one network is kept, by landmarks and by random projection."""
    problem = problems.load(name, data)
    train, test = problem.train, problem.test
    trained = evaluation.train(problem.standard, train.x, train.y, problem.recipe, [0])
    model = problem.standard(0)
    model.load_state_dict(trained.states[0])
    batches, targets = _cut(train.x, train.y), _cut(test.x, test.y)
    exact = Influence(model, method="gram").fit(batches)
    truth = exact.estimate(targets).scores
    own = exact.self_influence().scores
    labels, rows = train.y.numpy(), {}
    for count in (max(200, len(train) // 10), len(train) // 4):
        for way, options in (
            ("landmarks", Gram(landmarks=count)),
            ("exact cross products", Gram(landmarks=count, exact=True)),
        ):
            found = Influence(model, method=options).fit(batches)
            scores, mine = found.estimate(targets).scores, found.self_influence().scores
            top = found.estimate(targets, top=KEPT).train_ids
            rows[f"{way}, {count}"] = _kept(scores, truth, labels) | {
                "self": float(np.corrcoef(mine, own)[0, 1]),
                "top": _shared(top, _ends(truth)),
            }
        # float16 vectors of as many bytes: as many dimensions as landmarks have gradients.
        scores = _projected(exact, model, targets, count)
        kept = _shared(_ends(scores), _ends(truth))
        rows[f"random projection, {count}"] = _kept(scores, truth, labels) | {"top": kept}
    return {"instances": len(train), "targets": len(test), "rows": rows}


def _cut(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    ids = torch.arange(len(y))
    return list(zip(*(torch.split(one, 200) for one in (x, y, ids)), strict=True))


def _kept(scores: Scores, truth: Scores, labels: NDArray[np.int64]) -> Json:
    """Correlation with the truth, mean over targets; also of what differs within classes."""

    def within(values: Scores) -> Scores:
        values = values.copy()
        for label in np.unique(labels):
            values[:, labels == label] -= values[:, labels == label].mean(axis=1, keepdims=True)
        return values

    return {
        "correlation": _correlation(scores, truth),
        "within classes": _correlation(within(scores), within(truth)),
    }


def _correlation(one: Scores, other: Scores) -> float:
    found = [np.corrcoef(a, b)[0, 1] for a, b in zip(one, other, strict=True)]
    return float(np.mean(found))


def _ends(scores: Scores) -> NDArray[np.int64]:
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.concatenate([order[:, :KEPT], order[:, -KEPT:]], axis=1)


def _shared(found: NDArray[np.int64], wanted: NDArray[np.int64]) -> float:
    """Share of the strongest instances of the truth that are among those found."""
    pairs = zip(found, wanted, strict=True)
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs]))


def _projected(exact: Influence, model: nn.Module, targets: list[Any], count: int) -> Scores:
    """Scores by inner products of randomly projected gradients.

    Projections of gradients with inner products ``K`` are distributed as ``K^(1/2)`` times normal numbers.
    """
    driver: Any = exact._driver
    fitted = driver._fitted[0]
    crosses = torch.cat([one for _, (one,) in driver._targets(targets, Numbers.ROWS)])
    others = Influence(model, method=Gram(directions=0)).fit(targets)
    driver = others._driver
    theirs = driver._fitted[0].k.double()
    joint = torch.cat(
        [
            torch.cat([fitted.k.double(), crosses.T.double()], 1),
            torch.cat([crosses.double(), theirs], 1),
        ]
    )
    values, vectors = torch.linalg.eigh(joint)
    generator = torch.Generator().manual_seed(0)
    size = count * fitted.weights.shape[1]
    normal = torch.randn((len(joint), size), generator=generator, dtype=torch.float64) / size**0.5
    made = (vectors * values.clamp_min(0).sqrt()) @ (vectors.T @ normal)
    own, target = made.tensor_split([len(fitted.k)])
    system = own.T @ own
    system.diagonal().add_(fitted.ridge)
    solved = torch.linalg.solve(system, own.T).T
    scores = (target @ solved.T).view(len(target), *fitted.weights.shape)
    found: Scores = (
        ((scores * fitted.weights.double()).sum(dim=2) * fitted.factor.double()).float().numpy()
    )
    return found


class Drawn:
    """Batches of made features, drawn anew in each pass; labels are a noisy function of them."""

    def __init__(self, rows: int, seed: int, ids: int = 0) -> None:
        self._rows, self._seed, self._ids = rows, seed, ids
        self._rule = torch.randn((FEATURES, DRAWN), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return -(-self._rows // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for start in range(0, self._rows, BATCH):
            count = min(BATCH, self._rows - start)
            generator = torch.Generator().manual_seed(self._seed + start)
            x = 4 * functional.normalize(torch.randn((count, FEATURES), generator=generator), dim=1)
            noise = torch.randn(count, generator=generator)
            y = ((x @ self._rule).tanh().sum(dim=1) + noise > 0).long()
            yield x, y, torch.arange(start, start + count)


def measured(rows: int) -> Json:
    """Seconds and peak memory of one size, in this process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for x, y, _ in Drawn(60_000, seed=2**40):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    start = time.perf_counter()
    influence = Influence(model.eval(), method=Gram(landmarks=LANDMARKS)).fit(Drawn(rows, seed=1))
    fitted = time.perf_counter() - start
    start = time.perf_counter()
    found = influence.estimate(Drawn(TARGETS, seed=2**41), top=TOP)
    assert found.scores.shape == (TARGETS, 2 * TOP)
    return {
        "fit_s": fitted,
        "top_s": time.perf_counter() - start,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def sizes() -> Json:
    """Seconds and peak memory by number of instances."""
    found = {}
    for rows in SIZES:
        command = [sys.executable, "-m", "benchmarks.gram_scale", "--rows", str(rows)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[str(rows)] = json.loads(said)
        print(f"{rows:,} instances, {LANDMARKS} landmarks: {found[str(rows)]}", flush=True)
    last = found[str(SIZES[-1])]
    named = {f"million_{name}": value for name, value in last.items()}
    return {"landmarks": LANDMARKS, "targets": TARGETS, "top": TOP, "sizes": found} | named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=["kept", "sizes"], choices=["kept", "sizes"])
    parser.add_argument("--problems", nargs="*", default=list("ABCDE"))
    parser.add_argument("--rows", type=int, help="measure one size, in this process")
    parser.add_argument("--data", type=Path, help="cifar10_10k_2k.npz, or its folder, for E")
    options = parser.parse_args()
    if options.rows is not None:
        print(json.dumps(measured(options.rows)))
        return
    known: Json = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known["machine"] = machine()
    if "kept" in options.parts:
        for name in options.problems:
            found = agreement(name, options.data)
            known.setdefault("kept", {})[name] = found
            for row, values in found["rows"].items():
                shown = ", ".join(f"{key} {value:.3f}" for key, value in values.items())
                print(f"{name} {row}: {shown}", flush=True)
    if "sizes" in options.parts:
        known["million"] = sizes()
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
