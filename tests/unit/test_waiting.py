"""User threads that wait: what a shutdown in another thread does to them."""

from __future__ import annotations

import errno

import pytest
from wire_hosts import make_reactor

from ftray.worker.waiting import Waiter, block


@pytest.mark.parametrize("error", [OSError(errno.EBADF, "Bad file descriptor"), ValueError("closed epoll object")])
@pytest.mark.parametrize("released", [True, False])
def test_descriptors_closed_under_a_waiting_thread_are_a_shutdown(error: Exception, released: bool) -> None:
    reactor = make_reactor(name="shutdown")
    waiter = Waiter(1)

    def poll(timeout_s: float, events: int) -> list[tuple[int, int]]:
        if released:
            waiter.remaining = 0
        reactor.close()
        raise error

    reactor.poll_events = poll  # type: ignore[method-assign, assignment]
    assert block(reactor, waiter, None) is released
    assert not reactor.reader.locked()


def test_other_errors_of_a_waiting_thread_are_told() -> None:
    reactor = make_reactor(name="broken")

    def poll(timeout_s: float, events: int) -> list[tuple[int, int]]:
        raise OSError(errno.EINVAL, "Invalid argument")

    reactor.poll_events = poll  # type: ignore[method-assign, assignment]
    with pytest.raises(OSError, match="Invalid"):
        block(reactor, Waiter(1), None)
    reactor.close()
