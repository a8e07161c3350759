"""A view's server, in this process or as its user starts it, and plain requests to it."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Server:
    """A running view."""

    port: int
    token: str

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        return f"{self.origin}/{self.token}/"

    def ask(
        self, path: str, method: str = "GET", body: bytes | None = None, **headers: str
    ) -> Answer:
        """A request whose path and headers go out as they are given."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.putrequest(method, path, skip_host=True)
        for name, value in {"Host": f"127.0.0.1:{self.port}", **headers}.items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        found = Answer(answer.status, headers, answer.read())
        connection.close()
        return found

    def get(self, path: str) -> Any:
        answer = self.ask(f"/{self.token}/{path}")
        assert answer.status == 200, answer.body
        return answer.json

    def decide(self, row: int, decision: str | None, **headers: str) -> Answer:
        body = json.dumps({"decision": decision}).encode()
        headers = {"Origin": self.origin, "Content-Type": "application/json"} | headers
        return self.ask(f"/{self.token}/train/{row}/decision", "PUT", body, **headers)


@contextmanager
def serving(run: Path) -> Iterator[Server]:
    """A server in this process: importing the libraries anew takes longer than the work."""
    import uvicorn

    from turnover.runs.run import Run
    from turnover.view.application import application
    from turnover.view.contents import Contents
    from turnover.view.decisions import Decisions
    from turnover.view.effect import Effect

    loaded = Run.load(run)
    contents = Contents(loaded)
    decisions = Decisions(loaded, contents.self_influence)
    app = application(contents, decisions, Effect(loaded), "token", "once")
    config = uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Server(listening.getsockname()[1], "token")
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def serving_process(run: Path) -> Iterator[tuple[Server, subprocess.Popen[str]]]:
    """`turnover view` itself; killed at the end where it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "turnover", "view", str(run), "--no-open"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    try:
        found = re.search(r"http://127\.0\.0\.1:(\d+)/([\w-]+)/", process.stdout.readline())
        assert found, process.communicate()
        yield Server(int(found[1]), found[2]), process
    finally:
        process.kill()
        process.communicate()
