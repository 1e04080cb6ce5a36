"""The runtime environments of a node: downloaded and unpacked once, kept while they are used, and a while after.

Role: shell, under the reactor's lock. An `Environment` is what a program has said, packed (`ftray/runtime_env.py`); it
is ready when all its packages lie unpacked in `<session>/environments`. What it means here (`meaning`) is sent to each
worker that is to have it.

Rules:
- Reading from the control service is done in callbacks, unpacking in a thread: the loop never waits.
- Who needs an environment holds it (`hold`, `drop`): a scheduling class of a client for the client's life, an actor, a
  worker that has applied it. Packages of environments that nobody holds stay until all take more than
  `environment_bytes_max`; then the one that was used longest ago goes first.
- A failure is told to those who waited, and not remembered: who asks later, tries again.

Rejected: a folder for each environment (two that share a package would have it twice); preparing when a lease is
granted (its CPU would idle through a download).
"""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from ftray.gcs.state.packages import PACKAGES
from ftray.gcs.state.tables import KvRecord, Table, kv_key
from ftray.raylet.packages import Manifest, PackageError, chunk_key, unpack
from ftray.raylet.session import remove_tree
from ftray.runtime_env import PACKAGE_URI, RuntimeEnv, decode, encode, key_of

if TYPE_CHECKING:
    from ftray.raylet.raylet import Raylet
    from ftray.wire.reactor import Timer

log = logging.getLogger("ftray.raylet")

Done = Callable[[str], None]
"""Told "" when it is done, or else why it could not be."""


class Package:
    """One package on this node."""

    __slots__ = ("bytes", "digest", "folder", "ready", "suffix", "uri", "users", "waiters")

    def __init__(self, uri: str, root: str) -> None:
        match = PACKAGE_URI.fullmatch(uri)
        assert match is not None
        self.uri = uri
        self.digest = bytes.fromhex(match[1])
        self.suffix = match[2]
        self.folder = os.path.join(root, match[1])
        self.ready = False
        self.bytes = 0
        """Its size when packed, as a measure."""
        self.users = 0
        """Environments that somebody holds."""
        self.waiters: list[Done] = []

    def import_paths(self) -> list[str]:
        """Where Python finds what is in it. A wheel has parts that an installer would move."""
        found = [self.folder]
        if self.suffix == "whl":
            for name in sorted(os.listdir(self.folder)):
                if name.endswith(".data"):
                    parts = [os.path.join(self.folder, name, kind) for kind in ("purelib", "platlib")]
                    found += [part for part in parts if os.path.isdir(part)]
        return found


class Environment:
    """One runtime environment, for all who have said the same."""

    __slots__ = ("deaths", "env", "holders", "key", "meaning", "packages", "text", "texts", "timeout_ms")

    def __init__(self, key: str, text: str, env: RuntimeEnv, packages: list[Package]) -> None:
        self.key = key
        self.text = text
        self.texts: list[str] = []
        """In which forms it has been said."""
        self.env = env
        self.packages = packages
        self.timeout_ms = env.setup_timeout_s * 1000.0
        self.meaning = "" if packages else _meaning(text, env, [])
        """What a worker gets; empty while it is not ready."""
        self.holders = 0
        self.deaths = 0
        """Workers in a row that died while they applied it."""


def _meaning(text: str, env: RuntimeEnv, packages: list[Package]) -> str:
    by_uri = {package.uri: package for package in packages}
    paths = [path for uri in env.get("py_modules", ()) for path in by_uri[uri].import_paths()]
    folder = by_uri[env["working_dir"]].folder if "working_dir" in env else ""
    return json.dumps({"environment": text, "paths": paths, "working_dir": folder})


