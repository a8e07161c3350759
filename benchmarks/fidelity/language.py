"""Small language models that are fine-tuned on real text, and what retraining them without some of it gives.

A tokenizer and a model are made from one text, and the model is fine-tuned on chunks of another. Every draw
has a seed of its own: which chunks, and the order in which a training takes them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import turnover
from benchmarks.paper import shift
from turnover import evaluation

from . import features

CHUNKS, TARGETS, TOKENS = 400, 50, 32
_VOCABULARY = 1024
END = "<|endoftext|>"
_BATCH, _EPOCHS = 20, 3
_PRETRAINING_EPOCHS, _PRETRAINING_RATE, _PRETRAINING_BATCH = 5, 1e-3, 64
_SEED = 0
"""Of the order in which the attributed model takes its chunks."""
_HALVES, _HALF_SEEDS = 50, (1000, 1001)
_PARTS, _LEFT_OUT = 40, 0.05
_UNITS = ["*.mlp.act*"]

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Kind:
    """A model and the text it is fine-tuned on.

    Attributes:
        title: one line.
        architecture: ``"gpt2"`` (one weight for words in and out), ``"llama"`` (separate output weights,
            RMSNorm, two key-value heads) or ``"gpt_neox"``.
        films: whether it is fine-tuned on sentences of movie reviews, and not on reviews of electronics;
            it is pretrained on the others.
        lora: whether only adapters of rank 8 of all linear layers of the blocks are trained.
        learning_rate: of the fine-tuning.
        draw: seed of the chunks.
    """

    title: str
    architecture: str = "gpt2"
    films: bool = False
    lora: bool = False
    learning_rate: float = 2e-3
    draw: int = 0


KINDS = {
    "whole": Kind("GPT-2, all weights"),
    "lora": Kind("GPT-2, LoRA of rank 8", lora=True),
    "llama": Kind("Llama, all weights, other text", "llama", films=True),
    "neox": Kind(
        "GPT-NeoX, all weights, other text, smaller steps",
        "gpt_neox",
        films=True,
        learning_rate=1e-3,
        draw=1,
    ),
}


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned model, and what its training leaves.

    Attributes:
        model: in evaluation mode.
        network: the model under the masks that it was trained with, if any.
        optimizer: with the moments of the last step.
    """

    model: nn.Module
    network: turnover.Network | None
    optimizer: torch.optim.AdamW


class Problem:
    """Chunks of text, the fine-tuned model that is attributed, and what retraining gives.

    Args:
        name: one of ``KINDS``.
        folder: keeps what was trained.
        data: see :func:`benchmarks.paper.shift.load`.

    Attributes:
        train: tokens, int64 (400, 32).
        test: tokens of the targets, int64 (50, 32).
        tokenizer: of the package tokenizers.
        texts: of the chunks of ``train``, then of ``test``.
        halves: random halves of the chunks.
        parts: the chunks without 5% of them.
    """

    def __init__(self, name: str, folder: Path, data: Path | None = None) -> None:
        self.kind = KINDS[name]
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        texts = [features.sentences()[0], shift.load(data, shift.ELECTRONICS)[0]]
        before, after = texts[::-1] if self.kind.films else texts
        self.tokenizer = tokenizer = _tokenizer(before)
        chunks = _chunks(tokenizer, after)
        order = np.random.default_rng(self.kind.draw).permutation(len(chunks))
        order = order[: CHUNKS + TARGETS]
        self.train, self.test = chunks[order[:CHUNKS]], chunks[order[CHUNKS:]]
        self.texts = [tokenizer.decode(row.tolist()) for row in chunks[order]]
        self.halves = evaluation.draw_subsets(CHUNKS, _HALVES)
        self.parts = evaluation.draw_subsets(CHUNKS, _PARTS, fraction=1 - _LEFT_OUT)
        path = folder / f"pretrained-{self.kind.architecture}.pt"
        if not path.exists():
            start = time.perf_counter()
            model = _new(self.kind)
            _train(
                model, _chunks(tokenizer, before), seed=0, pretraining=True, rate=_PRETRAINING_RATE
            )
            torch.save(model.state_dict(), path)
            print(f"pretrained in {time.perf_counter() - start:.0f} s", flush=True)
        self._pretrained = torch.load(path, weights_only=True)

    def fine_tuned(self, keep: NDArray[np.bool_] | None = None, seed: int = _SEED) -> nn.Module:
        """The model, fine-tuned on some of the chunks in the order of a seed."""
        return self.training(keep, seed).model

    def training(
        self,
        keep: NDArray[np.bool_] | None = None,
        seed: int = _SEED,
        masks: turnover.MaskSpec | None = None,
    ) -> FineTuned:
        """The same, or under masks of the units of the multilayer perceptrons, each chunk its own."""
        model: nn.Module = _new(self.kind)
        model.load_state_dict(self._pretrained)
        if self.kind.lora:
            model = _with_lora(model)
        network = None if masks is None else turnover.attach(model, _UNITS, masks)
        kept = torch.ones(CHUNKS, dtype=torch.bool) if keep is None else torch.from_numpy(keep)
        rate = self.kind.learning_rate
        optimizer = _train(model, self.train, seed=seed, rate=rate, keep=kept, network=network)
        return FineTuned(model.eval(), network, optimizer)

    def truth(self, subsets: evaluation.Subsets, seeds: Sequence[int]) -> Floats:
        """Mean log-likelihood of the targets' tokens: (subsets, seeds, targets)."""
        found = []
        for row in range(len(subsets.keep)):
            for seed in seeds:
                path = self._folder / f"truth-{subsets.sha256[:8]}-{row}-{seed}.npy"
                if not path.exists():
                    model = self.fine_tuned(subsets.keep[row], seed)
                    with torch.no_grad():
                        values = -losses(model(self.test).logits, self.test)
                    np.save(path, values.numpy(), allow_pickle=False)
                found.append(np.load(path, allow_pickle=False))
        return np.stack(found).reshape(len(subsets.keep), len(seeds), -1)

    def truths(self) -> dict[str, tuple[evaluation.Subsets, Floats]]:
        """Subsets and what retraining on them gave, by the name of the truth."""
        return {
            "halves": (self.halves, self.truth(self.halves, _HALF_SEEDS)),
            "leave_5%": (self.parts, self.truth(self.parts, (_SEED,))),
        }


