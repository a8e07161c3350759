"""Which row is which: what batches are cut into, and which order rows come in."""

import copy
import random
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import tiny
import turnover
from turnover import Batch, Influence, InputError, objectives
from turnover.batches.loaders import Numbers, check_numbered, places_of

IDS = torch.arange(30)
ROWS = 12


class Prototypes(nn.Module):
    """Scores rows by their likeness to class prototypes, which all rows share."""

    def __init__(self):
        super().__init__()
        self.first, self.act = nn.Linear(4, 32), nn.GELU()
        self.last = nn.Linear(32, 4, bias=False)

    def forward(self, x, prototypes):
        return self.last(self.act(self.first(x))) @ prototypes.T


class Mapped(Prototypes):
    def forward(self, prototypes, given):
        return super().forward(given["x"], prototypes)


def attached(model, sites="act"):
    torch.manual_seed(5)
    return turnover.attach(tiny.randomise(model).eval(), sites)


def mlp():
    return attached(nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 3)), "mlp")


def shapes_of(kind, x, shared, labels):
    if kind == "tuple":
        return Batch((x, shared), labels)
    if kind == "shared first":
        return Batch({"prototypes": shared, "given": {"x": x}}, labels)
    return Batch({"x": x, "prototypes": shared}, labels)


@pytest.mark.parametrize("method", ["exact", "rerank", "gram"])
@pytest.mark.parametrize("kind", ["tuple", "mapping", "shared first"])
def test_a_shared_tensor_as_long_as_the_batch_is_not_cut(method, kind):
    network = attached(Mapped() if kind == "shared first" else Prototypes())
    x, shared, labels = (
        tiny.features(7, 4),
        tiny.features(3, 4),
        torch.tensor([0, 1, 2, 0, 1, 2, 0]),
    )

    def scores(parts):
        batches = [shapes_of(kind, x[part], shared, labels[part]) for part in parts]
        influence = Influence(network, method=method, ghosts=20)
        if method == "gram":
            influence.fit([shapes_of(kind, x, shared, labels)])
            return influence.estimate(batches).scores
        return influence.estimate(batches, IDS).scores

    whole = scores([slice(0, 7)])
    assert np.abs(whole).max() > 1e-3
    for parts in (
        [slice(0, 3), slice(3, 7)],
        [slice(0, 4), slice(4, 7)],
        [slice(0, 3), slice(3, 6), slice(6, 7)],
    ):
        np.testing.assert_allclose(scores(parts), whole, rtol=1e-4, atol=1e-5)


def test_self_influence_and_ghosts_keep_what_is_shared_whole():
    network = attached(Prototypes())
    x, shared, labels = tiny.features(3, 4), tiny.features(3, 4), torch.tensor([0, 1, 2])
    ids = torch.arange(3)
    exact = Influence(network, method="exact", ghosts=20)
    own = exact.self_influence([Batch((x, shared), labels, ids)]).scores
    expected = exact.estimate([Batch((x, shared), labels, shared=("1",))], ids).scores.diagonal()
    np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5)


def test_the_audit_keeps_what_is_shared_whole():
    network = attached(Prototypes())
    shared, x = tiny.features(9, 4), tiny.features(10, 4)
    reports = [network.audit(Batch((x[:rows], shared))) for rows in (9, 10)]
    assert reports[0] == reports[1]
    assert {p.name: p.share for p in reports[0].parameters}["first.weight"] == 0


def test_a_single_shared_row_is_not_repeated_with_a_single_target():
    class Scaled(nn.Module):
        """Multiplies by the sum of a bank, which here has one entry."""

        def __init__(self, own=None):
            super().__init__()
            self.first, self.act, self.last = nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 3)
            self.own = own

        def forward(self, x, bank=None):
            bank = self.own if bank is None else bank
            return self.last(self.act(self.first(x))) * bank.sum()

    x, bank, labels = tiny.features(3, 4), torch.tensor([0.7]), torch.tensor([0, 1, 2])
    expected = (
        Influence(attached(Scaled(bank)), method="exact", ghosts=20)
        .estimate([Batch(x, labels)], IDS)
        .scores
    )
    exact = Influence(attached(Scaled()), method="exact", ghosts=20)
    singles = [Batch((x[i : i + 1], bank), labels[i : i + 1]) for i in range(3)]
    for batches in (singles, [Batch((x, bank), labels)]):
        np.testing.assert_allclose(
            exact.estimate(batches, IDS).scores, expected, rtol=1e-4, atol=1e-5
        )


