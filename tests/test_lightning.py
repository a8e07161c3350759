"""Lightning's own trainer, with the callback."""

import copy
import importlib
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import tiny
import turnover
from turnover import InputError, MaskSpec, WithIds

lightning = pytest.importorskip("lightning", reason="needs: pip install 'turnover[lightning]'")
from turnover.integrations.lightning import TurnoverCallback  # noqa: E402

KEY = "TurnoverCallback"
pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):
    """Knows nothing of turn-over: batches are (inputs, labels)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = tiny.randomise(tiny.mlp(width))
        self.validation: list[float] = []
        self.seen: list[torch.Tensor] = []
        self.layers[2].register_forward_pre_hook(self._see)

    def forward(self, inputs):
        return self.layers(inputs)

    def _see(self, _, inputs):
        if self.training:
            self.seen.append(inputs[0].detach())

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return nn.functional.cross_entropy(self(inputs), labels)

    def validation_step(self, batch, batch_idx):
        inputs, labels = batch
        self.validation.append(nn.functional.cross_entropy(self(inputs), labels).item())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.0)


X, Y, IDS = tiny.features(24), tiny.labels(24), torch.arange(24) * 5 + 3


def loader(ids=IDS, **options):
    data = TensorDataset(X, Y)
    return DataLoader(data if ids is None else WithIds(data, ids), batch_size=8, **options)


def trainer(callback, folder, **options):
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 3,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
    }
    return lightning.Trainer(callbacks=[callback], **{**defaults, **options})


def plainly(module, epochs=3, accumulate=1):
    """The same training as a loop of one's own."""
    network = turnover.attach(module, "layers.1", MaskSpec(seed=4))
    optimizer = module.configure_optimizers()
    for start in [*range(0, 24, 8)] * epochs:
        rows = slice(start, start + 8)
        with network.exposed(IDS[rows]):
            loss = nn.functional.cross_entropy(module(X[rows]), Y[rows]) / accumulate
        loss.backward()
        if accumulate == 1 or start in (8, 16):
            optimizer.step()
            optimizer.zero_grad()
    return network


def assert_same_weights(one, other):
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


def callback(seed=4):
    return TurnoverCallback("layers.1", MaskSpec(seed=seed))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_trains_as_a_loop_of_ones_own_does_under_exposed(tmp_path, accumulate):
    module = Module()
    other = copy.deepcopy(module)
    trainer(callback(), tmp_path, accumulate_grad_batches=accumulate).fit(module, loader())
    plainly(other, accumulate=accumulate)
    assert_same_weights(module, other)


