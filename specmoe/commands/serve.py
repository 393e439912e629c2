"""Run the prediction service.

Every flag is a setting that may stand in the environment as well: --max-in-flight is SPECMOE_MAX_IN_FLIGHT.
A flag goes before its variable. docs/settings.md tells more, docs/rest-api.md what the service answers.

    specmoe serve --store ./store --models gpt-oss-20b@production --port 9000
"""

from __future__ import annotations

import argparse
import gc
import logging
import signal
import socket
from typing import TYPE_CHECKING, Any

from model_store.errors import ModelNotFound
from model_store.store import Store, open_store
from service.settings import Settings, read_settings

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

log = logging.getLogger(__name__)

# A decode loop that pauses keeps its connection; opening one costs more than a prediction.
KEEP_ALIVE_SECONDS = 75
GARBAGE_THRESHOLDS = (20_000, 20, 50)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag for every setting. What is not given is left to the environment."""
    for name, setting in Settings.model_fields.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            metavar=name.rpartition("_")[2].upper(),
            help=(setting.description or "").replace("%", "%%"),
        )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT, then let the requests in flight finish."""
    from service.listening import listening
    from service.logs import log_to_stderr

    settings = read_settings(**vars(args))
    log_to_stderr(settings.log_level)
    store = open_store(settings.store)
    check_models(store, settings)
    with listening(settings) as listener:
        _serve(settings, store, listener)
    return 0


def check_models(store: Store, settings: Settings) -> None:
    """Raises StoreError where the store, or a model that is to be served, is not there."""
    for choice in settings.models:
        store.resolve(choice.model, choice.selector)
    if not settings.models and not store.models():
        raise ModelNotFound(
            f"The store at {store.location} holds no version of any model.",
            remedy="Publish one with `specmoe publish`, or choose another store with --store.",
        )


def server_config(app: FastAPI, settings: Settings, websocket: Any = "none") -> uvicorn.Config:
    """How an app is served: the fast event loop and parser, nothing logged or added to a request.

    websocket: the protocol that takes over connections that are to be upgraded.
    """
    import uvicorn

    return uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws=websocket,
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=settings.shutdown_seconds,
    )


def _serve(settings: Settings, store: Store, listener: socket.socket) -> None:
    from service.app import create_app
    from service.listening import address, beyond_this_machine
    from service.server import Server
    from service.stream.websocket import websocket_protocol

    app = create_app(settings, store)
    # What has been imported stays: left out of the garbage collector's full rounds, it no longer makes them
    # take tens of milliseconds, in which every prediction would be late.
    gc.freeze()
    # Requests leave few cycles, and Python looks for them after every 700 objects otherwise.
    gc.set_threshold(*GARBAGE_THRESHOLDS)
    where = address(listener)
    log.info(
        "listening",
        extra={"address": where, "store": store.location, "models": settings.named_models() or "all"},
    )
    if beyond_this_machine(listener):
        log.warning("others than this machine may reach the service, which has no authentication")
    # uvicorn raises the signal that stopped it once more at the end: a stop that was asked for is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    config = server_config(app, settings, websocket_protocol(app.state.streams))
    Server(config, app.state.streams, settings.shutdown_seconds).run(sockets=[listener])
