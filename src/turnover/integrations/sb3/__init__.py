"""Stable-Baselines3: which experiences did this agent good, and the agent without them.

See :func:`attach`.
"""

from turnover.integrations.sb3.agent import Agent, attach
from turnover.integrations.sb3.audit import LeakReport
from turnover.integrations.sb3.buffer import ExperienceBuffer
from turnover.integrations.sb3.influence import Difference, ExperienceInfluence

__all__ = [
    "Agent",
    "Difference",
    "ExperienceBuffer",
    "ExperienceInfluence",
    "LeakReport",
    "attach",
]
