"""Results on S3-compatible storage: a real server, over HTTP, that fails as stores do."""

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("s3fs", reason="s3fs is not installed")
pytest.importorskip("moto", reason="moto is not installed")
pytest.importorskip("flask", reason="moto's server is not installed")

import aiobotocore.endpoint
import s3fs
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

import test_store
import tiny
import turnover
from test_store import TOP, arguments, expected, write
from turnover import InputError
from turnover.results import location
from turnover.results.store import save, writing


class Faulty:
    """An S3 server between whose answers and the wire something can go wrong.

    Attributes:
        fault: of (number of the request, method, path): ``None``, an HTTP status, ``"cut"`` (the
            connection breaks in the middle of the answer), ``"lost"`` (before it, but after the
            request was carried out) or seconds to wait.
    """

    def __init__(self):
        self._store = DomainDispatcherApplication(create_backend_app)
        self._lock, self._requests = threading.Lock(), 0
        self.fault, self.faults = lambda number, method, path: None, 0

    def __call__(self, environ, start_response):
        with self._lock:
            self._requests += 1
            fault = self.fault(self._requests, environ["REQUEST_METHOD"], environ["PATH_INFO"])
            self.faults += fault is not None
        if isinstance(fault, float):
            time.sleep(fault)
        elif isinstance(fault, int):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            code = {500: "InternalError", 503: "SlowDown"}[fault]
            start_response(f"{fault} {code}", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()]
        answer = self._store(environ, start_response)
        if fault in {"cut", "lost"}:
            body = b"".join(answer)
            return self._broken(body[: len(body) // 2] if fault == "cut" else None)
        return answer

    def _broken(self, part):
        if part:
            yield part
        raise ConnectionAbortedError


class Silent(WSGIRequestHandler):
    def log(self, kind, message, *args):
        pass

    def connection_dropped(self, error, environ=None):
        self.close_connection = True


class Quick:
    """asyncio, which waits a twentieth of the time."""

    def __getattr__(self, name):
        return getattr(asyncio, name)

    def sleep(self, seconds):
        return asyncio.sleep(seconds / 20)


@pytest.fixture(scope="module")
def server():
    faulty = Faulty()
    served = make_server("127.0.0.1", 0, faulty, threaded=True, request_handler=Silent)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{served.server_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "2",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        for module in (s3fs.core, aiobotocore.endpoint):  # between two attempts
            patch.setattr(module, "asyncio", Quick())
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield faulty
        # What moto holds outlives its server; another one in this process begins with nothing.
        faulty.fault = lambda number, method, path: None
        reset = f"{settings['AWS_ENDPOINT_URL']}/moto-api/reset"
        urllib.request.urlopen(urllib.request.Request(reset, method="POST")).close()
    served.shutdown()
    thread.join()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def url(server):
    yield f"s3://bucket/{uuid.uuid4().hex}/result"
    server.fault = lambda number, method, path: None


def names(url):
    return s3fs.S3FileSystem(use_listings_cache=False).find(url)


def tree(url):
    files, root = s3fs.S3FileSystem(use_listings_cache=False), url.removeprefix("s3://")
    return {name.removeprefix(f"{root}/"): files.cat_file(name) for name in names(url)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same result, written locally."""
    folder = tmp_path_factory.mktemp("whole") / "result.zarr"
    write(folder)
    return test_store.tree(folder)


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    """A result of fewer chunks, likewise."""
    folder = tmp_path_factory.mktemp("top") / "result.zarr"
    write(folder, TOP)
    return test_store.tree(folder)


def test_what_is_on_s3_is_what_would_be_on_disk(url, whole):
    write(url)
    assert tree(url) == whole
    stored = turnover.open_result(url)
    tiny.assert_same(stored.load(), expected())
    tiny.assert_same(stored.load(slice(0, 5)), read_rows(slice(0, 5)))
    np.testing.assert_array_equal(stored.dataset.score, expected().scores)
    assert write(url) == 0
    save(url, expected())
    tiny.assert_same(turnover.open_result(url).load(), expected())


def read_rows(rows):
    every = expected()
    parts = {"scores", "target_ids", "standard_error", "exact", "recall"}
    floor = type(every.floor)(every.floor.mean[rows], every.floor.sd[rows])
    return expected(floor=floor, **{name: getattr(every, name)[rows] for name in parts})


def child():
    """Environment of a process that imports what this one does."""
    here = Path(__file__).parent
    paths = [str(here.parent / "src"), str(here), *sys.path]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


@pytest.mark.long
def test_killed_on_s3_it_ends_as_if_never_cut_off(url, top, monkeypatch):
    monkeypatch.setattr(location, "_LEASE_SECONDS", 0)
    monkeypatch.setattr(location, "_SETTLE_SECONDS", 0)
    rng, code = random.Random(0), f"test_store.write({url!r}, test_store.TOP, pause=0.2)"
    code = f"import test_store; {code}"
    code = f"from turnover.results import location; location._LEASE_SECONDS = 0; {code}"
    for _ in range(2):
        had = len(names(url))
        process = subprocess.Popen([sys.executable, "-c", code], env=child())
        test_store.wait_for(lambda had=had: len(names(url)) > had + 2)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        with pytest.raises(InputError, match="not finished: repeat the call"):
            turnover.open_result(url)
    assert 0 < write(url, TOP) <= 9
    assert tree(url) == top


@pytest.mark.long
@pytest.mark.parametrize("fault", [500, 503, "cut", "lost", 0.1])
def test_a_store_that_fails_now_and_then_gives_the_same_bits(fault, url, top, server):
    before = server.faults
    server.fault = lambda number, method, path: fault if number % 16 == 0 else None
    write(url, TOP)
    tiny.assert_same(turnover.open_result(url).load(), expected(TOP))
    assert server.faults > before + 4
    server.fault = lambda number, method, path: None
    assert tree(url) == top


@pytest.mark.long
@pytest.mark.parametrize("fault", [500, 503, "cut", "lost"])
def test_a_store_that_only_fails_ends_in_an_error_and_is_gone_on_with(
    fault, url, top, server, monkeypatch
):
    monkeypatch.setattr(location, "_LEASE_SECONDS", 0)
    monkeypatch.setattr(location, "_SETTLE_SECONDS", 0)
    server.fault = lambda number, method, path: fault if "/score/c/1/" in path else None
    with pytest.raises(Exception) as caught:  # noqa: PT011 - s3fs's, of several kinds
        write(url, TOP)
    assert not isinstance(caught.value, AssertionError)
    server.fault = lambda number, method, path: None
    with pytest.raises(InputError, match="not finished: repeat the call"):
        turnover.open_result(url)
    write(url, TOP)
    assert tree(url) == top
    server.fault = lambda number, method, path: fault if "/score/c/1/" in path else None
    with pytest.raises(Exception) as caught:  # noqa: PT011 - likewise
        turnover.open_result(url).load()
    assert not isinstance(caught.value, AssertionError)


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_a_damaged_object_is_named(how, url):
    write(url)
    files = s3fs.S3FileSystem(use_listings_cache=False)
    chunk = f"{url}/score/c/1/0"
    raw = bytearray(files.cat_file(chunk))
    raw[len(raw) // 2] ^= 4
    if how == "missing":
        files.rm(chunk)
    else:
        files.pipe_file(chunk, bytes(raw if how == "flipped" else raw[:-9]))
    with pytest.raises(InputError, match=r"score/c/1/0 is (damaged|missing)"):
        turnover.open_result(url).load()


def test_a_bucket_that_is_not_there_is_refused(server):
    with pytest.raises(InputError, match=r"cannot be written: .*bucket does not exist"):
        write("s3://nowhere/result")
    with pytest.raises(InputError, match="there is no result"):
        turnover.open_result("s3://nowhere/result")


@pytest.mark.parametrize("left", [False, True], ids=["new", "left by one that is gone"])
def test_of_two_that_begin_at_once_one_is_refused(left, url, server, monkeypatch):
    monkeypatch.setattr(location, "_SETTLE_SECONDS", 0.7)
    if left:
        write(url, TOP, blocks=1)
        monkeypatch.setattr(location, "_LEASE_SECONDS", 1.5)
        value = b'{"token": "gone", "holder": "process 1 on nowhere"}'
        s3fs.S3FileSystem().pipe_file(f"{url}/{location.LEASE}", value)
        time.sleep(2.6)
    # Every question is answered before anybody writes.
    server.fault = lambda number, method, path: 0.1 if method in {"GET", "HEAD"} else None
    ready, entered, refused = threading.Barrier(4), [], []

    def begin():
        ready.wait()
        try:
            with writing(url, **arguments(TOP)):
                entered.append(1)
                time.sleep(1.5)
        except InputError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entered) == 1 and len(refused) == 3
    assert all("being written by" in one or "same moment" in one for one in refused)


WRONG = """
import sys, time
real, ahead = time.time, float(sys.argv[2])
time.time = lambda: real() + ahead
import test_store
test_store.write(sys.argv[1], test_store.TOP, pause=60)
"""


@pytest.mark.long
def test_a_writer_with_a_wrong_clock_keeps_others_out_as_long_as_any(url, top, monkeypatch):
    urls = {f"{url}/a-day-ahead": 86400, f"{url}/a-day-behind": -86400}
    processes = [
        subprocess.Popen([sys.executable, "-c", WRONG, one, str(ahead)], env=child())
        for one, ahead in urls.items()
    ]
    said = []
    try:
        for one in urls:
            test_store.wait_for(
                lambda one=one: any("/score/zarr.json" in name for name in names(one))
            )
            with pytest.raises(InputError, match="being written by process") as caught:
                write(one, TOP)
            said.append(str(caught.value))
    finally:
        for process in processes:
            assert process.poll() is None
            process.kill()
            process.wait()
    for one in said:
        assert 580 < float(re.search(r"if it is gone, wait (\d+) s", one)[1]) <= 600
    monkeypatch.setattr(location, "_LEASE_SECONDS", 1.5)
    monkeypatch.setattr(location, "_SETTLE_SECONDS", 0)
    time.sleep(2.6)
    for one in urls:
        write(one, TOP)
        assert tree(one) == top


@pytest.mark.long
@pytest.mark.parametrize("jump", [86400, -86400], ids=["a day on", "a day back"])
def test_a_writer_whose_clock_jumps_ends_well(jump, url, top, monkeypatch):
    real, ahead = time.time, 0
    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    with writing(url, **arguments(TOP)):
        ahead = jump
        with pytest.raises(InputError, match="being written by process"):
            write(url, TOP)
    write(url, TOP)
    assert tree(url) == top


@pytest.mark.long
def test_workers_write_to_one_store_that_fails_now_and_then(server, url):
    pytest.importorskip("ray", reason="needs ray: pip install 'turnover[ray]'")
    import test_ray

    test_ray.influence("exact").estimate(test_ray.batches(), test_ray.IDS, out=f"{url}-one")
    failed = set()

    def every_seventh(number, method, path):
        """But for one that is tried again: several workers could meet the seventh twice running."""
        again = (method, path) in failed
        failed.discard((method, path))
        if number % 7 or again:
            return None
        failed.add((method, path))
        return 503

    server.fault = every_seventh
    before = server.faults
    with test_ray.connected():
        many = test_ray.influence("exact")
        many.estimate(test_ray.batches(), test_ray.IDS, out=f"{url}-many", engine="ray")
    assert server.faults > before
    server.fault = lambda number, method, path: None
    assert tree(f"{url}-many") == tree(f"{url}-one")
