"""Speed of masks, training and estimators on a CUDA GPU: prints it, writes ``benchmarks/results/gpu.json``.

Every ratio is of medians taken in turns in this process, beside the rate of torch's own matrix products.
Numbers of float32 are without TF32. The file is written anew after each part, so that a run that is
stopped keeps what it has measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import turnover
from turnover import Batch, Gram, Influence, MaskSpec, WideHead
from turnover.influence.forwards import Forwards
from turnover.influence.gram.capture import Capture, Rows
from turnover.influence.gram.factors import Factors, Outer, Tokens
from turnover.influence.gram.kernel import Block, block_of, gram_of, is_full
from turnover.influence.linear import LinearScorer
from turnover.influence.products import usable
from turnover.io.files import replacing
from turnover.objectives import logits_of, margin
from turnover.tasks.training import ordinary_dropout

Found = dict[str, Any]
ROOT = Path(__file__).parents[1]
CLASSES = 10
_MULTIPLE = 32


@dataclass(frozen=True)
class Sizes:
    """How much each part computes; the defaults are for a large card.

    Attributes:
        product: rows and columns of the matrix products that give the card's rates.
        rounds: turns of which medians are taken.
        steps: training steps in a turn.
        mask_rows: ids of which masks are made, of ``units`` units.
        units: mask units of the masks and of the linear estimator.
        step_rows: rows in a step of the perceptron, of ``width``.
        width: hidden units of that perceptron, and of the one of the exact estimator.
        linear_ids: ids that the linear estimator scores on ``linear_targets`` targets.
        block: ids in one of torch's products beside it.
        exact_ids: ids that the exact estimator scores on ``exact_targets`` targets.
        gram_rows: training instances of the perceptron that gram takes in.
        gram_width: its inputs and hidden units.
        texts: training instances of the BERT that gram takes in, of ``tokens`` tokens.
        text_rows: texts in a batch.
        bert: options of the BERT's config; the defaults are those of BERT-base.
    """

    product: int = 8192
    rounds: int = 5
    steps: int = 10
    mask_rows: int = 65_536
    units: int = 8192
    step_rows: int = 4096
    width: int = 4096
    linear_ids: int = 1_000_000
    linear_targets: int = 1000
    block: int = 65_536
    exact_ids: int = 8192
    exact_targets: int = 4
    gram_rows: int = 20_000
    gram_width: int = 1024
    texts: int = 2000
    tokens: int = 128
    text_rows: int = 32
    bert: tuple[tuple[str, int], ...] = ()


class Times:
    """Seconds of several functions, taken in turns after a first call of each."""

    def __init__(
        self, device: torch.device, rounds: int, **functions: Callable[[], object]
    ) -> None:
        self._seconds: dict[str, list[float]] = {name: [] for name in functions}
        for function in functions.values():
            function()
        for _ in range(rounds):
            for name, function in functions.items():
                self._seconds[name].append(seconds(function, device))

    def __getitem__(self, name: str) -> float:
        """The median."""
        return statistics.median(self._seconds[name])

    def ratio(self, name: str, other: str) -> float:
        """Median over the turns of how much longer the one took than the other."""
        both = zip(self._seconds[name], self._seconds[other], strict=True)
        return statistics.median(a / b for a, b in both)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Time of a function, until the device has finished."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    events[0].record()
    function()
    events[1].record()
    events[1].synchronize()
    return float(events[0].elapsed_time(events[1])) / 1000


def product(
    size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], object], int]:
    """A square matrix product, and its floating-point operations."""
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(one)
    return lambda: torch.mm(one, other, out=out), 2 * size**3


def masks(sizes: Sizes, device: torch.device) -> Found:
    """Masks as booleans, and packed as the linear estimator reads them, beside torch's random numbers."""
    ids, found = torch.arange(sizes.mask_rows, device=device), Found()
    shape = (sizes.mask_rows, sizes.units)
    written = torch.empty(shape, dtype=torch.bool, device=device)
    for keep in (0.5, 0.3):
        spec = MaskSpec(keep)

        def rand(keep: float = keep) -> Tensor:
            return torch.rand(shape, device=device) < keep

        times = Times(
            device,
            sizes.rounds,
            masks=partial(spec.exposed, ids, "site", sizes.units),
            packed=partial(spec.packed, ids, "site", sizes.units),
            rand=rand,
            write=lambda: written.fill_(True),
        )
        found[f"keep_{keep}"] = {
            "masks_per_s": sizes.mask_rows / times["masks"],
            "packed_per_s": sizes.mask_rows / times["packed"],
            "time_over_rand": times.ratio("masks", "rand"),
            "time_over_writing": times.ratio("masks", "write"),
        }
    return found


