"""The forward hooks that multiply the outputs of sites by masks, and what estimators bind to them."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from turnover.dropout.contexts import Binding, Context, Contexts
from turnover.dropout.masks import MaskSpec
from turnover.dropout.modules import device_of, uncompiled
from turnover.dropout.sites import ResolvedSite
from turnover.dropout.torch_private import in_backward, is_vmapped_over_rows
from turnover.errors import BindingError, InputError
from turnover.ids import check_ids

Ids = Tensor | Sequence[int]
"""Int64 ids, one for each row."""


class Masking:
    """The masks of a network's sites: forward hooks, and the bindings that they follow.

    It is ``network.masking`` of a :class:`turnover.Network`, whose contexts cover training and prediction.
    Estimators open other bindings here: single sites, both sides in one forward, masks with gradients.

    Attributes:
        spec: the :class:`~turnover.MaskSpec`.
        sites: the sites by canonical name, in the model's definition order.
        units: mask units by site name; ``None`` where unknown before the first forward.
        contexts: the open bindings of all threads.
    """

    def __init__(self, model: nn.Module, sites: Sequence[ResolvedSite], spec: MaskSpec) -> None:
        self._model = model
        # torch.compile cannot trace the access to its own wrapper.
        self._core = uncompiled(model)
        self.spec = spec
        self.sites = {site.name: site for site in sites}
        self.units: dict[str, int | None] = {site.name: site.units for site in sites}
        self.contexts = Contexts()
        self._measured: set[str] = set()
        self._handles: list[RemovableHandle] = []
        for site in sites:
            # A partial of a method, unlike a closure, follows a deep copy or a pickle of the model.
            hook = partial(self._mask_output, site)
            self._handles.append(site.module.register_forward_hook(hook))

    @property
    def active(self) -> Binding | None:
        """The binding that is open in this thread."""
        return self.contexts.current.binding

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def select(self, patterns: Sequence[str]) -> list[str]:
        """Names of the sites that equal or match (as globs) one of the patterns."""
        names = list(self.sites)
        found: set[str] = set()
        for pattern in patterns:
            matching = {n for n in names if n == pattern or fnmatch.fnmatchcase(n, pattern)}
            if not matching:
                close = difflib.get_close_matches(pattern, names, n=5, cutoff=0.3)
                raise InputError(
                    f"no site of this network matches {pattern!r}; closest: "
                    f"{', '.join(close or names[:10])}"
                )
            found |= matching
        return [name for name in names if name in found]

    def fix_units(self, units: Mapping[str, int]) -> None:
        """Set the widths of sites; a forward that gives other widths raises an error."""
        self.units.update(units)
        self._measured.update(units)

    def bind(
        self,
        ids: Ids | Mapping[str, Ids],
        hidden: bool | Tensor,
        *,
        broadcast: bool = False,
        every_row: bool = False,
        sites: Sequence[str] | None = None,
    ) -> Binding:
        """Bind the rows of a batch to ids and sides; :meth:`open` makes it effective.

        Args:
            ids: int64 (rows,), or such ids by names or patterns of sites.
            hidden: True for the hidden side, False for the exposed one; or bool (rows,).
            broadcast: let one row of a batch become as many rows as there are ids.
            every_row: the single id applies to every row of batches of any size.
            sites: masked sites; at others the network runs whole. ``None``: all.
        """
        if not self._handles:
            raise BindingError(
                "this network was detached from its model, so nothing would be masked: attach again"
            )
        site_ids = self._ids_by_site(ids) if isinstance(ids, Mapping) else {}
        ids = check_ids(ids) if not isinstance(ids, Mapping) else next(iter(site_ids.values()))
        if self._model.training and torch.is_grad_enabled():
            for column in site_ids.values() or [ids]:
                _refuse_ghosts(column)
        device = device_of(self._model)
        if isinstance(hidden, Tensor):
            if hidden.dtype != torch.bool or hidden.shape != ids.shape:
                raise InputError(
                    f"hidden must be a bool tensor of shape {tuple(ids.shape)}, got {hidden.dtype} "
                    f"{tuple(hidden.shape)}"
                )
            hidden = _on(device, hidden)
        binding = Binding(
            _on(device, ids),
            hidden,
            broadcast,
            {site: _on(device, column) for site, column in site_ids.items()},
            every_row,
            None if sites is None else frozenset(sites),
        )
        covered = {n: units for n, units in self.units.items() if units and binding.covers(n)}
        binding.masks.update(self._masks(binding, covered))
        return binding

    def bind_both(self, ids: Tensor, sites: Sequence[str], *, split: str | None = None) -> Binding:
        """Bind the exposed rows of ids and, after them, the hidden ones, for forwards of one row.

        Args:
            ids: int64 (ids,).
            sites: masked sites.
            split: site whose output holds the exposed rows alone; the caller adds the hidden rows.
        """
        binding = self.bind(ids, False, broadcast=True, sites=sites)
        binding.factors, binding.split = {}, split
        return binding

    def open(self, binding: Binding) -> Context:
        """Context in which the sites follow a binding, in the thread that enters it."""
        if binding.ids is not None or binding.probes is not None:
            for name, site in self.sites.items():
                if binding.covers(name):
                    site.check_runs()
        return Context(self.contexts, binding, self._core)

    @contextmanager
    def probing(
        self,
        sites: Sequence[str] | None = None,
        moved: Mapping[tuple[str, int], Tensor] | None = None,
    ) -> Iterator[dict[str, list[Tensor]]]:
        """Context of the mean network whose masks, all ones, require gradients.

        Args:
            sites: masked sites; ``None``: all.
            moved: other masks (units,) for single runs of a site's module in a forward.

        Yields:
            masks (rows, units) by site, one for each run of the site's module; forwards fill it.
        """
        probes: dict[str, list[Tensor]] = {}
        chosen = None if sites is None else frozenset(sites)
        with self.open(Binding(sites=chosen, probes=probes, moved=moved or {})):
            yield probes

    def _ids_by_site(self, columns: Mapping[str, Ids]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for pattern, column in columns.items():
            ids = check_ids(column)
            for site in self.select([pattern]):
                if site in found:
                    raise InputError(f"site {site!r} is named by two columns of ids: give it one")
                found[site] = ids
        missing = [site for site in self.sites if site not in found]
        if missing:
            raise InputError(f"sites {missing} have no ids: name every site in a column of ids")
        lengths = {len(ids) for ids in found.values()}
        if len(lengths) > 1:
            raise InputError(f"columns of ids differ in length: {sorted(lengths)}")
        return found

    def _masks(self, binding: Binding, units: Mapping[str, int]) -> dict[str, Tensor]:
        assert binding.ids is not None
        if binding.site_ids or binding.ids.device.type == "cpu" or not units:
            return {name: self._mask(binding, name, width) for name, width in units.items()}
        return self.spec.at_sites(binding.ids, units, hidden=binding.hidden)

    def _mask(self, binding: Binding, site: str, units: int) -> Tensor:
        assert binding.ids is not None
        mask = self.spec.exposed(binding.site_ids.get(site, binding.ids), site, units)
        if isinstance(binding.hidden, Tensor):
            return mask ^ binding.hidden[:, None]
        return ~mask if binding.hidden else mask

    def _mask_output(self, site: ResolvedSite, module: nn.Module, _args: Any, output: Any) -> Any:
        """The forward hook of a site."""
        binding = self._current(site.name, module)
        if binding is None or (binding.ids is None and binding.probes is None):
            return None
        if not binding.covers(site.name):
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
        """The binding for a run of a site; ``None``: the mean network."""
        if not torch.compiler.is_compiling():
            if self.contexts.is_held_elsewhere():
                raise BindingError(
                    f"site {site!r} ran while another thread audits the network with random weights: "
                    f"run the model after the audit"
                )
            if in_backward():
                return self.contexts.of_recomputation(site, training=self._core.training)
        active = self.active
        if active is not None:
            return active
        if getattr(module, "_is_replica", False) and self.contexts.open:
            return self.contexts.of_replica(site)
        if self._core.training and torch.is_grad_enabled():
            raise BindingError(
                f"site {site!r} ran in training mode without ids: every training batch must run under "
                f"`with net.exposed(ids):` (or `net.mean()` for the whole network), in the thread that "
                f"runs the model"
            )
        if self.contexts.original_is_bound():
            raise BindingError(
                f"site {site!r} ran in a copy of the model without ids, while a training batch is bound "
                f"to the original: attach the copy (copied = turnover.attach(copy, sites, spec)) and open "
                f"a context of its own, `with copied.exposed(ids):` or `with copied.mean():`"
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
        if binding.by_row:
            self._check_batch_axis(site, output, binding)
        if binding.probes is not None:
            ones = output.new_ones((output.shape[0], units), dtype=torch.float32)
            factor = binding.probe(site.name, ones).to(output.dtype)
            if site.unit_size > 1:
                factor = factor.repeat_interleave(site.unit_size, dim=1)
        else:
            factor = self._factor(site, units, output, binding)
            fits = len(factor) == len(output) or (len(factor) == 1 and binding.every_row)
            if not fits and not (binding.broadcast and len(output) == 1):
                raise BindingError(
                    f"site {site.name!r} saw a batch of {len(output)} rows, but {len(factor)} ids are "
                    f"bound: bind one id for each row on axis 0. Where the model folds another axis into "
                    f"the rows (choices, time, views), repeat the ids alike (ids.repeat_interleave), or "
                    f"attach sites above that{_batch_first_fix(site)}"
                )
        shape = [1] * dim
        shape[0], shape[axis] = len(factor), size
        masked = output * factor.view(shape)
        if binding.split == site.name:
            binding.whole, binding.exposed = output, masked
        return masked

    def _check_batch_axis(self, site: ResolvedSite, output: Tensor, binding: Binding) -> None:
        """Refuse an axis 0 that is as long as the batch, but is not the batch."""
        if site.sequence_first and output.dim() > 2 and output.shape[0] == output.shape[1] > 1:
            raise BindingError(
                f"site {site.name!r}: its output of shape {tuple(output.shape)} has as many steps as rows, "
                f"and masks are for rows on axis 0{_batch_first_fix(site)}"
            )
        if torch.compiler.is_compiling() or binding.ids is None:
            return
        if is_vmapped_over_rows(output, len(binding.ids), self._core.parameters()):
            raise BindingError(
                f"site {site.name!r}: the model runs in torch.func.vmap, within which a row has no place "
                f"in the batch: open a context for each row outside of vmap, or loop over the rows"
            )

    def _factor(self, site: ResolvedSite, units: int, output: Tensor, binding: Binding) -> Tensor:
        """The scaled masks of the bound rows: (rows, elements of the site's axis)."""
        key = (site.name, output.dtype)
        if binding.factors is not None and key in binding.factors:
            return binding.factors[key]
        mask = binding.masks.get(site.name)
        if mask is None or mask.shape[1] != units:
            mask = self._mask(binding, site.name, units)
            # In a recomputation the context has ended, and nothing would clear the mask.
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
        hidden, exposed = output.new_full((), 1 / (1 - keep)), output.new_full((), 1 / keep)
        return torch.where(binding.hidden.to(output.device)[:, None], hidden, exposed)

    def _measure(self, site: str, units: int) -> None:
        if site in self._measured:
            raise BindingError(
                f"site {site!r} has {self.units[site]} units, but this forward gave {units}: the width "
                f"of a site may not change from one forward (or one use of the module) to the next"
            )
        self.fix_units({site: units})


def _on(device: torch.device, rows: Tensor) -> Tensor:
    """Ids or sides of rows on the model's device, to which a step does not wait for them to arrive."""
    if device.type == "cpu" or rows.device.type != "cpu":
        return rows.to(device)
    # From pinned memory it would be copied later, when the data loader may have other ids there.
    rows = rows.clone() if rows.is_pinned() else rows
    return rows.to(device, non_blocking=True)


def _batch_first_fix(site: ResolvedSite) -> str:
    if site.sequence_first is None:
        return ""
    return (
        f"; {site.sequence_first} has batch_first=False, which puts the batch on axis 1: use "
        f"batch_first=True"
    )


def _refuse_ghosts(ids: Tensor) -> None:
    # Only where it costs no synchronization: ids come from the data loader on the CPU.
    if ids.device.type == "cpu" and bool((ids < 0).any()):
        raise InputError(
            f"id {int(ids.min())} is a ghost (negative) and may not be trained on: use ids >= 0, "
            f"or model.eval() to evaluate under ghosts"
        )
