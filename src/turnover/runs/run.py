"""A run: one folder with a trained classifier, its data and its influence results. Data, never code.

``config.json``, ``fit.toml`` (command-line options that make the run again), ``masks.json`` (of a network
trained with turn-over dropout) or ``trained.json`` (of any other), ``classifier.json``,
``model.safetensors``, ``encoder/`` (shape and tokenizer or processor of pretrained models),
``train.jsonl``, ``test.jsonl`` (and ``train.npy``, ``test.npy``: pixels of images), ``source.json`` (where
the rows are from), ``metrics.json``, ``digests.json`` (of the files a run is loaded from), ``results/``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
import warnings
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from turnover.data.base import Data
from turnover.data.encoded import Encoded
from turnover.dropout.modules import choose_device, weights_digest
from turnover.dropout.network import Network
from turnover.errors import InputError, WriteError
from turnover.io.files import alone, check_links, replace_folder, writing_to
from turnover.io.parsing import check_file, convert, damage, read_json, read_object, write_json
from turnover.models.base import Pipeline
from turnover.models.pipeline import load
from turnover.results.reader import StoredResult, open_result
from turnover.results.result import Result
from turnover.results.store import save

DIGESTS = "digests.json"
MASKS, TRAINED = "masks.json", "trained.json"
"""One of them is in every run, and in no other tool's model folder."""
CHECKPOINT = ".checkpoint"
"""Ending of files that a fit resumes from, and deletes when the run is complete."""
SOURCE = "source.json"
_UNDIGESTED = frozenset(
    {DIGESTS, SOURCE, "fit.toml", "metrics.json", "results", "without_turnover"}
)
"""Files that change after the fit, or that no command loads a run from."""
_SHOWN = 20