class Environments:
    """See the module."""

    def __init__(self, raylet: Raylet) -> None:
        self.raylet = raylet
        self.by_key: dict[str, Environment] = {}
        self.packages: OrderedDict[str, Package] = OrderedDict()
        """The one that was used last is the last."""
        self.root = os.path.join(raylet.info.session_dir, "environments")
        self._by_text: dict[str, Environment] = {}
        self._bytes = 0
        """Of all packages that are ready."""
        self._stopped = False
        self._threads: set[threading.Thread] = set()

    # --- who has them -------------------------------------------------------------------------------------------------

    def hold(self, text: str) -> Environment:
        """The environment that a client has said, held until `drop`. Raises ValueError with a text for the program."""
        environment = self._by_text.get(text)
        if environment is None:
            environment = self._make(text)
        environment.holders += 1
        if environment.holders == 1:
            for package in environment.packages:
                package.users += 1
        return environment

    def hold_again(self, environment: Environment) -> None:
        """Somebody more has it."""
        environment.holders += 1

    def drop(self, environment: Environment) -> None:
        """One who held it needs it no more."""
        environment.holders -= 1
        if environment.holders:
            return
        del self.by_key[environment.key]
        for text in environment.texts:
            del self._by_text[text]
        for package in environment.packages:
            package.users -= 1
            if not package.users and not package.ready and not package.waiters:
                del self.packages[package.uri]
        self._evict()

    def _make(self, text: str) -> Environment:
        try:
            env = decode(text)
            key = key_of(env)
        except Exception as error:
            raise ValueError(f"the runtime environment is not understood here: {error}") from None
        environment = self.by_key.get(key)
        if environment is None:
            for field, value in (("working_dir", env.get("working_dir")), *_each(env, "py_modules")):
                if value is not None and (not isinstance(value, str) or PACKAGE_URI.fullmatch(value) is None):
                    raise ValueError(f"{field} {value!r} of the runtime environment is not packed")
            packages = [self._package(uri) for uri in dict.fromkeys(env.uris)]
            environment = self.by_key[key] = Environment(key, encode(env), env, packages)
        self._by_text[text] = environment
        environment.texts.append(text)
        return environment

    def _package(self, uri: str) -> Package:
        package = self.packages.get(uri)
        if package is None:
            package = self.packages[uri] = Package(uri, self.root)
        self.packages.move_to_end(uri)
        return package

    def _evict(self) -> None:
        """Lets go of packages that nobody uses, as long as all together take too much."""
        limit = self.raylet.config.environment_bytes_max
        if self._bytes <= limit:
            return
        for package in [each for each in self.packages.values() if each.ready and not each.users]:
            del self.packages[package.uri]
            self._bytes -= package.bytes
            old = f"{package.folder}.old-{os.urandom(4).hex()}"  # it may be wanted again before this one is gone
            try:
                os.rename(package.folder, old)
            except OSError as error:
                log.error("cannot remove %s: %s", package.folder, error)
                continue
            self._in_thread(functools.partial(remove_tree, old))
            if self._bytes <= limit:
                return

    # --- making them ready --------------------------------------------------------------------------------------------

    def prepare(self, environment: Environment, done: Done) -> None:
        """Has its packages here; `done` is told, at once if they are."""
        if environment.meaning:
            done("")
            return
        waiting = {package.uri for package in environment.packages}
        finished = False

        def finish(error: str) -> None:
            nonlocal finished
            if finished:
                return
            finished = True
            if timer is not None:
                timer.cancel()
            if not error and not environment.meaning:
                environment.meaning = _meaning(environment.text, environment.env, environment.packages)
            done(error)

        def one_done(uri: str, error: str) -> None:
            waiting.discard(uri)
            if error or not waiting:
                finish(error)

        timer: Timer | None = None
        if environment.timeout_ms != float("inf"):
            text = f"its packages were not here within {environment.timeout_ms / 1000:g} s (setup_timeout_seconds)"
            timer = self.raylet.reactor.call_later(environment.timeout_ms, lambda: finish(text))
        for package in environment.packages:
            self._fetch(package, functools.partial(one_done, package.uri))

    def _fetch(self, package: Package, done: Done) -> None:
        if package.ready:
            done("")
            return
        package.waiters.append(done)
        if len(package.waiters) == 1:
            _Download(self, package)

    def _fetched(self, package: Package, error: str, size_bytes: int = 0) -> None:
        """Told by a download, once."""
        waiters, package.waiters = package.waiters, []
        if error:
            error = f"package {package.uri}: {error}"
            log.error("%s", error)
        else:
            package.ready, package.bytes = True, size_bytes
            self._bytes += size_bytes
        for done in waiters:
            done(error)
        if not package.users and not package.ready:
            self.packages.pop(package.uri, None)
        self._evict()

    # --- threads ------------------------------------------------------------------------------------------------------

    def _in_thread(self, work: Callable[[], Any]) -> None:
        """Runs what blocks, beside the loop."""

        def run() -> None:
            try:
                work()
            finally:
                self._threads.discard(thread)

        thread = threading.Thread(target=run, name="ftray-environments", daemon=True)
        self._threads.add(thread)
        thread.start()

    def unpack(self, package: Package, data: bytes) -> None:
        """Unpacks what has been downloaded, in a thread, and goes on under the lock."""
        reactor = self.raylet.reactor
        bytes_max = self.raylet.config.package_bytes_max

        def work() -> None:
            error = ""
            try:
                os.makedirs(self.root, mode=0o700, exist_ok=True)
                if not os.path.isdir(package.folder):
                    unpack(data, package.digest, package.folder, bytes_max, lambda: self._stopped)
            except (PackageError, OSError) as problem:
                error = str(problem)
            except Exception as problem:
                error = f"{type(problem).__name__}: {problem}"
            with reactor.lock:
                if not self._stopped:
                    reactor.call_later(0, lambda: self._fetched(package, error, len(data)))

        self._in_thread(work)

    def close(self) -> None:
        """The node stops: what is being unpacked ends after the file it is at."""
        self._stopped = True
        for thread in list(self._threads):
            thread.join()


