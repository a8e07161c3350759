"""Scores of blocks of targets, put together to a result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turnover.batches import Batch
from turnover.influence.engine import to_numpy
from turnover.results.calibration import NoiseFloor, StudentNull
from turnover.results.result import Result


class Collected:
    """Blocks of targets, scored one after another."""

    def __init__(self) -> None:
        self._target_ids: list[Tensor | None] = []
        self._scores: list[NDArray[np.float32]] = []
        self._errors: list[NDArray[np.float32]] = []
        self._floors: list[NDArray[np.float64]] = []
        self._places: list[NDArray[np.int64]] = []
        self._freedom: list[float] = []

    def add(
        self,
        batches: Sequence[Batch],
        score: Tensor,
        error: Tensor,
        floor: NDArray[np.float64],
        freedom: float,
        place: NDArray[np.int64] | None = None,
    ) -> None:
        """Add the next block.

        Args:
            batches: of its targets.
            score: float32 (targets, instances).
            error: standard errors, likewise.
            floor: noise floors (targets,).
            freedom: degrees of freedom of the standard errors.
            place: places of the instances, which differ between targets; ``None``: all, in their order.
        """
        self._target_ids += [batch.ids for batch in batches]
        self._scores.append(to_numpy(score))
        self._errors.append(to_numpy(error))
        self._floors.append(floor)
        self._freedom += [freedom] * len(score)
        if place is not None:
            self._places.append(place)

    def result(self, ids: Tensor, described: dict[str, Any]) -> Result:
        """All blocks.

        Args:
            ids: of the instances, int64 (instances,).
            described: further fields of the result.
        """
        known = [one for one in self._target_ids if one is not None]
        complete = len(known) == len(self._target_ids)
        floor = np.concatenate(self._floors)
        train_ids = ids.numpy()
        if self._places:
            train_ids = train_ids[np.concatenate(self._places)]
        return Result(
            scores=np.concatenate(self._scores),
            floor=NoiseFloor(np.zeros_like(floor), floor),
            null=StudentNull(float(np.mean(self._freedom))),
            train_ids=train_ids,
            target_ids=torch.cat(known).cpu().numpy() if complete else None,
            standard_error=np.concatenate(self._errors),
            **described,
        )
