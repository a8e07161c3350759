"""Every reader against inputs that a fuzzer grows by what they reach: ``make fuzz``.

``python tests/fuzz.py [--seconds N] [TARGET ...]`` runs each target in a process of its own. What a reader
refuses (InputError) is well; any other exception, a crash, a hang or more than 4 GiB is a finding, and
the input is kept in ``runs/fuzz``.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

try:
    import atheris
except ImportError:
    sys.exit(
        "fuzzing needs atheris (pip install '.[fuzz]'), which this Python or system may not have"
    )

with atheris.instrument_imports(include=["turnover"]):
    import turnover
    from turnover.cli.config import options_of, read_config
    from turnover.cli.training import fit
    from turnover.data.base import Columns
    from turnover.data.images import read_image, read_images
    from turnover.data.text import TextData, read
    from turnover.dropout.network import Network
    from turnover.evaluation.subsets import Subsets, draw_subsets
    from turnover.io.parsing import read_json
    from turnover.models.image import ImageClassifierConfig, ImagePipeline
    from turnover.models.pipeline import load
    from turnover.results.manifest import manifest_of, seal
    from turnover.results.store import save
    from turnover.tasks.review import read_column

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from safetensors.torch import save_file

Target = tuple[Callable[[bytes], object], list[bytes]]
FOUND = Path("runs/fuzz")
ROWS = [{"text": f"a text {i} ü", "label": "ab"[i % 2], "id": i} for i in range(6)]
COLUMNS = Columns("text", "label", "id")
PIXELS = np.arange(2 * 33 * 40 * 3, dtype=np.uint32).reshape(2, 33, 40, 3).astype(np.uint8)


def of_a_file(path: Path, act: Callable[[Path], object]) -> Callable[[bytes], object]:
    """What reads a file that holds the input."""

    def run(raw: bytes) -> object:
        path.write_bytes(raw)
        return act(path)

    return run


def lines() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def parquet(table: pyarrow.Table) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out)
    return out.getvalue()


def encoded(kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(out, kind)
    return out.getvalue()


def table(ending: str) -> Callable[[Path], Target]:
    def make(folder: Path) -> Target:
        csv = "text,label,id\n" + "".join(f'"{r["text"]}",{r["label"]},{r["id"]}\n' for r in ROWS)
        seeds = {
            "jsonl": lines(),
            "json": json.dumps(ROWS).encode(),
            "csv": csv.encode(),
            "parquet": parquet(pyarrow.Table.from_pylist(ROWS)),
        }
        act = of_a_file(folder / f"a.{ending}", lambda path: read(str(path), COLUMNS))
        return act, [seeds[ending]]

    return make


def image(folder: Path) -> Target:
    kinds = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
    act = of_a_file(folder / "a.png", lambda path: read_image(path, 32))
    return act, [encoded(kind) for kind in kinds]


def arrays(folder: Path) -> Target:
    out = io.BytesIO()
    np.savez(out, image=PIXELS, label=np.array(["a", "b"]))
    act = of_a_file(folder / "a.npz", lambda path: read_images(str(path), 32))
    return act, [out.getvalue()]


def image_table(folder: Path) -> Target:
    cells = [{"bytes": encoded("PNG"), "path": None}] * 2
    raw = parquet(pyarrow.table({"image": cells, "label": ["a", "b"]}))
    return of_a_file(folder / "a.parquet", lambda path: read_images(str(path), 32)), [raw]


def options(folder: Path) -> Target:
    known = options_of(fit)
    act = of_a_file(folder / "a.toml", lambda path: read_config(path, known, set()))
    return act, [b'epochs = 3\nsite = ["head"]\nkeep = 0.5\n[made]\nturnover = "0.1"\n']


def decisions(folder: Path) -> Target:
    ids = torch.arange(3)
    train = TextData(["x", "y", "z"], [0, 1, 0], ids, ["1", "2", "=3"], ["a", "b"])
    run = SimpleNamespace(train=train, folder=folder)
    act = of_a_file(folder / "a.csv", lambda path: list(read_column(run, path, "decision")))
    return act, [b'key,decision\r\n1,keep\r\n\'=3,"remove"\r\n']


def measured(folder: Path) -> Target:
    return of_a_file(folder / "a.json", read_json), [
        b'{"a": [1, 2.5, null, "x"], "b": {"c": true}}'
    ]


def subsets(folder: Path) -> Target:
    seed = json.dumps(draw_subsets(12, 4).manifest()).encode()
    return of_a_file(folder / "a.json", Subsets.read), [seed]


def masks(folder: Path) -> Target:
    def model() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))

    net = turnover.attach(model(), ["mlp"], turnover.MaskSpec())
    with net.exposed(torch.arange(1)):
        net.model(torch.zeros(1, 4))
    act = of_a_file(folder / "masks.json", lambda path: Network.from_dict(model(), read_json(path)))
    return act, [json.dumps(net.to_dict()).encode()]


def small() -> ImageClassifierConfig:
    return ImageClassifierConfig("vgg11", width=2, hidden=4, head_units=8)


def weights(folder: Path) -> Target:
    path = folder / "seed.safetensors"
    whole = small().network(2)
    save_file(whole.state_dict(), path)
    shape = ImageClassifierConfig("vgg11", width=2, hidden=4, head_units=8, weights="a")
    model = shape.network(2)

    def act(given: Path) -> None:
        model.load_convolutions(str(given))
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())

    return of_a_file(folder / "a.safetensors", act), [path.read_bytes()]


def saved(folder: Path) -> Target:
    pipeline = ImagePipeline(small(), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    pipeline.save(folder, small().network(2), 2)
    path = folder / "classifier.json"
    return of_a_file(path, lambda _: load(folder)), [path.read_bytes()]


def rows(folder: Path) -> Target:
    pipeline = ImagePipeline(small(), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    np.save(folder / "train.npy", np.zeros((2, 32, 32, 3), np.uint8))
    lines = [{"key": str(i), "id": i, "label": "ab"[i], "image": "x"} for i in range(2)]
    raw = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return of_a_file(
        folder / "train.jsonl", lambda _: pipeline.read(folder, "train", ["a", "b"])
    ), [raw]


def stored(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    net = turnover.attach(model.eval(), ["mlp"], turnover.MaskSpec())
    influence = turnover.Influence(net, turnover.objectives.margin, "linear", ghosts=1000)
    batch = (torch.randn(3, 4, generator=generator), torch.tensor([0, 1, 0]))
    save(folder / "a.zarr", influence.estimate([batch], torch.arange(5)))
    return folder / "a.zarr"


def description(folder: Path) -> Target:
    path = stored(folder)
    root = path / "zarr.json"
    seed = root.read_bytes()

    def run(raw: bytes) -> None:
        with suppress(KeyError, TypeError, ValueError, AttributeError, RecursionError):
            document = json.loads(raw)
            raw = seal(document, manifest_of(document))  # a checksum that fits
        root.write_bytes(raw)
        turnover.open_result(path).load()

    return run, [seed]


def chunk(folder: Path) -> Target:
    path = stored(folder)
    file = next(one for one in sorted((path / "score" / "c").rglob("*")) if one.is_file())
    seed = file.read_bytes()
    return of_a_file(file, lambda _: turnover.open_result(path).load()), [seed]


TARGETS: dict[str, Callable[[Path], Target]] = {
    **{ending: table(ending) for ending in ("jsonl", "json", "csv", "parquet")},
    **{one.__name__: one for one in (image, arrays, image_table, options, decisions, measured)},
    **{one.__name__: one for one in (subsets, masks, weights, saved, rows, description, chunk)},
}


def grow(name: str, seconds: int) -> None:
    """Fuzz one target; does not return."""
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    act, seeds = TARGETS[name](folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        act(seed)  # a seed that is refused would show nothing
        (corpus / str(number)).write_bytes(seed)

    @atheris.instrument_func
    def one_input(raw: bytes) -> None:
        with suppress(turnover.InputError):
            act(raw)

    FOUND.mkdir(parents=True, exist_ok=True)
    limits = ["-timeout=20", "-rss_limit_mb=4096", "-max_len=20000"]
    kept = f"-artifact_prefix={FOUND}/{name}-"
    atheris.Setup(
        [sys.argv[0], f"-max_total_time={seconds}", kept, *limits, str(corpus)], one_input
    )
    atheris.Fuzz()


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def failures(names: list[str], seconds: int) -> Iterator[str]:
    for name in names:
        command = [sys.executable, __file__, "--one", "--seconds", str(seconds), name]
        done = subprocess.run(command, capture_output=True, text=True)
        runs = [line for line in done.stderr.splitlines() if line.startswith("Done ")]
        if done.returncode or not runs:
            say(f"{name}: FAILED\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
            yield name
        else:
            say(f"{name}: {runs[-1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    unknown = set(given.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    if given.one:
        grow(given.targets[0], given.seconds)
    failed = list(failures(given.targets or list(TARGETS), given.seconds))
    sys.exit(f"findings in {FOUND}: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
