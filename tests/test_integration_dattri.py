"""dattri's metrics take our attributor as they take its own."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

import digits as data
import turnover
from turnover import Influence, InputError

pytest.importorskip("dattri", reason="pip install dattri==0.3.0")

from dattri.algorithm.base import BaseAttributor
from dattri.benchmark.utils import SubsetSampler
from dattri.metric import lds, loo_corr, mislabel_detection_auc

from turnover.integrations.dattri import TurnoverAttributor

KEYS = [f"digit {row}" for row in range(data.ROWS)]


@pytest.fixture(scope="module")
def digits():
    return data.load()


@pytest.fixture(scope="module")
def ids():
    return turnover.string_ids(KEYS)


@pytest.fixture(scope="module")
def network(digits, ids):
    return data.masked(digits, ids)


@pytest.fixture(scope="module")
def gram(digits):
    attributor = TurnoverAttributor(Influence(data.plain(digits), method="gram"))
    attributor.cache(data.loader(digits.train))
    return attributor


def test_it_is_an_attributor(gram):
    assert isinstance(gram, BaseAttributor)


def test_gram_and_turn_over_give_one_number_for_each_pair(digits, network, ids, gram):
    train, test = data.loader(digits.train), data.loader(digits.test)
    turn_over = TurnoverAttributor(Influence(network), train_ids=ids)
    turn_over.cache(train)
    for attributor in (gram, turn_over):
        scores = attributor.attribute(train, test)
        assert scores.shape == (data.ROWS, data.TESTS) and scores.dtype == torch.float32
    targets = [(digits.test_x, digits.test_y)]
    direct = Influence(network).estimate(targets, ids).scores.T
    np.testing.assert_allclose(scores.numpy(), direct, atol=1e-5)


def test_signs_are_those_of_dattris_own_influence_function(digits):
    from dattri.algorithm.influence_function import IFAttributorExplicit
    from dattri.task import AttributionTask

    model = nn.Linear(64, 10)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(digits.x), digits.y)
        loss = loss + 1e-2 * model.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)

    def cost(parameters, batch):
        outputs = torch.func.functional_call(model, parameters, (batch[0],))
        return nn.functional.cross_entropy(outputs, batch[1])

    task = AttributionTask(cost, model, model.state_dict())
    theirs = IFAttributorExplicit(task, regularization=1e-2)
    objective = turnover.objectives.cross_entropy
    ours = TurnoverAttributor(Influence(model, objective, method="gram"))
    found = []
    for attributor in (theirs, ours):
        train = data.loader(digits.train)
        attributor.cache(train)
        scores = attributor.attribute(train, data.loader(digits.test)).detach()
        found.append(scores.flatten())
    assert torch.corrcoef(torch.stack(found))[0, 1] > 0.5


def test_wrong_labels_are_found_by_dattris_metric(digits, network, ids, gram):
    turn_over = Influence(network, turnover.objectives.cross_entropy, method="exact")
    for attributor in (gram, TurnoverAttributor(turn_over, train_ids=ids)):
        own = attributor.self_attribute(data.loader(digits.train))
        auc, _ = mislabel_detection_auc(own, digits.wrong)
        assert auc > 0.9


def test_dattris_lds_and_leave_one_out_take_the_scores(digits, gram):
    scores = gram.attribute(data.loader(digits.train), data.loader(digits.test))
    subsets = torch.stack([torch.randperm(data.ROWS)[: data.ROWS // 2] for _ in range(20)])
    sums = torch.stack([scores[rows].sum(dim=0) for rows in subsets])
    values, _ = lds(scores, (sums, subsets))
    torch.testing.assert_close(values, torch.ones(data.TESTS))
    values, _ = loo_corr(scores, (scores, torch.arange(data.ROWS)))
    torch.testing.assert_close(values, torch.ones(data.TESTS))


@pytest.mark.parametrize("method", ["gram", "linear"])
def test_a_part_of_the_training_set_has_the_scores_it_has_in_the_whole(
    digits, network, ids, gram, method
):
    rows = [7, 200, 3]
    attributor = gram if method == "gram" else TurnoverAttributor(Influence(network), train_ids=ids)
    train, test = data.loader(digits.train), data.loader(digits.test)
    attributor.cache(train)
    whole = attributor.attribute(train, test)
    part = data.loader(train.dataset, sampler=SubsetSampler(rows))
    torch.testing.assert_close(attributor.attribute(part, test), whole[rows])
    own = attributor.self_attribute(train)
    torch.testing.assert_close(attributor.self_attribute(part), own[rows], atol=1e-5, rtol=1e-4)


def test_a_cached_part_is_known_by_its_places_in_the_data_set(digits):
    model, kept = data.plain(digits), list(range(100, 200))
    train, test = digits.train, data.loader(digits.test)
    attributor = TurnoverAttributor(Influence(model, method="gram"))
    attributor.cache(data.loader(train, sampler=SubsetSampler(kept)))
    one = attributor.attribute(data.loader(train, sampler=SubsetSampler([150])), test)
    whole = attributor.attribute(data.loader(train, sampler=SubsetSampler(kept)), test)
    torch.testing.assert_close(one[0], whole[50])


def test_batches_with_ids_need_no_others(digits, network, ids):
    test = data.loader(digits.test)
    given = data.loader(TensorDataset(digits.x, digits.y, ids))
    by_batch = TurnoverAttributor(Influence(network)).attribute(given, test)
    train = data.loader(digits.train)
    by_place = TurnoverAttributor(Influence(network), train_ids=ids).attribute(train, test)
    assert torch.equal(by_batch, by_place)


def test_a_users_adapter_is_asked(digits):
    def adapter(batch):
        return turnover.Batch(batch["image"], batch["digit"])

    def rows(x, y):
        return [{"image": a, "digit": b} for a, b in zip(x, y, strict=True)]

    model = data.plain(digits)
    named = TurnoverAttributor(Influence(model, method="gram", adapter=adapter))
    train, test = rows(digits.x, digits.y), rows(digits.test_x, digits.test_y)
    named.cache(data.loader(train))
    scores = named.attribute(data.loader(train), data.loader(test))
    plain, train = TurnoverAttributor(Influence(model, method="gram")), data.loader(digits.train)
    plain.cache(train)
    assert torch.equal(scores, plain.attribute(train, data.loader(digits.test)))


def test_what_cannot_be_told_by_place_is_refused(digits, network, ids, gram):
    train, test = data.loader(digits.train), data.loader(digits.test)
    fresh = TurnoverAttributor(Influence(data.plain(digits), method="gram"))
    state = torch.random.get_rng_state()
    with pytest.raises(InputError, match="shuffle=False"):
        gram.attribute(data.loader(digits.train, shuffle=True), test)
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(InputError, match="data set has 9 rows"):
        gram.attribute(data.loader(TensorDataset(digits.x[:9], digits.y[:9])), test)
    with pytest.raises(InputError, match="train_ids="):
        TurnoverAttributor(Influence(network)).attribute(train, test)
    with pytest.raises(InputError, match="has 9 ids and the training data set 240 rows"):
        TurnoverAttributor(Influence(network), train_ids=ids[:9]).attribute(train, test)
    with pytest.raises(InputError, match="map-style"):
        fresh.cache([(digits.x, digits.y)])
    with pytest.raises(InputError, match="map-style"):
        fresh.cache(data.loader(Streamed()))
    with pytest.raises(InputError, match="call fit"):
        fresh.attribute(train, test)


class Streamed(IterableDataset):
    def __iter__(self):
        yield torch.zeros(64), torch.tensor(0)


def test_the_page_shows_what_runs(digits):
    left = data.shown("dattri", digits)
    assert left["scores"].shape == (data.ROWS, data.TESTS)
    assert left["suspicion"].shape == (data.ROWS,)
