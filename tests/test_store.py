"""Results on disk: the same bits back, whatever happens while they are written."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr
from fsspec import AbstractFileSystem, register_implementation
from fsspec.implementations.local import LocalFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from turnover import InputError
from turnover.results import location
from turnover.results.arrays import Arrays, Variable
from turnover.results.calibration import GhostPool, NoiseFloor
from turnover.results.reader import open_result
from turnover.results.result import Result
from turnover.results.store import save, writing

TARGETS, TRAIN, GHOSTS, RANKS, ROWS = 22, 50, 12, 6, 4
STEP = 2 * ROWS
TRAIN_IDS = np.arange(1000, 1000 + TRAIN) * 7
LABELS = np.array([f"class {i % 3}" for i in range(TRAIN)])
IDENTITY = {
    "method": "linear",
    "objective": "margin",
    "sites": ["fc1", "fc2"],
    "network": "ab+cd",
    "considered": TRAIN,
    "masks": {"seed": 0},
}
DENSE = {
    "score": Variable(("target", "train"), "float32", (ROWS, 16)),
    "standard_error": Variable(("target", "train"), "float32", (ROWS, 16)),
    "exact": Variable(("target", "train"), "bool", (ROWS, 16)),
    "ghost": Variable(("target", "ghost"), "float32", (ROWS, GHOSTS)),
    "recall": Variable(("target",), "float32", (ROWS,)),
}
TOP = {
    "score": Variable(("target", "rank"), "float32", (ROWS, RANKS)),
    "train_id": Variable(("target", "rank"), "int64", (ROWS, RANKS)),
    "ghost": Variable(("target", "ghost"), "float32", (ROWS, GHOSTS)),
}


class Shared(AbstractFileSystem):
    """A file system of several processes that is not the local one."""

    protocol = "shared"
    files = LocalFileSystem(auto_mkdir=True)

    def ls(self, path, detail=True, **options):
        return self.files.ls(path, detail=detail)

    def info(self, path, **options):
        return self.files.info(path)

    def rm(self, path, recursive=False, maxdepth=None):
        self.files.rm(path, recursive=recursive)

    def modified(self, path):
        return self.files.modified(path)

    def cat_file(self, path, start=None, end=None, **options):
        return self.files.cat_file(path, start, end)

    def pipe_file(self, path, value, mode="overwrite", **options):
        self.files.pipe_file(path, value)


class Timeless(Shared):
    """One that does not say when something was written."""

    protocol = "timeless"

    def modified(self, path):
        raise NotImplementedError


register_implementation("shared", Shared, clobber=True)
register_implementation("timeless", Timeless, clobber=True)


def values_of(variables):
    """What every variable holds, the same in each process."""
    rng = np.random.default_rng(0)
    lengths = {"target": TARGETS, "train": TRAIN, "ghost": GHOSTS, "rank": RANKS}
    values = {}
    for name, variable in variables.items():
        shape = tuple(lengths[dim] for dim in variable.dims)
        values[name] = rng.normal(size=shape).astype(np.float32)
        if variable.dtype == "int64":
            values[name] = rng.integers(0, 9, shape)
        if variable.dtype == "bool":
            values[name] = np.zeros(shape, dtype=bool)
    return values


def digests(start, stop, salt=0):
    return np.arange(start + 1, stop + 1, dtype=np.uint64) * np.uint64(2**40 + 1) + np.uint64(salt)


def arguments(variables=None, **changed):
    given = {
        "identity": IDENTITY,
        "variables": variables or DENSE,
        "sizes": {"train": TRAIN, "ghost": GHOSTS, "rank": RANKS},
        "coordinates": {"train": ("train", TRAIN_IDS), "train_label": ("train", LABELS)},
        "kind": "top" if variables == TOP else "dense",
    }
    return given | changed


def write(
    url, variables=None, *, blocks=None, targets=TARGETS, salt=0, ids=True, pause=0.0, **changed
):
    """Write a store as an estimate does; returns how many regions were computed."""
    variables = variables or DENSE
    values, computed = values_of(variables), 0
    with writing(url, **arguments(variables, **changed)) as writer:
        for start in range(0, targets, STEP)[:blocks]:
            stop = min(start + STEP, targets)
            known = np.arange(start, stop)
            writer.announce(
                start,
                digests(start, stop, salt),
                known if ids else None,
                known % 3 if ids else None,
            )
            if writer.complete:
                continue
            rows = slice(start, stop)
            for name, variable in variables.items():
                width = values[name].shape[1] if len(variable.dims) > 1 else None
                regions = [(rows,)]
                if width:
                    regions = [(rows, slice(i, min(i + 32, width))) for i in range(0, width, 32)]
                for region in regions:
                    found = writer.read(name, region)
                    if found is None:
                        time.sleep(pause)
                        writer.write(name, region, values[name][region])
                        computed += 1
                    else:
                        np.testing.assert_array_equal(found, values[name][region])
        if blocks is None:
            writer.finish(targets)
    return computed


def expected(variables=None, **changed):
    values = values_of(variables or DENSE)
    pool = GhostPool()
    floor = pool.add(values["ghost"])
    fields = {
        "scores": values["score"],
        "floor": floor,
        "null": pool.null(),
        "train_ids": values.get("train_id", TRAIN_IDS),
        "target_ids": np.arange(TARGETS),
        **{key: values.get(key) for key in ("standard_error", "exact", "recall")},
        **{key: IDENTITY[key] for key in ("method", "objective", "network", "considered")},
        "sites": tuple(IDENTITY["sites"]),
    }
    return Result(**(fields | changed))


def files(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in files(folder)}


def results():
    """One result in memory of every shape."""
    dense, top = expected(), expected(TOP)
    floor = dense.floor
    aggregate = {"scores": dense.scores[0], "floor": NoiseFloor(floor.mean[0], floor.sd[0])}
    one_each = {
        "scores": dense.scores[:, 0],
        "train_ids": TRAIN_IDS[:TARGETS],
        "considered": TARGETS,
    }
    plain = {"target_ids": None, "standard_error": None, "exact": None, "recall": None}
    return {
        "dense": dense,
        "dense without ids": expected(target_ids=None),
        "nothing selected": dense.select(np.zeros(TRAIN, dtype=bool)),
        "top": top,
        "aggregate": expected(**aggregate, **plain),
        "self": expected(**one_each, **plain),
    }


@pytest.fixture(params=["path", "file", "memory"])
def url(request, tmp_path):
    return {
        "path": tmp_path / "folder" / "result.zarr",
        "file": f"file://{tmp_path}/result.zarr",
        "memory": f"memory://{uuid.uuid4().hex}/result.zarr",
    }[request.param]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "result.zarr"
    write(folder)
    return folder


@pytest.mark.parametrize("name", results())
def test_a_saved_result_comes_back_bit_for_bit(name, url):
    result = results()[name]
    save(url, result)
    stored = open_result(url)
    tiny.assert_same(stored.load(), result)
    assert stored.kind == ("dense" if name == "nothing selected" else name.split()[0])
    assert len(stored) == len(result.scores)


def test_saving_again_replaces_the_result_and_leaves_nothing_else(tmp_path):
    save(tmp_path / "one.zarr", results()["dense"])
    save(tmp_path / "one.zarr", results()["top"])
    tiny.assert_same(open_result(tmp_path / "one.zarr").load(), results()["top"])
    assert [path.name for path in tmp_path.iterdir()] == ["one.zarr"]


@pytest.mark.parametrize("variables", [DENSE, TOP], ids=["dense", "top"])
def test_a_result_written_in_blocks_is_the_result_in_memory(variables, url):
    write(url, variables)
    stored = open_result(url)
    tiny.assert_same(stored.load(), expected(variables))
    assert len(stored) == TARGETS
    np.testing.assert_array_equal(stored.target_ids, np.arange(TARGETS))
    np.testing.assert_array_equal(stored.train_ids, expected(variables).train_ids)


@pytest.mark.parametrize("chosen", [slice(3, 17, 5), [21, 0, -1, 5, 5], [], slice(None)])
@pytest.mark.parametrize("variables", [DENSE, TOP], ids=["dense", "top"])
def test_rows_are_those_of_the_whole_result(chosen, variables, url):
    write(url, variables)
    whole, some = expected(variables), open_result(url).load(chosen)
    np.testing.assert_array_equal(some.scores, whole.scores[chosen])
    np.testing.assert_array_equal(some.target_ids, whole.target_ids[chosen])
    np.testing.assert_array_equal(some.q, whole.q[chosen])


@pytest.mark.parametrize("chosen", [[TARGETS], [-TARGETS - 1], [0.5], [[1]]])
def test_rows_that_do_not_exist_are_refused(chosen, finished):
    with pytest.raises(InputError, match="targets"):
        open_result(finished).load(chosen)


def test_a_part_of_a_variable_is_that_of_the_whole(finished):
    stored = open_result(finished)
    part = stored.part("score", slice(3, 19), slice(1, 3))
    np.testing.assert_array_equal(part, expected().scores[3:19, 1:3])
    np.testing.assert_array_equal(stored.part("train"), expected().train_ids)
    with pytest.raises(InputError, match=r"has no scores; it has .*score"):
        stored.part("scores")


def test_a_result_without_targets_has_none_to_choose(tmp_path):
    save(tmp_path / "self.zarr", results()["self"])
    with pytest.raises(InputError, match="no targets to choose from"):
        open_result(tmp_path / "self.zarr").load([0])


def test_xarray_opens_it_with_labels(finished):
    plain = xarray.open_zarr(finished)
    for data in (plain, open_result(finished).dataset):
        assert set(data.coords) == {"target", "target_label", "train", "train_label"}
        assert data.score.dims == ("target", "train") and data.score.dtype == np.float32
        assert data.train_label.values.tolist() == LABELS.tolist()
        assert float(data.score.sel(target=3, train=7007)) == expected().scores[3, 1]
        assert data.noise_floor.dims == data.ghost_mean.dims == ("target",)
        np.testing.assert_array_equal(data.exact, expected().exact)
        assert data.attrs["method"] == "linear" and data.attrs["sites"] == ["fc1", "fc2"]
    np.testing.assert_array_equal(plain.score, expected().scores)


def test_targets_without_ids_have_none(tmp_path):
    write(tmp_path / "r.zarr", ids=False)
    stored = open_result(tmp_path / "r.zarr")
    assert stored.target_ids is None and stored.load().target_ids is None
    assert set(stored.dataset.coords) == {"train", "train_label"}
    tiny.assert_same(stored.load(), expected(target_ids=None))


def test_aggregates_and_rows_of_training_instances_can_be_written_in_blocks(tmp_path):
    values = values_of(DENSE)
    pool = GhostPool()
    floor = pool.add(values["ghost"][:1])
    with writing(
        tmp_path / "aggregate.zarr",
        **arguments(
            {
                "score": Variable(("train",), "float32", (16,)),
                "ghost": Variable(("ghost",), "float32", (GHOSTS,)),
            },
            kind="aggregate",
        ),
    ) as writer:
        writer.write("score", (), values["score"][0])
        writer.write("ghost", (), values["ghost"][0])
        writer.finish()
    loaded = open_result(tmp_path / "aggregate.zarr").load()
    np.testing.assert_array_equal(loaded.scores, values["score"][0])
    assert loaded.floor.mean == floor.mean[0] and loaded.floor.sd == floor.sd[0]
    np.testing.assert_array_equal(loaded.null.values, pool.null().values)

    own = {
        "score": Variable(("train",), "float32", (ROWS,)),
        "ghost": Variable(("train", "ghost"), "float32", (ROWS, GHOSTS)),
    }
    sizes = {"ghost": GHOSTS}
    with writing(tmp_path / "self.zarr", IDENTITY, own, sizes, {}, "self") as writer:
        for start in range(0, TARGETS, ROWS):
            rows = slice(start, min(start + ROWS, TARGETS))
            writer.announce(start, digests(start, rows.stop), TRAIN_IDS[rows])
            writer.write("score", (rows,), values["score"][rows, 0])
            writer.write("ghost", (rows,), values["ghost"][rows])
        writer.finish(TARGETS)
    loaded = open_result(tmp_path / "self.zarr").load()
    np.testing.assert_array_equal(loaded.train_ids, TRAIN_IDS[:TARGETS])
    np.testing.assert_array_equal(loaded.floor.sd, expected().floor.sd)
    np.testing.assert_array_equal(loaded.null.values, expected().null.values)


def test_a_store_that_was_cut_off_keeps_what_it_has(url):
    whole = write(f"memory://{uuid.uuid4().hex}/whole")
    first = write(url, blocks=2)
    with pytest.raises(InputError, match="not finished: repeat the call"):
        open_result(url)
    assert write(url) == whole - first
    tiny.assert_same(open_result(url).load(), expected())


def child(url, pause):
    code = f"import test_store; test_store.write({str(url)!r}, pause={pause})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["src", "tests"])}
    root = Path(__file__).parents[1]
    return subprocess.Popen([sys.executable, "-c", code], cwd=root, env=environment)


def wait_for(begun):
    limit = time.monotonic() + 60
    while not begun():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_killed_at_any_moment_it_ends_as_if_never_cut_off(tmp_path, finished):
    folder, rng = tmp_path / "result.zarr", random.Random(0)
    for _ in range(4):
        had = len(files(folder))
        process = child(folder, pause=0.03)
        wait_for(lambda had=had: len(files(folder)) > had)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
    (folder / "score" / "c").mkdir(parents=True, exist_ok=True)
    (folder / "score" / "c" / "0.0123.partial").write_bytes(b"cut off")
    write(folder)
    assert tree(folder) == tree(finished)


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
def test_two_processes_do_not_write_one_result(remote, tmp_path, monkeypatch):
    folder = tmp_path / "result.zarr"
    url = f"shared://{folder}" if remote else folder
    process = child(url, pause=60)
    try:
        wait_for(lambda: list(folder.glob("score/zarr.json")))
        with pytest.raises(InputError, match="being written by"):
            write(url)
        with pytest.raises(InputError, match="being written by"):
            save(url, expected())
    finally:
        process.kill()
        process.wait()
    if remote:  # nobody tells that the holder is gone, but its silence
        with pytest.raises(InputError, match=f"process {process.pid} .* or, if it is gone, "):
            write(url)
        monkeypatch.setattr(location, "_LEASE_SECONDS", 0)
    write(url)
    tiny.assert_same(open_result(url).load(), expected())


def test_without_times_a_lease_that_was_left_has_to_be_deleted(tmp_path, monkeypatch):
    folder = tmp_path / "result"
    url = f"timeless://{folder}"
    process = child(url, pause=60)
    wait_for(lambda: list(folder.glob("score/zarr.json")))
    process.kill()
    process.wait()
    monkeypatch.setattr(location, "_LEASE_SECONDS", 0)
    with pytest.raises(InputError, match=rf"process {process.pid} .* gone, delete .*lease$"):
        write(url)
    (folder / location.LEASE).unlink()
    write(url)
    tiny.assert_same(open_result(url).load(), expected())


def test_a_writer_that_was_silent_finds_itself_replaced(monkeypatch):
    url = f"memory://{uuid.uuid4().hex}/result"
    monkeypatch.setattr(location, "_RENEW_SECONDS", 0)
    with writing(url, **arguments()) as silent:
        monkeypatch.setattr(location, "_LEASE_SECONDS", 0)
        taken_over = pytest.raises(InputError, match="was taken over by process")
        with writing(url, **arguments()), taken_over:
            silent.announce(0, digests(0, STEP))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"identity": IDENTITY | {"objective": "loss"}}, 'objective is "margin" there, "loss"'),
        ({"identity": IDENTITY | {"masks": {"seed": 1}}}, "masks.seed is 0 there, 1 here"),
        ({"identity": IDENTITY | {"top": 3}}, "top is null there, 3 here"),
        ({"sizes": {"train": TRAIN, "ghost": 99, "rank": RANKS}}, "sizes ghost is 12 there, 99"),
        ({"kind": "top"}, "kind is"),
        ({"coordinates": {"train": ("train", TRAIN_IDS + 1)}}, "coordinates train "),
        ({"coordinates": {"train": ("train", TRAIN_IDS)}}, "coordinates train_label "),
        (
            {"variables": DENSE | {"recall": Variable(("target",), "float64", (ROWS,))}},
            "variables recall dtype",
        ),
    ],
)
@pytest.mark.parametrize("blocks", [1, None], ids=["begun", "finished"])
def test_another_result_is_not_written_into_it(changed, message, blocks, tmp_path):
    folder = tmp_path / "result.zarr"
    write(folder, blocks=blocks)
    before = tree(folder)
    with pytest.raises(InputError, match=message), writing(folder, **arguments(**changed)):
        pass
    assert tree(folder) == before


@pytest.mark.parametrize("blocks", [2, None], ids=["begun", "finished"])
def test_other_targets_are_refused(blocks, tmp_path):
    folder = tmp_path / "result.zarr"
    write(folder, blocks=blocks)
    before = tree(folder)
    for other in ({"salt": 1}, {"ids": False}, {"targets": 5}, {"targets": 8}, {"targets": 13}):
        with pytest.raises(InputError, match=r"begun with (other|more than 8) targets"):
            write(folder, **other)
    if blocks is None:
        with pytest.raises(InputError, match="begun with other targets"):
            write(folder, targets=30)
    assert {**tree(folder), **before} == tree(folder)


def test_more_targets_than_a_ragged_block_had_are_refused(tmp_path):
    write(tmp_path / "result.zarr", targets=5, blocks=1)
    with pytest.raises(InputError, match="begun with other targets: target 5 differs"):
        write(tmp_path / "result.zarr", targets=6)


def test_nothing_is_touched_once_complete(finished):
    stamps = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert write(finished) == 0
    with writing(finished, **arguments()) as writer:
        assert writer.complete
        writer.finish(TARGETS)
        with pytest.raises(ValueError, match="is complete"):
            writer.write("score", (), expected().scores)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == stamps
    assert [path.name for path in finished.parent.iterdir()] == [finished.name]


def test_a_block_that_was_forgotten_is_noticed(tmp_path):
    with writing(tmp_path / "r.zarr", **arguments()) as writer:
        writer.announce(0, digests(0, ROWS))
        with pytest.raises(InputError, match="score/c/0/0 is missing"):
            writer.finish(ROWS)
    none = pytest.raises(InputError, match="no targets")
    with writing(tmp_path / "s.zarr", **arguments()) as writer, none:
        writer.finish(0)


def test_regions_that_cut_chunks_and_other_types_are_refused(tmp_path):
    with writing(tmp_path / "r.zarr", **arguments()) as writer:
        writer.announce(0, digests(0, STEP))
        block = np.zeros((STEP, 8), dtype=np.float32)
        with pytest.raises(ValueError, match="cuts a chunk of 16"):
            writer.write("score", (slice(0, STEP), slice(0, 8)), block)
        with pytest.raises(ValueError, match="float64"):
            writer.write("ghost", (slice(0, STEP),), np.zeros((STEP, GHOSTS)))
        with pytest.raises(ValueError, match="after 8"):
            writer.announce(16, digests(16, 20))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("a b", TRAIN_IDS, "letters, digits and _"),
        ("score", TRAIN_IDS, "letters, digits and _"),
        ("short", TRAIN_IDS[1:], "a value for each of 50"),
        ("things", np.array([{}] * TRAIN), "numbers or strings"),
        ("dates", np.zeros(TRAIN, dtype="M8[s]"), "numbers or strings"),
    ],
)
def test_coordinates_that_cannot_be_stored_are_refused(name, values, message, tmp_path):
    coordinates = {"train": ("train", TRAIN_IDS), name: ("train", values)}
    refused = pytest.raises(InputError, match=message)
    with refused, writing(tmp_path / "r.zarr", **arguments(coordinates=coordinates)):
        pass
    assert not list(tmp_path.iterdir())


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False), st.sampled_from(["flip", "truncate", "empty", "delete"]))
def test_damage_is_named_or_does_no_harm(finished, tmp_path, rng, how):
    folder = tmp_path / uuid.uuid4().hex
    shutil.copytree(finished, folder)
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    raw = bytearray(path.read_bytes())
    if how == "flip":
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes({"truncate": raw[: len(raw) // 2], "empty": b""}.get(how, raw))
    if how == "delete":
        path.unlink()
    name = path.relative_to(folder)
    # What load() does not read: coordinates, and what only zarr without consolidated metadata reads.
    unread = name.parts[0] in {"train_label", "target_label", "ghost", "progress"}
    if unread or (path.name == "zarr.json" and len(name.parts) == 2):
        tiny.assert_same(open_result(folder).load(), expected())
    else:
        with pytest.raises(InputError, match=re.escape(str(folder))) as caught:
            open_result(folder).load()
        if path.name != "zarr.json":
            assert f"{name} is " in str(caught.value)
            assert "delete the store and estimate again" in str(caught.value)
    shutil.rmtree(folder)


@pytest.mark.parametrize("damage", [b"", b"{", bytes(100)])
def test_a_damaged_block_is_named_when_going_on(damage, tmp_path):
    folder = tmp_path / "result.zarr"
    write(folder, blocks=2)
    chunk = folder / "score" / "c" / "2" / "1"
    chunk.write_bytes(damage)
    with pytest.raises(InputError, match=r"score/c/2/1 is damaged .* delete that file and run"):
        write(folder)
    chunk.unlink()
    write(folder)
    tiny.assert_same(open_result(folder).load(), expected())


REPLACING = """
import sys, test_store
every = [test_store.expected(v) for v in (test_store.DENSE, test_store.TOP)]
while True:
    for result in every:
        test_store.save(sys.argv[1], result)
