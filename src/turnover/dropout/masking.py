"""The hooks that multiply the outputs of sites by masks, and the contexts that bind ids to them.

The part of a :class:`turnover.Network` that estimators use: ids of one row each, both sides in one
forward, and masks that take gradients.
"""

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
from turnover.dropout.layouts import VMAPPED, is_ambiguous, is_vmapped_over_rows
from turnover.dropout.masks import MaskSpec
from turnover.dropout.modules import device_of
from turnover.dropout.sites import ResolvedSite
from turnover.errors import BindingError, InputError
from turnover.ids import check_ids

Ids = Tensor | Sequence[int]
"""Int64 ids, one for each row."""


class Masking:
    """The masks of a network's sites: forward hooks on them, and what is bound to the hooks.

    ``Network.masking`` in a :class:`turnover.Network`, whose public contexts cover training and prediction;
    estimators open bindings of their own here.

    Attributes:
        spec: the :class:`~turnover.MaskSpec`.
        sites: the sites by canonical name, in the model's definition order.
        units: mask units by site name; ``None`` where the width is unknown before the first forward.
        contexts: the bindings that are open, by thread.
    """

    def __init__(self, model: nn.Module, sites: Sequence[ResolvedSite], spec: MaskSpec) -> None:
        self._model = model
        # torch.compile cannot trace the access to its own wrapper.
        self._core: nn.Module = getattr(model, "_orig_mod", model)
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
        """Sites whose canonical names equal or match (as globs) one of the patterns.

        Raises:
            InputError: a pattern that matches no site; the sites are listed.
        """
        names = list(self.sites)
        for pattern in patterns:
            if not any(_matches(name, pattern) for name in names):
                close = difflib.get_close_matches(pattern, names, n=5, cutoff=0.3)
                raise InputError(
                    f"no site of this network matches {pattern!r}; closest: "
                    f"{', '.join(close or names[:10])}"
                )
        return [name for name in names if any(_matches(name, pattern) for pattern in patterns)]

    def fix_units(self, units: Mapping[str, int]) -> None:
        """Take the widths of sites as measured: a forward that gives others is refused."""
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
        """Bind a side, or one for each row, to the ids of a batch. Nothing is masked until :meth:`open`.

        Args:
            ids: int64 (rows,), or such ids by names or patterns of sites.
            hidden: True for the hidden side, False for the exposed one, or bool (rows,).
            broadcast: let one row of a batch become as many rows as there are ids.
            every_row: the one id is that of every row, however many there are.
            sites: masked sites; at others the network runs whole. ``None``: all.

        Raises:
            BindingError: the hooks were removed.
            InputError: as in :meth:`turnover.Network.exposed`.
        """
        if not self._handles:
            raise BindingError(
                "this network was detached from its model, so nothing would be masked: attach again"
            )
        of_site = self._ids_by_site(ids) if isinstance(ids, Mapping) else {}
        ids = check_ids(ids) if not isinstance(ids, Mapping) else next(iter(of_site.values()))
        if self._model.training and torch.is_grad_enabled():
            for column in of_site.values() if of_site else (ids,):
                _refuse_ghosts(column)
        device = device_of(self._model)
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

    def _ids_by_site(self, columns: Mapping[str, Ids]) -> dict[str, Tensor]:
        """The ids of every site, of columns by patterns."""
        of_site: dict[str, Tensor] = {}
        for pattern, column in columns.items():
            ids = check_ids(column)
            for site in self.select([pattern]):
                if site in of_site:
                    raise InputError(f"site {site!r} is named by two columns of ids: give it one")
                of_site[site] = ids
        missing = [site for site in self.sites if site not in of_site]
        if missing:
            raise InputError(f"sites {missing} have no ids: name every site in a column of ids")
        lengths = {len(ids) for ids in of_site.values()}
        if len(lengths) > 1:
            raise InputError(f"columns of ids differ in length: {sorted(lengths)}")
        return of_site

    def bind_both(self, ids: Tensor, sites: Sequence[str], *, split: str | None = None) -> Binding:
        """Bind the exposed rows of ids and, after them, the hidden ones, for forwards of one row each.

        Args:
            ids: int64 (ids,).
            sites: masked sites.
            split: site whose output holds only the exposed rows; the caller computes the hidden ones.
        """
        binding = self.bind(ids, False, broadcast=True, sites=sites)
        binding.factors, binding.split = {}, split
        return binding

    def open(self, binding: Binding) -> Context:
        """Context in which the sites follow a binding, in the thread that enters it.

        Raises:
            InputError: merged LoRA weights at a site.
        """
        masks = binding.ids is not None or binding.probes is not None
        for name, site in self.sites.items():
            if masks and (binding.sites is None or name in binding.sites):
                site.check_runs()
        return Context(self.contexts, binding, self._core)

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
            if self.contexts.is_held_elsewhere():
                raise BindingError(
                    f"site {site!r} ran while another thread audits the network, whose weights are "
                    f"random numbers for that time: run the model after the audit"
                )
            if torch._C._current_graph_task_id() != -1:
                return self.contexts.of_recomputation(site, training=self._core.training)
        active = self.active
        if active is not None:
            return active
        if getattr(module, "_is_replica", False) and self.contexts.open:
            return self.contexts.of_replica(site)
        if self._core.training and torch.is_grad_enabled():
            raise BindingError(
                f"site {site!r} ran in training mode without ids: every training batch must run under "
                f"`with net.exposed(ids):` (or `net.mean()` if you do mean the whole network), in the "
                f"thread that runs the model"
            )
        if self.contexts.original_is_bound():
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
    def probing(
        self,
        sites: Sequence[str] | None = None,
        moved: Mapping[tuple[str, int], Tensor] | None = None,
    ) -> Iterator[dict[str, list[Tensor]]]:
        """Context of the mean network whose masks, all ones, take gradients (rows, units).

        Yields the masks by site, one for each run of the site's module in a forward.

        Args:
            sites: those that are masked; ``None``: all.
            moved: other masks (units,) of single runs of a site's module in a forward.
        """
        probes: dict[str, list[Tensor]] = {}
        chosen = None if sites is None else frozenset(sites)
        with self.open(Binding(sites=chosen, probes=probes, moved=moved or {})):
            yield probes


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