class TimeFirst(nn.Module):
    """Tokens on axis 0, rows on axis 1."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 3)

    def forward(self, x):
        return self.last(self.act(self.first(x)).cumsum(dim=0)[-1])


class Folded(nn.Module):
    """Multiple choice: the choices of a row are rows of their own inside."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 1)

    def forward(self, x):
        return self.last(self.act(self.first(x.flatten(0, 1)))).view(len(x), -1)


class Negatives(nn.Module):
    """The other rows of a batch are the classes that a row is not."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 8)

    def forward(self, x):
        made = self.last(self.act(self.first(x)))
        return made @ made.roll(1, dims=1).T


class OfItsBatch(nn.Module):
    """Batch statistics also in eval mode."""

    def __init__(self):
        super().__init__()
        self.first, self.act = nn.Linear(6, 32), nn.GELU()
        self.norm = nn.LayerNorm(32)
        self.last = nn.Linear(32, 3)

    def forward(self, x):
        hidden = self.act(self.first(x))
        return self.last(hidden - hidden.mean(dim=0))


def others(outputs, batch):
    """Contrastive: the label of a row is its own place in the batch."""
    return nn.functional.cross_entropy(outputs, torch.arange(len(outputs)), reduction="none")


@pytest.mark.parametrize("method", ["linear", "exact", "gram"])
@pytest.mark.parametrize(
    ("make", "shape", "objective"),
    [
        (TimeFirst, (4, 4, 6), objectives.margin),
        (Negatives, (4, 6), others),
        (OfItsBatch, (4, 6), objectives.margin),
    ],
)
def test_rows_that_cannot_be_told_apart_are_refused(method, make, shape, objective):
    network = attached(make())
    batch = Batch(tiny.features(*shape), torch.tensor([0, 1, 2, 0]))
    influence = Influence(network, objective, method, ghosts=20)
    run = influence.fit if method == "gram" else lambda b: influence.estimate(b, IDS)
    with pytest.raises(InputError, match=r"rows cannot be told apart.*adapter"):
        run([batch])
    if method != "gram":
        own = Batch(batch.inputs, batch.labels, torch.arange(4))
        with pytest.raises(InputError, match="rows cannot be told apart"):
            influence.self_influence([own])
        with pytest.raises(InputError, match="rows cannot be told apart"):
            influence.aggregate([batch], IDS)


def test_an_axis_that_is_folded_into_the_rows_has_no_masks_of_rows():
    network = attached(Folded())
    batch = Batch(tiny.features(4, 3, 6), torch.tensor([0, 1, 2, 0]))
    for method in ("linear", "exact"):
        with pytest.raises((InputError, turnover.BindingError), match=r"'act' saw .* fold"):
            Influence(network, method=method, ghosts=20).estimate([batch], IDS)
    with (
        pytest.raises(turnover.BindingError, match="repeat_interleave"),
        network.hidden([0, 1, 2, 3]),
    ):
        batch.call(network.model)


@pytest.mark.filterwarnings("ignore:turnover. gram knows no rule")
def test_gram_of_folded_rows_is_right():
    model = attached(Folded()).model
    batch = Batch(tiny.features(8, 3, 6), torch.arange(8) % 3)

    def scores(parts):
        influence = Influence(model, method="gram").fit([batch.rows(*part) for part in parts])
        return influence.estimate([batch]).scores

    np.testing.assert_allclose(
        scores([(0, 8)]), scores([(i, i + 1) for i in range(8)]), rtol=1e-3, atol=1e-4
    )


class Squeezing(nn.Module):
    """Cannot run a single row."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 3)

    def forward(self, x):
        return self.last(self.act(self.first(x)))[..., None].squeeze()


class Drawing(Squeezing):
    """Draws at random in eval mode."""

    def forward(self, x):
        return self.last(nn.functional.dropout(self.act(self.first(x)), 0.5, training=True))


