import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tiny
import turnover
from pinned import PINNED, PINNED_IDS, SITE, as_hex
from turnover import InputError, MaskSpec, ids
from turnover.dropout import masks

ids_of_any_size = st.integers(-(2**63), 2**63 - 1)
keeps = st.floats(0.01, 0.99)
widths = st.integers(1, 300)


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a == b).double().mean())


@pytest.mark.parametrize(("fields", "units", "expected"), PINNED)
def test_masks_are_those_that_were_published(fields, units, expected):
    mask = MaskSpec(**fields).exposed(PINNED_IDS, SITE, units)
    assert as_hex(mask) == expected.split()


def test_mixing_function_is_the_published_splitmix64():
    gamma = 0x9E3779B97F4A7C15
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    outputs = []
    for k in range(3):
        word = (1234567 + (k + 1) * gamma) % 2**64
        state = torch.tensor([word - 2**64 if word >= 2**63 else word])
        outputs.append(int(masks._mix64(state)) % 2**64)
        assert masks._mix64_int(word) == expected[k]
    assert outputs == expected


@given(ids=st.lists(ids_of_any_size, max_size=5), keep=keeps, units=st.lists(widths, max_size=4))
def test_masks_of_several_sites_at_once_are_those_of_each(ids, keep, units):
    ids, sites = torch.tensor(ids, dtype=torch.int64), {f"site {i}": n for i, n in enumerate(units)}
    sides = torch.arange(len(ids)) % 2 == 0
    for spec in (MaskSpec(keep, seed=5, balanced=False), MaskSpec(seed=5)):
        exposed = {site: spec.exposed(ids, site, width) for site, width in sites.items()}
        for hidden, turn in ((False, False), (True, True), (sides, sides[:, None])):
            found = spec.at_sites(ids, sites, hidden=hidden) if sites else {}
            assert list(found) == list(sites)
            assert all(torch.equal(found[site], exposed[site] ^ turn) for site in sites)


@given(ids=st.lists(ids_of_any_size, max_size=5), keep=keeps, units=widths)
def test_bits_follow_the_written_definition(ids, keep, units):
    spec = MaskSpec(keep, seed=5, balanced=False)
    mask = spec.exposed(ids, "site", units)
    assert mask.dtype == torch.bool
    assert mask.shape == (len(ids), units)
    assert mask.tolist() == [plain_mask(spec, value, "site", units) for value in ids]


