"""Speed and memory of every estimator: prints tables, writes ``benchmarks/results/speed.json``.

Every ratio is of medians taken in turns in one process. The loop is the definition of turn-over
influence written down plainly: for each target and each batch of ids, two forwards. Each part runs in a
process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

import turnover
from turnover import Batch, Influence, MaskSpec, WideHead
from turnover.influence.engine import Engine, TargetBlock
from turnover.influence.protocol import Method
from turnover.objectives import margin

WIDTH, IDS, TARGETS, LOOP_BATCH = 768, 3000, 10, 100
BERT_TARGETS, BERT_TOP = 3, 10
MILLION, MILLION_TARGETS, MILLION_UNITS, MILLION_TOP = 1_000_000, 1_000, 8_192, 100
Found = dict[str, Any]


class Times:
    """Seconds of several functions, taken in turns so that a busy moment hits all alike."""

    def __init__(self, rounds: int, **functions: Callable[[], object]) -> None:
        self._seconds: dict[str, list[float]] = {name: [] for name in functions}
        for turn in range(rounds + 1):
            for name, function in functions.items():
                taken = seconds(function)
                if turn:  # the first is a warm-up
                    self._seconds[name].append(taken)

    def median(self, name: str) -> float:
        return statistics.median(self._seconds[name])

    def ratio(self, name: str, other: str) -> float:
        """Median over the turns of how much longer the one took than the other."""
        both = zip(self._seconds[name], self._seconds[other], strict=True)
        return statistics.median(a / b for a, b in both)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Perceptron(nn.Module):
    """784-768-768-768-10; masks go on the first and the third hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(784, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.third, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)
        self.act1, self.act2, self.act3 = nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act2(self.second(self.act1(self.first(x))))
        logits: Tensor = self.last(self.act3(self.third(hidden)))
        return logits


def cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the log-odds of the labelled class."""
    labelled = logits.gather(1, labels[:, None]).squeeze(1)
    return logits.scatter(1, labels[:, None], -torch.inf).logsumexp(dim=1) - labelled


@torch.no_grad()
def mlp_loop(model: Perceptron, spec: MaskSpec, batch: Batch, ids: Tensor, sites: str) -> Tensor:
    """The definition. ``sites``: which of the layers "13" are masked."""
    scores = torch.empty(len(batch), len(ids))
    assert batch.labels is not None
    for target in range(len(batch)):
        for start in range(0, len(ids), LOOP_BATCH):
            some = ids[start : start + LOOP_BATCH]
            x = batch.inputs[target].expand(len(some), -1)
            masks = {s: spec.exposed(some, f"act{s}", WIDTH) for s in sites}
            costs = []
            for hidden in (False, True):
                kept = {s: (~m if hidden else m) * 2.0 for s, m in masks.items()}
                h = functional.relu(model.first(x))
                h = h * kept["1"] if "1" in kept else h
                h = functional.relu(model.third(functional.relu(model.second(h))))
                h = h * kept["3"] if "3" in kept else h
                labels = batch.labels[target].expand(len(some))
                costs.append(cost(model.last(h), labels))
            scores[target, start : start + len(some)] = costs[1] - costs[0]
    return scores


def scored(method: Method, engine: Engine, batches: Sequence[Batch], ids: Tensor) -> Tensor:
    """Scores (targets, ids) by one network, without ghosts."""
    with engine.evaluating():
        block = TargetBlock([engine], batches)
        return method.estimator([engine], ghosts=10).scores(block, ids).mean


def mlp(_: argparse.Namespace) -> Found:
    torch.manual_seed(0)
    model = Perceptron().eval()
    network = turnover.attach(model, ["act1", "act3"])
    spec = network.spec
    ids = torch.arange(IDS)
    batch = Batch(torch.randn(TARGETS, 784), torch.randint(0, 10, (TARGETS,)))
    engine = Engine(network, margin, network.sites)
    head = Engine(network, margin, ["act3"])
    left, right = torch.randn(IDS, WIDTH), torch.randn(WIDTH, WIDTH)
    product = torch.empty(IDS, WIDTH)

    def loop() -> Tensor:
        return mlp_loop(model, spec, batch, ids, "13")

    def head_loop() -> Tensor:
        return mlp_loop(model, spec, batch, ids, "3")

    def exact() -> Tensor:
        return scored(turnover.Exact(), engine, [batch], ids)

    def linear() -> Tensor:
        return scored(turnover.Linear(), engine, [batch], ids)

    def head_exact() -> Tensor:
        return scored(turnover.Exact(), head, [batch], ids)

    def products() -> None:
        for _ in range(3 * TARGETS):
            torch.mm(left, right, out=product)

    def whole(method: str) -> Callable[[], object]:
        influence = Influence(network, margin, method)
        return lambda: influence.estimate([batch], ids).q

    expected = loop()
    assert torch.allclose(exact(), expected, rtol=1e-4, atol=1e-4), "exact is not the loop"
    assert torch.allclose(head_exact(), head_loop(), rtol=1e-4, atol=1e-4), "head is not the loop"
    ranks = np.mean([spearmanr(a, b).statistic for a, b in zip(linear(), expected, strict=True)])
    times = Times(
        11,
        loop=loop,
        products=products,
        exact=exact,
        head_loop=head_loop,
        linear=linear,
        head=head_exact,
        estimate=whole("linear"),
    )
    flops = 2 * IDS * TARGETS * WIDTH * WIDTH
    found = {
        "loop_s": times.median("loop"),
        "loop_gemm_share": times.ratio("products", "loop") * 2 * (784 / WIDTH + 2) / 3,
        "gemm_gflops": 3 * flops / times.median("products") / 1e9,
        "exact_s": times.median("exact"),
        "exact_vs_loop": times.ratio("loop", "exact"),
        "exact_vs_gemm": times.ratio("products", "exact"),
        "exact_max_error": float((exact() - expected).abs().max()),
        "linear_s": times.median("linear"),
        "linear_vs_loop": times.ratio("loop", "linear"),
        "linear_spearman": float(ranks),
        "head_s": times.median("head"),
        "head_vs_loop": times.ratio("head_loop", "head"),
        "estimate_linear_s": times.median("estimate"),
        "estimate_linear_vs_loop": times.ratio("loop", "estimate"),
    }
    pairs = IDS * TARGETS
    print(f"{IDS} ids x {TARGETS} targets, MLP 784-{WIDTH}-{WIDTH}-{WIDTH}-10")
    for name, key, ratio in (
        ("loop of two forwards", "loop", 1.0),
        ("exact", "exact", found["exact_vs_loop"]),
        ("linear", "linear", found["linear_vs_loop"]),
        ("masks on the last layer: loop", "head_loop", 1.0),
        ("masks on the last layer: exact", "head", found["head_vs_loop"]),
        ("linear with 1000 ghosts, z and q", "estimate", found["estimate_linear_vs_loop"]),
    ):
        taken = times.median(key)
        print(f"  {name:<40} {taken:8.4f} s {pairs / taken:12,.0f} pairs/s {ratio:7.1f} x")
    print(f"  loop at {found['loop_gemm_share']:.0%} of the matrix-product rate of", end=" ")
    print(f"{found['gemm_gflops']:.0f} GFLOP/s, exact at {found['exact_vs_gemm']:.0%}; ", end="")
    print(f"linear ranks like the loop: Spearman {ranks:.3f}")
    return found


def demo_run(folder: Path) -> Any:
    """The demo's trained network; fitted anew, without the comparison, where there is none."""
    from turnover.data.demo import model_folder, write_sentences
    from turnover.models.text import ClassifierConfig
    from turnover.runs.run import Run
    from turnover.tasks.fit import FitConfig, fit
    from turnover.tasks.training import TrainingConfig

    if not (folder / "masks.json").is_file():
        folder = folder.with_name("speed")
    if not (folder / "masks.json").is_file():
        from turnover.data.base import Columns
        from turnover.data.text import read

        columns = Columns("text", "label", "id", None)
        train, test = write_sentences(folder.with_name(f"{folder.name}-data"))
        rows = read(str(train), columns)
        config = FitConfig(
            ClassifierConfig(str(model_folder()), 32768, 16, 128),
            TrainingConfig(3, 32, 1e-3, 5e-5, 0),
            compare=False,
        )
        test_rows = read(str(test), columns, classes=rows.classes)
        fit(config, rows, test_rows, folder)
    return Run.load(folder)


