"""How much signal the sites of a run carry, and which of them are scored."""

from __future__ import annotations

import numpy as np
import torch

from turnover.data.encoded import Encoded, batches
from turnover.dropout.modules import device_of
from turnover.dropout.network import Network
from turnover.ids import ghost_ids
from turnover.influence.gradients import mask_gradients
from turnover.influence.halving import Halving
from turnover.influence.linear import LinearScorer
from turnover.io.bars import slowly
from turnover.objectives import Objective
from turnover.results.calibration import noise_floor
from turnover.tasks.score_trained import BATCH

_ROWS = 256


def choose_sites(by_site: dict[str, dict[str, float]]) -> list[str]:
    """Choose the sites that together have the highest signal over noise.

    Signals add up and so do noise variances, so a site is added while it raises the ratio. The targets are
    not used, so p-values stay valid.

    Args:
        by_site: ``signal`` and ``noise`` of every site, in nats.
    """
    ranked = sorted(by_site, key=lambda s: -by_site[s]["signal"] / max(by_site[s]["noise"], 1e-12))
    best, chosen = -np.inf, ranked[:1]
    for count in range(1, len(ranked) + 1):
        sites = ranked[:count]
        signal = sum(by_site[site]["signal"] for site in sites)
        noise = sum(by_site[site]["noise"] ** 2 for site in sites) ** 0.5
        ratio = signal / max(noise, 1e-12)
        if ratio > best:
            best, chosen = ratio, sites
    return [site for site in by_site if site in chosen]


def signals(
    network: Network, objective: Objective, training: Encoded
) -> dict[str, dict[str, float]]:
    """Signal and noise of each site, on some training rows.

    ``signal``: mean linear self-influence through the site alone, in nats. ``noise``: its ghosts'
    standard deviation (root mean square over instances). ``z``: the mean of signal over noise.
    """
    rows = torch.randperm(len(training), generator=torch.Generator().manual_seed(1))[:_ROWS]
    signal: dict[str, list[float]] = {site: [] for site in network.sites}
    ratio: dict[str, list[float]] = {site: [] for site in network.sites}
    variance: dict[str, list[float]] = {site: [] for site in network.sites}
    units_of, halving = network.known_units(), Halving()
    for batch in slowly(batches(training, rows.tolist(), BATCH), "signal of the sites"):
        moved = batch.to(device_of(network.model))
        gradients = mask_gradients(network, objective, moved, halving=halving)
        assert batch.ids is not None
        start = 0
        for site, units in units_of.items():
            part = gradients[:, start : start + units]
            start += units
            scorer = LinearScorer(part, network.spec, {site: units})
            own = scorer.own(batch.ids).cpu().numpy()
            noise = scorer.scores(ghost_ids(200)).cpu().numpy()
            signal[site] += own.tolist()
            floor = noise_floor(noise)
            ratio[site] += floor.standardize(own[:, None])[:, 0].tolist()
            variance[site] += (floor.sd**2).tolist()
    return {
        site: {
            "units": units_of[site],
            "signal": float(np.mean(signal[site])),
            "noise": float(np.mean(variance[site]) ** 0.5),
            "z": float(np.mean(ratio[site])),
        }
        for site in network.sites
    }
