"""How each kind of layer gives the gradients of its rows: one small file for each.

To add a layer, write a class with the methods of :class:`Rule` and register it for the module's type,
or for its qualified name where importing the type would mean another library. Results are checked
against autograd on the first batch, and layers that fail go to the general way, so a rule may leave
rare options of its layer out.
"""

from __future__ import annotations

from turnover.influence.gram.rules import conv, embedding, linear, norm
from turnover.influence.gram.rules.base import Call, Rule, rule_of

__all__ = ["Call", "Rule", "conv", "embedding", "linear", "norm", "rule_of"]
