"""A model under per-instance masks: attach, exposed, hidden, mean, detach.

Hooks multiply the outputs of the sites by masks of the bound ids. The model's class, its parameters
and its ``state_dict`` keys do not change. This module computes no statistics and no scores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from turnover.batches import Adapter, as_batch
from turnover.dropout.audit import AuditReport, audit
from turnover.dropout.contexts import Binding, Context
from turnover.dropout.masking import Ids, Masking
from turnover.dropout.masks import MaskSpec
from turnover.dropout.modules import weights_digest
from turnover.dropout.sites import ResolvedSite, Site, SiteLike, canonical_name, resolve
from turnover.dropout.target_networks import check_targets
from turnover.dropout.torch_private import check_torch
from turnover.errors import BindingError, InputError

_MOST_UNITS = 2**26
"""Units of a stored site: comparing fingerprints makes masks of as many."""
_SHOWN = 200
"""Characters of a damaged description in the error message."""


class Network:
    """A model with turn-over dropout attached. Made by :func:`attach`.

    Attributes:
        model: the user's model, unchanged except for hooks.
        spec: the :class:`~turnover.MaskSpec`.
        sites: canonical names of the sites, in the model's definition order.
        units: mask units by site name; ``None`` before the first forward if the neighbors of the
            site do not determine it.
        adapter: turns the trainer's batches into :class:`turnover.Batch`.
        masking: the hooks, contexts and probes that estimators use
            (:class:`turnover.dropout.masking.Masking`).
    """

    def __init__(self, model: nn.Module, sites: list[ResolvedSite], spec: MaskSpec) -> None:
        self.model = model
        self.spec = spec
        self.masking = Masking(model, sites, spec)
        self.units = self.masking.units
        self.adapter: Adapter = as_batch

    @property
    def sites(self) -> list[str]:
        """Canonical names of the sites, in the model's definition order."""
        return list(self.masking.sites)

    @property
    def mask_units(self) -> int:
        """D: mask units summed over the sites.

        Raises:
            BindingError: a site's width is unknown (run one forward).
        """
        return sum(self.known_units().values())

    def known_units(self, sites: Sequence[str] | None = None) -> dict[str, int]:
        """Mask units by site name, of some sites or (``None``) of all.

        Raises:
            BindingError: a site's width is unknown (run one forward).
        """
        wanted = self.units if sites is None else {name: self.units[name] for name in sites}
        known = {name: units for name, units in wanted.items() if units is not None}
        if len(known) < len(wanted):
            missing = sorted(set(wanted) - set(known))
            raise BindingError(
                f"the widths of sites {missing} are not known before a forward: run the model once"
            )
        return known

    def select(self, patterns: Sequence[str]) -> list[str]:
        """Sites whose canonical names equal or match (as globs) one of the patterns.

        Raises:
            InputError: a pattern that matches no site; the sites are listed.
        """
        return self.masking.select(patterns)

    def exposed(self, ids: Ids | Mapping[str, Ids]) -> Context:
        """Context: row i of every batch runs in the exposed sub-network of ``ids[i]``.

        Args:
            ids: int64 instance ids, shape (rows,). Or a column of ids for each site: names or patterns
                of sites to ids, so that instances have their masks at some sites and their sources or
                annotators at others; score either with ``Influence(..., sites=...)``.

        Raises:
            TypeError: ids are not integers.
            InputError: ids are not one-dimensional, a ghost in training, columns that do not name
                every site once or differ in length, or merged LoRA weights at a site.
            BindingError: at the forward, the batch does not have one row for each id.
        """
        return self.masking.open(self.masking.bind(ids, False))

    def hidden(self, ids: Ids | Mapping[str, Ids]) -> Context:
        """Context: row i of every batch runs in the hidden sub-network of ``ids[i]``.

        Arguments and errors as in :meth:`exposed`.
        """
        return self.masking.open(self.masking.bind(ids, True))

    def bind(self, ids: Ids | Mapping[str, Ids], hidden: Tensor) -> Context:
        """Context: each row of every batch runs in the exposed or the hidden sub-network of its id.

        Args:
            ids: as in :meth:`exposed`.
            hidden: bool, shape (rows,): True runs the row hidden, False exposed.

        Raises:
            InputError: ``hidden`` is not a bool tensor of the shape of ``ids``; else as in
                :meth:`exposed`.
        """
        if not isinstance(hidden, Tensor):
            raise InputError(
                f"hidden must be a bool tensor with one side for each id, got {hidden!r}; for one side "
                f"in all rows use exposed(ids) or hidden(ids)"
            )
        return self.masking.open(self.masking.bind(ids, hidden))

    def without(self, train_id: int, *, sites: Sequence[str] | None = None) -> Context:
        """Context: every row of every batch runs in the sub-network that never learned an id.

        For a group (a source, an annotator, a time block) this network predicts as if the group were
        missing from the training data; for one instance it is the hidden sub-network of :meth:`hidden`.

        Args:
            train_id: id of an instance or a group.
            sites: names or patterns of the sites with such ids; other sites run whole (see the columns
                of :meth:`exposed`). ``None``: all.

        Raises:
            TypeError: the id is not an integer.
            InputError: no such site.
        """
        chosen = None if sites is None else self.select(sites)
        return self.masking.open(self.masking.bind([train_id], True, every_row=True, sites=chosen))

    def mean(self) -> Context:
        """Context: the whole network, unscaled, for every row (also the default in eval mode)."""
        return self.masking.open(Binding())

    def detach(self) -> None:
        """Remove the hooks; the model is as it was before :func:`attach`."""
        self.masking.detach()

    def audit(
        self,
        batch: Any,
        *,
        max_grad_norm: float | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        adapter: Adapter = as_batch,
    ) -> AuditReport:
        """Find trainable parameters that learn an instance both exposed and hidden (leaks).

        Args:
            batch: a batch as the model takes it; up to 8 of its rows are used, its labels are not. A
                model in eval mode is audited in training mode; one in training mode keeps its modes.
            max_grad_norm: the trainer's clipping by global norm (Hugging Face's default is 1.0),
                which carries every instance to every parameter. ``None``, 0 or infinite: no clipping.
            optimizer: the trainer's optimizer, to check that it updates element by element.
            adapter: how a batch becomes model inputs.

        Returns:
            :class:`~turnover.dropout.audit.AuditReport`, which prints as a table.
        """
        return audit(self, adapter(batch), max_grad_norm=max_grad_norm, optimizer=optimizer)

    def fingerprint(self) -> str:
        """Hash of the masks of all sites (see :meth:`MaskSpec.fingerprint`) and of their axes.

        Raises:
            BindingError: a site's width is unknown (run one forward).
        """
        layout = {s.name: (s.axis, s.unit_size) for s in self.masking.sites.values()}
        return _fingerprint(self.spec, self.known_units(), layout)

    def digest(self) -> str:
        """Hash of masks and weights, which identifies the network that computed a result.

        If the weights are sharded over processes, every process must call it.
        """
        state = {canonical_name(n): value for n, value in self.model.state_dict().items()}
        return weights_digest(state, prefix=self.fingerprint())

    def to_dict(self) -> dict[str, Any]:
        """Spec, sites and fingerprint as JSON values, to be stored beside the weights."""
        units = self.known_units()
        return {
            "spec": self.spec.to_dict(),
            "sites": [
                {"name": name, "axis": s.axis, "unit_size": s.unit_size, "units": units[name]}
                for name, s in self.masking.sites.items()
            ],
            "fingerprint": self.fingerprint(),
        }

    @classmethod
    def from_dict(cls, model: nn.Module, values: Mapping[str, Any]) -> Network:
        """Attach to a model as :meth:`to_dict` describes, and check that the masks are the same.

        Raises:
            InputError: missing fields, unknown sites, another spec version, or masks whose
                fingerprint differs from the stored one.
        """
        spec, sites, units = _described(values)
        network = attach(model, sites, spec)
        network.masking.fix_units(units)
        return network

    def check(self, values: Mapping[str, Any]) -> None:
        """Compare with a description from :meth:`to_dict`, except for widths that are still unknown.

        Raises:
            InputError: a damaged description, or a description of other masks.
        """
        spec, sites, units = _described(values)
        own = [Site(site.name, site.axis, site.unit_size) for site in self.masking.sites.values()]
        widths = {name: known for name, known in self.units.items() if known is not None}
        if (spec, sites) != (self.spec, own) or not widths.items() <= units.items():
            raise InputError(
                f"other masks: the stored ones are {spec} at {sorted(units.items())}, this network's are "
                f"{self.spec} at {sorted(self.units.items())}"
            )