"""


def test_a_reader_gets_one_result_or_is_told_that_it_was_replaced(tmp_path):
    folder = tmp_path / "result.zarr"
    save(folder, expected())
    whole = {"dense": expected(), "top": expected(TOP)}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["src", "tests"])}
    command = [sys.executable, "-c", REPLACING, str(folder)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], env=environment)
    found, refused = set(), 0
    limit = time.monotonic() + 60
    try:
        while refused < 3 or len(found) < 2:
            assert time.monotonic() < limit and process.poll() is None
            try:
                stored = open_result(folder)
                tiny.assert_same(stored.load(), whole[stored.kind])
                found.add(stored.kind)
            except InputError as error:
                gone = "was replaced or removed|there is no result|is not a turnover result"
                assert re.search(gone, str(error)), error  # noqa: PT017
                refused += 1
    finally:
        process.kill()
        process.wait()


def test_a_result_of_other_values_is_another_one_wherever_it_is(url):
    other = expected(scores=expected().scores + 1)
    save(url, expected())
    stored = open_result(url)
    save(url, other)
    for again in (stored.load, lambda: stored.part("score"), lambda: stored.train_ids):
        with pytest.raises(InputError, match="was replaced or removed after it was opened; open"):
            again()
    tiny.assert_same(open_result(url).load(), other)


def test_a_chunk_that_goes_after_the_listing_is_not_read_as_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "result.zarr"
    write(folder)
    stored, fetch = open_result(folder), Arrays.fetch

    def late(arrays, name, bounds):
        (folder / "score" / "c" / "1" / "2").unlink(missing_ok=True)
        return fetch(arrays, name, bounds)

    monkeypatch.setattr(Arrays, "fetch", late)
    with pytest.raises(InputError, match="score/c/1/2 is missing"):
        stored.load()


def test_what_is_not_a_result_is_refused_and_left_alone(tmp_path):
    zarr.create_group(tmp_path / "foreign.zarr", zarr_format=3).create_array(
        "score", shape=(3,), dtype="float32"
    )
    zarr.create_group(tmp_path / "old.zarr", zarr_format=2)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file.zarr").write_text("text")
    before = tree(tmp_path)
    for name in ("foreign.zarr", "old.zarr", "thesis", "file.zarr"):
        for act in (open_result, write, lambda folder: save(folder, expected())):
            with pytest.raises(InputError, match=r"not a (turnover )?result"):
                act(tmp_path / name)
    with pytest.raises(InputError, match="there is no result"):
        open_result(tmp_path / "missing.zarr")
    with pytest.raises(InputError, match="cannot be opened"):
        open_result("nosuchprotocol://x/y")
    locks = {f".{name}.lock" for name in ("foreign.zarr", "old.zarr", "thesis", "file.zarr")}
    assert {k: v for k, v in tree(tmp_path).items() if k not in locks} == before


def test_a_later_format_says_so(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "later.zarr")
    root = tmp_path / "later.zarr" / "zarr.json"
    document = json.loads(root.read_text())
    document["attributes"]["turnover"]["format"] = 2
    root.write_text(json.dumps(document))
    with pytest.raises(InputError, match="has format 2, this version reads 1; upgrade"):
        open_result(tmp_path / "later.zarr")


def test_importing_turnover_imports_no_store_library():
    code = "import sys, turnover; print({'zarr', 'xarray', 'filelock.asyncio'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
