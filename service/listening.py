"""The socket the service listens on, opened before anything is loaded: a taken port is told at once.

specmoe serve --uds /run/specmoe.sock
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from service.errors import AddressUnavailable
from service.settings import Settings

BACKLOG = 2048


@contextlib.contextmanager
def listening(settings: Settings) -> Iterator[socket.socket]:
    """A listening socket at the Unix path, or else at host and port; its path is free again afterwards.

    Raises AddressUnavailable.
    """
    listener = _listen_unix(settings.uds) if settings.uds else _listen_tcp(settings.host, settings.port)
    try:
        yield listener
    finally:
        listener.close()
        if settings.uds:
            settings.uds.unlink(missing_ok=True)


def address(listener: socket.socket) -> str:
    """Where it listens, as a person would type it."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"


def beyond_this_machine(listener: socket.socket) -> bool:
    """Whether others than this machine's processes may reach it."""
    return (
        listener.family != socket.AF_UNIX and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback
    )


def _listen_tcp(host: str, port: int) -> socket.socket:
    listener = None
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit it: without it an answer may wait 40 ms for an acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(where)
        listener.listen(BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise _unavailable(f"{host}:{port}", error) from None
    return listener


def _listen_unix(path: Path) -> socket.socket:
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _unavailable(str(path), error) from None
    return listener


def _remove_stale(path: Path) -> None:
    """Free a path that a process left behind; one that is in use, or is no socket, is left alone."""
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise AddressUnavailable(f"{path} is a file, no socket.", remedy="Choose another path with --uds.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as visitor:
        try:
            visitor.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        except OSError as error:
            raise _unavailable(str(path), error) from None
        else:
            raise _unavailable(str(path), OSError(errno.EADDRINUSE, "Address already in use"))


def _unavailable(where: str, error: OSError) -> AddressUnavailable:
    remedies = {
        errno.EADDRINUSE: "Another process listens there: stop it, or choose another with --port or --uds.",
        errno.EACCES: "Choose a port from 1024 up, or a folder you may write to.",
        errno.EADDRNOTAVAIL: "This machine has no such address: choose one it has, such as 127.0.0.1.",
    }
    return AddressUnavailable(
        f"Cannot listen on {where}: {error.strerror or error}.",
        remedy=remedies.get(error.errno or 0, "Check --host, --port and --uds."),
    )