def bert(arguments: argparse.Namespace) -> Found:
    from turnover.tasks.training import evaluate

    run = demo_run(arguments.run)
    network = run.network
    test = run.encode(run.test)
    predictions = evaluate(run.model, test, range(len(test)), lambda _: network.mean())
    wrong = [row for row in range(len(test)) if not predictions.correct[row]]
    order = torch.randperm(len(wrong), generator=torch.Generator().manual_seed(0)).tolist()
    targets = [test.batch([wrong[index]]) for index in order[:BERT_TARGETS]]
    ids = torch.unique(run.train.ids)
    some = ids[:LOOP_BATCH]

    @torch.no_grad()
    def loop() -> Tensor:
        run.model.eval()
        rows = []
        for target in targets:
            parts = []
            for start in range(0, len(some), LOOP_BATCH):
                batch_ids = some[start : start + LOOP_BATCH]
                repeated = target.expanded(len(batch_ids))
                costs = []
                for context in (network.exposed, network.hidden):
                    with context(batch_ids):
                        costs.append(margin(repeated.call(run.model), repeated))
                parts.append(costs[1] - costs[0])
            rows.append(torch.cat(parts))
        return torch.stack(rows)

    engine = Engine(network, margin, network.sites)

    def exact_of_some() -> Tensor:
        return scored(turnover.Exact(), engine, targets, some)

    assert torch.allclose(loop(), exact_of_some(), rtol=1e-4, atol=1e-4), "exact is not the loop"
    times = Times(2, loop=loop, exact=exact_of_some)
    settings: Found = {"ghosts": 100, "progress": True}
    start = time.perf_counter()
    exact = Influence(network, margin, "exact", **settings).estimate(targets, ids)
    exact_s = time.perf_counter() - start
    linear = Influence(network, margin, "linear").estimate(targets, ids)
    start = time.perf_counter()
    reranked = Influence(network, margin, "rerank", **settings).estimate(targets, ids, top=BERT_TOP)
    rerank_s = time.perf_counter() - start
    assert reranked.recall is not None
    hits = 0
    for row in range(BERT_TARGETS):
        ranked = exact.train_ids[np.argsort(-exact.scores[row])]
        ends = set(ranked[:BERT_TOP]) | set(ranked[-BERT_TOP:])
        hits += len(ends & set(reranked.train_ids[row]))
    found = {
        "bert_linear_spearman": float(
            np.mean(
                [
                    spearmanr(a, b).statistic
                    for a, b in zip(linear.scores, exact.scores, strict=True)
                ]
            )
        ),
        "bert_exact_vs_loop": times.ratio("loop", "exact"),
        "bert_exact_s": exact_s,
        "bert_pairs_exact": exact.scores.size,
        "bert_linear_vs_exact_s": exact_s
        / seconds(lambda: Influence(network, margin, "linear").estimate(targets, ids)),
        "rerank_recall": hits / (2 * BERT_TOP * BERT_TARGETS),
        "rerank_recall_estimated": float(np.mean(reranked.recall)),
        "rerank_cost": rerank_s / exact_s,
        "bert_sites": len(network.sites),
        "bert_mask_units": network.mask_units,
    }
    print(f"BERT, {len(network.sites)} sites, {network.mask_units} mask units, {len(ids)} ids")
    print("\n".join(f"  {key:<26} {value:10.4f}" for key, value in found.items()))
    return found


class Wide(nn.Module):
    """A stand-in for any network with 8,192 mask units."""

    def __init__(self) -> None:
        super().__init__()
        self.head = WideHead(64, MILLION_UNITS, 10, gain=1.0)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x)
        return logits


def wide(targets: int) -> tuple[turnover.Network, list[Batch]]:
    torch.manual_seed(0)
    network = turnover.attach(Wide().eval(), "head")
    inputs, labels = torch.randn(targets, 64), torch.randint(0, 10, (targets,))
    return network, [
        Batch(x, y) for x, y in zip(torch.split(inputs, 100), torch.split(labels, 100), strict=True)
    ]


