"""A model under per-instance masks: attach, exposed, hidden, mean, detach.

Hooks multiply the outputs of the sites by masks of the bound ids. The model's class, its parameters
and its ``state_dict`` keys stay as they were. Statistics and scores live elsewhere.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from turnover.batches import Adapter, as_batch
from turnover.dropout.audit import AuditReport, audit
from turnover.dropout.binding import Binding
from turnover.dropout.contexts import Context, Contexts
from turnover.dropout.layouts import VMAPPED, is_ambiguous, is_vmapped_over_rows
from turnover.dropout.masks import MaskSpec
from turnover.dropout.modules import device_of, whole
from turnover.dropout.sites import ResolvedSite, Site, SiteLike, canonical_name, resolve
from turnover.dropout.target_networks import check_targets
from turnover.dropout.torch_private import check_torch
from turnover.errors import BindingError, InputError
from turnover.ids import check_ids

_MOST_UNITS = 2**26
"""Of a stored site; masks of more would be made only to be compared."""
_SHOWN = 200

Ids = Tensor | Sequence[int]
"""Int64 ids, one for each row."""


class Network:
    """A model with turn-over dropout attached. Made by :func:`attach`.

    Attributes:
        model: the user's model, unchanged but for hooks.
        spec: the :class:`~turnover.MaskSpec`.
        sites: canonical names of the sites, in the model's definition order.
        units: mask units by site name; ``None`` until the first forward where neighbours of the
            site do not tell.
    """

    def __init__(self, model: nn.Module, sites: list[ResolvedSite], spec: MaskSpec) -> None:
        self.model = model
        # torch.compile cannot trace the access to its own wrapper.
        self._core: nn.Module = getattr(model, "_orig_mod", model)
        self.spec = spec
        self._sites = {site.name: site for site in sites}
        self.units: dict[str, int | None] = {site.name: site.units for site in sites}
        self.adapter: Adapter = as_batch
        """How batches of whatever trains the model become :class:`turnover.Batch`."""
        self._measured: set[str] = set()
        self._contexts = Contexts()
        self._handles: list[RemovableHandle] = []
        for site in sites:
            # A partial of a method, unlike a closure, follows a deep copy or a pickle of the model.
            hook = partial(self._mask_output, site)
            self._handles.append(site.module.register_forward_hook(hook))

    @property
    def _active(self) -> Binding | None:
        """What this thread has open."""
        return self._contexts.current.binding

    @property
    def sites(self) -> list[str]:
        """Canonical names of the sites, in the model's definition order."""
        return list(self._sites)

    @property
    def mask_units(self) -> int:
        """D: mask units summed over the sites.

        Raises:
            BindingError: a site's width is not known yet (run one forward).
        """
        return sum(self.known_units().values())

    def known_units(self, sites: Sequence[str] | None = None) -> dict[str, int]:
        """Mask units by site name, of some sites or (``None``) of all.

        Raises:
            BindingError: a site's width is not known yet (run one forward).
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
        for pattern in patterns:
            if not any(_matches(name, pattern) for name in self._sites):
                close = difflib.get_close_matches(pattern, self.sites, n=5, cutoff=0.3)
                raise InputError(
                    f"no site of this network matches {pattern!r}; closest: "
                    f"{', '.join(close or self.sites[:10])}"
                )
        return [n for n in self._sites if any(_matches(n, pattern) for pattern in patterns)]

    def exposed(self, ids: Ids | Mapping[str, Ids]) -> Context:
        """Context: row i of every batch runs in the exposed sub-network of ``ids[i]``.

        Args:
            ids: int64 instance ids, shape (rows,). Or a column of ids for each site: names or patterns
                of sites to ids, so that instances have their masks at some sites and their sources or
                annotators at others; score either with ``Influence(..., sites=...)``.

        Raises:
            TypeError: ids are not integers.
            InputError: ids are not one-dimensional, a ghost is trained on, columns that do not name
                every site once or differ in length, or merged LoRA weights at a site.
            BindingError: at the forward, the batch does not have one row for each id.
        """
        return self._context(self._bind(ids, False))

    def hidden(self, ids: Ids | Mapping[str, Ids]) -> Context:
        """Context: row i of every batch runs in the hidden sub-network of ``ids[i]``.

        Arguments and errors as in :meth:`exposed`.
        """
        return self._context(self._bind(ids, True))

    def bind(self, ids: Ids | Mapping[str, Ids], hidden: Tensor) -> Context:
        """Context: a side for each row.

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
        return self._context(self._bind(ids, hidden))

    def without(self, train_id: int, *, sites: Sequence[str] | None = None) -> Context:
        """Context: every row, of batches of any size, runs in the network that never learned an id.

        For a group (a source, an annotator, a time block) this is the network as if the group had not
        been there, ready to predict; of one instance it is what :meth:`hidden` runs.

        Args:
            train_id: id of an instance or a group.
            sites: names or patterns of the sites that have such ids, where others have another column
                (see :meth:`exposed`) and run whole; ``None``: all.

        Raises:
            TypeError: the id is not an integer.
            InputError: no such site.
        """
        chosen = None if sites is None else self.select(sites)
        return self._context(self._bind([train_id], True, every_row=True, sites=chosen))

    def mean(self) -> Context:
        """Context: the whole network, unscaled, for every row (also the default in eval mode)."""
        return self._context(Binding())

    def detach(self) -> None:
        """Remove the hooks; the model is as it was before :func:`attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def audit(
        self,
        batch: Any,
        *,
        max_grad_norm: float | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        adapter: Adapter = as_batch,
    ) -> AuditReport:
        """Which trainable parameters learn the same instance both exposed and hidden (leaks).

        Args:
            batch: a batch as the model takes it; up to 8 of its rows are used, labels are not. A
                model in eval mode is audited in training mode; one in training mode as it is.
            max_grad_norm: the trainer's clipping by global norm (Hugging Face's default is 1.0),
                which carries every instance to every parameter. ``None``, 0 or infinite: no clipping.
            optimizer: the trainer's optimiser, to be checked for updates that are not elementwise.
            adapter: how a batch becomes model inputs.

        Returns:
            :class:`~turnover.dropout.audit.AuditReport`; ``str()`` of it is a table.
        """
        return audit(self, adapter(batch), max_grad_norm=max_grad_norm, optimizer=optimizer)

    def fingerprint(self) -> str:
        """Hash of the masks of all sites (see :meth:`MaskSpec.fingerprint`) and of where they lie.

        Raises:
            BindingError: a site's width is not known yet (run one forward).
        """
        layout = {s.name: (s.axis, s.unit_size) for s in self._sites.values()}
        return _fingerprint(self.spec, self.known_units(), layout)

    def digest(self) -> str:
        """Hash of masks and weights: says whether a result belongs to this network.

        Where the weights are sharded over processes, every process must call it.
        """
        digest = hashlib.blake2b(self.fingerprint().encode(), digest_size=16)
        state = {canonical_name(n): value for n, value in self.model.state_dict().items()}
        for name, value in sorted(state.items()):
            if isinstance(value, Tensor):
                digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}".encode())
                flat = whole(value.detach()).contiguous().cpu().flatten()
                digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Spec, sites and fingerprint as JSON values, to be stored beside the weights."""
        units = self.known_units()
        return {
            "spec": self.spec.to_dict(),
            "sites": [
                {
                    "name": site.name,
                    "axis": site.axis,
                    "unit_size": site.unit_size,
                    "units": units[site.name],
                }
                for site in self._sites.values()
            ],
            "fingerprint": self.fingerprint(),
        }

    @classmethod
    def from_dict(cls, model: nn.Module, values: Mapping[str, Any]) -> Network:
        """Attach to a model as :meth:`to_dict` says, and check that the masks are the same.

        Raises:
            InputError: missing fields, unknown sites, another spec version, or masks whose
                fingerprint differs from the stored one.
        """
        spec, sites, units = _described(values)
        network = attach(model, sites, spec)
        network.units.update(units)
        network._measured.update(units)
        return network

    def check(self, values: Mapping[str, Any]) -> None:
        """Compare with a description, as :meth:`to_dict` makes it. Widths not known yet are not compared.

        Raises:
            InputError: a damaged description, or one of other masks.
        """
        spec, sites, units = _described(values)
        own = [Site(site.name, site.axis, site.unit_size) for site in self._sites.values()]
        widths = {name: known for name, known in self.units.items() if known is not None}
        if (spec, sites) != (self.spec, own) or not widths.items() <= units.items():
            raise InputError(
                f"other masks: those stored are {spec} at {sorted(units.items())}, and this network's "
                f"are {self.spec} at {sorted(self.units.items())}"
            )

    def _bind(
        self,
        ids: Ids | Mapping[str, Ids],
        hidden: bool | Tensor,
        *,
        broadcast: bool = False,
        every_row: bool = False,
        sites: Sequence[str] | None = None,
    ) -> Binding:
        if not self._handles:
            raise BindingError(
                "this network was detached from its model, so nothing would be masked: attach again"
            )
        of_site = self._of_site(ids) if isinstance(ids, Mapping) else {}
        ids = check_ids(ids) if not isinstance(ids, Mapping) else next(iter(of_site.values()))
        if self.model.training and torch.is_grad_enabled():
            for column in of_site.values() if of_site else (ids,):
                _refuse_ghosts(column)
        device = device_of(self.model)
        if isinstance(hidden, Tensor):
            if hidden.dtype != torch.bool or hidden.shape != ids.shape:
                raise InputError(
                    f"hidden must be a bool tensor of shape {tuple(ids.shape)}, got {hidden.dtype} "
                    f"{tuple(hidden.shape)}"
                )
            hidden = hidden.to(device)
        chosen = None if sites is None else frozenset(sites)
        binding = Binding(
            ids.to(device),
            hidden,
            broadcast,
            {site: column.to(device) for site, column in of_site.items()},
            every_row,
            chosen,
        )
        for name, units in self.units.items():
            if units is not None and (chosen is None or name in chosen):
                binding.masks[name] = self._mask(binding, name, units)
        return binding

    def _of_site(self, columns: Mapping[str, Ids]) -> dict[str, Tensor]:
        """The ids of every site, of columns by patterns."""
        of_site: dict[str, Tensor] = {}
        for pattern, column in columns.items():
            ids = check_ids(column)
            for site in self.select([pattern]):
                if site in of_site:
                    raise InputError(f"site {site!r} is named by two columns of ids: give it one")
                of_site[site] = ids
        missing = [site for site in self._sites if site not in of_site]
        if missing:
            raise InputError(f"sites {missing} have no ids: name every site in a column of ids")
        lengths = {len(ids) for ids in of_site.values()}
        if len(lengths) > 1:
            raise InputError(f"columns of ids differ in length: {sorted(lengths)}")
        return of_site

    def _bind_both(self, ids: Tensor, sites: Sequence[str], *, split: str | None = None) -> Binding:
        """The exposed and, behind them, the hidden rows of ids, for many forwards of one row each.

        Args:
            split: site that lets only the exposed rows pass; whoever asks for it makes the hidden ones.
        """
        binding = self._bind(ids, False, broadcast=True, sites=sites)
        binding.factors, binding.split = {}, split
        return binding

    def _context(self, binding: Binding) -> Context:
        masks = binding.ids is not None or binding.probes is not None
        for name, site in self._sites.items():
            if masks and (binding.sites is None or name in binding.sites):
                site.check_runs()
        return Context(self._contexts, binding, self._core)

    def _mask(self, binding: Binding, site: str, units: int) -> Tensor:
        assert binding.ids is not None
        mask = self.spec.exposed(binding.of_site.get(site, binding.ids), site, units)
        if isinstance(binding.hidden, Tensor):
            return mask ^ binding.hidden[:, None]
        return ~mask if binding.hidden else mask

    def _mask_output(self, site: ResolvedSite, module: nn.Module, _args: Any, output: Any) -> Any:
        """The forward hook of a site."""
        binding = self._current(site.name, module)
        if binding is None or (binding.ids is None and binding.probes is None):
            return None
        if binding.sites is not None and site.name not in binding.sites:
            return None
        if isinstance(output, Tensor):
            return self._masked(site, output, binding)
        if type(output) in (tuple, list) and output and isinstance(output[0], Tensor):
            return type(output)([self._masked(site, output[0], binding), *output[1:]])
        raise BindingError(
            f"site {site.name!r}: its output is a {type(output).__name__}, not a tensor or a tuple "
            f"that begins with one; name a module inside it"
        )

    def _current(self, site: str, module: nn.Module) -> Binding | None:
        if not torch.compiler.is_compiling():
            if self._contexts.is_held_elsewhere():
                raise BindingError(
                    f"site {site!r} ran while another thread audits the network, whose weights are "
                    f"random numbers for that time: run the model after the audit"
                )
            if torch._C._current_graph_task_id() != -1:
                return self._contexts.of_recomputation(site, training=self._core.training)
        active = self._active
        if active is not None:
            return active
        if getattr(module, "_is_replica", False) and self._contexts.open:
            return self._contexts.of_replica(site)
        if self._core.training and torch.is_grad_enabled():
            raise BindingError(
                f"site {site!r} ran in training mode without ids: every training batch must run under "
                f"`with net.exposed(ids):` (or `net.mean()` if you do mean the whole network), in the "
                f"thread that runs the model"
            )
        if self._contexts.original_is_bound():
            raise BindingError(
                f"site {site!r} ran in a copy of the model, to which no ids are bound, while a training "
                f"batch is bound to the original: attach the copy (copied = turnover.attach(copy, "
                f"sites, spec)) and open a context of its own, `with copied.exposed(ids):` or "
                f"`with copied.mean():`"
            )
        return None

    def _masked(self, site: ResolvedSite, output: Tensor, binding: Binding) -> Tensor:
        dim = output.dim()
        axis = site.axis % dim if -dim <= site.axis < dim else 0
        size = output.shape[axis] if dim else 0
        if axis == 0 or size == 0 or size % site.unit_size:
            raise BindingError(
                f"site {site.name!r}: output of shape {tuple(output.shape)} has no axis {site.axis} of "
                f"whole units of {site.unit_size} elements beside the batch axis 0"
            )
        units = size // site.unit_size
        if self.units[site.name] != units:
            self._measure(site.name, units)
        elif not torch.compiler.is_compiling():  # where a side effect would cost a recompilation
            self._measured.add(site.name)
        if binding.of_rows:
            self._check_layout(site, output, binding)
        shape = [1] * output.dim()
        shape[axis] = size
        if binding.probes is not None:
            shape[0] = output.shape[0]
            ones = output.new_ones((output.shape[0], units), dtype=torch.float32)
            factor = binding.probe(site.name, ones).to(output.dtype)
        else:
            factor = self._factor(site, units, output, binding)
            splits = binding.split == site.name
            shape[0] = len(factor)
            fits = shape[0] == output.shape[0] or (shape[0] == 1 and binding.every_row)
            if not fits and not (binding.broadcast and output.shape[0] == 1):
                raise BindingError(
                    f"site {site.name!r} saw a batch of {output.shape[0]} rows, but {shape[0]} ids are "
                    f"bound: bind one id for each row on axis 0. Where the model folds another axis into "
                    f"the rows (choices, time, views), repeat the ids alike (ids.repeat_interleave), or "
                    f"attach sites above that{_sequences(site)}"
                )
            if splits:
                binding.whole, binding.exposed = output, output * factor.view(shape)
                return binding.exposed
        if site.unit_size > 1 and binding.probes is not None:
            factor = factor.repeat_interleave(site.unit_size, dim=1)
        return output * factor.view(shape)

    def _check_layout(self, site: ResolvedSite, output: Tensor, binding: Binding) -> None:
        """Refuse an axis 0 that is as long as the batch, but is not the batch."""
        if site.sequence_first and is_ambiguous(output):
            raise BindingError(
                f"site {site.name!r}: its output of shape {tuple(output.shape)} has as many steps as rows, "
                f"and masks are for rows on axis 0{_sequences(site)}"
            )
        if torch.compiler.is_compiling() or binding.ids is None:
            return
        if is_vmapped_over_rows(output, len(binding.ids), self._core):
            raise BindingError(f"site {site.name!r}: {VMAPPED}")

    def _factor(self, site: ResolvedSite, units: int, output: Tensor, binding: Binding) -> Tensor:
        """What the bound rows are multiplied by: (rows, elements of the site's axis)."""
        key = (site.name, output.dtype)
        if binding.factors is not None and key in binding.factors:
            return binding.factors[key]
        mask = binding.masks.get(site.name)
        if mask is None or mask.shape[1] != units:
            mask = self._mask(binding, site.name, units)
            # In a recomputation the context has ended, and nobody would clear them.
            if binding.last_node is None:
                binding.masks[site.name] = mask
        mask = mask.to(output.device)
        factor = mask.to(output.dtype).mul_(self._scale(binding, output))
        if binding.factors is not None and binding.split != site.name:
            both = factor.new_empty((2 * len(factor), units))
            both[: len(factor)] = factor
            torch.mul(~mask, 1 / (1 - self.spec.keep), out=both[len(factor) :])
            factor = both
        if site.unit_size > 1:
            factor = factor.repeat_interleave(site.unit_size, dim=1)
        if binding.factors is not None:
            binding.factors[key] = factor
        return factor

    def _scale(self, binding: Binding, output: Tensor) -> float | Tensor:
        keep = self.spec.keep
        if not isinstance(binding.hidden, Tensor):
            return 1 / (1 - keep) if binding.hidden else 1 / keep
        if keep == 0.5:
            return 2.0
        hidden, exposed = output.new_tensor(1 / (1 - keep)), output.new_tensor(1 / keep)
        return torch.where(binding.hidden.to(output.device)[:, None], hidden, exposed)

    def _measure(self, site: str, units: int) -> None:
        if site in self._measured:
            raise BindingError(
                f"site {site!r} has {self.units[site]} units, but this forward gave {units}: the width "
                f"of a site may not change from one forward (or one use of the module) to the next"
            )
        self._measured.add(site)
        self.units[site] = units

    @contextmanager
    def _probing(
        self,
        sites: Sequence[str] | None = None,
        moved: Mapping[tuple[str, int], Tensor] | None = None,
    ) -> Iterator[dict[str, list[Tensor]]]:
        """Context of the mean network whose masks, all ones, take gradients (rows, units).

        Args:
            moved: other masks (units,) of single runs of a site's module in a forward.
        """
        probes: dict[str, list[Tensor]] = {}
        chosen = None if sites is None else frozenset(sites)
        with self._context(Binding(sites=chosen, probes=probes, moved=moved or {})):
            yield probes


