"""cleanlab: label quality from the predictions of five folds; it scores no pairs."""

import torch
from cleanlab.rank import get_label_quality_scores
from sklearn.model_selection import KFold
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from benchmarks.effort.data import digits

train, test = digits()
torch.manual_seed(0)


def fit(train: Dataset) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for epoch in range(30):
        for x, y in DataLoader(train, batch_size=50, shuffle=True):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    return model


model = fit(train)
x, y = train.tensors
probabilities = torch.empty(len(train), 10)
for rows, held in KFold(5, shuffle=True, random_state=0).split(x):
    probabilities[held] = fit(Subset(train, rows))(x[held]).softmax(dim=1).detach()
suspicion = 1 - get_label_quality_scores(y.numpy(), probabilities.numpy())
