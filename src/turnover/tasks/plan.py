"""Plan a training: predict the signal to noise of single influence scores, and what would improve it.

Signal to noise grows like sqrt(networks x mask units / training instances). A pilot training on part of
the data gives this law a scale (docs/planning.md has the measurements behind both).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from turnover.data.base import Data
from turnover.tasks.fit import FitConfig
from turnover.tasks.pilot import Pilot, Prediction, Setting, mask_units, needed_z_of, run_pilot


@dataclass(frozen=True)
class Option:
    """A setting, its signal to noise over the planned one's, and, with a pilot, its expected scores."""

    setting: Setting
    relative: float
    prediction: Prediction | None


@dataclass(frozen=True)
class TrainingPlan:
    """Signal to noise of single scores before training.

    Attributes:
        asked: the planned setting.
        top: how many instances of a target are to be resolved.
        needed_z: z that gives the ``top``-th q <= 0.05.
        options: the planned setting, other widths, and more networks.
        pilot: measurements of the pilot; ``None`` without one, and then figures are relative.
        needed_units: mask units that resolve the ``top`` with one network; ``None`` if unknown.
        needed_seeds: networks that resolve them at the planned width; ``None`` if unknown.
    """

    asked: Setting
    top: int
    needed_z: float
    options: tuple[Option, ...]
    pilot: Pilot | None
    needed_units: int | None
    needed_seeds: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "asked": asdict(self.asked),
            "top": self.top,
            "needed_z": self.needed_z,
            "options": [
                {
                    **asdict(option.setting),
                    "relative_signal_to_noise": option.relative,
                    "prediction": asdict(option.prediction) if option.prediction else None,
                }
                for option in self.options
            ],
            "pilot": self.pilot.to_dict() if self.pilot else None,
            "needed_units_with_one_seed": self.needed_units,
            "needed_seeds_at_this_width": self.needed_seeds,
        }


def plan(
    config: FitConfig,
    train_data: Data,
    test_data: Data,
    *,
    seeds: int = 1,
    top: int = 10,
    pilot_rows: int | None = None,
    device: str | torch.device = "auto",
) -> TrainingPlan:
    """Predict the noise of single scores of a training, and what it takes to resolve the strongest.

    Args:
        config: the planned training.
        train_data: all its training data.
        test_data: where the pilot's targets are taken from.
        seeds: networks whose scores are averaged.
        top: strongest instances of a target that are to be resolved.
        pilot_rows: train a pilot on about so many rows; ``None``: give relative figures alone.
        device: where the pilot is trained (:func:`~turnover.dropout.modules.choose_device`).

    Raises:
        InputError: a count below 1, ``top`` above the training instances, or an error of
            :func:`run_pilot`.
    """
    asked = Setting(len(torch.unique(train_data.ids)), mask_units(config), seeds)
    needed_z = needed_z_of(top, asked.instances)
    pilot = None
    if pilot_rows is not None:
        pilot = run_pilot(config, train_data, test_data, pilot_rows, device)
    widths = (asked.units // 4, asked.units, 4 * asked.units, 16 * asked.units)
    settings = [replace(asked, units=units) for units in widths if units]
    settings += [replace(asked, seeds=times * seeds) for times in (4, 16)]
    options = tuple(
        Option(setting, setting.over(asked), pilot.predict(setting, top) if pilot else None)
        for setting in settings
    )
    needed_units = pilot.needed_units(replace(asked, seeds=1), top) if pilot else None
    needed_seeds = pilot.needed_seeds(asked, top) if pilot else None
    return TrainingPlan(asked, top, needed_z, options, pilot, needed_units, needed_seeds)
