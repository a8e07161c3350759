"""Gram by landmarks through Ray: the bits of one process, whatever is sent in vain and whoever dies."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import tiny
import turnover
from test_gram import cut
from test_gram_gradients import build
from test_gram_language import causal
from test_gram_stored import assert_same, everything, rows
from test_language_models import passages
from test_ray import PATHS, canceled, connected, tree
from turnover import Batch, Gram, Influence, InputError, objectives
from turnover.influence.gram import kernel
from turnover.influence.gram import stored as stored_module
from turnover.influence.gram.disk import Limits
from turnover.influence.gram.landmarks import Landmarked

ray = pytest.importorskip("ray", reason="needs ray: pip install 'turnover[ray]'")

ROWS = 300
SMALL = {"_ROWS": 40, "_BYTES": 2**14}


@pytest.fixture(scope="module")
def cluster():
    with connected():
        yield


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One thread, many small parts, and small chunks of stores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, value in SMALL.items():
        monkeypatch.setattr(kernel, name, value)
    monkeypatch.setattr(stored_module, "_CHUNK", 2**11)
    monkeypatch.setattr(ray, "cancel", canceled)
    yield
    torch.set_num_threads(threads)


class Small:
    """Makes parts small in a process that it is sent to."""

    def __reduce__(self):
        return made_small, ()


def made_small():
    for name, value in SMALL.items():
        setattr(kernel, name, value)
    return Small()


def sent(model, seed=0):
    """A model whose parts are small wherever it goes."""
    model = tiny.randomise(model, seed).eval()
    model.small = Small()
    return model


def models(count=1):
    return [sent(tiny.mlp(12, bias=True), seed) for seed in range(count)]


def batches(count=ROWS, size=7, *shape):
    x, y = tiny.features(count, *shape), tiny.labels(count)
    ids = torch.arange(count) + 50
    return [
        Batch(x[i : i + size], y[i : i + size], ids[i : i + size]) for i in range(0, count, size)
    ]


def targets(*shape):
    return Batch(tiny.features(5, *shape, seed=9), tiny.labels(5, seed=9))


def same_scores(one, other):
    assert_same(
        [one.scores, one.standard_error, one.train_ids],
        [other.scores, other.standard_error, other.train_ids],
    )


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"whiten": True},
        {"directions": 0, "residual": False, "ridge": "gcv"},
        {"exact": True},
    ],
)
def test_every_number_is_that_of_one_process(options, count, cluster, tmp_path):
    method = Gram(landmarks=30, **options)
    one, many = (Influence(models(count), method=method) for _ in range(2))
    for influence, engine in ((one, "process"), (many, "ray")):
        influence.fit(batches(), out=tmp_path / engine, engine=engine)
    assert tree(tmp_path / "ray") == tree(tmp_path / "process")
    many.fit(batches(), engine="ray")
    assert_same(everything(many, targets()), everything(one, targets()))
    for top in (4, None) if method.exact else (4,):
        found = many.estimate([targets()], top=top, engine="ray")
        same_scores(found, one.estimate([targets()], top=top))
        some = torch.arange(60, 130)
        found = many.estimate([targets()], some, top=top, engine="ray")
        same_scores(found, one.estimate([targets()], some, top=top))


@pytest.mark.long
def test_a_turnover_network_and_its_masks_go_along(cluster):
    def network():
        return turnover.attach(sent(tiny.mlp(12)), "mlp", turnover.MaskSpec(seed=1))

    for features in ("gradients", "masks"):
        method = Gram(landmarks=30, features=features)
        one = Influence(network(), method=method).fit(batches())
        many = Influence(network(), method=method).fit(batches(), engine="ray")
        assert_same(everything(many, targets()), everything(one, targets()))


@pytest.mark.long
@pytest.mark.parametrize("name", ["bert", "convs of every kind", "llama"])
def test_networks_of_many_kinds_go_along(name, cluster):
    if name == "llama":
        model, few, objective = causal("llama"), passages(6), objectives.completion
    else:
        (model, few), objective = build(name), objectives.margin
    model.small = Small()
    many = few.mapped(lambda values: torch.cat([values] * 20))
    train = Batch(many.inputs, many.labels, torch.arange(len(many)))
    found = []
    for engine in ("process", "ray"):
        influence = Influence(model, objective, Gram(landmarks=20))
        influence.fit(cut(train, 5), engine=engine)
        top = influence.estimate([few], top=4, engine=engine)
        found.append([*everything(influence, few), top.scores, top.train_ids])
    assert_same(*found)


@pytest.mark.long
@pytest.mark.parametrize("memory", [0, 2**30])
def test_landmarks_and_vectors_on_disk_go_along(memory, cluster):
    found = []
    for engine in ("process", "ray"):
        influence = Influence(models(), method=Gram(landmarks=60, whiten=True))
        influence._driver._limits = Limits(memory=memory)
        influence.fit(batches(), engine=engine)
        top = influence.estimate([targets()], top=4, engine=engine)
        found.append([*everything(influence, targets()), top.scores])
    assert_same(*found)


class Pooled(nn.Module):
    """Tokens of any number through linear layers: rows' gradients are as large as the rows are long."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 20), nn.Linear(20, tiny.CLASSES)

    def forward(self, x):
        return self.last(self.first(x).tanh()).mean(dim=1)


