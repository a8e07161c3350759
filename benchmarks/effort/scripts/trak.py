"""traker: TRAK with one network."""

import torch
from torch import nn
from torch.utils.data import DataLoader
from trak import TRAKer
from trak.projectors import BasicProjector, ProjectionType

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

parameters = sum(parameter.numel() for parameter in model.parameters())
projector = BasicProjector(
    parameters, 100, seed=0, proj_type=ProjectionType.normal, device="cpu", block_size=50
)
traker = TRAKer(
    model,
    "image_classification",
    train_set_size=len(train),
    save_dir="trak",
    device="cpu",
    projector=projector,
    proj_dim=100,
    use_half_precision=False,
)
traker.load_checkpoint(model.state_dict(), model_id=0)
for batch in DataLoader(train, batch_size=100):
    traker.featurize(batch, num_samples=len(batch[0]))
traker.finalize_features()
found = []
for name, rows in (("test", test), ("train", train)):
    traker.start_scoring_checkpoint(name, model.state_dict(), model_id=0, num_targets=len(rows))
    for batch in DataLoader(rows, batch_size=100):
        traker.score(batch, num_samples=len(batch[0]))
    found.append(traker.finalize_scores(name))
scores = found[0].T
suspicion = found[1].diagonal()
