"""The reference: a FastAPI endpoint that checks the same request and gives the same answer, with no model.

The same server settings, the same pydantic model of the body, the bytes of an answer that the service gave;
nothing of what the service has around a prediction.

    python -m specmoe.bench.bare ANSWER_FILE [UNIX_SOCKET]
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Response

from service.listening import address, listening
from service.logs import log_to_stderr
from service.routes import JSON, PREDICT_PATH
from service.schemas import PredictRequest
from service.settings import read_settings
from specmoe.commands.serve import GARBAGE_THRESHOLDS, server_config

log = logging.getLogger(__name__)


def bare_app(answer: bytes) -> FastAPI:
    """An app that gives this answer to every valid request."""
    app = FastAPI()

    @app.post(PREDICT_PATH)
    async def predict(request: PredictRequest) -> Response:
        return Response(answer, media_type=JSON)

    return app


def main(arguments: Sequence[str]) -> None:
    """Answer until SIGTERM."""
    app = bare_app(Path(arguments[0]).read_bytes())
    settings = read_settings(port=0, uds=arguments[1] if len(arguments) > 1 else None)
    log_to_stderr(settings.log_level)
    with listening(settings) as listener:
        gc.freeze()
        gc.set_threshold(*GARBAGE_THRESHOLDS)
        log.info("listening", extra={"address": address(listener)})
        uvicorn.Server(server_config(app, settings)).run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1:])
