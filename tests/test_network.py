import contextlib
import copy
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import tiny
import turnover
from turnover import BindingError, InputError, MaskSpec, Site

IDS = [3, 2**40, 17, 0]
keeps = pytest.mark.parametrize("keep", [0.5, 0.3])


def by_hand(model: nn.Sequential, x: torch.Tensor, spec: MaskSpec, ids, hidden) -> torch.Tensor:
    """The masked network of the paper, written out."""
    p, h = spec.keep, x
    for linear, name in ((model[0], "1"), (model[2], "3")):
        m = spec.exposed(ids, name, linear.out_features).float() / p
        factor = torch.where(torch.as_tensor(hidden).view(-1, 1), (1 - p * m) / (1 - p), m)
        h = nn.functional.gelu(linear(h)) * factor
    return model[4](h)


@keeps
def test_exposed_and_hidden_networks_are_those_of_the_definition(keep):
    model, x, spec = tiny.mlp(bias=True).eval(), tiny.features(4), MaskSpec(keep)
    network = turnover.attach(model, "mlp", spec)
    with network.exposed(IDS):
        exposed = model(x)
    with network.hidden(IDS):
        hidden = model(x)
    network.detach()
    torch.testing.assert_close(exposed, by_hand(model, x, spec, IDS, False))
    torch.testing.assert_close(hidden, by_hand(model, x, spec, IDS, True))
    assert not torch.allclose(exposed, hidden)


@keeps
def test_each_row_may_have_a_side_of_its_own(keep):
    model, x = tiny.mlp().eval(), tiny.features(4)
    network = turnover.attach(model, "mlp", MaskSpec(keep))
    side = torch.tensor([True, False, False, True])
    with network.bind(torch.tensor(IDS), side):
        mixed = model(x)
    with network.exposed(IDS):
        exposed = model(x)
    with network.hidden(IDS):
        hidden = model(x)
    assert torch.equal(mixed, torch.where(side[:, None], hidden, exposed))


def test_sides_of_rows_are_exact_in_double_precision():
    model, x = tiny.mlp().double().eval(), tiny.features(4).double()
    network = turnover.attach(model, "mlp", MaskSpec(0.3))
    with network.bind(IDS, torch.tensor([True] * 4)):
        mixed = model(x)
    with network.hidden(IDS):
        assert torch.equal(model(x), mixed)


@pytest.mark.parametrize(
    "side", [True, [True, False, False, True], torch.ones(4), torch.tensor([True])]
)
def test_sides_that_are_not_one_bool_for_each_row_are_refused(side):
    network = turnover.attach(tiny.mlp(), "mlp")
    with pytest.raises(InputError, match="hidden"):
        network.bind(IDS, side)


def test_only_the_mask_is_flipped_and_never_a_weight():
    model, x = tiny.mlp(), tiny.features(4)
    before = copy.deepcopy(model.state_dict())
    pointers = [p.data_ptr() for p in model.parameters()]
    network = turnover.attach(model, "mlp")
    for context in (network.exposed(IDS), network.hidden(IDS), network.mean()):
        with context:
            model(x).sum().backward()
            for name, value in model.state_dict().items():
                assert torch.equal(value, before[name])
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_attaching_changes_neither_class_nor_parameters_and_detaching_restores():
    model, x = tiny.mlp(), tiny.features(4)
    expected, keys, kind = model(x), list(model.state_dict()), type(model)
    names = [name for name, _ in model.named_modules()]
    network = turnover.attach(model, "mlp")
    assert type(model) is kind
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == names
    with network.exposed(IDS):
        assert not torch.equal(model(x), expected)
    network.detach()
    network.detach()
    assert torch.equal(model(x), expected)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_detached_network_refuses_to_pretend_that_it_masks():
    network = turnover.attach(tiny.mlp(), "mlp")
    network.detach()
    with pytest.raises(BindingError, match="attach again"):
        network.exposed(IDS)


def test_eval_mode_without_ids_is_the_mean_network():
    model, x = tiny.mlp(), tiny.features(4)
    expected = model(x)
    network = turnover.attach(model.eval(), "mlp")
    assert torch.equal(model(x), expected)
    model.train()
    with network.mean():
        assert torch.equal(model(x), expected)


