"""Training many networks at once, and retraining them on subsets."""

import json
import math
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import turnover
from turnover import InputError, evaluation
from turnover.evaluation import (
    Masked,
    Recipe,
    Retraining,
    Subsets,
    draw_subsets,
    retrain,
    train,
)
from turnover.evaluation.training import stack_size

ROWS, FEATURES, CLASSES = 47, 6, 3
RECIPE = Recipe(epochs=3, learning_rate=0.1, batch_size=10, weight_decay=1e-3)


def _initialised(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.3, 0.3, generator=generator)
    return model


def mlp(seed):
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    return _initialised(model, seed)


def network_of_convolutions(seed):
    with torch.random.fork_rng():
        model = nn.Sequential(
            nn.Unflatten(1, (1, FEATURES)),
            nn.Conv1d(1, 4, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, CLASSES),
        )
    return _initialised(model, seed)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    return x, (x[:, :CLASSES] + 0.3 * x[:, CLASSES:]).argmax(dim=1)


def plain_loop(build, x, y, recipe, seed, rows, *, ids=None, masked=None):
    """One training as a user writes it."""
    model = build(seed).train()
    net = None
    if masked is not None:
        spec = turnover.MaskSpec(masked.keep, seed=seed)
        net = turnover.attach(model, list(masked.sites), spec)
    if recipe.optimizer == "adam":
        optimizer = torch.optim.Adam(
            model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay
        )
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), recipe.learning_rate, recipe.momentum, 0.0, recipe.weight_decay
        )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(recipe.epochs):
        order = torch.randperm(len(rows), generator=generator)
        for batch in torch.split(rows[order], recipe.batch_size):
            if net is None:
                loss = functional.cross_entropy(model(x[batch]), y[batch])
            else:
                with net.exposed((torch.arange(len(x)) if ids is None else ids)[batch]):
                    loss = functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.state_dict()


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("build", "site"), [(mlp, "1"), (network_of_convolutions, "2")], ids=["mlp", "convolutions"]
)
@pytest.mark.parametrize("keep", [None, 0.5, 0.7])
def test_a_training_is_the_plain_loop_under_attach(data, build, site, keep, optimizer):
    recipe = replace(RECIPE, optimizer=optimizer, learning_rate=0.02)
    masked = None if keep is None else Masked((site,), keep)
    ids = torch.arange(ROWS) * 7 + 1000
    generator = torch.Generator().manual_seed(1)
    rows = torch.stack([torch.randperm(ROWS, generator=generator)[:33] for _ in range(3)])
    trained = train(build, *data, recipe, [4, 9, 4], rows=rows, ids=ids, masked=masked)
    for state, seed, chosen in zip(trained.states, [4, 9, 4], rows, strict=True):
        expected = plain_loop(build, *data, recipe, seed, chosen, ids=ids, masked=masked)
        assert_same_weights(state, expected)


def test_small_mlps_are_batched_and_convolutions_and_large_ones_are_not():
    assert stack_size(mlp(0), ROWS) > 8
    assert stack_size(network_of_convolutions(0), ROWS) == 1
    assert stack_size(nn.Linear(1000, 500), ROWS) == 1
    frozen = mlp(0)
    frozen[0].weight.requires_grad_(False)
    assert stack_size(frozen, ROWS) == 1


def test_two_sites_and_several_batches_of_networks_are_each_trained_alike(data, monkeypatch):
    def deep(seed):
        with torch.random.fork_rng():
            model = nn.Sequential(
                nn.Linear(FEATURES, 12),
                nn.ReLU(),
                nn.Linear(12, 9),
                nn.Tanh(),
                nn.Linear(9, CLASSES),
            )
        return _initialised(model, seed)

    masked = Masked(("1", "3"))
    together = train(deep, *data, RECIPE, range(5), masked=masked)
    monkeypatch.setattr(evaluation.training, "_FEWEST_STACKED", 1)
    monkeypatch.setattr(evaluation.training, "_STACKED_PARAMETERS", 2 * 231)  # two at a time
    in_twos = train(deep, *data, RECIPE, range(5), masked=masked)
    for seed, states in enumerate(zip(together.states, in_twos.states, strict=True)):
        alone = train(deep, *data, RECIPE, [seed], masked=masked).states[0]
        for state in states:
            assert_same_weights(state, alone)


def test_checkpoints_are_shorter_trainings(data):
    trained = train(mlp, *data, RECIPE, [1, 2], checkpoints=(0, 2))
    assert list(trained.checkpoints) == [0, 2]
    assert_same_weights(trained.checkpoints[0][1], mlp(2).state_dict())
    shorter = train(mlp, *data, replace(RECIPE, epochs=2), [1, 2])
    for state, expected in zip(trained.checkpoints[2], shorter.states, strict=True):
        assert_same_weights(state, expected)


