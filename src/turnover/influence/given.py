"""What a user gives as batches, made into batches that are cut into the right rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from torch import nn

from turnover.batches import Adapter, Batch, as_batch
from turnover.bindings import Binding
from turnover.errors import InputError
from turnover.loaders import Numbers, check_numbered, warn_left_out
from turnover.network import Network
from turnover.objectives import Objective
from turnover.rowwise import RowCheck
from turnover.site_order import check_site_order
from turnover.sites import device_of

_ROWS = 1024
"""Of a batch that are looked at for their order."""


class Given:
    """Adapts and checks what is given.

    Args:
        model: what the batches are for.
        objective: callable (outputs, batch) -> (rows,).
        adapter: how a batch becomes :class:`turnover.Batch`; ``None``: as the network was attached.
        masked: whether masks are differentiated, so that sites have to see rows in their order.
    """

    def __init__(
        self,
        model: Network | nn.Module,
        objective: Objective,
        adapter: Adapter | None,
        *,
        masked: bool = False,
    ) -> None:
        self._unordered = model if masked and isinstance(model, Network) else None
        """Where sites are not yet known to see the rows of every batch in their order."""
        if isinstance(model, Network):
            self.adapter = adapter or model.adapter
            # The mean network; sites that are not asked for need not be fit to run.
            self._rows = RowCheck(
                model.model, objective, partial(model._context, Binding(sites=frozenset()))
            )
        else:
            self.adapter = adapter or as_batch
            self._rows = RowCheck(model, objective)

    def check(self, batch: Batch) -> Batch:
        """The batch, with the names of all inputs that its rows share.

        Raises:
            InputError: rows that cannot be told apart, or that a site sees in another order.
        """
        batch = self._rows(batch)
        if self._unordered is not None:
            few = batch.rows(0, min(len(batch), _ROWS))
            if check_site_order(self._unordered, few.to(device_of(self._unordered.model))):
                self._unordered = None
        return batch

    def batches(self, batches: Iterable[Any], numbers: Numbers = Numbers.UNUSED) -> Iterator[Batch]:
        """The batches, looked at with the model.

        Args:
            batches: what was given.
            numbers: what the numbers of rows without ids are used for.

        Raises:
            InputError: rows that cannot be told apart, or as in :meth:`adapted`.
        """
        return map(self.check, self.adapted(batches, numbers))

    def adapted(self, batches: Iterable[Any], numbers: Numbers = Numbers.UNUSED) -> Iterator[Batch]:
        """The batches, of which nothing has run yet.

        Arguments as in :meth:`batches`.

        Raises:
            InputError: a batch that is not understood or has no rows, not one id for each row, or rows
                without ids whose order is not known.
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
