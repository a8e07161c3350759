"""Fits by landmarks that are kept: interrupted, continued, with further instances, with something else."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from test_gram import cut, problem
from turnover import Batch, Gram, Influence, InputError, objectives
from turnover.influence.gram import stored as stored_module
from turnover.results.store import save

ROWS = 60


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(stored_module, "_CHUNK", 2**9)


def everything(influence, targets):
    """All that a fit answers."""
    found = []
    for call in (
        lambda: influence.estimate([targets]),
        lambda: influence.estimate([targets], top=5),
        influence.self_influence,
        lambda: influence.aggregate([targets]),
    ):
        result = call()
        found += [result.scores, result.standard_error, result.train_ids]
    return found


def assert_same(one, other):
    for first, second in zip(one, other, strict=True):
        np.testing.assert_array_equal(first, second)


class Failing:
    """Batches that end in an error, in a pass from the third on."""

    def __init__(self, batches, after):
        self.batches, self.after, self.passes = batches, after, 0

    def __iter__(self):
        self.passes += 1
        for number, batch in enumerate(self.batches):
            if self.passes == 3 and number == self.after:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize("networks", [1, 2])
@pytest.mark.parametrize("after", [0, 1, 4, 8])
def test_an_interrupted_fit_continues_to_the_same_bits(tmp_path, after, networks, monkeypatch):
    from turnover.influence.gram import kernel

    monkeypatch.setattr(kernel, "_ROWS", 20)  # several parts
    models = [problem(ROWS, seed=seed)[0] for seed in range(networks)]
    _, train, targets = problem(ROWS)
    options, batches = Gram(landmarks=15), cut(train, 7)
    wanted = everything(Influence(models, method=options).fit(batches), targets)
    with pytest.raises(KeyboardInterrupt):
        Influence(models, method=options).fit(Failing(batches, after), out=tmp_path / "fit")
    begun = rows(tmp_path / "fit")
    assert begun < ROWS
    assert (begun > 0) == (after > 3)
    assert not (tmp_path / "fit" / "zarr.json").exists()
    again = Influence(models, method=options).fit(batches, out=tmp_path / "fit")
    assert_same(everything(again, targets), wanted)
    assert rows(tmp_path / "fit") == ROWS
    read = Influence(models, method=options).fit(batches, out=tmp_path / "fit")
    assert_same(everything(read, targets), wanted)


def rows(folder):
    return int((folder / "progress" / "rows").read_text())


def test_a_finished_fit_is_read_and_not_computed_again(tmp_path):
    model, train, targets = problem(ROWS)
    options, place = Gram(landmarks=15), tmp_path / "fit"
    wanted = everything(Influence(model, method=options).fit(cut(train, 7), out=place), targets)
    before = {path: path.stat().st_mtime_ns for path in sorted(place.rglob("*"))}
    seen = []
    handle = model.register_forward_hook(lambda *given: seen.append(len(given[2])))
    influence = Influence(model, method=options).fit(cut(train, 7), out=place)
    handle.remove()
    assert sum(seen) < 2 * ROWS  # the landmarks' gradients, and checks of the first batch
    assert_same(everything(influence, targets), wanted)
    # Exact products and other halves need nothing else of what is kept.
    Influence(model, method=Gram(landmarks=15, exact=True, resamples=4)).fit(
        cut(train, 7), out=place
    )
    assert {path: path.stat().st_mtime_ns for path in sorted(place.rglob("*"))} == before


def test_further_instances_are_added(tmp_path):
    model, train, targets = problem(ROWS)
    options, place, batches = Gram(landmarks=15), tmp_path / "fit", cut(train, 10)
    Influence(model, method=options).fit(batches[:3], out=place)
    step = Influence(model, method=options).fit(batches[:4], out=place)
    assert len(step.estimate([targets]).train_ids) == 40
    found = everything(Influence(model, method=options).fit(batches, out=place), targets)
    other = tmp_path / "other"
    Influence(model, method=options).fit(batches[:3], out=other)
    at_once = everything(Influence(model, method=options).fit(batches, out=other), targets)
    for one, two in zip(found, at_once, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5 * np.abs(two).max())
    every = Influence(model, method="gram").fit(batches).estimate([targets]).scores
    for one, two in zip(found[0], every, strict=True):
        assert np.corrcoef(one, two)[0, 1] > 0.8
    with pytest.raises(InputError, match="begun with 60 training instances, and 40 are given"):
        Influence(model, method=options).fit(batches[:4], out=place)


def test_landmarks_by_themselves_are_those_of_the_beginning(tmp_path):
    model, train, targets = problem(ROWS)
    place = tmp_path / "fit"
    options = Gram(landmarks="auto")
    Influence(model, method=options).fit(cut(train, 10)[:3], out=place)
    found = Influence(model, method=options).fit(cut(train, 10), out=place).estimate([targets])
    other = Influence(model, method=Gram(landmarks=30))
    other.fit(cut(train, 10)[:3], out=tmp_path / "other")
    other.fit(cut(train, 10), out=tmp_path / "other")
    np.testing.assert_array_equal(found.scores, other.estimate([targets]).scores)


def test_an_addition_that_is_interrupted_continues(tmp_path, monkeypatch):
    from turnover.influence.gram import kernel

    monkeypatch.setattr(kernel, "_ROWS", 20)
    model, train, targets = problem(ROWS)
    options, batches = Gram(landmarks=15), cut(train, 10)
    for name in ("whole", "cut"):
        Influence(model, method=options).fit(batches[:2], out=tmp_path / name)
    wanted = everything(
        Influence(model, method=options).fit(batches, out=tmp_path / "whole"), targets
    )
    with pytest.raises(KeyboardInterrupt):
        Influence(model, method=options).fit(Failing(batches, 5), out=tmp_path / "cut")
    assert 20 < rows(tmp_path / "cut") < ROWS
    found = Influence(model, method=options).fit(batches, out=tmp_path / "cut")
    assert_same(everything(found, targets), wanted)


SCRIPT = """
import sys, time
import torch
from turnover import Batch, Gram, Influence
from turnover.influence.gram import kernel, stored