def test_the_other_lightning_package_trains_in_the_same_way(tmp_path, monkeypatch):
    pytorch_lightning = pytest.importorskip("pytorch_lightning")

    class Other(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = tiny.randomise(tiny.mlp())

        forward = Module.forward
        training_step = Module.training_step
        configure_optimizers = Module.configure_optimizers

    module, other = Other(), Module()
    monkeypatch.setattr(lightning, "Trainer", pytorch_lightning.Trainer)
    trainer(callback(), tmp_path).fit(module, loader())
    plainly(other)
    assert_same_weights(module, other)


def test_shuffled_rows_keep_their_masks(tmp_path):
    module = Module()
    one = callback()
    trainer(one, tmp_path, max_epochs=1).fit(module, loader(shuffle=True, num_workers=1))
    dropped = torch.cat(module.seen) == 0
    masks = one.network.spec.exposed(IDS, "layers.1", 16)
    assert sorted(map(tuple, dropped.tolist())) == sorted(map(tuple, (~masks).tolist()))


def test_hidden_networks_do_not_know_what_exposed_ones_learned(tmp_path):
    module = Module(width=512)
    one = TurnoverCallback(["layers.1", "layers.3"])
    trainer(one, tmp_path, max_epochs=40).fit(module, loader())
    module.eval()
    losses = []
    for context in (one.network.exposed(IDS), one.network.hidden(IDS)):
        with torch.no_grad(), context:
            losses.append(nn.functional.cross_entropy(module.layers(X), Y).item())
    assert losses[0] < 0.1
    assert losses[1] > 1


def test_validation_runs_the_whole_network_on_batches_without_ids(tmp_path):
    module = Module()
    trainer(callback(), tmp_path).fit(module, loader(), loader(ids=None))
    module.eval()
    expected = [nn.functional.cross_entropy(module(x), y).item() for x, y in loader(ids=None)]
    assert module.validation[-3:] == pytest.approx(expected, abs=1e-6)


def test_masks_are_the_same_under_bf16(tmp_path):
    module = Module()
    one = callback()
    trainer(one, tmp_path, max_epochs=1, precision="bf16-mixed").fit(module, loader())
    seen = torch.cat(module.seen)
    assert seen.dtype == torch.bfloat16
    assert torch.equal(seen != 0, one.network.spec.exposed(IDS, "layers.1", 16))


def test_what_clips_by_norm_is_refused_before_training(tmp_path):
    for options in ({}, {"gradient_clip_algorithm": "norm"}):
        module = Module()
        with pytest.raises(InputError, match='gradient_clip_algorithm="value"'):
            trainer(callback(), tmp_path, gradient_clip_val=1.0, **options).fit(module, loader())
        assert not module.seen
    by_value = {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}
    for options in (by_value, {"gradient_clip_val": float("inf")}):
        trainer(callback(), tmp_path, **options).fit(Module(), loader())


def test_missing_ids_and_unknown_sites_are_refused_before_training(tmp_path):
    module = Module()
    with pytest.raises(InputError, match="WithIds"):
        trainer(callback(), tmp_path).fit(module, loader(ids=None))
    with pytest.raises(InputError, match=r"unknown site 'layers\.9'"):
        trainer(TurnoverCallback("layers.9"), tmp_path).fit(module, loader())
    assert not module.seen


def test_the_module_gets_its_step_back_also_where_training_fails(tmp_path):
    module = Module()
    trainer(callback(), tmp_path).fit(module, loader())
    assert module.training_step.__func__ is Module.training_step
    failing = Module()
    with pytest.raises(InputError):
        trainer(callback(), tmp_path).fit(failing, loader(ids=None))
    assert failing.training_step.__func__ is Module.training_step


def test_a_module_that_reads_ids_itself_gets_the_batch_as_it_is(tmp_path):
    class Reading(Module):
        def training_step(self, batch, batch_idx):
            inputs, labels, ids = batch
            assert len(ids) == len(labels)
            return super().training_step((inputs, labels), batch_idx)

    module, other = Reading(), Module()
    data = DataLoader(TensorDataset(X, Y, IDS), batch_size=8)
    trainer(callback(), tmp_path).fit(module, data)
    plainly(other)
    assert_same_weights(module, other)


def test_a_resumed_training_ends_as_one_that_was_not_cut_off(tmp_path):
    whole, first, resumed = Module(), Module(), Module()
    trainer(callback(), tmp_path).fit(whole, loader())
    begun = trainer(callback(), tmp_path, max_epochs=1)
    begun.fit(first, loader())
    begun.save_checkpoint(tmp_path / "one.ckpt")
    trainer(callback(), tmp_path).fit(
        resumed, loader(), ckpt_path=tmp_path / "one.ckpt", weights_only=True
    )
    assert_same_weights(whole, resumed)


def test_a_checkpoint_tells_its_masks_to_whoever_loads_it(tmp_path):
    module, one = Module(), callback()
    run = trainer(one, tmp_path)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "run.ckpt")
    stored = torch.load(tmp_path / "run.ckpt", weights_only=True)
    loaded = Module.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    network = turnover.Network.from_dict(loaded, stored["callbacks"][KEY])
    assert network.digest() == one.network.digest()
    targets = [(X[:3], Y[:3])]

    def scores(network):
        return turnover.Influence(network).estimate(targets, IDS).scores

    np.testing.assert_array_equal(scores(network), scores(one.network))


