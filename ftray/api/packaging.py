"""From local folders and files to packages of the cluster: what a runtime environment needs before it can travel.

Role: shell, in drivers and workers, on the user's thread. A folder becomes a zip file that depends on nothing but its
names and contents, and is uploaded once; what is in the table already is not sent again. A folder that has not changed
since it was packed is not packed again: a walk over its names, sizes and times tells.

Rules:
- Symbolic links are followed, as far as they do not lead in circles; sockets, pipes and devices are left out, with a
  warning. What can't be read is an error that names it. What vanishes meanwhile is not there: programs that are running
  write and delete.
- Left out are `LEFT_OUT`, what `.gitignore` files and `IGNORE_FILES` say, and `excludes`, which has the last word.
- The environment may be used when this returns: the control service has acknowledged its packages.

Rejected: times in the zip file (the same folder checked out twice would be two packages); packing in the background (a
task could then fail for a reason that the caller would have wanted to know at once).
"""

from __future__ import annotations

import io
import logging
import os
import stat
import sys
import time
import zipfile
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import msgspec

from ftray.api.ignoring import Rules, left_out
from ftray.exceptions import GcsUnavailableError, RuntimeEnvSetupError
from ftray.gcs.state.commands import KvPut
from ftray.gcs.state.packages import PACKAGES, USERS
from ftray.ids import content_hash
from ftray.ownership.tasks import FunctionInfo
from ftray.raylet.packages import CHUNK_BYTES, DEPTH_MAX, Manifest, PackageError, check_members, chunk_key, package_uri
from ftray.runtime_env import PACKAGE_URI, RuntimeEnv, decode, encode, merge
from ftray.worker.core import Core
from ftray.worker.gcs_access import wait_for_gcs
from ftray.worker.objects import Answer
from ftray.worker.serialization import serialize_function

log = logging.getLogger("ftray")

LEFT_OUT = (".git/", ".venv/", "venv/", "__pycache__/")
IGNORE_FILES = (".ftrayignore", ".rayignore")
"""Files with patterns for packages alone, looked at after `.gitignore`; projects that come from Ray have the second."""
NO_GITIGNORE = "FTRAY_RUNTIME_ENV_IGNORE_GITIGNORE"
"""Set to 1 in the environment of who packs: `.gitignore` files are not looked at."""
_NAMED_MAX = 10
_SETTLED_S = 2.0
"""A file that was written so shortly before its folder was walked may change again without showing it."""
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


class Member(NamedTuple):
    """One file or folder of a package, and what tells whether it has changed."""

    name: str
    path: str
    is_dir: bool
    executable: bool
    size_bytes: int
    mtime_ns: int
    inode: int


_packed: dict[tuple[bytes, str, str, tuple[str, ...], bool], tuple[tuple[Member, ...], str]] = {}
"""(process, kind, path, excludes, with .gitignore) -> what was found there, and the package that was made of it."""
_used: set[tuple[bytes, bytes]] = set()
"""(process, digest) of what this job has said that it uses."""


# --- the environment of a task, an actor, a job -----------------------------------------------------------------------


def environment_of(core: Core, own: Mapping[str, Any] | None) -> str:
    """The environment of a task or actor that says `own`, made here: as JSON, with all that it needs uploaded.

    Not under the lock. Raises as `pack_environment` does.
    """
    if not own:
        return core.environment
    packed = pack_environment(core, own)
    return encode(merge(decode(core.environment), packed))


def pack_environment(core: Core, own: Mapping[str, Any]) -> RuntimeEnv:
    """The same environment with packages of the cluster in the place of what is local. Not under the lock.

    Raises ValueError for a path that is not there or not usable, RuntimeEnvSetupError for what can't be read or is too
    large, SerializationError for a hook that can't be pickled, GcsUnavailableError.
    """
    env = RuntimeEnv.of(own)
    excludes = tuple(env.pop("excludes", ()))
    if "working_dir" in env:
        env["working_dir"] = _folder_or_archive(core, "working_dir", env["working_dir"], excludes)
    if "py_modules" in env:
        env["py_modules"] = [_module(core, each, excludes) for each in env["py_modules"]]
    for uri in RuntimeEnv.of(own).uris:  # made by another call, or another job
        _use(core, bytes.fromhex(uri.partition("pkg_")[2].partition(".")[0]))
    hook = env.get("worker_process_setup_hook")
    if hook is not None and not isinstance(hook, str):
        data, function_id = serialize_function(hook)
        name = getattr(hook, "__qualname__", type(hook).__qualname__)
        core.submitter.export(FunctionInfo(function_id, f"the setup hook {name}"), data)
        env["worker_process_setup_hook"] = f"gcs://ftray_hook_{function_id.hex()}"
    return env


