"""The view's web application: its routes, and who may use them.

Other accounts on this machine, and pages of other sites in the user's browser, can reach a loopback
port. So every address begins with a secret, a request must name this host (no DNS rebinding), and
requests from other pages are refused.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turnover.errors import InputError
from turnover.view.contents import Contents
from turnover.view.decisions import Decisions
from turnover.view.effect import Effect
from turnover.view.filters import ErrorFilter, InstanceFilter

_HOSTS = ("127.0.0.1", "localhost")
_ASSETS = {
    "page.html": ("view/assets/page.html", "text/html"),
    "view.css": ("view/assets/view.css", "text/css"),
    "colours.css": ("report/colours.css", "text/css"),
    "view.js": ("view/assets/view.js", "text/javascript"),
    "cleaning.js": ("view/assets/cleaning.js", "text/javascript"),
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
_NEIGHBORS = 5


def application(
    contents: Contents, decisions: Decisions, effect: Effect, token: str, once: str
) -> Starlette:
    """Make the web application, with everything under ``/token/``.

    Args:
        contents: what is read.
        decisions: what is written.
        effect: what the decisions do.
        token: the secret that every address begins with.
        once: another secret, which redirects there the first time it is asked for.
    """
    unused = iter([f"/{token}/"])

    def enter(_: Request) -> Response:
        page = next(unused, None)
        return RedirectResponse(page, 303) if page else _json({"error": _ELSEWHERE}, 403)

    return Starlette(
        routes=[
            Route(f"/{once}", enter),
            Mount(f"/{token}", routes=_routes(contents, decisions, effect)),
        ],
        middleware=[
            Middleware(_Guard, known=(token, once)),
            Middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS, www_redirect=False),
        ],
        exception_handlers={InputError: lambda _, error: _json({"error": str(error)}, 400)},
    )


def _routes(contents: Contents, decisions: Decisions, effect: Effect) -> list[Route]:
    def about(_: Request) -> Any:
        state = {"path": str(decisions.path), "refusal": decisions.refusal}
        state |= {"no_effect": decisions.refusal or effect.refusal}
        return contents.about() | state | {"decisions": _named(decisions.all())}

    def error(request: Request) -> Any:
        number, asked = request.path_params["number"], request.query_params
        by, label = asked.get("by", "turnover"), asked.get("label", "")
        return contents.error(number, by=by, label=label, top=_top(request))

    def neighbors(request: Request) -> Any:
        own = contents.training_row(request.path_params["row"])
        found = effect.nearest(own["row"], _NEIGHBORS)
        listed = [contents.training_row(row) | {"similarity": one} for row, one in found]
        return {"neighbors": listed}

    def image(request: Request) -> Response:
        return Response(contents.image(**request.path_params), media_type="image/png")

    async def decide(request: Request) -> Response:
        decision = await _decision(request)
        made = await run_in_threadpool(decisions.set, request.path_params["row"], decision)
        return _json({"decisions": _named(made)})

    def export(_: Request) -> Response:
        if not decisions.path.exists():
            raise InputError("there are no decisions yet")
        return FileResponse(decisions.path, media_type="text/csv", filename="decisions.csv")

    answers: dict[str, Callable[[Request], Any]] = {
        "/about": about,
        "/errors": lambda request: contents.errors(_query(request, ErrorFilter)),
        "/errors/{number:int}": error,
        "/effect": lambda _: effect.of(decisions.all()),
        "/train": lambda request: contents.instances(
            _query(request, InstanceFilter), decisions.all()
        ),
        "/train/{row:int}": lambda request: contents.instance(
            request.path_params["row"], top=_top(request)
        ),
        "/train/{row:int}/neighbors": neighbors,
    }
    return [
        *(Route(f"/{name}", partial(_asset, name=name)) for name in _ASSETS),
        Route("/", partial(_asset, name="page.html")),
        *(Route(path, partial(_answer, answer)) for path, answer in answers.items()),
        Route("/train/{row:int}/decision", decide, methods=["PUT"]),
        Route("/decisions.csv", export),
        Route("/image/{side}/{row:int}.png", image),
    ]


class _Guard:
    """Middleware for requests that know a secret and do not come from another page; adds headers."""

    def __init__(self, app: ASGIApp, known: tuple[str, ...]) -> None:
        self._app, self._known = app, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        refusal = self._refusal(scope, Headers(scope=scope))
        app = self._app if refusal is None else _json({"error": refusal}, 403)
        await app(scope, receive, send_guarded)

    def _refusal(self, scope: Scope, headers: Headers) -> str | None:
        given = str(scope["path"]).split("/")[1:2]
        secret = "".join(given).encode()
        if not any(hmac.compare_digest(secret, one.encode()) for one in self._known):
            return _ELSEWHERE
        own = f"http://{headers.get('host')}"
        unnamed = own if scope["method"] in ("GET", "HEAD") else ""
        return (
            None if headers.get("origin", unnamed) == own else "only the page itself may ask this"
        )


async def _decision(request: Request) -> str | None:
    """Read the decision in a request's body; ``None`` takes one back."""
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
    """Read a filter; refuse unknown fields and values that are not numbers."""
    types: dict[str, Callable[[str], Any]] = {one.name: type(one.default) for one in fields(kind)}
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
    path, kind = _ASSETS[name]
    return Response(resources.files("turnover").joinpath(path).read_bytes(), media_type=kind)


def _answer(answer: Callable[[Request], Any], request: Request) -> Response:
    return _json(answer(request))


def _json(value: dict[str, Any], status: int = 200) -> Response:
    # ASCII, so that a lone surrogate in a text does not make the answer fail.
    return Response(json.dumps(value, allow_nan=False), status, media_type="application/json")