def plain_mask(spec: MaskSpec, value: int, site: str, units: int) -> list[bool]:
    """The definition on unsigned Python integers, one unit at a time."""
    full, gamma = 2**64 - 1, 0x9E3779B97F4A7C15
    threshold = round(spec.keep * 2**32)
    stream = masks._mix64_int((value & full) ^ spec._site_key(site, units))
    words = -(-units // 64)
    low = (threshold & -threshold).bit_length() - 1
    bits = []
    for unit in range(units):
        kept = False
        for plane, digit in enumerate(range(low, 32)):
            counter = plane * words + unit // 64 + 1
            random_bit = masks._mix64_int(stream + counter * gamma) >> (unit % 64) & 1 == 1
            if plane == 0:
                kept = random_bit
            elif threshold >> digit & 1:
                kept = kept or random_bit
            else:
                kept = kept and random_bit
        bits.append(kept)
    return bits


@given(keep=keeps, seed=st.integers(0, 2**63 - 1), start=st.integers(0, 2**62))
def test_keep_probability_is_honoured(keep, seed, start):
    mask = MaskSpec(keep, seed, balanced=False).exposed(torch.arange(200) + start, "a", 500)
    deviation = abs(float(mask.double().mean()) - keep)
    assert deviation < 5.5 * (keep * (1 - keep) / mask.numel()) ** 0.5


@given(ids=st.lists(ids_of_any_size, min_size=1, max_size=5), units=widths)
def test_balanced_masks_keep_one_unit_of_each_pair(ids, units):
    mask = MaskSpec(seed=3).exposed(ids, "a", units)
    pairs = mask[:, : units // 2 * 2].unflatten(1, (-1, 2))
    assert bool((pairs.sum(dim=2) == 1).all())
    assert bool(((mask.sum(dim=1) * 2 - units).abs() == units % 2).all())


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_balanced_masks_are_refused_at_other_keeps(keep):
    with pytest.raises(InputError, match="balanced"):
        MaskSpec(keep, balanced=True)
    assert MaskSpec(keep).balanced is False


@pytest.mark.parametrize("keep", [0.0, 1.0, -0.1, 1.5, float("nan"), 1e-12])
def test_keep_outside_its_range_is_refused(keep):
    with pytest.raises(InputError, match="keep"):
        MaskSpec(keep)


@pytest.mark.parametrize("seed", [-1, 2**63, True, 1.0])
def test_seeds_that_are_not_63_bit_integers_are_refused(seed):
    with pytest.raises(InputError, match="seed"):
        MaskSpec(seed=seed)


@pytest.mark.parametrize("fields", [{}, {"balanced": False}, {"keep": 0.3}])
def test_ids_sites_seeds_and_units_are_independent(fields):
    spec, ids = MaskSpec(**fields), torch.arange(1000)
    base = spec.exposed(ids, "a", 512)
    chance = spec.keep**2 + (1 - spec.keep) ** 2
    others = {
        "ids": spec.exposed(ids + 1000, "a", 512),
        "neighbours": base.roll(1, 0),
        "powers": spec.exposed(ids + 2**32, "a", 512),
        "ghosts": spec.exposed(-1 - ids, "a", 512),
        "sites": spec.exposed(ids, "b", 512),
        "seeds": MaskSpec(**fields | {"seed": 1}).exposed(ids, "a", 512),
        "widths": spec.exposed(ids, "a", 513)[:, :512],
        "units": base.roll(2, 1),
    }
    for name, other in others.items():
        assert abs(agreement(base, other) - chance) < 0.005, name
    codes = base.double() - base.double().mean()
    correlations = torch.corrcoef(codes)[~torch.eye(1000, dtype=torch.bool)]
    # Balanced masks hold 256 free bits rather than 512.
    free = 256 if spec.balanced else 512
    assert float(correlations.std()) == pytest.approx(free**-0.5, rel=0.05)
    assert float(correlations.abs().max()) < 6 * free**-0.5


def test_every_unit_is_kept_equally_often():
    mask = MaskSpec().exposed(torch.arange(10_000), "a", 257)
    assert float((mask.double().mean(dim=0) - 0.5).abs().max()) < 5 * 0.5 / 10_000**0.5


def test_large_ids_are_neither_all_kept_nor_alike():
    ids = [2**k + d for k in (24, 31, 32, 53, 62) for d in (-1, 0, 1)] + [2**63 - 1, -(2**63)]
    mask = MaskSpec(balanced=False).exposed(ids, "a", 512)
    share = mask.double().mean(dim=1)
    assert bool(((share > 0.4) & (share < 0.6)).all())
    assert len({tuple(row) for row in mask.tolist()}) == len(ids)


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([1.0, 2.0]),
        [1.0, 2.0],
        torch.tensor([True, False]),
        [True, False],
        [True, 2],
        ["a", "b"],
        np.array([1.5]),
    ],
)
def test_ids_that_are_not_integers_are_refused(ids):
    with pytest.raises(TypeError, match="integers"):
        MaskSpec().exposed(ids, "a", 8)


@pytest.mark.parametrize(
    "ids", [[2**63], np.array([2**63 + 1], dtype=np.uint64), torch.tensor(3), [[1, 2]]]
)
def test_ids_that_do_not_fit_are_refused_rather_than_cut(ids):
    with pytest.raises(InputError, match="ids"):
        MaskSpec().exposed(torch.as_tensor(ids) if isinstance(ids, np.ndarray) else ids, "a", 8)


def test_a_site_without_units_is_refused():
    with pytest.raises(InputError, match="'a'"):
        MaskSpec().exposed([1], "a", 0)


def test_no_ids_give_no_masks():
    assert MaskSpec().exposed([], "a", 5).shape == (0, 5)
    assert MaskSpec(0.3).exposed(torch.empty(0, dtype=torch.int64), "a", 5).shape == (0, 5)


@given(
    ids=st.lists(ids_of_any_size, min_size=1, max_size=20),
    order=st.randoms(),
    cut=st.integers(0, 20),
    keep=st.sampled_from([0.5, 0.3]),
)
def test_masks_do_not_depend_on_batch_order_or_splitting(ids, order, cut, keep):
    spec = MaskSpec(keep)
    whole = spec.exposed(ids, "a", 70)
    permutation = list(range(len(ids)))
    order.shuffle(permutation)
    assert torch.equal(spec.exposed([ids[i] for i in permutation], "a", 70), whole[permutation])
    parts = [spec.exposed(ids[:cut], "a", 70), spec.exposed(ids[cut:], "a", 70)]
    assert torch.equal(torch.cat(parts), whole)


