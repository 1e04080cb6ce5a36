"""What the GCS and raylets say to each other about placement groups.

Role: pure data, a part of the union in `messages.py`. A raylet answers with commands (`BundlesPrepared` and kin).
"""

from __future__ import annotations

from ftray.wire.values import Message


class PrepareBundles(Message, tag=74):
    """To a raylet: hold the resources of these bundles, by their index. May be repeated."""

    group_id: bytes
    attempt: int
    bundles: dict[int, dict[str, float]]


class CommitBundles(Message, tag=75):
    """To a raylet: offer what is held for this attempt. May be repeated."""

    group_id: bytes
    attempt: int


class ReturnBundles(Message, tag=76):
    """To a raylet: give back what is held for this attempt, and end what runs in it. May be repeated."""

    group_id: bytes
    attempt: int
    reason: str


class BundlesHeld(Message, tag=77):
    """From a raylet that has connected (anew): for which groups, in which attempts, it holds something."""

    held: tuple[tuple[bytes, int], ...]


GroupMessage = PrepareBundles | CommitBundles | ReturnBundles | BundlesHeld
