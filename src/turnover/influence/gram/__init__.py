"""Influence from inner products of gradients: for any trained network, and for those with masks.

Every training instance holds the network along one or a few directions in its class outputs
(:mod:`turnover.influence.gram.directions`). With ``K`` the inner products of the gradients along them by
all trained parameters, scores are ``K(target, train) (K(train, train) + lambda I)^-1``, taken along the
margin of each training instance and multiplied with a power of 1 minus the probability of its label
(:class:`turnover.Gram`). With another objective than the built-in ones, an instance has the gradient of the
objective alone. What retraining without an instance changes by way of the other instances is in the
inverse. Nothing is projected, and no gradient of a large layer is ever laid out: see
:mod:`turnover.influence.gram.factors`.

Related: influence functions with the generalised Gauss-Newton matrix (Koh and Liang 2017; Martens 2020),
whose curvature stands here to the power one half; TRAK (Park et al. 2023), which has the margin's
gradient alone, projected, and no ridge; representer points (Yeh et al. 2018), the same solve for the last
layer; the empirical neural tangent kernel, which ``K`` is; ghost clipping (Li et al. 2022), whose
products of factors make it without gradients.

**What z, p and q mean here.** Not the ghosts' null, which needs masks. The standard error of a score
says how far it would move with other networks (several are given: the standard error of their mean),
or with another training set of the same size, the network's gradients as they are (one is given: from
halves of the training set, :mod:`turnover.influence.gram.uncertainty`). z is the score in standard
errors, p comes from Student's t. A score of small p has a sign that would come out again; it says
nothing of its size. ``noise_floor`` is the root mean square of a target's standard errors.

How wide they are, as the mean square of the difference of two independent estimates in their standard
errors (digits, 500 instances, 64 hidden units; 1 is right): 5 networks against 5 others 0.7, 2 against 2
others 0.5 to 0.7. By halves: another training set under the same gradients 0.8, another seed 1.1 to 1.4, a
network trained anew on another training set 3.0 to 3.6. Training again moves the gradients, which no half can
show: to know how far, give several networks.
"""

from __future__ import annotations

from turnover.influence.gram.estimator import GramDriver
from turnover.influence.gram.options import Gram

__all__ = ["Gram", "GramDriver"]
