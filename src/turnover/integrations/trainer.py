"""Turn-over dropout under Hugging Face's ``Trainer``: one line after the trainer is made.

The trainer's own loop, collator and evaluation stay. Training batches carry the ids of their rows
beside the model's inputs; the loss is computed under ``exposed(ids)``, and evaluation runs the mean
network. Saved models get the masks beside them (:mod:`turnover.integrations.pretrained`).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from turnover.batches import WithIds, as_batch
from turnover.dropout.audit import clips
from turnover.dropout.masks import MaskSpec
from turnover.dropout.network import Network, attach
from turnover.dropout.sites import SiteLike
from turnover.errors import InputError
from turnover.ids import check_training_ids, string_ids
from turnover.integrations.pretrained import check_masks, save_masks

IDS = "ids"
"""Key of the ids in a training batch, as :func:`turnover.batches.as_batch` reads it."""
_COLUMNS = ("id", "ids")
_logger = logging.getLogger(__name__)


def attach_trainer(
    trainer: Any,
    sites: SiteLike | Sequence[SiteLike],
    spec: MaskSpec | None = None,
    *,
    ids: str | Tensor | Sequence[int] | Sequence[str] | None = None,
) -> Network:
    """Attach turn-over dropout to the model of a ``transformers.Trainer``, before ``train()``.

    Logs the audit of the first training batch, as a warning if something leaks. The batches of
    ``trainer.get_train_dataloader()`` hold the ids, as :class:`turnover.Influence` takes them. If
    ``label_names`` of the trainer's arguments is one column, it holds the labels; several stay among the
    model's inputs, for an objective of your own.

    Args:
        trainer: a ``transformers.Trainer``, or a subclass.
        sites: as in :func:`turnover.attach`.
        spec: the masks; default ``MaskSpec()``.
        ids: which instance each row of ``train_dataset`` is: a column's name (int64 or strings; rows
            with equal values form a group and share a mask), or one id for each row. ``None``: the
            column ``"id"`` or ``"ids"``, whose values must be distinct, or else row numbers from 0. An
            iterable data set needs the column's name.

    Returns:
        :class:`~turnover.Network` on ``trainer.model``.

    Raises:
        InputError: a trainer without training data, or with ``model_init``; a model that cannot run
            without labels; ids that are missing, ambiguous, negative or not one for each row; an
            unknown site. At ``train()``: gradient clipping by global norm (``max_grad_norm``), several
            GPUs in one process, another model, a checkpoint trained under other masks.
        TypeError: ids that are neither integers nor strings.
    """
    if isinstance(getattr(trainer.train, "__self__", None), _Training):
        raise InputError("this trainer already has turn-over dropout attached: make a new trainer")
    if trainer.model_init is not None:
        raise InputError(
            "the trainer re-creates its model by model_init, which would lose the masks: pass model="
        )
    _check_forward(trainer)
    source = _source(trainer.train_dataset, ids)
    network = attach(trainer.model, sites, spec)
    label_names = trainer.args.label_names or ()
    if len(label_names) == 1:
        network.adapter = partial(as_batch, label_names=tuple(label_names))
    _Training(trainer, network, source)
    return network


class _Training:
    """Replaces methods of a trainer, and of a model that can save itself."""

    def __init__(self, trainer: Any, network: Network, source: Tensor | str) -> None:
        self._trainer = trainer
        self._network = network
        self._source = source
        self._audited = False
        self._train = trainer.train
        self._get_train_dataloader = trainer.get_train_dataloader
        self._compute_loss = trainer.compute_loss
        self._save_model = trainer.save_model
        replaced = [self.train, self.get_train_dataloader, self.compute_loss]
        model: Any = network.model
        if hasattr(model, "save_pretrained"):
            model.save_pretrained = partial(_save_pretrained, network, model.save_pretrained)
        else:
            replaced.append(self.save_model)
        for method in replaced:
            setattr(trainer, method.__name__, method)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Check the settings for leaks, then train."""
        trainer = self._trainer
        if clips(trainer.args.max_grad_norm):
            raise InputError(
                f"max_grad_norm={trainer.args.max_grad_norm:g} (1.0 is the Trainer's default) clips "
                f"gradients by their global norm, which carries every instance to every parameter: "
                f"pass max_grad_norm=0 to TrainingArguments"
            )
        if trainer.args.n_gpu > 1:
            raise InputError(
                f"{trainer.args.n_gpu} GPUs in one process split batches without their ids: start the "
                f"script with torchrun, or let it see one GPU (CUDA_VISIBLE_DEVICES)"
            )
        if trainer.accelerator.unwrap_model(trainer.model) is not self._network.model:
            raise InputError(
                "the trainer's model is not the one that the masks are attached to: call attach_trainer "
                "after trainer.model is set"
            )
        if resume_from_checkpoint:
            self._check_masks_of(resume_from_checkpoint)
        self._audited = False
        return self._train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """The trainer's own loader, of rows with ids."""
        trainer = self._trainer
        trainer._set_signature_columns_if_needed()
        kept = trainer.train_dataset, trainer.data_collator, trainer._signature_columns
        dataset, collator, columns = kept
        key = self._source if isinstance(self._source, str) else IDS
        try:
            if isinstance(self._source, Tensor):
                if _column_names(dataset) is not None:
                    dataset = trainer._remove_unused_columns(dataset, description="training")
                trainer.train_dataset = _IdColumn(dataset, self._source)
            trainer.data_collator = _Collator(collator, key)
            # Or remove_unused_columns would remove the ids before they reach the collator.
            trainer._signature_columns = [*columns, key]
            return self._get_train_dataloader()
        finally:
            trainer.train_dataset, trainer.data_collator, trainer._signature_columns = kept

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own loss; that of a training batch under the masks of its rows."""
        ids = inputs.pop(IDS, None)
        if ids is None:
            return self._compute_loss(model, inputs, *args, **kwargs)
        if not self._audited:
            self._audited = True
            self._audit(inputs)
        with self._network.exposed(ids):
            return self._compute_loss(model, inputs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save the model, and the masks beside it."""
        trainer = self._trainer
        self._save_model(output_dir, *args, **kwargs)
        if trainer.args.should_save:
            _save_known_masks(self._network, output_dir or trainer.args.output_dir)

    def _check_masks_of(self, checkpoint: str | bool) -> None:
        from transformers.trainer_utils import get_last_checkpoint

        output = self._trainer.args.output_dir
        folder = get_last_checkpoint(output) if checkpoint is True else str(checkpoint)
        if folder is not None:  # the trainer's own error names a missing checkpoint
            check_masks(self._network, folder)

    def _audit(self, inputs: Any) -> None:
        trainer, network = self._trainer, self._network
        if not trainer.is_world_process_zero():
            return
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            _logger.warning("not audited for leaks, as parameters are sharded over processes")
            return
        # With labels a model may return its loss before its logits.
        inputs = {key: value for key, value in inputs.items() if key not in trainer.label_names}
        with _without_checkpointing(network.model):
            report = network.audit(inputs, optimizer=trainer.optimizer, adapter=network.adapter)
        level = logging.INFO if report.clean else logging.WARNING
        _logger.log(level, "turn-over dropout, audit of the first batch: %s", report)


