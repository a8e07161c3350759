"""Judge influence scores by retraining.

Needs ``pip install turnover[evaluation]``. Not imported by ``import turnover``.
"""

from turnover.errors import needing

with needing("turnover.evaluation", "turnover[evaluation]"):
    import scipy  # noqa: F401

from turnover.evaluation.correlation import Correlation
from turnover.evaluation.lds import Lds, lds
from turnover.evaluation.leave_one_out import LeaveOneOut, leave_one_out
from turnover.evaluation.memorization import Memorization, memorization
from turnover.evaluation.mislabel import Mislabel, mislabel
from turnover.evaluation.recipe import Build, Masked, Recipe
from turnover.evaluation.removal import Removal, removal_curve
from turnover.evaluation.retraining import Retraining, minus_cost, retrain
from turnover.evaluation.subsets import Subsets, draw_subsets
from turnover.evaluation.training import Trained, train

__all__ = [
    "Build",
    "Correlation",
    "Lds",
    "LeaveOneOut",
    "Masked",
    "Memorization",
    "Mislabel",
    "Recipe",
    "Removal",
    "Retraining",
    "Subsets",
    "Trained",
    "draw_subsets",
    "lds",
    "leave_one_out",
    "memorization",
    "minus_cost",
    "mislabel",
    "removal_curve",
    "retrain",
    "train",
]