def test_models_and_logits_are_those_of_the_weights(data):
    trained = train(mlp, *data, RECIPE, [1, 2])
    for model, logits in zip(trained.models(), trained.logits(data[0]), strict=True):
        assert not model.training
        torch.testing.assert_close(model(data[0]), logits)
    assert trained.seconds > 0


def test_training_leaves_the_global_generator_alone(data):
    before = torch.get_rng_state()
    train(mlp, *data, RECIPE, [0, 1], masked=Masked(("1",)))
    assert torch.equal(before, torch.get_rng_state())


def test_a_loss_that_is_not_finite_names_network_and_recipe(data):
    x, y = data
    x = x.clone()
    x[5] = torch.inf
    rows = torch.tensor([[0, 1, 2], [3, 4, 5]])
    with pytest.raises(InputError, match=r"model 1 \(seed 8\).*Recipe\(epochs=3"):
        train(mlp, x, y, RECIPE, [7, 8], rows=rows)
    with pytest.raises(InputError, match=r"model 1 \(seed 8\)"):
        train(network_of_convolutions, x, y, RECIPE, [7, 8], rows=rows)


def test_wrong_arguments_are_refused_before_training(data):
    x, y = data

    def with_dropout(seed):
        return nn.Sequential(nn.Linear(FEATURES, 5), nn.Dropout(0.1), nn.Linear(5, CLASSES))

    for call, message in (
        (lambda: train(mlp, x, y[:-1], RECIPE, [0]), "labels"),
        (lambda: train(mlp, x, y.float(), RECIPE, [0]), "labels"),
        (lambda: train(mlp, x, y, RECIPE, []), "seeds"),
        (lambda: train(mlp, x, y, RECIPE, [0], rows=[[ROWS]]), "rows"),
        (lambda: train(mlp, x, y, RECIPE, [0, 1], rows=[[0]]), "rows"),
        (lambda: train(mlp, x, y, RECIPE, [0], checkpoints=[4]), "checkpoints"),
        (lambda: train(mlp, x, y, RECIPE, [0], masked=Masked(("9",))), "unknown site '9'"),
        (lambda: train(mlp, x, y, RECIPE, [0], ids=-torch.ones(ROWS).long()), "ghosts"),
        (lambda: train(with_dropout, x, y, RECIPE, [0]), "'1' is a dropout layer"),
        (lambda: Recipe(0, 0.1, 10), "epochs"),
        (lambda: Recipe(1, math.nan, 10), "learning_rate"),
        (lambda: Recipe(1, 0.1, 10, optimizer="lbfgs"), "lbfgs"),
        (lambda: Masked("fc"), "sites"),
        (lambda: Masked(("1",), 1.0), "keep"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_subsets_are_of_the_asked_size_and_the_same_for_a_seed():
    subsets = draw_subsets(21, 30, fraction=0.3, seed=5)
    assert subsets.keep.shape == (30, 21)
    assert (subsets.keep.sum(axis=1) == 6).all()
    assert (subsets.keep == draw_subsets(21, 30, fraction=0.3, seed=5).keep).all()
    assert (subsets.keep != draw_subsets(21, 30, fraction=0.3, seed=6).keep).any()


@settings(max_examples=20)
@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 1000))
def test_a_manifest_gives_the_subsets_back(tmp_path_factory, train_rows, count, seed):
    path = tmp_path_factory.mktemp("manifest") / "subsets.json"
    subsets = draw_subsets(train_rows, count, seed=seed)
    subsets.write(path)
    read = Subsets.read(path)
    assert (read.keep == subsets.keep).all()
    assert (read.seed, read.fraction) == (seed, 0.5)


def test_a_manifest_that_was_changed_is_refused_by_name(tmp_path):
    path = tmp_path / "subsets.json"
    draw_subsets(10, 3).write(path)
    values = json.loads(path.read_text())
    changed = [i for i in range(10) if i not in values["indices"][1]]
    for damage in (
        {"indices": [values["indices"][0], changed, values["indices"][2]]},
        {"indices": values["indices"][:2]},
        {"train": 11},
        {"train": 3},
        {"format": "something else"},
        {"indices": [[-1], [0], [1]]},
        {"sha256": None},
    ):
        path.write_text(json.dumps(values | damage))
        with pytest.raises(InputError, match=r"subsets\.json"):
            Subsets.read(path)
    path.write_text("{")
    with pytest.raises(InputError, match=r"subsets\.json"):
        Subsets.read(path)


