"""An estimator that one module registers gets all that Influence does."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
import turnover
from toy_estimator import Toy, ToyEstimator, logits, random_logits
from turnover import Batch, Influence, InputError, objectives
from turnover.influence import blockwise, protocol
from turnover.influence.protocol import METHODS, Method, register

IDS = torch.arange(2300) * 3
GHOSTS = 40


class Unfitted(Toy):
    needs_fit = False


register("unfitted", Unfitted, ToyEstimator)


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    """Several blocks of targets and of ids."""
    monkeypatch.setattr(protocol, "_MOST_TARGETS", 32)
    monkeypatch.setattr(protocol, "_SCORE_BYTES", 2**17)
    monkeypatch.setattr(blockwise, "_SCANNED", 1)


def networks(count):
    made = [tiny.randomise(tiny.mlp(12), seed).eval() for seed in range(count)]
    return [
        turnover.attach(one, "mlp", turnover.MaskSpec(seed=seed)) for seed, one in enumerate(made)
    ]


def train():
    return [Batch(tiny.features(2300, seed=9), tiny.labels(2300, 9), IDS)]


def targets():
    sizes = enumerate((30, 50, 1, 19))
    return [
        Batch(tiny.features(n, seed=s), tiny.labels(n, s), torch.arange(n) + 50 * s)
        for s, n in sizes
    ]


def fitted(count=1, scale=1.0, **options):
    return Influence(networks(count), method=Toy(scale), ghosts=GHOSTS, **options).fit(train())


def expected(count, batches, ids=IDS, scale=1.0):
    """Scores (networks, targets, ids), one target and one id at a time."""
    found = np.empty((count, sum(map(len, batches)), len(ids)), dtype=np.float64)
    position = {one: row for row, one in enumerate(IDS.tolist())}
    for number, network in enumerate(networks(count)):
        with torch.no_grad():
            left = torch.cat([network.model(batch.inputs) for batch in batches]).double()
            right = network.model(train()[0].inputs).double()
        for column, one in enumerate(ids.tolist()):
            seen = right[position[one]] if one in position else random_logits(one).double()
            found[number, :, column] = scale * (left @ seen).numpy()
    return found


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_a_registered_estimator_scores_pairs_with_the_noise_of_its_ghosts(count):
    result = fitted(count).estimate(targets(), IDS)
    wanted = expected(count, targets())
    ghosts = expected(count, targets(), turnover.ghost_ids(GHOSTS)).mean(axis=0)
    close(result.scores, wanted.mean(axis=0))
    close(result.floor.mean, ghosts.mean(axis=1))
    close(result.noise_floor, ghosts.std(axis=1, ddof=1))
    assert (result.method, result.considered) == ("toy", len(IDS))
    if count > 1:
        close(result.standard_error, wanted.std(axis=0, ddof=1) / count**0.5)


@pytest.mark.parametrize("count", [1, 2])
def test_it_keeps_the_extremes_alone(count):
    result = fitted(count).estimate(targets(), IDS, top=3)
    wanted = expected(count, targets())
    order = np.argsort(-wanted.mean(axis=0), axis=1, kind="stable")
    order = np.concatenate([order[:, :3], order[:, -3:]], axis=1)
    close(result.scores, np.take_along_axis(wanted.mean(axis=0), order, axis=1))
    np.testing.assert_array_equal(result.train_ids, IDS.numpy()[order])
    if count > 1:
        error = wanted.std(axis=0, ddof=1) / count**0.5
        close(result.standard_error, np.take_along_axis(error, order, axis=1))


def test_it_scores_the_mean_of_targets_and_instances_on_themselves():
    influence = fitted(2)
    mean = influence.aggregate(targets(), IDS)
    close(mean.scores, expected(2, targets()).mean(axis=(0, 1)))
    assert mean.floor.sd.shape == ()
    rows = train()[0].rows(0, 7)
    own = influence.self_influence([rows.rows(0, 3), rows.rows(3, 7)])
    wanted = expected(2, [rows], rows.ids)
    close(own.scores, np.diagonal(wanted.mean(axis=0)))
    ghosts = expected(2, [rows], turnover.ghost_ids(20)).mean(axis=0)
    close(own.noise_floor, ghosts.std(axis=1, ddof=1))


@pytest.mark.parametrize("top", [None, 3])
def test_it_stores_block_by_block_and_goes_on_after_a_cut(top, tmp_path):
    class Interrupted(Exception):
        pass

    def cut_off():
        yield from targets()[:2]
        raise Interrupted

    influence = fitted(2)
    with pytest.raises(Interrupted):
        influence.estimate(cut_off(), IDS, top=top, out=tmp_path / "r")
    scored = []
    real = ToyEstimator.scores

    def counted(self, block, ids):
        scored.append(sum(map(len, block.batches)) * len(ids))
        return real(self, block, ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToyEstimator, "scores", counted)
        found = influence.estimate(targets(), IDS, top=top, out=tmp_path / "r").load()
        went_on = sum(scored)
        whole = influence.estimate(targets(), IDS, top=top)
    tiny.assert_same(found, whole)
    assert 0 < went_on < (sum(scored) - went_on) / 2
    for other in (fitted(2, scale=2.0), fitted(2).fit([train()[0].rows(0, 9)])):
        with pytest.raises(InputError, match="holds another result: options"):
            other.estimate(targets(), IDS, top=top, out=tmp_path / "r")


@pytest.mark.long
@pytest.mark.parametrize("top", [None, 3])
def test_ray_workers_write_the_bits_of_one_process(top, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="needs ray: pip install 'turnover[ray]'")
    here = Path(__file__).parent
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent / "src")]))
    influence = fitted(2)
    influence.estimate(targets(), IDS, top=top, out=tmp_path / "one")
    ray.init(
        num_cpus=2,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        influence.estimate(targets(), IDS, top=top, out=tmp_path / "many", engine="ray")
    finally:
        ray.shutdown()
    one, many = (
        {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (tmp_path / "one", tmp_path / "many")
    )
    assert many == one


def test_it_shows_progress(capsys):
    fitted(progress=True).estimate(targets(), IDS, top=3)
    assert "influence (toy): 100%" in capsys.readouterr().err


def test_a_plan_compares_it_and_auto_may_take_it():
    plan = fitted().plan(targets(), IDS)
    assert {cost.method for cost in plan.costs} == {"toy", "linear", "rerank", "exact"}
    assert all(cost.seconds > 0 and cost.noise_floor > 0 for cost in plan.costs)
    auto = Influence(networks(1), method=turnover.Auto(1e9, ("linear", Unfitted())), ghosts=GHOSTS)
    assert auto.estimate(targets(), IDS).method == "unfitted"


def test_it_says_that_it_must_be_fitted():
    influence = Influence(networks(1), method="toy", ghosts=GHOSTS)
    for call in (
        lambda: influence.estimate(targets(), IDS),
        lambda: influence.aggregate(targets(), IDS),
        lambda: influence.self_influence(train()),
        lambda: influence.plan(targets(), IDS),
    ):
        with pytest.raises(InputError, match=r"toy looks at the training data: call fit"):
            call()


def test_names_are_registered_once_and_named_where_one_is_unknown():
    network = networks(1)[0]
    assert isinstance(Influence(network, method="toy")._driver.method, Toy)
    with pytest.raises(InputError, match=r"unknown method 'magic'.*\btoy\b"):
        Influence(network, method="magic")
    with pytest.raises(InputError, match="write method='toy'"):
        Influence(network, "toy")
    with pytest.raises(InputError, match="registered already"):
        register("linear", Toy, ToyEstimator)

    class Nameless(Method):
        pass

    with pytest.raises(InputError, match="unknown method"):
        Influence(network, method=Nameless())
    assert METHODS["linear"] is turnover.Linear
    with pytest.raises(InputError, match="needs the masks"):
        Influence(tiny.mlp(), objectives.margin, "toy")


def test_logits_are_those_of_the_network_without_masks():
    influence = fitted()
    engine = influence._driver._engines[0]
    close(logits(engine, targets()[:1]), engine.network.model(targets()[0].inputs).detach())
