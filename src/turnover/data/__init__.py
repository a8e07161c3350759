"""Labelled data: read from files, checked, and encoded for a model."""

from turnover.data.base import Columns
from turnover.data.text import read

__all__ = ["Columns", "read"]