@pytest.mark.long
def test_parts_end_where_those_of_one_process_do_though_sizes_are_not_known_before(
    cluster, monkeypatch
):
    generator = torch.Generator().manual_seed(0)
    given = []
    for number, batch in enumerate(batches(200, 2)):
        tokens = int(torch.randint(1, 12, (1,), generator=generator))
        given.append(Batch(tiny.features(2, tokens, 6, seed=number), batch.labels, batch.ids))
    parts = []
    real = Landmarked.put

    def counted(self, kept, positions):
        parts[-1].append(len(positions))
        real(self, kept, positions)

    monkeypatch.setattr(Landmarked, "put", counted)
    made = []
    for engine in ("process", "ray"):
        parts.append([])
        influence = Influence(sent(Pooled()), method=Gram(landmarks=20))
        made.append(influence.fit(given, engine=engine))
    assert parts[0] == parts[1]
    assert len(set(parts[0])) > 1 and max(parts[0]) <= 20  # of 40 gradients, or of so many bytes
    aim, (one, many) = targets(3, 6), made
    assert_same(everything(many, aim), everything(one, aim))
    same_scores(many.estimate([aim], top=3, engine="ray"), one.estimate([aim], top=3))


class Odd(nn.Linear):
    """A linear layer that its rule is wrong for when it doubles what it gives."""

    doubles = False

    def forward(self, x):
        return super().forward(x) * (2 if self.doubles else 1)


class Switching(nn.Module):
    """Takes another way, through one more layer, for batches that begin with a large number."""

    def __init__(self):
        super().__init__()
        self.first, self.more = nn.Linear(6, 12), nn.Linear(12, 12)
        self.last = Odd(12, tiny.CLASSES)

    def forward(self, x):
        hidden = self.first(x).tanh()
        self.last.doubles = bool(x.max() > 9)
        if self.last.doubles:
            hidden = self.more(hidden).tanh()
        return self.last(hidden)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:turnover. gram knows no rule:UserWarning")
@pytest.mark.parametrize("special", [[16], [5, 7, 16, 30], [40, 41]])
def test_what_one_batch_shows_of_the_model_counts_for_all_later_ones_alone(special, cluster):
    given = batches()
    for number in special:
        given[number].inputs[:, 0] = 10.0
    drawn = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))[:20] // 7
    assert not set(special) & set(drawn.tolist())  # landmarks do not show it
    one = Influence(sent(Switching()), method=Gram(landmarks=20)).fit(given)
    many = Influence(sent(Switching()), method=Gram(landmarks=20)).fit(given, engine="ray")
    assert many._driver.general == one._driver.general == ("last.weight", "last.bias")
    assert_same(everything(many, targets()), everything(one, targets()))


