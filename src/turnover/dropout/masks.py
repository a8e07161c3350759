"""Deterministic turn-over dropout masks: (seed, site, id) to bits, without models.

A mask is a pure function of the spec, the site's name and width, and the instance id: the same bits on
every device, in every dtype, batch order, process and release. No random generator is involved.

The bits come from SplitMix64 (Steele, Lea and Flood, *Fast Splittable Pseudorandom Number
Generators*, OOPSLA 2014) used as a counter-based generator: word ``w`` of stream ``k`` is
``mix64(k + (w + 1) * gamma)``, and the stream is keyed by absorbing every field the mask depends on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from turnover.errors import InputError
from turnover.ids import check_ids, text_digest

SPEC_VERSION = 1
"""Version of the map from (spec, site, id) to bits; any change of a bit increments it."""

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_PRECISION = 32
"""Bits of a keep probability."""


@dataclass(frozen=True)
class MaskSpec:
    """The rule that assigns units to training instances.

    Args:
        keep: probability in (0, 1) that a unit is kept (belongs to the exposed sub-network), with a
            resolution of 32 bits.
        seed: integer in [0, 2**63). Other seeds give independent masks.
        balanced: keep exactly one unit of every pair (2j, 2j + 1), so that every mask keeps half of the
            units (with an odd width one unit more or less). Requires ``keep=0.5``. ``None``: balanced
            at ``keep=0.5``.

    Raises:
        InputError: ``keep`` outside (0, 1), ``balanced`` at another keep than 0.5, or a bad seed.

    Source: turn-over dropout, Kobayashi et al. 2020 (arXiv 2012.04207), section 3.
    """

    keep: float = 0.5
    seed: int = 0
    balanced: bool | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.keep < 1.0:
            raise InputError(f"keep must lie strictly between 0 and 1, got {self.keep!r}")
        object.__setattr__(self, "keep", float(self.keep))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InputError(f"seed must be an int, got {self.seed!r}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must lie in [0, 2**63), got {self.seed}")
        if self.balanced is None:
            object.__setattr__(self, "balanced", self.keep == 0.5)
        if not isinstance(self.balanced, bool):
            raise InputError(f"balanced must be True, False or None, got {self.balanced!r}")
        if self.balanced and self.keep != 0.5:
            raise InputError(
                f"balanced=True keeps exactly one unit of each pair, which is keep=0.5; got "
                f"keep={self.keep}. Use balanced=False to draw units independently."
            )
        if not 0 < self._threshold < 2**_PRECISION:
            raise InputError(
                f"keep={self.keep} is nearer to 0 or 1 than 2**-{_PRECISION}, the resolution of masks"
            )

    @property
    def _threshold(self) -> int:
        return round(self.keep * (1 << _PRECISION))

    def exposed(self, ids: Tensor | Sequence[int], site: str, units: int) -> Tensor:
        """Units that the instances keep at a site; the hidden sub-networks have the other units.

        Args:
            ids: int64 instance ids, shape (rows,). Negative ids are ghosts.
            site: canonical site name.
            units: number of maskable units of the site, >= 1.

        Returns:
            bool tensor (rows, units) on the device of ``ids``; True = kept.

        Raises:
            TypeError: ids are not integers (float ids collide from 2**24 on).
            InputError: ids are not one-dimensional, or ``units`` < 1.
        """
        words = self._words(ids, site, units)
        return _expand(words, paired=bool(self.balanced))[:, :units]

    def at_sites(
        self, ids: Tensor, units: Mapping[str, int], *, hidden: bool | Tensor = False
    ) -> dict[str, Tensor]:
        """Masks of several sites, made together: on a GPU in as many kernels as those of one.

        Args:
            ids: int64 (rows,).
            units: number of maskable units, >= 1, by site name.
            hidden: whether the units of the hidden sub-networks are wanted; or bool (rows,).

        Returns:
            bool (rows, units) by site name, on the device of ``ids``; views of one tensor.
        """
        layout = _layout_on(ids.device, self, tuple(units.items()))
        streams = _mix64(ids[:, None] ^ layout.keys).index_select(1, layout.site)
        words = _bernoulli_words(streams, layout.number, layout.words, self._threshold)
        masks = _expand(words, paired=bool(self.balanced))
        if isinstance(hidden, Tensor):
            masks = masks ^ hidden[:, None]
        elif hidden:
            masks = ~masks
        parts = torch.split(masks, layout.widths, dim=1)
        return {
            site: part[:, :width] for (site, width), part in zip(units.items(), parts, strict=True)
        }

    def packed(self, ids: Tensor, site: str, units: int) -> Tensor:
        """The draws behind :meth:`exposed`, eight per byte, the lowest bit first.

        An independent draw is one unit, 1 = kept. A balanced draw is a pair of units: 1 keeps unit 2j
        and drops unit 2j + 1, 0 keeps unit 2j + 1 and drops unit 2j.

        Args:
            ids: int64 (rows,).
            site: canonical site name.
            units: number of maskable units of the site, >= 1.

        Returns:
            uint8 (rows, ceil(draws / 8)) with :meth:`draws` bits; later bits are meaningless.
        """
        return self._words(ids, site, units).view(torch.uint8)[:, : -(-self.draws(units) // 8)]

    def draws(self, units: int) -> int:
        """Number of random draws for a site: one per unit, or one per pair if balanced."""
        return (units + 1) // 2 if self.balanced else units

    def _words(self, ids: Tensor | Sequence[int], site: str, units: int) -> Tensor:
        ids = check_ids(ids)
        if units < 1:
            raise InputError(f"site {site!r}: units must be >= 1, got {units}")
        stream = _mix64(ids ^ _signed(self._site_key(site, units)))  # (rows,)
        words = -(-self.draws(units) // 64)
        number = torch.arange(1, words + 1, device=stream.device, dtype=torch.int64)
        return _bernoulli_words(stream[:, None], number, words, self._threshold)

    def _site_key(self, site: str, units: int) -> int:
        name = int.from_bytes(text_digest(site), "little")
        balanced = int(bool(self.balanced))
        key = 0
        for field in (SPEC_VERSION, self.seed, self._threshold, balanced, units, name):
            key = _mix64_int((key ^ field) + _GAMMA)
        return key

    def fingerprint(self, units: dict[str, int]) -> str:
        """Hash of mask bits of these sites, to store with a run and compare on load.

        Args:
            units: number of units by site name.

        Returns:
            32 hexadecimal digits, which change with the spec, a site name, a width or a bit.
        """
        probe = torch.tensor([0, 1, 2, 12345, 2**24 + 1, 2**62 + 7, -1, -1000], device="cpu")
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps(self.to_dict(), sort_keys=True).encode())
        for site in sorted(units):
            digest.update(f"{site}\0{units[site]}\0".encode())
            digest.update(self.exposed(probe, site, units[site]).numpy().tobytes())
        return digest.hexdigest()

    def to_dict(self) -> dict[str, object]:
        """The spec as plain JSON values, with the spec version."""
        return {"spec_version": SPEC_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> MaskSpec:
        """Rebuild a spec from :meth:`to_dict`.

        Raises:
            InputError: unknown or missing fields, or another spec version, which has other masks.
        """
        rest = dict(values)
        version = rest.pop("spec_version", None)
        if version != SPEC_VERSION:
            raise InputError(
                f"mask spec version {version!r} is not supported: this release makes version "
                f"{SPEC_VERSION} masks. Use the release that wrote the run."
            )
        if set(rest) != {"keep", "seed", "balanced"}:
            raise InputError(
                f"mask spec fields must be keep, seed and balanced, got {sorted(map(str, rest))}"
            )
        keep, seed, balanced = rest["keep"], rest["seed"], rest["balanced"]
        if not (
            isinstance(keep, int | float) and isinstance(seed, int) and isinstance(balanced, bool)
        ):
            raise InputError(
                f"mask spec: keep and seed must be numbers, and balanced true or false, got {rest}"
            )
        return cls(float(keep), seed, balanced)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix64_int(value: int) -> int:
    full = (1 << 64) - 1
    value &= full
    value = ((value ^ (value >> 30)) * _MIX_1) & full
    value = ((value ^ (value >> 27)) * _MIX_2) & full
    return value ^ (value >> 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    # torch shifts int64 with sign; the generator is defined on unsigned words.
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _signed(_MIX_1)
    value = (value ^ _shift(value, 27)) * _signed(_MIX_2)
    return value ^ _shift(value, 31)


def _bernoulli_words(
    streams: Tensor, number: Tensor, words: int | Tensor, threshold: int
) -> Tensor:
    """Independent bits with P(1) = threshold / 2**32, 64 to an int64 word: (rows, words).

    Each bit compares a random binary fraction with the threshold, one binary digit (one word for 64
    draws) at a time: from the last digit up, OR where the threshold has a 1 and AND where it has a 0.
    Digits below the threshold's last 1 cannot matter, so keep 0.5 costs one word for 64 draws.

    Args:
        streams: int64 (rows, words), or (rows, 1) for one site.
        number: of each word among those of its site, from 1: int64 (words,).
        words: number of words of the site; int64 (words,) for several sites.
        threshold: of the bits.
    """
    digits = [(threshold >> bit) & 1 for bit in range(_PRECISION)]
    digits = digits[digits.index(1) :]
    counters = number * _signed(_GAMMA)
    bits = _mix64(streams + counters)
    for plane, digit in enumerate(digits[1:], start=1):
        if isinstance(words, Tensor):
            before: int | Tensor = words * _signed(plane * _GAMMA)
        else:
            before = _signed(plane * words * _GAMMA)
        word = _mix64(streams + (counters + before))
        bits = bits | word if digit else bits & word
    return bits


class _Layout(NamedTuple):
    """The words of several sites side by side.

    Attributes:
        keys: of the sites, int64 (sites,).
        site: position of each word's site, int64 (words,).
        number: of each word among those of its site, from 1: int64 (words,).
        words: number of words of its site, int64 (words,).
        widths: bits of each site, those of a last word in part included.
    """

    keys: Tensor
    site: Tensor
    number: Tensor
    words: Tensor
    widths: list[int]


@lru_cache(maxsize=32)  # copying it in every step would keep a GPU waiting
def _layout_on(device: torch.device, spec: MaskSpec, units: tuple[tuple[str, int], ...]) -> _Layout:
    keys = [_signed(spec._site_key(site, width)) for site, width in units]
    counts = [-(-spec.draws(width) // 64) for _, width in units]
    site = [index for index, count in enumerate(counts) for _ in range(count)]
    number = [one for count in counts for one in range(1, count + 1)]
    words = [counts[index] for index in site]

    def moved(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device="cpu").to(device)

    with torch.inference_mode(False):
        widths = [count * (128 if spec.balanced else 64) for count in counts]
        return _Layout(moved(keys), moved(site), moved(number), moved(words), widths)


def _make_table(bits: int, *, paired: bool) -> Tensor:
    values = torch.arange(2**bits, device="cpu")
    rows = (values[:, None] >> values[:bits]) & 1 == 1  # (2**bits, bits)
    if paired:
        rows = torch.stack([rows, ~rows], dim=2).flatten(1)  # (2**bits, 2 * bits)
    # Eight booleans form one int64, so that the look-up moves words rather than bytes.
    return rows.contiguous().view(torch.int64).flatten()


# Not at the first use, which may be in inference mode or under a tracer's fake tensors.
with torch.inference_mode(False):
    _TABLES = {False: _make_table(8, paired=False), True: _make_table(4, paired=True)}


@lru_cache(maxsize=16)
def _table_on(device: torch.device, paired: bool) -> Tensor:
    with torch.inference_mode(False):
        return _TABLES[paired].to(device)


def _expand(words: Tensor, *, paired: bool) -> Tensor:
    """Bits as booleans (rows, 64 * words), or as pairs of a bit and its complement (rows, 128 * words)."""
    on_cpu = words.device.type == "cpu"
    table = _TABLES[paired] if on_cpu else _table_on(words.device, paired)
    bits = 4 if paired else 8
    shifts = torch.arange(0, 64, bits, device=words.device, dtype=torch.int64)
    keys = (words[:, :, None] >> shifts) & (2**bits - 1)  # (rows, words, 64 / bits)
    return table.index_select(0, keys.flatten()).view(keys.shape).flatten(1).view(torch.bool)