@dataclass(frozen=True)
class Run:
    """A loaded run.

    Attributes:
        masks: the model with its masks; ``None``: it was trained without.
    """

    folder: Path
    config: dict[str, Any]
    model: nn.Module
    masks: Network | None
    pipeline: Pipeline
    train: Data
    test: Data
    _fitted: str

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "auto") -> Run:
        """Open a run; its files are read once more to compare their digests.

        Args:
            folder: of the run.
            device: where its network runs (:func:`~turnover.dropout.modules.choose_device`).

        Warns:
            UserWarning: a run without digests, where a flipped bit would not be noticed.

        Raises:
            InputError: no such device, not a run, a missing or damaged file, one that changed after the fit,
                or masks other than those of the training.
        """
        chosen = choose_device(device)
        if not _is_run(folder):
            raise InputError(
                f"{folder} is not a run: it has no {MASKS} or {TRAINED} (make one: turnover fit, or "
                f"turnover attribute for a trained model)"
            )
        check_links(folder)
        fitted = _fitted(folder)
        if (folder / DIGESTS).exists():
            _check_digests(folder)
        else:
            warnings.warn(
                f"{folder} has no {DIGESTS}, which a fit writes now: damage to its files may go unnoticed",
                stacklevel=2,
            )
        where = folder / "config.json"
        config = read_json(where)
        pipeline, model = load(folder)
        model.to(chosen)
        masks = _masked(model, folder / MASKS) if (folder / MASKS).is_file() else None
        classes = convert(config.get("classes"), list[str], f"{where}: classes")
        known = read_object(folder / "classifier.json").get("classes")
        if len(classes) != known or len(set(classes)) < len(classes):
            raise InputError(
                f"{where}: damaged, the model has {known} classes, and not these: "
                f"{', '.join(classes[:_SHOWN])}"
            )
        train, test = (pipeline.read(folder, name, classes) for name in ("train", "test"))
        return cls(folder, config, model, masks, pipeline, train, test, fitted)

    @property
    def network(self) -> Network:
        """The model with its masks.

        Raises:
            InputError: it was trained without.
        """
        if self.masks is None:
            raise InputError(
                f"this needs turn-over training, and the model of {self.folder} was trained without: train "
                f"one with `turnover fit`"
            )
        return self.masks

    def whole(self) -> AbstractContextManager[Any]:
        """Context: the model predicts as a whole."""
        return nullcontext() if self.masks is None else self.masks.mean()

    def digest(self) -> str:
        """Digest of the network, which its results have."""
        return (
            weights_digest(self.model.state_dict()) if self.masks is None else self.masks.digest()
        )

    def encode(self, data: Data) -> Encoded:
        """Encode data for this run's model."""
        return self.pipeline.encode(data)

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Lock the run for scoring by this process alone.

        Raises:
            InputError: another process scores it, or the run was replaced after it was loaded.
        """
        try:
            # Without its parents: a fit that replaces the run must find no folder in its place.
            with writing_to(self.folder):
                _lock(self.folder).parent.mkdir(exist_ok=True)
        except FileNotFoundError as error:
            raise InputError(f"{self.folder} was deleted since it was loaded; run again") from error
        with alone(_lock(self.folder), str(self.folder)):
            try:
                if _fitted(self.folder) != self._fitted:
                    raise InputError(
                        f"{self.folder} was fitted again since it was loaded; run again"
                    )
                yield
            finally:
                _lock(self.folder).unlink(missing_ok=True)

    def scored_sites(self) -> tuple[str, ...]:
        """Sites that `turnover influence` scored; all sites before it ran.

        Raises:
            InputError: damaged ``metrics.json``.
        """
        path = self.folder / "metrics.json"
        influence = convert(read_json(path).get("influence", {}), dict[str, Any], path)
        sites = convert(influence.get("scored_sites", [*self.network.sites]), list[str], path)
        if not sites or not set(sites) <= set(self.network.sites):
            raise InputError(f"{path}: damaged, the run has other sites than {sites}; restore it")
        return tuple(sites)

    def write_result(self, name: str, result: Result) -> None:
        """Store a result with the digest of its network; an earlier one is replaced."""
        save(self._result(name), result)

    @contextmanager
    def draft(self, name: str, settings: str) -> Iterator[Path]:
        """Yield a draft that becomes the result ``name`` when the body ends.

        If the body is interrupted, the same settings find the draft again.
        """
        folder = self.folder / "results"
        with writing_to(folder):
            folder.mkdir(exist_ok=True)
        key = hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()
        draft = folder / f".{name}-{key}.zarr"
        for other in folder.glob(f".{name}-*.zarr"):
            if other != draft:
                shutil.rmtree(other)
        yield draft
        replace_folder(draft, self._result(name))

    def has_result(self, name: str) -> bool:
        """Whether the run has a result."""
        return self._result(name).exists()

    def remove_result(self, name: str) -> None:
        """Delete a result, if the run has it."""
        shutil.rmtree(self._result(name), ignore_errors=True)

    def read_result(self, name: str) -> Result:
        """Read a result of this run's network into memory.

        Raises:
            InputError: as :meth:`open_result`.
        """
        return self.open_result(name).load()

    def open_result(self, name: str) -> StoredResult:
        """Open a result of this run's network on disk.

        Raises:
            InputError: no such result, a damaged one, or one of another model or spec.
        """
        path = self._result(name)
        if not path.exists():
            raise InputError(f"{path} does not exist: run `turnover influence {self.folder}` first")
        result = open_result(path)
        own, network = self.digest(), result.attributes["network"]
        if network != own:
            raise InputError(
                f"{path} belongs to another model or mask spec: it was computed on network "
                f"{network}, this run's is {own}; run `turnover influence {self.folder}` again"
            )
        return result

    def _result(self, name: str) -> Path:
        return self.folder / "results" / f"{name}.zarr"


def _masked(model: nn.Module, path: Path) -> Network:
    values = read_json(path)
    try:
        with damage(path):
            return Network.from_dict(model, values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def write_digests(folder: Path) -> None:
    """Write the digest of every file that a run is loaded from, once all of them are written."""
    files = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.suffix != CHECKPOINT
    )
    digests = {
        path.as_posix(): _digest(folder / path)
        for path in files
        if path.parts[0] not in _UNDIGESTED
    }
    write_json(folder / DIGESTS, {"blake2b": digests}, sealed=True)


def _check_digests(folder: Path) -> None:
    """Refuse a run if a file is missing, or changed after the fit."""
    noted = read_json(folder / DIGESTS).get("blake2b")
    for name, digest in convert(noted, dict[str, str], folder / DIGESTS).items():
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise InputError(f"{folder / DIGESTS}: {name!r} leads out of the run; restore it")
        path = folder / name
        check_file(path)
        try:
            found = _digest(path)
        except OSError as error:
            raise InputError(f"{path}: missing or damaged ({error})") from error
        if found != digest:
            raise InputError(
                f"{path}: damaged, or changed after the fit: its digest is not the one in {DIGESTS}; "
                f"restore it, fit again, or, if the change is yours, delete {folder / DIGESTS}"
            )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _fitted(folder: Path) -> str:
    """Digest that changes with every fit in the same folder."""
    path = folder / DIGESTS
    return _digest(path) if path.is_file() else ""


def _lock(folder: Path) -> Path:
    return folder / "results" / ".lock"


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (MASKS, TRAINED))


def check_new_run(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder with other content, and a run unless it may be overwritten."""
    if not folder.exists():
        return
    if not _is_run(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not a run; choose another folder")
    if not overwrite and _is_run(folder):
        unscored = (folder / TRAINED).is_file() and not (
            folder / "results" / "targets.json"
        ).is_file()
        hint = f"; its scores are missing: `turnover influence {folder}`" if unscored else ""
        raise InputError(f"{folder} exists; pass --overwrite to replace it{hint}")


@contextmanager
def writing_run(folder: Path, *, overwrite: bool, kept: Collection[str] = ()) -> Iterator[Path]:
    """Yield a draft that becomes the run when the body ends, and is kept for resuming if it is interrupted.

    One fit at a time has the draft, until it replaces the run. Files that an earlier fit left in it are
    deleted, except checkpoints, which know their training.

    Args:
        folder: of the run.
        overwrite: replace an existing run.
        kept: other files that the body resumes from.
    """
    check_new_run(folder, overwrite=overwrite)
    draft = folder.with_name(f".{folder.name}.partial")
    # Beside the draft: a lock inside would move with it, and a second fit would not find it.
    lock = folder.with_name(f".{folder.name}.lock")
    with _making(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(lock, str(folder)):
        try:
            check_new_run(folder, overwrite=overwrite)  # another fit may have ended meanwhile
            with _making(folder):
                _clear(draft, kept)
            yield from _written(draft, folder)
            # A process that scores the existing run writes into it until it ends.
            with alone(_lock(folder), str(folder), wait=True) if _is_run(folder) else nullcontext():
                check_new_run(folder, overwrite=overwrite)
                replace_folder(draft, folder)
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def _making(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from error


def _clear(draft: Path, kept: Collection[str]) -> None:
    draft.mkdir(exist_ok=True)
    for left in draft.iterdir():
        if left.suffix != CHECKPOINT and left.name not in kept:
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()


def _written(draft: Path, folder: Path) -> Iterator[Path]:
    try:
        with writing_to(folder):
            yield draft
    except WriteError:
        raise
    except InputError:  # resuming cannot fix it, unlike an interruption or a full disk
        shutil.rmtree(draft)
        raise
    for left in draft.glob(".*"):  # incomplete files of an interruption
        left.unlink()


def versions() -> dict[str, str]:
    """Versions of turnover, torch, transformers (if installed) and Python."""
    from turnover import __version__

    found = {"turnover": __version__}
    for name in ("torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # images do not need transformers
            continue
    return {**found, "python": platform.python_version()}


def data_digest(*parts: Data) -> str:
    """Digest of contents, labels and ids in their order: 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for data in parts:
        digest.update(json.dumps([len(data), data.classes]).encode())
        for content, label, one in zip(
            data.contents(), data.labels, data.ids.tolist(), strict=True
        ):
            digest.update(json.dumps([content, label, one]).encode())
    return digest.hexdigest()
