"""Masks beside saved weights, so that a shared model keeps its turn-over dropout.

``masks.json`` in the model's folder holds :meth:`turnover.Network.to_dict`: the spec, the sites and a
fingerprint.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from turnover.dropout.network import Network
from turnover.errors import InputError
from turnover.io.parsing import read_json, write_json

FILE = "masks.json"


def save_masks(network: Network, folder: str | Path) -> None:
    """Write ``masks.json``, atomically, into a folder that ``save_pretrained`` wrote.

    Raises:
        InputError: no such folder.
        BindingError: a site's width is not known yet (run one forward).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: save the model there first")
    write_json(folder / FILE, network.to_dict())


def load_masks(model: nn.Module, folder: str | Path) -> Network:
    """Attach turn-over dropout to a model as the ``masks.json`` in its folder describes it.

    Args:
        model: the saved model with its weights: of ``from_pretrained(folder)``, a ``PeftModel``, or any
            module.
        folder: where it was saved.

    Raises:
        InputError: ``masks.json`` is missing or damaged, a site is not in the model, or the masks'
            fingerprint is not the stored one.
    """
    return Network.from_dict(model, read_json(Path(folder) / FILE))


def check_masks(network: Network, folder: str | Path) -> None:
    """Check, before training resumes, that the weights in a folder were trained under the same masks.

    Raises:
        InputError: ``masks.json`` is missing, damaged, or describes another spec or other sites.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise InputError(f"{folder} has no {FILE}: it was trained without turn-over dropout")
    try:
        network.check(read_json(path))
    except InputError as error:
        raise InputError(
            f"{path}: {error}; resume with the spec and the sites of the first training"
        ) from error