@pytest.mark.parametrize("make", [Squeezing, Drawing])
def test_models_that_are_odd_but_by_rows_are_scored_as_before(make):
    network = attached(make())
    network.model(tiny.features(2, 6))
    before = torch.get_rng_state()
    checked = Influence(network, ghosts=20)._batches.check(
        Batch(tiny.features(4, 6), tiny.labels(4))
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert checked.shared == ()
    scores = Influence(network, ghosts=20).estimate([checked], IDS).scores
    assert scores.shape == (4, 30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_never_trips_the_check(dtype):
    model = nn.Sequential(
        *(m for _ in range(12) for m in (nn.Linear(48, 48), nn.LayerNorm(48), nn.GELU())),
        nn.Linear(48, 3),
    )
    network = turnover.attach(copy.deepcopy(model).to(dtype).eval(), "mlp")
    for seed in range(5):
        batch = Batch(tiny.features(17, 48, seed=seed).to(dtype), tiny.labels(17, seed))
        assert Influence(network, ghosts=20).estimate([batch], IDS).scores.shape == (17, 30)


def test_an_adapter_may_name_what_is_shared():
    batch = Batch(
        {"bank": tiny.features(3, 4), "x": tiny.features(3, 4), "deep": {"bank": torch.ones(3)}},
        torch.arange(3),
        shared=("bank", "deep"),
    )
    cut = batch.rows(1, 2).expanded(5).to(torch.device("cpu")).own_memory()
    assert len(cut) == 5 and cut.shared == batch.shared
    assert cut.inputs["bank"].shape == (3, 4) and cut.inputs["x"].shape == (5, 4)
    assert cut.inputs["deep"]["bank"].shape == (3,)


@dataclass
class Held:
    x: torch.Tensor


def packed():
    return nn.utils.rnn.pack_sequence([torch.ones(3, 6), torch.ones(2, 6)])


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        (
            lambda x, y: {"inputs": {"x": x}, "labels": y},
            "does not take the batch's inputs.*adapter",
        ),
        (lambda x, y: {"x": x, "labels": y}, "does not take the batch's inputs.*adapter"),
        (lambda x, y: ((x, x), y), "does not take the batch's inputs.*adapter"),
        (
            lambda x, y: [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)],
            "list of 4 items",
        ),
        (lambda x, y: [{"x": a, "labels": b} for a, b in zip(x[:2], y, strict=False)], "list of 2"),
        (lambda x, y: (x, x, y, y), "tuple of 4 items.*adapter"),
        (lambda x, y: Held(x), "cannot convert a batch of type Held.*adapter"),
        (lambda x, y: (Held(x), y), "no tensor in .* has rows.*adapter"),
        (lambda x, y: (packed(), y[:2]), "PackedSequence"),
        (lambda x, y: Batch({"x": packed()}, y[:2]), "PackedSequence"),
        (lambda x, y: (x[:0], y[:0]), "no rows"),
        (lambda x, y: (x, y, torch.arange(3)), "ids of shape"),
    ],
)
def test_batches_that_are_not_understood_ask_for_an_adapter(batch, named):
    network = mlp()
    x, y = tiny.features(4, 6), tiny.labels(4)
    with pytest.raises(InputError, match=named):
        Influence(network, ghosts=20).estimate([batch(x, y)], IDS)


def test_nested_inputs_and_short_last_batches_are_right():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.last = nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 3)

        def forward(self, pair, more):
            return self.last(self.act(self.first(pair[0] + pair[1] + more["z"])))

    network = attached(Nested())
    x, y = tiny.features(7, 6), tiny.labels(7)

    def batches(size):
        parts = zip(torch.split(x, size), torch.split(y, size), strict=True)
        return [{"pair": [a, a], "more": {"z": a}, "labels": b} for a, b in parts]

    for method in ("linear", "exact"):
        scores = [
            Influence(network, method=method, ghosts=20).estimate(batches(size), IDS).scores
            for size in (7, 3, 1)
        ]
        for other in scores[1:]:
            np.testing.assert_allclose(other, scores[0], rtol=1e-4, atol=1e-5)


# Order


class ByLength(Sampler):
    """Batches of rows of a like length, always the same ones."""

    def __iter__(self):
        return iter([[3, 1], [0, 2], *([i, i + 1] for i in range(4, ROWS, 2))])

    def __len__(self):
        return ROWS // 2