def test_a_checkpoint_of_other_masks_is_not_resumed(tmp_path):
    run = trainer(callback(), tmp_path, max_epochs=1)
    run.fit(Module(), loader())
    run.save_checkpoint(tmp_path / "masked.ckpt")
    plain = trainer(lightning.Callback(), tmp_path, max_epochs=1)
    plain.fit(Module(), loader(ids=None))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    for one, file, message in (
        (callback(seed=5), "masked.ckpt", "other masks"),
        (TurnoverCallback("layers.3", MaskSpec(seed=4)), "masked.ckpt", "other masks"),
        (callback(), "plain.ckpt", "without turn-over dropout"),
    ):
        module = Module()
        with pytest.raises(InputError, match=message):
            trainer(one, tmp_path).fit(
                module, loader(), ckpt_path=tmp_path / file, weights_only=True
            )
        assert not module.seen


def test_a_missing_package_is_named(monkeypatch):
    for package in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "turnover.integrations.lightning")
    with pytest.raises(InputError, match=r"pip install 'turnover\[lightning\]'"):
        importlib.import_module("turnover.integrations.lightning")


def test_there_is_no_network_before_training():
    with pytest.raises(InputError, match=r"before trainer\.fit"):
        callback().network  # noqa: B018


def test_items_and_batches_carry_ids_beside_them():
    data = WithIds(TensorDataset(X, Y), IDS)
    (inputs, label), one = data[4]
    assert torch.equal(inputs, X[4]) and label == Y[4] and one == 23
    batch = turnover.batches.as_batch(next(iter(DataLoader(data, batch_size=5))))
    assert torch.equal(batch.inputs, X[:5]) and torch.equal(batch.labels, Y[:5])
    assert torch.equal(batch.ids, IDS[:5])
    assert WithIds(TensorDataset(X, Y)).ids.tolist() == list(range(24))


def test_a_collate_function_of_ones_own_sees_the_items_it_knows():
    rows = [{"tokens": [1] * length} for length in (2, 3, 1)]

    def pad(items):
        longest = max(len(item["tokens"]) for item in items)
        return {
            "tokens": torch.tensor(
                [i["tokens"] + [0] * (longest - len(i["tokens"])) for i in items]
            )
        }

    batch, ids = next(
        iter(DataLoader(WithIds(rows), batch_size=3, collate_fn=WithIds.collate(pad)))
    )
    assert batch["tokens"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert ids.tolist() == [0, 1, 2] and ids.dtype == torch.int64


def test_rows_are_fetched_at_once_where_the_data_set_can():
    asked = []

    class Rows(TensorDataset):
        def __getitems__(self, rows):
            asked.append(list(rows))
            return [self[row] for row in rows]

    loader = DataLoader(WithIds(Rows(X, Y), IDS), sampler=[3, 1, 2, 0], batch_size=3)
    batches = [turnover.batches.as_batch(batch) for batch in loader]
    assert asked == [[3, 1, 2], [0]]
    assert torch.equal(torch.cat([batch.ids for batch in batches]), IDS[[3, 1, 2, 0]])
    assert torch.equal(torch.cat([batch.inputs for batch in batches]), X[[3, 1, 2, 0]])


def test_ids_that_do_not_fit_the_rows_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield 1

    with pytest.raises(InputError, match="no rows to number"):
        WithIds(Stream())
    with pytest.raises(InputError, match="23 ids for 24 rows"):
        WithIds(TensorDataset(X, Y), IDS[:23])
    with pytest.raises(InputError, match="ghosts"):
        WithIds(TensorDataset(X, Y), -IDS)
    with pytest.raises(TypeError, match="float"):
        WithIds(TensorDataset(X, Y), IDS.float())