def batches(count: int, *, seed: int, pretraining: bool = False) -> Iterator[Tensor]:
    """Rows of the batches of a training, all epochs."""
    generator = torch.Generator().manual_seed(seed)
    size = _PRETRAINING_BATCH if pretraining else _BATCH
    for _ in range(_PRETRAINING_EPOCHS if pretraining else _EPOCHS):
        yield from torch.split(torch.randperm(count, generator=generator), size)


def losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean over a chunk's tokens of minus the log-likelihood: float32 (rows,)."""
    each = functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")
    return each.mean(dim=1)


def _tokenizer(texts: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _chunks(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Tokens of all texts, one behind the other, in chunks: int64 (chunks, 32)."""
    end = tokenizer.token_to_id(END)
    stream = [token for one in tokenizer.encode_batch(texts) for token in [*one.ids, end]]
    count = len(stream) // TOKENS
    return torch.tensor(stream[: count * TOKENS]).view(count, TOKENS)


def _new(kind: Kind) -> nn.Module:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    made: nn.Module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind.architecture == "llama":
            llama = LlamaConfig(
                vocab_size=_VOCABULARY,
                hidden_size=96,
                intermediate_size=256,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=TOKENS,
                tie_word_embeddings=False,
            )
            made = LlamaForCausalLM(llama)
        elif kind.architecture == "gpt_neox":
            neox = GPTNeoXConfig(
                vocab_size=_VOCABULARY,
                hidden_size=96,
                intermediate_size=384,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=TOKENS,
            )
            made = GPTNeoXForCausalLM(neox)
        else:
            gpt2 = GPT2Config(
                vocab_size=_VOCABULARY,
                n_positions=TOKENS,
                n_embd=96,
                n_layer=3,
                n_head=4,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
            made = GPT2LMHeadModel(gpt2)
    return made


def _with_lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wanted = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["c_attn", "c_proj", "c_fc"],
            fan_in_fan_out=True,
        )
        adapted: nn.Module = get_peft_model(model, wanted)
    return adapted


def _train(
    model: nn.Module,
    tokens: Tensor,
    *,
    seed: int,
    rate: float,
    keep: Tensor | None = None,
    pretraining: bool = False,
    network: turnover.Network | None = None,
) -> torch.optim.AdamW:
    """Train in place; chunks that are not kept are missing from their batches."""
    model.train()
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    for rows in batches(len(tokens), seed=seed, pretraining=pretraining):
        chosen = rows if keep is None else rows[keep[rows]]
        if not len(chosen):
            continue
        with nullcontext() if network is None else network.exposed(chosen):
            loss = losses(model(tokens[chosen]).logits, tokens[chosen]).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return optimizer
