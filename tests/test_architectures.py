"""Hugging Face's architectures, by small random configurations: found, trained by the Trainer, scored."""

import numpy as np
import pytest
import torch

import tiny
import turnover
from turnover import Batch

transformers = pytest.importorskip("transformers", reason="pip install 'turnover[text]'")
pytest.importorskip(
    "accelerate", reason="the Trainer needs accelerate: pip install 'turnover[text]'"
)

from turnover.integrations.trainer import attach_trainer  # noqa: E402

ROWS = 8
TEXT = {
    "vocab_size": 50,
    "num_labels": tiny.CLASSES,
    "pad_token_id": 0,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
# Kind, settings, the first site, and the linear layers before and behind it.
ARCHITECTURES = {
    "bert": (
        TEXT,
        "bert.encoder.layer.0.intermediate.intermediate_act_fn",
        "bert.encoder.layer.0.intermediate.dense",
        "bert.encoder.layer.0.output.dense",
    ),
    "roberta": (
        TEXT,
        "roberta.encoder.layer.0.intermediate.intermediate_act_fn",
        "roberta.encoder.layer.0.intermediate.dense",
        "roberta.encoder.layer.0.output.dense",
    ),
    "distilbert": (
        {
            "vocab_size": 50,
            "num_labels": tiny.CLASSES,
            "dim": 16,
            "hidden_dim": 24,
            "n_layers": 2,
            "n_heads": 2,
            "max_position_embeddings": 32,
        },
        "distilbert.transformer.layer.0.ffn.activation",
        "distilbert.transformer.layer.0.ffn.lin1",
        "distilbert.transformer.layer.0.ffn.lin2",
    ),
    "deberta-v2": (
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
        "deberta.encoder.layer.0.intermediate.intermediate_act_fn",
        "deberta.encoder.layer.0.intermediate.dense",
        "deberta.encoder.layer.0.output.dense",
    ),
    "gpt2": (
        {
            "vocab_size": 50,
            "num_labels": tiny.CLASSES,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 32,
            "pad_token_id": 0,
        },
        "transformer.h.0.mlp.act",
        "transformer.h.0.mlp.c_fc",
        "transformer.h.0.mlp.c_proj",
    ),
    "llama": (
        {**TEXT, "num_key_value_heads": 2},
        "model.layers.0.mlp.act_fn",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.down_proj",
    ),
    "vit": (
        {
            "num_labels": tiny.CLASSES,
            "image_size": 8,
            "patch_size": 4,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
        },
        "vit.layers.0.mlp.activation_fn",
        "vit.layers.0.mlp.fc1",
        "vit.layers.0.mlp.fc2",
    ),
}


def build(kind):
    config = transformers.AutoConfig.for_model(kind, **ARCHITECTURES[kind][0])
    auto = transformers.AutoModelForSequenceClassification
    if kind == "vit":
        auto = transformers.AutoModelForImageClassification
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(config)


def inputs_of(kind, rows=ROWS, seed=0):
    if kind == "vit":
        return {"pixel_values": tiny.features(rows, 3, 8, 8, seed=seed)}
    return tiny.texts(rows, seed=seed)


def train(model, kind, folder, sites, **settings):
    inputs, labels = inputs_of(kind), tiny.labels(ROWS)
    rows = [{k: v[row] for k, v in inputs.items()} | {"label": labels[row]} for row in range(ROWS)]
    arguments = transformers.TrainingArguments(
        str(folder),
        **{
            "num_train_epochs": 3,
            "per_device_train_batch_size": 3,
            "learning_rate": 3e-3,
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **settings,
        },
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    network = attach_trainer(trainer, sites)
    trainer.train()
    network.model.eval()
    return network


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_architecture_is_masked_trained_and_scored(kind, tmp_path):
    model = build(kind)
    network = train(model, kind, tmp_path, "mlp", bf16=kind == "llama")
    _, site, before, behind = ARCHITECTURES[kind]
    assert network.sites[:2] == [site, site.replace(".0.", ".1.")]
    targets, ids = Batch(inputs_of(kind, 3, seed=1), tiny.labels(3, seed=1)), torch.arange(ROWS)
    expected = tiny.definition(network, turnover.objectives.margin, targets, ids)
    exact = turnover.Influence(network, method="exact", ghosts=10).estimate([targets], ids).scores
    np.testing.assert_allclose(exact, expected, rtol=2e-3, atol=2e-4)
    linear = turnover.Influence(network, method="linear").estimate([targets], ids).scores
    assert np.corrcoef(linear.ravel(), exact.ravel())[0, 1] > 0.8

    leaking = {p.name: p.share for p in network.audit(inputs_of(kind)).parameters}
    assert leaking[f"{before}.weight"] == leaking[f"{behind}.weight"] == 0


@pytest.mark.slow
@pytest.mark.long
def test_a_real_bert_is_trained_by_the_trainer_and_scored(tmp_path):
    """MiniLM, frozen under LoRA and a wide head, on sentences: nothing leaks, estimates agree."""
    peft = pytest.importorskip("peft", reason="pip install 'turnover[text]'")
    datasets = pytest.importorskip("datasets", reason="pip install 'turnover[text]'")
    from turnover.data import demo

    try:
        folder = demo.model_folder()
        table, _ = demo.write_sentences(tmp_path)
    except turnover.InputError as error:
        pytest.skip(str(error))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    data = datasets.load_dataset(
        "csv", data_files=str(table), split="train[:48]", cache_dir=str(tmp_path)
    )
    data = data.map(tokenizer, input_columns="text").class_encode_column("label")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    model.classifier = turnover.WideHead(384, 1024, 2)
    lora = peft.LoraConfig(r=8, target_modules=["query", "value"], modules_to_save=["classifier"])
    model = peft.get_peft_model(model, lora)
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    network = attach_trainer(trainer, ["lora", "head"])
    trainer.train()
    loader = trainer.get_test_dataloader(data.select(range(2)))
    (batch,) = [turnover.batches.as_batch(batch) for batch in loader]
    assert network.audit(batch).clean
    ids = torch.tensor(data["id"])
    model.eval()
    expected = tiny.definition(network, turnover.objectives.margin, batch, ids[:6])
    exact = turnover.Influence(network, method="exact", ghosts=10).estimate([batch], ids[:6])
    np.testing.assert_allclose(exact.scores, expected, rtol=5e-3, atol=5e-4)
    linear = turnover.Influence(network).estimate([batch], ids[:6])
    assert np.corrcoef(linear.scores.ravel(), expected.ravel())[0, 1] > 0.8
