"""Find the reviews behind a wrong prediction, with Hugging Face's Trainer: three marked lines."""

import tempfile
from pathlib import Path

from datasets import load_dataset
from torch import nn
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments, set_seed

import turnover.integrations.trainer  # turn-over
from turnover.data.demo import model_folder, write_sentences


class Reviewer(nn.ModuleDict):
    def forward(self, input_ids, attention_mask, labels=None):
        words = self["encoder"](input_ids, attention_mask).last_hidden_state
        logits = self["head"](nn.functional.normalize((words * attention_mask[..., None]).sum(1)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


set_seed(0)
folder, tokenizer = Path(tempfile.mkdtemp()), AutoTokenizer.from_pretrained(model_folder())
data = load_dataset("csv", data_files=str(write_sentences(folder)[0]), split="train[:300]")
data = data.remove_columns("id").map(tokenizer, input_columns="text").class_encode_column("label")
train, test = data.train_test_split(50, shuffle=False).values()
encoder = AutoModel.from_pretrained(model_folder()).requires_grad_(False)
head = nn.Sequential(nn.Linear(384, 4096), nn.GELU(), nn.Linear(4096, 2, bias=False))
model = Reviewer({"encoder": encoder, "head": head})
args = TrainingArguments(folder, learning_rate=1e-3, use_cpu=True, max_grad_norm=0)  # turn-over
trainer = Trainer(model, args, train_dataset=train, processing_class=tokenizer)
net = turnover.integrations.trainer.attach_trainer(trainer, "head.1")  # turn-over
trainer.train()
logits, labels, _ = trainer.predict(test)
wrong = test.select((logits.argmax(1) != labels).nonzero()[0][:1])
result = turnover.Influence(net).estimate(trainer.get_test_dataloader(wrong), range(250), top=3)
print("Wrong:", *wrong["text"], "\nThe most helpful training sentences, and the most harmful:")
for row, score, q in zip(result.train_ids[0], result.scores[0], result.q[0], strict=True):
    print(f"{score:+.2f} nats, q = {q:.3f}: {train[int(row)]['text']}")
