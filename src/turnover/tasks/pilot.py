"""Pilots: a training on part of the data, to predict the noise of influence scores of the whole.

docs/planning.md has the measurements behind it.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from turnover.data.base import Data
from turnover.data.encoded import Encoded, batches
from turnover.dropout.masks import MaskSpec
from turnover.dropout.modules import choose_device, random_state_kept
from turnover.dropout.network import Network, attach
from turnover.errors import InputError, check_whole
from turnover.influence.estimator import Influence
from turnover.io.files import writing_temporary
from turnover.models.pipeline import build
from turnover.objectives import margin
from turnover.tasks.class_weights import class_weights
from turnover.tasks.explain import SIGNIFICANT_Q
from turnover.tasks.fit import FitConfig, fixed_rows
from turnover.tasks.rehearsal import rehearse
from turnover.tasks.sites import choose_sites
from turnover.tasks.training import TrainingConfig, train

Floats = NDArray[np.float64]

PILOT_ROWS = 800
_MIN_PILOT_ROWS = 50
_TARGETS = 200
_BATCH = 32
_GHOSTS = 1000
_SITE_ROWS, _SITE_GHOSTS = 64, 200
_GRID, _BINS, _ROUNDS = 80, 1500, 300
_SMALLEST = 0.1
"""Smallest influence above 0 that is told apart, in noise floors."""


@dataclass(frozen=True)
class Setting:
    """Training ids, mask units and averaged networks: they decide the signal to noise of scores."""

    instances: int
    units: int
    seeds: int = 1

    def __post_init__(self) -> None:
        for name in ("instances", "units", "seeds"):
            check_whole(name, getattr(self, name), 1)

    def over(self, other: Setting) -> float:
        """Return the signal to noise of this setting over that of another one."""
        ours, theirs = self.seeds * self.units, other.seeds * other.units
        return math.sqrt((ours * other.instances) / (theirs * self.instances))


@dataclass(frozen=True)
class Prediction:
    """Expected scores in a setting, in nats of margin.

    Attributes:
        noise_floor: standard deviation of a ghost's score.
        signal: standard deviation of influences without noise.
        top_size: size of the ``top``-th strongest influence on a target, without noise.
        top_z: the same in noise floors.
        significant: expected instances with q <= 0.05 for each target.
    """

    noise_floor: float
    signal: float
    signal_to_noise: float
    top: int
    top_size: float
    top_z: float
    significant: float


@dataclass(frozen=True)
class Pilot:
    """Measurements of a pilot training, and predictions for other settings.

    Attributes:
        rows: training rows.
        targets: held-out rows that were scored.
        noise_floor: ghosts' standard deviation (root mean square over targets), nats of margin.
        signal: standard deviation of the scores beyond that of ghosts, nats of margin; 0 if chance
            explains it.
        sizes: float64, ascending from 0: absolute influences without noise, in noise floors.
        shares: float64, of the shape of ``sizes``: their shares of all pairs.
    """

    setting: Setting
    rows: int
    targets: int
    sites: tuple[str, ...]
    noise_floor: float
    signal: float
    sizes: Floats
    shares: Floats
    seconds: float

    def predict(self, setting: Setting, top: int) -> Prediction:
        """Predict the scores in a setting."""
        _check_top(top, setting.instances)
        over = setting.over(self.setting)
        units = setting.units * setting.seeds / (self.setting.units * self.setting.seeds)
        floor = self.noise_floor / math.sqrt(units)
        ratio = self.signal / self.noise_floor * over
        top_z = self._strongest(top / setting.instances) * over
        return Prediction(
            noise_floor=floor,
            signal=ratio * floor,
            signal_to_noise=ratio,
            top=top,
            top_size=top_z * floor,
            top_z=top_z,
            significant=self._significant(over, setting.instances),
        )

    def needed_units(self, setting: Setting, top: int) -> int | None:
        """Return the mask units, at the setting's seeds, that give the ``top`` strongest a q <= 0.05.

        ``None`` if the pilot saw no influence beyond chance at that rank.
        """
        return self._needed(setting, top, setting.units)

    def needed_seeds(self, setting: Setting, top: int) -> int | None:
        """Return the networks, at the setting's units, that do; see :meth:`needed_units`."""
        return self._needed(setting, top, setting.seeds)

    def _needed(self, setting: Setting, top: int, now: int) -> int | None:
        needed_z = needed_z_of(top, setting.instances)
        reached = self._strongest(top / setting.instances) * setting.over(self.setting)
        if reached == 0:
            return None
        needed = now * (needed_z / reached) ** 2
        return max(1, math.ceil(needed * (1 - 1e-12)))  # a rounding error does not add one

    def _strongest(self, share: float) -> float:
        """Return the size that this share of the influences reaches, in noise floors of the pilot."""
        reaching = np.cumsum(self.shares[::-1])[::-1][1:]  # the first size is 0
        if not len(reaching) or share > reaching[0]:
            return 0.0
        logarithms = -np.log(np.maximum(reaching, np.finfo(np.float64).tiny))
        return float(np.exp(np.interp(-math.log(share), logarithms, np.log(self.sizes[1:]))))

    def _significant(self, over: float, instances: int) -> float:
        """Count the ids that Benjamini-Hochberg finds among these influences with Gaussian noise."""
        z = np.linspace(0.5, 40, 8000)
        found = np.zeros_like(z)
        for size, share in zip(self.sizes * over, self.shares, strict=True):
            found += share * (_survival(z - size) + _survival(z + size))
        allowed = (2 * _survival(z) <= SIGNIFICANT_Q * found) & (found * instances >= 0.5)
        return float(instances * found[allowed][0]) if allowed.any() else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements as JSON values."""
        return {
            **asdict(self.setting),
            "rows": self.rows,
            "targets": self.targets,
            "sites": list(self.sites),
            "noise_floor": self.noise_floor,
            "signal": self.signal,
            "signal_to_noise": self.signal / self.noise_floor,
            "seconds": self.seconds,
        }


def needed_z_of(top: int, instances: int) -> float:
    """Return the z that gives the ``top``-th of the instances q <= 0.05 (Gaussian, two-sided)."""
    _check_top(top, instances)
    return -NormalDist().inv_cdf(SIGNIFICANT_Q * top / instances / 2)


def _check_top(top: int, instances: int) -> None:
    if not 1 <= top <= instances:
        raise InputError(f"top must be between 1 and the {instances} instances, got {top}")


def run_pilot(
    config: FitConfig,
    train_data: Data,
    test_data: Data,
    rows: int = PILOT_ROWS,
    device: str | torch.device = "auto",
) -> Pilot:
    """Train on part of the data as the whole would be trained, and measure the scores.

    Encoder, width, learning rates, epochs and the number of optimizer steps are those of the planned
    training; a step has fewer rows. Rows of one id stay together, so ``rows`` is approximate. ``device``:
    as of :func:`turnover.tasks.fit.fit`.
    """
    chosen = choose_device(device)
    if rows < _MIN_PILOT_ROWS:
        raise InputError(f"a pilot needs {_MIN_PILOT_ROWS} rows or more, got {rows} (--pilot-rows)")
    start = time.perf_counter()
    part = _part(train_data, rows)
    with writing_temporary() as place:
        temporary = tempfile.TemporaryDirectory(dir=place)
    with random_state_kept(chosen), temporary as folder:
        torch.manual_seed(config.training.seed)
        pipeline, model = build(config.classifier, train_data)
        model.to(chosen)
        training, test, bfloat16 = rehearse(
            pipeline, model, config.sites, config.masks, part, test_data, Path(folder)
        )
        pipeline.prepare(model, training)
        network = attach(model, config.sites, config.masks)
        train(
            model,
            training,
            pilot_training(config.training, len(train_data), len(part)),
            network.exposed,
            name="the pilot",
            checkpoint=Path(folder) / "pilot.checkpoint",
            identity="pilot",
            bfloat16=bfloat16,
            weights=class_weights(config.training.class_weights, train_data),
        )
    sites = _scored_sites(network, training)
    targets = fixed_rows(len(test), _TARGETS)
    influence = Influence(network, margin, "linear", ghosts=_GHOSTS, sites=sites, progress=True)
    ids = torch.unique(part.ids)
    result = influence.estimate(batches(test, targets, _BATCH), ids)
    setting = Setting(len(ids), mask_units(config))
    elapsed = time.perf_counter() - start
    floor = result.noise_floor.astype(np.float64)
    return measure(result.z, floor, setting, rows=len(part), sites=sites, seconds=elapsed)


def measure(
    z: NDArray[np.floating],
    noise_floor: NDArray[np.floating],
    setting: Setting,
    *,
    rows: int,
    sites: tuple[str, ...] = (),
    seconds: float = 0.0,
) -> Pilot:
    """Make a pilot of scores in noise floors, (targets, ids), and the floors (targets,), nats of margin."""
    squares = z.astype(np.float64) ** 2
    floors = noise_floor.astype(np.float64) ** 2
    noise = float(floors.mean()) ** 0.5
    if noise == 0:
        raise InputError("the pilot's scores are all 0: its network did not learn anything")
    # Ids are independent, targets are not: they share the masks of the ids. The noise floors are as
    # uncertain as the mean over ids: together some 1.4 standard errors.
    beyond = ((squares - 1) * floors[:, None]).mean(axis=0)
    signal, error = float(beyond.mean()), float(beyond.std(ddof=1)) / math.sqrt(len(beyond))
    if signal <= 3 * error:
        signal, sizes, shares = 0.0, np.zeros(1), np.ones(1)
    else:
        sizes, shares = without_noise(np.sqrt(squares))
    return Pilot(setting, rows, len(z), sites, noise, math.sqrt(signal), sizes, shares, seconds)


def pilot_training(config: TrainingConfig, rows: int, pilot_rows: int) -> TrainingConfig:
    """Return the training of a pilot: as many epochs and steps on some of the rows, fewer in a step.

    With Adam, steps and learning rates decide how far the weights move, and how often an instance is
    seen decides its share of that. If even single rows make too few steps, the learning rates grow with
    the square root of the missing factor (Malladi et al. 2022), which keeps the noise.
    """
    size = max(1, round(config.batch_size * pilot_rows / rows))
    steps, pilot_steps = -(-rows // config.batch_size), -(-pilot_rows // size)
    factor = math.sqrt(steps / pilot_steps)
    return replace(
        config,
        batch_size=size,
        learning_rate=config.learning_rate * factor,
        head_learning_rate=config.head_learning_rate * factor,
    )


def without_noise(z: Floats) -> tuple[Floats, Floats]:
    """Estimate the absolute influences behind noisy scores: sizes, and the share of the pairs of each.

    It is the maximum likelihood mixture (Kiefer and Wolfowitz 1956) of symmetric influences under
    Gaussian noise of 1, by expectation-maximization: the largest scores are large by chance too, the
    largest of these sizes are not.

    Sizes and scores are in noise floors; sizes ascend from 0, and shares have the sum 1.
    """
    largest = float(z.max())
    sizes = np.concatenate([[0.0], np.geomspace(_SMALLEST, max(largest, 4.0), _GRID)])
    counts, edges = np.histogram(z, np.linspace(0, largest * (1 + 1e-9) + 1e-9, _BINS))
    centers = (edges[1:] + edges[:-1])[:, None] / 2
    likelihood = np.exp(-((centers - sizes) ** 2) / 2) + np.exp(-((centers + sizes) ** 2) / 2)
    filled = counts > 0
    weights, likelihood = counts[filled] / counts.sum(), likelihood[filled]
    shares = np.full(len(sizes), 1 / len(sizes))
    for _ in range(_ROUNDS):
        shares = shares * (likelihood.T @ (weights / (likelihood @ shares)))
    return sizes, shares / shares.sum()


def _survival(z: Floats) -> Floats:
    """Probability that a standard normal is at least z."""
    return np.asarray(torch.special.ndtr(torch.from_numpy(-z)).numpy())


def mask_units(config: FitConfig) -> int:
    """Return the mask units of the planned training."""
    if "head" not in config.classifier.sites:
        raise InputError(
            f"planning is for classifiers with a wide head, and {config.classifier.model} from scratch has "
            f"none: give --weights, or a Hugging Face encoder of images"
        )
    return config.classifier.head_units


def _part(data: Data, wanted: int) -> Data:
    """Take about so many rows, with all rows of an id together.

    A mask decides which ids are taken, so that the order of the data changes nothing.
    """
    bits = MaskSpec(balanced=False).exposed(data.ids, "pilot", 64)
    weights = 2.0 ** -torch.arange(1, 65, dtype=torch.float64)
    order = torch.argsort(bits.double() @ weights, stable=True).tolist()
    last = data.ids[order[min(wanted, len(order)) - 1]]
    rows = set(order[:wanted]) | set(torch.nonzero(data.ids == last).flatten().tolist())
    part = data.take(sorted(rows))
    missing = set(range(len(data.classes))) - set(part.labels)
    if missing:
        raise InputError(
            f"the pilot's {len(part)} rows have none of class {data.classes[min(missing)]!r}: give it "
            f"more (--pilot-rows)"
        )
    return part


def _scored_sites(network: Network, training: Encoded) -> tuple[str, ...]:
    """Choose the sites that `turnover influence` would score, by a few self-influences."""
    if len(network.sites) == 1:
        return tuple(network.sites)
    first_rows = {int(key): row for row, key in enumerate(training.ids.tolist())}
    rows = [list(first_rows.values())[i] for i in fixed_rows(len(first_rows), _SITE_ROWS)]
    sample = batches(training, rows, _BATCH)
    by_site = {}
    for site in network.sites:
        influence = Influence(network, margin, "linear", ghosts=_SITE_GHOSTS, sites=[site])
        own = influence.self_influence(sample)
        noise = float((own.noise_floor.astype(np.float64) ** 2).mean()) ** 0.5
        by_site[site] = {"signal": float(own.scores.mean()), "noise": noise}
    return tuple(choose_sites(by_site))
