"""Cross-references of the docstrings (``:class:`Result` ``) as links of the API reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """Turns every role into a link, or into plain code where the reference has no such entry."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is None:
            return

        def link(match: re.Match[str]) -> str:
            short, name = match.groups()
            try:
                path = obj.resolve(name)
            except griffe.NameResolutionError:
                path = name
            shown = name.rpartition(".")[2] if short else name
            return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'

        obj.docstring.value = _ROLE.sub(link, obj.docstring.value)
