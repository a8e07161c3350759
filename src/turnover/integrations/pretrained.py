"""The masks beside the weights: a model that is saved for others keeps its turn-over dropout.

``masks.json`` in the folder holds :meth:`turnover.Network.to_dict`: the spec, the sites and a fingerprint.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from turnover.dropout.network import Network
from turnover.errors import InputError
from turnover.io.parsing import read_json, write_json

FILE = "masks.json"


def save_masks(network: Network, folder: str | Path) -> None:
    """Write ``masks.json`` into a folder that ``save_pretrained`` wrote, atomically.

    Raises:
        InputError: no such folder.
        BindingError: a site's width is not known yet (run one forward).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: save the model there first")
    write_json(folder / FILE, network.to_dict())


def load_masks(model: nn.Module, folder: str | Path) -> Network:
    """Attach turn-over dropout to a model as ``masks.json`` in its folder says.

    Args:
        model: the model as it was saved, with its weights: of ``from_pretrained(folder)``, a
            ``PeftModel``, or any module.
        folder: where it was saved.

    Raises:
        InputError: no ``masks.json``, a damaged one, a site that the model does not have, or masks
            whose fingerprint is not the stored one.
    """
    return Network.from_dict(model, read_json(Path(folder) / FILE))


def check_masks(network: Network, folder: str | Path) -> None:
    """Check that the weights in a folder were trained under a network's masks, to be trained on.

    Raises:
        InputError: no ``masks.json``, a damaged one, another spec or other sites.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise InputError(f"{folder} has no {FILE}: it was trained without turn-over dropout")
    stored, mend = read_json(path), "go on with the spec and the sites that it was begun with"
    try:
        there = {s["name"]: (s["axis"], s["unit_size"]) for s in stored["sites"]}
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error!r})") from error
    if stored.get("spec") != network.spec.to_dict():
        raise InputError(
            f"{folder} was trained under other masks, of {stored.get('spec')} and not "
            f"{network.spec}: {mend}"
        )
    here = {site.name: (site.axis, site.unit_size) for site in network.masking.sites.values()}
    if there != here:
        differing = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
        raise InputError(f"{folder} was trained with other sites (see {differing[:5]}): {mend}")
