"""captum: TracInCP over three checkpoints."""

import torch
from captum.influence import TracInCP
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.effort.data import digits

train, test = digits()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
for epoch in range(30):
    for x, y in DataLoader(train, batch_size=50, shuffle=True):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if epoch % 10 == 9:
        torch.save(model.state_dict(), f"epoch{epoch}.pt")
model.eval()


def load(model: nn.Module, path: str) -> float:
    model.load_state_dict(torch.load(path))
    return 0.05


tracin = TracInCP(
    model,
    train,
    ["epoch9.pt", "epoch19.pt", "epoch29.pt"],
    load,
    loss_fn=nn.CrossEntropyLoss(reduction="sum"),
    batch_size=250,
    sample_wise_grads_per_batch=True,
)
scores = tracin.influence(test.tensors).detach().numpy()
suspicion = tracin.self_influence().detach().numpy()
