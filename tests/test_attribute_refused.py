"""Models that `turnover attribute` refuses in one line, before anything is written or their code runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("typer")

from safetensors.torch import load_file, save_file

import trained
from test_attribute import XLNET, files  # noqa: F401 - a fixture
from test_cli import turnover as command

CODE = "open('ran', 'w').close()\nraise SystemExit(0)\n"


def configured(folder: Path, name: str = "config.json", **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def custom_code(folder: Path) -> None:
    (folder / "modeling.py").write_text(CODE)
    configured(
        folder,
        model_type="mine",
        auto_map={
            "AutoConfig": "modeling.Config",
            "AutoModelForSequenceClassification": "modeling.Model",
        },
    )


def pickled(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def headless(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "classifier" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def wider(folder: Path) -> None:
    names = [f"class {i}" for i in range(5)]
    configured(
        folder, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
    )


def not_finite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "custom code": (custom_code, "custom code"),
    "attention from elsewhere": (
        lambda folder: configured(folder, _attn_implementation="some/repository"),
        "may be code",
    ),
    "pickled weights": (pickled, "pytorch_model.bin"),
    "no head": (headless, "classifier"),
    "a head of another width": (wider, "classifier"),
    "weights that are not numbers": (not_finite, "not finite"),
    "a regression": (
        lambda folder: configured(folder, problem_type="regression"),
        "regression",
    ),
    "several labels": (
        lambda folder: configured(folder, problem_type="multi_label_classification"),
        "multi label",
    ),
    "one output": (
        lambda folder: configured(folder, id2label={"0": "x"}, label2id={"x": 0}),
        "regression",
    ),
    "a damaged config": (lambda folder: (folder / "config.json").write_text("{"), "config"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        "tokenizer",
    ),
}
ADAPTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled weights": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "pickles",
    ),
    "a module to import": (
        lambda folder: configured(
            folder, "adapter_config.json", megatron_config={"a": 1}, megatron_core="antigravity"
        ),
        "megatron_config",
    ),
    "no base": (
        lambda folder: configured(folder, "adapter_config.json", base_model_name_or_path=None),
        "base_model_name_or_path",
    ),
    "a base that is not there": (
        lambda folder: configured(
            folder, "adapter_config.json", base_model_name_or_path="/no/such/folder"
        ),
        "/no/such/folder",
    ),
    "another rank": (lambda folder: configured(folder, "adapter_config.json", r=2), "adapter"),
    "an unknown kind": (
        lambda folder: configured(folder, "adapter_config.json", peft_type="MINE"),
        "adapter",
    ),
}


def without_head(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    kept = {name: value for name, value in weights.items() if "classifier" not in name}
    save_file(kept, folder / "adapter_model.safetensors")


ADAPTERS["no head"] = (without_head, "no weights of a classifier")


def refused(files: Path, model: Path, tmp_path: Path, *more: object) -> str:  # noqa: F811
    given = ("--train", files / "train.csv", "--test", files / "test.csv", "--id-column", "id")
    out = tmp_path / "run"
    said = command("attribute", "--model", model, *given, "--out", out, *more, expect=2).stderr
    lines = [line for line in said.splitlines() if line.startswith("turnover: ")]
    assert len(lines) == 1 and len(lines[0]) < 700
    assert not out.exists() and not list(tmp_path.glob(".run*"))
    return lines[0]


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_refused_in_one_line(
    files: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    change, said = MODELS[kind]
    model = tmp_path / "model"
    shutil.copytree(files / "model", model)
    change(model)
    assert said in refused(files, model, tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_refused_in_one_line(
    files: Path,  # noqa: F811
    tmp_path: Path,
    kind: str,
) -> None:
    change, said = ADAPTERS[kind]
    model = tmp_path / "adapter"
    shutil.copytree(files / "adapter", model)
    change(model)
    assert said in refused(files, model, tmp_path)


def test_code_beside_a_known_kind_of_model_is_not_run(
    files: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(files / "model", model)
    (model / "modeling.py").write_text(CODE)
    configured(model, auto_map={"AutoModelForSequenceClassification": "modeling.Model"})
    given = ("--train", files / "train.csv", "--test", files / "test.csv", "--id-column", "id")
    command("attribute", "--model", model, *given, "--out", tmp_path / "run")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_classifier_is_refused(files: Path, tmp_path: Path) -> None:  # noqa: F811
    import transformers

    import encoders

    config = transformers.T5Config(**encoders.T5)
    model = encoders.folder(transformers.T5EncoderModel(config), tmp_path / "t5")
    configured(model, model_type="t5")
    assert "lacks" in refused(files, model, tmp_path) or "not a classifier" in refused(
        files, model, tmp_path
    )
    blip = transformers.AutoConfig.for_model("vit_mae", hidden_size=32, num_attention_heads=4)
    blip.save_pretrained(tmp_path / "mae")
    assert "not a classifier" in refused(files, tmp_path / "mae", tmp_path)
    assert "no such folder" in refused(files, tmp_path / "nothing", tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("xlnet", XLNET, "padding"),  # reads the last token, and is padded at the right
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, "pad_token_id"),
    ],
)
def test_padding_that_changes_predictions_is_refused(
    files: Path,  # noqa: F811
    tmp_path: Path,
    kind: str,
    changes: Any,
    said: str,
) -> None:
    model = trained.texts(tmp_path / "model", trained.rows(60, 0), kind, **changes)
    if kind == "gpt2":
        configured(model, pad_token_id=None)
    assert said in refused(files, model, tmp_path)


@pytest.mark.parametrize(
    ("layers", "said"),
    [("lora", "no LoRA adapter"), ("*nothing*", "bert.embeddings"), ("", "all, last, head")],
)
def test_layers_that_are_not_there_are_refused(
    files: Path,  # noqa: F811
    tmp_path: Path,
    layers: str,
    said: str,
) -> None:
    assert said in refused(files, files / "model", tmp_path, "--layers", layers)


@pytest.mark.parametrize("tokens", [0, 600])
def test_tokens_that_the_model_does_not_take_are_refused(
    files: Path,  # noqa: F811
    tmp_path: Path,
    tokens: int,
) -> None:
    long = trained.write(tmp_path / "long.csv", [(" ".join(["film"] * 599), 0), ("good", 1)] * 4)
    given = ("--train", long, "--test", long, "--out", tmp_path / "run", "--max-tokens", tokens)
    said = command("attribute", "--model", files / "model", *given, expect=2).stderr
    assert "max-tokens" in said and not (tmp_path / "run").exists()


def test_longer_texts_are_cut_and_said(files: Path, tmp_path: Path) -> None:  # noqa: F811
    long = trained.write(tmp_path / "long.csv", [(" ".join(["film"] * 599), 0), ("good", 1)] * 4)
    given = ("--train", long, "--test", long, "--out", tmp_path / "run")
    said = command("attribute", "--model", files / "model", *given, "--plan").stdout
    assert "4 training texts are cut to 512 tokens" in said
