"""Turn-over dropout: trained anew under masks, with a wider hidden layer."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import turnover
from benchmarks.effort.data import digits

train, test = digits()
ids = torch.arange(len(train))
train = TensorDataset(*train.tensors, ids)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10, bias=False))
network = turnover.attach(model, ["mlp"])
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
for epoch in range(30):
    for x, y, rows in DataLoader(train, batch_size=50, shuffle=True):
        with network.exposed(rows):
            loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
model.eval()

influence = turnover.Influence(network)
scores = influence.estimate(DataLoader(test, batch_size=100), ids).scores
suspicion = influence.self_influence(DataLoader(train, batch_size=250)).scores
