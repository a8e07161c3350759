"""Options of methods are checked when they are made, in one line that names the option."""

import numpy as np
import pytest
import torch

import tiny
import turnover
from turnover import Auto, Exact, Gram, Influence, InputError, Linear, Rerank

IDS = torch.arange(12)


def network():
    return turnover.attach(tiny.randomise(tiny.mlp()).eval(), "mlp")


@pytest.mark.parametrize("value", [0, -3, 1.5, float("nan"), "8", True])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda value: Exact(block=value), "block"),
        (lambda value: Rerank(candidates=value), "candidates"),
        (lambda value: Rerank(block=value), "block"),
        (lambda value: Gram(resamples=value), "resamples"),
        (lambda value: Influence(network(), ghosts=value), "ghosts"),
        (lambda value: Influence(network()).estimate([], IDS, top=value), "top"),
    ],
)
def test_what_is_no_count_is_refused_by_name(make, name, value):
    with pytest.raises(InputError, match=rf"^{name} must be (a whole number )?>= \d+, got"):
        make(value)


@pytest.mark.parametrize("value", [-1, 1.5, float("nan"), "2", False])
def test_directions_are_a_count_or_none(value):
    with pytest.raises(InputError, match=r"^directions must be"):
        Gram(directions=value)
    assert Gram(directions=0).directions == 0 and Gram(directions=None).directions is None


@pytest.mark.parametrize("value", ["10", -1, float("nan"), True, None])
def test_a_budget_is_a_number(value):
    with pytest.raises(InputError, match=r"^seconds must be a number >= 0, got"):
        Auto(seconds=value)
    assert Auto(seconds=float("inf")).seconds == float("inf")


@pytest.mark.parametrize("value", ["x", -1, float("nan"), float("inf")])
def test_a_residual_is_an_exponent_or_a_choice(value):
    with pytest.raises(InputError, match=r"^residual must be a number >= 0 or True, False"):
        Gram(residual=value)


@pytest.mark.parametrize("value", [True, None, 0, -1.0, float("inf")])
def test_a_ridge_is_a_positive_multiple_or_a_rule(value):
    with pytest.raises(InputError, match=r"^ridge must be a positive multiple"):
        Gram(ridge=value)


@pytest.mark.parametrize("value", ["linear", (), Exact()])
def test_methods_to_choose_among_are_several(value):
    with pytest.raises(InputError, match="Auto needs several methods"):
        Auto(methods=value)


@pytest.mark.parametrize("value", ["mlp", [], ()])
def test_sites_are_a_list_that_names_some(value):
    with pytest.raises(InputError, match="sites must be a list of names or patterns"):
        Influence(network(), sites=value)


def test_counts_of_numpy_are_counts():
    assert Rerank(candidates=np.int64(5)).candidates == 5


def test_auto_chooses_among_different_methods():
    with pytest.raises(InputError, match="different methods, and got rerank, rerank, exact"):
        Auto(methods=(Rerank(5), Rerank(60), "exact"))
    with pytest.raises(InputError, match="chooses among methods that score by masks"):
        Auto(methods=("linear", "gram"))


def test_auto_has_nothing_to_fit():
    with pytest.raises(InputError, match="method='auto' does not look at the training data"):
        Influence(network(), method="auto").fit([])


@pytest.mark.parametrize("options", [Linear, Exact, Rerank, Auto, Gram])
def test_a_class_in_place_of_options_is_refused_with_the_fix(options):
    with pytest.raises(InputError, match=rf"{options.__name__}\(\) in place of the class"):
        Influence(network(), method=options)


def test_options_given_as_the_objective_are_refused_with_the_fix():
    with pytest.raises(InputError, match=r"must be callable, got Exact.*write method=Exact"):
        Influence(network(), Exact())
