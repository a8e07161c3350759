"""Lightning: a callback that trains a module under the masks of its instances.

Only ``training_step`` runs masked. Validation, testing and prediction are in eval mode, and so use the
mean network, as without the callback.
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

    ``training_step`` gets the batches that it got before, and runs under the masks of their ids.
    Checkpoints hold the description of the masks, as the state of this callback, and one of other masks
    is not resumed.

    ``LearningRateFinder``, ``BatchSizeFinder`` and ``Tuner`` train under the masks as well, and put the
    weights back that they found.

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
        self._stored: dict[str, Any] = {}
        self._replaced: dict[str, Any] = {}

    @property
    def network(self) -> Network:
        """The module with its masks, once training has begun, and after it.

        Raises:
            InputError: it has not begun.
        """
        if self._network is None:
            raise InputError("there is no network before trainer.fit: the callback attaches there")
        return self._network

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse settings that carry instances across masks, and bind ids around ``training_step``.

        Before any ``on_fit_start``: Lightning's finders of a learning rate and of a batch size train there.
        """
        if stage != "fit":
            return
        _check_clipping(trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
        self._restore(pl_module)
        self._replace(pl_module, "training_step", self._exposed(pl_module))
        self._replace(pl_module, "clip_gradients", _clipping_by_value(trainer, pl_module))

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume a training under other masks, or under none."""
        stored = checkpoint["callbacks"].get(self.state_key)
        if stored is None:
            # Before the first step nothing has learned anything: a finder goes back to such a checkpoint.
            if trainer.training and checkpoint.get("global_step"):
                raise InputError(
                    "the checkpoint is of a training without turn-over dropout, whose units have "
                    "learned every instance: begin anew, or train new layers on its frozen ones"
                )
            return
        self._attach(pl_module).check(stored)
        self._stored = stored

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Attach."""
        self._attach(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002
        """Give the module its own methods back where training fails."""
        self._restore(pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Likewise where it ends, by a finder's early exit too."""
        self._restore(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Description of the masks, as :meth:`turnover.Network.from_dict` takes it.

        Empty before the first step, unless the training was resumed.
        """
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
            apart = isinstance(batch, Identified)
            ids = batch.ids if apart else self.adapter(batch).ids
            if ids is None:
                raise InputError(
                    "the training batch has no ids: wrap the training data set, "
                    "DataLoader(turnover.WithIds(dataset), ...)"
                )
            with self._attach(pl_module).exposed(ids):
                return step(batch.rows if apart else batch, *rest, **options)

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
    """The module's ``clip_gradients``, which a ``training_step`` or hook of its own may call."""
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
            f"gradient_clip_val={value:g} clips by global norm, which scales "
            f"every gradient by all instances of the batch, hidden units' too: use "
            f'gradient_clip_algorithm="value", or leave gradient_clip_val out'
        )
