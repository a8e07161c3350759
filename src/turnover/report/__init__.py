"""The HTML report: what it says (`content`) and how it is written (`render`)."""

from turnover.report.content import (
    AccuracyRow,
    Curve,
    Fact,
    HarmfulOverall,
    NoiseFloor,
    ReportContent,
)
from turnover.report.render import render, write
from turnover.tasks.explain import (
    SIGNIFICANT_Q,
    Explanation,
    GramExplanation,
    GramInfluential,
    Influential,
)

__all__ = [
    "SIGNIFICANT_Q",
    "AccuracyRow",
    "Curve",
    "Explanation",
    "Fact",
    "GramExplanation",
    "GramInfluential",
    "HarmfulOverall",
    "Influential",
    "NoiseFloor",
    "ReportContent",
    "render",
    "write",
]
