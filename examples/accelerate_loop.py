"""Find the reviews behind a wrong prediction, in an Accelerate loop: three marked lines for turn-over."""

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModel, AutoTokenizer

import turnover  # turn-over
from turnover.data.demo import model_folder, write_sentences

torch.manual_seed(0)
folder, tokenizer = Path(tempfile.mkdtemp()), AutoTokenizer.from_pretrained(model_folder())
data = load_dataset("csv", data_files=str(write_sentences(folder)[0]), split="train[:300]")
labels = torch.tensor(data.class_encode_column("label")["label"])
words = tokenizer(data["text"][:], padding=True, return_tensors="pt")
encoder = AutoModel.from_pretrained(model_folder()).requires_grad_(False)
states = encoder(**words).last_hidden_state
features = torch.nn.functional.normalize((states * words["attention_mask"][..., None]).sum(1))
layers = torch.nn.Linear(384, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 2, bias=False)
model, accelerator = torch.nn.Sequential(*layers), Accelerator(gradient_accumulation_steps=2)
net = turnover.attach(model, "mlp")  # turn-over
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = DataLoader(TensorDataset(features[:250], labels[:250], torch.arange(250)), 16, True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for _ in range(20):
    for inputs, targets, rows in loader:
        with accelerator.accumulate(model), net.exposed(rows):  # turn-over
            accelerator.backward(torch.nn.functional.cross_entropy(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
wrong = 250 + int((model.eval()(features[250:]).argmax(1) != labels[250:]).nonzero()[0])
result = turnover.Influence(net).estimate([(features[[wrong]], labels[[wrong]])], range(250), top=3)
print("Wrong:", data[wrong]["text"], "\nThe most helpful training sentences, and the most harmful:")
for row, score, q in zip(result.train_ids[0], result.scores[0], result.q[0], strict=True):
    print(f"{score:+.2f} nats, q = {q:.3f}: {data[int(row)]['text']}")
