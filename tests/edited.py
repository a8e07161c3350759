"""Runs whose rows a test has edited."""

from pathlib import Path

from turnover.io.parsing import read_json, write_json
from turnover.runs.run import Run, write_digests
from turnover.runs.targets import rows_digest


def made_whole(run: Path) -> None:
    """Bring a run's digests, and what its results are of, to the rows that it has now."""
    write_digests(run)
    targets = run / "results" / "targets.json"
    if targets.exists():
        of_these = {"data": rows_digest(Run.load(run))}
        write_json(targets, read_json(targets) | of_these, sealed=True)
