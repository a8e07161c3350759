"""Gram by landmarks: what is kept of exact gram, agreement with retraining, time and memory."""

from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "gram_scale.json"
Json = dict[str, Any]
