import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import tiny
import turnover
from turnover import InputError


def leaks(report):
    return {p.name: p.leaking for p in report.parameters if p.leaking}


def test_a_bias_after_the_last_site_leaks_fully():
    model = tiny.mlp(width=8, bias=True)
    report = turnover.attach(model, "mlp").audit((tiny.features(8), tiny.labels(8)))
    assert leaks(report) == {"4.bias": 3}
    total = sum(p.numel() for p in model.parameters())
    assert report.leaking_share == pytest.approx(3 / total)
    assert not report.clean


def test_everything_below_the_first_site_leaks():
    report = turnover.attach(tiny.mlp(width=8), "3").audit(tiny.features(8))
    assert leaks(report) == {"0.weight": 6 * 8, "0.bias": 8}


class Between(nn.Module):
    """A linear layer and a norm between two masks."""

    def __init__(self):
        super().__init__()
        self.first, self.act = nn.Linear(6, 8), nn.Tanh()
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 3, bias=False)

    def forward(self, x):
        return self.last(self.norm(self.act(self.first(x))))


def test_a_norm_after_the_site_leaks_with_all_that_follows():
    report = turnover.attach(Between(), "act").audit(tiny.features(8))
    assert leaks(report) == {"norm.weight": 8, "norm.bias": 8, "last.weight": 24}


def test_embeddings_leak():
    model = nn.Sequential(nn.EmbeddingBag(5, 6), *tiny.mlp(width=8))
    words = torch.tensor([[0, 1], [2, 2], [0, 2]])
    report = turnover.attach(model, ["2", "4"]).audit(words)
    assert leaks(report) == {"0.weight": 3 * 6}


@pytest.mark.parametrize(("make", "sites"), [(tiny.mlp, "mlp"), (tiny.FunctionalHead, "head")])
@pytest.mark.parametrize("keep", [0.5, 0.3])
def test_networks_masked_after_every_trained_layer_are_clean(make, sites, keep):
    network = turnover.attach(make(), sites, turnover.MaskSpec(keep))
    report = network.audit((tiny.features(8), tiny.labels(8)))
    assert report.leaking_share == 0
    assert report.clean
    assert leaks(report) == {}


def test_a_frozen_bert_with_masked_lora_and_head_is_clean():
    model = tiny.bert(layers=2)
    network = turnover.attach(model, ["lora", "head"])
    report = network.audit({**tiny.texts(8), "labels": tiny.labels(8)})
    assert len(report.parameters) == 2 * 2 * 2 + 3
    assert report.leaking_share == 0
    assert report.clean


def test_a_bert_trained_without_masks_on_its_ranks_leaks():
    network = turnover.attach(tiny.bert(layers=1), "head")
    found = leaks(network.audit(tiny.texts(8)))
    assert found
    assert all("lora" in name for name in found)