def _each(env: RuntimeEnv, field: str) -> list[tuple[str, Any]]:
    return [(field, value) for value in env.get(field, ())]


class _Download:
    """Reads a package from the control service, chunk after chunk."""

    def __init__(self, environments: Environments, package: Package) -> None:
        self.environments = environments
        self.package = package
        self.data = bytearray()
        self.manifest: Manifest | None = None
        self.number = 0
        self._read(package.digest, self._manifest)

    def _read(self, key: bytes, then: Callable[[bytes | None], None]) -> None:
        self.environments.raylet.gcs.read(
            Table.KV,
            kv_key(PACKAGES, key),
            lambda record: then(record.value if isinstance(record, KvRecord) else None),
            on_error=lambda code, text: self._fail(f"the control service can't give it: {text}"),
            immutable=True,
        )

    def _fail(self, error: str) -> None:
        self.environments._fetched(self.package, error)

    def _manifest(self, value: bytes | None) -> None:
        if value is None:
            self._fail("it is not in this cluster (a package is known only to the cluster it was uploaded to)")
            return
        try:
            self.manifest = msgspec.msgpack.decode(value, type=Manifest)
            if self.manifest.chunk_bytes < 1 or self.manifest.size_bytes < 0:
                raise ValueError("sizes below zero")
        except ValueError as error:
            self._fail(f"it is damaged: its manifest can't be read ({error})")
            return
        limit = self.environments.raylet.config.package_bytes_max
        if self.manifest.size_bytes > limit:
            self._fail(f"it has {self.manifest.size_bytes:,} bytes, over the limit of {limit:,} (package_bytes_max)")
            return
        self._next()

    def _next(self) -> None:
        assert self.manifest is not None
        if self.number == self.manifest.chunks:
            self.environments.unpack(self.package, bytes(self.data))
            return
        self._read(chunk_key(self.package.digest, self.number), self._chunk)

    def _chunk(self, value: bytes | None) -> None:
        assert self.manifest is not None
        if value is None or len(value) > self.manifest.chunk_bytes:
            self._fail(f"it is damaged: part {self.number + 1} of {self.manifest.chunks} is missing")
            return
        self.data += value
        self.number += 1
        self._next()
