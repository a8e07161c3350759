"""Hooks of the documentation site: its front page is the README, and links stay inside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]


def on_files(files: Any, *, config: Any) -> Any:
    """Add the README as the front page."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=readme.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files beside ``docs`` are for those who read the pages in the repository."""
    return re.sub(r"\[([^\]]*)\]\((?:\.\./[^)]*|[A-Z]+\.\w+)\)", r"\1", markdown)
