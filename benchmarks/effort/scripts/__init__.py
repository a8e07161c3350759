"""One script for each tool, each of them ``base.py`` with what the tool needs."""
