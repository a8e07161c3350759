"""What a training would only find at its end is said before it begins: encoders of many kinds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="pip install 'turnover[text]'")
pytest.importorskip("typer")

import transformers

import encoders
from encoders import BART, SHAPE, T5, write_texts
from test_cli import Finished, turnover
from turnover import InputError, MaskSpec
from turnover.data.base import Columns
from turnover.data.text import read
from turnover.models.encoders import check_tokenizer
from turnover.models.pipeline import build
from turnover.models.text import ClassifierConfig
from turnover.runs.run import Run
from turnover.tasks.rehearsal import rehearse
from turnover.tasks.training import logits_of_rows


def fit(data: Path, model: Path | str, out: Path, *more: object, expect: int = 0) -> Finished:
    options = ("--head-units", 32, "--lora-rank", 4, "--epochs", 1, "--no-compare")
    return turnover("fit", data, "--model", model, "--out", out, *options, *more, expect=expect)


def refusal(data: Path, model: Path | str, *more: object) -> str:
    """The one line of a fit that is refused, and that leaves nothing behind."""
    out = data.parent / "run"
    said = fit(data, model, out, *more, expect=2).stderr.splitlines()
    assert not out.exists() and not list(data.parent.glob(".*"))
    (line,) = [one for one in said if one.startswith("turnover: ")]
    return line


KINDS: dict[str, Callable[[], Any]] = {
    "albert": lambda: transformers.AlbertConfig(**SHAPE, embedding_size=16),
    "bart": lambda: transformers.BartConfig(**BART),
    # Does not run in bfloat16.
    "deberta": lambda: transformers.DebertaConfig(
        **SHAPE, relative_attention=True, pos_att_type=["c2p", "p2c"]
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=19, n_embd=32, n_layer=2, n_head=4),
    "marian": lambda: transformers.MarianConfig(**BART),
    "modernbert": lambda: transformers.ModernBertConfig(
        **SHAPE, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3
    ),
    "mt5": lambda: transformers.MT5Config(**T5),
    "roberta": lambda: transformers.RobertaConfig(**SHAPE),
    "t5": lambda: transformers.T5Config(**T5),
    "t5 encoder": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_encoders_and_the_encoders_of_encoder_decoders_train(kind: str, tmp_path: Path) -> None:
    model = encoders.folder(KINDS[kind](), tmp_path / "model")
    data, out = write_texts(tmp_path / "t.csv"), tmp_path / "run"
    fit(data, model, out)
    run = Run.load(out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["precision"]["evaluation"] == metrics["precision"]["stored"] == "float32"
    assert not list(out.rglob("rehearsal"))
    # The encoder in the run is the pretrained one, and not one of new weights.
    pretrained = transformers.AutoModel.from_pretrained(model)
    if pretrained.config.is_encoder_decoder or kind == "t5 encoder":
        pretrained = pretrained.get_encoder()
    wanted = [p for p in pretrained.parameters() if p.dim() == 2 and len(p) == 19]
    held = run.model.encoder.get_input_embeddings().weight
    assert any(torch.equal(held, one) for one in wanted)
    if "t5" in kind:
        turnover("influence", out, "--ghosts", 50, "--no-gram")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double_checkpoints_are_trained_in_float32_and_it_is_said(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    name = str(dtype).removeprefix("torch.")
    model = encoders.folder(transformers.BertConfig(**SHAPE), tmp_path / "model", dtype=dtype)
    out = tmp_path / "run"
    said = fit(write_texts(tmp_path / "t.csv"), model, out).stdout
    assert f"the encoder is stored in {name}; here its weights are float32" in said
    loaded = Run.load(out)
    kinds = {value.dtype for value in loaded.model.state_dict().values()}
    assert kinds <= {torch.float32, torch.int64}
    assert json.loads((out / "metrics.json").read_text())["precision"]["stored"] == name


POSITIONS: dict[str, tuple[Callable[[], Any], int]] = {
    "bert": (lambda: transformers.BertConfig(**SHAPE, max_position_embeddings=32), 32),
    # Its first two positions are of padding.
    "roberta": (
        lambda: transformers.RobertaConfig(
            **{**SHAPE, "pad_token_id": 1}, max_position_embeddings=34
        ),
        32,
    ),
    "gpt2": (
        lambda: transformers.GPT2Config(
            vocab_size=19, n_embd=32, n_layer=2, n_head=4, n_positions=32
        ),
        32,
    ),
    "bart": (lambda: transformers.BartConfig(**BART, max_position_embeddings=32), 32),
    # Its padding is number 1, whatever its config says.
    "mpnet": (lambda: transformers.MPNetConfig(**SHAPE, max_position_embeddings=34), 32),
    "nystromformer": (
        lambda: transformers.NystromformerConfig(
            **SHAPE, max_position_embeddings=32, num_landmarks=8, segment_means_seq_len=8
        ),
        32,
    ),
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_texts_beyond_the_positions_are_refused_and_shorter_ones_are_not(
    kind: str, tmp_path: Path
) -> None:
    config, positions = POSITIONS[kind]
    model = encoders.folder(config(), tmp_path / "model")
    long = write_texts(tmp_path / "long.csv", "good " * 200)
    line = refusal(long, model, "--max-tokens", 64)
    assert f"--max-tokens is 64, the model has {positions} positions" in line
    fit(long, model, tmp_path / "cut", "--max-tokens", positions)
    fit(write_texts(tmp_path / "t.csv"), model, tmp_path / "short", "--max-tokens", 64)
    # A run knows its positions: a longer text that comes later is refused too.
    text = ("--text", "good " * 200, "--label", "pos")
    said = turnover("explain", tmp_path / "short", *text, expect=2).stderr
    assert f"the model has {positions} positions" in said


@pytest.mark.parametrize("kind", ["t5", "deberta", "modernbert"])
def test_relative_positions_have_no_limit(kind: str, tmp_path: Path) -> None:
    configs = {
        "t5": KINDS["t5"],
        "deberta": lambda: transformers.DebertaV2Config(
            **SHAPE, relative_attention=True, position_buckets=16, position_biased_input=False
        ),
        "modernbert": KINDS["modernbert"],
    }
    model = encoders.folder(configs[kind](), tmp_path / "model")
    fit(write_texts(tmp_path / "t.csv", "good " * 100), model, tmp_path / "run", "--max-tokens", 64)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "fnet": (
        lambda: transformers.FNetConfig(
            **{k: v for k, v in SHAPE.items() if k != "num_attention_heads"}
        ),
        r"FNetModel.*another output beside a longer one",
    ),
    "convbert": (
        lambda: transformers.ConvBertConfig(**SHAPE, embedding_size=32),
        r"ConvBertModel.*another output beside a longer one",
    ),
    "xlnet": (
        lambda: transformers.XLNetConfig(
            vocab_size=19, d_model=32, n_layer=2, n_head=4, d_inner=64, pad_token_id=0
        ),
        "cannot be trained under masks",
    ),
    "longformer": (
        lambda: transformers.LongformerConfig(**SHAPE, attention_window=8),
        "cannot be trained under masks",
    ),
    "mamba": (
        lambda: transformers.MambaConfig(
            vocab_size=19, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0
        ),
        "MambaModel.*cannot be a text encoder with LoRA",
    ),
    "reformer": (
        lambda: transformers.ReformerConfig(
            vocab_size=19,
            hidden_size=32,
            attention_head_size=8,
            num_attention_heads=4,
            feed_forward_size=64,
            attn_layers=["local", "lsh"],
            axial_pos_shape=[8, 8],
            axial_pos_embds_dim=[16, 16],
            local_attn_chunk_length=4,
            lsh_attn_chunk_length=4,
            num_buckets=4,
            pad_token_id=0,
            is_decoder=False,
        ),
        "cannot be trained here",
    ),
    "big bird": (
        lambda: transformers.BigBirdConfig(
            **SHAPE, block_size=1, num_random_blocks=1, attention_type="block_sparse"
        ),
        "BigBirdModel",
    ),
    "perceiver": (
        lambda: transformers.PerceiverConfig(
            num_latents=8,
            d_latents=32,
            d_model=32,
            vocab_size=19,
            num_blocks=1,
            num_self_attends_per_block=1,
            num_self_attention_heads=4,
            num_cross_attention_heads=4,
        ),
        "PerceiverModel.*cannot be a text encoder",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_trained_row_by_row_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    config, message = REFUSED[kind]
    model = encoders.folder(config(), tmp_path / "model")
    line = refusal(write_texts(tmp_path / "t.csv"), model)
    assert re.search(message, line) and str(model) in line


def test_tokenizers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    data = write_texts(tmp_path / "t.csv")
    config = transformers.BertConfig(**SHAPE)
    bare = tmp_path / "bare"
    transformers.BertModel(config).save_pretrained(bare)
    assert "knows no word of the texts" in refusal(data, bare)
    with pytest.warns(UserWarning, match=r"knows no word of the texts, so their length alone"):
        check_tokenizer(encoders.tokenizer(), ["quoi", "rien du tout"], "here")
    small = encoders.folder(transformers.BertConfig(**{**SHAPE, "vocab_size": 17}), tmp_path / "s")
    line = refusal(data, small)
    assert "the token 'it', number 18" in line and "the model has 17 embeddings" in line
    # Words that no text has may be more than there are embeddings.
    encoders.tokenizer(("never", "used")).save_pretrained(encoders.folder(config, tmp_path / "m"))
    fit(data, tmp_path / "m", tmp_path / "run")


def test_a_folder_without_weights_that_are_read_says_what_to_do(tmp_path: Path) -> None:
    data, model = write_texts(tmp_path / "t.csv"), tmp_path / "model"
    for missing in (model, data, "./model", "~/no such folder"):
        assert "no such folder; give the folder" in refusal(data, missing)
    encoders.folder(transformers.BertConfig(**SHAPE), model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "and save it with save_pretrained" in refusal(data, model)


def test_a_text_without_tokens_is_named(tmp_path: Path) -> None:
    import tokenizers

    model = encoders.folder(KINDS["gpt2"](), tmp_path / "model")
    bare = encoders.tokenizer()
    bare.backend_tokenizer.post_processor = None
    bare.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("~", "removed")
    bare.save_pretrained(model)
    data = write_texts(tmp_path / "t.csv", "~~", "good")
    assert "has no token" in refusal(data, model)


def test_a_decoder_without_padding_is_as_right_as_one_with_it(tmp_path: Path) -> None:
    data = write_texts(tmp_path / "t.csv")
    runs = []
    for name, special in (("with", {}), ("without", {"pad_token": None})):
        model = encoders.folder(KINDS["gpt2"](), tmp_path / name)
        encoders.tokenizer(**special).save_pretrained(model)
        fit(data, model, tmp_path / f"run {name}")
        runs.append(Run.load(tmp_path / f"run {name}"))
    assert runs[1].pipeline.tokenizer.pad_token is None
    first, second = (
        logits_of_rows(
            run.model, run.encode(run.test), range(len(run.test)), lambda _, r=run: r.network.mean()
        )
        for run in runs
    )
    torch.testing.assert_close(first, second)


def test_a_checkpoint_without_weights_that_count_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    data = write_texts(tmp_path / "t.csv")
    model = encoders.folder(transformers.BertConfig(**SHAPE), tmp_path / "model")
    path = model / "model.safetensors"
    weights = load_file(path)
    without = {k: v for k, v in weights.items() if not k.startswith("pooler")}
    save_file(without, path, {"format": "pt"})
    fit(data, model, tmp_path / "run")  # nothing that is used is missing
    del without["encoder.layer.1.output.dense.weight"]
    save_file(without, path, {"format": "pt"})
    (tmp_path / "other").mkdir()
    line = refusal(write_texts(tmp_path / "other" / "t.csv"), model)
    assert "lacks 1 weights of its encoder, such as encoder.layer.1.output.dense.weight" in line


def test_planning_rehearses_too(tmp_path: Path) -> None:
    model = encoders.folder(REFUSED["fnet"][0](), tmp_path / "model")
    data = write_texts(tmp_path / "t.csv", rows=100)
    pilot = ("--pilot", "--pilot-rows", 60, "--head-units", 32)
    said = turnover("plan", data, "--model", model, *pilot, expect=2).stderr
    assert "another output beside a longer one" in said


def test_a_rehearsal_leaves_everything_as_it_was(tmp_path: Path) -> None:
    model = encoders.folder(transformers.BertConfig(**SHAPE), tmp_path / "model")
    data = read(str(write_texts(tmp_path / "t.csv")), Columns())
    with torch.random.fork_rng():
        pipeline, network = build(ClassifierConfig(str(model), 32, 4), data)
        before = {name: value.clone() for name, value in network.state_dict().items()}
        modes = [module.training for module in network.modules()]
        state = torch.get_rng_state()
        kept = tmp_path / "kept"
        (kept / "rehearsal").mkdir(parents=True)  # of one that was killed
        rehearse(pipeline, network, ("lora", "head"), MaskSpec(), data, data, kept)
        assert torch.equal(state, torch.get_rng_state())
    assert not list(kept.iterdir())
    assert modes == [module.training for module in network.modules()]
    assert all(parameter.grad is None for parameter in network.parameters())
    after = network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with pytest.raises(InputError, match="no module"):
        rehearse(pipeline, network, ("nowhere",), MaskSpec(), data, data, kept)
