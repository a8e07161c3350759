"""Hugging Face's own Trainer, on a tiny BERT: nothing of it is subclassed."""

import copy
import json
import logging

import numpy as np
import pytest
import torch

import tiny
import turnover
from turnover import InputError, MaskSpec

pytest.importorskip(
    "accelerate", reason="the Trainer needs accelerate: pip install 'turnover[text]'"
)
datasets = pytest.importorskip("datasets", reason="pip install 'turnover[text]'")
transformers = pytest.importorskip("transformers", reason="pip install 'turnover[text]'")

from turnover.integrations.pretrained import load_masks, save_masks  # noqa: E402
from turnover.integrations.trainer import attach_trainer  # noqa: E402

ROWS = 8
SITES = ["lora", "head"]


def rows(**columns):
    batch = tiny.texts(ROWS)
    batch["attention_mask"].fill_(1)
    table = {name: value.tolist() for name, value in batch.items()}
    return datasets.Dataset.from_dict({**table, "label": tiny.labels(ROWS).tolist(), **columns})


def trainer(folder, model=None, dataset=None, *, cls=None, **settings):
    settings = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": ROWS,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "use_cpu": True,
        **settings,
    }
    return (cls or transformers.Trainer)(
        model or tiny.bert(),
        transformers.TrainingArguments(str(folder), **settings),
        train_dataset=rows() if dataset is None else dataset,
    )


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def by_hand(model, ids, *, steps=3, rate=0.1, spec=None):
    """Full-batch gradient descent under ``exposed(ids)``, written out."""
    network = turnover.attach(model, SITES, spec)
    inputs = tiny.texts(ROWS)
    inputs["attention_mask"].fill_(1)
    labels = tiny.labels(ROWS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for _ in range(steps):
        with network.exposed(ids):
            loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return trainable(model)


def deterministic(model):
    """Without dropout, and with a loss that the trainer divides by the steps of accumulation: BERT's own
    loss ignores the count of items that the trainer hands it, and comes out twice as large over two."""
    model.accepts_loss_kwargs = False
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"per_device_train_batch_size": ROWS // 2, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "per_device_train_batch_size": ROWS // 4,
            "gradient_accumulation_steps": 4,
        },
    ],
    ids=["plain", "accumulation", "checkpointing", "checkpointing and accumulation"],
)
def test_the_trainer_learns_what_a_loop_under_exposed_learns(tmp_path, settings):
    model = deterministic(tiny.bert())
    expected = by_hand(copy.deepcopy(model), torch.arange(ROWS))
    one = trainer(tmp_path, model, **settings)
    attach_trainer(one, SITES)
    one.train()
    for name, value in trainable(model).items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("reentrant", [True, False, None])
@pytest.mark.parametrize("half", [False, True])
def test_units_that_an_instance_drops_never_move(tmp_path, reentrant, half):
    """All rows are one instance, so what its mask drops stays as it was, bit for bit."""
    settings = {"optim": "adamw_torch", "per_device_train_batch_size": 2, "bf16": half}
    if reentrant is not None:
        settings["gradient_checkpointing"] = True
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    model = tiny.bert()
    if reentrant:
        # Frozen embeddings would leave the first checkpoint without an input that needs gradients.
        model.enable_input_require_grads()
    before = trainable(model)
    one = trainer(tmp_path, model, rows(id=["same"] * ROWS), **settings)
    network = attach_trainer(one, SITES, ids="id")
    one.train()
    ids = turnover.string_ids(["same"])
    kept = {site: network.spec.exposed(ids, site, network.units[site])[0] for site in network.sites}
    head, after = kept["classifier.activation"], trainable(model)
    for name in ("classifier.spread.weight", "classifier.spread.bias"):
        assert torch.equal(after[name][~head], before[name][~head])
        assert not torch.equal(after[name][head], before[name][head])
    for name in before:
        if "lora_A" in name:
            unit = kept[name.removesuffix(".weight")]
            assert torch.equal(after[name][~unit], before[name][~unit]), name
            assert not torch.equal(after[name][unit], before[name][unit]), name