def _fingerprint(spec: MaskSpec, units: dict[str, int], layout: dict[str, tuple[int, int]]) -> str:
    described = json.dumps([spec.fingerprint(units), sorted(layout.items())])
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()


def _described(values: Mapping[str, Any]) -> tuple[MaskSpec, list[Site], dict[str, int]]:
    """Spec, sites and widths of a stored description, whose fingerprint is checked."""
    try:
        spec = MaskSpec.from_dict(values["spec"])
        sites = [Site(s["name"], s["axis"], s["unit_size"]) for s in values["sites"]]
        units = {s["name"]: int(s["units"]) for s in values["sites"]}
        layout = {s["name"]: (int(s["axis"]), int(s["unit_size"])) for s in values["sites"]}
        stored = values["fingerprint"]
        if not all(0 < width <= _MOST_UNITS for width in units.values()):
            raise ValueError(f"sites have 1 to {_MOST_UNITS} units")
        if sum(units.values()) > 2 * _MOST_UNITS or len(sites) != len(units):
            raise ValueError("too many units, or a site twice")
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        text = repr(values)
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise InputError(f"damaged mask description: {error!r} in {shown}") from error
    if _fingerprint(spec, units, layout) != stored:
        raise InputError(
            f"the stored fingerprint {stored} is not that of the stored spec and sites: the mask "
            f"description was changed after training, or is damaged"
        )
    return spec, sites, units


