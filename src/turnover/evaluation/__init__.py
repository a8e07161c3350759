"""Are influence scores right? Retraining, and what it says about them.

Needs ``pip install turnover[evaluation]``. Not imported by ``import turnover``.
"""

from turnover.evaluation.lds import Correlation, Lds, lds
from turnover.evaluation.recipe import Build, Masked, Recipe
from turnover.evaluation.retraining import minus_cost, retrain
from turnover.evaluation.subsets import Subsets, draw_subsets
from turnover.evaluation.training import Trained, logits, train

__all__ = [
    "Build",
    "Correlation",
    "Lds",
    "Masked",
    "Recipe",
    "Subsets",
    "Trained",
    "draw_subsets",
    "lds",
    "logits",
    "minus_cost",
    "retrain",
    "train",
]