def _fingerprint(spec: MaskSpec, units: dict[str, int], layout: dict[str, tuple[int, int]]) -> str:
    described = json.dumps([spec.fingerprint(units), sorted(layout.items())])
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()


def _short(values: Mapping[str, Any]) -> str:
    text = repr(values)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _described(values: Mapping[str, Any]) -> tuple[MaskSpec, list[Site], dict[str, int]]:
    """Spec, sites and widths of a stored description whose fingerprint is that of its masks."""
    try:
        spec = MaskSpec.from_dict(values["spec"])
        sites = [Site(s["name"], s["axis"], s["unit_size"]) for s in values["sites"]]
        units = {s["name"]: int(s["units"]) for s in values["sites"]}
        layout = {s["name"]: (int(s["axis"]), int(s["unit_size"])) for s in values["sites"]}
        stored = values["fingerprint"]
        if not all(0 < width <= _MOST_UNITS for width in units.values()):
            raise ValueError(f"sites have 1 to {_MOST_UNITS} units")
        if sum(units.values()) > 2 * _MOST_UNITS or len(sites) != len(units):
            raise ValueError("more units than masks are made for, or a site twice")
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"damaged mask description: {error!r} in {_short(values)}") from error
    if _fingerprint(spec, units, layout) != stored:
        raise InputError(
            f"the stored fingerprint {stored} is not that of the stored spec and sites: the mask "
            f"description was changed after training, or is damaged"
        )
    return spec, sites, units


