"""Decisions on training rows, stored in the run as the list that `turnover review` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from turnover.errors import InputError
from turnover.runs.run import Run
from turnover.tasks.label_errors import check_rows
from turnover.tasks.review import check_decision, read_decisions, write_decisions

_WAIT_SECONDS = 10.0


class Decisions:
    """Decisions by training row, in ``results/decisions.csv`` of a run.

    Decisions are stored in the file only, so those of another process are seen, and none is lost when
    this process ends.

    Args:
        run: run with the training rows.
        self_influence: z and q by instance id, written beside the decisions.

    Attributes:
        path: the file.
        refusal: why this run's rows cannot be decided on; ``None``: they can.
    """

    def __init__(self, run: Run, self_influence: Mapping[int, tuple[float, float]]) -> None:
        self._run, self._self_influence = run, self_influence
        self.path: Path = run.folder / "results" / "decisions.csv"
        self._known: dict[int, str] = {}
        self._stamp: tuple[int, int, int] | None = None
        self.refusal: str | None = None
        try:
            check_rows(run)
        except InputError as error:
            self.refusal = str(error)
        else:
            self.all()

    def all(self) -> dict[int, str]:
        """Read ``keep``, ``remove`` or a class, by row."""
        stamp = self._stamp_of_file()
        if stamp != self._stamp:
            self._known = {} if stamp is None else read_decisions(self._run, self.path)
            self._stamp = stamp
        return dict(self._known)

    def set(self, row: int, decision: str | None) -> dict[int, str]:
        """Decide on a row, or take a decision back (``None``), and return all decisions."""
        from filelock import FileLock, Timeout

        if self.refusal is not None:
            raise InputError(self.refusal)
        train = self._run.train
        if not 0 <= row < len(train):
            raise InputError(f"there are {len(train)} training rows, none is number {row}")
        if decision is not None:
            decision = check_decision(decision, train.classes)
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=_WAIT_SECONDS)
        try:
            with lock:
                decisions = self.all()
                decisions.pop(row, None)
                if decision is not None:
                    decisions[row] = decision
                write_decisions(train, decisions, self.path, self._self_influence)
                self._known, self._stamp = decisions, self._stamp_of_file()
        except Timeout:
            raise InputError(f"{self.path} is being written by another process") from None
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}") from error
        return dict(decisions)

    def _stamp_of_file(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size