def check_paths(env: RuntimeEnv) -> None:
    """What can be seen to be wrong without a cluster. Raises ValueError."""
    if "working_dir" in env and not PACKAGE_URI.fullmatch(env["working_dir"]):
        _existing("working_dir", env["working_dir"], (".zip",))
    for each in env.get("py_modules", ()):
        if isinstance(each, ModuleType):
            _path_of_module(each)
        elif not PACKAGE_URI.fullmatch(each):
            _existing("py_modules", each, (".py", ".zip", ".whl"))


def portable(options: dict[str, Any], core: Core | None) -> dict[str, Any]:
    """Options for another process: local paths in `runtime_env` mean something here alone."""
    own = options.get("runtime_env")
    if not own or core is None:
        return options
    return {**options, "runtime_env": pack_environment(core, own)}


# --- paths ------------------------------------------------------------------------------------------------------------


def _existing(field: str, path: str, suffixes: tuple[str, ...]) -> str:
    """The path made absolute. Raises ValueError unless it is a folder, or a file with one of the suffixes."""
    full = os.path.abspath(os.path.expanduser(path))
    shown = f"{path!r}" + (f" (that is {full})" if full != path else "")
    try:
        mode = os.stat(full).st_mode
    except OSError as error:
        raise ValueError(f"{field}: {shown} can't be used: {error.strerror}") from None
    if not stat.S_ISDIR(mode) and not (stat.S_ISREG(mode) and full.endswith(suffixes)):
        what = "is neither a folder nor a file" if not stat.S_ISREG(mode) else "is not the right kind of file"
        raise ValueError(f"{field}: {shown} {what}: it must be a folder, or end with {' or '.join(suffixes)}")
    return full


def _folder_or_archive(core: Core, field: str, path: str, excludes: tuple[str, ...]) -> str:
    if PACKAGE_URI.fullmatch(path):
        return path
    full = _existing(field, path, (".zip",))
    if os.path.isdir(full):
        return _pack_folder(core, field, full, "", excludes)
    return _upload_archive(core, field, full)


def _module(core: Core, module: Any, excludes: tuple[str, ...]) -> str:
    field = "py_modules"
    if isinstance(module, ModuleType):
        full = _path_of_module(module)
    elif PACKAGE_URI.fullmatch(module):
        return str(module)
    else:
        full = _existing(field, module, (".py", ".zip", ".whl"))
    if os.path.isdir(full):
        return _pack_folder(core, field, full, os.path.basename(full) + "/", excludes)
    if full.endswith((".zip", ".whl")):
        return _upload_archive(core, field, full)
    return _pack_file(core, field, full)


def _path_of_module(module: ModuleType) -> str:
    """The folder or file of an imported module; of a submodule, that of its top-level package."""
    top = module.__name__.partition(".")[0]
    module = sys.modules.get(top, module)
    if top == "__main__":
        raise ValueError("py_modules: the program itself is no module to send: move what is shared into one")
    folders = list(getattr(module, "__path__", ()))
    if len(folders) > 1:
        raise ValueError(f"py_modules: {top} is spread over {len(folders)} folders: name them as paths")
    path = folders[0] if folders else getattr(module, "__file__", None)
    if not isinstance(path, str) or not os.path.exists(path):
        raise ValueError(f"py_modules: module {top} has no folder or file: it is built in, or made at run time")
    return os.path.abspath(path)


# --- walking ----------------------------------------------------------------------------------------------------------