def test_forgetting_ids_in_training_is_refused():
    model = tiny.mlp()
    network = turnover.attach(model, "mlp")
    with pytest.raises(BindingError, match=r"'1'.*exposed\(ids\)"):
        model(tiny.features(4))
    with network.exposed(IDS):
        model(tiny.features(4))
    with pytest.raises(BindingError, match="without ids"):
        model(tiny.features(4))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_wrong_number_of_ids_names_the_site(count):
    model = tiny.mlp()
    network = turnover.attach(model, "mlp")
    with network.exposed(range(count)), pytest.raises(BindingError, match=r"'1'.*4 rows.*ids"):
        model(tiny.features(4))


def test_the_last_partial_batch_runs():
    model, x = tiny.mlp(), tiny.features(10)
    network = turnover.attach(model, "mlp")
    ids, outputs = torch.arange(10), []
    for part, rows in zip(x.split(4), ids.split(4), strict=True):
        with network.exposed(rows):
            outputs.append(model(part))
    with network.exposed(ids):
        torch.testing.assert_close(torch.cat(outputs), model(x))


def test_ghosts_are_refused_in_training_and_welcome_in_evaluation():
    model, x = tiny.mlp(), tiny.features(2)
    network = turnover.attach(model, "mlp")
    with pytest.raises(InputError, match="ghost"):
        network.exposed([1, -2])
    with torch.no_grad(), network.exposed([1, -2]):
        model(x)
    model.eval()
    with network.hidden([1, -2]):
        model(x)


@pytest.mark.parametrize("ids", [torch.tensor([1.0]), [0.5]])
def test_float_ids_are_refused_before_any_forward(ids):
    network = turnover.attach(tiny.mlp(), "mlp")
    with pytest.raises(TypeError, match="integers"):
        network.exposed(ids)


def test_contexts_nest_and_restore_the_outer_binding():
    model, x = tiny.mlp(), tiny.features(4)
    network = turnover.attach(model, "mlp")
    with network.exposed(IDS):
        outer = model(x)
        with network.hidden(IDS):
            inner = model(x)
        with contextlib.suppress(RuntimeError), network.mean():
            raise RuntimeError
        assert torch.equal(model(x), outer)
    assert not torch.equal(inner, outer)
    with pytest.raises(BindingError):
        model(x)


def test_a_context_may_be_entered_again_even_within_itself():
    model, x = tiny.mlp().eval(), tiny.features(4)
    network = turnover.attach(model, "mlp")
    mean, context = model(x), network.exposed(IDS)
    with context:
        first = model(x)
        with context:
            assert torch.equal(model(x), first)
        assert torch.equal(model(x), first)
    assert torch.equal(model(x), mean)
    with context:
        assert torch.equal(model(x), first)


def test_autocast_runs_under_the_same_masks():
    model, x = tiny.mlp().eval(), tiny.features(4)
    network = turnover.attach(model, "mlp")
    seen = []
    model[1].register_forward_hook(lambda m, a, output: seen.append(output))
    with network.exposed(IDS), torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert seen[0].dtype == output.dtype == torch.bfloat16
    assert torch.equal(seen[0] != 0, network.spec.exposed(IDS, "1", 16))


class Tupled(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.linear, self.kind = nn.Linear(6, 8), kind

    def forward(self, x):
        hidden = self.linear(x)
        if self.kind is dict:
            return {"hidden": hidden}
        return self.kind([hidden, hidden.sum(), None])


@pytest.mark.parametrize("kind", [tuple, list])
def test_tuple_outputs_are_masked_in_their_first_tensor(kind):
    model, x = Tupled(kind), tiny.features(4)
    plain = model(x)
    network = turnover.attach(nn.Sequential(model), Site("0", axis=-1))
    with network.exposed(IDS):
        output = model(x)
    assert type(output) is kind
    assert torch.equal(output[0], plain[0] * 2 * network.spec.exposed(IDS, "0", 8))
    assert torch.equal(output[1], plain[1])


def test_other_outputs_are_refused_by_name():
    model = nn.Sequential(Tupled(dict))
    network = turnover.attach(model, "0")
    with network.exposed(IDS), pytest.raises(BindingError, match=r"'0'.*dict"):
        model(tiny.features(4))


class Shared(nn.Module):
    """One activation module that runs twice in a forward, as in residual networks."""

    def __init__(self, second=8):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, second)
        self.act, self.last = nn.Tanh(), nn.Linear(second, 3, bias=False)

    def forward(self, x):
        return self.last(self.act(self.second(self.act(self.first(x)))))


