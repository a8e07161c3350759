"""Find the training rows behind a wrong digit, with Lightning: three marked lines for turn-over."""

import lightning
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Subset, TensorDataset

import turnover.integrations.lightning  # turn-over


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        layers = torch.nn.Linear(64, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 10, bias=False)
        self.layers = torch.nn.Sequential(*layers)

    def forward(self, images):
        return self.layers(images)

    def training_step(self, batch):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-4, weight_decay=0.0)


lightning.seed_everything(0)
images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
data = TensorDataset(images.float() / 16, labels)
loader = DataLoader(turnover.WithIds(Subset(data, range(1200))), 32, shuffle=True)  # turn-over
module, callbacks = Digits(), [turnover.integrations.lightning.TurnoverCallback("mlp")]  # turn-over
lightning.Trainer(max_epochs=10, callbacks=callbacks, barebones=True).fit(module, loader)

wrong = (module.eval()(data[1200:][0]).argmax(1) != labels[1200:]).nonzero().flatten() + 1200
influence, ids = turnover.Influence(callbacks[0].network), range(1200)
order = influence.estimate([data[wrong[:1]]], ids).scores[0].argsort()
print(f"row {wrong[0]}: harmed most by rows {order[:5]}, helped most by rows {order[::-1][:5]}")
print("doubtful:", influence.self_influence([(*data[:1200], ids)]).z.argsort()[::-1][:5])