class _IdColumn(WithIds):
    """A data set of mappings, with the ids as one more column."""

    def __getitem__(self, row: int) -> Any:
        return _with_id(row, *super().__getitem__(row))

    def __getitems__(self, rows: Sequence[int]) -> list[Any]:
        items = super().__getitems__(rows)
        return [_with_id(row, *item) for row, item in zip(rows, items, strict=True)]


def _with_id(row: int, item: Any, instance: int) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise InputError(
            f"row {row} of train_dataset is a {type(item).__name__}: rows must be mappings of the "
            f"model's inputs"
        )
    if IDS in item:
        raise InputError(f"row {row} of train_dataset has {IDS!r} already: pass ids={IDS!r}")
    return {**item, IDS: instance}


class _Collator:
    """A collator that passes on the ids beside the batch."""

    def __init__(self, collator: Callable[[list[Any]], Any], key: str) -> None:
        self._collator = collator
        self._key = key

    def __call__(self, features: list[Any]) -> Any:
        missing = [feature for feature in features if self._key not in feature]
        if missing:
            raise InputError(
                f"a training row has no {self._key!r}, the column of ids; it has "
                f"{', '.join(map(repr, missing[0]))}"
            )
        ids = [feature[self._key] for feature in features]
        rest = [{k: v for k, v in feature.items() if k != self._key} for feature in features]
        batch = self._collator(rest)
        batch[IDS] = _as_ids(ids, f"{self._key!r}")
        return batch