class _Walk:
    """Finds the members of a folder."""

    def __init__(self, field: str, root: str, bytes_max: int, excludes: tuple[str, ...], gitignore: bool) -> None:
        self.field = field
        self.root = root
        self.bytes_max = bytes_max
        self.gitignore = gitignore
        self.members: list[Member] = []
        self.total = 0
        self.odd: list[str] = []
        self.unreadable: list[str] = []
        self.first = [Rules("", LEFT_OUT)]
        self.last = [Rules("", excludes)]
        self._ahead: list[tuple[str, str, list[Rules], tuple[str, ...]]] = [(root, "", [], (os.path.realpath(root),))]
        """Folders to read. A list, since calls nested as deeply could be too many for the caller's stack."""
        while self._ahead:
            self._folder(*self._ahead.pop())

    def _folder(self, path: str, inner: str, rules: list[Rules], above: tuple[str, ...]) -> None:
        try:
            with os.scandir(path) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if not inner or not isinstance(error, FileNotFoundError):
                self.unreadable.append(f"{inner or '.'} ({error.strerror})")
            return
        names = {entry.name for entry in entries}
        for name in (".gitignore", *IGNORE_FILES) if self.gitignore else IGNORE_FILES:
            full = os.path.join(path, name)
            if name not in names or not os.path.isfile(full):
                continue
            try:
                with open(full, encoding="utf-8", errors="surrogateescape") as file:
                    rules = [*rules, Rules(inner, file.read(1 << 20).splitlines())]
            except FileNotFoundError:
                pass
            except OSError as error:
                self.unreadable.append(f"{inner}{name} ({error.strerror})")
        before = len(self._ahead)
        for entry in entries:
            self._entry(entry, inner + entry.name, rules, above)
        self._ahead[before:] = reversed(self._ahead[before:])

    def _entry(self, entry: os.DirEntry[str], inner: str, rules: list[Rules], above: tuple[str, ...]) -> None:
        # As git sees it, a link to a folder is no folder; but it is one to who excludes it.
        is_dir = _is_dir(entry)
        if left_out((*self.first, *rules, *self.last), inner, is_dir):
            return
        try:
            inner.encode()
        except UnicodeEncodeError:
            self.unreadable.append(f"{inner!r} (its name is not UTF-8)")
            return
        try:
            status = entry.stat()
        except OSError as error:
            if entry.is_symlink():
                self.odd.append(f"{inner} (a link to nothing)")
            elif not isinstance(error, FileNotFoundError):
                self.unreadable.append(f"{inner} ({error.strerror})")
            return
        if is_dir:
            real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
            if real in above:
                self.odd.append(f"{inner} (a link to a folder above it)")
                return
            self.members.append(Member(inner + "/", entry.path, True, False, 0, 0, 0))
            if len(above) > DEPTH_MAX:
                raise RuntimeEnvSetupError(
                    f"{self.field}: {self.root} has folders nested more deeply than {DEPTH_MAX}, such as {inner[:80]}"
                    "...: leave them out with `excludes`"
                )
            self._ahead.append((entry.path, inner + "/", rules, (*above, real)))
        elif stat.S_ISREG(status.st_mode):
            self.total += status.st_size
            executable = bool(status.st_mode & 0o111)
            self.members.append(
                Member(inner, entry.path, False, executable, status.st_size, status.st_mtime_ns, status.st_ino)
            )
            if self.total > self.bytes_max:
                raise self._too_large()
        else:
            self.odd.append(f"{inner} ({_KINDS.get(stat.S_IFMT(status.st_mode), 'no file')})")

    def _too_large(self) -> RuntimeEnvSetupError:
        largest = sorted(self.members, key=lambda member: -member.size_bytes)[:3]
        named = ", ".join(f"{member.name} ({member.size_bytes:,} bytes)" for member in largest)
        return RuntimeEnvSetupError(
            f"{self.field}: {self.root} has more than {self.bytes_max:,} bytes (the setting package_bytes_max). The "
            f"largest files up to there are {named}: leave out what is not needed with `excludes` or a .gitignore file"
        )