class Moody(Sampler):
    """Draws from Python's and numpy's generators, which nobody may move."""

    def __iter__(self):
        order = list(np.random.permutation(ROWS))  # noqa: NPY002
        random.shuffle(order)
        return iter(order)

    def __len__(self):
        return ROWS


def rows_of(ids=False):
    data = TensorDataset(tiny.features(ROWS, 6), tiny.labels(ROWS))
    return turnover.WithIds(data) if ids else data


def generator():
    return torch.Generator().manual_seed(3)


SHUFFLING = {
    "shuffle": lambda d: DataLoader(d, 4, shuffle=True),
    "own generator": lambda d: DataLoader(d, 4, shuffle=True, generator=generator()),
    "weights": lambda d: DataLoader(d, 4, sampler=WeightedRandomSampler([1.0] * ROWS, ROWS)),
    "subset": lambda d: DataLoader(d, 4, sampler=SubsetRandomSampler(range(ROWS))),
    "distributed": lambda d: DataLoader(
        d, 4, sampler=DistributedSampler(d, num_replicas=1, rank=0, shuffle=True)
    ),
    "one of two processes": lambda d: DataLoader(
        d, 4, sampler=DistributedSampler(d, num_replicas=2, rank=1, shuffle=False)
    ),
    "batches": lambda d: DataLoader(
        d, batch_sampler=BatchSampler(SubsetRandomSampler(range(ROWS)), 3, drop_last=False)
    ),
    "of one length": lambda d: DataLoader(d, batch_sampler=ByLength()),
    "other generators": lambda d: DataLoader(d, 4, sampler=Moody()),
    "a part": lambda d: DataLoader(d, 4, sampler=[4, 5, 6, 7, 8]),
    "workers": lambda d: DataLoader(d, 4, num_workers=2, in_order=False),
}
"""Of these, only the ones whose order stays have rows that can be told by their number in the loader."""
STABLE = ("one of two processes", "of one length", "a part")


@pytest.mark.parametrize("kind", SHUFFLING)
def test_gram_is_not_fitted_by_row_numbers_of_another_order(kind):
    model, loader = mlp().model, SHUFFLING[kind](rows_of())
    with pytest.raises(InputError, match=r"rows cannot be identified.*WithIds"):
        Influence(model, method="gram").fit(loader)
    Influence(model, method="gram").fit(iter([(tiny.features(5), tiny.labels(5))]))


@pytest.mark.parametrize("kind", SHUFFLING)
def test_asking_a_loader_moves_no_generator(kind):
    loader, own = SHUFFLING[kind](rows_of()), generator()
    loader.generator = own
    states = random.getstate(), torch.get_rng_state(), own.get_state()
    legacy = np.random.get_state()[1].copy()  # noqa: NPY002
    with pytest.raises(InputError, match="rows cannot be identified"):
        check_numbered(loader, Numbers.DATA)
    places_of(loader)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert torch.equal(own.get_state(), states[2])
    np.testing.assert_array_equal(np.random.get_state()[1], legacy)  # noqa: NPY002


@pytest.mark.parametrize("kind", SHUFFLING)
def test_targets_of_a_loader_that_shuffles_need_ids(kind):
    network = mlp()
    influence = Influence(network, ghosts=20)
    if kind in STABLE:
        assert len(influence.estimate(SHUFFLING[kind](rows_of()), IDS).scores)
        return
    with pytest.raises(InputError, match="rows cannot be identified"):
        influence.estimate(SHUFFLING[kind](rows_of()), IDS)
    if kind != "workers":
        result = influence.estimate(SHUFFLING[kind](rows_of(ids=True)), IDS)
        assert len(result.target_ids) == len(result.scores)
        np.testing.assert_allclose(
            influence.aggregate(SHUFFLING["shuffle"](rows_of()), IDS).scores,
            influence.aggregate(DataLoader(rows_of(), 4), IDS).scores,
            rtol=1e-4,
            atol=1e-6,
        )


def test_ids_in_the_batches_make_gram_free_of_order():
    model = mlp().model
    targets = [(tiny.features(3, 6, seed=9), tiny.labels(3))]
    plain = Influence(model, method="gram").fit(DataLoader(rows_of(), 4)).estimate(targets)
    shuffled = SHUFFLING["shuffle"](rows_of(ids=True))
    other = Influence(model, method="gram").fit(shuffled).estimate(targets, range(ROWS))
    np.testing.assert_allclose(other.scores, plain.scores, rtol=1e-3, atol=1e-4)