def _check_forward(trainer: Any) -> None:
    """Check that the model runs without labels, as the audit and the estimators need."""
    parameters = inspect.signature(trainer.model.forward).parameters
    for name in trainer.label_names or ["labels"]:
        if name in parameters and parameters[name].default is inspect.Parameter.empty:
            raise InputError(
                f"{type(trainer.model).__name__}.forward cannot run without {name!r}, but the audit and "
                f"the estimators do: give it a default ({name}=None), and return no loss then"
            )


def _source(dataset: Any, ids: str | Tensor | Sequence[int] | Sequence[str] | None) -> Tensor | str:
    """Ids of the rows, int64 (rows,); of an iterable data set, the name of their column."""
    if dataset is None:
        raise InputError(
            "the trainer has no train_dataset, so no instances to mask: pass train_dataset="
        )
    names = _column_names(dataset)
    if not hasattr(dataset, "__len__"):
        if not isinstance(ids, str):
            raise InputError(
                "train_dataset is iterable only, so its rows have no numbers: name the column of their "
                "ids (ids=)"
            )
        return ids
    if ids is None:
        found = [name for name in _COLUMNS if name in (names or ())]
        if len(found) > 1:
            raise InputError(f"train_dataset has columns {found}: say which holds the ids (ids=)")
        if not found:
            _logger.info("turn-over dropout: instance ids are the row numbers of train_dataset")
            return torch.arange(len(dataset), device="cpu")
        column = _column(dataset, found[0])
        if len(set(column.tolist())) < len(column):
            raise InputError(
                f"column {found[0]!r} of train_dataset has equal ids: pass ids={found[0]!r} if these rows "
                f"are a group, or name another column"
            )
        return column
    if isinstance(ids, str):
        if names is None:
            raise InputError(
                f"train_dataset is a {type(dataset).__name__} without columns: pass the ids themselves, "
                f"one for each row, instead of {ids!r}"
            )
        if ids not in names:
            raise InputError(
                f"train_dataset has no column {ids!r}; it has {', '.join(map(repr, names))}"
            )
        return _column(dataset, ids)
    if len(ids) != len(dataset):
        raise InputError(
            f"train_dataset has {len(dataset)} rows, and ids= has {len(ids)}: give one for each row"
        )
    return _as_ids(ids, "ids=")


def _column_names(dataset: Any) -> list[str] | None:
    """Column names of a ``datasets.Dataset``; ``None`` for other data sets."""
    names = getattr(dataset, "column_names", None)
    return names if isinstance(names, list) and hasattr(dataset, "remove_columns") else None


def _column(dataset: Any, name: str) -> Tensor:
    values = dataset.with_format(None)[name]
    return _as_ids(values if isinstance(values, list) else list(values), f"column {name!r}")


def _as_ids(values: Tensor | Sequence[Any], where: str) -> Tensor:
    if not isinstance(values, Tensor):
        for row, value in enumerate(values):
            if value is None:
                raise InputError(f"{where}: row {row} has no id")
        if len(values) and isinstance(values[0], str):
            return string_ids(values)
    return check_training_ids(values)


@contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Switch gradient checkpointing off: gradients do not pass through a reentrant checkpoint."""
    modules = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    for module in modules:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def _save_pretrained(
    network: Network,
    save: Callable[..., Any],
    save_directory: str | Path,
    *args: Any,
    **kwargs: Any,
) -> Any:
    saved = save(save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        _save_known_masks(network, save_directory)
    return saved


def _save_known_masks(network: Network, folder: str | Path) -> None:
    # A network that never ran does not know the widths of its sites, and has learned nothing.
    if None not in network.units.values():
        save_masks(network, folder)
