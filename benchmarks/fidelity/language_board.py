"""Scores of language models, judged by retraining them without some of their text.

``python -m benchmarks.fidelity.language_board`` writes ``benchmarks/results/language.json``. Every problem of
:mod:`benchmarks.fidelity.language` has one attributed network, whose methods are judged by two truths, and
compared with two of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from turnover import evaluation

from . import language, language_magic
from . import language_methods as methods
from .language_methods import Attribution, Floats
from .peers import bergson_language

RESULTS = Path(__file__).parent.parent / "results" / "language.json"
REFERENCES = ("gram", "EK-FAC (kronfluence), with head", "EK-FAC (kronfluence)")
"""Rows that the others are compared with; a problem has one of the last two."""

Json = dict[str, Any]
Method = Callable[[Attribution], Floats]


def rows(kind: language.Kind) -> dict[str, Method]:
    """Every method of a problem, by its name."""
    headless = "" if kind.lora else ", without head"
    kronfluence: dict[str, Method] = {
        "EK-FAC (kronfluence), with head": methods.ekfac,
        "EK-FAC (kronfluence), without head": partial(methods.ekfac, head=False),
    }
    if kind.lora:  # whose head is not trained
        kronfluence = {"EK-FAC (kronfluence)": methods.ekfac}
    return {
        "gram": methods.gram,
        "gram, not whitened": partial(methods.gram, whiten=False),
        "gram, sampled labels": partial(methods.gram, samples=2),
        "turn-over": methods.turn_over,
        **kronfluence,
        f"EK-FAC (bergson){headless}": bergson_language.ekfac,
        f"EK-FAC + CG (bergson){headless}": partial(
            bergson_language.ekfac, conjugate_gradients=True
        ),
        f"TrackStar (bergson){headless}": bergson_language.trackstar,
        "TRAK, 3 networks": methods.trak,
        "metagradients (MAGIC)": language_magic.metagradients,
        "gradient product": methods.gradient_product,
        "gradient cosine": partial(methods.gradient_product, cosine=True),
        "BM25": methods.bm25,
        "shared words": methods.shared_words,
        "random": methods.anything,
    }


def judged(
    scores: Floats, truths: dict[str, tuple[evaluation.Subsets, Floats]]
) -> dict[str, evaluation.Correlation]:
    """The linear datamodeling score by every truth."""
    labels = np.zeros(scores.shape[1], dtype=np.int64)  # chunks have no classes
    return {
        name: evaluation.lds(scores, subsets, outputs, labels=labels).raw
        for name, (subsets, outputs) in truths.items()
    }


def difference(one: evaluation.Correlation, other: evaluation.Correlation) -> list[float]:
    """Difference of two methods, and its 95% interval over the same resamples of both."""
    low, high = np.quantile(one.resamples - other.resamples, [0.025, 0.975])
    return _rounded(one.mean - other.mean, low, high)


@dataclass(frozen=True)
class Outcome:
    """What became of a method.

    Attributes:
        scores: (targets, chunks); empty if it failed.
        seconds: with its own trainings, if any.
        error: why it failed, or nothing.
    """

    scores: Floats
    seconds: float
    error: str = ""

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, scores=self.scores, seconds=self.seconds, error=self.error)

    @classmethod
    def load(cls, path: Path) -> Outcome:
        with np.load(path, allow_pickle=False) as kept:
            return cls(kept["scores"], float(kept["seconds"]), str(kept["error"]))


def attempt(method: Method, given: Attribution) -> Outcome:
    """Run a method; one that fails does not stop the others."""
    start = time.perf_counter()
    try:
        scores = method(given)
        if not np.isfinite(scores).all():
            raise ValueError("scores are not finite")
    except Exception as error:  # noqa: BLE001
        return Outcome(np.empty((0, 0)), 0.0, f"{type(error).__name__}: {error}")
    return Outcome(scores, time.perf_counter() - start)


def outcomes(given: Attribution, only: Collection[str]) -> Iterator[tuple[str, Outcome]]:
    """Of every method; if some are named, what is kept of the others that ran before."""
    for row, method in rows(given.problem.kind).items():
        path = given.folder / "scores" / f"{row}.npz"
        if not only or row in only:
            outcome = attempt(method, given)
            outcome.save(path)
            print(f"{row}: {outcome.error or f'{outcome.seconds:.1f} s'}", flush=True)
            yield row, outcome
        elif path.exists():
            yield row, Outcome.load(path)


def board(name: str, folder: Path, data: Path | None, only: Collection[str] = ()) -> Json:
    """What every method of a problem reads, or why it failed, and its differences to two of them."""
    problem = language.Problem(name, folder, data)
    truths = problem.truths()
    given = Attribution(problem, problem.training(), folder)
    read: dict[str, dict[str, evaluation.Correlation]] = {}
    entries: Json = {}
    for row, outcome in outcomes(given, only):
        if outcome.error:
            entries[row] = {"error": outcome.error}
            continue
        read[row] = judged(outcome.scores, truths)
        figures = {truth: _rounded(v.mean, v.low, v.high) for truth, v in read[row].items()}
        entries[row] = {"seconds": round(outcome.seconds, 1), **figures}
    for row, found in read.items():
        entries[row]["minus"] = {
            other: {truth: difference(found[truth], read[other][truth]) for truth in truths}
            for other in REFERENCES
            if other in read and other != row
        }
    return {
        "title": problem.kind.title,
        "train": len(problem.train),
        "targets": len(problem.test),
        "truths": {
            truth: {
                "subsets": len(subsets.keep),
                "seeds": outputs.shape[1],
                "sha256": subsets.sha256,
            }
            for truth, (subsets, outputs) in truths.items()
        },
        "ceiling": round(next(iter(read.values()))["halves"].ceiling, 4),
        "methods": entries,
    }


def _rounded(*values: float) -> list[float]:
    return [round(float(value), 4) for value in values]


def main() -> None:
    """Run the board from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/language"))
    parser.add_argument("--data", type=Path, help="folder of the texts, or TURNOVER_DATA")
    parser.add_argument("--problems", default=",".join(language.KINDS), help="%(default)s")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        help="a row to run again; the others are as they were",
    )
    parser.add_argument("--write", type=Path, default=RESULTS)
    given = parser.parse_args()
    problems = given.problems.split(",")
    known = {row for kind in language.KINDS.values() for row in rows(kind)}
    for one, there in ((set(problems), set(language.KINDS)), (set(given.only), known)):
        if one - there:
            parser.error(f"there is no {min(one - there)!r}, but {', '.join(sorted(there))}")
    found = json.loads(given.write.read_text()) if given.write.exists() else {}
    for name in problems:
        print(name, flush=True)
        found[name] = board(name, given.folder / name, given.data, given.only)
        given.write.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
