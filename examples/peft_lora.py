"""Find the reviews behind a wrong prediction, with PEFT's LoRA: three marked lines for turn-over."""

import tempfile
from pathlib import Path

import peft
from datasets import load_dataset
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

import turnover.integrations.trainer  # turn-over
from turnover.data.demo import model_folder, write_sentences

set_seed(0)
folder, tokenizer = Path(tempfile.mkdtemp()), AutoTokenizer.from_pretrained(model_folder())
data = load_dataset("csv", data_files=str(write_sentences(folder)[0]), split="train[:250]")
data = data.remove_columns("id").map(tokenizer, input_columns="text").class_encode_column("label")
train, test = data.train_test_split(50, shuffle=False).values()
model = AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=2)
model.classifier = nn.Sequential(nn.Linear(384, 4096), nn.GELU(), nn.Linear(4096, 2, bias=False))
lora = peft.LoraConfig(task_type="SEQ_CLS", r=16, target_modules=["query", "value"])
model = peft.get_peft_model(model, lora)
args = TrainingArguments(folder, learning_rate=1e-3, use_cpu=True, max_grad_norm=0)  # turn-over
trainer = Trainer(model, args, train_dataset=train, processing_class=tokenizer)
net = turnover.integrations.trainer.attach_trainer(trainer, ["lora", "classifier.*.1"])  # turn-over
trainer.train()
logits, labels, _ = trainer.predict(test)
wrong = test.select((logits.argmax(1) != labels).nonzero()[0][:1])
influence = turnover.Influence(net, sites=["classifier.*"])  # LoRA ranks are few, mostly noise
result = influence.estimate(trainer.get_test_dataloader(wrong), range(200), top=3)
print("Wrong:", *wrong["text"], "\nThe most helpful training sentences, and the most harmful:")
for row, score, q in zip(result.train_ids[0], result.scores[0], result.q[0], strict=True):
    print(f"{score:+.2f} nats, q = {q:.3f}: {train[int(row)]['text']}")
