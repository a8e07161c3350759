"""Find the training rows behind a wrong digit, in plain PyTorch: three marked lines for turn-over."""

import torch
from sklearn.datasets import load_digits

import turnover  # turn-over

torch.manual_seed(0)
images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
images = images.float() / 16
train_images, train_labels = images[:1200], labels[:1200]
model = torch.nn.Sequential(
    torch.nn.Linear(64, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 10, bias=False)
)
net = turnover.attach(model, "mlp")  # turn-over
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
for _ in range(10):
    for rows in torch.randperm(1200).split(32):
        with net.exposed(rows):  # turn-over
            logits = model(train_images[rows])
        loss = torch.nn.functional.cross_entropy(logits, train_labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

model.eval()
wrong = (model(images[1200:]).argmax(dim=1) != labels[1200:]).nonzero().flatten() + 1200
influence, ids = turnover.Influence(net), torch.arange(1200)
order = influence.estimate([(images[wrong[:1]], labels[wrong[:1]])], ids).scores[0].argsort()
print(f"row {wrong[0]}: harmed most by rows {order[:5]}, helped most by rows {order[::-1][:5]}")
memorized = influence.self_influence([(train_images, train_labels, ids)]).z.argsort()[::-1]
print("doubtful labels: rows", memorized[:5])
