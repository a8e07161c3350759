"""The view's server: loopback alone, behind an address that cannot be guessed.

Other accounts on this machine, and pages of other sites in the user's browser, can reach a port of
it. So every address begins with a secret, a request must name this host (no rebinding of a foreign
name), and what another page sends is refused.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING, Any

from turnover.errors import InputError, needing
from turnover.runs.run import Run
from turnover.view.contents import Contents
from turnover.view.decisions import Decisions
from turnover.view.filters import ErrorFilter, InstanceFilter

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HOST = "127.0.0.1"
_HOSTS = (_HOST, "localhost")
_ASSETS = {
    "page.html": ("view/assets/page.html", "text/html"),
    "view.css": ("view/assets/view.css", "text/css"),
    "colours.css": ("report/colours.css", "text/css"),
    "view.js": ("view/assets/view.js", "text/javascript"),
    "panes.js": ("view/assets/panes.js", "text/javascript"),
    "elements.js": ("view/assets/elements.js", "text/javascript"),
    "icon.svg": ("view/assets/icon.svg", "image/svg+xml"),
}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
_ELSEWHERE = "open the address that `turnover view` printed: it ends with a secret"
_MOST_LISTED = 500
_BODY_BYTES = 4096


def open_view(
    run: Run,
    *,
    port: int = 0,
    show: Callable[[str], None] = print,
    browser: bool = True,
) -> None:
    """Serve a run's view on this machine until interrupted (Ctrl-C).

    Args:
        run: a scored run.
        port: to listen on; 0 takes a free one.
        show: is given the address once it answers.
        browser: whether to open it in the user's browser.

    Raises:
        InputError: starlette or uvicorn is not installed, the run was not scored or is damaged, or the
            port is taken.
    """
    with needing("the view", "turnover[view]"):
        import starlette  # noqa: F401
        import uvicorn
    listening = _listen(port)
    with contextlib.closing(listening):
        contents = Contents(run)
        decisions = Decisions(run, contents.self_influence)
        token, once = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
        config = uvicorn.Config(
            application(contents, decisions, token, once),
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=1,
        )
        origin = f"http://{_HOST}:{listening.getsockname()[1]}"
        show(f"{origin}/{token}/")
        if browser:
            # Other accounts can list the browser's command line, so what stands there works once.
            door = (f"{origin}/{once}",)
            # A browser of the terminal would hold this thread until it is left.
            threading.Thread(target=webbrowser.open, args=door, daemon=True).start()
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def application(contents: Contents, decisions: Decisions, token: str, once: str) -> Starlette:
    """The web application: everything under ``/token/``.

    Args:
        contents: what is read.
        decisions: what is written.
        token: the secret that every address begins with.
        once: another one, which leads there the first time it is asked for.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.routing import Mount, Route

    return Starlette(
        routes=[
            Route(f"/{once}", _door(f"/{token}/")),
            Mount(f"/{token}", routes=_routes(contents, decisions)),
        ],
        middleware=[
            Middleware(_Guard, known=(token, once)),
            Middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS, www_redirect=False),
        ],
        exception_handlers={InputError: _refused},
    )


def _door(page: str) -> Callable[[Request], Response]:
    """What leads to the page once."""
    from starlette.responses import RedirectResponse

    left = iter([page])

    def enter(_: Request) -> Response:
        to = next(left, None)
        return _json({"error": _ELSEWHERE}, 403) if to is None else RedirectResponse(to, 303)

    return enter


