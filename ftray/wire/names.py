"""Endpoints with names: looked up in threads, because the loop must not wait for a name server.

Role: shell. A head dials others by the names in `--heads`. When the name server does not answer, a look-up takes ten
seconds, in which a head that waited for it would neither hear nor say anything, and be given up by the others.

Rules: an address in numbers is its own answer. A name is looked up when it is asked for, by one thread at a time; until
that has an answer there is none, so ask again. An answer is good for `KEEP_S`, a fault until it was told once; a good
answer stays in use while a newer one is looked up, and when that fails.

Rejected: look-ups with a timeout in the loop (getaddrinfo has none); a resolver of our own (/etc/hosts and the rest of
the machine's configuration would be lost).
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable

from ftray.wire.reactor import parse_endpoint

KEEP_S = 30.0


def is_name(host: str) -> bool:
    """Whether the host of an endpoint has to be looked up."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return True
    return False


def look_up(host: str) -> str:
    """The address of a name, in numbers; IPv4 if it has one. Raises OSError."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    found.sort(key=lambda each: each[0] != socket.AF_INET)
    return str(found[0][4][0])


class Names:
    """What was looked up, for all who ask in this process. Methods may be called from any thread."""

    def __init__(self, look_up: Callable[[str], str] = look_up) -> None:
        self._look_up = look_up
        self._lock = threading.Lock()
        self._answers: dict[str, tuple[str, float]] = {}
        """By name, its address and when that was found."""
        self._faults: dict[str, OSError] = {}
        self._under_way: set[str] = set()

    def endpoint(self, endpoint: str) -> str | None:
        """The endpoint with an address in numbers, or None while it is looked up. Raises OSError if there is none for
        that name, ValueError if it is no endpoint."""
        family, address = parse_endpoint(endpoint)
        if family == socket.AF_UNIX or not is_name(address[0]):
            return endpoint
        host, port = address
        with self._lock:
            fault = self._faults.pop(host, None)
            known = self._answers.get(host)
            if fault is not None and known is None:
                raise fault
            if (known is None or time.monotonic() > known[1] + KEEP_S) and host not in self._under_way:
                self._under_way.add(host)
                threading.Thread(target=self._find, args=(host,), name=f"look-up of {host}", daemon=True).start()
            return None if known is None else f"tcp:{known[0]}:{port}"

    def _find(self, host: str) -> None:
        try:
            address = self._look_up(host)
        except (OSError, UnicodeError) as error:  # UnicodeError: a name with too long a part
            fault = OSError(f"{host} can't be looked up: {getattr(error, 'strerror', None) or error}")
            with self._lock:
                self._faults[host] = fault
                self._under_way.discard(host)
            return
        with self._lock:
            self._answers[host] = (address, time.monotonic())
            self._faults.pop(host, None)
            self._under_way.discard(host)


NAMES = Names()
