"""kronfluence: EK-FAC."""

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import ScoreArguments
from kronfluence.task import Task
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


class Classification(Task):
    def compute_train_loss(
        self,
        batch: list[torch.Tensor],
        model: nn.Module,
        sample: bool = False,
    ) -> torch.Tensor:
        x, y = batch
        outputs = model(x)
        if sample:
            y = outputs.detach().softmax(dim=1).multinomial(1).flatten()
        return nn.functional.cross_entropy(outputs, y, reduction="sum")

    def compute_measurement(self, batch: list[torch.Tensor], model: nn.Module) -> torch.Tensor:
        return self.compute_train_loss(batch, model)


task = Classification()
analyzer = Analyzer("digits", prepare_model(model, task), task, cpu=True, disable_tqdm=True)
analyzer.fit_all_factors("ekfac", train, per_device_batch_size=250)
arguments = ScoreArguments(damping_factor=None)
analyzer.compute_pairwise_scores(
    "pairs",
    "ekfac",
    test,
    train,
    per_device_query_batch_size=100,
    per_device_train_batch_size=250,
    score_args=arguments,
)
scores = analyzer.load_pairwise_scores("pairs")["all_modules"].numpy()
analyzer.compute_self_scores(
    "self", "ekfac", train, per_device_train_batch_size=250, score_args=arguments
)
suspicion = analyzer.load_self_scores("self")["all_modules"].numpy()
