"""Serves the view on this machine's loopback address."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable

from turnover.errors import InputError, needing
from turnover.runs.run import Run
from turnover.view.contents import Contents
from turnover.view.decisions import Decisions
from turnover.view.effect import Effect

_HOST = "127.0.0.1"


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
        show: called with the address once it answers.
        browser: whether to open it in the user's browser.
    """
    with needing("the view", "turnover[view]"):
        import uvicorn

        from turnover.view.application import application
    listening = _listen(port)
    with contextlib.closing(listening):
        contents = Contents(run)
        decisions, effect = Decisions(run, contents.self_influence), Effect(run)
        token, once = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
        config = uvicorn.Config(
            application(contents, decisions, effect, token, once),
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=1,
        )
        origin = f"http://{_HOST}:{listening.getsockname()[1]}"
        show(f"{origin}/{token}/")
        if browser:
            # Other accounts can list the browser's command line, so the address there works once. A
            # browser in the terminal would block this thread.
            address = (f"{origin}/{once}",)
            threading.Thread(target=webbrowser.open, args=address, daemon=True).start()
        with contextlib.closing(effect), contextlib.suppress(KeyboardInterrupt):
            if decisions.refusal is None and effect.refusal is None:
                threading.Thread(target=_prepare, args=(effect,), daemon=True).start()
            uvicorn.Server(config).run(sockets=[listening])


def _prepare(effect: Effect) -> None:
    # The page says what is wrong once it asks.
    with contextlib.suppress(InputError):
        effect.prepare()


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server((_HOST, port))
    except (OSError, OverflowError) as error:
        raise InputError(
            f"cannot listen on port {port} ({error}): choose another with --port, or leave it out"
        ) from error
