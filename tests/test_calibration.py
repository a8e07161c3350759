import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from turnover import InputError
from turnover.results import calibration
from turnover.results.calibration import (
    GhostPool,
    NullDistribution,
    noise_floor,
    q_values,
    standardize_left_out,
)
from turnover.results.result import Result

NULLS = {
    "gaussian": lambda rng, shape: rng.standard_normal(shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "kurtosis 6": lambda rng, shape: rng.standard_t(5, size=shape),
    "skewed": lambda rng, shape: rng.gamma(4, size=shape),
    "one-sided": lambda rng, shape: rng.exponential(size=shape),
}


def false_positives(draw, targets, ghosts, fresh, level, repeats=1):
    rng = np.random.default_rng(7)
    rates = []
    for _ in range(repeats):
        scale = rng.uniform(0.1, 10, (targets, 1))  # targets differ in their noise
        noise, scores = draw(rng, (targets, ghosts)), draw(rng, (targets, fresh))
        null = NullDistribution(standardize_left_out(noise * scale + scale))
        z = noise_floor(noise * scale + scale).standardize(scores * scale + scale)
        rates.append((null.p_values(z) < level).mean())
    return float(np.mean(rates)), targets * fresh * repeats


@pytest.mark.parametrize("name", NULLS)
@pytest.mark.parametrize("level", [1e-2, 1e-4])
def test_p_values_hold_their_level_on_fresh_ghosts(name, level):
    rate, draws = false_positives(NULLS[name], 100, 1000, 10_000, level)
    # Five binomial deviations, of the draws and of the ghosts that the tail was fitted to.
    spread = 5 * (level / draws + level / 100_000) ** 0.5
    assert rate < level + spread
    symmetric = name not in ("skewed", "one-sided")  # a bounded side claims no certainty
    assert rate > (level - spread if symmetric else level / 4 - spread)


@pytest.mark.parametrize("name", ["gaussian", "laplace", "kurtosis 6"])
def test_p_values_are_uniform_in_the_bulk(name):
    rng = np.random.default_rng(3)
    ghosts = NULLS[name](rng, (100, 1000))
    null = NullDistribution(standardize_left_out(ghosts))
    p = null.p_values(noise_floor(ghosts).standardize(NULLS[name](rng, (100, 300))))
    assert stats.kstest(p.ravel(), "uniform").statistic < 0.012


@pytest.mark.parametrize("name", ["gaussian", "laplace", "kurtosis 6", "skewed"])
@pytest.mark.parametrize(
    ("targets", "ghosts", "at_hundredth", "at_ten_thousandth"),
    [
        (1, 10, 0.03, 3e-3),
        (1, 20, 0.02, 1e-3),
        (1, 100, 0.02, 6e-4),
        (1, 1000, 0.013, 4e-4),
        (50, 20, 0.016, 6e-4),
    ],
)
def test_few_ghosts_do_not_inflate_false_positives_much(
    name, targets, ghosts, at_hundredth, at_ten_thousandth
):
    repeats = max(10, 150 // targets)
    for level, bound in ((1e-2, at_hundredth), (1e-4, at_ten_thousandth)):
        rate, _ = false_positives(NULLS[name], targets, ghosts, 3000, level, repeats)
        assert rate < bound


def test_ghosts_are_standardized_by_the_others():
    ghosts = np.random.default_rng(0).standard_normal((3, 12)) * 5 + 2
    expected = np.empty_like(ghosts)
    for target in range(3):
        for ghost in range(12):
            others = np.delete(ghosts[target], ghost)
            expected[target, ghost] = (ghosts[target, ghost] - others.mean()) / others.std(ddof=1)
    np.testing.assert_allclose(standardize_left_out(ghosts), expected, rtol=1e-10)


def test_noise_floor_is_mean_and_deviation_of_the_ghosts():
    ghosts = np.random.default_rng(0).standard_normal((3, 12)).astype(np.float32)
    floor = noise_floor(ghosts)
    np.testing.assert_allclose(floor.mean, ghosts.astype(np.float64).mean(1))
    np.testing.assert_allclose(floor.sd, ghosts.astype(np.float64).std(1, ddof=1))
    z = floor.standardize(ghosts)
    np.testing.assert_allclose(z.mean(1), 0, atol=1e-12)
    np.testing.assert_allclose(z.std(1, ddof=1), 1)


def test_too_few_ghosts_are_refused():
    with pytest.raises(InputError, match="10 ghosts"):
        noise_floor(np.zeros((2, 9)))


@given(
    arrays.arrays(
        np.float64,
        st.tuples(st.integers(1, 3), st.integers(1, 40)),
        elements=st.floats(0, 1, allow_subnormal=False),
    )
)
def test_q_values_are_those_of_scipy(p):
    np.testing.assert_allclose(q_values(p), stats.false_discovery_control(p, axis=-1), rtol=1e-12)


def test_q_values_of_nothing_are_nothing():
    assert q_values(np.empty((2, 0))).shape == (2, 0)


@given(seed=st.integers(0, 100), count=st.integers(1, 300))
def test_p_values_never_rise_with_distance_and_never_reach_zero(seed, count):
    pooled = np.random.default_rng(seed).standard_t(4, size=count)
    null = NullDistribution(pooled)
    p = null.p_values(np.linspace(-60, 60, 3000))
    peak = int(p.argmax())
    assert bool((np.diff(p[: peak + 1]) >= -1e-12).all())
    assert bool((np.diff(p[peak:]) <= 1e-12).all())
    assert bool(((p > 0) & (p <= 1)).all())


@given(seed=st.integers(0, 100), count=st.integers(10, 300), z=st.floats(-20, 20))
def test_p_values_do_not_depend_on_the_scores_beside_them(seed, count, z):
    null = NullDistribution(np.random.default_rng(seed).standard_normal(count))
    alone = null.p_values(np.array([z]))[0]
    assert null.p_values(np.array([0.0, z, 5.0]))[1] == alone


@given(z=st.floats(2, 8))
def test_no_p_value_is_smaller_than_a_gaussians(z):
    bounded = NullDistribution(np.random.default_rng(0).uniform(-1.7, 1.7, 20_000))
    assert bounded.p_values(np.array([z]))[0] >= 0.75 * 2 * stats.norm.sf(z)


def test_a_target_without_noise_gets_p_one():
    floor = noise_floor(np.full((1, 1000), 0.1, dtype=np.float32))
    assert floor.sd.tolist() == [0.0]
    z = floor.standardize(np.array([[0.1, 5.0]]))
    assert z.tolist() == [[0.0, 0.0]]
    pooled = standardize_left_out(np.full((1, 1000), 0.1))
    assert pooled.tolist() == [[0.0] * 1000]
    assert NullDistribution(pooled).p_values(z).tolist() == [[1.0, 1.0]]


def test_one_odd_ghost_among_equal_ones_is_far_but_finite():
    ghosts = np.zeros((1, 100))
    ghosts[0, 3] = 1.0
    pooled = standardize_left_out(ghosts)
    assert np.isfinite(pooled).all()
    assert pooled[0, 3] > 5


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_few_pooled_values_give_valid_p_values(count):
    null = NullDistribution(np.linspace(-1, 1, count))
    p = null.p_values(np.array([0.0, 2.0, 40.0]))
    assert np.isfinite(p).all()
    assert bool(((p > 0) & (p <= 1)).all())


def test_a_target_without_noise_gets_p_one_under_a_skewed_null_too():
    rng = np.random.default_rng(0)
    ghosts = np.stack([np.full(500, 0.1), rng.exponential(size=500)])
    pool = GhostPool()
    result = Result(
        scores=np.array([[0.1, 7.0], [0.1, 20.0]], dtype=np.float32),
        floor=pool.add(ghosts),
        null=pool.null(),
        train_ids=np.arange(2),
        target_ids=None,
        method="exact",
        objective="margin",
        sites=(),
        network="",
        considered=2,
    )
    assert result.p[0].tolist() == result.q[0].tolist() == [1.0, 1.0]
    assert result.p[1, 1] < 1e-3


def test_a_pool_that_is_full_is_thinned_evenly_and_keeps_its_level(monkeypatch):
    monkeypatch.setattr(calibration, "_POOLED", 80_000)
    rng = np.random.default_rng(3)
    pool = GhostPool()
    for size in (1, 7, 300, 64, 1000):
        pool.add(rng.standard_normal((size, 400)))
    null = pool.null()
    assert 40_000 <= len(null.values) <= 80_000
    assert (null.p_values(rng.standard_normal(200_000)) < 0.01).mean() == pytest.approx(
        0.01, rel=0.1
    )


def test_thinning_does_not_depend_on_how_the_targets_were_batched(monkeypatch):
    monkeypatch.setattr(calibration, "_POOLED", 2_000)
    ghosts = np.random.default_rng(4).standard_normal((200, 50))
    whole, parts = GhostPool(), GhostPool()
    whole.add(ghosts)
    for start in range(0, 200, 30):
        parts.add(ghosts[start : start + 30])
    assert np.array_equal(whole.null().values, parts.null().values)


def test_q_of_some_of_the_p_values_is_an_upper_bound():
    p = np.sort(np.random.default_rng(5).uniform(size=(3, 1000)) ** 3, axis=1)
    assert (q_values(p[:, :50], 1000) >= q_values(p)[:, :50] - 1e-15).all()