stored._CHUNK, kernel._ROWS = 2**9, 20
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).eval()
x, y = torch.randn(400, 6), torch.arange(400) % 3

class Slow:
    passes = 0

    def __iter__(self):
        Slow.passes += 1
        for start in range(0, 400, 10):
            time.sleep(0.02 if Slow.passes == 3 and len(sys.argv) > 2 else 0)
            yield Batch(x[start : start + 10], y[start : start + 10], torch.arange(start, start + 10))

influence = Influence(model, method=Gram(landmarks=30)).fit(Slow(), out=sys.argv[1])
print(influence.estimate([Batch(x[:4], y[:4])]).scores.tobytes().hex())
"""


def test_a_killed_fit_continues_to_the_same_bits(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))

    def run(*arguments):
        return subprocess.run(
            [sys.executable, script, *arguments], check=True, capture_output=True, text=True
        ).stdout

    wanted = run(tmp_path / "whole")
    place = tmp_path / "killed"
    for least in (40, 160):
        process = subprocess.Popen([sys.executable, script, place, "slowly"])
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not reached(place, least):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert least <= rows(place) < 400
    assert run(place) == wanted


def reached(place: Path, least: int) -> bool:
    found = place / "progress" / "rows"
    return found.exists() and int(found.read_text()) >= least


def test_what_is_there_must_be_the_same(tmp_path):
    model, train, _ = problem(ROWS)
    other, _, _ = problem(ROWS, seed=3)
    options, place = Gram(landmarks=15), tmp_path / "fit"
    Influence(model, method=options).fit(cut(train, 7), out=place)
    inputs, labels = train.inputs.clone(), train.labels.clone()
    inputs[31] += 1
    labels[44] = (labels[44] + 1) % 3

    def doubled(outputs, batch):
        return 2 * objectives.margin(outputs, batch)

    doubled.__name__ = "margin"
    order = torch.arange(ROWS).flip(0)
    for change, said in (
        (lambda: (other, objectives.margin, options, train), "network is"),
        (lambda: (model, objectives.cross_entropy, options, train), "objective is"),
        (lambda: (model, objectives.margin, Gram(landmarks=16), train), "options landmarks"),
        (lambda: (model, objectives.margin, Gram(landmarks=15, ridge=0.5), train), "options ridge"),
        (
            lambda: (model, objectives.margin, options, Batch(inputs, train.labels, train.ids)),
            "instance 31 has other contents",
        ),
        (
            lambda: (model, objectives.margin, options, Batch(train.inputs, labels, train.ids)),
            "instance 44 has other contents",
        ),
        (
            lambda: (model, objectives.margin, options, train.mapped(lambda v: v[order])),
            "instance 0 has another id",
        ),
    ):
        network, objective, method, given = change()
        influence = Influence(network, objective, method)
        with pytest.raises(InputError, match=said.replace("options ", r"options\.?.*")):
            influence.fit(cut(given, 7), out=place)
    plain = Gram(landmarks=15, directions=0, residual=False)
    named = tmp_path / "named"
    Influence(model, objectives.margin, plain).fit(cut(train, 7), out=named)
    with pytest.raises(InputError, match="landmarks have other gradients"):
        Influence(model, doubled, plain).fit(cut(train, 7), out=named)


def test_what_is_not_a_fit_is_refused(tmp_path):
    model, train, targets = problem(ROWS)
    with pytest.raises(InputError, match="fit keeps what landmarks need"):
        Influence(model, method="gram").fit(cut(train, 7), out=tmp_path / "fit")
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit" / "mine.txt").write_text("mine")
    influence = Influence(model, method=Gram(landmarks=15))
    with pytest.raises(InputError, match="no fit of gram"):
        influence.fit(cut(train, 7), out=tmp_path / "fit")
    assert (tmp_path / "fit" / "mine.txt").read_text() == "mine"
    result = influence.fit(cut(train, 7)).estimate([targets])
    save(tmp_path / "result", result)
    with pytest.raises(InputError, match="no fit of gram, but a result"):
        influence.fit(cut(train, 7), out=tmp_path / "result")


@pytest.mark.parametrize("name", ["vectors0", "own0", "map0", "id"])
def test_damage_is_named(tmp_path, name):
    model, train, _ = problem(ROWS)
    place = tmp_path / "fit"
    Influence(model, method=Gram(landmarks=15)).fit(cut(train, 7), out=place)
    chunk = max((one for one in (place / name / "c").rglob("*") if one.is_file()), key=str)
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 0xFF
    chunk.write_bytes(content)
    with pytest.raises(InputError, match=f"{name}.* is damaged"):
        Influence(model, method=Gram(landmarks=15)).fit(cut(train, 7), out=place)
    chunk.unlink()
    with pytest.raises(InputError, match=f"{name}.* is missing"):
        Influence(model, method=Gram(landmarks=15)).fit(cut(train, 7), out=place)


@pytest.mark.parametrize("until", [1, 2])
def test_batches_in_another_order_cannot_be_kept(tmp_path, until):
    model, train, _ = problem(ROWS)
    batches = cut(train, 10)

    class Shuffled:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(batches if self.passes <= until else batches[::-1])

    with pytest.raises(InputError, match="shuffle=False"):
        Influence(model, method=Gram(landmarks=15)).fit(Shuffled(), out=tmp_path / "fit")
    found = Influence(model, method=Gram(landmarks=15)).fit(batches, out=tmp_path / "fit")
    assert rows(tmp_path / "fit") == ROWS
    assert len(found.self_influence().scores) == ROWS


def test_only_one_process_writes(tmp_path):
    model, train, _ = problem(ROWS)
    place = tmp_path / "fit"

    class Twice:
        passes = 0

        def __iter__(self):
            self.passes += 1
            if self.passes == 3:
                with pytest.raises(InputError, match=r"another process|being written"):
                    Influence(model, method=Gram(landmarks=15)).fit(cut(train, 7), out=place)
            return iter(cut(train, 7))

    Influence(model, method=Gram(landmarks=15)).fit(Twice(), out=place)


def test_other_file_systems_keep_fits_too():
    model, train, targets = problem(ROWS)
    options, place = Gram(landmarks=15), "memory://kept/fit"
    wanted = everything(Influence(model, method=options).fit(cut(train, 7)), targets)
    with pytest.raises(KeyboardInterrupt):
        Influence(model, method=options).fit(Failing(cut(train, 7), 6), out=place)
    for _ in range(2):
        found = Influence(model, method=options).fit(cut(train, 7), out=place)
        assert_same(everything(found, targets), wanted)


PEAK = """
import sys
import torch
from benchmarks.memory import peak_gib
from turnover import Batch, Gram, Influence
from turnover.influence.gram import features, kernel, stored
from turnover.influence.gram.disk import Limits

torch.set_num_threads(1)
features._CHUNK, kernel._ROWS, stored._CHUNK = 2**22, 2000, 2**20
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3)).eval()

class Drawn:
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        for start in range(0, self.rows, 1000):
            x = torch.randn((1000, 16), generator=torch.Generator().manual_seed(start))
            yield Batch(x, (x.sum(dim=1) > 0).long(), torch.arange(start, start + 1000))

def run(rows, name):
    influence = Influence(model, method=Gram(landmarks=150))
    influence._driver._limits = Limits(memory=2**22)
    influence.fit(Drawn(rows), out=f"{sys.argv[2]}/{name}")
    influence.estimate(Drawn(1000), top=10)
    influence.self_influence()

run(3000, "warm")
run(int(sys.argv[1]), "fit")
print(int(peak_gib() * 2**30))
"""


@pytest.mark.long
def test_memory_hardly_grows_with_the_instances(tmp_path):
    """Vectors alone would take 1,200 bytes each."""
    few, many = 30_000, 150_000
    peaks = []
    for rows in (few, many):
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PEAK), str(rows), str(tmp_path / str(rows))],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[1],
            env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        )
        peaks.append(int(run.stdout))
    assert peaks[1] - peaks[0] < 300 * (many - few), peaks
