"""Hooks of the documentation site: README and CONTRIBUTING as pages, and links that stay inside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
"""Files of the repository's root that are pages of the site."""


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages from outside ``docs``."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links at the site's pages; drop links to other files of the repository."""
    for source, page in PAGES.items():
        markdown = re.sub(
            rf"\]\((?:\.\./)?{re.escape(source)}(#[^)]*)?\)", rf"]({page}\1)", markdown
        )
    return re.sub(r"\[([^\]]*)\]\((?:\.\./[^)]*|[A-Z]+\.\w+)\)", r"\1", markdown)
