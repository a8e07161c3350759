"""Find the training rows behind a wrong digit, on one or several nodes: three marked lines for turn-over."""

import os

import torch
from sklearn.datasets import load_digits
from torch.distributed import destroy_process_group, get_world_size, init_process_group
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import turnover  # turn-over

alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
os.environ |= {} if "RANK" in os.environ else alone
init_process_group("gloo")
torch.manual_seed(0)
images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
images = images.float() / 16
layers = torch.nn.Linear(64, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 10, bias=False)
model = torch.nn.Sequential(*layers)
net = turnover.attach(model, "mlp")  # turn-over
ddp = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(ddp.parameters(), lr=3e-4, weight_decay=0.0)
data = TensorDataset(images[:1200], labels[:1200], torch.arange(1200))
sampler = DistributedSampler(data)
loader = DataLoader(data, 32 // get_world_size(), sampler=sampler)
for epoch in range(5):
    sampler.set_epoch(epoch)
    for inputs, targets, ids in loader:
        with net.exposed(ids):  # turn-over
            loss = torch.nn.functional.cross_entropy(ddp(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
if os.environ["RANK"] == "0":
    wrong = (model.eval()(images[1200:]).argmax(1) != labels[1200:]).nonzero()[:1, 0] + 1200
    found = turnover.Influence(net).estimate([(images[wrong], labels[wrong])], range(1200))
    order = found.scores[0].argsort()
    print(f"row {wrong[0]}: harmed most by rows {order[:5]}, helped most by rows {order[::-1][:5]}")
destroy_process_group()
