"""Gram on causal language models: every layer of the common ones has a rule, in every precision."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from test_gram_gradients import ROWS, WrongScale, by_hand, gained, kernel
from test_language_models import passages
from turnover import Batch, objectives
from turnover.influence.gram.capture import Capture
from turnover.objectives import completion

transformers = pytest.importorskip("transformers", reason="pip install 'turnover[text]'")

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
KINDS = {
    "gpt2": {
        "vocab_size": 50,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": SIZES,
    "opt": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 4},
    "gemma": {**GROUPED, "head_dim": 4},
    "phi": GROUPED,
}
# Relative to the largest inner product: by autograd in the same precision.
PRECISIONS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def causal(kind, *, tied=False, dtype=torch.float32):
    config = transformers.AutoConfig.for_model(kind, **KINDS[kind])
    config.tie_word_embeddings = tied
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                nn.init.normal_(parameter, 0.5, 0.2)
    return model.to(dtype).eval()


def assert_rules_agree(model, batch, most, objective=completion, blocks=2):
    """Inner products are those of the rows' own gradients, and no layer goes the general way."""
    gradients = by_hand(model, batch, objective)
    expected = gradients @ gradients.T
    scale = np.abs(expected).max()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = kernel(model, batch, blocks, objective)
    np.testing.assert_allclose(found / scale, expected / scale, atol=most)


class Gated(nn.Module):
    """A norm that takes a gate beside its inputs, which its rule does not see."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, x, gate):
        return self.weight * torch.nn.functional.normalize(x, dim=-1) * gate


class WithGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), Gated(), nn.Linear(6, tiny.CLASSES)

    def forward(self, x):
        return self.last(self.norm(self.first(x), torch.sigmoid(x)).mean(dim=1))


class Twice(nn.Module):
    """A scale that its square multiplies: no layer of its kind has a rule, so it has none."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, x):
        return x * self.weight**2


class OneMore(nn.Module):
    """As Gemma's norms: the weight is added to 1, and something is added to the outputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.5, 6))

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:]) * (1 + self.weight) + x.relu()


@pytest.mark.parametrize("kind", [OneMore, lambda: nn.PReLU(), lambda: nn.RMSNorm(6)])
def test_a_layer_that_scales_its_outputs_needs_no_rule_of_its_own(kind):
    torch.manual_seed(5)
    model = gained(kind).eval()
    batch = Batch(tiny.features(ROWS, 5, 6), tiny.labels(ROWS))
    assert_rules_agree(model, batch, 2e-5, objectives.margin)


@pytest.mark.parametrize("make", [WithGate, lambda: gained(Twice)])
def test_a_layer_that_does_more_than_scale_goes_the_general_way(make):
    torch.manual_seed(5)
    model = make().eval()
    batch = Batch(tiny.features(ROWS, 5, 6), tiny.labels(ROWS))
    gradients = by_hand(model, batch)
    expected = gradients @ gradients.T
    with pytest.warns(UserWarning, match="gram knows no rule for 1 parameters"):
        found = kernel(model, batch)
    np.testing.assert_allclose(found / expected.max(), expected / expected.max(), atol=2e-5)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_a_language_model_has_a_rule(kind, dtype):
    assert_rules_agree(causal(kind, dtype=dtype), passages(ROWS), PRECISIONS[dtype])


def test_adapters_on_a_base_in_half_precision_have_rules():
    peft = pytest.importorskip("peft", reason="pip install 'turnover[text]'")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(causal("llama", dtype=torch.bfloat16), lora).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert_rules_agree(model, passages(ROWS), PRECISIONS[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_wrong_rule_is_found_in_half_precision(dtype):
    torch.manual_seed(5)
    model = tiny.randomise(gained(WrongScale)).eval().to(dtype)
    batch = Batch(tiny.features(ROWS, 5, 6).to(dtype), tiny.labels(ROWS))
    capture = Capture(model, objectives.margin, residuals=False)
    with pytest.warns(UserWarning, match="gram knows no rule"):
        capture.rows(batch)
    assert capture.general == ("2.weight",)
