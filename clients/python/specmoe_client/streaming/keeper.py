"""The thread in the background that keeps a stream connected: connects, re-opens, hands over, looks for life.

Endpoint.open -> keeper.py -> Conversation.hand_over. It has no part in telling and forecasting.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

from specmoe_client.errors import ClientError
from specmoe_client.streaming.connecting import Endpoint, Opened, ended, unreachable
from specmoe_client.streaming.frames import Welcome
from specmoe_client.streaming.ledger import Past, opening
from specmoe_client.streaming.link import Link
from specmoe_client.streaming.retry import Pauses

logger = logging.getLogger("specmoe_client")

# A silent service is asked for a sign of life after so long, and given up after as long again.
BEAT_SECONDS = 5.0
# How long the service may take to read the past of a sequence.
REOPEN_SECONDS = 5.0
# A thread that waits for the network ends by itself later.
STOP_SECONDS = 1.0


class Kept(Protocol):
    """What is kept connected. All of it is called with the lock held."""

    def wanted(self) -> bool: ...

    def over(self) -> bool: ...

    def prepare(self, welcome: Welcome) -> list[Past]: ...

    def hand_over(self, opened: Opened, pasts: list[Past]) -> None: ...

    def fail(self, failure: ClientError) -> None: ...

    def beat(self) -> Link | None: ...

    def lose(self, failure: ClientError) -> None: ...


class Keeper:
    """A daemon thread. changed: over the lock of what is kept; notified where a connection is missing."""

    def __init__(self, endpoint: Endpoint, hello: bytes, lock: threading.Lock, kept: Kept) -> None:
        self.changed = threading.Condition(lock)
        self._endpoint, self._hello, self._kept = endpoint, hello, kept
        self._pauses = Pauses()
        self._hurried = False
        self._not_before_s = 0.0
        self._silent_at = -1
        self._thread = threading.Thread(target=self._run, name="specmoe-stream", daemon=True)

    def start(self) -> None:
        """Begin to connect."""
        self._thread.start()

    def hurry(self) -> None:
        """Somebody waits for a connection: make no pause before the next attempt. With the lock held."""
        self._hurried = True
        self.changed.notify_all()

    def lived(self, seconds: float) -> None:
        """A connection is over after so long. With the lock held."""
        self._pauses.lived(seconds)
        self._pause()

    def join(self) -> None:
        """Wait until the thread has ended, but not long. Without the lock."""
        self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        while self._until_wanted():
            try:
                self._connect()
            except ClientError as failure:
                self._fail(failure)
            except Exception as error:
                # Without this thread there would never be a connection again, and nobody would know why.
                logger.exception("The stream could not be opened.")
                self._fail(unreachable(f"{type(error).__name__}: {error}"))

    def _until_wanted(self) -> bool:
        """Wait until a connection is missing and the pause is over. False where none will be wanted."""
        with self.changed:
            while not self._kept.over():
                if not self._kept.wanted():
                    if not self.changed.wait(BEAT_SECONDS):
                        self._look_for_life()
                elif self._hurried or time.monotonic() >= self._not_before_s:
                    self._hurried = False
                    return True
                else:
                    self.changed.wait(self._not_before_s - time.monotonic())
            return False

    def _connect(self) -> None:
        opened = self._endpoint.open(self._hello)
        try:
            with self.changed:
                pasts = self._kept.prepare(opened.welcome)
            for past in pasts:
                opened.link.send_within(opening(past, opened.welcome), REOPEN_SECONDS)
            if opened.link.lost is not None:
                raise ended(opened.link.lost, {})
        except BaseException:
            opened.link.close()
            raise
        with self.changed:
            if self._kept.over():
                opened.link.close()
                return
            self._silent_at = -1
            self._kept.hand_over(opened, pasts)

    def _fail(self, failure: ClientError) -> None:
        with self.changed:
            self._pause()
            self._kept.fail(failure)

    def _pause(self) -> None:
        self._not_before_s = time.monotonic() + self._pauses.next_s()

    def _look_for_life(self) -> None:
        """Ping a service that said nothing since the last look; give up one that did not even answer that."""
        link = self._kept.beat()
        if link is None:
            return
        if link.received == self._silent_at:
            self._kept.lose(unreachable(f"the service gave no sign of life for {BEAT_SECONDS:g} s"))
            return
        self._silent_at = link.received
        link.ping()
