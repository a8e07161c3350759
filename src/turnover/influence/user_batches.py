"""Adapt and check the batches that a user passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn

from turnover.batches import Adapter, Batch, as_batch
from turnover.batches.loaders import Numbers, check_numbered, warn_left_out
from turnover.dropout.contexts import Binding
from turnover.dropout.modules import device_of
from turnover.dropout.network import Network
from turnover.dropout.row_order import check_site_order
from turnover.dropout.rowwise import RowCheck
from turnover.errors import InputError
from turnover.objectives import Objective

_ROWS = 1024
"""Rows of a batch whose order is checked."""


class UserBatches:
    """Adapts and checks the batches that a user passes.

    Args:
        model: the batches' model.
        objective: callable (outputs, batch) -> (rows,).
        adapter: how a batch becomes :class:`turnover.Batch`; ``None``: as the network was attached.

    Attributes:
        ordered: sites that must see the rows in the order of the batch, since masks of all rows are
            differentiated at once; empty once every batch is known to keep it.
    """

    def __init__(
        self, model: Network | nn.Module, objective: Objective, adapter: Adapter | None
    ) -> None:
        self._network = model if isinstance(model, Network) else None
        self.ordered: Sequence[str] = ()
        if isinstance(model, Network):
            self.adapter = adapter or model.adapter
            # The mean network; sites that are not asked for need not be fit to run.
            self._rows = RowCheck(
                model.model, objective, partial(model.masking.open, Binding(sites=frozenset()))
            )
        else:
            self.adapter = adapter or as_batch
            self._rows = RowCheck(model, objective)

    def check(self, batch: Batch) -> Batch:
        """Check a batch with the model."""
        batch = self._rows(batch)
        if self._network is not None and self.ordered:
            few = batch.rows(0, min(len(batch), _ROWS)).to(device_of(self._network.model))
            if check_site_order(self._network, few, self.ordered):
                self.ordered = ()
        return batch

    def checked(self, batches: Iterable[Any], numbers: Numbers = Numbers.UNUSED) -> Iterator[Batch]:
        """Adapt batches and check them with the model.

        Args:
            batches: from the user.
            numbers: the use of row numbers, where rows have no ids.
        """
        return map(self.check, self.adapted(batches, numbers))

    def adapted(self, batches: Iterable[Any], numbers: Numbers = Numbers.UNUSED) -> Iterator[Batch]:
        """Adapt batches, without running the model.

        Arguments as in :meth:`checked`.
        """
        warn_left_out(batches)
        for raw in batches:
            batch = raw if isinstance(raw, Batch) else self.adapter(raw)
            rows = len(batch)
            if not rows:
                raise InputError("a batch has no rows")
            if batch.ids is None:
                check_numbered(batches, numbers)
            elif batch.ids.shape != (rows,):
                raise InputError(
                    f"a batch of {rows} rows has ids of shape {tuple(batch.ids.shape)}; give one id "
                    f"for each row"
                )
            yield batch
