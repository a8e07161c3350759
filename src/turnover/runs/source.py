"""The file that a run's training rows were read from, and that file after decisions on these rows.

A run's folder names it in ``source.json``. It is no part of the run: it may be moved, changed or deleted.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from turnover.data.base import ENDINGS, Data, Provenance, check_writable
from turnover.data.rewrite import rewritten
from turnover.data.tables import file_of
from turnover.errors import InputError
from turnover.io.files import replacing
from turnover.io.parsing import convert, read_json, write_json
from turnover.runs.run import SOURCE, Run


def write_source(folder: Path, train: Data) -> None:
    """Write where training data were read from into a run's folder; of data made in memory nothing."""
    if train.provenance is not None:
        write_json(folder / SOURCE, asdict(train.provenance))


def usual_ending(run: Run) -> str:
    """Ending in which :func:`write_changed` writes the file as it was, or the rows that a fit can read."""
    ending = ".npz" if run.train.kind == "image" else ".csv"
    try:
        given = _provenance(run)
    except InputError:  # said when the file is written
        return ending
    file = file_of(given.source, given.split) or Path(given.source)
    own = Path(file.name.lower().removesuffix(".gz")).suffix
    return own if own in (*ENDINGS, ".npz") else ending


def write_changed(run: Run, labels: Mapping[int, int], removed: Collection[int], out: Path) -> int:
    """Write the file of the training rows with some of them relabeled or removed, atomically.

    All else in the file stays as it was, test rows that were held out of it too. Where the file is not
    what the run was trained on, the training rows are written with columns of their own.

    Args:
        run: a run whose training rows have keys of their own.
        labels: classes by training row, as indices.
        removed: training rows.
        out: file to write; its ending is that of CSV, TSV, JSON, JSON lines or Parquet, or .npz for images.

    Returns:
        the number of test rows in the file written.

    Warns:
        UserWarning: the columns are not those of the file, and why.

    Raises:
        InputError: a format that cannot be written, or a folder that does not exist.
    """
    train = run.train
    check_writable(out, *((".npz",) if train.kind == "image" else ()))
    gone = set(removed)
    try:
        given, whole, file = _read_again(run)
        row_of = {key: row for row, key in enumerate(whole.keys)}
        of_class = {whole.classes[label]: row for row, label in enumerate(whole.labels)}
        if absent := {train.classes[label] for label in labels.values()} - of_class.keys():
            raise InputError(f"{file}: no row has the class {min(absent)!r}")
        write = rewritten(
            file,
            given.columns,
            out,
            copied={
                row_of[train.keys[row]]: of_class[train.classes[label]]
                for row, label in labels.items()
                if row not in gone
            },
            removed={row_of[train.keys[row]] for row in gone},
        )
    except InputError as error:
        columns = ", ".join(train.table())
        warnings.warn(f"{out} has the columns {columns}: {error}", stacklevel=2)
        kept = [row for row in range(len(train)) if row not in gone]
        left = [labels.get(row, train.labels[row]) for row in kept]
        train.take(kept).relabeled(left).export(out)
        return 0
    with replacing(out) as draft:
        write(draft)
    return len(whole) - len(train)


def check_spared(run: Run, out: Path | None, *read: Path | None) -> None:
    """Refuse to write over the file of the training rows, or over another one that is read.

    Args:
        run: whose training rows.
        out: file to write.
        read: files.

    Raises:
        InputError: it is one of them, by this name or another.
    """
    if out is None or not out.exists():
        return
    files = {one: "is read as well" for one in read if one is not None}
    with suppress(InputError):  # nobody knows which file it was
        given = _provenance(run)
        if (file := file_of(given.source, given.split)) is not None:
            files[file] = "holds the training rows"
    for file, why in files.items():
        if file.exists() and out.samefile(file):
            raise InputError(f"{out} {why}, and would be overwritten: name another file with --out")


def _provenance(run: Run) -> Provenance:
    path = run.folder / SOURCE
    if not path.is_file():
        raise InputError(f"{run.folder} does not say which file its training rows are from")
    return convert(read_json(path), Provenance, path)


def _read_again(run: Run) -> tuple[Provenance, Data, Path]:
    """Read the file of the training rows again; refuse one that holds other rows than the run."""
    given = _provenance(run)
    file = file_of(given.source, given.split)
    if file is None:
        if not Path(given.source).is_absolute():
            raise InputError(f"{given.source!r} is a Hugging Face data set, and no file")
        if Path(given.source).is_dir():
            raise InputError(f"{given.source} is a folder, and no file")
        raise InputError(
            f"{given.source} is not there any more; put it back, or write its path into "
            f"{run.folder / SOURCE}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the run was trained
        whole = run.pipeline.reader()(str(file), given.columns, split=given.split)
    known = _rows(run.train)
    if len(whole) > len(run.train):  # a part was held out for testing
        known |= _rows(run.test)
    if len(whole) != len(known) or _rows(whole) != known:
        raise InputError(f"{file} is not as it was when the run was trained")
    return given, whole, file


def _rows(data: Data) -> dict[str, tuple[str, str]]:
    names = (data.classes[label] for label in data.labels)
    return dict(zip(data.keys, zip(data.contents(), names, strict=True), strict=True))
