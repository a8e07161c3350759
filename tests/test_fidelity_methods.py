"""Rows of the fidelity board: what they give on a tiny problem, and what becomes of those that fail."""

import importlib.util
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from turnover import InputError
from turnover.evaluation import Recipe, train

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.fidelity import peers, trivial
from benchmarks.fidelity.methods import Attribution, Scored, attempt
from benchmarks.fidelity.peers.pydvl_ import python as pydvl_python
from benchmarks.fidelity.problems import Problem, Split, mlp

TRAIN, TARGETS, FEATURES, CLASSES = 60, 6, 8, 3
WORDS = ("good film", "dull plot", "odd music")


def split(rows, seed, *, wrong=0):
    """Three clouds; the first rows have a wrong label."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(rows) % CLASSES
    x = 2 * torch.eye(CLASSES, FEATURES)[y]
    x = x + 0.4 * torch.randn(rows, FEATURES, generator=generator)
    flipped = torch.arange(rows) < wrong
    texts = [f"{WORDS[label]} number{row}" for row, label in enumerate(y.tolist())]
    return Split(x, torch.where(flipped, (y + 1) % CLASSES, y), flipped, texts)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    build = partial(mlp, widths=(FEATURES, 16, CLASSES))
    problem = Problem(
        name="tiny",
        title="three clouds",
        train=split(TRAIN, 0, wrong=5),
        test=split(TARGETS, 1),
        classes=CLASSES,
        standard=build,
        wide=build,
        sites=("1",),
        recipe=Recipe(epochs=12, learning_rate=0.05, batch_size=10, weight_decay=1e-3),
        subsets=3,
        seeds=1,
    )
    x, y = problem.train.x, problem.train.y
    trained = train(build, x, y, problem.recipe, range(2), checkpoints=(2, 5, 8, 12))
    return Attribution(
        problem=problem,
        network="standard",
        models=trained.models(),
        seeds=(0, 1),
        sites=(),
        keep=0.5,
        checkpoints=[states[0] for _, states in sorted(trained.checkpoints.items())],
        train_seconds=trained.seconds,
        workdir=tmp_path_factory.mktemp("work"),
    )


def same_class(task):
    return (task.problem.test.y[:, None] == task.problem.train.y).numpy()


def helps_its_class(scores, task):
    """Rightly labelled instances of a target's class help it more than those of other classes."""
    right = ~task.problem.train.wrong.numpy()
    same = same_class(task)
    return scores[same & right].mean() > scores[~same & right].mean()