def _routes(contents: Contents, decisions: Decisions) -> list[Any]:
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import FileResponse
    from starlette.routing import Route

    def about(_: Request) -> Response:
        state = {"path": str(decisions.path), "refusal": decisions.refusal}
        return _json(contents.about() | state | {"decisions": _named(decisions.all())})

    def errors(request: Request) -> Response:
        return _json(contents.errors(_query(request, ErrorFilter)))

    def error(request: Request) -> Response:
        number, asked = request.path_params["number"], request.query_params
        by, label = asked.get("by", "turnover"), asked.get("label", "")
        return _json(contents.error(number, by=by, label=label, top=_top(request)))

    def instances(request: Request) -> Response:
        wanted = _query(request, InstanceFilter)
        return _json(contents.instances(wanted, decisions.all()))

    def instance(request: Request) -> Response:
        return _json(contents.instance(request.path_params["row"], top=_top(request)))

    def image(request: Request) -> Response:
        from starlette.responses import Response

        side, row = request.path_params["side"], request.path_params["row"]
        if side not in ("train", "test"):
            raise InputError(f"there are images of train and test, not of {side!r}")
        return Response(contents.image(side, row), media_type="image/png")

    async def decide(request: Request) -> Response:
        decision = await _decision(request)
        row = request.path_params["row"]
        made = await run_in_threadpool(decisions.set, row, decision)
        return _json({"decisions": _named(made)})

    def export(_: Request) -> Response:
        if not decisions.path.exists():
            raise InputError("nothing was decided yet")
        return FileResponse(decisions.path, media_type="text/csv", filename="decisions.csv")

    served = [Route(f"/{name}", partial(_asset, name=name)) for name in _ASSETS]
    return [
        *served,
        Route("/", partial(_asset, name="page.html")),
        Route("/about", about),
        Route("/errors", errors),
        Route("/errors/{number:int}", error),
        Route("/train", instances),
        Route("/train/{row:int}", instance),
        Route("/train/{row:int}/decision", decide, methods=["PUT"]),
        Route("/decisions.csv", export),
        Route("/image/{side}/{row:int}.png", image),
    ]


class _Guard:
    """Lets through what knows a secret and does not come from another page."""

    def __init__(self, app: ASGIApp, known: tuple[str, ...]) -> None:
        self._app, self._known = app, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import Headers, MutableHeaders

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        refusal = self._refusal(scope, Headers(scope=scope))
        if refusal is None:
            await self._app(scope, receive, send_guarded)
        else:
            await _json({"error": refusal}, 403)(scope, receive, send_guarded)

    def _refusal(self, scope: Scope, headers: Any) -> str | None:
        first = str(scope["path"]).split("/")[1:2]
        given = (first[0] if first else "").encode()
        if not any(hmac.compare_digest(given, one.encode()) for one in self._known):
            return _ELSEWHERE
        reading = scope["method"] in ("GET", "HEAD")
        own = f"http://{headers.get('host')}"
        if headers.get("origin", own if reading else "") != own:
            return "this is for the page itself alone"
        return None


async def _decision(request: Request) -> str | None:
    """The decision in a request's body; ``None`` takes one back.

    Raises:
        InputError: another body.
    """
    wrong = 'the body must be JSON: {"decision": a word or null}'
    if request.headers.get("content-type") != "application/json":  # no form can send that
        raise InputError(wrong)
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _BODY_BYTES:
            raise InputError(wrong)
    try:
        given = json.loads(body)["decision"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(wrong) from error
    if given is not None and not isinstance(given, str):
        raise InputError(wrong)
    return given


def _query(request: Request, kind: type[Any]) -> Any:
    """The fields of a filter that a request gives.

    Raises:
        InputError: an unknown field, or not a number where one belongs.
    """
    unset = kind()
    types: dict[str, Callable[[str], Any]] = {
        field.name: type(getattr(unset, field.name)) for field in fields(kind)
    }
    given = {}
    for name, value in request.query_params.items():
        if name not in types:
            raise InputError(f"unknown filter {name!r}; there are {', '.join(types)}")
        try:
            given[name] = types[name](value)
        except ValueError as error:
            raise InputError(f"{name} must be a number, got {value!r}") from error
    if given.get("start", 0) < 0:
        raise InputError("start must be >= 0")
    return kind(**given)


def _top(request: Request) -> int:
    given = request.query_params.get("top", "10")
    if not given.isdecimal() or not 1 <= int(given) <= _MOST_LISTED:
        raise InputError(f"top must be from 1 to {_MOST_LISTED}, got {given!r}")
    return int(given)


def _named(decisions: dict[int, str]) -> list[list[Any]]:
    return [[row, decision] for row, decision in sorted(decisions.items())]


def _asset(_: Request, *, name: str) -> Response:
    from starlette.responses import Response

    path, kind = _ASSETS[name]
    return Response(resources.files("turnover").joinpath(path).read_bytes(), media_type=kind)


def _refused(_: Request, error: Exception) -> Response:
    return _json({"error": str(error)}, 400)


def _json(value: dict[str, Any], status: int = 200) -> Response:
    from starlette.responses import Response

    # ASCII, so that a lone surrogate in some text does not cost the answer.
    return Response(json.dumps(value, allow_nan=False), status, media_type="application/json")


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server((_HOST, port))
    except (OSError, OverflowError) as error:
        raise InputError(
            f"port {port} cannot be listened on ({error}): choose another with --port, or leave it out"
        ) from error
