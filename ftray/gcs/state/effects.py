"""What the managers want done: typed effects, carried out by the leader's shell.

Role: pure data. `Submit` goes to the replica, everything else to a raylet or the log. Every effect may come again after
a change of leader or a new link, so receivers tell repeats by actor and incarnation (or group and attempt, or job,
or node).
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from ftray.gcs.state.commands import AnyCommand


class Submit(NamedTuple):
    """Put this command to the replica, without a session; give the result to the manager's `on_result`."""

    command: AnyCommand


class StartActor(NamedTuple):
    """To a raylet: start this incarnation, unless it is there. Answers: ActorAlive, ActorDied or ActorUnplaced."""

    node_id: bytes
    actor_id: bytes
    incarnation: int
    job_id: bytes
    owner_worker_id: bytes
    """Empty for a detached actor."""
    class_name: str
    resources: dict[str, float]
    creation: bytes
    restartable: bool = False
    """Whether it will be started again if it dies."""


class StopActor(NamedTuple):
    """To a raylet: stop this incarnation, and answer ActorDied once nothing runs of it, also if nothing ever did."""

    node_id: bytes
    actor_id: bytes
    incarnation: int
    worker_id: bytes
    """Empty if the actor had not been reported alive."""
    graceful: bool
    """Let it finish the calls it has."""
    reason: str


class StopJob(NamedTuple):
    """To a raylet: the job is over, end its tasks and leases."""

    node_id: bytes
    job_id: bytes


class ReportInfeasible(NamedTuple):
    """No live node could ever hold the actor; `missing` says what it needs and what there is."""

    actor_id: bytes
    incarnation: int
    missing: str


class Probe(NamedTuple):
    """Connect to the node's endpoint and tell `NodeHealth.on_probe` whether that was refused."""

    node_id: bytes
    incarnation: int
    endpoint: str


class PrepareBundles(NamedTuple):
    """To a raylet: hold these resources, by index of the bundle. Answers: BundlesPrepared or BundlesRefused."""

    node_id: bytes
    group_id: bytes
    attempt: int
    bundles: dict[int, dict[str, float]]


class CommitBundles(NamedTuple):
    """To a raylet: offer what you hold for this attempt. Answers: BundlesCommitted, or BundlesReturned if nothing."""

    node_id: bytes
    group_id: bytes
    attempt: int


class ReturnBundles(NamedTuple):
    """To a raylet: give back what you hold for this attempt, end what runs in it, and answer BundlesReturned."""

    node_id: bytes
    group_id: bytes
    attempt: int
    reason: str


Effect: TypeAlias = (
    Submit | StartActor | StopActor | StopJob | ReportInfeasible | Probe
    | PrepareBundles | CommitBundles | ReturnBundles
)  # fmt: skip