def perceptron(inputs: int, width: int, classes: int, dropout: type[nn.Module]) -> nn.Sequential:
    """Three hidden layers; dropout after the first and the third."""
    return nn.Sequential(
        *(nn.Linear(inputs, width), nn.ReLU(), dropout()),
        *(nn.Linear(width, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.ReLU(), dropout()),
        nn.Linear(width, classes),
    )


Step = Callable[[], object]


def steps_of(
    model: nn.Module,
    batch: Batch,
    count: int,
    within: Callable[[], AbstractContextManager[Any]],
    *,
    bfloat16: bool,
) -> Step:
    """Some training steps."""
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, weight_decay=0.0, fused=True)
    device, labels = trained[0].device.type, batch.labels
    assert labels is not None

    def run() -> None:
        for _ in range(count):
            with within(), torch.autocast(device, torch.bfloat16, enabled=bfloat16):
                logits = logits_of(batch.call(model)).float()
            optimizer.zero_grad()
            functional.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return run


def perceptron_step(sizes: Sizes, device: torch.device) -> Found:
    """Training steps of a perceptron under masks, beside the same with ``nn.Dropout``."""
    rows, width = sizes.step_rows, sizes.width
    batch = Batch(torch.randn(rows, 1024), torch.randint(CLASSES, (rows,))).to(device)
    ids = torch.arange(rows)
    plain = perceptron(1024, width, CLASSES, nn.Dropout).to(device)
    masked = perceptron(1024, width, CLASSES, nn.Identity).to(device)
    network = turnover.attach(masked, ["2", "7"])
    first, *others = (p.numel() for p in plain.parameters() if p.dim() == 2)
    flops = rows * (4 * first + 6 * sum(others))  # the inputs have no gradient
    return steps_compared(network, plain, batch, ids, flops, sizes)


def steps_compared(
    network: turnover.Network,
    plain: nn.Module,
    batch: Batch,
    ids: torch.Tensor,
    flops: int,
    sizes: Sizes,
) -> Found:
    """Training steps under masks beside those of a plain model, by type of number.

    Args:
        flops: operations of a step.
    """
    found, device = Found(), next(plain.parameters()).device
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        half = dtype == torch.bfloat16
        multiply, operations = product(sizes.product, device, dtype)
        times = Times(
            device,
            sizes.rounds,
            masked=steps_of(
                network.model, batch, sizes.steps, lambda: network.exposed(ids), bfloat16=half
            ),
            plain=steps_of(plain, batch, sizes.steps, nullcontext, bfloat16=half),
            product=multiply,
        )
        found[name] = {
            "step_s": times["masked"] / sizes.steps,
            "time_over_nn_dropout": times.ratio("masked", "plain"),
            "share_of_product_rate": (sizes.steps * flops / times["masked"])
            / (operations / times["product"]),
        }
    return found


def linear(sizes: Sizes, device: torch.device) -> Found:
    """Scores of many ids, masks included, beside torch's products of matrices of that shape."""
    ids, found = torch.arange(sizes.linear_ids, device=device), Found()
    coefficients = torch.randn(sizes.linear_targets, sizes.units, device=device)
    for keep in (0.5, 0.3):
        spec = MaskSpec(keep)
        draws = spec.draws(sizes.units)
        scorer = LinearScorer(coefficients, spec, {"site": sizes.units})
        kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        if device.type != "cuda" or usable(coefficients):
            kinds["int8"] = torch.int8
        beside = {
            name: products_of_codes(sizes, device, draws, kind) for name, kind in kinds.items()
        }
        times = Times(device, sizes.rounds, scores=partial(scorer.scores, ids), **beside)
        part = found[f"keep_{keep}"] = {
            "scores_s": times["scores"],
            "pairs_per_s": sizes.linear_ids * sizes.linear_targets / times["scores"],
            "products": [sizes.linear_targets, draws, sizes.linear_ids],
        }
        for name in beside:
            part[f"{name}_s"] = times[name]
            part[f"time_over_{name}"] = times.ratio("scores", name)
    return found


def products_of_codes(
    sizes: Sizes, device: torch.device, draws: int, dtype: torch.dtype
) -> Callable[[], object]:
    """Numbers (targets, draws) times codes of all ids, block by block; the codes are there already."""
    numbers = torch.randint(-127, 128, (sizes.linear_targets, draws), device=device).to(dtype)
    bits = torch.randint(2, (sizes.block, draws), dtype=torch.int8, device=device)
    codes = (2 * bits - 1).to(dtype)
    blocks, rest = divmod(sizes.linear_ids, sizes.block)
    if dtype == torch.int8:
        padded = functional.pad(numbers, (0, 0, 0, -len(numbers) % _MULTIPLE))

        def run() -> None:
            for _ in range(blocks + bool(rest)):
                torch._int_mm(padded, codes.T)

        return run
    out = torch.empty((sizes.linear_targets, sizes.block), device=device, dtype=dtype)

    def multiply() -> None:
        for _ in range(blocks):
            torch.mm(numbers, codes.T, out=out)
        if rest:
            torch.mm(numbers, codes[:rest].T)

    return multiply