def test_shuffled_rows_keep_their_own_masks_over_epochs(tmp_path):
    """Batches hold the ids of their rows, whatever the order."""
    dataset = rows(id=[f"row {i}" for i in range(ROWS)])
    one = trainer(tmp_path, dataset=dataset, per_device_train_batch_size=3)
    attach_trainer(one, SITES)
    expected = dict(
        zip(
            turnover.string_ids(dataset["id"]).tolist(),
            map(tuple, dataset["input_ids"]),
            strict=True,
        )
    )
    orders = []
    loader = one.get_train_dataloader()
    for _ in range(2):
        batches = list(loader)
        assert [len(batch["ids"]) for batch in batches] == [3, 3, 2]
        seen = {
            int(i): tuple(tokens.tolist())
            for batch in batches
            for i, tokens in zip(batch["ids"], batch["input_ids"], strict=True)
        }
        assert seen == expected
        orders.append([int(i) for batch in batches for i in batch["ids"]])
    assert orders[0] != orders[1]


def test_evaluation_and_prediction_run_the_mean_network_without_ids(tmp_path):
    model, dataset = tiny.bert(), rows(id=list(range(ROWS)))
    one = trainer(tmp_path, model, dataset)
    network = attach_trainer(one, SITES)
    one.train()
    loss = one.evaluate(dataset)["eval_loss"]
    predicted = one.predict(dataset.remove_columns("label")).predictions
    model.eval()
    inputs = tiny.texts(ROWS)
    inputs["attention_mask"].fill_(1)
    with torch.no_grad(), network.mean():
        outputs = model(**inputs, labels=tiny.labels(ROWS))
    assert loss == pytest.approx(outputs.loss.item(), rel=1e-5)
    np.testing.assert_allclose(predicted, outputs.logits.numpy(), rtol=1e-4, atol=1e-5)


def test_the_trainers_batches_are_what_the_estimators_take(tmp_path):
    one = trainer(tmp_path, dataset=rows())
    network = attach_trainer(one, SITES)
    one.train()
    exact = turnover.Influence(network, method="exact", ghosts=10)
    targets = [dict(batch) for batch in one.get_eval_dataloader(rows().select(range(3)))]
    result = exact.estimate(targets, torch.arange(ROWS))
    batch = turnover.batches.as_batch(targets[0])
    network.model.eval()
    expected = tiny.definition(network, turnover.objectives.margin, batch, torch.arange(ROWS))
    np.testing.assert_allclose(result.scores, expected, rtol=1e-3, atol=1e-4)
    own = exact.self_influence(one.get_train_dataloader())
    assert sorted(own.train_ids.tolist()) == list(range(ROWS))


