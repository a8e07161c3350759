"""Many ids, several networks, results on disk: the numbers stay what their definition says."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tiny
import turnover
from turnover import Batch, Influence, InputError, MaskSpec, objectives
from turnover.influence import protocol
from turnover.influence.linear import LinearScorer
from turnover.results.calibration import GhostPool
from turnover.results.store import save

IDS = torch.arange(40) * 7919
TARGETS = 5
METHODS = ("linear", "exact", "rerank")


def network(seed=0, keep=0.5, width=12, sites="mlp"):
    model = tiny.randomise(tiny.mlp(width), seed).eval()
    return turnover.attach(model, sites, MaskSpec(keep, seed=seed))


def several(count=3, **options):
    return [network(seed, **options) for seed in range(count)]


def targets(rows=TARGETS, seed=0):
    return Batch(tiny.features(rows, seed=seed), tiny.labels(rows, seed), torch.arange(rows) + 50)


def influence(method, networks=None, objective=objectives.margin, ghosts=30, **options):
    sites = options.pop("sites", None)
    method = tiny.method(method, **options)
    return Influence(networks or network(), objective, method, ghosts=ghosts, sites=sites)


# The linear scorer against the dense definition


KEEPS = [(0.5, True), (0.5, False), (0.3, False), (0.9, False)]
WIDTHS = st.dictionaries(
    st.sampled_from(["a", "fc.1", "b", "z"]), st.integers(1, 150), min_size=1, max_size=4
)


def dense(coefficients, spec, units, ids):
    """Coefficients times (hidden - exposed mask), unit by unit, in float64."""
    masks = torch.cat([spec.exposed(ids, site, width) for site, width in units.items()], 1)
    kept = masks.double()
    difference = (1 - kept) / (1 - spec.keep) - kept / spec.keep
    return (coefficients.double() @ difference.T).numpy()


@settings(max_examples=60)
@given(
    units=WIDTHS,
    keep=st.sampled_from(KEEPS),
    rows=st.sampled_from([1, 2, 15, 16, 17, 32, 33, 70]),
    ids=st.lists(st.integers(-(2**40), 2**62), min_size=1, max_size=30, unique=True),
    seed=st.integers(0, 1000),
)
def test_linear_scores_are_coefficients_times_the_difference_of_masks(units, keep, rows, ids, seed):
    spec = MaskSpec(keep[0], seed=seed, balanced=keep[1])
    ids = torch.tensor(ids)
    coefficients = torch.randn(
        rows, sum(units.values()), generator=torch.Generator().manual_seed(seed)
    )
    scorer = LinearScorer(coefficients, spec, units)
    expected = dense(coefficients, spec, units, ids)
    scale = 1e-5 * (1 + np.abs(expected).max())
    np.testing.assert_allclose(scorer.scores(ids).numpy(), expected, atol=scale)
    np.testing.assert_allclose(scorer.by_id(ids).numpy(), expected.T, atol=scale)
    first = min(rows, len(ids))
    own = LinearScorer(coefficients[:first], spec, units).own(ids[:first]).numpy()
    np.testing.assert_allclose(own, np.diag(expected), atol=scale)
    order = np.random.default_rng(seed).permutation(len(ids))
    np.testing.assert_allclose(scorer.scores(ids[order]).numpy(), expected[:, order], atol=scale)


@pytest.mark.parametrize("rows", [3, 60])
def test_blocks_of_the_linear_scorer_meet_without_a_seam(rows):
    units = {"a": 37, "b": 8}
    ids = torch.arange(5000) * 3 + 1
    coefficients = torch.randn(rows, 45, generator=torch.Generator().manual_seed(0))
    scorer = LinearScorer(coefficients, MaskSpec(), units)
    expected = dense(coefficients, MaskSpec(), units, ids)
    np.testing.assert_allclose(scorer.scores(ids).numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(scorer.by_id(ids).numpy(), expected.T, atol=1e-4)
    parts = torch.cat([scorer.scores(part) for part in ids.split(777)], dim=1)
    np.testing.assert_allclose(parts.numpy(), expected, atol=1e-4)


@given(width=st.integers(1, 300), keep=st.sampled_from(KEEPS), ids=st.lists(st.integers(0, 2**62)))
def test_packed_draws_are_those_of_the_masks(width, keep, ids):
    spec = MaskSpec(keep[0], seed=3, balanced=keep[1])
    ids = torch.tensor(ids, dtype=torch.int64)
    masks = spec.exposed(ids, "fc", width).numpy()
    packed = spec.packed(ids, "fc", width).numpy()
    assert packed.shape == (len(ids), -(-spec.draws(width) // 8)) and packed.dtype == np.uint8
    draws = np.unpackbits(packed, axis=1, bitorder="little")[:, : spec.draws(width)].astype(bool)
    if spec.balanced:
        draws = np.stack([draws, ~draws], axis=2).reshape(len(ids), 2 * draws.shape[1])[:, :width]
    np.testing.assert_array_equal(draws, masks)


@pytest.mark.parametrize("method", ["linear", "exact"])
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32), cut=st.integers(1, 39), block=st.integers(1, 50))
def test_scores_do_not_depend_on_the_order_of_ids_or_on_blocks(method, seed, cut, block):
    whole = influence(method).estimate([targets()], IDS).scores
    order = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(seed))
    other = influence(method, block=block)
    shuffled = other.estimate([targets().rows(0, 2), targets().rows(2, 5)], IDS[order]).scores
    np.testing.assert_allclose(shuffled, whole[:, order], rtol=1e-5, atol=1e-5)
    part = other.estimate([targets()], IDS[:cut]).scores
    np.testing.assert_allclose(part, whole[:, :cut], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["linear", "exact"])
@pytest.mark.parametrize("length", [1, 2, 4, 8, 16, 5])
def test_a_shared_input_as_long_as_a_block_of_targets_is_not_cut(method, length, monkeypatch):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = tiny.mlp()

        def forward(self, x, table):
            return self.body(x + table.sum(0))

    monkeypatch.setattr(protocol, "_MOST_TARGETS", 16)
    net = turnover.attach(tiny.randomise(Shifted()).eval(), "mlp")
    x, y, table = tiny.features(21), tiny.labels(21), tiny.features(length, seed=3)
    make = influence(method, net)
    found = make.estimate([Batch({"x": x, "table": table}, y)], IDS).scores
    for first in (0, 15, 18):
        part = Batch({"x": x[first:][:3], "table": table}, y[first:][:3])
        expected = make.estimate([part], IDS).scores
        np.testing.assert_allclose(found[first : first + 3], expected, rtol=1e-4, atol=1e-4)


# Only the extremes


def ends(scores, count):
    order = np.argsort(-scores, axis=1, kind="stable")
    return order if 2 * count >= scores.shape[1] else np.delete(order, np.s_[count:-count], axis=1)


@pytest.mark.parametrize("networks", [1, 3])
@pytest.mark.parametrize("top", [1, 4, 19, 20, 21, 100])
@pytest.mark.parametrize("method", METHODS)
def test_the_top_is_what_sorting_everything_gives(method, top, networks):
    options = {"candidates": 100} if method == "rerank" else {}
    make = influence(method, several(networks), objectives.cross_entropy, **options)
    whole = make.estimate([targets()], IDS)
    result = make.estimate([targets().rows(0, 2), targets().rows(2, 5)], IDS, top=top)
    columns = ends(whole.scores, top)
    assert result.scores.shape == result.train_ids.shape == (TARGETS, min(2 * top, len(IDS)))
    np.testing.assert_array_equal(result.train_ids, whole.train_ids[columns])
    close = {"rtol": 1e-5, "atol": 1e-5}
    for name in ("scores", "z", "standard_error"):
        full, found = getattr(whole, name), getattr(result, name)
        assert (full is None) == (found is None)
        if full is not None:
            np.testing.assert_allclose(found, np.take_along_axis(full, columns, 1), **close)
    assert (np.diff(result.scores, axis=1) <= 0).all()
    np.testing.assert_allclose(result.noise_floor, whole.noise_floor, rtol=1e-5)
    assert result.considered == whole.considered == len(IDS)
    full = np.take_along_axis(whole.q, columns, axis=1)
    assert (result.q >= full - 1e-6).all()
    if 2 * top >= len(IDS):
        np.testing.assert_allclose(result.q, full, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_equal_scores_are_ordered_by_their_place(method):
    net = network()
    with torch.no_grad():
        net.model[4].weight.zero_()
    options = {"candidates": 100} if method == "rerank" else {}
    result = influence(method, net, **options).estimate([targets()], IDS, top=3)
    expected = IDS[[0, 1, 2, 37, 38, 39]].numpy()
    np.testing.assert_array_equal(result.train_ids, np.tile(expected, (TARGETS, 1)))
    assert (result.scores == 0).all() and (result.q == 1).all()


def test_discoveries_among_the_top_are_those_of_the_whole():
    torch.manual_seed(0)
    net = turnover.attach(tiny.mlp(width=512), "mlp")
    x, y = tiny.features(30), tiny.labels(30)
    ids = torch.arange(30)
    tiny.train(net, x, y, ids, epochs=60, rate=3e-3)
    everything = torch.cat([ids, torch.arange(1000, 2000)])
    make = influence("linear", net, ghosts=1000)
    whole = make.estimate([(x, y)], everything)
    found = make.estimate([(x, y)], everything, top=60)
    for row in range(30):
        many = set(whole.train_ids[whole.q[row] < 0.1])
        few = set(found.train_ids[row][found.q[row] < 0.1])
        assert few == many & set(found.train_ids[row])
    assert (whole.q < 0.1).sum() > 20


# Several networks


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [2, 4])
def test_several_networks_are_averaged_with_a_standard_error(method, count):
    networks = several(count)
    options = {"candidates": 20} if method == "rerank" else {}
    alone = [
        influence(method, one, **options).estimate([targets()], IDS).scores for one in networks
    ]
    result = influence(method, networks, **options).estimate([targets()], IDS)
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(result.scores, np.mean(alone, axis=0), **close)
    error = np.std(alone, axis=0, ddof=1) / count**0.5
    np.testing.assert_allclose(result.standard_error, error, **close)
    assert len(result.network.split("+")) == count


@pytest.mark.parametrize("method", ["linear", "exact"])
def test_aggregate_and_self_influence_of_several_networks(method):
    networks = several()
    batch = Batch(tiny.features(TARGETS), tiny.labels(TARGETS), IDS[:TARGETS])
    for call in (
        lambda one: one.aggregate([batch.rows(0, 2), batch.rows(2, 5)], IDS),
        lambda one: one.self_influence([batch.rows(0, 2), batch.rows(2, 5)]),
    ):
        alone = [call(influence(method, one)).scores for one in networks]
        result = call(influence(method, networks))
        np.testing.assert_allclose(result.scores, np.mean(alone, 0), rtol=1e-4, atol=1e-5)
        error = np.std(alone, axis=0, ddof=1) / 3**0.5
        np.testing.assert_allclose(result.standard_error, error, rtol=1e-4, atol=1e-5)
        assert result.standard_error.shape == result.scores.shape


def test_the_noise_floor_falls_like_the_root_of_the_number_of_networks():
    networks = several(9, width=64)
    batch = targets(12)
    alone = [
        influence("linear", one, ghosts=1000).estimate([batch], IDS).noise_floor for one in networks
    ]
    floor = influence("linear", networks, ghosts=1000).estimate([batch], IDS).noise_floor
    expected = np.sqrt(np.mean(np.square(alone), axis=0) / 9)
    np.testing.assert_allclose(floor, expected, rtol=0.15)
    assert abs(np.mean(floor / expected) - 1) < 0.03


def test_networks_that_do_not_belong_together_are_refused():
    one, other = network(0), network(1, sites=["1"])
    with pytest.raises(InputError, match="different sites"):
        Influence([one, other])
    with pytest.raises(InputError, match="twice"):
        Influence([one, network(1), one])
    with pytest.raises(InputError, match="no network"):
        Influence([])


@pytest.mark.parametrize("method", METHODS)
def test_one_checkpoint_loaded_twice_does_not_count_double(method):
    make = influence(method, [network(1), network(2, width=12), network(1)])
    for call in (
        lambda: make.estimate([targets()], IDS),
        lambda: make.aggregate([targets()], IDS),
        lambda: make.self_influence([targets()]),
    ):
        with pytest.raises(InputError, match=r"0 and 2 .*twice"):
            call()


# Rerank and the rest of what an aggregate is


@pytest.mark.parametrize("networks", [1, 3])
def test_aggregate_by_rerank(networks):
    parts = [targets().rows(0, 2), targets().rows(2, 5)]
    nets = several(networks)
    exact = influence("exact", nets).aggregate(parts, IDS)
    result = influence("rerank", nets, candidates=20).aggregate(parts, IDS)
    assert result.exact.shape == (len(IDS),) and result.exact.all()
    np.testing.assert_allclose(result.scores, exact.scores, rtol=1e-5, atol=1e-5)
    few = influence("rerank", nets, candidates=3).aggregate(parts, IDS)
    assert few.exact.sum() == 6
    np.testing.assert_allclose(few.scores[few.exact], exact.scores[few.exact], atol=1e-5)
    assert 0 < few.recall <= 1
    if networks > 1:
        at = few.exact
        np.testing.assert_allclose(few.standard_error[at], exact.standard_error[at], atol=1e-5)


def test_a_reranked_aggregate_is_stored_and_labelled(tmp_path):
    result = influence("rerank", candidates=3).aggregate([targets()], IDS)
    dataset = result.to_xarray()
    np.testing.assert_array_equal(dataset.score.values, result.scores)
    assert dataset.recall.shape == ()
    save(tmp_path / "r", result)
    again = turnover.open_result(tmp_path / "r").load()
    np.testing.assert_array_equal(again.recall, result.recall)
    np.testing.assert_array_equal(again.exact, result.exact)


def test_self_influence_of_thousands_holds_bounded_ghosts(monkeypatch):
    held = []
    add = GhostPool.add

    def watched(pool, ghosts):
        floor = add(pool, ghosts)
        held.append(sum(row.nbytes for row in pool._rows))
        return floor

    monkeypatch.setattr(GhostPool, "add", watched)
    rows = 3000
    batches = [
        Batch(tiny.features(250, seed=i), tiny.labels(250, i), torch.arange(250) + 250 * i)
        for i in range(rows // 250)
    ]
    result = influence("linear", ghosts=1000).self_influence(batches)
    assert result.scores.shape == result.noise_floor.shape == (rows,)
    assert max(held) <= 8 * 2**20
    assert len(result.null.values) > 2**18
    single = influence("linear", ghosts=1000).self_influence([batches[3]])
    np.testing.assert_allclose(result.scores[750:1000], single.scores, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.noise_floor[750:1000], single.noise_floor, rtol=1e-5)


# Results on disk


@pytest.mark.parametrize("networks", [1, 2])
@pytest.mark.parametrize("top", [None, 3, 50])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_stored_is_what_memory_holds(method, top, networks, tmp_path):
    options = {"candidates": 50 if top == 50 else 5} if method == "rerank" else {}
    make = influence(method, several(networks), ghosts=120, **options)
    batches = [targets(20), targets(30, seed=1)]
    memory = make.estimate(batches, IDS, top=top)
    stored = make.estimate(
        batches, IDS, top=top, out=tmp_path / "r", coordinates={"source": [f"s{i}" for i in IDS]}
    )
    tiny.assert_same(stored.load(), memory)
    tiny.assert_same(make.estimate(batches, IDS, top=top), memory)
    dataset = stored.dataset
    assert dataset.source.dims == ("train",)
    np.testing.assert_array_equal(dataset.source.values, [f"s{i}" for i in IDS])
    np.testing.assert_array_equal(dataset.train.values, IDS.numpy())
    labels = torch.cat([batch.labels for batch in batches]).numpy()
    np.testing.assert_array_equal(dataset.target_label.values, labels)
    ids = torch.cat([batch.ids for batch in batches]).numpy()
    np.testing.assert_array_equal(dataset.target.values, ids)
    np.testing.assert_array_equal(dataset.score.values, memory.scores)


def test_thousands_of_targets_have_one_null_distribution_on_disk_and_in_memory(tmp_path):
    batches = [targets(700, seed) for seed in range(4)]
    batches[1].inputs[5:300] = 0  # without bias before, no mask reaches these
    nets = network()
    with torch.no_grad():
        for layer in (0, 2):
            nets.model[layer].bias.zero_()
    make = influence("linear", nets, ghosts=1000)
    memory = make.estimate(batches, IDS)
    tiny.assert_same(make.estimate(batches, IDS, out=tmp_path / "r").load(), memory)
    assert (memory.noise_floor == 0).sum() == 295


def test_batches_of_any_size_make_the_same_store(tmp_path):
    batch = targets(50)
    make = influence("exact")
    results = []
    for name, size in (("a", 50), ("b", 7), ("c", 16)):
        batches = [batch.rows(i, min(i + size, 50)) for i in range(0, 50, size)]
        results.append(make.estimate(batches, IDS, out=tmp_path / name).load())
    for other in results[1:]:
        np.testing.assert_allclose(other.scores, results[0].scores, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(other.target_ids, results[0].target_ids)


class Interrupted(Exception):
    pass


def cut_off(batches, after):
    yield from batches[:after]
    raise Interrupted


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_resuming_with_anything_else_is_refused_and_named(method, finished, tmp_path):
    first = 1100 if method == "linear" and not finished else 40  # more than one block
    batches = [targets(first), targets(40, seed=1)]
    make = influence(method, candidates=5)
    url = tmp_path / "r"
    if finished:
        make.estimate(batches, IDS, out=url)
    else:
        with pytest.raises(Interrupted):
            make.estimate(cut_off(batches, 1), IDS, out=url)
    nudged = [
        Batch(batches[0].inputs.clone(), *[getattr(batches[0], n) for n in ("labels", "ids")])
    ]
    nudged[0].inputs[3, 2] += 1e-3
    relabelled = Batch(batches[0].inputs, (batches[0].labels + 1) % 3, batches[0].ids)
    renamed = Batch(batches[0].inputs, batches[0].labels, batches[0].ids + 1)
    wrong = [
        (make, [*nudged, batches[1]], IDS, {}, "target 3"),
        (make, [relabelled, batches[1]], IDS, {}, "target 0"),
        (make, [renamed, batches[1]], IDS, {}, "target 0"),
        (make, batches[::-1], IDS, {}, "target 0"),
        (make, batches, IDS.flip(0), {}, "train"),
        (make, batches, IDS[:-1], {}, "considered|train"),
        (make, batches, IDS + 1, {}, "train"),
        (make, batches, IDS, {"top": 2}, "kind|top"),
        (make, batches, IDS, {"coordinates": {"source": list(range(40))}}, "source"),
        (influence(method, network(1), candidates=5), batches, IDS, {}, "network"),
        (influence(method, network(0, 0.3), candidates=5), batches, IDS, {}, "network"),
        (influence(method, several(2), candidates=5), batches, IDS, {}, "network"),
        (influence(method, ghosts=31, candidates=5), batches, IDS, {}, "ghost"),
        (influence(method, sites=["1"], candidates=5), batches, IDS, {}, "sites"),
        (influence(method, None, objectives.cross_entropy, candidates=5), batches, IDS, {}, "obj"),
    ]
    other = next(one for one in METHODS if one != method)
    wrong.append((influence(other, candidates=5), batches, IDS, {}, "method"))
    if method == "rerank":
        wrong.append((influence(method, candidates=6), batches, IDS, {}, "candidates"))
    if finished:
        wrong.append((make, batches[:1], IDS, {}, "target"))
        wrong.append((make, [*batches, targets(1, seed=2)], IDS, {}, "target"))
    for estimator, given_targets, ids, options, named in wrong:
        with pytest.raises(InputError, match=named):
            estimator.estimate(given_targets, ids, out=url, **options)
    expected = make.estimate(batches, IDS)
    tiny.assert_same(make.estimate(batches, IDS, out=url).load(), expected)
    tiny.assert_same(make.estimate(batches, IDS, out=url).load(), expected)


def test_targets_that_differ_in_what_is_no_tensor_are_other_targets(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = tiny.mlp()

        def forward(self, x, scale):
            return self.body(x) * scale

    net = turnover.attach(tiny.randomise(Scaled()).eval(), "mlp")
    x, y = tiny.features(3), tiny.labels(3)
    make = influence("linear", net)
    make.estimate([Batch({"x": x, "scale": 2.0}, y)], IDS, out=tmp_path / "r")
    with pytest.raises(InputError, match="target 0"):
        make.estimate([Batch({"x": x, "scale": 3.0}, y)], IDS, out=tmp_path / "r")


SCRIPT = """
import json, sys, time
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
import tiny, turnover, turnover.influence.protocol
from test_scale import influence, network, targets, several
from turnover import Batch, objectives