def test_a_zero_initialised_lora_does_not_hide_its_leaks():
    model = tiny.bert(layers=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    found = leaks(turnover.attach(model, "head").audit(tiny.texts(8)))
    elements = {n.replace(".default.weight", ""): 4 * 16 for n in found if "lora_A" in n}
    assert len(elements) == 2
    assert all(found[f"{name}.default.weight"] == count for name, count in elements.items())


def test_batch_statistics_are_reported_and_the_fix_helps():
    model = tiny.ConvNet()
    network = turnover.attach(model, ["channels", "mlp"])
    report = network.audit(tiny.features(8, 1, 8, 8))
    buffers = [
        f"features.{i}.{b}"
        for i in (1, 5)
        for b in ("running_mean", "running_var", "num_batches_tracked")
    ]
    assert sorted(report.buffers) == sorted(buffers)
    assert not report.clean
    assert "features.1.running_mean" in str(report)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    report = network.audit(tiny.features(8, 1, 8, 8))
    assert report.buffers == ()
    assert leaks(report) == {"classifier.3.bias": 3}


def test_gradient_clipping_by_norm_is_reported():
    network, x = turnover.attach(tiny.mlp(), "mlp"), tiny.features(4)
    for harmless in (None, 0, 0.0, float("inf")):
        assert network.audit(x, max_grad_norm=harmless).clean
    report = network.audit(x, max_grad_norm=1.0)
    assert not report.clean
    said = str(report)
    assert "max_grad_norm=1" in said
    for fix in ("Trainer max_grad_norm=0", "gradient_clip_val=None", 'max_grad_norm=float("inf")'):
        assert fix in said


class Whitening(torch.optim.Optimizer):
    """An optimiser that mixes the elements of a weight."""

    def __init__(self, parameters):
        super().__init__(parameters, {})


class Wrapped:
    """What accelerate makes of an optimiser."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_optimisers_that_may_mix_units_are_reported():
    model, x = tiny.mlp(), tiny.features(4)
    network = turnover.attach(model, "mlp")
    for make in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad):
        assert network.audit(x, optimizer=make(model.parameters())).clean
        assert network.audit(x, optimizer=Wrapped(make(model.parameters()))).clean
    report = network.audit(x, optimizer=Whitening(model.parameters()))
    assert not report.clean
    assert "Whitening" in str(report)


def frozen_state(model):
    return (
        copy.deepcopy(model.state_dict()),
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: m.training for name, m in model.named_modules()},
        {name: p.grad for name, p in model.named_parameters()},
    )


@pytest.mark.parametrize("training", [True, False])
def test_the_audit_leaves_the_model_as_it_was(training):
    model = tiny.ConvNet().train(training)
    model.features[1].train(not training)
    model.features[0].weight.requires_grad_(False)
    model.classifier[0].weight.grad = torch.ones_like(model.classifier[0].weight)
    network = turnover.attach(model, "mlp")
    before = frozen_state(model)
    network.audit(tiny.features(9, 1, 8, 8))
    with pytest.raises(RuntimeError):
        network.audit(tiny.features(9, 2, 8, 8))
    after = frozen_state(model)
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    assert after[1:3] == before[1:3]
    assert all(after[3][name] is value for name, value in before[3].items())


def test_a_failing_audit_restores_buffers_too():
    model = tiny.ConvNet()
    model.classifier[3] = nn.Linear(5, 3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        turnover.attach(model, "mlp").audit(tiny.features(4, 1, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tied_parameters_are_audited_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act = nn.Linear(6, 6), nn.Tanh()
            self.second = nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.act(self.first(x)))

    model = Tied()
    before = model.first.weight.detach().clone()
    report = turnover.attach(model, "act").audit(tiny.features(8))
    assert [p.name for p in report.parameters] == ["first.weight", "first.bias", "second.bias"]
    assert torch.equal(model.second.weight, before)
    assert model.second.weight is model.first.weight
    found = leaks(report)
    # A dropped unit's row is used as the input layer's, and its column as the output layer's.
    assert found["first.weight"] > 0
    assert found["second.bias"] == 6


def test_the_printed_table_names_the_parameters_and_the_fix():
    network = turnover.attach(tiny.mlp(width=8, bias=True), "3")
    text = str(network.audit(tiny.features(8)))
    for part in ("0.weight", "8x6", "48", "4.bias", "100.0%", "fix:", "requires_grad_(False)"):
        assert part in text
    clean = str(turnover.attach(tiny.mlp(), "mlp").audit(tiny.features(8)))
    assert clean.startswith("0.00%")
    assert "fix:" not in clean


def test_names_in_the_table_are_canonical():
    model = nn.ModuleDict({"module": tiny.mlp(bias=True)})
    model.forward = model["module"].forward
    report = turnover.attach(model, "mlp").audit(tiny.features(4))
    assert leaks(report) == {"4.bias": 3}


def test_a_model_without_trained_parameters_is_refused():
    network = turnover.attach(tiny.mlp().requires_grad_(False), "mlp")
    with pytest.raises(InputError, match="no trainable"):
        network.audit(tiny.features(4))


def test_batches_of_one_row_and_half_precision_models_can_be_audited():
    network = turnover.attach(tiny.mlp(bias=True).to(torch.bfloat16), "mlp")
    assert leaks(network.audit(tiny.features(1).bfloat16())) == {"4.bias": 3}


class Outputs(nn.Module):
    """Twin critics; the first has no leak, and the second its bias."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.second, self.kind = tiny.mlp(), tiny.mlp(bias=True), kind

    def forward(self, x):
        return self.kind(self.first(x), self.second(x))


@dataclass
class Both:
    clean: torch.Tensor
    more: dict


KINDS = {
    "tuple": lambda a, b: (a, b),
    "list in a tuple": lambda a, b: (a, [None, b]),
    "mapping": lambda a, b: {"logits": a, "values": b},
    "dataclass": lambda a, b: Both(a, {"deep": (b,)}),
    "counts first": lambda a, b: (a.argmax(dim=1), a, b),
    "distribution": lambda a, b: (a, torch.distributions.Normal(b, 1.0)),
    "more axes": lambda a, b: (a, b[:, None, :, None]),
    "loss first": lambda a, b: (a.sum(), a, b),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 8])
def test_a_leak_by_way_of_any_output_is_found(kind, rows):
    network = turnover.attach(Outputs(KINDS[kind]), "mlp")
    assert leaks(network.audit(tiny.features(rows))) == {"second.4.bias": 3}


def test_outputs_that_are_all_clean_are_clean():
    model = Outputs(KINDS["mapping"])
    model.second = tiny.mlp()
    assert turnover.attach(model, "mlp").audit(tiny.features(8)).clean


@pytest.mark.parametrize(
    "made", [lambda a, b: (a + b).sum(), lambda a, b: {"n": 3}, lambda a, b: a.T]
)
def test_outputs_without_the_rows_of_the_batch_are_refused(made):
    network = turnover.attach(Outputs(made), "mlp")
    with pytest.raises(InputError, match="rows of the batch on axis 0"):
        network.audit(tiny.features(8))