def exact(sizes: Sizes, device: torch.device) -> Found:
    """Exact scores of a perceptron, beside the matrix products that they cannot do without."""
    width, count = sizes.width, min(sizes.exact_ids, 4096)
    model = perceptron(1024, width, CLASSES, nn.Identity).to(device).eval()
    network = turnover.attach(model, ["2", "7"])
    batch = Batch(
        torch.randn(sizes.exact_targets, 1024), torch.randint(CLASSES, (sizes.exact_targets,))
    ).to(device)
    ids = torch.arange(sizes.exact_ids, device=device)
    forwards = Forwards(network, margin)
    left, right = torch.randn(count, width, device=device), torch.randn(width, width, device=device)
    out = torch.empty(count, width, device=device)
    # The second layer for the exposed rows, from which the hidden ones follow; the third for both.
    repeats = 3 * sizes.exact_targets * sizes.exact_ids // count

    def products() -> None:
        for _ in range(repeats):
            torch.mm(left, right, out=out)

    times = Times(
        device, sizes.rounds, exact=lambda: forwards.scores([batch], ids), products=products
    )
    return {
        "pairs_per_s": sizes.exact_ids * sizes.exact_targets / times["exact"],
        "strategy": forwards.strategy,
        "time_over_products": times.ratio("exact", "products"),
        "products_flops_per_s": repeats * 2 * count * width**2 / times["products"],
    }


def gram_perceptron(sizes: Sizes, device: torch.device) -> Found:
    """Gram of a perceptron with one hidden layer."""
    width = sizes.gram_width
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES))
    step = min(1024, sizes.gram_rows)

    def batches(rows: int) -> Iterator[Batch]:
        for start in range(0, rows, step):
            count = min(step, rows - start)
            yield Batch(torch.randn(count, width), torch.randint(CLASSES, (count,)))

    return gram_of_model(model.to(device).eval(), batches, sizes.gram_rows, sizes, device)


def gram_bert(sizes: Sizes, device: torch.device) -> Found:
    """Gram of a BERT with LoRA and a wide head."""
    model = bert_with_lora(sizes).to(device).eval()
    return gram_of_model(model, lambda rows: texts(rows, sizes), sizes.texts, sizes, device)


def gram_of_model(
    model: nn.Module,
    batches: Callable[[int], Iterator[Batch]],
    rows: int,
    sizes: Sizes,
    device: torch.device,
) -> Found:
    """``fit`` as users call it, and its matrix products alone with all gradients on the device."""
    influence = Influence(model, method=Gram(directions=0))
    influence.fit(list(batches(8)))
    data = list(batches(rows))
    fit = seconds(lambda: influence.fit(data), device)
    influence = Influence(model, method=Gram(directions=0))  # forgets the gradients
    capture = Capture(model, margin, residuals=False)
    blocks: list[Block] = []
    pending: list[Rows] = []
    for batch in data:
        pending.append(capture.rows(batch, training=True))
        if is_full(pending):
            blocks.append(block_of(pending))
            pending = []
    if pending:
        blocks.append(block_of(pending))
    out = torch.empty((rows, rows), device=device)
    multiply, operations = product(sizes.product, device, torch.float32)
    times = Times(device, sizes.rounds, gram=lambda: gram_of(blocks, out), product=multiply)
    flops = sum(flops_of(one, other) for i, one in enumerate(blocks) for other in blocks[: i + 1])
    return {
        "rows": rows,
        "gradients_gib": sum(block.nbytes for block in blocks) / 2**30,
        "fit_s": fit,
        "fit_pairs_per_s": rows**2 / fit,
        "products_s": times["gram"],
        "products_pairs_per_s": rows**2 / times["gram"],
        "products_flops_per_s": flops / times["gram"],
        "float32_flops_per_s": operations / times["product"],
        "share_of_float32_rate": (flops / times["gram"]) / (operations / times["product"]),
    }


def flops_of(one: Block, other: Block) -> int:
    """Floating-point operations of the products of the factors of two blocks."""
    return sum(
        products_of_factors(left.factors, right.factors)
        for left in one.pieces
        for right in other.pieces
        if left.part == right.part
    )


