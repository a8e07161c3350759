"""Scores of ``turnover attribute`` on a BERT that plain code fine-tuned, judged by retraining with that code.

``python -m benchmarks.fidelity.finetuned`` writes ``benchmarks/results/finetuned.json``. A BERT
(:mod:`benchmarks.fidelity.plain_bert`), with LoRA (``adapter``) or without (``whole``), is trained on 300
movie-review sentences, and again on 40 halves of them, twice each with other seeds; 100 other sentences are
the targets.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import turnover
from turnover import InputError, evaluation
from turnover.data import demo
from turnover.io.files import write_csv
from turnover.io.parsing import read_json

from . import features, plain_bert
from .peers import kronfluence_

RESULTS = Path(__file__).parent.parent / "results" / "finetuned.json"
_TRAIN, _TARGETS, _SUBSETS = 300, 100, 40
_TRUTH_SEEDS = (1000, 1001)
_ROWS = 50
_LAYERS = ("head", "*layer.5.attention*", "*layer.[45].*")

Floats = NDArray[np.floating[Any]]


class Problem:
    """Sentences, the fine-tuned BERT that is attributed, and folders of files.

    Args:
        kind: ``"adapter"`` or ``"whole"``.
        folder: keeps what was trained.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        texts, labels = features.sentences()
        order = np.random.default_rng(0).permutation(len(labels))
        self.kind, self.folder = kind, folder
        self.train, self.test = order[:_TRAIN], order[_TRAIN : _TRAIN + _TARGETS]
        self.texts = {
            "train": [texts[i] for i in self.train],
            "test": [texts[i] for i in self.test],
        }
        self.labels = {"train": labels[self.train], "test": labels[self.test]}
        self.subsets = evaluation.draw_subsets(_TRAIN, _SUBSETS)
        folder.mkdir(parents=True, exist_ok=True)

    def fine_tuned(self, rows: list[int], seed: int) -> tuple[Any, Any]:
        """The BERT, fine-tuned on some training rows, and its tokenizer."""
        texts = [self.texts["train"][row] for row in rows]
        labels = self.labels["train"][rows].tolist()
        train = plain_bert.fine_tuned if self.kind == "adapter" else plain_bert.wholly_fine_tuned
        return train(demo.model_folder(), texts, labels, seed)

    def truth(self) -> Floats:
        """Log-odds (subsets, seeds, targets) of the targets' classes after retraining."""
        logits = []
        for subset in range(_SUBSETS):
            for seed in _TRUTH_SEEDS:
                path = self.folder / f"truth-{subset}-{seed}.npy"
                if not path.exists():
                    start = time.perf_counter()
                    rows = np.flatnonzero(self.subsets.keep[subset]).tolist()
                    model, tokenizer = self.fine_tuned(rows, seed)
                    found = plain_bert.logits(model, tokenizer, self.texts["test"]).numpy()
                    seconds = time.perf_counter() - start
                    print(f"subset {subset}, seed {seed}: {seconds:.0f} s", flush=True)
                    np.save(path, found, allow_pickle=False)
                logits.append(np.load(path, allow_pickle=False))
        whole = np.stack(logits).reshape(_SUBSETS, len(_TRUTH_SEEDS), _TARGETS, -1)
        labels = torch.from_numpy(self.labels["test"])
        return evaluation.minus_cost(whole, labels)

    def saved(self) -> tuple[Any, Any, Path]:
        """The attributed model, its tokenizer, and the folder it is saved in."""
        folder = self.folder / "model"
        model, tokenizer = self.fine_tuned(list(range(_TRAIN)), 0)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return model, tokenizer, folder


def attributed(problem: Problem, model: Path, layers: str | None) -> Floats:
    """Scores of ``turnover.attribute`` on all targets."""
    files = {}
    for name in ("train", "test"):
        files[name] = problem.folder / f"{name}.csv"
        labels = [plain_bert.LABELS[label] for label in problem.labels[name]]
        rows = zip(range(len(labels)), problem.texts[name], labels, strict=True)
        write_csv(files[name], ("id", "text", "label"), [list(map(str, row)) for row in rows])
    run = turnover.attribute(
        model,
        files["train"],
        files["test"],
        problem.folder / "run",
        layers=layers,
        targets="all",
        classes=plain_bert.LABELS,
        max_tokens=plain_bert.TOKENS,
        overwrite=True,
    )
    result = run.read_result("errors")
    rows = read_json(run.folder / "results" / "targets.json")["rows"]
    at = {one: column for column, one in enumerate(result.train_ids.tolist())}
    found = np.empty((_TARGETS, _TRAIN), dtype=np.float32)
    found[rows] = result.scores[:, [at[one] for one in run.train.ids.tolist()]]
    return found


