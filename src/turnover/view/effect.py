"""The effect of decisions, and a row's neighbors: what the pretrained encoder's features say in seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from turnover.data.base import Data
from turnover.errors import InputError
from turnover.runs.run import Run
from turnover.tasks.linear_probe import Frozen, frozen
from turnover.tasks.relabel import right_after

_TRAINING_ROWS = 2_000
_TEST_ROWS = 1_000
_PART = 128
"""Rows that are encoded before the view can close."""
_SEED = 0


class Effect:
    """Compares a head that was trained with the decisions with one that was trained without them.

    Features are computed once, by :meth:`prepare` or at the first question, of at most 2,000 training rows,
    those decided on besides, and 1,000 test rows, drawn at random.

    Attributes:
        refusal: why this run has neither effect nor neighbors to show; ``None``: it has.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.refusal: str | None = None
        if not run.pipeline.keeps_pretrained:
            self.refusal = (
                "The effect needs the encoder as before training, which this run does not keep."
            )
        self._measuring, self._encoding = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._at: dict[int, int] = {}
        self._train: Frozen | None = None
        self._test: Frozen | None = None
        self._before: Tensor | None = None

    def of(self, decisions: Mapping[int, str]) -> dict[str, Any]:
        """Measure the effect of decisions by training row on the accuracy on the test rows.

        Raises:
            InputError: a run without a pretrained encoder, or decisions that remove every row.
        """
        self._check()
        with self._measuring:
            began = time.perf_counter()
            train, test, before = self._without(decisions)
            after = self._right(train, test, decisions)
            return {
                "decisions": len(decisions),
                "before": float(before.float().mean()),
                "after": float(after.float().mean()),
                "gained": int((after & ~before).sum()),
                "lost": int((before & ~after).sum()),
                "test_rows": len(test),
                "training_rows": len(train),
                "seconds": time.perf_counter() - began,
            }

    def prepare(self) -> None:
        """Compute what does not depend on decisions, so that the first question is answered in seconds.

        Raises:
            InputError: a run without a pretrained encoder.
        """
        self._check()
        with self._measuring:
            self._without(())

    def close(self) -> None:
        """Stop within seconds: a thread that still computes would abort the process as it ends."""
        self._closed.set()
        with self._measuring, self._encoding:
            pass

    def nearest(self, row: int, most: int) -> list[tuple[int, float]]:
        """Find the training rows with the most similar features, and their similarity: a cosine.

        Raises:
            InputError: a run without a pretrained encoder.
        """
        self._check()
        with self._encoding:
            train, _ = self._features(())
            own = self._at.get(row)
            if own is None:
                features = frozen(self._run, self._run.train.take([row])).features
            else:
                features = train.features[[own]]
            rows = list(self._at)
        center = train.features.mean(dim=0)
        similar = functional.cosine_similarity(train.features - center, features - center)
        order = similar.argsort(descending=True, stable=True)[: most + 1].tolist()
        return [(rows[at], float(similar[at])) for at in order if rows[at] != row][:most]

    def _check(self) -> None:
        if self.refusal is not None:
            raise InputError(self.refusal)

    def _without(self, decided: Iterable[int]) -> tuple[Frozen, Frozen, Tensor]:
        """Features of the rows, those decided on among them, and which test rows are right before."""
        with self._encoding:
            train, test = self._features(decided)
        if self._before is None:
            self._before = self._right(train, test, {})
        return train, test, self._before

    def _features(self, decided: Iterable[int]) -> tuple[Frozen, Frozen]:
        run = self._run
        if self._train is None or self._test is None:
            rows = _drawn(run.train, _TRAINING_ROWS)
            train = self._frozen(run.train, rows)
            self._test = self._frozen(run.test, _drawn(run.test, _TEST_ROWS))
            self._train = train
            self._at = {row: at for at, row in enumerate(rows)}
        if new := [row for row in decided if row not in self._at]:
            known = self._train
            self._train = _joined([known, self._frozen(run.train, new)])
            self._at |= {row: len(known) + at for at, row in enumerate(new)}
            self._before = None
        return self._train, self._test

    def _frozen(self, data: Data, rows: list[int]) -> Frozen:
        parts = []
        for start in range(0, len(rows), _PART):
            if self._closed.is_set():
                raise InputError("the view is closing")
            parts.append(frozen(self._run, data.take(rows[start : start + _PART])))
        return _joined(parts)

    def _right(self, train: Frozen, test: Frozen, decisions: Mapping[int, str]) -> Tensor:
        """Whether a head predicts the label of each test row, bool (test rows,)."""
        made = {self._at[row]: decision for row, decision in decisions.items()}
        return right_after(train, test, made, self._run.train.classes, _SEED)


def _joined(parts: Sequence[Frozen]) -> Frozen:
    features, labels = ([getattr(one, name) for one in parts] for name in ("features", "labels"))
    return replace(parts[0], features=torch.cat(features), labels=torch.cat(labels))


def _drawn(data: Data, most: int) -> list[int]:
    rows = np.random.default_rng(_SEED).permutation(len(data))[:most]
    return sorted(rows.tolist())
