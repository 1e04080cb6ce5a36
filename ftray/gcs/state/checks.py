"""What commands are checked for before they write: ids, names, amounts, owners.

Role: pure, reads the store. A check that fails raises `Refusal`.
"""

from __future__ import annotations

import math

from ftray.gcs.state.commands import DeathCauseRecord
from ftray.gcs.state.store import Store
from ftray.gcs.state.tables import Code

ID_BYTES = 16
NAME_CHARS_MAX = 1_000
MESSAGE_CHARS_MAX = 3_000

Value = bytes | int | None


class Refusal(Exception):
    """The command changes nothing and is answered with this code and message."""

    def __init__(self, code: Code, message: str) -> None:
        if len(message) > MESSAGE_CHARS_MAX:  # an id or name in it is foolishly long
            message = f"{message[: MESSAGE_CHARS_MAX - 3]}..."
        super().__init__(message)
        self.code = code
        self.message = message


def check_owner(store: Store, worker_id: bytes, node_id: bytes) -> None:
    check_id(worker_id, "owner_worker_id")
    failure = store.worker_failures.get(worker_id)
    if failure is not None:
        raise Refusal(Code.OWNER_DIED, f"worker {worker_id.hex()} has died{because(failure.cause)}")
    if not store.node_alive(node_id):
        where = f"node {node_id.hex()}, which is not a live member"
        raise Refusal(Code.OWNER_DIED, f"worker {worker_id.hex()} is on {where}")


def check_id(value: bytes, name: str) -> None:
    if len(value) != ID_BYTES:
        raise Refusal(Code.INVALID, f"{name} has {len(value)} bytes instead of {ID_BYTES}")


def check_name(value: str, name: str) -> None:
    if len(value) > NAME_CHARS_MAX or "\0" in value:
        raise Refusal(Code.INVALID, f"the {name} has more than {NAME_CHARS_MAX} characters or contains NUL")


def check_resources(resources: dict[str, float]) -> None:
    for name, amount in resources.items():
        if not (math.isfinite(amount) and amount >= 0):
            raise Refusal(Code.INVALID, f"resource {name[:80]!r} is {amount}: a finite number of 0 or more is needed")


def because(cause: DeathCauseRecord | None) -> str:
    return f" ({cause.reason})" if cause is not None and cause.reason else ""