def test_wrappers_of_loaders_are_looked_through():
    accelerate = pytest.importorskip("accelerate", reason="pip install 'turnover[text]'")
    tqdm = pytest.importorskip("tqdm")
    model = mlp().model

    class Fabric:
        def __init__(self, loader):
            self._dataloader = loader

        def __iter__(self):
            return iter(self._dataloader)

        def __len__(self):
            return len(self._dataloader)

    wrappers = (accelerate.data_loader.prepare_data_loader, tqdm.tqdm, Fabric)
    for wrap in (*wrappers, lambda loader: Fabric(wrappers[0](loader))):
        with pytest.raises(InputError, match="rows cannot be identified"):
            Influence(model, method="gram").fit(wrap(SHUFFLING["shuffle"](rows_of())))
        Influence(model, method="gram").fit(wrap(DataLoader(rows_of(), 4)))


@pytest.mark.parametrize(
    "make",
    [
        lambda d: DataLoader(d, 4),
        lambda d: DataLoader(d, 4, sampler=range(ROWS)),
        lambda d: DataLoader(Subset(d, [5, 3, 1, 8, 9]), 2),
        lambda d: DataLoader(
            d, 4, sampler=DistributedSampler(d, num_replicas=1, rank=0, shuffle=False)
        ),
        lambda d: DataLoader(d, batch_sampler=[[0, 1], [2, 3, 4, 5]]),
        lambda d: DataLoader(d, sampler=BatchSampler(range(ROWS), 4, False), batch_size=None),
        lambda d: DataLoader([(tiny.features(6, 6), tiny.labels(6))] * 2, batch_size=None),
        lambda d: list(DataLoader(d, 4, shuffle=True)),
        lambda d: (batch for batch in DataLoader(d, 4, shuffle=True)),
    ],
)
def test_rows_in_order_need_no_ids(make):
    assert len(Influence(mlp().model, method="gram").fit(make(rows_of())).self_influence().scores)


def test_rows_that_drop_last_leaves_out_are_said():
    network, targets = mlp(), [(tiny.features(2), tiny.labels(2))]
    for loader, rows in (
        (DataLoader(rows_of(ids=True), 5, drop_last=True), 10),
        (DataLoader(rows_of(ids=True), 5, drop_last=True, shuffle=True), 10),
    ):
        with pytest.warns(UserWarning, match="drop_last=True leaves 2 of 12 rows out"):
            fitted = Influence(network, method="gram").fit(loader)
        assert len(fitted.estimate(targets).train_ids) == rows
        with pytest.warns(UserWarning, match="leaves 2 of 12"):
            Influence(network, ghosts=20).self_influence(loader)
        with pytest.warns(UserWarning, match="leaves 2 of 12"):
            turnover.hidden_predictions(network, loader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Influence(network, ghosts=20).self_influence(
            DataLoader(rows_of(ids=True), 4, drop_last=True)
        )


# Length


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(*row, i) for i, row in enumerate(rows_of())])


class Shy:
    """Says that it has no length in a way of its own."""

    def __iter__(self):
        return iter(DataLoader(Stream(), 5))

    def __len__(self):
        raise NotImplementedError("nobody knows")


@pytest.mark.parametrize("make", [lambda: DataLoader(Stream(), 5), Shy])
@pytest.mark.parametrize("progress", [False, True])
def test_streams_have_no_length_and_are_scored(make, progress):
    network = mlp()
    listed = [batch for batch in make()]  # noqa: C416 - list() asks for the length
    for method in ("linear", "exact"):
        one = Influence(network, method=method, ghosts=20, progress=progress)
        for name in ("estimate", "aggregate"):
            found, expected = (getattr(one, name)(given, IDS).scores for given in (make(), listed))
            np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(
            one.self_influence(make()).scores, one.self_influence(listed).scores
        )
    gram = Influence(network, method="gram", progress=progress).fit(make())
    assert gram.estimate(make()).scores.shape == (ROWS, ROWS)
    found = turnover.hidden_predictions(network, make(), progress=progress)
    assert len(found.probabilities) == ROWS
