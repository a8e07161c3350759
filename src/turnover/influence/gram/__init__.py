"""Influence from inner products of gradients: for any trained network, and for those with masks.

With ``K`` the inner products of the gradients of the objective by all trained parameters,
``scores = K(target, train) (K(train, train) + lambda I)^-1``, times 1 minus the probability of each
training instance's label (:class:`Options`). What retraining without an instance changes by way of
the other instances is in the inverse. Nothing is projected, and no gradient of a large layer is ever
laid out: see :mod:`turnover.influence.gram.factors`.

**What z, p and q mean here.** Not the ghosts' null, which needs masks. The standard error of a score
says how far it would move with other networks (several are given: the standard error of their mean),
or with another training set of the same size, the network's gradients as they are (one is given: from
halves of the training set, :mod:`turnover.influence.gram.uncertainty`). z is the score in standard
errors, p comes from Student's t. A score of small p has a sign that would come out again; it says
nothing of its size. ``noise_floor`` is the root mean square of a target's standard errors.

How wide they are, as the variance of the difference of two independent estimates in their standard
errors (digits, 500 instances, 64 hidden units; 1 is right): 5 networks against 5 others 0.8 to 0.9, 2
against 2 others 1.1. By halves: another training set under the same gradients 0.5 (too wide: half the
instances are more than twice as noisy), another seed 1.5, a network trained anew on another training
set 3. Training again moves the gradients, which no half can show: to know how far, give several
networks.
"""

from __future__ import annotations

from turnover.influence.gram.estimator import Gram
from turnover.influence.gram.options import Options
from turnover.influence.gram.ridge import DEFAULT as DEFAULT_RIDGE

__all__ = ["DEFAULT_RIDGE", "Gram", "Options"]
