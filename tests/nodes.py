"""What a process runs under a trainer on several nodes, or alone: training that goes on from its checkpoints.

``nodes.py KIND FOLDER``; the process of rank 0 writes ``FOLDER/KIND``, each the ids of its rows.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import processes
import tiny
import turnover
from processes import BATCH, IDS, SITES, SPEC, X, Y

EPOCHS = 3
RATE = 0.05


def rank_and_world():
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def batches(epoch):
    """This process's part of global batches that are the same for any number of processes."""
    rank, world = rank_and_world()
    data = turnover.WithIds(TensorDataset(X, Y), IDS)
    sampler = DistributedSampler(data, num_replicas=world, rank=rank, seed=1)
    sampler.set_epoch(epoch)
    return DataLoader(data, BATCH // world, sampler=sampler)


def parameters(model):
    named = ((name.removeprefix("module."), p) for name, p in model.named_parameters())
    return {name: p.detach().clone() for name, p in named if p.requires_grad}


def pause(folder):
    """Wait in the middle of the training for as long as FOLDER/wait is there."""
    (folder / f"at-{rank_and_world()[0]}").write_text(str(os.getpid()))
    while (folder / "wait").exists():
        time.sleep(0.02)


def by_loop(folder):
    """A loop as a user writes it for torchrun, with a checkpoint after each epoch."""
    rank, world = rank_and_world()
    model = processes.build()
    network = turnover.attach(model, SITES, SPEC)
    begun = 0
    if done := sorted(folder.glob("epoch-*.safetensors")):
        model.load_state_dict(load_file(done[-1]))
        network.check(json.loads((folder / "masks.json").read_text()))
        begun = int(done[-1].stem.removeprefix("epoch-")) + 1
    wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=RATE)
    seen = []
    for epoch in range(begun, EPOCHS):
        for step, ((inputs, labels), ids) in enumerate(batches(epoch)):
            if (epoch, step) == (1, 2):
                pause(folder)
            with network.exposed(ids):
                loss = cross_entropy(wrapped(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += ids.tolist()
        if rank == 0:
            (folder / "masks.json").write_text(json.dumps(network.to_dict()))
            draft = folder / "draft"
            save_file(model.state_dict(), draft)
            draft.replace(folder / f"epoch-{epoch}.safetensors")
    return parameters(model), network, seen


def by_accelerate(folder):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = processes.build()
    network = turnover.attach(model, SITES, SPEC)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    data = turnover.WithIds(TensorDataset(X, Y), IDS)
    # Accelerate deals out batches, so each process gets whole ones.
    loader = DataLoader(data, BATCH // accelerator.num_processes)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    seen = []
    for _ in range(EPOCHS):
        for (inputs, labels), ids in loader:
            with network.exposed(ids):
                accelerator.backward(cross_entropy(prepared(inputs), labels))
            optimizer.step()
            optimizer.zero_grad()
            seen += ids.tolist()
    return parameters(accelerator.unwrap_model(prepared)), network, seen


def by_lightning(folder):
    import lightning

    from turnover.integrations.lightning import TurnoverCallback

    seen = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            model = processes.build()
            self.encoder, self.head = model.encoder, model.head

        def training_step(self, batch, _):
            return cross_entropy(self.head(self.encoder(batch[0])), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=RATE)

    class Seen(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            seen.extend(batch[1].tolist())

    world = rank_and_world()[1]
    several = {"strategy": "ddp", "num_nodes": world} if world > 1 else {}
    # Each epoch would be dealt out anew; ours is in order.
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS,
        barebones=True,
        use_distributed_sampler=False,
        callbacks=[Seen(), callback := TurnoverCallback(SITES, SPEC)],
        **several,
    )
    module = Module()
    trainer.fit(module, batches(0))
    return parameters(module), callback.network, seen


def by_trainer(folder):
    """Hugging Face's, cut off after its first epoch and gone on with from what it has saved."""
    import datasets
    import transformers

    from test_trainer import deterministic
    from turnover.integrations.trainer import attach_trainer

    world = rank_and_world()[1]
    columns = {name: value.tolist() for name, value in tiny.texts(BATCH).items()}
    columns |= {"label": tiny.labels(BATCH).tolist(), "id": [7 * row for row in range(BATCH)]}
    data = datasets.Dataset.from_dict(columns)
    seen = []

    def begun(epochs):
        arguments = transformers.TrainingArguments(
            str(folder / "trainer"),
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH // 2 // world,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to="none",
            save_strategy="epoch",
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
        )
        torch.manual_seed(0)
        trainer = transformers.Trainer(deterministic(tiny.bert()), arguments, train_dataset=data)
        network = attach_trainer(trainer, ["lora", "head"], SPEC)
        inner = trainer.compute_loss

        def watched(model, inputs, *args, **settings):
            seen.extend(inputs["ids"].tolist())
            return inner(model, inputs, *args, **settings)

        trainer.compute_loss = watched
        return trainer, network

    begun(1)[0].train()
    trainer, network = begun(EPOCHS)
    trainer.train(resume_from_checkpoint=True)
    return parameters(trainer.model), network, seen


def main(kind, folder):
    torch.set_num_threads(1)
    rank, world = rank_and_world()
    if world > 1 and kind == "loop":
        dist.init_process_group("gloo")
    weights, network, seen = globals()[f"by_{kind}"](folder)
    (folder / f"ids-{rank}.json").write_text(json.dumps(seen))
    if rank == 0:
        save_file(weights, folder / f"{kind}.safetensors")
        (folder / f"{kind}.json").write_text(json.dumps(network.to_dict()))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