def _sequences(site: ResolvedSite) -> str:
    if site.sequence_first is None:
        return ""
    return (
        f"; {site.sequence_first} has batch_first=False, which puts the batch on axis 1: use "
        f"batch_first=True"
    )


def _refuse_ghosts(ids: Tensor) -> None:
    # Only where it costs no synchronisation: ids come from the data loader on the CPU.
    if ids.device.type == "cpu" and bool((ids < 0).any()):
        raise InputError(
            f"id {int(ids.min())} is a ghost (negative) and may not be trained on: use ids >= 0, "
            f"or model.eval() to evaluate under ghosts"
        )


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def _networks_on(module: nn.Module) -> list[Network]:
    """Networks that have this module as a site."""
    found = []
    for hook in module._forward_hooks.values():
        if isinstance(hook, partial):
            network = getattr(hook.func, "__self__", None)
            if isinstance(network, Network):
                found.append(network)
    return found


def _detach_copies(model: nn.Module) -> None:
    """Remove networks that came with a copy of an attached model, and that nobody used."""
    for module in model.modules():
        for network in _networks_on(module):
            if network._contexts.copied and not network._contexts.used:
                network.detach()


def attach(
    model: nn.Module, sites: SiteLike | Sequence[SiteLike], spec: MaskSpec | None = None
) -> Network:
    """Attach turn-over dropout to a model, by hooks on the outputs of modules.

    Attach before the first call of a compiled model. To a deep copy of an attached model (a target
    network, say) attach anew: its masks are those of the original where sites and spec are the same.

    Args:
        model: any ``torch.nn.Module`` whose batches lie on axis 0.
        sites: what to mask: module names, glob patterns, module types, :class:`Site` objects, or
            presets: ``"head"`` (wide heads), ``"mlp"`` (activations after linear layers), ``"lora"``
            (LoRA rank components), ``"channels"`` (activations after convolutions).
        spec: the masks; default ``MaskSpec()``.

    Returns:
        :class:`Network`.

    Raises:
        InputError: a site that does not exist (the closest names are listed), LoRA weights that are
            merged, adapters of a kind that is not supported, a model that holds both an online network
            and its target, or one that has turn-over dropout attached already.
    """
    check_torch()
    resolved = resolve(model, sites)
    check_targets(model, [site.module for site in resolved])
    _detach_copies(model)
    for site in resolved:
        if _networks_on(site.module):
            raise InputError(
                f"site {site.name!r} has turn-over dropout attached already: call detach() on the "
                f"network that holds it first"
            )
    return Network(model, resolved, spec or MaskSpec())
