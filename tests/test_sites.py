import pytest
import torch
from torch import nn

import tiny
import turnover
from turnover import BindingError, InputError, MaskSpec, Site


def sites_of(model, sites, **kwargs):
    network = turnover.attach(model, sites)
    network.detach()
    return network.sites


def test_sites_are_found_by_name_in_definition_order():
    assert sites_of(tiny.mlp(), ["3", "1"]) == ["1", "3"]
    assert sites_of(tiny.ConvNet(), "classifier.1") == ["classifier.1"]


def test_sites_are_found_by_glob():
    assert sites_of(tiny.ConvNet(), "features.[26]") == ["features.2", "features.6"]


def test_sites_are_found_by_type():
    assert sites_of(tiny.mlp(), nn.GELU) == ["1", "3"]
    assert sites_of(tiny.ConvNet(), nn.ReLU) == ["features.2", "features.6", "classifier.1"]


def test_requests_of_several_kinds_are_joined():
    assert sites_of(tiny.ConvNet(), ["channels", "classifier.*1"]) == [
        "features.2",
        "features.6",
        "classifier.1",
    ]


def test_mlp_preset_finds_activations_after_linear_layers():
    assert sites_of(tiny.mlp(), "mlp") == ["1", "3"]
    assert sites_of(tiny.ConvNet(), "mlp") == ["classifier.1"]
    normalised = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    assert sites_of(normalised, "mlp") == ["2"]


def test_channels_preset_finds_activations_after_convolutions():
    model = tiny.ConvNet()
    network = turnover.attach(model, "channels")
    assert network.units == {"features.2": 4, "features.6": 6}
    with network.exposed([7, 8]):
        model(tiny.features(2, 1, 8, 8))
    assert network.known_units() == {"features.2": 4, "features.6": 6}


def test_channels_are_masked_whole():
    model = tiny.ConvNet().eval()
    network = turnover.attach(model, "channels")
    seen = []
    model.features[2].register_forward_hook(lambda m, a, output: seen.append(output))
    with network.exposed([7, 8]):
        model(tiny.features(2, 1, 8, 8).abs())
    kept = network.spec.exposed([7, 8], "features.2", 4)
    assert bool((seen[0].flatten(2).abs().sum(dim=2)[~kept] == 0).all())


def test_an_instance_norm_between_convolution_and_activation_leaves_channels_channels():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.InstanceNorm2d(4), nn.ReLU())
    network = turnover.attach(model, "channels")
    with network.exposed([1]):
        model(tiny.features(1, 1, 6, 6))
    assert network.known_units() == {"2": 4}


def test_head_preset_finds_the_wide_heads():
    model = tiny.FunctionalHead(units=64)
    network = turnover.attach(model, "head")
    assert network.units == {"head.activation": 64}
    assert network.mask_units == 64


def test_head_preset_finds_a_model_that_is_a_wide_head():
    head = turnover.WideHead(10, 64, 3)
    assert turnover.attach(head, "head").units == {"activation": 64}
    wrapped = torch.nn.ModuleDict({"module": turnover.WideHead(10, 32, 3)})
    assert turnover.attach(wrapped, "head").sites == ["activation"]


def test_presets_find_lora_ranks_and_mlps_of_a_bert():
    model = tiny.bert(layers=2, rank=4)
    network = turnover.attach(model, ["lora", "head"])
    layer = "bert.encoder.layer.{}.attention.self.{}.lora_A.default"
    lora = [layer.format(i, name) for i in (0, 1) for name in ("query", "value")]
    assert network.units == dict.fromkeys(lora, 4) | {"classifier.activation": 48}
    network.detach()
    network = turnover.attach(model, "mlp")
    with network.exposed([1, 2]):
        model(**tiny.texts(2))
    assert network.known_units() == {
        "bert.encoder.layer.0.intermediate.intermediate_act_fn": 24,
        "bert.encoder.layer.1.intermediate.intermediate_act_fn": 24,
        "bert.pooler.activation": 16,
        "classifier.activation": 48,
    }


def test_presets_work_on_distilbert_and_gpt2():
    from transformers import AutoModelForSequenceClassification, DistilBertConfig

    config = DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=24)
    distilbert = AutoModelForSequenceClassification.from_config(config)
    network = turnover.attach(distilbert, "mlp")
    with network.exposed([1, 2]):
        distilbert(**tiny.texts(2))
    assert network.known_units() == {"distilbert.transformer.layer.0.ffn.activation": 24}
    gpt2 = tiny.gpt2()
    network = turnover.attach(gpt2, "mlp")
    with network.exposed([1, 2]):
        gpt2(**tiny.texts(2))
    assert network.known_units() == {f"transformer.h.{i}.mlp.act": 64 for i in (0, 1)}


@pytest.mark.parametrize("sites", ["mlp", Site("act"), Site("second", axis=1)])
def test_widths_are_not_guessed_from_definition_order(sites):
    class Reordered(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.act = nn.Linear(4, 9), nn.Linear(9, 2), nn.ReLU()

        def forward(self, x):
            return self.second(self.act(self.first(x)))

    network = turnover.attach(Reordered(), sites)
    with pytest.raises(BindingError, match="run the model once"):
        network.to_dict()


def test_widths_that_neighbours_do_not_tell_are_known_after_one_forward():
    model = nn.Sequential(nn.Identity(), nn.Linear(5, 2))
    network = turnover.attach(model, "0")
    with pytest.raises(BindingError, match="'0'"):
        _ = network.mask_units
    with network.exposed([1]):
        model(torch.ones(1, 5))
    assert network.known_units() == {"0": 5}


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        ("claslifier.1", r"classifier\.1"),
        ("heads", "head"),
        ("nothing.*", "nothing"),
        (Site("feature"), "features"),
    ],
)
def test_unknown_sites_are_answered_with_the_closest_names(request_, named):
    with pytest.raises(InputError, match=named):
        turnover.attach(tiny.ConvNet(), request_)