def products_of_factors(one: Factors, other: Factors) -> int:
    """Those of one part of the network; where there are two ways, of the one with fewer."""
    pairs = 2 * len(one) * len(other)
    if isinstance(one, Outer) and isinstance(other, Outer):
        return pairs * (one.inputs.shape[1] + one.back.shape[1])
    if isinstance(one, Tokens) and isinstance(other, Tokens):
        tokens = one.inputs.shape[2] * other.inputs.shape[2] * one.inputs.shape[1]
        return pairs * min(tokens * (one.inputs.shape[3] + one.back.shape[3]), one.parameters)
    tables = [value for value in one.tensors().values() if value.dim() == 2]
    return pairs * tables[0].shape[1]


def bert_with_lora(sizes: Sizes) -> nn.Module:
    """A BERT of random weights, frozen, with LoRA and a wide head."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForSequenceClassification, BertConfig

    config = BertConfig(**dict(sizes.bert), num_labels=2)
    model: Any = AutoModelForSequenceClassification.from_config(config)
    model.requires_grad_(False)
    lora = LoraConfig(r=16, target_modules=["query", "value"], lora_dropout=0.0)
    inject_adapter_in_model(lora, model)
    model.classifier = WideHead(config.hidden_size, sizes.units, 2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros at the start, which would make other gradients zero
            nn.init.normal_(parameter, std=0.02)
    made: nn.Module = model
    return made


def texts(rows: int, sizes: Sizes) -> Iterator[Batch]:
    """Batches of random tokens; without an attention mask, as there is no padding."""
    for start in range(0, rows, sizes.text_rows):
        count = min(sizes.text_rows, rows - start)
        tokens = torch.randint(1, 100, (count, sizes.tokens))
        yield Batch({"input_ids": tokens}, torch.randint(2, (count,)))


def bert_step(sizes: Sizes, device: torch.device) -> Found:
    """Training steps of a BERT under masks, beside the same with ordinary dropout at the sites."""
    masked = bert_with_lora(sizes).to(device)
    plain = copy.deepcopy(masked)
    network = turnover.attach(masked, ["lora", "head"])
    (batch,) = texts(sizes.text_rows, sizes)
    batch, ids = batch.to(device), torch.arange(sizes.text_rows)
    # Forward, and backward to the inputs of every layer; the weights are frozen.
    layers = plain.get_submodule("bert.encoder").modules()
    weights = sum(m.weight.numel() for m in layers if isinstance(m, nn.Linear))
    flops = 4 * sizes.text_rows * sizes.tokens * weights
    with ordinary_dropout(plain, ["lora", "head"], 0.5):
        found = steps_compared(network, plain, batch, ids, flops, sizes)
    for one in found.values():
        one["tokens_per_s"] = sizes.text_rows * sizes.tokens / one["step_s"]
    return found


PARTS: dict[str, Callable[[Sizes, torch.device], Found]] = {
    "masks": masks,
    "perceptron_step": perceptron_step,
    "linear": linear,
    "exact": exact,
    "gram_perceptron": gram_perceptron,
    "bert_step": bert_step,
    "gram_bert": gram_bert,
}


def machine(device: torch.device) -> Found:
    """What the numbers were measured on."""
    on_card = device.type == "cuda"
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if on_card else "CPU",
        "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "commit": said_by("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"),
    }


def said_by(*command: str) -> str | None:
    """First line that a program prints, if it runs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def measure(names: Sequence[str], sizes: Sizes, device: torch.device, out: Path) -> Found:
    """Run some parts, and write the file after each."""
    found = machine(device)
    start = time.perf_counter()
    for name in names:
        torch.manual_seed(0)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        begin = time.perf_counter()
        try:
            part = PARTS[name](sizes, device)
        except (ImportError, torch.OutOfMemoryError) as error:
            part = {"skipped": str(error).strip().splitlines()[0]}
        if device.type == "cuda":
            part["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        part["part_s"] = time.perf_counter() - begin
        found[name], found["benchmark_s"] = part, time.perf_counter() - start
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as draft:
            draft.write_text(json.dumps(found, indent=2) + "\n")
        print(f"{name}:", flush=True)
        for line in lines(part):
            print(f"  {line}", flush=True)
    return found


def lines(part: Found, before: str = "") -> Iterator[str]:
    """The numbers of a part, one in a line."""
    for name, value in part.items():
        if isinstance(value, dict):
            yield from lines(value, f"{before}{name} ")
        else:
            yield f"{before + name:<40} {f'{value:.4g}' if isinstance(value, float) else value}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--write", type=Path, default=Path(__file__).parent / "results" / "gpu.json"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: torch sees no CUDA GPU", file=sys.stderr)
        sys.exit(2)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda", torch.cuda.current_device())
    found = measure(arguments.parts, Sizes(), device, arguments.write)
    print(f"{found['benchmark_s']:.0f} s in all on {found['device']}; {arguments.write}")


if __name__ == "__main__":
    main()
