"""Copies of attached models, and target networks."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tiny
import turnover
from turnover import BindingError, InputError, MaskSpec

IDS = [3, 2**40, 17, 0]


def copies(model):
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    yield torch.optim.swa_utils.AveragedModel(model)
    yield copy.deepcopy(copy.deepcopy(model))
    yield nn.Sequential(copy.deepcopy(model))


@pytest.mark.parametrize("mode", [True, False], ids=["training", "eval"])
def test_a_copy_does_not_run_whole_in_silence_while_the_original_has_a_batch(mode):
    model, x = tiny.mlp(), tiny.features(4)
    network = turnover.attach(model, "mlp")
    for target in copies(model):
        target.train(mode)
        with network.exposed(IDS):
            with torch.no_grad(), pytest.raises(BindingError, match=r"copy.*turnover.attach"):
                target(x)
            with network.mean(), torch.no_grad():
                assert target(x).shape == (4, 3)
            with torch.no_grad(), pytest.raises(BindingError, match="copy"):
                target(x)
        target.eval()(x)


def test_a_copy_of_a_part_is_a_copy():
    model, x = nn.Sequential(tiny.mlp()[:4], nn.Linear(16, 3)), tiny.features(4)
    network = turnover.attach(model, "0.*[13]")
    part = copy.deepcopy(model[0])
    with network.exposed(IDS), torch.no_grad(), pytest.raises(BindingError, match="copy"):
        part(x)


def test_a_copy_made_within_a_context_is_not_bound_to_it():
    model, x = tiny.mlp().eval(), tiny.features(4)
    network = turnover.attach(model, "mlp")
    with network.exposed(IDS):
        twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))


def test_what_copies_do_beside_training_they_still_do():
    model, x = tiny.mlp(), tiny.features(4)
    network = turnover.attach(model, "mlp")
    average = torch.optim.swa_utils.AveragedModel(model)
    with network.exposed(IDS):
        model(x).sum().backward()
    average.update_parameters(model)
    torch.optim.swa_utils.update_bn([x], average)
    torch.testing.assert_close(average.eval()(x), model.eval()(x))
    # Evaluation, as against training, is free to compare sub-networks with the whole one.
    with network.exposed(IDS), torch.no_grad():
        assert not torch.equal(average(x), model(x))
    with network.exposed(IDS), torch.no_grad():
        nn.DataParallel(model)(x)  # of no GPU: a wrapper, not a copy


@pytest.mark.parametrize("sites", ["mlp", "1"])
def test_attaching_to_a_copy_gives_one_network_with_the_masks_of_the_original(sites):
    model, x = tiny.mlp(), tiny.features(4)
    network = turnover.attach(model, "mlp", MaskSpec(seed=4))
    for target in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied = turnover.attach(target, sites, MaskSpec(seed=4))
        hooks = sum(len(module._forward_hooks) for module in target.modules())
        assert hooks == len(copied.sites)
        with network.exposed(IDS), copied.exposed(IDS):
            assert torch.equal(target(x), model(x)) == (sites == "mlp")
        with network.exposed(IDS), copied.mean(), torch.no_grad():
            whole = target(x)
        assert torch.equal(whole, target.eval()(x))
        with pytest.raises(InputError, match="already"):
            turnover.attach(target, "mlp")


def test_a_copied_network_that_is_used_is_not_taken_away():
    twin = copy.deepcopy(turnover.attach(tiny.mlp(), "mlp"))
    with twin.exposed(IDS):
        twin.model(tiny.features(4))
    with pytest.raises(InputError, match="already"):
        turnover.attach(twin.model, "mlp")
    unused = copy.deepcopy(twin)
    turnover.attach(unused.model, "mlp")
    with pytest.raises(BindingError, match="attach again"):
        unused.exposed(IDS)


def test_a_compiled_copy_is_refused_likewise():
    model, x = tiny.mlp(), tiny.features(4)
    network = turnover.attach(model, "mlp")
    torch._dynamo.reset()
    target = copy.deepcopy(model).eval()
    compiled = torch.compile(target, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), target(x))
        with network.exposed(IDS), pytest.raises(BindingError, match="copy"):
            compiled(x)


class Agent(nn.Module):
    """A network and what is named its target."""

    def __init__(self, online, target, *, equal=True, make=tiny.mlp):
        super().__init__()
        first = make()
        second = copy.deepcopy(first) if equal else tiny.randomise(make(), seed=9)
        self.add_module(online, first)
        self.add_module(target, second)

    def forward(self, x):
        return sum(child(x) for child in self.children())


TARGETS = [
    ("critic", "critic_target"),
    ("qf1", "qf1_target"),
    ("qf1", "target_qf1"),
    ("online", "target"),
    ("online_net", "target_net"),
    ("policy_net", "target_net"),
    ("q_network", "target_network"),
    ("q_net", "q_net_target"),
    ("student", "teacher"),
    ("online_encoder", "target_encoder"),
    ("encoder", "momentum_encoder"),
    ("model", "ema_model"),
    ("net", "ema"),
    ("policy", "policy_old"),
    ("actor", "actorTarget"),
    ("qnetwork_local", "qnetwork_target"),
]


@pytest.mark.parametrize(("online", "target"), TARGETS)
def test_a_network_and_its_target_are_to_be_attached_apart(online, target):
    model, x = Agent(online, target), tiny.features(4)
    for holder in (model, nn.ModuleDict({"algorithm": model})):
        with pytest.raises(
            InputError, match=rf"{online}'.*{target}'.*attach\(model\..*masks agree"
        ):
            turnover.attach(holder, "mlp")
    one, other = getattr(model, online), getattr(model, target)
    networks = turnover.attach(one, "mlp"), turnover.attach(other, "mlp")
    with networks[0].exposed(IDS), networks[1].exposed(IDS):
        assert torch.equal(one(x), other(x))


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("qf0", "qf1", True),
        ("query", "document", True),
        ("source_encoder", "target_encoder", True),
        ("text", "target", True),
        ("left", "right", True),
        ("critic", "actor_target", True),
        ("student", "teacher", False),
        ("critic", "critic_target", False),
        ("golden", "old", False),
    ],
)
def test_twins_that_are_no_targets_are_attached_together(one, other, equal):
    network = turnover.attach(Agent(one, other, equal=equal), "mlp")
    assert len(network.sites) == 4


def test_layers_that_are_copies_and_targets_that_are_not_masked_are_attached():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 3)
    assert len(turnover.attach(model, "layers.*.linear1").sites) == 3
    assert turnover.attach(Agent("critic", "critic_target"), ["critic.1", "critic.3"]).sites == [
        "critic.1",
        "critic.3",
    ]


def test_a_target_of_another_structure_is_none():
    model = Agent("critic", "critic_target")
    model.critic_target = nn.Sequential(*model.critic_target, nn.ReLU(), nn.Linear(3, 3))
    assert turnover.attach(model, "mlp").sites