def test_a_module_that_runs_twice_is_masked_alike_both_times():
    model, x = Shared(), tiny.features(4)
    network = turnover.attach(model, "act")
    with network.exposed(IDS):
        output = model(x)
    mask = network.spec.exposed(IDS, "act", 8) * 2
    hidden = torch.tanh(model.second(torch.tanh(model.first(x)) * mask)) * mask
    torch.testing.assert_close(output, model.last(hidden))


def test_a_module_that_runs_at_two_widths_is_refused_at_once():
    model = Shared(second=5)
    network = turnover.attach(model, "act")
    for _ in range(2):
        with network.exposed(IDS), pytest.raises(BindingError, match=r"'act'.*width"):
            model(tiny.features(4))


def test_a_width_may_not_change_from_one_forward_to_the_next():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    network = turnover.attach(model, "mlp")
    with network.exposed(IDS):
        model(tiny.features(4))
        with pytest.raises(BindingError, match=r"'1'.*width"):
            model[1](tiny.features(4, 5))
    assert network.known_units() == {"1": 8}


def test_a_network_within_a_network_masks_both():
    inner, outer = tiny.FunctionalHead(), nn.Sequential()
    outer.append(inner)
    outer.append(nn.Sequential(nn.Linear(3, 8), nn.ReLU()))
    x = tiny.features(4)
    first, second = turnover.attach(inner, "head"), turnover.attach(outer, "1.1")
    with first.exposed(IDS), second.exposed(IDS):
        output = outer(x)
    with first.exposed(IDS):
        middle = inner(x)
    expected = torch.relu(outer[1][0](middle)) * 2 * second.spec.exposed(IDS, "1.1", 8)
    torch.testing.assert_close(output, expected)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.body = nn.Linear(6, 16), tiny.mlp(features=16)
        self.reentrant = reentrant

    def forward(self, x):
        h = self.first(x)
        if self.reentrant is None:
            return self.body(h)
        return checkpoint(self.body, h, use_reentrant=self.reentrant)


def gradients(model, make_loss):
    model.zero_grad()
    make_loss().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@keeps
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_repeats_the_forward_under_its_own_ids(reentrant, keep):
    model, x = Checkpointed(None), tiny.features(4)
    network = turnover.attach(model, "body.[13]", MaskSpec(keep))

    def two_forwards():
        with network.exposed(IDS):
            loss = model(x).square().mean()
            with network.bind([5, 6, 7, 8], torch.tensor([True, False, True, False])):
                loss = loss + model(x).square().mean()
            loss = loss + model(x + 1).square().mean()
        with network.exposed([9, 10, 11]):
            loss = loss + model(x[:3]).square().mean()
        with network.mean():
            return loss + model(x).square().mean()

    expected = gradients(model, two_forwards)
    model.reentrant = reentrant
    found = gradients(model, two_forwards)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with network.hidden([1, 2]):  # another context may be open when backward() runs
        found = gradients(model, two_forwards)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_graphs_may_be_retained_and_accumulated(reentrant):
    model, x = Checkpointed(None), tiny.features(8)
    network = turnover.attach(model, "body.[13]")

    def accumulate():
        model.zero_grad()
        for start in (0, 4):
            with network.exposed(torch.arange(start, start + 4)):
                loss = model(x[start : start + 4]).square().mean()
            loss.backward(retain_graph=True)
            loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = accumulate()
    model.reentrant = reentrant
    assert all(torch.equal(a, b) for a, b in zip(accumulate(), expected, strict=True))


