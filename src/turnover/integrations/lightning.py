"""Lightning: a callback that trains a module under the masks of its instances.

Only ``training_step`` runs masked. Validation, testing and prediction are in eval mode, and so use the
mean network, as without the callback.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

from turnover.audit import clips
from turnover.batches import Adapter, Identified, as_batch
from turnover.errors import InputError, needing
from turnover.masks import MaskSpec
from turnover.network import Network, attach
from turnover.sites import SiteLike

try:
    from lightning.pytorch import Callback
except ImportError:
    with needing("the callback", "turnover[lightning]"):
        from pytorch_lightning import Callback  # type: ignore[assignment]


class TurnoverCallback(Callback):
    """Trains a Lightning module with turn-over dropout; :class:`turnover.WithIds` gives ids to its data.

    ``training_step`` gets the batches that it got before, and runs under the masks of their ids.
    Checkpoints hold the description of the masks, as the state of this callback, and one of other masks
    is not resumed.

    Args:
        sites: what to mask, as :func:`turnover.attach` takes it.
        spec: the masks; default ``MaskSpec()``.
        adapter: how a batch that is not of a :class:`turnover.WithIds` has its ids; such a batch comes to
            ``training_step`` as it is.

    Raises (when training begins, before the first step):
        InputError: unknown sites, gradient clipping by norm, a checkpoint of other masks or of a training
            without masks; before any gradient: a batch without ids.
    """

    def __init__(
        self,
        sites: SiteLike | Sequence[SiteLike],
        spec: MaskSpec | None = None,
        *,
        adapter: Adapter = as_batch,
    ) -> None:
        self.sites = sites
        self.spec = spec or MaskSpec()
        self.adapter = adapter
        self._network: Network | None = None
        self._plain_step: Any = None

    @property
    def network(self) -> Network:
        """The module with its masks, once training has begun, and after it.

        Raises:
            InputError: it has not begun.
        """
        if self._network is None:
            raise InputError("there is no network before trainer.fit: the callback attaches there")
        return self._network

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Refuse settings that carry instances across masks."""
        by_norm = (trainer.gradient_clip_algorithm or "norm") == "norm"
        if stage == "fit" and clips(trainer.gradient_clip_val) and by_norm:
            raise InputError(
                f"gradient_clip_val={trainer.gradient_clip_val:g} clips by global norm, which scales "
                f"every gradient by all instances of the batch, hidden units' too: use "
                f'gradient_clip_algorithm="value", or leave gradient_clip_val out'
            )

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume a training under other masks, or under none."""
        stored = checkpoint["callbacks"].get(self.state_key)
        if stored is None:
            if trainer.training:
                raise InputError(
                    "the checkpoint is of a training without turn-over dropout, whose units have "
                    "learned every instance: begin anew, or train new layers on its frozen ones"
                )
            return
        self._attach(pl_module)
        self.network.check(stored)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Attach, and bind ids around ``training_step``."""
        self._attach(pl_module)
        network, step = self.network, pl_module.training_step
        self._plain_step = vars(pl_module).get("training_step")

        @functools.wraps(step)
        def exposed_step(batch: Any, *rest: Any, **options: Any) -> Any:
            apart = isinstance(batch, Identified)
            ids = batch.ids if apart else self.adapter(batch).ids
            if ids is None:
                raise InputError(
                    "the training batch has no ids: wrap the training data set, "
                    "DataLoader(turnover.WithIds(dataset), ...)"
                )
            with network.exposed(ids):
                return step(batch.rows if apart else batch, *rest, **options)

        pl_module.training_step = exposed_step

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Give the module its own ``training_step`` back."""
        self._restore(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002
        """Likewise where training fails."""
        self._restore(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Description of the masks, as :meth:`turnover.Network.from_dict` takes it."""
        return {} if self._network is None else self._network.to_dict()

    def _attach(self, pl_module: nn.Module) -> None:
        if self._network is None or self._network.model is not pl_module:
            self._network = attach(pl_module, self.sites, self.spec)

    def _restore(self, pl_module: Any) -> None:
        vars(pl_module).pop("training_step", None)
        if self._plain_step is not None:
            pl_module.training_step = self._plain_step
        self._plain_step = None