class Named(torch.nn.Module):
    """Calls its labels in its own way, and gives its loss before its logits."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 32), torch.nn.GELU(), torch.nn.Linear(32, 3, bias=False)
        )

    def forward(self, x, target=None, other=None):
        logits = self.net(x)
        if target is None:
            return (logits,)
        return torch.nn.functional.cross_entropy(logits, target), logits


def named_trainer(path, **settings):
    data = datasets.Dataset.from_dict(
        {"x": tiny.features(8, 4).tolist(), "target": [0, 1, 2, 0] * 2, "other": [2, 1, 0, 0] * 2}
    )
    arguments = transformers.TrainingArguments(
        str(path),
        per_device_train_batch_size=3,
        num_train_epochs=1,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    return transformers.Trainer(
        Named(), arguments, train_dataset=data, data_collator=transformers.default_data_collator
    )


def test_labels_come_from_the_column_that_the_trainer_names(tmp_path):
    one = named_trainer(tmp_path, label_names=["target"])
    network = attach_trainer(one, "mlp")
    one.train()
    loader = one.get_train_dataloader()
    x, y = tiny.features(8, 4), torch.tensor([0, 1, 2, 0] * 2)
    plain = [turnover.Batch(x, y, torch.arange(8))]
    for method in ("linear", "exact"):
        influence = turnover.Influence(network, method=method, ghosts=20)
        found, expected = (influence.self_influence(each) for each in (loader, plain))
        order = found.train_ids.argsort()
        np.testing.assert_allclose(found.scores[order], expected.scores, rtol=1e-4, atol=1e-5)
        targets = one.get_eval_dataloader(one.train_dataset)
        np.testing.assert_allclose(
            influence.estimate(targets, range(8)).scores,
            influence.estimate(plain, range(8)).scores,
            rtol=1e-4,
            atol=1e-5,
        )
    fitted = turnover.Influence(network, method="gram").fit(loader)
    assert sorted(fitted.self_influence().train_ids.tolist()) == list(range(8))
    held = turnover.hidden_predictions(network, loader, targets)
    assert len(held.probabilities) == 8


def test_of_several_label_names_each_is_where_an_objective_of_ones_own_finds_it(tmp_path):
    one = named_trainer(tmp_path, label_names=["target", "other"])
    network = attach_trainer(one, "mlp")
    one.train()
    loader = one.get_train_dataloader()
    with pytest.raises(InputError, match=r"needs labels.*'target', 'other'.*adapter"):
        turnover.Influence(network, ghosts=20).self_influence(loader)

    def both(outputs, batch):
        logits = outputs[-1]
        costs = [
            torch.nn.functional.cross_entropy(logits, batch.inputs[name], reduction="none")
            for name in ("target", "other")
        ]
        return costs[0] + costs[1]

    for method in ("linear", "exact"):
        own = turnover.Influence(network, both, method, ghosts=20)
        assert len(own.self_influence(loader).scores) == 8


def test_clipping_by_global_norm_is_refused_before_training(tmp_path):
    model = tiny.bert()
    one = trainer(tmp_path, model, max_grad_norm=1.0)
    before = trainable(model)
    attach_trainer(one, SITES)
    with pytest.raises(InputError, match="max_grad_norm=0"):
        one.train()
    assert all(torch.equal(value, before[name]) for name, value in trainable(model).items())
    assert one.state.global_step == 0


def test_clipping_at_an_infinite_norm_is_none(tmp_path):
    one = trainer(tmp_path, tiny.bert(), max_grad_norm=float("inf"))
    attach_trainer(one, SITES)
    one.train()
    assert one.state.global_step > 0


def test_the_audit_of_the_first_batch_is_logged(tmp_path, caplog):
    one = trainer(tmp_path / "clean", tiny.bert())
    attach_trainer(one, SITES)
    with caplog.at_level(logging.INFO, "turnover"):
        one.train()
    assert [r.levelname for r in caplog.records if "0.00% of" in r.message] == ["INFO"]
    caplog.clear()
    leaky = tiny.bert()
    leaky.bert.pooler.requires_grad_(True)
    one = trainer(tmp_path / "leaky", leaky, optim="adafactor")
    attach_trainer(one, SITES)
    with caplog.at_level(logging.INFO, "turnover"):
        one.train()
    (record,) = [r for r in caplog.records if "audit" in r.message]
    assert record.levelname == "WARNING"
    assert "bert.pooler.dense.weight" in record.message and "Adafactor" in record.message


def test_the_audit_does_not_move_the_random_numbers_of_training(tmp_path):
    """Dropout and shuffling are as in a second run whose audit looks at nothing."""

    def trained(folder, monkeypatch=None):
        one = trainer(folder, tiny.bert(), optim="adamw_torch", per_device_train_batch_size=3)
        network = attach_trainer(one, SITES)
        if monkeypatch:
            clean = turnover.dropout.audit.AuditReport((), (), ())
            monkeypatch.setattr(network, "audit", lambda *args, **kwargs: clean)
        one.train()
        return trainable(network.model)

    with pytest.MonkeyPatch.context() as patch:
        unseen = trained(tmp_path / "unseen", patch)
    for name, value in trained(tmp_path / "seen").items():
        assert torch.equal(value, unseen[name]), name


@pytest.mark.parametrize(
    ("columns", "ids", "message"),
    [
        ({"id": range(ROWS), "ids": range(ROWS)}, None, "say which"),
        ({"id": [1] * ROWS}, None, "equal ids"),
        ({"id": [None, *range(1, ROWS)]}, None, "row 0 has no id"),
        ({"key": ["a", None] * (ROWS // 2)}, "key", "row 1 has no id"),
        ({"key": range(-1, ROWS - 1)}, "key", "ghosts"),
        ({}, "key", "no column 'key'; it has 'input_ids'"),
        ({}, list(range(ROWS - 1)), f"{ROWS} rows, and ids= has {ROWS - 1}"),
        ({}, torch.arange(ROWS) - 1, "ghosts"),
    ],
)
def test_ids_that_are_missing_or_ambiguous_are_refused(tmp_path, columns, ids, message):
    dataset = rows(**{name: list(values) for name, values in columns.items()})
    one = trainer(tmp_path, dataset=dataset)
    with pytest.raises(InputError, match=message):
        attach_trainer(one, SITES, ids=ids)
    assert not any(module._forward_hooks for module in one.model.modules())


def test_ids_that_are_floats_are_refused(tmp_path):
    one = trainer(tmp_path, dataset=rows(id=[float(i) for i in range(ROWS)]))
    with pytest.raises(TypeError, match="integers"):
        attach_trainer(one, SITES)


def test_rows_of_any_data_set_take_ids_that_are_given(tmp_path):
    class Plain(torch.utils.data.Dataset):
        def __init__(self):
            self.table = rows(text=["not for the model"] * ROWS).to_list()

        def __len__(self):
            return ROWS

        def __getitem__(self, row):
            return self.table[row]

    one = trainer(tmp_path, dataset=Plain())
    attach_trainer(one, SITES, ids=torch.arange(100, 100 + ROWS))
    (batch,) = one.get_train_dataloader()
    assert sorted(batch["ids"].tolist()) == list(range(100, 100 + ROWS))
    assert "text" not in batch
    one.train()
    with pytest.raises(InputError, match="pass the ids themselves"):
        attach_trainer(trainer(tmp_path, dataset=Plain()), SITES, ids="id")


def test_a_stream_takes_the_name_of_its_column(tmp_path):
    stream = rows(key=[f"k{i}" for i in range(ROWS)]).to_iterable_dataset()
    model = deterministic(tiny.bert())
    expected = by_hand(copy.deepcopy(model), turnover.string_ids(f"k{i}" for i in range(ROWS)))
    one = trainer(tmp_path, model, stream, max_steps=3)
    attach_trainer(one, SITES, ids="key")
    one.train()
    for name, value in trainable(model).items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    with pytest.raises(InputError, match="name the column"):
        attach_trainer(trainer(tmp_path, dataset=stream, max_steps=3), SITES)
    nameless = trainer(tmp_path, dataset=stream, max_steps=3)
    attach_trainer(nameless, SITES, ids="kye")
    with pytest.raises(InputError, match="no 'kye'"):
        nameless.train()


def test_a_trainer_that_makes_its_own_model_or_is_attached_already_is_refused(tmp_path):
    arguments = transformers.TrainingArguments(str(tmp_path), report_to="none")
    makes = transformers.Trainer(
        args=arguments, model_init=lambda: tiny.bert(), train_dataset=rows()
    )
    with pytest.raises(InputError, match="model_init"):
        attach_trainer(makes, SITES)
    one = trainer(tmp_path)
    attach_trainer(one, ["head"])
    with pytest.raises(InputError, match="already has turn-over dropout"):
        attach_trainer(one, ["lora"])
    one.model = tiny.bert()
    with pytest.raises(InputError, match="not the one"):
        one.train()
    with pytest.raises(InputError, match="no train_dataset"):
        attach_trainer(transformers.Trainer(tiny.bert(), arguments), SITES)


def test_a_model_that_cannot_run_without_labels_is_refused(tmp_path):
    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = tiny.mlp(features=tiny.TOKENS)

        def forward(self, input_ids, labels):
            logits = self.body(input_ids.float())
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    with pytest.raises(InputError, match="labels=None"):
        attach_trainer(trainer(tmp_path, Classifier()), "mlp")


def test_a_users_own_compute_loss_runs_under_the_ids(tmp_path):
    class Twice(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **more):
            assert "ids" not in inputs
            losses = [model(**inputs).loss for _ in range(2)]
            return (sum(losses) / 2, {}) if return_outputs else sum(losses) / 2

    model = deterministic(tiny.bert())
    expected = by_hand(copy.deepcopy(model), torch.arange(ROWS))
    one = trainer(tmp_path, model, cls=Twice)
    attach_trainer(one, SITES)
    one.train()
    for name, value in trainable(model).items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_training_resumes_where_its_checkpoint_ended(tmp_path):
    settings = {
        "optim": "adamw_torch",
        "per_device_train_batch_size": 3,
        "save_strategy": "epoch",
        "num_train_epochs": 2,
    }
    whole = trainer(tmp_path / "whole", tiny.bert(), **settings)
    attach_trainer(whole, SITES, MaskSpec(seed=3))
    whole.train()
    resumed = trainer(tmp_path / "resumed", tiny.bert(), **settings)
    attach_trainer(resumed, SITES, MaskSpec(seed=3))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    expected = trainable(whole.model)
    for name, value in trainable(resumed.model).items():
        assert torch.equal(value, expected[name]), name

    other = trainer(tmp_path / "whole", tiny.bert(), **settings)
    attach_trainer(other, SITES, MaskSpec(seed=4))
    with pytest.raises(InputError, match="other masks"):
        other.train(resume_from_checkpoint=True)
    elsewhere = trainer(tmp_path / "whole", tiny.bert(), **settings)
    attach_trainer(elsewhere, "head", MaskSpec(seed=3))
    with pytest.raises(InputError, match=r"other masks.*lora_A.*network's.*classifier\.activation"):
        elsewhere.train(resume_from_checkpoint=True)
    (tmp_path / "whole" / "checkpoint-3" / "masks.json").unlink()
    unmasked = trainer(tmp_path / "unmasked", tiny.bert(), **settings)
    attach_trainer(unmasked, SITES, MaskSpec(seed=3))
    with pytest.raises(InputError, match=r"no masks\.json"):
        unmasked.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))


def tiny_bert():
    """As its configuration says, so that ``from_pretrained`` builds the same."""
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
            num_labels=tiny.CLASSES,
        )
    )
    return tiny.randomise(model)


@pytest.mark.parametrize("place", ["checkpoint", "save_model", "save_pretrained"])
def test_the_masks_travel_with_what_is_saved(tmp_path, place):
    one = trainer(tmp_path, tiny_bert(), save_strategy="epoch", num_train_epochs=1)
    network = attach_trainer(one, "mlp", MaskSpec(keep=0.3, seed=9))
    one.model.save_pretrained(tmp_path / "untrained")
    assert not (tmp_path / "untrained" / "masks.json").exists()
    one.train()
    folder = {"checkpoint": tmp_path / "checkpoint-1"}.get(place, tmp_path / "saved")
    if place == "save_model":
        one.save_model(str(folder))
    elif place == "save_pretrained":
        one.model.save_pretrained(folder)
    loaded = transformers.BertForSequenceClassification.from_pretrained(folder)
    again = load_masks(loaded, folder)
    assert again.spec == network.spec and again.fingerprint() == network.fingerprint()
    inputs, ids = tiny.texts(4), [5, 2**50, 0, 7]
    for side in ("exposed", "hidden"):
        with torch.no_grad():
            with getattr(network, side)(ids):
                expected = network.model.eval()(**inputs).logits
            with getattr(again, side)(ids):
                torch.testing.assert_close(loaded.eval()(**inputs).logits, expected)
    assert network.digest() == again.digest()

    description = json.loads((folder / "masks.json").read_text())
    description["spec"]["seed"] = 8
    (folder / "masks.json").write_text(json.dumps(description))
    fresh = transformers.BertForSequenceClassification.from_pretrained(folder)
    with pytest.raises(InputError, match="fingerprint"):
        load_masks(fresh, folder)


def test_masks_that_are_not_there_or_do_not_fit_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"masks\.json"):
        load_masks(tiny.mlp(), tmp_path)
    network = turnover.attach(tiny.mlp(), "mlp")
    network.model.eval()(tiny.features(2))
    with network.mean():
        network.model(tiny.features(2))
    save_masks(network, tmp_path)
    with pytest.raises(InputError, match="unknown site"):
        load_masks(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        save_masks(network, tmp_path / "nowhere")


def test_a_plain_module_saved_by_the_trainer_has_its_masks_beside_it(tmp_path):
    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(50, 8)
            self.body = tiny.mlp(features=8)

        def forward(self, input_ids, labels=None):
            logits = self.body(self.embedding(input_ids).mean(1))
            loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
            return {"loss": loss, "logits": logits}

    one = trainer(tmp_path, Classifier(), save_strategy="epoch", num_train_epochs=1)
    network = attach_trainer(one, "mlp")
    one.train()
    again = load_masks(Classifier(), tmp_path / "checkpoint-1")
    assert again.fingerprint() == network.fingerprint()