PAIRS = {
    "gradient product": trivial.gradient_product,
    "representation similarity": trivial.timed(trivial.representation_similarity),
    "input similarity": trivial.timed(trivial.input_similarity),
    "same class": trivial.timed(trivial.same_class),
    "BM25": trivial.timed(trivial.bm25(signed=False)),
    "BM25, signed": trivial.timed(trivial.bm25(signed=True)),
    "sentence similarity": trivial.timed(trivial.sentence_similarity(signed=False)),
    "sentence similarity, signed": trivial.timed(trivial.sentence_similarity(signed=True)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_trivial_rows_say_that_an_instance_helps_its_own_class(name, task):
    if name.startswith("BM25"):
        pytest.importorskip("rank_bm25")
    scored = attempt(PAIRS[name], task)
    assert not scored.note
    assert scored.scores.shape == (TARGETS, TRAIN) and scored.scores.dtype == np.float32
    assert helps_its_class(scored.scores, task)


@pytest.mark.parametrize("name", ["representation similarity", "input similarity"])
def test_class_signed_similarity_has_the_sign_of_the_class_where_vectors_point_one_way(name, task):
    scores = PAIRS[name](positive(task)).scores
    assert (np.sign(scores) == np.where(same_class(task), 1, -1)).all()


def positive(task):
    """The task with inputs >= 0, as hidden ReLUs are, so that all cosines are positive."""

    def shifted(one):
        return replace(one, x=one.x.abs() + 0.1)

    problem = task.problem
    return replace(
        task, problem=replace(problem, train=shifted(problem.train), test=shifted(problem.test))
    )


def test_same_class_is_one_or_zero(task):
    scores = PAIRS["same class"](task).scores
    np.testing.assert_array_equal(scores, same_class(task).astype(np.float32))


def test_random_row_repeats_itself_and_knows_nothing(task):
    once, again = (attempt(trivial.timed(trivial.anything), task).scores for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert abs(np.corrcoef(once.ravel(), same_class(task).ravel())[0, 1]) < 0.2


def test_gradient_product_is_that_of_autograd(task):
    def gradient(x, y):
        loss = torch.nn.functional.cross_entropy(task.models[0](x[None]), y[None])
        parts = torch.autograd.grad(loss, list(task.models[0].parameters()))
        return torch.cat([part.flatten() for part in parts])

    test, train = task.problem.test, task.problem.train
    expected = gradient(test.x[2], test.y[2]) @ gradient(train.x[7], train.y[7])
    scored = trivial.gradient_product(task)
    assert scored.scores[2, 7] == pytest.approx(float(expected), rel=1e-4)
    own = gradient(train.x[7], train.y[7]).square().sum()
    assert scored.self_scores[7] == pytest.approx(float(own), rel=1e-4)


@pytest.mark.parametrize("checkpoint", [0, -1])
def test_loss_is_higher_where_labels_are_wrong(checkpoint, task):
    scored = attempt(trivial.loss(checkpoint), task)
    wrong = task.problem.train.wrong.numpy()
    assert scored.scores is None and scored.self_scores.shape == (TRAIN,)
    assert scored.self_scores[wrong].mean() > scored.self_scores[~wrong].mean()


def test_a_row_without_texts_says_so(task):
    problem = replace(task.problem, train=replace(task.problem.train, texts=None))
    pytest.importorskip("rank_bm25")
    scored = attempt(PAIRS["BM25"], replace(task, problem=problem))
    assert scored.scores is None and "needs texts" in scored.note


def test_a_method_that_raises_is_a_row_that_says_why(task):
    def broken(task):
        raise ImportError("no module named peer\nmore lines")

    scored = attempt(broken, task)
    assert scored.scores is None and scored.self_scores is None
    assert scored.note == "failed: ImportError: no module named peer"


def test_a_method_that_takes_too_long_is_stopped(task):
    def slow(task):
        time.sleep(20)

    start = time.perf_counter()
    scored = attempt(slow, task, seconds=0.2)
    assert time.perf_counter() - start < 5
    assert scored.scores is None and "TimeoutError" in scored.note


@pytest.mark.parametrize(
    ("scores", "own", "said"),
    [
        (np.zeros((TRAIN, TARGETS), np.float32), None, "scores are (60, 6)"),
        (None, np.zeros((TRAIN, 1), np.float32), "self_scores are (60, 1)"),
        (np.full((TARGETS, TRAIN), np.nan, np.float32), None, "scores are not finite"),
    ],
)
def test_scores_that_cannot_be_judged_are_a_failure(scores, own, said, task):
    scored = attempt(lambda task: Scored(scores, own, 0.0, 0.0, 0), task)
    assert scored.scores is None and scored.self_scores is None and said in scored.note


def test_a_method_leaves_the_global_generator_as_it_was(task):
    def draws(task):
        return Scored(torch.randn(TARGETS, TRAIN).numpy(), None, 0.0, 0.0, 0)

    before = torch.get_rng_state()
    first, second = attempt(draws, task), attempt(draws, task)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(first.scores, second.scores)


PEERS = {
    "EK-FAC": ("kronfluence", peers.ekfac),
    "TRAK-2": ("dattri", peers.trak(2)),
    "TRAK-1": ("dattri", peers.trak(1)),
    "IF-CG": ("dattri", peers.conjugate_gradients),
    "TracInCP": ("captum", peers.tracin),
    "Nystroem": ("pydvl", peers.pydvl("nystroem")),
    "EK-FAC of pyDVL": ("pydvl", peers.pydvl("ekfac")),
}


@pytest.mark.parametrize("name", PEERS)
def test_peers_say_that_an_instance_helps_its_own_class(name, task):
    package, method = PEERS[name]
    there = pydvl_python().exists() if package == "pydvl" else importlib.util.find_spec(package)
    if not there:
        pytest.skip(f"{package} is not installed")
    scored = attempt(method, task)
    assert not scored.note
    assert scored.scores.shape == (TARGETS, TRAIN) and scored.scores.dtype == np.float32
    assert helps_its_class(scored.scores, task)
    if scored.self_scores is not None:
        wrong = task.problem.train.wrong.numpy()
        assert scored.self_scores[wrong].mean() > scored.self_scores[~wrong].mean()
    for model in task.models:
        assert not model.training and not any(p.grad is not None for p in model.parameters())


def test_cleanlab_finds_wrong_labels(task):
    pytest.importorskip("cleanlab")
    scored = attempt(peers.cleanlab, task)
    wrong = task.problem.train.wrong.numpy()
    assert scored.scores is None and scored.self_scores.shape == (TRAIN,)
    assert scored.self_scores[wrong].mean() > scored.self_scores[~wrong].mean()


def test_bergson_is_a_row_that_says_why_it_is_empty(task):
    scored = attempt(peers.bergson, task)
    assert scored.scores is None and "causal language models" in scored.note


def test_a_layer_that_pydvls_interpreter_cannot_make_is_named(task, monkeypatch, tmp_path):
    interpreter = tmp_path / "python"
    interpreter.touch()
    monkeypatch.setenv("TURNOVER_PYDVL", str(interpreter))
    odd = replace(task, models=[torch.nn.Sequential(torch.nn.GELU())])
    with pytest.raises(InputError, match="GELU"):
        peers.pydvl("ekfac")(odd)
