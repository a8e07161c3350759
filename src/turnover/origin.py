"""What a run comes from: the versions of the software that made it, and a digest of its data."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from turnover.data import Data


def versions() -> dict[str, str]:
    """Versions of turnover, torch, transformers (where it is installed) and Python."""
    from turnover import __version__

    found = {"turnover": __version__}
    for name in ("torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # images do without transformers
            continue
    return {**found, "python": platform.python_version()}


def data_digest(*parts: Data) -> str:
    """Digest of all that training takes from data: contents, labels and ids, in their order.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for data in parts:
        digest.update(json.dumps([len(data), data.classes]).encode())
        for content, label, one in zip(
            data.contents(), data.labels, data.ids.tolist(), strict=True
        ):
            digest.update(json.dumps([content, label, one]).encode())
    return digest.hexdigest()
