"""Predictions that did not come: remembered for the program, told to the log once."""

from __future__ import annotations

import collections.abc
import contextlib
import logging
import time
from typing import Literal

from specmoe_client.errors import NoPrediction

logger = logging.getLogger("specmoe_client")

OnFailure = Literal["none", "raise"]
# A decode loop asks thousands of times a second; the log hears of each reason once in this time.
LOG_EVERY_S = 60.0


class Failures:
    """The last failure of a client. Messages tell of the service and the connection, never of routing."""

    def __init__(self) -> None:
        self.last: NoPrediction | None = None
        self._silent_until_s: dict[str, float] = {}

    @contextlib.contextmanager
    def watch(self, on_failure: OnFailure) -> collections.abc.Iterator[None]:
        """Around one question: with "none" a NoPrediction ends here, with "raise" it goes on."""
        try:
            yield
        except NoPrediction as failure:
            self.note(failure)
            if on_failure == "raise":
                raise
            # What is kept must not keep the request and its arrays alive.
            failure.__traceback__ = failure.__cause__ = failure.__context__ = None
        else:
            self.last = None

    def note(self, failure: NoPrediction) -> None:
        """Remember a failure, and log it unless one of its kind was logged a short while ago."""
        self.last = failure
        self._log(failure)

    def _log(self, failure: NoPrediction) -> None:
        now_s = time.monotonic()
        if now_s < self._silent_until_s.get(failure.reason, 0.0):
            return
        self._silent_until_s[failure.reason] = now_s + LOG_EVERY_S
        logger.warning(
            "No prediction (%s): %s Not logged again for %d s.", failure.reason, failure, LOG_EVERY_S
        )
