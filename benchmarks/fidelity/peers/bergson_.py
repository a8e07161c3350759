"""A row that stays empty, and says why."""

from __future__ import annotations

from turnover import InputError

from ..methods import Attribution, Scored


def bergson(_task: Attribution) -> Scored:
    """bergson 2.5.1 reads Hugging Face causal language models and datasets of ``input_ids`` alone.

    Raises:
        InputError: always.
    """
    raise InputError("causal language models on input_ids alone: no classifier of these problems")