def gradient_product(problem: Problem, model: nn.Module, tokenizer: Any) -> Floats:
    """Inner products of the gradients of the loss by the trained parameters."""
    trained = [one for one in model.parameters() if one.requires_grad]

    def rows(name: str) -> Tensor:
        found = []
        for text, label in zip(problem.texts[name], problem.labels[name], strict=True):
            output = model(**plain_bert.tokens(tokenizer, [text])).logits
            loss = functional.cross_entropy(output, torch.tensor([label]))
            parts = torch.autograd.grad(loss, trained)
            found.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(found)

    return np.asarray((rows("test") @ rows("train").T).numpy())


def representation(problem: Problem, model: Any, tokenizer: Any) -> Floats:
    """Cosine of the fine-tuned BERT's mean hidden states, negative where the labels differ."""
    encoder = (model.get_base_model() if problem.kind == "adapter" else model).bert

    def rows(name: str) -> Tensor:
        found = []
        for start in range(0, len(problem.texts[name]), _ROWS):
            batch = plain_bert.tokens(tokenizer, problem.texts[name][start : start + _ROWS])
            with torch.no_grad():
                hidden = encoder(**batch).last_hidden_state
            weights = batch["attention_mask"][:, :, None].float()
            found.append((hidden * weights).sum(dim=1) / weights.sum(dim=1))
        return functional.normalize(torch.cat(found), dim=1)

    return np.asarray((rows("test") @ rows("train").T).numpy()) * (2 * same_class(problem) - 1)


def same_class(problem: Problem) -> Floats:
    """1 where the labels are the same."""
    return np.equal(problem.labels["test"][:, None], problem.labels["train"]).astype(np.float32)


def ekfac(problem: Problem, model: nn.Module, tokenizer: Any) -> Floats:
    """EK-FAC (Grosse et al. 2023) by kronfluence on the layers that were trained."""
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    ]

    class Classification(Task):  # type: ignore[misc, unused-ignore]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            ids, mask, y = batch
            outputs = model(input_ids=ids, attention_mask=mask).logits
            if sample:
                y = outputs.detach().softmax(dim=1).multinomial(1).flatten()
            return functional.cross_entropy(outputs, y, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

        def get_attention_mask(self, batch: Any) -> Tensor:
            mask: Tensor = batch[1]
            return mask

    def rows(name: str) -> TensorDataset:
        found = plain_bert.tokens(tokenizer, problem.texts[name])
        labels = torch.from_numpy(problem.labels[name])
        return TensorDataset(found["input_ids"], found["attention_mask"], labels)

    folder = problem.folder / "kronfluence"
    train, test = rows("train"), rows("test")
    return kronfluence_.pairs("finetuned", model, Classification(), train, test, folder, _ROWS)


def board(kind: str, folder: Path) -> dict[str, Any]:
    """Linear datamodeling scores of every method, with intervals."""
    problem = Problem(kind, folder)
    outputs = problem.truth()
    model, tokenizer, saved = problem.saved()
    others = ("lora", "head") if kind == "adapter" else _LAYERS
    random = np.random.default_rng(1).standard_normal((_TARGETS, _TRAIN))
    methods: dict[str, Callable[[], Floats]] = {
        "turnover attribute": lambda: attributed(problem, saved, None),
        **{
            f"turnover attribute --layers {layers}": partial(attributed, problem, saved, layers)
            for layers in others
        },
        "gradient product": lambda: gradient_product(problem, model, tokenizer),
        "representation similarity, signed by class": lambda: representation(
            problem, model, tokenizer
        ),
        "same class": lambda: same_class(problem),
        "random": lambda: random,
        "EK-FAC (kronfluence 1.0.1)": lambda: ekfac(problem, model, tokenizer),
    }
    found: dict[str, Any] = {
        "train": _TRAIN,
        "targets": _TARGETS,
        "subsets": {"count": _SUBSETS, "fraction": 0.5, "sha256": problem.subsets.sha256},
        "truth_seeds": len(_TRUTH_SEEDS),
        "accuracy_of_halves": float((outputs > 0).mean()),
        "methods": {},
    }
    for name, method in methods.items():
        start = time.perf_counter()
        try:
            scores = method()
        except ImportError as error:
            raise InputError(f"{name} cannot run: {error}") from error
        seconds = time.perf_counter() - start
        judged = evaluation.lds(scores, problem.subsets, outputs, labels=problem.labels["train"])
        found["ceiling"] = {
            "raw": round(judged.raw.ceiling, 4),
            "class_removed": round(judged.class_removed.ceiling, 4),
        }
        found["methods"][name] = {
            "seconds": round(seconds, 1),
            "raw": [round(v, 4) for v in (judged.raw.mean, judged.raw.low, judged.raw.high)],
            "class_removed": [
                round(v, 4)
                for v in (
                    judged.class_removed.mean,
                    judged.class_removed.low,
                    judged.class_removed.high,
                )
            ],
        }
        print(name, found["methods"][name], flush=True)
    return found


def main() -> None:
    """Run the board from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/finetuned"))
    parser.add_argument("--write", type=Path, default=RESULTS)
    given = parser.parse_args()
    found = {kind: board(kind, given.folder / kind) for kind in ("adapter", "whole")}
    given.write.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
