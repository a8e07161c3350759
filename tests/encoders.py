"""Small Hugging Face encoders of many kinds, as folders, with a tokenizer of whole words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = [
    *("good", "great", "fine", "fun", "loved", "bad", "awful", "dull"),
    *("boring", "hated", "the", "film", "plot", "was", "it"),
]
SHAPE = {
    "vocab_size": 19,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "pad_token_id": 0,
}
T5 = {
    "vocab_size": 19,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": 19,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "decoder_start_token_id": 3,
    "forced_eos_token_id": 3,
}


def tokenizer(more: tuple[str, ...] = (), **special: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<s>", "</s>", *WORDS, *more]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    given = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **given)


def folder(model: Any, where: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """A model and the tokenizer, saved; a config becomes the model that AutoModel makes of it."""
    import transformers

    if isinstance(model, transformers.PretrainedConfig):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModel.from_config(model)
    model.to(dtype).save_pretrained(where)
    tokenizer().save_pretrained(where)
    return where


def write_texts(path: Path, *more: str, rows: int = 40) -> Path:
    """Texts of 3 to 12 words in two classes, and further ones."""
    texts = [" ".join(WORDS[(i + j) % 15] for j in range(3 + i % 10)) for i in range(rows)]
    lines = [f"{text},{('pos', 'neg')[i % 2]}" for i, text in enumerate([*texts, *more])]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return path