def test_retraining_gives_the_logits_of_each_subset_and_seed(data):
    x, y = data
    keep = np.zeros((3, ROWS), dtype=np.bool_)
    keep[0, :20], keep[1, 10:30], keep[2, 5:] = True, True, True  # of different sizes
    masked = Masked(("1",))
    logits = retrain(Retraining(mlp, x, y, RECIPE, x[:4], masked=masked), Subsets(keep), [8, 6])
    assert logits.shape == (3, 2, 4, CLASSES) and logits.dtype == np.float32
    for subset, seed in ((0, 8), (1, 6), (2, 8)):
        rows = torch.from_numpy(np.flatnonzero(keep[subset]))
        model = mlp(seed)
        model.load_state_dict(plain_loop(mlp, x, y, RECIPE, seed, rows, masked=masked))
        expected = model(x[:4]).detach().numpy()
        np.testing.assert_allclose(
            logits[subset, [8, 6].index(seed)], expected, rtol=1e-3, atol=1e-4
        )


def _counted(monkeypatch):
    calls = []
    real = evaluation.retraining.train

    def counting(build, inputs, labels, recipe, seeds, **rest):
        calls.extend(seeds)
        return real(build, inputs, labels, recipe, seeds, **rest)

    monkeypatch.setattr(evaluation.retraining, "train", counting)
    return calls


def test_what_is_cached_is_not_trained_again(data, tmp_path, monkeypatch):
    x, y = data
    subsets = draw_subsets(ROWS, 3)
    calls = _counted(monkeypatch)
    run = partial(retrain, Retraining(mlp, x, y, RECIPE, x[:4], cache=tmp_path), subsets)
    first = run([1, 2])
    assert len(calls) == 6
    assert (run([1, 2]) == first).all()
    assert len(calls) == 6
    assert (run([2, 1, 3])[:, 1::-1] == first).all()
    assert calls[6:] == [3, 3, 3]


def test_the_cache_tells_apart_whatever_changes_the_outputs(data, tmp_path, monkeypatch):
    x, y = data
    subsets = draw_subsets(ROWS, 2)
    calls = _counted(monkeypatch)

    def shifted(seed):
        return mlp(seed + 1)

    given = Retraining(mlp, x, y, RECIPE, x[:4], cache=tmp_path)
    for change in (
        {},
        {"build": shifted},
        {"inputs": x + 1e-3},
        {"labels": (y + 1) % CLASSES},
        {"recipe": replace(RECIPE, epochs=2)},
        {"targets": x[1:5]},
        {"masked": Masked(("1",))},
        {"masked": Masked(("1",), 0.6)},
        {"masked": Masked(("1",)), "ids": torch.arange(ROWS) + 1},
    ):
        before = len(calls)
        retrain(replace(given, **change), subsets, [1])
        assert len(calls) == before + 2, change


def test_a_run_that_was_cut_off_goes_on(data, tmp_path, monkeypatch):
    x, y = data
    subsets = draw_subsets(ROWS, 4)
    retraining = Retraining(network_of_convolutions, x, y, RECIPE, x[:4], cache=tmp_path)
    run = partial(retrain, retraining, subsets, [1])
    real, done = evaluation.retraining.train, []

    def cut(*arguments, **rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return real(*arguments, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.retraining, "train", cut)
        with pytest.raises(KeyboardInterrupt):
            run()
    calls = _counted(monkeypatch)
    logits = run()
    assert len(calls) == 2
    expected = retrain(replace(retraining, cache=None), subsets, [1])
    np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize("damage", ["cut", "flipped", "other", "empty"])
def test_a_damaged_cache_file_is_named_and_made_anew(data, tmp_path, damage):
    x, y = data
    retraining = Retraining(mlp, x, y, RECIPE, x[:4], cache=tmp_path)
    run = partial(retrain, retraining, draw_subsets(ROWS, 2), [1])
    first = run()
    path = sorted(tmp_path.iterdir())[0]
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-3]
    elif damage == "flipped":
        content[-1] ^= 1
    elif damage == "other":
        content = bytearray(sorted(tmp_path.iterdir())[1].read_bytes())[:9] + content[9:]
        content[9] ^= 255
    else:
        content = bytearray()
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=path.name):
        again = run()
    np.testing.assert_allclose(again, first, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()


def test_retraining_refuses_subsets_of_other_data_and_seeds_given_twice(data):
    x, y = data
    with pytest.raises(InputError, match="of 12 instances"):
        retrain(Retraining(mlp, x, y, RECIPE, x), draw_subsets(12, 2), [1])
    with pytest.raises(InputError, match="distinct"):
        retrain(Retraining(mlp, x, y, RECIPE, x), draw_subsets(ROWS, 2), [1, 1])