def test_types_and_presets_that_find_nothing_say_what_there_is():
    with pytest.raises(InputError, match="ReLU"):
        turnover.attach(tiny.ConvNet(), nn.GELU)
    with pytest.raises(InputError, match="WideHead"):
        turnover.attach(tiny.mlp(), "head")
    with pytest.raises(InputError, match="no sites"):
        turnover.attach(tiny.mlp(), [])


def test_attaching_twice_is_refused_until_detached():
    model = tiny.mlp()
    network = turnover.attach(model, "1")
    with pytest.raises(InputError, match=r"'1'.*detach"):
        turnover.attach(model, "mlp")
    network.detach()
    turnover.attach(model, "mlp")


def test_one_site_asked_for_in_two_ways_is_refused():
    with pytest.raises(InputError, match="twice"):
        turnover.attach(tiny.mlp(), ["1", Site("1", unit_size=2)])


class Wrapper(nn.Module):
    """What DistributedDataParallel makes of names."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def exposed_outputs(model, sites, x):
    network = turnover.attach(model.eval(), sites)
    with network.exposed([5, 2**40]), torch.no_grad():
        output = tiny.logits(model(**x) if isinstance(x, dict) else model(x))
    network.detach()
    return network, output


@pytest.mark.parametrize(
    "wrap",
    [
        Wrapper,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: Wrapper(torch.compile(model, backend="eager")),
        lambda model: torch.compile(Wrapper(model), backend="eager"),
    ],
    ids=["ddp", "compile", "ddp of compile", "compile of ddp"],
)
@pytest.mark.parametrize("sites", ["mlp", "1", nn.GELU, ["[13]"]])
def test_wrappers_change_neither_names_nor_masks(wrap, sites):
    model, x = tiny.mlp(), tiny.features(2)
    plain, expected = exposed_outputs(model, sites, x)
    digest = plain.digest()
    torch._dynamo.reset()
    wrapped, output = exposed_outputs(wrap(model), sites, x)
    assert wrapped.sites == plain.sites
    assert wrapped.fingerprint() == plain.fingerprint()
    assert wrapped.digest() == digest
    assert torch.equal(output, expected)


def test_peft_wrapping_changes_neither_names_nor_masks():
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    config = LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False)
    bare = tiny.gpt2()
    weights = {name: value.clone() for name, value in bare.state_dict().items()}
    inject_adapter_in_model(config, bare)
    other = tiny.gpt2()
    other.load_state_dict(weights)
    wrapped = get_peft_model(other, config)
    adapter = {n: p for n, p in bare.state_dict().items() if "lora" in n}
    missing = wrapped.base_model.model.load_state_dict(adapter, strict=False)
    assert not missing.unexpected_keys
    plain, expected = exposed_outputs(bare, ["lora", "mlp"], tiny.texts(2))
    again, output = exposed_outputs(wrapped, ["lora", "mlp"], tiny.texts(2))
    assert plain.sites[0] == "transformer.h.0.attn.c_attn.lora_A.default"
    assert again.sites == plain.sites
    assert again.fingerprint() == plain.fingerprint()
    assert torch.equal(output, expected)


def test_names_that_only_resemble_wrappers_are_kept():
    model = nn.ModuleDict({"my_orig_mod": nn.ModuleDict({"module": nn.Linear(3, 4)})})
    assert sites_of(model, "*.module") == ["my_orig_mod.module"]


class Heads(nn.Module):
    """Four heads of three elements each, on the last axis but one."""

    def __init__(self):
        super().__init__()
        self.heads = nn.Identity()

    def forward(self, x):
        return self.heads(x)


def test_units_may_be_blocks_of_an_axis():
    model = Heads().eval()
    network = turnover.attach(model, Site("heads", axis=1, unit_size=3))
    x = torch.ones(2, 12, 5)
    with network.exposed([3, 4]):
        output = model(x)
    kept = network.spec.exposed([3, 4], "heads", 4)
    assert network.known_units() == {"heads": 4}
    assert torch.equal(output != 0, kept.repeat_interleave(3, 1)[:, :, None].expand(2, 12, 5))


def test_units_may_lie_on_any_axis_but_the_batch():
    model = Heads().eval()
    for axis in (1, 2, 3, -1, -2):
        network = turnover.attach(model, Site("heads", axis=axis))
        with network.exposed([3]):
            output = model(torch.ones(1, 4, 5, 6))
        others = [a for a in (1, 2, 3) if a != axis % 4]
        assert torch.equal(
            output.amax(others) != 0,
            network.spec.exposed([3], "heads", (4, 5, 6)[axis % 4 - 1]),
        )
        network.detach()
    with pytest.raises(InputError, match="axis 0"):
        Site("heads", axis=0)
    with pytest.raises(InputError, match="unit_size"):
        Site("heads", unit_size=0)


@pytest.mark.parametrize(
    ("site", "shape"),
    [
        (Site("heads", axis=-2), (2, 4)),
        (Site("heads", axis=3), (2, 4)),
        (Site("heads", axis=-3), (2, 4)),
        (Site("heads", unit_size=3), (2, 4)),
        (Site("heads"), (2,)),
        (Site("heads"), ()),
    ],
)
def test_outputs_without_such_units_are_refused_by_name(site, shape):
    model = Heads().eval()
    network = turnover.attach(model, site, MaskSpec())
    with network.exposed([3, 4]), pytest.raises(BindingError, match="'heads'"):
        model(torch.ones(shape))