def test_masks_are_the_same_in_another_process():
    code = (
        "import turnover, torch\n"
        "m = turnover.MaskSpec(0.3, 9).exposed(torch.arange(50) * 7919, 'fc', 99)\n"
        "print(''.join(str(int(b)) for b in m.flatten()))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    here = MaskSpec(0.3, 9).exposed(torch.arange(50) * 7919, "fc", 99)
    assert printed == "".join(str(int(bit)) for bit in here.flatten())


@pytest.mark.parametrize("fields", [{}, {"keep": 0.3, "seed": 2**62}, {"balanced": False}])
def test_spec_survives_json(fields):
    spec = MaskSpec(**fields)
    again = MaskSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert torch.equal(again.exposed(PINNED_IDS, "a", 64), spec.exposed(PINNED_IDS, "a", 64))


def test_keep_given_as_a_numpy_number_survives_json():
    spec = MaskSpec(np.float32(0.3))
    assert MaskSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"spec_version": 2}, "version 2"),
        ({"spec_version": None}, "version"),
        ({"extra": 1}, "extra"),
        ({"keep": "0.5"}, "keep"),
        ({"keep": 1.5}, "keep"),
        ({"seed": 0.5}, "seed"),
        ({"balanced": None}, "balanced"),
        ({"balanced": 1}, "balanced"),
    ],
)
def test_damaged_specs_are_refused(change, named):
    with pytest.raises(InputError, match=named):
        MaskSpec.from_dict(MaskSpec().to_dict() | change)


def test_masks_are_the_same_for_narrow_integer_ids():
    ids = [3, 100, 0]
    expected = MaskSpec().exposed(ids, "a", 64)
    for dtype in (torch.int32, torch.int16, torch.uint8, torch.uint64):
        assert torch.equal(MaskSpec().exposed(torch.tensor(ids).to(dtype), "a", 64), expected)
    assert torch.equal(MaskSpec().exposed(np.array(ids, dtype=np.int32), "a", 64), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_masks_do_not_depend_on_the_default_dtype(dtype):
    expected = [MaskSpec(k).exposed(PINNED_IDS, "a", 70) for k in (0.5, 0.3)]
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        found = [MaskSpec(k).exposed(PINNED_IDS, "a", 70) for k in (0.5, 0.3)]
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_making_masks_in_inference_mode_does_not_spoil_later_training():
    with torch.inference_mode():
        inside = MaskSpec(seed=11).exposed([1, 2], "a", 16)
    model = tiny.mlp()
    network = turnover.attach(model, "mlp", MaskSpec(seed=11))
    with network.exposed([1, 2]):
        model(tiny.features(2)).sum().backward()
    assert torch.equal(MaskSpec(seed=11).exposed([1, 2], "a", 16), inside)
    assert model[0].weight.grad is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("keep", [0.5, 0.3])
def test_masks_are_the_same_on_cuda(keep):
    spec, ids = MaskSpec(keep), torch.tensor(PINNED_IDS)
    assert torch.equal(spec.exposed(ids.cuda(), "a", 999).cpu(), spec.exposed(ids, "a", 999))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("keep", [0.5, 0.3])
def test_half_precision_models_run_under_the_same_masks(dtype, keep):
    model = nn.Sequential(nn.Identity(), nn.Identity())
    model.anchor = nn.Parameter(torch.zeros(1))
    network = turnover.attach(model, turnover.Site("0"), MaskSpec(keep))
    model.to(dtype).eval()
    with network.exposed(PINNED_IDS):
        kept = model(torch.ones(len(PINNED_IDS), 40, dtype=dtype))
    with network.hidden(PINNED_IDS):
        dropped = model(torch.ones(len(PINNED_IDS), 40, dtype=dtype))
    assert kept.dtype == dtype
    expected = MaskSpec(keep).exposed(PINNED_IDS, "0", 40)
    assert torch.equal(kept != 0, expected)
    assert torch.equal(dropped != 0, ~expected)


def test_no_random_generator_is_touched():
    torch.manual_seed(1)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())  # noqa: NPY002
    MaskSpec().exposed(PINNED_IDS, "a", 64)
    MaskSpec(0.3).exposed(PINNED_IDS, "a", 64)
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert (before[2] == after[2]).all()


