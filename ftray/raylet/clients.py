"""Who is connected: drivers and workers, and the jobs that they belong to.

Role: plain data of the shell. `Client` is a registered link; `Job` is what a worker needs to know of a job before it
may serve it, and outlives its driver as long as detached actors do.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from ftray.wire.messages import RegisterClient
from ftray.wire.reactor import Link

if TYPE_CHECKING:
    from ftray.raylet.environments import Environment
    from ftray.raylet.setups import ClassEnvironment

JOBS_KEPT = 1_000


class Job:
    """A job as this node knows it."""

    __slots__ = ("cwd", "driver_id", "ended", "job_id", "namespace", "sys_path")

    def __init__(
        self, job_id: bytes, driver_id: bytes, namespace: str, sys_path: tuple[str, ...] = (), cwd: str = ""
    ) -> None:
        self.job_id = job_id
        self.driver_id = driver_id
        """Empty if the driver is on another node."""
        self.namespace = namespace
        self.sys_path = sys_path
        self.cwd = cwd
        self.ended = False


class Client:
    """A driver or worker with a link to this raylet. `worker_id` is its name everywhere."""

    __slots__ = (
        "class_names", "driver", "endpoint", "entrypoint", "environment", "environments", "exit_code", "goodbye",
        "gone", "job_id", "lease_id", "link", "log_to_driver", "not_retriable", "pid", "running", "since_ms",
        "worker_id",
    )  # fmt: skip

    def __init__(self, link: Link, hello: RegisterClient) -> None:
        self.link = link
        self.worker_id = hello.worker_id
        self.pid = hello.pid
        self.endpoint = hello.endpoint
        self.driver = hello.driver
        self.entrypoint = hello.entrypoint
        self.log_to_driver = hello.log_to_driver
        self.job_id = b""
        self.goodbye: str | None = None
        self.exit_code = 0
        """That which it has said goodbye with."""
        """Why it leaves, if it has said so."""
        self.gone = False
        self.lease_id = 0
        """The lease under which it works now (an actor's too), or 0."""
        self.since_ms = 0.0
        """When it got that lease."""
        self.running = ""
        """What it says that it runs."""
        self.class_names: dict[int, str] = {}
        """Names of its scheduling classes, for status and for errors."""
        self.environments: dict[int, ClassEnvironment] = {}
        """By scheduling class, for those that have one."""
        self.environment: Environment | None = None
        """What it has applied, or is applying, as a worker."""
        self.not_retriable: set[int] = set()
        """Scheduling classes whose tasks may run once only."""


class Clients:
    """All registered clients and known jobs."""

    def __init__(self) -> None:
        self.by_id: dict[bytes, Client] = {}
        self.jobs: OrderedDict[bytes, Job] = OrderedDict()

    def add_job(self, job: Job) -> None:
        """Remembers a job; the oldest ended ones are forgotten."""
        self.jobs[job.job_id] = job
        if len(self.jobs) > JOBS_KEPT:
            for job_id, other in self.jobs.items():
                if other.ended:
                    del self.jobs[job_id]
                    break

    def link_of(self, worker_id: bytes) -> Link | None:
        client = self.by_id.get(worker_id)
        return client.link if client is not None else None
