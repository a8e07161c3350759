"""Tiny models and data for the tests: random weights, nothing downloaded."""

import signal
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

import turnover
from turnover import Batch
from turnover.influence.protocol import METHODS, Method

CLASSES = 3
TOKENS = 7


def interruptible() -> None:
    """Let a new process be interrupted; those of a shell's background jobs ignore it (``preexec_fn``)."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class FunctionalHead(nn.Module):
    """A frozen encoder under a wide head."""

    def __init__(self, units: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 10), nn.Tanh()).requires_grad_(False)
        self.head = turnover.WideHead(10, units, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def mlp(width: int = 16, *, features: int = 6, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, CLASSES, bias=bias),
    )


class ConvNet(nn.Module):
    """VGG in small: convolutions with batch norm, then fully connected layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
        )
        self.classifier = nn.Sequential(
            nn.Linear(6 * 16, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def bert(layers: int = 2, *, head_units: int = 48, rank: int = 4) -> nn.Module:
    """A frozen BERT with LoRA in every attention layer and a wide head in place of its classifier."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForSequenceClassification, BertConfig

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=CLASSES,
    )
    model = AutoModelForSequenceClassification.from_config(config).requires_grad_(False)
    lora = LoraConfig(r=rank, target_modules=["query", "value"], lora_dropout=0.0)
    inject_adapter_in_model(lora, model)
    model.classifier = turnover.WideHead(16, head_units, CLASSES)
    return randomise(model)


def gpt2() -> nn.Module:
    from transformers import AutoModelForSequenceClassification, GPT2Config

    config = GPT2Config(
        vocab_size=50,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        num_labels=CLASSES,
        pad_token_id=0,
    )
    return AutoModelForSequenceClassification.from_config(config)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random trainable weights: a zero (LoRA's B) would make tests pass for no reason."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def features(rows: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, *(shape or (6,)), generator=torch.Generator().manual_seed(seed))


def labels(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(CLASSES, (rows,), generator=torch.Generator().manual_seed(seed))


def texts(rows: int, tokens: int = TOKENS, seed: int = 0) -> dict[str, Tensor]:
    """A Hugging Face batch with attention masks; the second half of row 0 is padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (rows, tokens), generator=generator)
    mask = torch.ones(rows, tokens, dtype=torch.int64)
    mask[0, tokens // 2 :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def logits(output: object) -> Tensor:
    return turnover.objectives.logits_of(output)


def train(
    network: turnover.Network,
    inputs: Tensor,
    targets: Tensor,
    ids: Tensor,
    *,
    epochs: int = 60,
    rate: float = 1e-2,
    make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
) -> None:
    """Full-batch training under exposed masks."""
    network.model.train()
    parameters = [p for p in network.model.parameters() if p.requires_grad]
    optimizer = make(parameters, lr=rate)
    for _ in range(epochs):
        with network.exposed(ids):
            loss = nn.functional.cross_entropy(network.model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.model.eval()


def method(name: str, **options: object) -> Method:
    """Options of a method, of those given that it has."""
    kind = METHODS[name]
    return kind(**{key: value for key, value in options.items() if key in kind.__annotations__})


def definition(network, objective, batch: Batch, ids: Tensor) -> np.ndarray:
    """One target and one id at a time, hidden minus exposed."""
    scores = torch.empty(len(batch), len(ids))
    with torch.no_grad():
        for row in range(len(batch)):
            target = batch.rows(row, row + 1)
            for column, value in enumerate(ids.tolist()):
                with network.hidden([value]):
                    hidden = objective(target.call(network.model), target)
                with network.exposed([value]):
                    exposed = objective(target.call(network.model), target)
                scores[row, column] = hidden.float().item() - exposed.float().item()
    return scores.numpy()


def assert_same(one: turnover.Result, other: turnover.Result) -> None:
    """Two results agree in every bit."""
    for name in ("scores", "train_ids", "target_ids", "standard_error", "exact", "recall"):
        left, right = getattr(one, name), getattr(other, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert left.dtype == right.dtype and left.shape == right.shape, name
            np.testing.assert_array_equal(left, right, err_msg=name)
    for name in ("mean", "sd"):
        np.testing.assert_array_equal(getattr(one.floor, name), getattr(other.floor, name))
    assert type(one.null) is type(other.null)
    for name, value in vars(one.null).items():
        if not name.startswith("_"):
            np.testing.assert_array_equal(value, getattr(other.null, name))
    np.testing.assert_array_equal(one.z, other.z)
    np.testing.assert_array_equal(one.q, other.q)
    for name in ("method", "objective", "sites", "network", "considered"):
        assert getattr(one, name) == getattr(other, name), name