def test_working_with_a_network_touches_no_random_generator():
    model = tiny.randomise(nn.Sequential(*tiny.mlp(), nn.Dropout(0.0)))
    x, y = tiny.features(6), tiny.labels(6)
    torch.manual_seed(1)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())  # noqa: NPY002
    network = turnover.attach(model, "mlp")
    with network.exposed(torch.arange(6)):
        model(x).sum().backward()
    network.audit((x, y))
    for method in ("exact", "linear"):
        turnover.Influence(network, method=method, ghosts=10).estimate([(x, y)], [1, 2])
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert (before[2] == after[2]).all()


def test_string_ids_are_those_that_were_published():
    assert turnover.string_ids(["a", "b", "source-1", "é"]).tolist() == [
        1702698405120146464,
        4226560797588928834,
        592423418461997825,
        1697006002183834981,
    ]


@given(st.lists(st.text(), max_size=20))
def test_string_ids_are_valid_ids_equal_exactly_for_equal_keys(keys):
    ids = turnover.string_ids(keys)
    assert ids.dtype == torch.int64
    assert bool((ids >= 0).all())
    assert len(set(ids.tolist())) == len(set(keys))


def test_keys_with_undecodable_bytes_have_ids():
    key = b"\xff\xfe".decode(errors="surrogateescape")
    assert len(turnover.string_ids([key, "a"])) == 2


@pytest.mark.parametrize("keys", [["a", 1], [1, "a"], ["a", None], [b"a"]])
def test_mixed_kinds_of_keys_are_refused(keys):
    with pytest.raises(TypeError, match="strings"):
        turnover.string_ids(keys)


def test_keys_of_one_hash_are_refused(monkeypatch):
    monkeypatch.setattr(ids, "text_digest", lambda text: b"\1" * 8)
    with pytest.raises(InputError, match="'a' and 'b'"):
        turnover.string_ids(["a", "a", "b"])


@given(st.lists(st.text(max_size=3), max_size=12), st.randoms())
def test_content_ids_do_not_depend_on_the_order_of_a_file(contents, order):
    ids = turnover.content_ids(contents).tolist()
    shuffled = list(contents)
    order.shuffle(shuffled)
    assert sorted(turnover.content_ids(shuffled).tolist()) == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert turnover.content_ids([*contents, "appended"]).tolist()[: len(ids)] == ids


def test_ghosts_are_negative_and_ranges_are_disjoint():
    first, second = turnover.ghost_ids(5), turnover.ghost_ids(5, start=5)
    assert first.tolist() == [-1, -2, -3, -4, -5]
    assert second.tolist() == [-6, -7, -8, -9, -10]
    for count, start in ((-1, 0), (1, -1)):
        with pytest.raises(InputError, match=">= 0"):
            turnover.ghost_ids(count, start=start)


def test_negative_training_ids_are_refused():
    with pytest.raises(InputError, match="-7"):
        ids.check_training_ids([3, -7])
    assert ids.check_training_ids([3, 0]).tolist() == [3, 0]


def test_fingerprint_changes_with_any_field_or_bit(monkeypatch):
    units = {"a": 5, "b": 70}
    base = MaskSpec().fingerprint(units)
    assert base == "9c981ce97b17424393030c008ee9e2e5"
    assert MaskSpec().fingerprint({"b": 70, "a": 5}) == base
    others = {
        MaskSpec(seed=1).fingerprint(units),
        MaskSpec(0.4).fingerprint(units),
        MaskSpec(balanced=False).fingerprint(units),
        MaskSpec().fingerprint({"a": 5, "b": 71}),
        MaskSpec().fingerprint({"a": 5, "c": 70}),
        MaskSpec().fingerprint({"a": 5}),
    }
    assert len(others | {base}) == 7
    exposed = MaskSpec.exposed

    def flipped(self, ids, site, units):
        mask = exposed(self, ids, site, units)
        mask[2, 4] ^= True
        return mask

    monkeypatch.setattr(MaskSpec, "exposed", flipped)
    assert MaskSpec().fingerprint(units) != base