_KINDS = {
    stat.S_IFSOCK: "a socket", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


# --- packing ----------------------------------------------------------------------------------------------------------


def _pack_folder(core: Core, field: str, full: str, prefix: str, excludes: tuple[str, ...]) -> str:
    gitignore = os.environ.get(NO_GITIGNORE, "") in ("", "0")
    key = (core.worker_id, prefix, full, excludes, gitignore)
    began_ns = time.time_ns()
    walk = _Walk(field, full, core.config.package_bytes_max, excludes, gitignore)
    if walk.unreadable:
        raise _unreadable(field, full, walk.unreadable)
    members = tuple(walk.members)
    before = _packed.get(key)
    if before is not None and before[0] == members:
        return before[1]
    if walk.odd:
        more = f" and {len(walk.odd) - _NAMED_MAX} more" if len(walk.odd) > _NAMED_MAX else ""
        log.warning("%s: left out of %s: %s%s", field, full, ", ".join(walk.odd[:_NAMED_MAX]), more)
    uri = _upload(core, field, full, _zip(field, full, prefix, members, core.config.package_bytes_max), "zip")
    newest_ns = max((member.mtime_ns for member in members), default=0)
    if newest_ns + _SETTLED_S * 1e9 < began_ns:
        for other in [other for other in _packed if other[0] != core.worker_id]:
            del _packed[other]  # of an earlier session
        _used.difference_update([other for other in _used if other[0] != core.worker_id])
        _packed[key] = (members, uri)
    return uri


def _pack_file(core: Core, field: str, full: str) -> str:
    status = os.stat(full)
    member = Member(os.path.basename(full), full, False, False, status.st_size, 0, 0)
    bytes_max = core.config.package_bytes_max
    return _upload(core, field, full, _zip(field, full, "", (member,), bytes_max), "zip")


def _zip(field: str, full: str, prefix: str, members: tuple[Member, ...], bytes_max: int) -> bytes:
    """The package: the same for the same names, contents and executable bits."""
    sink = io.BytesIO()
    unreadable = []
    total = 0
    with zipfile.ZipFile(sink, "w") as archive:
        if prefix:
            archive.writestr(_info(prefix, 0o755 | stat.S_IFDIR), b"")
        for member in members:
            name = prefix + member.name
            if member.is_dir:
                archive.writestr(_info(name, 0o755 | stat.S_IFDIR), b"")
                continue
            try:
                with open(os.open(member.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                    data = file.read(bytes_max - total + 1)
            except FileNotFoundError:
                continue
            except OSError as error:
                unreadable.append(f"{member.name} ({error.strerror})")
                continue
            total += len(data)
            if total > bytes_max:
                raise RuntimeEnvSetupError(
                    f"{field}: {full} has grown beyond {bytes_max:,} bytes (the setting package_bytes_max) while it "
                    f"was read, at {member.name}"
                )
            archive.writestr(_info(name, (0o755 if member.executable else 0o644) | stat.S_IFREG), data, compresslevel=1)
    if unreadable:
        raise _unreadable(field, full, unreadable)
    return sink.getvalue()


def _info(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _ZIP_TIME)
    info.create_system = 3
    info.external_attr = mode << 16
    info.compress_type = zipfile.ZIP_DEFLATED if stat.S_ISREG(mode) else zipfile.ZIP_STORED
    return info


def _unreadable(field: str, full: str, names: list[str]) -> RuntimeEnvSetupError:
    more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
    return RuntimeEnvSetupError(
        f"{field}: what is in {full} can't all be read: {', '.join(names[:_NAMED_MAX])}{more}. Make it readable, or "
        "leave it out with `excludes`"
    )


# --- uploading --------------------------------------------------------------------------------------------------------


def _upload_archive(core: Core, field: str, full: str) -> str:
    """A .zip or .whl file as it is."""
    bytes_max = core.config.package_bytes_max
    try:
        with open(full, "rb") as file:
            data = file.read(bytes_max + 1)
    except OSError as error:
        raise _unreadable(field, os.path.dirname(full), [f"{os.path.basename(full)} ({error.strerror})"]) from None
    if len(data) > bytes_max:
        raise RuntimeEnvSetupError(f"{field}: {full} has more than {bytes_max:,} bytes (the setting package_bytes_max)")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            check_members(archive, bytes_max)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{field}: {full} is no zip file: {error}") from None
    except PackageError as error:
        raise RuntimeEnvSetupError(f"{field}: {full} can't be used: {error}") from None
    return _upload(core, field, full, data, full.rpartition(".")[2])


def _upload(core: Core, field: str, full: str, data: bytes, suffix: str) -> str:
    """Stores a package unless it is there; returns its name. Raises GcsUnavailableError, RuntimeEnvSetupError."""
    digest = content_hash(data)
    _use(core, digest)
    there = Answer()
    with core.lock:
        core.gcs.read_kv(PACKAGES, digest, there.give)
        core.settle()
    wait_for_gcs(core, there, "uploading a runtime_env")
    if there.message is None:
        log.info("%s: uploading %s (%d bytes)", field, full, len(data))
        chunk_bytes = min(CHUNK_BYTES, core.config.value_bytes_max)
        manifest = Manifest(len(data), chunk_bytes)
        for number in range(manifest.chunks):
            part = data[number * chunk_bytes : (number + 1) * chunk_bytes]
            _put(core, full, PACKAGES, chunk_key(digest, number), part)
        _put(core, full, PACKAGES, digest, msgspec.msgpack.encode(manifest))
    return package_uri(data, suffix)


def _use(core: Core, digest: bytes) -> None:
    """Says that this job uses a package, before it looks for it: then it is not deleted until the job ends."""
    if (core.worker_id, digest) not in _used:
        for key in (core.job_id, core.job_id + digest):
            _put(core, f"package {digest.hex()}", USERS, key, b"")
        _used.add((core.worker_id, digest))


def _put(core: Core, what: str, namespace: str, key: bytes, value: bytes) -> None:
    stored = Answer()
    with core.lock:
        core.check_open()
        core.gcs.command(KvPut(namespace, key, value), stored.give)
        core.settle()
    wait_for_gcs(core, stored, "uploading a runtime_env")
    result = stored.message
    core.check_open()
    if result is None:
        raise GcsUnavailableError(f"runtime_env: {what} could not be uploaded: no GCS answers")
    if result.code:
        raise RuntimeEnvSetupError(f"runtime_env: {what} could not be uploaded: {result.message or result.code}")
