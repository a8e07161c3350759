"""What a process runs under a trainer on several nodes, or alone: training that goes on from its checkpoints.

``nodes.py FOLDER KIND...``; the process of rank 0 writes ``FOLDER/KIND``, each what its rows ran under.
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
from torch.utils.data import DataLoader, DistributedSampler, Sampler, TensorDataset

import processes
import tiny
import turnover
from processes import BATCH, IDS, SITES, SPEC, X, Y

EPOCHS = 3
RATE = 0.05
# One fewer than two processes share evenly: the sampler gives one row to both.
DATA = turnover.WithIds(TensorDataset(X[:-1], Y[:-1]), IDS[:-1])


def rank_and_world():
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Seen:
    """Ids, losses and the head's units of the batches that a process trains on."""

    def __init__(self, model):
        self._units, _ = processes.watch(model)
        self._taken = []

    def take(self, ids, loss):
        """After the batch has run."""
        self._taken.append((ids, loss.detach().reshape(1), self._units[-1].to(torch.uint8)))

    def save(self, file):
        names = ("ids", "losses", "units")
        save_file(
            {n: torch.cat(v) for n, v in zip(names, zip(*self._taken, strict=True), strict=True)},
            file,
        )


class Both(Sampler):
    """The rows of two processes, for one: as each of its batches is one of each of theirs."""

    def __init__(self):
        self._parts = [DistributedSampler(DATA, 2, rank, seed=1) for rank in range(2)]

    def __len__(self):
        return sum(map(len, self._parts))

    def __iter__(self):
        return (row for pair in zip(*self._parts, strict=True) for row in pair)

    def set_epoch(self, epoch):
        for part in self._parts:
            part.set_epoch(epoch)


def batches():
    """This process's part of global batches that are the same for one process and for two."""
    rank, world = rank_and_world()
    sampler = Both() if world == 1 else DistributedSampler(DATA, world, rank, seed=1)
    return DataLoader(DATA, BATCH // world, sampler=sampler)


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
    seen, loader = Seen(model), batches()
    for epoch in range(begun, EPOCHS):
        loader.sampler.set_epoch(epoch)
        for step, ((inputs, labels), ids) in enumerate(loader):
            if (epoch, step) == (1, 2):
                pause(folder)
            with network.exposed(ids):
                loss = cross_entropy(wrapped(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.take(ids, loss)
        if rank == 0:
            (folder / "masks.json").write_text(json.dumps(network.to_dict()))
            draft = folder / "draft"
            save_file(model.state_dict(), draft)
            draft.replace(folder / f"epoch-{epoch}.safetensors")
    return parameters(model), network, seen


def by_accelerate(folder):
    """Cut off after its first epoch, and gone on with by another model."""
    from accelerate import Accelerator

    accelerator = Accelerator()

    def begun():
        model = processes.build()
        network = turnover.attach(model, SITES, SPEC)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        data = turnover.WithIds(TensorDataset(X, Y), IDS)
        # Accelerate deals out batches, so each process gets whole ones.
        loader = DataLoader(data, BATCH // accelerator.num_processes)
        return network, Seen(model), *accelerator.prepare(model, optimizer, loader)

    def train(epochs, network, seen, prepared, optimizer, loader):
        for _ in range(epochs):
            for (inputs, labels), ids in loader:
                with network.exposed(ids):
                    loss = cross_entropy(prepared(inputs), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                seen.take(ids, loss)

    train(1, *begun())
    accelerator.save_state(folder / "state")
    accelerator.wait_for_everyone()
    # What is prepared next is what the state is loaded into.
    accelerator.free_memory()
    network, seen, prepared, *others = begun()
    accelerator.load_state(folder / "state")
    train(EPOCHS - 1, network, seen, prepared, *others)
    return parameters(accelerator.unwrap_model(prepared)), network, seen


def by_lightning(folder):
    """Cut off after its first epoch, and gone on with by another module."""
    import lightning

    from turnover.integrations.lightning import TurnoverCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            model = processes.build()
            self.encoder, self.head = model.encoder, model.head
            self.seen = Seen(self)

        def training_step(self, batch, _):
            return cross_entropy(self.head(self.encoder(batch[0])), batch[1])

        def on_train_batch_end(self, outputs, batch, _):
            self.seen.take(batch.ids, outputs["loss"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=RATE)

    def fitted(epochs, checkpoint=None):
        world = rank_and_world()[1]
        several = {"strategy": "ddp", "num_nodes": world} if world > 1 else {}
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=epochs,
            default_root_dir=folder,
            use_distributed_sampler=False,
            callbacks=(callback := TurnoverCallback(SITES, SPEC)),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **several,
        )
        module = Module()
        trainer.fit(module, batches(), ckpt_path=checkpoint, weights_only=True)
        return trainer, module, callback.network

    fitted(1)[0].save_checkpoint(folder / "one.ckpt")
    _, module, network = fitted(EPOCHS, folder / "one.ckpt")
    return parameters(module), network, module.seen


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
        inner, seen = trainer.compute_loss, Seen(trainer.model)

        def watched(model, inputs, *args, **settings):
            ids = inputs["ids"]
            loss = inner(model, inputs, *args, **settings)
            seen.take(ids, loss)
            return loss

        trainer.compute_loss = watched
        return trainer, network, seen

    begun(1)[0].train()
    trainer, network, seen = begun(EPOCHS)
    trainer.train(resume_from_checkpoint=True)
    return parameters(trainer.model), network, seen


def main(folder, kind):
    rank, world = rank_and_world()
    if world > 1 and kind == "loop":
        dist.init_process_group("gloo")
    weights, network, seen = globals()[f"by_{kind}"](folder)
    seen.save(folder / f"{kind}-{rank}.safetensors")
    if rank == 0:
        save_file(weights, folder / f"{kind}.safetensors")
        (folder / f"{kind}.json").write_text(json.dumps(network.to_dict()))
        (folder / f"{kind}.digest").write_text(network.digest())
    if dist.is_initialized():
        # Who leaves before the others have come so far may break their connections.
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in sys.argv[2:]:
        main(Path(sys.argv[1]), kind)
