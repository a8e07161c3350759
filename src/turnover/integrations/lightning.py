"""Lightning: a callback that trains a module under the masks of its instances.

Only ``training_step`` runs masked. Validation, testing and prediction run the mean network, in eval mode.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

from turnover.batches import Adapter, Identified, as_batch
from turnover.dropout.audit import clips
from turnover.dropout.masks import MaskSpec
from turnover.dropout.network import Network, attach
from turnover.dropout.sites import SiteLike
from turnover.errors import InputError, needing

try:
    from lightning.pytorch import Callback
except ImportError:
    with needing("the callback", "turnover[lightning]"):
        from pytorch_lightning import Callback  # type: ignore[assignment]


class TurnoverCallback(Callback):
    """Trains a Lightning module with turn-over dropout; :class:`turnover.WithIds` gives ids to its data.

    ``training_step`` gets the same batches as without the callback, and runs under the masks of their
    ids. Checkpoints describe the masks, as the state of this callback; other masks cannot resume them.
    ``LearningRateFinder``, ``BatchSizeFinder`` and ``Tuner`` also train under the masks, and restore the
    weights.

    Args:
        sites: layers to mask, as in :func:`turnover.attach`.
        spec: the masks; default ``MaskSpec()``.
        adapter: reads the ids of a batch that is not of a :class:`turnover.WithIds`; ``training_step``
            gets such a batch unchanged.

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
        self._stored: dict[str, Any] = {}
        self._replaced: dict[str, Any] = {}

    @property
    def network(self) -> Network:
        """The module with its masks, from the start of training on.

        Raises:
            InputError: training has not started.
        """
        if self._network is None:
            raise InputError(
                "no network before trainer.fit, which attaches the masks: call it first"
            )
        return self._network

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Reject settings that leak, and wrap ``training_step``.

        Precedes every ``on_fit_start``, where Lightning's finders of a learning rate and batch size train.
        """
        if stage != "fit":
            return
        _check_clipping(trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
        self._restore(pl_module)
        self._replace(pl_module, "training_step", self._exposed(pl_module))
        self._replace(pl_module, "clip_gradients", _clipping_by_value(trainer, pl_module))

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Reject a checkpoint of other masks, or of none."""
        stored = checkpoint["callbacks"].get(self.state_key)
        if stored is None:
            # Finders go back to a checkpoint of step 0, which has learned nothing.
            if trainer.training and checkpoint.get("global_step"):
                raise InputError(
                    "the checkpoint was trained without turn-over dropout, so its units have learned every "
                    "instance: start a new training, or train new layers on its frozen ones"
                )
            return
        self._attach(pl_module).check(stored)
        self._stored = stored

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Attach the masks."""
        self._attach(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002
        """Restore the module's own methods."""
        self._restore(pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Restore the module's own methods."""
        self._restore(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Description of the masks for :meth:`turnover.Network.from_dict`; empty before the first step."""
        if self._network is None:
            return {}
        if any(units is None for units in self._network.units.values()):
            return self._stored
        return self._network.to_dict()

    def _exposed(self, pl_module: Any) -> Any:
        """The module's ``training_step`` under the masks of its batch."""
        step = pl_module.training_step

        @functools.wraps(step)
        def exposed_step(batch: Any, *rest: Any, **options: Any) -> Any:
            identified = isinstance(batch, Identified)
            ids = batch.ids if identified else self.adapter(batch).ids
            if ids is None:
                raise InputError(
                    "the training batch has no ids: wrap the training data set, "
                    "DataLoader(turnover.WithIds(dataset), ...)"
                )
            with self._attach(pl_module).exposed(ids):
                return step(batch.rows if identified else batch, *rest, **options)

        return exposed_step

    def _attach(self, pl_module: nn.Module) -> Network:
        if self._network is None or self._network.model is not pl_module:
            self._network = attach(pl_module, self.sites, self.spec)
            self._stored = {}
        return self._network

    def _replace(self, pl_module: Any, name: str, method: Any) -> None:
        self._replaced[name] = vars(pl_module).get(name)
        setattr(pl_module, name, method)

    def _restore(self, pl_module: Any) -> None:
        for name, own in self._replaced.items():
            vars(pl_module).pop(name, None)
            if own is not None:
                setattr(pl_module, name, own)
        self._replaced = {}


def _clipping_by_value(trainer: Any, pl_module: Any) -> Any:
    """The module's ``clip_gradients``, which its own hooks may call, with a check."""
    clip = pl_module.clip_gradients

    @functools.wraps(clip)
    def checked(
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> Any:
        _check_clipping(
            gradient_clip_val or trainer.gradient_clip_val,
            gradient_clip_algorithm or trainer.gradient_clip_algorithm,
        )
        return clip(optimizer, gradient_clip_val, gradient_clip_algorithm)

    return checked


def _check_clipping(value: float | None, algorithm: str | None) -> None:
    by_norm = (algorithm or "norm").lower() == "norm"
    if value is not None and clips(value) and by_norm:
        raise InputError(
            f"gradient_clip_val={value:g} clips by global norm, which scales every gradient by all "
            f"instances of the batch, hidden ones too: use "
            f'gradient_clip_algorithm="value", or leave gradient_clip_val out'
        )
