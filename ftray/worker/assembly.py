"""Puts the parts of a core together; the same for drivers and workers."""

from __future__ import annotations

from ftray.gcs.client import GcsClient
from ftray.worker.actors import ActorClient
from ftray.worker.cancelling import Canceller
from ftray.worker.core import Core
from ftray.worker.gcs_access import GcsAccess
from ftray.worker.objects import ObjectPlane
from ftray.worker.peers import Peers
from ftray.worker.raylet_client import RayletClient
from ftray.worker.refs import ObjectRef
from ftray.worker.serialization import set_default_ref_loader
from ftray.worker.streams import Streams
from ftray.worker.submit import Submitter


def assemble(core: Core, session_dir: str) -> None:
    """Makes the parts of `core`; no connection is made yet."""
    core.objects = ObjectPlane(core)
    core.peers = Peers(core, ObjectRef)
    core.raylet = RayletClient(core)
    core.submitter = Submitter(core)
    core.streams = Streams(core)
    core.actors = ActorClient(core)
    core.canceller = Canceller(core)
    core.gcs = GcsAccess(GcsClient(core.reactor, [f"unix:{session_dir}/sockets/gcs.sock"], core.worker_id))
    set_default_ref_loader(core.peers.ref_loader(None))