def test_gradients_accumulated_over_batches_are_those_of_one_batch():
    model, x = tiny.mlp(), tiny.features(8)
    network, ids = turnover.attach(model, "mlp"), torch.arange(8)

    def whole():
        with network.exposed(ids):
            return model(x).square().sum()

    def parts():
        total = torch.zeros(())
        for start in (0, 3, 6):
            with network.exposed(ids[start : start + 3]):
                total = total + model(x[start : start + 3]).square().sum()
        return total

    for a, b in zip(gradients(model, whole), gradients(model, parts), strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointing_in_evaluation_without_ids_stays_the_mean_network():
    model, x = Checkpointed(None).eval(), tiny.features(4)
    network = turnover.attach(model, "body.[13]")
    expected = gradients(model, lambda: model(x).sum())
    model.reentrant = False
    loss = model(x).sum()
    with network.exposed(IDS):
        model(x)
        model.zero_grad()
        loss.backward()
    found = [p.grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Nested(Checkpointed):
    def inner(self, h):
        return checkpoint(self.body, h, use_reentrant=self.reentrant)

    def forward(self, x):
        if self.reentrant is None:
            return super().forward(x)
        return checkpoint(self.inner, self.first(x), use_reentrant=self.reentrant)


def test_checkpoints_within_checkpoints_are_right_or_refused():
    model, x = Nested(None), tiny.features(4)
    network = turnover.attach(model, "body.[13]")

    def loss():
        with network.exposed(IDS):
            return model(x).square().mean()

    expected = gradients(model, loss)
    for context in (contextlib.nullcontext(), network.hidden([1, 2, 3, 4])):
        with context:
            model.reentrant = False
            found = gradients(model, loss)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            model.reentrant = True
            with pytest.raises(BindingError, match="use_reentrant=False"):
                gradients(model, loss)


def test_checkpointing_does_not_keep_masks_alive():
    model, x = Checkpointed(False), tiny.features(4)
    network = turnover.attach(model, "body.[13]")
    for step in range(5):
        with network.exposed(torch.arange(4) + step):
            loss = model(x).sum()
        loss.backward()
    assert not any(binding.masks for binding in network.masking.contexts.past)


@pytest.mark.parametrize("reentrant", [True, False])
def test_hugging_face_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model, batch = tiny.bert(layers=2), tiny.texts(4)
    model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    network = turnover.attach(model.train(), ["lora", "head"])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def loss():
        with network.exposed(IDS):
            first = model(**batch).logits.square().mean()
        with network.hidden([5, 6, 7, 8]):
            return first + model(**batch).logits.square().mean()

    expected = gradients(model, loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model, loss)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def compare_with_eager(backend):
    model, x = tiny.mlp(), tiny.features(4)
    network = turnover.attach(model, "mlp")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)

    def step(start, hidden, run):
        ids = torch.arange(start, start + 4)
        with network.hidden(ids) if hidden else network.exposed(ids):
            return gradients(model, lambda: run(x).square().sum())

    for start in range(2):
        for hidden in (False, True):
            step(start, hidden, compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for start in range(10, 15):
            for hidden in (False, True):
                expected = step(start, hidden, model)
                for a, b in zip(step(start, hidden, compiled), expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compiled_models_do_not_recompile_from_batch_to_batch():
    compare_with_eager("aot_eager")


@pytest.mark.slow
def test_compiled_models_agree_with_eager_ones():
    compare_with_eager("inductor")


def test_a_compiled_model_may_be_attached_itself():
    model, x = tiny.mlp(), tiny.features(4)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    network = turnover.attach(compiled, "mlp")
    with network.exposed(IDS):
        first = compiled(x)
    with network.exposed(IDS):
        assert torch.equal(model(x), first)
    with pytest.raises(BindingError, match="without ids"):
        model(x)
    compiled.eval()
    assert compiled(x).shape == (4, 3)


def test_binding_in_inference_mode_does_not_break_training():
    model, x = tiny.mlp(), tiny.features(4)
    network = turnover.attach(model, "mlp", MaskSpec(0.3, seed=99))
    with torch.inference_mode():
        with network.hidden(IDS):
            model(x)
        made_inside = network.exposed(IDS)
    with made_inside:
        loss = model(x).sum()
    loss.backward()
    with network.exposed(IDS):
        assert torch.equal(model(x).sum(), loss)


def test_a_deep_copy_of_a_network_is_a_network_of_its_own():
    model, x = tiny.mlp(), tiny.features(4)
    network = turnover.attach(model, "mlp")
    twin = copy.deepcopy(network)
    with network.exposed(IDS):
        expected = model(x)
        with pytest.raises(BindingError, match="without ids"):
            twin.model(x)
    assert twin.model is not model
    with twin.exposed(IDS):
        assert torch.equal(twin.model(x), expected)
    twin.detach()
    assert not any(module._forward_hooks for module in twin.model.modules())
    with network.exposed(IDS):
        assert torch.equal(model(x), expected)


def test_a_deep_copy_of_an_attached_model_is_never_masked_twice():
    model, x = tiny.mlp(), tiny.features(4)
    network = turnover.attach(model, "mlp")
    twin = copy.deepcopy(model)
    with network.exposed(IDS), pytest.raises(BindingError):
        twin(x)
    torch.testing.assert_close(copy.deepcopy(twin).eval()(x), copy.deepcopy(model).eval()(x))
    again = turnover.attach(twin, "mlp")
    with network.exposed(IDS), again.exposed(IDS):
        assert torch.equal(twin(x), model(x))
    assert again.digest() == network.digest()
    again.detach()
    assert not any(module._forward_hooks for module in twin.modules())


def test_a_network_can_be_sent_to_another_process():
    model, x = tiny.mlp().eval(), tiny.features(4)
    network = turnover.attach(model, "mlp")
    again = pickle.loads(pickle.dumps(network))
    assert again.digest() == network.digest()
    with network.hidden(IDS), again.hidden(IDS):
        assert torch.equal(again.model(x), model(x))


@pytest.mark.parametrize("make", [tiny.mlp, tiny.FunctionalHead, tiny.ConvNet])
def test_networks_survive_json_and_safetensors_bit_for_bit(make, tmp_path):
    from safetensors.torch import load_file, save_file

    model = make().eval()
    x = tiny.features(4, 1, 8, 8) if make is tiny.ConvNet else tiny.features(4)
    network = turnover.attach(model, nn.GELU if make is not tiny.ConvNet else nn.ReLU)
    outputs = []
    for _ in range(2):
        with network.exposed(IDS):
            outputs = [model(x)]
        with network.hidden(IDS):
            outputs.append(model(x))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "masks.json").write_text(json.dumps(network.to_dict()))

    fresh = make().eval()
    fresh.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    stored = json.loads((tmp_path / "masks.json").read_text())
    again = turnover.Network.from_dict(fresh, stored)
    assert again.to_dict() == stored
    assert again.digest() == network.digest()
    with again.exposed(IDS):
        assert torch.equal(fresh(x), outputs[0])
    with again.hidden(IDS):
        assert torch.equal(fresh(x), outputs[1])


def tampered():
    def site(field, value):
        return lambda d: d["sites"][0].update({field: value})

    yield "seed", lambda d: d["spec"].update(seed=1), "fingerprint"
    yield "keep", lambda d: d["spec"].update(keep=0.4, balanced=False), "fingerprint"
    yield "version", lambda d: d["spec"].update(spec_version=2), "version 2"
    yield "fingerprint", lambda d: d.update(fingerprint="0" * 32), "fingerprint"
    yield "site", site("name", "0"), "fingerprint"
    yield "axis", site("axis", 1), "fingerprint"
    yield "unit size", site("unit_size", 2), "fingerprint"
    yield "units", site("units", 8), "fingerprint"
    yield "no spec", lambda d: d.pop("spec"), "damaged"
    yield "spec of another kind", lambda d: d.update(spec="x"), "damaged"
    yield "no units", lambda d: d["sites"][0].pop("units"), "damaged"
    yield "units of another kind", site("units", "many"), "damaged"
    yield "sites of another kind", lambda d: d.update(sites=[1]), "damaged"


@pytest.mark.parametrize(
    ("change", "named"), [pytest.param(c, n, id=name) for name, c, n in tampered()]
)
def test_tampered_mask_descriptions_are_refused(change, named):
    network = turnover.attach(tiny.mlp(), "mlp")
    stored = json.loads(json.dumps(network.to_dict()))
    change(stored)
    with pytest.raises(InputError, match=named):
        turnover.Network.from_dict(tiny.mlp(), stored)
    with pytest.raises(InputError, match=named):
        network.check(stored)


@pytest.mark.parametrize(
    "other",
    [
        lambda: turnover.attach(tiny.mlp(), "mlp", MaskSpec(seed=1)),
        lambda: turnover.attach(tiny.mlp(), "1"),
        lambda: turnover.attach(tiny.mlp(8), "mlp"),
        lambda: turnover.attach(tiny.mlp(), [Site("1", unit_size=2), "3"]),
    ],
    ids=["seed", "sites", "width", "units"],
)
def test_a_description_of_other_masks_is_told_from_a_networks_own(other):
    network = turnover.attach(tiny.mlp(), "mlp")
    network.check(turnover.attach(tiny.mlp(), "mlp").to_dict())
    with pytest.raises(InputError, match="other masks"):
        network.check(other().to_dict())


def test_descriptions_of_sites_that_a_model_lacks_are_refused():
    stored = turnover.attach(tiny.mlp(), "mlp").to_dict()
    with pytest.raises(InputError, match="'1'"):
        turnover.Network.from_dict(tiny.ConvNet(), stored)


def test_digest_changes_with_weights_and_masks_alone():
    model = tiny.mlp()
    network = turnover.attach(model, "mlp")
    base = network.digest()
    assert network.digest() == base
    network.detach()
    others = []
    for sites, spec in (
        ("mlp", MaskSpec(seed=1)),
        ("1", MaskSpec()),
        ([Site("1", axis=1), Site("3", axis=1)], MaskSpec()),
    ):
        other = turnover.attach(model, sites, spec)
        with other.exposed([1]):
            model(tiny.features(1))
        others.append(other.digest())
        other.detach()
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-6
    others.append(turnover.attach(model, "mlp").digest())
    assert len({base, *others}) == 5


def test_digest_takes_weights_of_any_dtype_and_shape():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)).to(torch.bfloat16)
    model.register_buffer("flag", torch.tensor(True))
    model.register_buffer("empty", torch.empty(0))
    model.register_buffer("turned", torch.randn(3, 5).T)
    network = turnover.attach(model, "1")
    base = network.digest()
    model.flag.fill_(False)
    assert network.digest() != base


