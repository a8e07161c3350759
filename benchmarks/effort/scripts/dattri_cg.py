"""dattri: influence functions by conjugate gradients."""

import torch
from dattri.algorithm.influence_function import IFAttributorCG
from dattri.task import AttributionTask
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
model.eval()


def cost(
    parameters: dict[str, torch.Tensor], batch: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    outputs = torch.func.functional_call(model, parameters, (batch[0],))
    return nn.functional.cross_entropy(outputs, batch[1])


task = AttributionTask(loss_func=cost, model=model, checkpoints=model.state_dict())
attributor = IFAttributorCG(task, max_iter=20, regularization=3e-2)
whole = DataLoader(train, batch_size=len(train))
attributor.cache(whole)
scores = attributor.attribute(whole, DataLoader(test, batch_size=25)).detach().numpy().T
every = attributor.attribute(whole, DataLoader(train, batch_size=25))
suspicion = every.detach().diagonal().numpy()
