"""What the page says of doubtful labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError
from turnover.runs.run import Run
from turnover.tasks.stored_doubts import open_doubts


class Doubtful:
    """Probabilities that the labels of a run's training rows are wrong, where they can be estimated.

    Attributes:
        refusal: why they cannot; ``None``: they are.
        order: what sorts the most doubtful label first, float64 (rows,); ``None``: unknown.
    """

    def __init__(self, run: Run) -> None:
        self._classes = run.train.classes
        self.refusal: str | None = None
        self.order: NDArray[np.float64] | None = None
        try:
            found = open_doubts(run)
        except InputError as error:
            self.refusal = str(error)
            return
        errors = found.errors
        self.order = -errors.suspicion
        self._wrong, self._suggested, self._posterior = (
            errors.probability,
            errors.suggested,
            errors.posterior,
        )
        self._about = {
            "likely": errors.order()[: errors.likely].tolist(),
            "expected": errors.expected,
            "source": found.described(),
        }

    def about(self) -> dict[str, Any] | None:
        """Rows that are more probably wrong than right, the most doubtful first, and what this is by."""
        return None if self.order is None else self._about

    def of(self, row: int) -> dict[str, Any]:
        """The probability that a row's label is wrong, and the most probable other class."""
        if self.order is None:
            return {"wrong": None, "suggested": None, "probability_of_suggested": None}
        suggested = int(self._suggested[row])
        return {
            "wrong": float(self._wrong[row]),
            "suggested": self._classes[suggested],
            "probability_of_suggested": float(self._posterior[row, suggested]),
        }
