"""Before training: how well will single influence scores be told from noise, and what would it take?

Two levels. The law alone is relative: signal to noise grows like sqrt(networks x mask units / training
instances). A pilot training on a part of the data gives it a scale (docs/planning.md has the
measurements behind both).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from turnover.data.base import Data
from turnover.tasks.fit import FitConfig
from turnover.tasks.pilot import Pilot, Prediction, Setting, mask_units, run_pilot, z_asked


@dataclass(frozen=True)
class Option:
    """A setting beside the one asked for.

    Attributes:
        setting: what it is.
        relative: its signal to noise over that of the setting asked for.
        prediction: with a pilot, what to expect.
    """

    setting: Setting
    relative: float
    prediction: Prediction | None


@dataclass(frozen=True)
class Plan:
    """What is known before training.

    Attributes:
        asked: the setting asked for.
        top: how many instances of a target are to be resolved.
        needed_z: what q <= 0.05 asks of the ``top``-th.
        options: the setting asked for, other widths, and more networks.
        pilot: what the pilot showed; ``None`` without one, and then all is relative.
        needed_units: mask units that resolve the ``top`` with one network; ``None`` without an answer.
        needed_seeds: networks that resolve them at the width asked for; likewise.
    """

    asked: Setting
    top: int
    needed_z: float
    options: tuple[Option, ...]
    pilot: Pilot | None
    needed_units: int | None
    needed_seeds: int | None

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
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
) -> Plan:
    """What single scores of a training would be worth, and what it takes to resolve the strongest.

    Args:
        config: the training that is planned.
        train_data: all its training data.
        test_data: where the pilot's targets are taken from.
        seeds: networks whose scores are to be averaged.
        top: strongest instances of a target that are to be resolved.
        pilot_rows: train a pilot on about so many rows; ``None``: the law alone.

    Raises:
        InputError: a count below 1, ``top`` above the training instances, or what :func:`run_pilot`
            refuses.
    """
    asked = Setting(len(torch.unique(train_data.ids)), mask_units(config), seeds)
    needed_z = z_asked(top, asked.instances)
    pilot = None if pilot_rows is None else run_pilot(config, train_data, test_data, pilot_rows)
    settings = [
        *(
            replace(asked, units=units)
            for units in (asked.units // 4, asked.units, 4 * asked.units, 16 * asked.units)
            if units
        ),
        *(replace(asked, seeds=times * seeds) for times in (4, 16)),
    ]
    options = tuple(
        Option(setting, setting.over(asked), pilot.predict(setting, top) if pilot else None)
        for setting in settings
    )
    return Plan(
        asked,
        top,
        needed_z,
        options,
        pilot,
        pilot.needed_units(replace(asked, seeds=1), top) if pilot else None,
        pilot.needed_seeds(asked, top) if pilot else None,
    )
