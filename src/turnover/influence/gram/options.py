"""How gram scores, and what it makes of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from turnover.batches import Batch
from turnover.dropout.modules import device_of, evaluating, weights_digest
from turnover.dropout.network import Network
from turnover.errors import InputError, check_number, check_whole
from turnover.influence.gram import ridge as ridges
from turnover.influence.gram.capture import Capture
from turnover.influence.gram.masks import MaskCapture
from turnover.influence.gram.samples import OBJECTIVES
from turnover.influence.protocol import Method
from turnover.objectives import Objective, completion, cross_entropy, margin

Model = Network | nn.Module

FEATURES = ("gradients", "masks")


_BUILT_IN = (margin, cross_entropy)
_RESIDUAL = 0.5
_MASKED_RESIDUAL = 0.25
_DIRECTIONS = 2
_DAMPING = 0.1
_LEAST, _USUAL = 1000, 2000
"""Landmarks by ``"auto"``."""


@dataclass(frozen=True)
class Gram(Method):
    """Options of gram: influence by inner products of gradients, for any trained network.

    Needs :meth:`turnover.Influence.fit`. Scores are those of kernel ridge regression on the gradients of the
    training instances (:mod:`turnover.influence.gram`), and come with standard errors of their own in place
    of a noise floor from ghosts.

    Attributes:
        ridge: lambda: a multiple of the mean diagonal, ``"gcv"`` or ``"evidence"``
            (:mod:`turnover.influence.gram.ridge`).
        residual: exponent of 1 minus the probability of the training instance's label, which scores
            are multiplied with; 0 or ``False``: nothing. At 1 this is the step that an infinitesimal
            change of the instance's weight takes, at 0 that which a change of its label takes. To
            leave an instance out lies in between, as the probability is that of a network that was
            trained on it. ``None``: with the built-in objectives 0.5 for plain modules and 0.25 for
            turn-over networks, whose retraining is masked and fits each instance less
            (docs/fidelity.md); nothing with another objective.
        directions: how many directions in the class outputs each training instance holds the network
            along (:mod:`turnover.influence.gram.directions`). 0: the gradient of the objective alone
            stands for an instance, and all hold alike. ``None``: 2 (of two classes 1) with the built-in
            objectives and a number for the ridge, otherwise 0.
        features: ``"gradients"``, or for turn-over networks ``"masks"``: derivatives by the mask
            entries, a few numbers for each instance, which forget the inputs below the site.
        resamples: halves of the training set that standard errors of one network are made of: even,
            4 at least.
        whiten: how far directions that many instances share are held back
            (:mod:`turnover.influence.gram.whitening`): the damping in mean eigenvalues of a layer's second
            moments, less is stronger; ``True``: 0.1; ``False``: not at all. ``None``: 0.1 with
            ``objectives.completion``, otherwise not at all (docs/fidelity.md).
        samples: labels that are drawn from the model for each training instance. Their gradients, and not
            those of the labels in the data, then hold the network: with each of them another gradient
            of every instance, and better scores of language models (docs/language-models.md). Needs
            ``objectives.completion`` or ``cross_entropy``, and no directions.
        landmarks: training instances, drawn at random, whose inner products with all others stand for those
            of all pairs (:mod:`turnover.influence.gram.landmarks`): time and disk then grow with the
            training set and not with its square. ``"auto"``: all pairs up to 20,000 training instances
            times directions, beyond a tenth of the instances, at least 1,000 and at most 2,000. ``None``:
            all pairs.
        exact: with landmarks, take the exact inner products of targets with all training instances, by a
            pass over the training batches for each block of targets; without, they are taken of the
            strongest instances alone, where ``top`` is given.

    Raises:
        InputError: a value that is none of these.

    Source: this library; its relatives are Koh and Liang 2017, TRAK (Park et al. 2023), representer points
    (Yeh et al. 2018) and ghost clipping (Li et al. 2022).

    Example::

        influence = turnover.Influence(model, method=turnover.Gram(ridge="gcv", directions=0))
        result = influence.fit(train_batches).estimate(targets, top=20)
    """

    needs_masks = False
    needs_fit = True

    ridge: float | str = ridges.DEFAULT
    residual: bool | float | None = None
    directions: int | None = None
    features: str = "gradients"
    resamples: int = 8
    whiten: float | bool | None = None
    samples: int = 0
    landmarks: int | str | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        ridges.check(self.ridge)
        if self.features not in FEATURES:
            raise InputError(
                f"unknown features {self.features!r}; there are {', '.join(map(repr, FEATURES))}"
            )
        if self.whiten is not None and not isinstance(self.whiten, bool):
            check_number("whiten", self.whiten, also=" or True, False or None")
            if not self.whiten:
                raise InputError("whiten is a damping above 0; whiten=False does not whiten")
        if self.residual is not None and not isinstance(self.residual, bool):
            check_number("residual", self.residual, also=" or True, False or None")
        if self.directions is not None:
            check_whole("directions", self.directions, 0)
        if self.directions and isinstance(self.ridge, str):
            raise InputError(
                f"ridge={self.ridge!r} fits the objective of the training instances, which directions "
                f"do not have: give a number, or directions=0"
            )
        check_whole("samples", self.samples, 0)
        if self.samples and (self.directions or self.features == "masks"):
            raise InputError(
                'samples= takes the gradients of drawn labels: leave directions= and features="masks" out'
            )
        if self.samples and isinstance(self.ridge, str):
            raise InputError(
                f"ridge={self.ridge!r} knows no drawn labels: give a number, or samples=0"
            )
        if self.landmarks is not None:
            if isinstance(self.landmarks, str) and self.landmarks != "auto":
                raise InputError(
                    f'landmarks must be a whole number >= 2, "auto" or None, got {self.landmarks!r}'
                )
            if self.landmarks != "auto":
                check_whole("landmarks", self.landmarks, 2)
        elif self.exact:
            raise InputError("exact= is for landmarks=; without them all inner products are exact")
        check_whole("resamples", self.resamples, 4)
        if self.resamples % 2:
            raise InputError(f"resamples must be even and >= 4, got {self.resamples}")


def digest(model: Model) -> str:
    """Hash of the weights, and of the masks where there are any."""
    if isinstance(model, Network):
        return model.digest()
    return weights_digest(model.state_dict())


def digests_of(models: Sequence[Model]) -> list[str]:
    """Hashes of all networks; refuse one that is given twice."""
    found = [digest(model) for model in models]
    if len(set(found)) < len(found):
        raise InputError(
            "two networks have the same masks and weights: one is given twice, and would count double in the "
            "mean over networks"
        )
    return found


def measure(models: Sequence[Model], batch: Batch) -> None:
    """Learn the widths of sites, by which a network is told, where nothing ran under masks yet."""
    for one in models:
        if isinstance(one, Network) and None in one.units.values():
            with torch.no_grad(), evaluating(one.model), one.masking.probing():
                batch.rows(0, 1).to(device_of(one.model)).call(one.model)


def damping_of(objective: Objective, options: Gram) -> float | None:
    """Damping of the whitening; ``None``: gradients stay as they are."""
    given = options.whiten
    if given is None:
        given = objective is completion
    return (_DAMPING if given else None) if isinstance(given, bool) else float(given)


def directions_of(objective: Objective, options: Gram) -> int:
    """Directions of a training instance."""
    if options.samples:
        if objective not in OBJECTIVES:
            raise InputError(
                "samples= draws labels: take turnover.objectives.completion or cross_entropy, or samples=0"
            )
        return 0
    known = objective in _BUILT_IN
    if options.directions is not None:
        if options.directions and not known:
            raise InputError(
                "directions are those of class outputs: take turnover.objectives.margin or "
                "cross_entropy, or directions=0"
            )
        return options.directions
    return _DIRECTIONS if known and not isinstance(options.ridge, str) else 0


def gradients_of(objective: Objective, options: Gram) -> int:
    """Gradients of a training instance, at most."""
    return 1 + options.samples if options.samples else max(1, directions_of(objective, options))


def landmarks_of(options: Gram, instances: int) -> int:
    """Number of landmarks; of all pairs those that ``"auto"`` would take."""
    count = options.landmarks
    if not isinstance(count, int):
        count = min(max(_LEAST, instances // 10), _USUAL)
    return min(count, instances)


def residual_of(model: Model, objective: Objective, options: Gram) -> float:
    """Exponent of 1 minus the probability of the label."""
    if options.residual is not None:
        return float(options.residual)
    # Without directions an instance's gradient is the objective's, and that of the loss has it.
    loss = objective is cross_entropy and not directions_of(objective, options)
    if loss or objective not in _BUILT_IN:
        return 0.0
    return _MASKED_RESIDUAL if isinstance(model, Network) else _RESIDUAL


def capture_of(
    model: Model, objective: Objective, options: Gram, *, residuals: bool
) -> Capture | MaskCapture:
    """What gives the gradients of a model's rows.

    Args:
        model: a network or any module.
        objective: cost of a prediction.
        options: how to score.
        residuals: whether to find the probability of every label.
    """
    count = directions_of(objective, options)
    if options.features == "masks":
        if not isinstance(model, Network):
            raise InputError(
                'features="masks" are derivatives by the masks of a turn-over network: give one '
                'from turnover.attach, or take features="gradients"'
            )
        return MaskCapture(model, objective, residuals=residuals, directions=count)
    make = partial(Capture, residuals=residuals, directions=count, samples=options.samples)
    if isinstance(model, Network):
        return make(model.model, objective, within=model.mean)
    return make(model, objective)
