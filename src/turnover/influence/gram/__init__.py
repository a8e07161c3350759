"""Influence from inner products of gradients: for any trained network, with or without masks.

Every training instance holds the network along one or a few directions in its class outputs
(:mod:`turnover.influence.gram.directions`). ``K`` are the inner products of the gradients along them by all
trained parameters. Scores are ``K(target, train) (K(train, train) + lambda I)^-1``, along the margin of
each training instance, multiplied by a power of 1 minus the probability of its label
(:class:`turnover.Gram`). With an objective of the user's own, an instance has the gradient of the objective
only. The inverse holds what retraining without an instance changes through the other instances. Gradients
are not projected, and those of a large layer are never explicit: see
:mod:`turnover.influence.gram.factors`. Those of language models are whitened
(:mod:`turnover.influence.gram.whitening`), and gradients of labels that the model draws can take the place of
the training set's in the inverse (:mod:`turnover.influence.gram.samples`).

Related: influence functions with the generalized Gauss-Newton matrix (Koh and Liang 2017; Martens 2020),
here with the square root of its curvature; TRAK (Park et al. 2023): the margin's gradient only, projected,
without a ridge; representer points (Yeh et al. 2018): the same solve for the last layer; the empirical
neural tangent kernel, which ``K`` is; ghost clipping (Li et al. 2022), whose products of factors compute
it without gradients.

**What z, p and q mean here.** They do not use the ghosts' null, which needs masks. The standard error of a
score says how far it would move with other networks (if several are given: that of their mean), or with
another training set of the same size and the same gradients (if one is given: from halves of the training
set, :mod:`turnover.influence.gram.uncertainty`). z is the score in standard errors, p comes from Student's
t. The sign of a score of small p is reproducible; p says nothing about its size. ``noise_floor`` is the
root mean square of a target's standard errors.

Their width, as the mean square of the difference of two independent estimates in their standard errors
(digits, 500 instances, 64 hidden units; 1 is right): 5 networks against 5 others 0.7, 2 against 2 others
0.5 to 0.7. By halves: another training set under the same gradients 0.8, another seed 1.1 to 1.4, a
network retrained on another training set 3.0 to 3.6. Retraining also moves the gradients, which halves
cannot show; several networks do.
"""

from __future__ import annotations

from turnover.influence.gram.auto_driver import driver_of
from turnover.influence.gram.options import Gram

__all__ = ["Gram", "driver_of"]