class Deadly:
    """The margin, which takes a worker with it where it first comes upon some instance."""

    __name__ = "margin"

    def __init__(self, folder, times):
        self.folder, self.times, self.driver = folder, times, os.getpid()

    def __call__(self, outputs, batch):
        done = len(list(self.folder.iterdir()))
        if os.getpid() != self.driver and done < self.times and 250 in batch.ids:
            (self.folder / str(done)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return objectives.margin(outputs, batch)


@pytest.mark.long
def test_a_part_whose_worker_is_killed_is_computed_again(cluster, tmp_path):
    (tmp_path / "deaths").mkdir()
    found = []
    for times, engine in ((0, "process"), (2, "ray")):
        objective = Deadly(tmp_path / "deaths", times)
        influence = Influence(models(), objective, Gram(landmarks=30))
        influence.fit(batches(), engine=engine)
        found.append(everything(influence, targets()))
    assert len(list((tmp_path / "deaths").iterdir())) == 2
    assert_same(*found)


@pytest.mark.long
def test_what_is_wrong_in_a_task_is_said_as_in_one_process(cluster, tmp_path):
    given = batches()
    given[30].inputs[3] = float("nan")
    for engine in ("process", "ray"):
        with pytest.raises(InputError, match=r"NaN or infinite for rows \[3\]"):
            Influence(models(), method=Gram(landmarks=5)).fit(
                given, out=tmp_path / engine, engine=engine
            )
        assert 0 < rows(tmp_path / engine) < 210


class Failing:
    """Batches that end in an error in the third pass."""

    def __init__(self, given, after):
        self.given, self.after, self.passes = given, after, 0

    def __iter__(self):
        self.passes += 1
        for number, batch in enumerate(self.given):
            if self.passes == 3 and number == self.after:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.long
@pytest.mark.parametrize("first", ["process", "ray"])
def test_each_engine_continues_what_the_other_began(first, cluster, tmp_path):
    second = {"process": "ray", "ray": "process"}[first]
    Influence(models(), method=Gram(landmarks=30)).fit(batches(), out=tmp_path / "whole")
    place = tmp_path / "fit"
    for after in (25, 38):
        with pytest.raises(KeyboardInterrupt):
            Influence(models(), method=Gram(landmarks=30)).fit(
                Failing(batches(), after), out=place, engine=first
            )
    assert 0 < rows(place) < ROWS
    Influence(models(), method=Gram(landmarks=30)).fit(batches(), out=place, engine=second)
    assert tree(place) == tree(tmp_path / "whole")


SCRIPT = """
import sys, time
import torch
import test_gram_ray as here
from turnover.influence.gram import kernel, stored

torch.set_num_threads(1)
stored._CHUNK = 2**11
for name, value in here.SMALL.items():
    setattr(kernel, name, value)

class Slow:
    __name__ = "margin"
    def __call__(self, outputs, batch):
        time.sleep(0.02)
        return here.objectives.margin(outputs, batch)

def fit():
    influence = here.Influence(here.models(), Slow(), here.Gram(landmarks=30))
    influence.fit(here.batches(), out=sys.argv[1], engine=sys.argv[2])

if sys.argv[2] == "ray":
    with here.connected():
        fit()
else:
    fit()
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("first", "by"), [("process", "SIGKILL"), ("ray", "SIGKILL"), ("ray", "SIGINT")]
)
def test_a_fit_that_is_cut_off_is_continued_by_the_other_engine(first, by, cluster, tmp_path):
    second = {"process": "ray", "ray": "process"}[first]
    objective = Deadly(tmp_path, 0)  # of the same name, and no built-in one
    method = Gram(landmarks=30)
    Influence(models(), objective, method).fit(batches(), out=tmp_path / "whole")
    place = tmp_path / "fit"
    driver = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(place), first],
        env=os.environ | {"PYTHONPATH": PATHS},
        preexec_fn=tiny.interruptible,
    )
    limit = time.monotonic() + 120
    while not (place / "progress" / "rows").exists() or not rows(place):
        assert driver.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    driver.send_signal(signal.Signals[by])
    driver.wait(60)
    assert 0 < rows(place) < ROWS
    Influence(models(), objective, method).fit(batches(), out=place, engine=second)
    assert tree(place) == tree(tmp_path / "whole")


@pytest.mark.long
def test_it_shows_progress(cluster, capsys):
    influence = Influence(models(), method=Gram(landmarks=30), progress=True)
    influence.fit(batches(), engine="ray")
    assert "gram (landmarks): 100%" in capsys.readouterr().err


def test_what_ray_does_not_compute_is_refused_by_name(tmp_path):
    def given():
        raise AssertionError("looked at")
        yield

    every = Influence(models(), method="gram")
    with pytest.raises(InputError, match="the fit of landmarks alone"):
        every.fit(given(), engine="ray")
    with pytest.raises(InputError, match="unknown engine 'dask'; there are: process, ray"):
        every.fit(given(), engine="dask")
    with pytest.raises(InputError, match="num_gpus must be above 0 and at most 1"):
        every.fit(given(), num_gpus=2.0)
    every.fit(batches())
    with pytest.raises(InputError, match="does not compute gram of all pairs"):
        every.estimate(given(), engine="ray")
    with pytest.raises(InputError, match="gram keeps its scores in memory"):
        every.estimate(given(), out=tmp_path / "r", engine="ray")
    with pytest.raises(InputError, match='"auto" takes all pairs of 300 training instances'):
        Influence(models(), method=Gram(landmarks="auto")).fit(batches(), engine="ray")
    some = Influence(models(), method=Gram(landmarks=30)).fit(batches())
    with pytest.raises(InputError, match=r"these scores take none: give top="):
        some.estimate(given(), engine="ray")
    with pytest.raises(InputError, match="gram keeps its scores in memory"):
        some.estimate(given(), top=3, out=tmp_path / "r", engine="ray")
    linear = turnover.attach(tiny.mlp(12), "mlp")
    with pytest.raises(InputError, match="the fit of landmarks alone"):
        Influence(linear).fit(given(), engine="ray")
    assert not list(tmp_path.iterdir())
    assert np.isfinite(some.estimate([targets()]).scores).all()