turnover.influence.protocol._MOST_TARGETS = 32  # several blocks of the linear method
method, top, out, pause = json.loads(sys.argv[1])
nets = several(2, width=8)
def slow(module, args, output):
    time.sleep(pause)
nets[0].model.register_forward_hook(slow)
batches = [targets(rows, seed) for seed, rows in enumerate((30, 50, 1, 19, 40))]
ids = torch.arange(2500) * 13
make = influence(method, nets, objectives.cross_entropy, ghosts=50, candidates=5)
print("begun", flush=True)
try:
    make.estimate(batches, ids, top=top, out=out)
except turnover.InputError as error:
    print(error)
    raise SystemExit(7)
"""


def started(method, top, out, pause):
    here = Path(__file__).parent
    script = SCRIPT.format(paths=[str(here), str(here.parent / "src")])
    arguments = json.dumps([method, top, str(out), pause])
    return subprocess.Popen(
        [sys.executable, "-c", script, arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "top", "pause"),
    [
        ("linear", None, 0.2),
        ("linear", 4, 0.2),
        ("exact", None, 0.001),
        ("exact", 4, 0.001),
        ("rerank", None, 0.002),
        ("rerank", 4, 0.002),
    ],
)
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bits(method, top, pause, tmp_path):
    chance = random.Random(f"{method}{top}")
    whole = started(method, top, tmp_path / "whole", pause)
    assert whole.stdout.readline() == "begun\n"
    since = time.monotonic()
    assert whole.wait() == 0, whole.stdout.read()
    span = time.monotonic() - since
    kills = 0
    for attempt in range(12):
        process = started(method, top, tmp_path / "cut", pause if attempt < 6 else 0)
        assert process.stdout.readline() == "begun\n"
        if attempt < 6:
            try:
                process.wait(chance.uniform(0.03, 0.35) * span)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += 1
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stdout.read()
    assert kills >= 2
    one, other = (turnover.open_result(tmp_path / name) for name in ("whole", "cut"))
    tiny.assert_same(one.load(), other.load())
    files = [
        {
            str(p.relative_to(tmp_path / name)): p.read_bytes()
            for p in (tmp_path / name).rglob("*")
            if p.is_file()
        }
        for name in ("whole", "cut")
    ]
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_second_process_is_refused_while_the_first_one_writes(tmp_path):
    first = started("exact", None, tmp_path / "r", 0.05)
    assert first.stdout.readline() == "begun\n"
    while not (tmp_path / "r" / "progress").exists():
        time.sleep(0.05)
    second = started("exact", None, tmp_path / "r", 0)
    try:
        said, _ = second.communicate(timeout=60)
        assert second.returncode == 7 and "another process" in said
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    last = started("exact", None, tmp_path / "r", 0)
    assert last.wait() == 0, last.stdout.read()


PEAK = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
import turnover.influence.protocol
from benchmarks.memory import peak_gib
from test_scale import influence, network, targets, several

call, method, count, many, out = sys.argv[1:]
turnover.influence.protocol._SCORE_BYTES = 2**22  # that both counts of ids fill their blocks
nets = several(int(many), width=64)
make = influence(method, nets, ghosts=100, candidates=10)
batches = [targets(64)]
ids = torch.arange(int(count)) * 13
small = torch.arange(3000)
def run(ids, name):
    if call == "top":
        make.estimate(batches, ids, top=10)
    elif call == "out":
        make.estimate(batches, ids, out=f"{{out}}/{{name}}")
    else:
        make.aggregate(batches, ids)
run(small, "warm")
run(ids, count)
print(int(peak_gib() * 1024))
"""


def peak(call, method, count, networks, folder):
    here = Path(__file__).parent
    script = textwrap.dedent(PEAK).format(
        paths=[str(here), str(here.parent), str(here.parent / "src")]
    )
    arguments = [call, method, str(count), str(networks), str(folder)]
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=True,
        # Memory that is freed goes back at once: what is measured is what is held.
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    return int(run.stdout)


@pytest.mark.long
@pytest.mark.parametrize(
    ("call", "method", "networks"),
    [
        ("top", "linear", 2),
        ("top", "rerank", 2),
        ("out", "linear", 1),
        ("out", "rerank", 2),
        ("aggregate", "linear", 2),
    ],
)
def test_memory_does_not_grow_with_the_ids(call, method, networks, tmp_path):
    """The whole matrix would take 64 rows x 150,000 ids x 4 bytes = 38 MB more."""
    few = peak(call, method, 50_000, networks, tmp_path)
    many = peak(call, method, 200_000, networks, tmp_path)
    # Ids themselves, sorted and checked, are some 8 bytes each.
    assert many - few < 20, (few, many)