def _maskings_on(module: nn.Module) -> list[Masking]:
    hooks = [hook for hook in module._forward_hooks.values() if isinstance(hook, partial)]
    owners = [getattr(hook.func, "__self__", None) for hook in hooks]
    return [owner for owner in owners if isinstance(owner, Masking)]


def _detach_copies(model: nn.Module) -> None:
    """Remove the unused hooks that came with a copy of an attached model."""
    for module in model.modules():
        for masking in _maskings_on(module):
            if masking.contexts.copied and not masking.contexts.used:
                masking.detach()


def attach(
    model: nn.Module, sites: SiteLike | Sequence[SiteLike], spec: MaskSpec | None = None
) -> Network:
    """Attach turn-over dropout to a model, with hooks on the outputs of modules.

    Attach before the first call of a compiled model. Attach a deep copy of an attached model (such as a
    target network) again: with the same sites and spec its masks are those of the original.

    Args:
        model: any ``torch.nn.Module`` whose batches have their rows on axis 0.
        sites: what to mask: module names, glob patterns, module types, :class:`Site` objects, or
            presets: ``"head"`` (wide heads), ``"mlp"`` (activations after linear layers), ``"lora"``
            (LoRA rank components), ``"channels"`` (activations after convolutions), ``"blocks"`` (the
            networks of :class:`turnover.Blocks`).
        spec: the masks; default ``MaskSpec()``.

    Returns:
        :class:`Network`.

    Raises:
        InputError: a site that does not exist (the closest names are listed), merged LoRA weights, an
            unsupported kind of adapter, a model that holds both an online network and its target, or a
            model that is attached already.
    """
    check_torch()
    resolved = resolve(model, sites)
    check_targets(model, [site.module for site in resolved])
    _detach_copies(model)
    for site in resolved:
        if _maskings_on(site.module):
            raise InputError(
                f"site {site.name!r} has turn-over dropout attached already: call detach() on the "
                f"network that holds it first"
            )
    return Network(model, resolved, spec or MaskSpec())
