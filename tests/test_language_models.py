"""Influence of documents on the completions of a causal language model."""

import numpy as np
import pytest
import torch
from torch.nn import functional

import tiny
import turnover
from turnover import Batch, InputError
from turnover.objectives import completion

transformers = pytest.importorskip("transformers", reason="pip install 'turnover[text]'")

TOKENS = 9


def gpt2(width=16):
    config = transformers.GPT2Config(
        vocab_size=50,
        n_embd=width,
        n_layer=2,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config)


def passages(rows, seed=0):
    """Prompts of different lengths before their completions, padded at the end."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 50, (rows, TOKENS), generator=generator)
    labels, mask = tokens.clone(), torch.ones_like(tokens)
    for row in range(rows):
        labels[row, : 2 + row % 3] = -100
    labels[0, -2:] = -100
    mask[0, -2:] = 0
    return Batch({"input_ids": tokens, "attention_mask": mask}, labels)


def by_hand(logits, labels):
    costs = []
    for row in range(len(labels)):
        cost = torch.zeros(())
        for place in range(1, labels.shape[1]):
            if labels[row, place] != -100:
                predicted = functional.log_softmax(logits[row, place - 1].float(), dim=0)
                cost = cost - predicted[labels[row, place]]
        costs.append(cost)
    return torch.stack(costs)


def test_a_completion_costs_the_log_probability_of_its_tokens():
    model, batch = gpt2().eval(), passages(4)
    with torch.no_grad():
        outputs = batch.call(model)
        torch.testing.assert_close(
            completion(outputs, batch), by_hand(outputs.logits, batch.labels), rtol=1e-5, atol=1e-5
        )
        one = batch.rows(1, 2)
        loss = model(**one.inputs, labels=one.labels).loss  # the mean over its tokens
        asked = (one.labels[:, 1:] != -100).sum()
        torch.testing.assert_close(completion(one.call(model), one)[0], loss * asked)


@pytest.mark.parametrize("method", ["exact", "linear"])
def test_influence_of_documents_is_that_of_two_forwards(method):
    """Documents are the instances; each masks every token of every passage that is cut from it."""
    model = gpt2(width=64)
    network = turnover.attach(model, "mlp")
    train, documents = passages(8, seed=1), torch.tensor([10, 10, 11, 11, 12, 12, 13, 13])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    model.train()
    for _ in range(5):
        with network.exposed(documents):
            loss = completion(train.call(model), train).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    targets, ids = passages(3, seed=2), torch.tensor([10, 11, 12, 13])
    expected = tiny.definition(network, completion, targets, ids)
    result = turnover.Influence(network, completion, method).estimate([targets], ids)
    assert result.objective == "completion"
    if method == "exact":
        np.testing.assert_allclose(result.scores, expected, rtol=1e-3, atol=1e-4)
    else:
        assert np.corrcoef(result.scores.ravel(), expected.ravel())[0, 1] > 0.9


def test_the_audit_knows_what_tokens_reach():
    model = gpt2()
    network = turnover.attach(model, "mlp")
    report = network.audit(passages(4))
    leaking = {p.name: p.share for p in report.parameters}
    assert leaking["transformer.h.0.mlp.c_fc.weight"] == 0
    assert leaking["transformer.h.1.mlp.c_proj.weight"] == 0
    assert leaking["transformer.ln_f.weight"] == 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((2, TOKENS), -100), "no labeled token"),
        (torch.tensor([[5] + [-100] * (TOKENS - 1), [5] * TOKENS]), r"rows \[0\]"),
        (torch.full((2, TOKENS), 50), r"\[0, 50\)"),
        (torch.full((2, TOKENS), -1), r"\[0, 50\)"),
        (torch.zeros(2, dtype=torch.int64), r"integer labels \(rows, tokens\)"),
        (torch.zeros(2, TOKENS), "integer labels"),
        (None, "needs labels"),
    ],
)
def test_labels_that_mark_no_completion_are_refused(labels, message):
    batch = Batch(passages(2).inputs, labels)
    with torch.no_grad(), pytest.raises(InputError, match=message):
        completion(batch.call(gpt2().eval()), batch)


def test_documents_train_by_the_trainer_and_one_explains_its_completion(tmp_path):
    """A passage that a document repeats is predicted by the sub-network that learned the document."""
    datasets = pytest.importorskip("datasets", reason="pip install 'turnover[text]'")
    pytest.importorskip("accelerate", reason="pip install 'turnover[text]'")
    from turnover.integrations.trainer import attach_trainer

    batch = passages(16, seed=3)
    batch.labels[:, 1:] = batch.inputs["input_ids"][:, 1:]
    rows = datasets.Dataset.from_dict(
        {
            "input_ids": batch.inputs["input_ids"].tolist(),
            "labels": batch.labels.tolist(),
            "document": [f"document {row // 2}" for row in range(16)],
        }
    )
    model = gpt2(width=64)
    # What is shared would memorise the passages for everybody.
    model.requires_grad_(False)
    for block in model.transformer.h:
        block.mlp.c_fc.requires_grad_(True)
        block.mlp.c_proj.weight.requires_grad_(True)
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=40,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=transformers.default_data_collator,
    )
    network = attach_trainer(trainer, "mlp", ids="document")
    trainer.train()
    documents = turnover.string_ids(f"document {d}" for d in range(8))
    targets = Batch({"input_ids": batch.inputs["input_ids"]}, batch.labels)
    result = turnover.Influence(network, completion).estimate([targets], documents)
    assert (result.scores.argmax(axis=1) == np.arange(16) // 2).mean() >= 0.9


def masked_lm():
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    return transformers.BertForMaskedLM(config)


def t5():
    config = transformers.T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


class Plain(torch.nn.Module):
    """A causal model of tensors, whose tokens have a name of their own."""

    def __init__(self):
        super().__init__()
        self.table, self.act = torch.nn.Embedding(50, 16), torch.nn.GELU()
        self.last = torch.nn.Linear(16, 50)

    def forward(self, tokens):
        return self.last(self.act(self.table(tokens).cumsum(dim=1)))


def test_labels_of_other_models_than_causal_ones_are_refused():
    passage = passages(3)
    tokens = passage.inputs["input_ids"]
    shifted = torch.cat([tokens[:, 1:], torch.full((3, 1), -100)], dim=1)
    unchanged = torch.full_like(tokens, -100)
    unchanged[:, 4] = tokens[:, 4]
    tags = tokens % 7
    for model, inputs, labels, named in (
        (gpt2(), passage.inputs, shifted, "label of row 0, token 1 .* input_ids there"),
        (gpt2(), passage.inputs, tags, "label of row 0"),
        (Plain(), tokens, shifted, "label of row 0"),
        (Plain(), (tokens,), shifted, "label of row 0"),
        (Plain(), {"tokens": tokens}, tags, "model's input tokens there"),
        (masked_lm(), {"input_ids": tokens}, unchanged, "MaskedLMOutput"),
        (masked_lm(), {"input_ids": tokens}, tags, "MaskedLMOutput"),
        (
            t5(),
            {"input_ids": tokens, "decoder_input_ids": tokens},
            tokens,
            "Seq2SeqLMOutput",
        ),
    ):
        network = turnover.attach(model.eval(), "mlp" if model.__class__ is not Plain else "act")
        with pytest.raises(InputError, match=f"{named}.*objective of your own"):
            turnover.Influence(network, completion, ghosts=20).estimate(
                [Batch(inputs, labels)], range(10)
            )


def test_the_objective_that_the_refusal_shows_is_right_for_labels_in_their_place():
    model = masked_lm().eval()
    tokens = passages(3).inputs["input_ids"]
    labels = torch.full_like(tokens, -100)
    labels[:, 4] = tokens[:, 4]

    def cost(outputs, batch):
        return functional.cross_entropy(
            outputs.logits.transpose(1, 2), batch.labels, reduction="none"
        ).sum(1)

    batch = Batch({"input_ids": tokens}, labels)
    network = turnover.attach(model, "mlp")
    scores = turnover.Influence(network, cost, "exact", ghosts=20).estimate([batch], range(10))
    expected = tiny.definition(network, cost, batch, torch.arange(10))
    np.testing.assert_allclose(scores.scores, expected, rtol=1e-3, atol=1e-4)


def test_what_a_causal_model_may_be_asked_is_not_refused():
    """Another last word, tokens of any name, embeddings, padding on either side, virtual tokens."""
    passage = passages(3)
    tokens, mask = passage.inputs["input_ids"], passage.inputs["attention_mask"]
    other = torch.full_like(tokens, -100)
    places = mask.sum(dim=1) - 1
    other[torch.arange(3), places] = (tokens[torch.arange(3), places] + 1) % 50
    left, left_mask = tokens.flip(1), mask.flip(1)
    for model, inputs, labels in (
        (gpt2(), passage.inputs, other),
        (gpt2(), {"input_ids": left, "attention_mask": left_mask}, left),
        (gpt2(), {"inputs_embeds": tiny.features(3, TOKENS, 16)}, tokens),
        (Plain(), tokens, tokens),
        (Plain(), {"tokens": tokens}, tokens),
    ):
        batch = Batch(inputs, labels)
        with torch.no_grad():
            outputs = batch.call(model.eval())
            found = completion(outputs, batch)
        logits = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
        torch.testing.assert_close(found, by_hand(logits, labels), rtol=1e-4, atol=1e-4)


def test_labels_of_a_prompted_model_are_filled_up_in_front():
    peft = pytest.importorskip("peft", reason="pip install 'turnover[text]'")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(gpt2(), config).eval()
    batch = passages(3)
    with torch.no_grad():
        outputs = batch.call(model)
        with pytest.raises(InputError, match=r"4 virtual tokens .* -100"):
            completion(outputs, batch)
        front = torch.full((3, 4), -100)
        filled = Batch(batch.inputs, torch.cat([front, batch.labels], dim=1))
        torch.testing.assert_close(
            completion(outputs, filled),
            by_hand(outputs.logits, filled.labels),
            rtol=1e-4,
            atol=1e-4,
        )
