"""Lightning's loops around a training, with the callback: finders, other entry points, other modules."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tiny
from turnover import BindingError, InputError, MaskSpec, WithIds

lightning = pytest.importorskip("lightning", reason="needs: pip install 'turnover[lightning]'")
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder  # noqa: E402
from lightning.pytorch.tuner import Tuner  # noqa: E402

from test_lightning import (  # noqa: E402
    IDS,
    KEY,
    Module,
    X,
    Y,
    assert_same_weights,
    callback,
    loader,
    plainly,
    trainer,
)
from turnover.integrations.lightning import TurnoverCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Tuned(Module):
    """Notes which units each row kept, and makes its loader by itself."""

    def __init__(self, data=None, **options):
        super().__init__(**options)
        self.learning_rate = 1e-2
        self.batch_size = 2
        self.data = data or WithIds(TensorDataset(X, Y), IDS)

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=self.batch_size)

    def val_dataloader(self):
        return loader(ids=None)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


class NoWidth(Tuned):
    """A masked layer whose neighbors do not give away its width."""

    def __init__(self, **options):
        super().__init__(**options)
        layers = list(self.layers)
        self.layers = nn.Sequential(layers[0], nn.Identity(), nn.Sequential(nn.GELU()), *layers[2:])
        self.layers[3].register_forward_pre_hook(self._see)


def rows_seen(module):
    return torch.cat(module.seen)


def assert_masked(module, one):
    """Every row that trained ran under the mask of its id."""
    spec = one.network.spec
    site = one.network.sites[0]
    masks = {tuple(mask) for mask in spec.exposed(IDS, site, 16).tolist()}
    kept = {tuple(row) for row in (rows_seen(module) != 0).tolist()}
    assert kept <= masks and kept


FINDERS = {
    "learning rate, by the tuner": lambda run, module: Tuner(run).lr_find(
        module, num_training=12, early_stop_threshold=None
    ),
    "batch size, by the tuner": lambda run, module: Tuner(run).scale_batch_size(
        module, max_trials=3, steps_per_trial=2
    ),
    "batch size, by bisection": lambda run, module: Tuner(run).scale_batch_size(
        module, mode="binsearch", max_trials=3, steps_per_trial=2
    ),
}


@pytest.mark.parametrize("width", ["known", "unknown"])
@pytest.mark.parametrize("find", FINDERS)
def test_a_finder_trains_under_masks_and_puts_everything_back(find, width, tmp_path):
    kind, site = {"known": (Tuned, "layers.1"), "unknown": (NoWidth, "layers.2")}[width]
    module = kind()
    untrained = copy.deepcopy(module)
    one = TurnoverCallback(site, MaskSpec(seed=4))
    run = trainer(one, tmp_path, max_epochs=2)
    FINDERS[find](run, module)
    assert_masked(module, one)
    assert_same_weights(module, untrained)
    assert module.training_step.__func__ is kind.training_step
    assert module.clip_gradients.__func__ is lightning.LightningModule.clip_gradients

    found = kind()
    found.load_state_dict(untrained.state_dict())
    found.learning_rate, found.batch_size = module.learning_rate, module.batch_size
    run.fit(module)
    other = trainer(TurnoverCallback(site, MaskSpec(seed=4)), tmp_path, max_epochs=2)
    other.fit(found)
    assert_same_weights(module, found)
    assert_masked(module, one)
    run.save_checkpoint(tmp_path / "end.ckpt")
    stored = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"][KEY]
    one.network.check(stored)
    assert one.network.to_dict() == stored
    assert str(one.network.audit((X, Y))) == str(other.callbacks[0].network.audit((X, Y)))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: LearningRateFinder(num_training_steps=5, early_stop_threshold=None),
        lambda: BatchSizeFinder(max_trials=2, steps_per_trial=2),
    ],
    ids=["learning rate", "batch size"],
)
def test_a_finder_beside_the_callback_comes_first_or_last(make, first, tmp_path):
    module, one = Tuned(), callback()
    callbacks = [make(), one] if first else [one, make()]
    run = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        callbacks=callbacks,
    )
    run.fit(module)
    assert_masked(module, one)
    other = Tuned()
    other.learning_rate, other.batch_size = module.learning_rate, module.batch_size
    trainer(callback(), tmp_path, max_epochs=1).fit(other)
    assert_same_weights(module, other)


@pytest.mark.parametrize("find", FINDERS)
def test_a_finder_does_not_train_rows_without_ids_or_at_unknown_sites(find, tmp_path):
    module = Tuned(TensorDataset(X, Y))
    untrained = copy.deepcopy(module)
    with pytest.raises(InputError, match="WithIds"):
        FINDERS[find](trainer(callback(), tmp_path), module)
    assert not module.seen
    assert_same_weights(module, untrained)
    module = Tuned()
    with pytest.raises(InputError, match=r"unknown site 'layers\.9'"):
        FINDERS[find](trainer(TurnoverCallback("layers.9"), tmp_path), module)
    assert not module.seen


def test_a_finder_in_a_resumed_training_goes_back_to_it(tmp_path):
    one = TurnoverCallback("layers.2", MaskSpec(seed=4))
    run = trainer(one, tmp_path, max_epochs=1)
    run.fit(NoWidth())
    run.save_checkpoint(tmp_path / "one.ckpt")
    resumed, again = NoWidth(), TurnoverCallback("layers.2", MaskSpec(seed=4))
    later = trainer(again, tmp_path, max_epochs=2)
    later.callbacks.insert(0, LearningRateFinder(num_training_steps=3, early_stop_threshold=None))
    later.fit(resumed, ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert_masked(resumed, again)
    assert again.network.digest() != one.network.digest()
    assert again.network.fingerprint() == one.network.fingerprint()


def test_a_sanity_check_an_overfit_and_a_dev_run_use_the_masks_of_their_rows(tmp_path):
    for options in (
        {"num_sanity_val_steps": 2},
        {"overfit_batches": 2},
        {"fast_dev_run": True},
        {"limit_train_batches": 2, "accumulate_grad_batches": 2},
    ):
        module, one = Module(), callback()
        trainer(one, tmp_path, **options).fit(module, loader(shuffle=True), loader(ids=None))
        dropped = rows_seen(module) == 0
        masks = one.network.spec.exposed(IDS, "layers.1", 16)
        assert {tuple(row) for row in (~dropped).tolist()} <= {tuple(m) for m in masks.tolist()}
        assert module.validation


def test_validating_testing_and_predicting_run_the_whole_network(tmp_path):
    class Every(Module):
        def test_step(self, batch, batch_idx):
            self.validation_step(batch, batch_idx)

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    module, one = Every(), callback()
    run = trainer(one, tmp_path)
    before = [run.validate, run.test]
    for call in before:
        call(module, loader(ids=None))
    with pytest.raises(InputError, match=r"before trainer\.fit"):
        one.network  # noqa: B018
    run.fit(module, loader())
    module.validation.clear()
    module.eval()
    with torch.no_grad():
        whole = module(X)
    for call in (run.validate, run.test):
        call(module, loader(ids=None))
    expected = [
        nn.functional.cross_entropy(whole[i : i + 8], Y[i : i + 8]).item() for i in (0, 8, 16)
    ]
    assert module.validation == pytest.approx(expected * 2, abs=1e-6)
    torch.testing.assert_close(torch.cat(run.predict(module, loader(ids=None))), whole)
    assert module.training_step.__func__ is Module.training_step


class Manual(Module):
    def __init__(self, clip=None):
        super().__init__()
        self.automatic_optimization = False
        self.clip = clip

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        if self.clip:
            self.clip_gradients(optimizer, **self.clip)
        optimizer.step()


def test_manual_optimization_trains_as_a_loop_of_ones_own(tmp_path):
    module, other = Manual(), Module()
    trainer(callback(), tmp_path).fit(module, loader())
    plainly(other)
    assert_same_weights(module, other)


def test_a_module_that_clips_by_norm_itself_is_refused_before_any_update(tmp_path):
    class Hook(Module):
        def configure_gradient_clipping(self, optimizer, **_):
            self.clip_gradients(optimizer, 0.5, "norm")

    for module in (
        Manual({"gradient_clip_val": 0.5}),
        Manual({"gradient_clip_val": 0.5, "gradient_clip_algorithm": "NORM"}),
        Hook(),
    ):
        untrained = copy.deepcopy(module)
        with pytest.raises(InputError, match='gradient_clip_algorithm="value"'):
            trainer(callback(), tmp_path).fit(module, loader())
        assert_same_weights(module, untrained)
        assert module.clip_gradients.__func__ is lightning.LightningModule.clip_gradients
    by_value = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    trainer(callback(), tmp_path).fit(Manual(by_value), loader())


def test_a_step_that_runs_the_model_twice_masks_both_runs_alike(tmp_path):
    class Twice(Module):
        def training_step(self, batch, batch_idx):
            inputs, labels = batch
            loss = nn.functional.cross_entropy(self(inputs), labels)
            return loss + nn.functional.cross_entropy(self(inputs + 0.1), labels)

    module, one = Twice(), callback()
    trainer(one, tmp_path, max_epochs=1).fit(module, loader())
    kept = torch.cat(module.seen).view(3, 2, 8, 16) != 0
    masks = one.network.spec.exposed(IDS, "layers.1", 16).view(3, 1, 8, 16)
    assert torch.equal(kept, masks.expand(3, 2, 8, 16))


def test_a_step_that_makes_more_rows_of_a_batch_is_refused(tmp_path):
    class Views(Module):
        def training_step(self, batch, batch_idx):
            inputs, labels = batch
            logits = self(torch.cat([inputs, inputs + 0.1]))
            return nn.functional.cross_entropy(logits, torch.cat([labels, labels]))

    with pytest.raises(BindingError, match="batch of 16 rows, but 8 ids"):
        trainer(callback(), tmp_path).fit(Views(), loader())


def test_layers_made_in_setup_are_masked(tmp_path):
    class Late(lightning.LightningModule):
        def setup(self, stage):
            self.layers = tiny.randomise(tiny.mlp(16))

        def forward(self, inputs):
            return self.layers(inputs)

        training_step = Module.training_step
        configure_optimizers = Module.configure_optimizers

    module, other = Late(), Module()
    trainer(callback(), tmp_path).fit(module, loader())
    plainly(other)
    assert_same_weights(module, other)