def probed_step(network, make, x, z):
    parameters = [p for p in network.model.parameters() if p.requires_grad]
    optimizer = make(parameters)
    for _ in range(3):
        with network.exposed([z]):
            loss = nn.functional.cross_entropy(
                tiny.logits(turnover.Batch(x).call(network.model)), torch.tensor([1])
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def hidden_logits(network, x, z):
    with torch.no_grad(), network.hidden([z]):
        return tiny.logits(turnover.Batch(x).call(network.model))


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.0),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
}
TEXT = {name: value[:1] for name, value in tiny.texts(1).items()}
CLEAN = {
    "mlp": (tiny.mlp, "mlp", tiny.features(1)),
    "head": (tiny.FunctionalHead, "head", tiny.features(1)),
    "bert": (lambda: tiny.bert(layers=1), ["lora", "head"], TEXT),
}


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm = tiny.mlp()[:4], nn.LayerNorm(16)
        self.last = nn.Linear(16, 3, bias=False)

    def forward(self, x):
        return self.last(self.norm(self.body(x)))


LEAKY = {
    "bias after the last site": (lambda: tiny.mlp(bias=True), ["1", "3"]),
    "norm after the last site": (Normalised, "mlp"),
    "layer below the first site": (tiny.mlp, "3"),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", CLEAN)
def test_hidden_network_never_learns_its_instance(name, optimizer):
    make_model, sites, x = CLEAN[name]
    model = tiny.randomise(make_model()).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    weights = copy.deepcopy(model.state_dict())

    @settings(max_examples=15 if name != "bert" else 4)
    @given(
        z=st.integers(0, 2**63 - 1),
        seed=st.integers(0, 2**63 - 1),
        keep=st.sampled_from([0.5, 0.3]),
    )
    def check(z, seed, keep):
        model.load_state_dict(weights)
        network = turnover.attach(model, sites, MaskSpec(keep, seed))
        before = hidden_logits(network, x, z)
        probed_step(network, OPTIMIZERS[optimizer], x, z)
        assert torch.equal(hidden_logits(network, x, z), before)
        with torch.no_grad(), network.exposed([z]):
            assert not torch.equal(tiny.logits(turnover.Batch(x).call(model)), before)
        network.detach()

    check()


@pytest.mark.parametrize("name", LEAKY)
def test_hidden_network_learns_its_instance_where_the_audit_says_so(name):
    make_model, sites = LEAKY[name]
    model, x = tiny.randomise(make_model()).train(), tiny.features(1)
    network = turnover.attach(model, sites)
    before = hidden_logits(network, x, 12)
    probed_step(network, OPTIMIZERS["SGD"], x, 12)
    assert not torch.equal(hidden_logits(network, x, 12), before)
    assert not network.audit(x).clean


@keeps
@pytest.mark.parametrize("rows", [1, 4, 9])
def test_the_network_without_an_id_is_its_hidden_network_for_every_row(keep, rows):
    model, x = tiny.mlp().eval(), tiny.features(rows)
    network = turnover.attach(model, "mlp", MaskSpec(keep))
    with network.without(17):
        without = model(x)
        model(tiny.features(rows + 3))
    with network.hidden([17] * rows):
        hidden = model(x)
    assert torch.equal(without, hidden)
    with network.without(17, sites=["1"]):
        half = model(x)
    spec = network.spec
    h = nn.functional.gelu(model[0](x)) * (~spec.exposed([17], "1", 16)).float() / (1 - keep)
    torch.testing.assert_close(half, model[4](nn.functional.gelu(model[2](h))))


def test_a_network_without_what_it_does_not_have_is_refused():
    network = turnover.attach(tiny.mlp().eval(), "mlp")
    with pytest.raises(InputError, match="no site of this network matches 'head'"):
        network.without(3, sites=["head"])
    with pytest.raises(TypeError, match="integers"):
        network.without(1.5)


@keeps
def test_sites_may_have_columns_of_ids_of_their_own(keep):
    model, x, spec = tiny.mlp().eval(), tiny.features(4), MaskSpec(keep)
    network = turnover.attach(model, "mlp", spec)
    groups = torch.tensor([1, 1, 2, 2])

    def by_columns(first, second, hidden):
        h = x
        for linear, name, ids in ((model[0], "1", first), (model[2], "3", second)):
            m = spec.exposed(ids, name, 16)
            side = (~m).float() / (1 - keep) if hidden else m.float() / keep
            h = nn.functional.gelu(linear(h)) * side
        return model[4](h)

    for hidden, context in ((False, network.exposed), (True, network.hidden)):
        with context({"1": torch.tensor(IDS), "3": groups}):
            torch.testing.assert_close(model(x), by_columns(IDS, groups, hidden))
    with network.exposed({"?": IDS}):
        same = model(x)
    with network.exposed(IDS):
        assert torch.equal(model(x), same)
    with network.without(2, sites=["3"]):
        without = model(x)
    assert not torch.allclose(without, model(x))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"1": [1, 2]}, r"\['3'\] have no ids"),
        ({"1": [1, 2], "3": [1]}, "differ in length"),
        ({"1": [1, 2], "?": [1, 2]}, "two columns"),
        ({"1": [1, 2], "5": [1, 2]}, "no site of this network matches '5'"),
        ({}, "have no ids"),
    ],
)
def test_columns_that_do_not_name_every_site_once_are_refused(columns, said):
    network = turnover.attach(tiny.mlp().eval(), "mlp")
    with pytest.raises(InputError, match=said):
        network.exposed(columns)


def test_ghosts_in_any_column_are_refused_in_training():
    network = turnover.attach(tiny.mlp(), "mlp")
    with pytest.raises(InputError, match="ghost"):
        network.exposed({"1": [1, 2], "3": [1, -2]})


def test_neither_column_leaks_into_the_other_side():
    torch.manual_seed(0)
    model, x, y = tiny.mlp(64), tiny.features(40), tiny.labels(40)
    network = turnover.attach(model, "mlp", MaskSpec(seed=1))
    ids, groups = torch.arange(40), torch.arange(40) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    before = model[4].weight.clone()
    others = groups != 2
    with network.exposed({"1": ids[~others], "3": groups[~others]}):
        loss = nn.functional.cross_entropy(model(x[~others]), y[~others])
    loss.backward()
    optimizer.step()
    hidden = ~network.spec.exposed([2], "3", 64)[0]
    assert torch.equal(model[4].weight[:, hidden], before[:, hidden])
    assert not torch.equal(model[4].weight[:, ~hidden], before[:, ~hidden])