def million(_: argparse.Namespace) -> Found:
    table = []
    sizes = [(MILLION // 4, 1000), (MILLION // 2, 1000), (MILLION, 250), (MILLION, 500)]
    for count, targets in [*sizes, (MILLION, MILLION_TARGETS)]:
        network, batches = wide(targets)
        influence, ids = Influence(network), torch.arange(count)
        aggregate_s = seconds(partial(influence.aggregate, batches, ids))
        top_s = seconds(partial(influence.estimate, batches, ids, top=MILLION_TOP))
        row = {"ids": count, "targets": targets, "aggregate_s": aggregate_s, "topk_s": top_s}
        table.append(row)
        print(
            f"  {count:>9,} ids x {targets:>5,} targets: aggregate {aggregate_s:6.2f} s, "
            f"top {MILLION_TOP} {top_s:6.2f} s, peak {peak_gib():.2f} GiB",
            flush=True,
        )
    return {
        "million_aggregate_s": table[-1]["aggregate_s"],
        "million_topk_s": table[-1]["topk_s"],
        "million_peak_gib": peak_gib(),
        "million_table": table,
    }


def memory_of_one(arguments: argparse.Namespace) -> Found:
    """Peak of one estimate in this process."""
    network, batches = wide(256)
    ids = torch.arange(arguments.ids)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.kind == "store":
            Influence(network).estimate(batches, ids, out=Path(folder) / "scores.zarr")
        else:
            Influence(network).estimate(batches, ids, top=MILLION_TOP)
    return {"peak_gib": peak_gib()}


def memory(arguments: argparse.Namespace) -> Found:
    table = []
    for kind in ("store", "top"):
        for count in (50_000, 100_000, 200_000):
            found = in_a_process("memory-of-one", arguments, f"--ids={count}", f"--kind={kind}")
            table.append({"kind": kind, "ids": count, "targets": 256} | found)
            print(f"  {kind:<6} {count:>9,} ids x 256 targets: peak {found['peak_gib']:.2f} GiB")
    return {"memory_table": table}


def training(arguments: argparse.Namespace) -> Found:
    """One optimiser step with masks beside one with ordinary dropout at the same sites."""
    from turnover.data.demo import model_folder
    from turnover.models.text import SITES, ClassifierConfig, build_classifier
    from turnover.tasks.training import ordinary_dropout

    del arguments
    torch.manual_seed(0)
    ids = torch.arange(100)
    x, y = torch.randn(100, 784), torch.randint(0, 10, (100,))
    plain, masked = Perceptron(), Perceptron()
    network = turnover.attach(masked, ["act1", "act3"])
    step = optimiser_step
    with ordinary_dropout(plain, ["act1", "act3"], 0.5):
        first, second = step(plain, lambda: plain(x), y), step(masked, lambda: masked(x), y)

        def with_masks() -> None:
            with network.exposed(ids):
                second()

        times = Times(100, dropout=first, masks=with_masks)
    overhead = {"mlp": times.ratio("masks", "dropout")}
    config = ClassifierConfig(str(model_folder()), 8192, 16, 128)
    plain_bert, tokenizer = build_classifier(config, 2)
    masked_bert, _ = build_classifier(config, 2)
    bert_network = turnover.attach(masked_bert, SITES)
    texts = [" ".join(["a film that is better than its title"] * 3)] * 32
    tokens = dict(tokenizer(texts, return_tensors="pt"))
    labels = torch.arange(32) % 2
    with ordinary_dropout(plain_bert, SITES, 0.5):
        first = step(plain_bert, lambda: plain_bert(**tokens), labels)
        second = step(masked_bert, lambda: masked_bert(**tokens), labels)

        def bert_with_masks() -> None:
            with bert_network.exposed(ids[:32]):
                second()

        times = Times(30, dropout=first, masks=bert_with_masks)
    overhead["bert"] = times.ratio("masks", "dropout")
    print(f"  a step with masks / with nn.Dropout: MLP {overhead['mlp']:.3f}", end="")
    print(f", BERT {overhead['bert']:.3f}")
    return {"train_overhead": max(overhead.values()), "train_overhead_by_model": overhead}


def optimiser_step(
    model: nn.Module, forward: Callable[[], Tensor], labels: Tensor
) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(forward(), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


PARTS: dict[str, Callable[[argparse.Namespace], Found]] = {
    "mlp": mlp,
    "training": training,
    "million": million,
    "memory": memory,
    "bert": bert,
}


def in_a_process(part: str, arguments: argparse.Namespace, *more: str) -> Found:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, f"--part={part}", f"--write={file.name}"]
        subprocess.run([*command, f"--run={arguments.run}", *more], check=True)
        found: Found = json.loads(Path(file.name).read_text())
    return found


def machine() -> Iterator[tuple[str, Any]]:
    yield "date", date.today().isoformat()
    yield "torch", torch.__version__
    yield "threads", torch.get_num_threads()
    yield "machine", platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", help="one part, in this process")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="the demo's network")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--ids", type=int)
    parser.add_argument("--kind", choices=("store", "top"))
    arguments = parser.parse_args()
    if arguments.part:
        part = (PARTS | {"memory-of-one": memory_of_one})[arguments.part]
        arguments.write.write_text(json.dumps(part(arguments)))
        return
    start = time.perf_counter()
    found: Found = dict(machine())
    for name in arguments.parts.split(","):
        print(f"{name}:", flush=True)
        found |= in_a_process(name, arguments)
    found["benchmark_s"] = time.perf_counter() - start
    out = arguments.write or Path(__file__).parent / "results" / "speed.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{found['benchmark_s']:.0f} s in all; {out}")


if __name__ == "__main__":
    main()
