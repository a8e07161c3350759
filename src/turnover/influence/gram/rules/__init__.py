"""Rules: how each kind of layer gives the gradients of single rows.

To add a layer, write one module in this folder; nothing else changes. For a layer that multiplies
(rows, tokens, features) by its weight (features,)::

    @register(Scale)
    class ScaleRule(Rule):
        def factors(self, module, trained, calls):
            return Explicit(sum((call.back * call.inputs).sum(dim=1) for call in calls))

``factors`` returns one of the forms of :mod:`turnover.influence.gram.factors`. Override ``flat`` if the
form has another order than the weight, then the bias. Register a type from a library that turnover does
not import by its qualified name. A module outside this folder can register a rule too, once imported.

A layer of any other type whose only parameter, ``weight`` (features,), scales its outputs needs no rule of
its own (:mod:`turnover.influence.gram.rules.scaling`).

Gram checks every rule against autograd, and computes the gradients of a layer without its rule where they
differ. A rule may therefore ignore rare options of its layer.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from turnover.influence.gram.rules.base import Call, Rule, register, rule_of

__all__ = ["Call", "Rule", "register", "rule_of"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
