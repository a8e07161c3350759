"""The problems of the fidelity benchmark, where the packages that carry their data are installed."""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from turnover import InputError, attach, evaluation

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.fidelity.problems import Problem, load

PACKAGES = {"A": "sklearn", "B": "sklearn", "C": "mlxtend"}


@pytest.fixture(params=PACKAGES)
def problem(request) -> Problem:
    if find_spec(PACKAGES[request.param]) is None:
        pytest.skip(f"{PACKAGES[request.param]} is not installed")
    return load(request.param)


def test_a_problem_is_the_same_each_time_and_leaves_the_global_generator_alone(problem):
    before = torch.get_rng_state()
    again = load(problem.name)
    for split in ("train", "test"):
        first, second = getattr(problem, split), getattr(again, split)
        assert torch.equal(first.x, second.x) and torch.equal(first.y, second.y)
        assert torch.equal(first.wrong, second.wrong)
    for build in (problem.standard, problem.wide):
        one, same, other = build(3).state_dict(), build(3).state_dict(), build(4).state_dict()
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert not any(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(before, torch.get_rng_state())


def test_a_problem_is_what_its_title_says(problem):
    rows = {"A": 500, "B": 1000, "C": 3000}[problem.name]
    assert (len(problem.train), len(problem.test)) == (rows, 100)
    assert int(problem.train.wrong.sum()) == (100 if problem.name == "B" else 0)
    assert not problem.test.wrong.any()
    assert float(problem.train.x.min()) >= 0 and float(problem.train.x.max()) <= 1
    assert len(torch.unique(problem.train.y)) == problem.classes
    network = attach(problem.wide(0), list(problem.sites))
    assert set(network.known_units().values()) == {512}
    assert problem.wide(0)[-1].bias is None and problem.standard(0)[-1].bias is not None
    # No instance is both trained on and a target.
    together = torch.cat([problem.train.x, problem.test.x]).numpy()
    assert len(np.unique(together, axis=0)) == rows + 100


def test_networks_learn_the_digits():
    if find_spec("sklearn") is None:
        pytest.skip("sklearn is not installed")
    problem = load("A")
    trained = evaluation.train(
        problem.standard, problem.train.x, problem.train.y, problem.recipe, [0]
    )
    right = trained.logits(problem.test.x)[0].argmax(dim=1) == problem.test.y
    assert float(right.float().mean()) > 0.9


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match="A, B, C, D, E"):
        load("F")
    with pytest.raises(InputError, match="cifar10_10k_2k"):
        load("E", tmp_path)
