"""The shared training loop trains the same bits as a loop that a user would write for each use."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional

import tiny
import turnover
from turnover.data.images import Pixels
from turnover.data.text import Tokens
from turnover.evaluation import Masked, Recipe, train
from turnover.tasks import linear_probe
from turnover.tasks.linear_probe import Frozen, train_head, train_masked_head
from turnover.tasks.training import TrainingConfig, ordinary_dropout
from turnover.tasks.training import train as train_classifier

ROWS, CLASSES = 26, 3
CLASS_WEIGHTS = torch.tensor([1.0, 3.0, 0.5])


class Texts(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6).requires_grad_(False)
        self.inner = nn.Linear(6, 6, bias=False)
        self.act = nn.GELU()
        self.drop = nn.Dropout(0.2)
        self.head = turnover.WideHead(6, 16, CLASSES)

    def forward(self, input_ids, attention_mask):
        return self.head(self.drop(self.act(self.inner(self.embedding(input_ids).mean(dim=1)))))


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.act(self.convolution(x)).mean(dim=(2, 3)))


def encoded(kind):
    labels, ids = [row % CLASSES for row in range(ROWS)], torch.arange(ROWS) * 5
    if kind == "texts":
        tokens = [[row % 9, 1] * (1 + row % 4) for row in range(ROWS)]
        return Texts, Tokens(tokens, labels, ids, padding=0), ["act", "head.activation"]
    pixels = np.random.default_rng(0).integers(256, size=(ROWS, 16, 16, 3), dtype=np.uint8)
    spread = (0.2, 0.3, 0.2)
    rows = list(range(ROWS))
    return Images, Pixels(pixels, rows, labels, ids, (0.5,) * 3, spread, augment=True), ["act"]


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def fitted_by_hand(model, data, config, bind, weights):
    """A fine-tuning with a learning rate that falls linearly, in float32."""
    heads = {p for m in model.modules() if isinstance(m, turnover.WideHead) for p in m.parameters()}
    rest = [p for p in model.parameters() if p.requires_grad and p not in heads]
    groups = [{"params": rest, "lr": config.learning_rate}]
    if heads:
        in_order = [p for p in model.parameters() if p in heads]
        groups.append({"params": in_order, "lr": config.head_learning_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    first = [group["lr"] for group in optimizer.param_groups]
    steps = -(-len(data) // config.batch_size) * config.epochs
    step = 0
    for epoch in range(config.epochs):
        seed = config.seed * 1_000_003 + epoch
        torch.manual_seed(seed)
        order, augmentation = torch.Generator(), torch.Generator()
        order.manual_seed(seed)
        augmentation.manual_seed(seed)
        for rows in data.shuffled(config.batch_size, order):
            for group, rate in zip(optimizer.param_groups, first, strict=True):
                group["lr"] = rate * (1 - step / steps)
            batch = data.training_batch(rows, augmentation)
            with bind(batch.ids):
                logits = batch.call(model)
            if weights is None:
                loss = functional.cross_entropy(logits, batch.labels)
            else:
                each = functional.cross_entropy(logits, batch.labels, reduction="none")
                loss = (each * weights[batch.labels]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1


@pytest.mark.parametrize("weights", [None, CLASS_WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("masks", [True, False], ids=["masks", "dropout"])
@pytest.mark.parametrize("kind", ["texts", "images"])
def test_a_classifier_is_trained_as_by_hand_and_resumed_alike(kind, masks, weights, tmp_path):
    make, data, sites = encoded(kind)
    config = TrainingConfig(3, 4, learning_rate=1e-2, head_learning_rate=3e-3, seed=7)
    states = {}

    class Stopped(Exception):
        pass

    def stop(epochs):
        if epochs == 2:
            raise Stopped

    for name in ("by hand", "whole", "interrupted", "resumed"):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = make().train()
            network = turnover.attach(model, sites) if masks else None
            bind = network.exposed if network else lambda _: nullcontext()
            with nullcontext() if masks else ordinary_dropout(model, sites, 0.5):
                if name == "by hand":
                    fitted_by_hand(model, data, config, bind, weights)
                else:
                    given = {"name": "it", "identity": "", "bfloat16": False, "weights": weights}
                    file = tmp_path / name.replace("interrupted", "resumed")
                    follow = stop if name == "interrupted" else None
                    try:
                        train_classifier(
                            model, data, config, bind, checkpoint=file, follow=follow, **given
                        )
                    except Stopped:
                        continue
        states[name] = model.state_dict()
    assert_same_bits(states["whole"], states["by hand"])
    assert_same_bits(states["resumed"], states["by hand"])


def loop_by_hand(model, optimizer, x, y, ids, order, exposed, weights=None):
    """Steps on batches of rows, with weights of the rows."""
    for rows in order:
        with exposed(ids[rows]) if exposed else nullcontext():
            logits = model(x[rows])
        if weights is None:
            loss = functional.cross_entropy(logits, y[rows])
        else:
            each = functional.cross_entropy(logits, y[rows], reduction="none")
            loss = (each * weights[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


def shuffled(rows, epochs, size, generator):
    for _ in range(epochs):
        yield from torch.split(rows[torch.randperm(len(rows), generator=generator)], size)


@pytest.mark.parametrize("weights", [None, CLASS_WEIGHTS], ids=["plain", "weighted"])
def test_heads_on_frozen_features_are_trained_as_by_hand(weights):
    x, y, seed = tiny.features(70, 12), tiny.labels(70), 3
    data = Frozen(x, y, CLASSES, weights)
    of_rows = None if weights is None else weights[y]
    for masks in (False, True):
        units = linear_probe.MASKED_UNITS if masks else linear_probe._UNITS
        gain = None if masks else 1.0
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            head = turnover.WideHead(12, units, CLASSES, gain=gain)
        head.standardize(x)
        generator = torch.Generator().manual_seed(seed)
        if masks:
            found = train_masked_head(data, seed).model
            exposed = turnover.attach(head, "activation", turnover.MaskSpec(seed=seed)).exposed
            optimizer = torch.optim.Adam(head.parameters(), 5e-5, fused=True)
            order = shuffled(torch.arange(70), -(-480 * 50 // 70), 50, generator)
        else:
            kept = torch.arange(0, 70, 3)
            found = train_head(data, kept, seed, epochs=20, weight_decay=0.1)
            exposed = None
            optimizer = torch.optim.SGD(
                head.parameters(), 0.01, momentum=0.9, weight_decay=0.1, fused=True
            )
            order = shuffled(kept, 20, 50, generator)
            rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 20)
        for _ in loop_by_hand(head, optimizer, x, y, torch.arange(70), order, exposed, of_rows):
            if not masks:
                rates.step()
        assert_same_bits(found.state_dict(), head.state_dict())
        assert not found.training


@pytest.mark.parametrize("weighted", [False, True])
def test_the_scikit_learn_classifier_is_trained_as_by_hand(weighted):
    pytest.importorskip("sklearn")
    pytest.importorskip("pandas")
    from turnover.integrations.sklearn import TurnoverClassifier

    x, y, ids = tiny.features(90, 5), tiny.labels(90), torch.arange(90) // 2
    given = (torch.arange(90) % 4).double().numpy() if weighted else None
    model = TurnoverClassifier(units=32, batch_size=16, learning_rate=0.01, random_state=0)
    model.fit(x.numpy(), y.numpy(), ids=ids.numpy(), sample_weight=given)

    seed = int(np.random.RandomState(0).randint(2**31))
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        head = turnover.WideHead(5, 32, CLASSES, gain=0.7)
    head.to_empty(device="cpu").reset_parameters(generator)
    with torch.no_grad():
        head.spread.weight[1::2] = head.spread.weight[::2].clone()
        head.classify.weight[:, 1::2] = head.classify.weight[:, ::2].clone()
    network = turnover.attach(head, "activation", turnover.MaskSpec(seed=seed))
    learned = torch.from_numpy(np.flatnonzero(model.weights_))
    weights = torch.from_numpy(model.weights_).float()[learned] if weighted else None
    inputs = model.train_batch_.inputs[learned]
    steps = -(-len(learned) // 16)
    epochs = -(-300 // steps)
    layers = [(head.spread, 0.01), (head.classify, 0.0001)]
    groups = [{"params": list(layer.parameters()), "lr": rate} for layer, rate in layers]
    optimizer = torch.optim.Adam(groups, fused=True)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * steps)
    order = shuffled(torch.arange(len(learned)), epochs, 16, generator)
    labels, ids = y[learned], ids[learned]
    for _ in loop_by_hand(head, optimizer, inputs, labels, ids, order, network.exposed, weights):
        rates.step()
    assert_same_bits(model.network_.model.state_dict(), head.state_dict())


def mlp(seed):
    with torch.random.fork_rng():
        return tiny.randomise(tiny.mlp(12, bias=True), seed)


def convolution(seed):
    """Of a kind that is not stacked."""
    with torch.random.fork_rng():
        model = nn.Sequential(
            nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(16, CLASSES)
        )
    return tiny.randomise(model, seed)


def optimizer_of(recipe, parameters):
    if recipe.optimizer == "adam":
        return torch.optim.Adam(
            parameters, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
    return torch.optim.SGD(
        parameters,
        recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


X, Y, IDS = tiny.features(ROWS), tiny.labels(ROWS), torch.arange(ROWS) + 40
SEEDS = [4, 1, 4, 2, 3, 5, 6, 7, 8]
CHOSEN = torch.stack(
    [torch.randperm(ROWS, generator=torch.Generator().manual_seed(i))[:17] for i in range(9)]
)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("keep", [None, 0.5, 0.7])
def test_single_networks_are_retrained_as_by_hand(keep, optimizer):
    recipe = Recipe(3, 0.02, 5, weight_decay=1e-3, optimizer=optimizer)
    masked = None if keep is None else Masked(("1",), keep)
    found = train(convolution, X, Y, recipe, SEEDS, rows=CHOSEN, ids=IDS, masked=masked).states
    for state, seed, rows in zip(found, SEEDS, CHOSEN, strict=True):
        model, exposed = convolution(seed).train(), None
        if masked:
            exposed = turnover.attach(model, "1", turnover.MaskSpec(keep, seed=seed)).exposed
        order = shuffled(rows, 3, 5, torch.Generator().manual_seed(seed))
        steps = optimizer_of(recipe, list(model.parameters()))
        for _ in loop_by_hand(model, steps, X, Y, IDS, order, exposed):
            pass
        assert_same_bits(state, model.state_dict())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("keep", [None, 0.5, 0.7])
def test_stacked_networks_are_retrained_as_by_hand(keep, optimizer):
    recipe = Recipe(3, 0.02, 5, weight_decay=1e-3, optimizer=optimizer)
    masked = None if keep is None else Masked(("1", "3"), keep)
    found = train(mlp, X, Y, recipe, SEEDS, rows=CHOSEN, ids=IDS, masked=masked).states
    models = [mlp(seed) for seed in SEEDS]
    named = [dict(model.named_parameters()) for model in models]
    stacked = {
        name: torch.stack([one[name].detach() for one in named]).requires_grad_()
        for name in named[0]
    }
    current = {}
    if masked:
        for site in masked.sites:
            models[0][int(site)].register_forward_hook(
                lambda _module, _inputs, output, site=site: output * current[site]
            )

    def forward(parameters, batch, factors):
        current.update(factors)
        return functional_call(models[0], parameters, (batch,))

    def factors(rows):
        if not masked:
            return {}
        bits = [
            torch.stack(
                [
                    turnover.MaskSpec(keep, seed=seed).exposed(IDS[of_model], site=site, units=12)
                    for seed, of_model in zip(SEEDS, rows, strict=True)
                ]
            )
            for site in masked.sites
        ]
        return {site: one * (1 / keep) for site, one in zip(masked.sites, bits, strict=True)}

    steps = optimizer_of(recipe, list(stacked.values()))
    orders = [
        shuffled(rows, 3, 5, torch.Generator().manual_seed(seed))
        for seed, rows in zip(SEEDS, CHOSEN, strict=True)
    ]
    for batches in zip(*orders, strict=True):
        rows = torch.stack(batches)
        outputs = vmap(forward)(stacked, X[rows], factors(rows))
        each = functional.cross_entropy(
            outputs.flatten(0, 1), Y[rows].flatten(), reduction="none"
        ).view(rows.shape)
        steps.zero_grad()
        each.mean(dim=1).sum().backward()
        steps.step()
    for index, state in enumerate(found):
        assert_same_bits(state, {name: value[index].detach() for name, value in stacked.items()})
