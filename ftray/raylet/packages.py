"""Packages of runtime environments: how they lie in the cluster's key-value table, and how they are unpacked.

Role: shell, with no state; for the driver, which packs, and the raylet, which unpacks. A package is the bytes of a zip
file (a wheel is one too), named by their hash, so whoever has read one can check that it is undamaged. It lies in the
table in chunks, under its hash and a number, and a manifest under the hash alone, which is written last.

Rules: nothing is written outside the folder that a package is unpacked into, whatever the names in it say; the folder
gets its name when it is complete, so that it is either whole or not there.

Rejected: one entry for a package (an entry of 100 MB would hold up everything else in the control service);
`ZipFile.extractall` (it renames bad names instead of refusing them, and turns symbolic links into files of text).
"""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from collections.abc import Callable
from typing import IO

import msgspec

from ftray.ids import content_hash

CHUNK_BYTES = 4 << 20
DEPTH_MAX = 256
"""Folders in folders: what removes them again is one call deep for each."""


class PackageError(ValueError):
    """A package can't be used: the text says why, as a clause."""


class Manifest(msgspec.Struct, array_like=True, frozen=True):
    """What lies under the hash of a package."""

    size_bytes: int
    chunk_bytes: int

    @property
    def chunks(self) -> int:
        """How many there are."""
        return -(-self.size_bytes // self.chunk_bytes)


def package_uri(data: bytes, suffix: str) -> str:
    """The name of a package; `suffix` is zip or whl."""
    return f"gcs://ftray_pkg_{content_hash(data).hex()}.{suffix}"


def chunk_key(digest: bytes, number: int) -> bytes:
    """The key of a chunk."""
    return digest + number.to_bytes(4, "big")


def check_members(archive: zipfile.ZipFile, bytes_max: int) -> None:
    """Raises PackageError for an archive that can't be unpacked safely, or is larger than `bytes_max` unpacked."""
    total = 0
    for info in archive.infolist():
        name = info.filename
        parts = name.split("/")
        if name.startswith("/") or ".." in parts or "\0" in name:
            raise PackageError(f"its member {name!r} would lie outside its folder")
        if len(parts) > DEPTH_MAX + 2:  # the file's own name, and the package's of a folder in `py_modules`
            raise PackageError(f"its member {name[:40]}... is nested more deeply than {DEPTH_MAX} folders")
        if info.flag_bits & 1:
            raise PackageError(f"its member {name!r} is encrypted")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind == stat.S_IFLNK:
            raise PackageError(f"its member {name!r} is a symbolic link: pack the file that it points to")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise PackageError(f"its member {name!r} is no file")
        total += info.file_size
    if total > bytes_max:
        raise PackageError(
            f"it has {total:,} bytes when unpacked, over the limit of {bytes_max:,} (the setting package_bytes_max)"
        )


def unpack(data: bytes, digest: bytes, folder: str, bytes_max: int, stopped: Callable[[], bool]) -> None:
    """Makes `folder` with what is in the package. It is there, whole, when this returns.

    `stopped` is asked between files. Raises PackageError, OSError; then nothing is left.
    """
    if content_hash(data) != digest:
        raise PackageError("it is damaged: its content does not match its name")
    part = f"{folder}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        os.makedirs(part, mode=0o700)
        with zipfile.ZipFile(_readable(data)) as archive:
            check_members(archive, bytes_max)
            for info in archive.infolist():
                if stopped():
                    raise PackageError("the node is stopping")
                _extract(archive, info, part)
        os.rename(part, folder)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise PackageError(f"it is no usable zip file: {error}") from None
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _readable(data: bytes) -> IO[bytes]:
    import io

    return io.BytesIO(data)


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, folder: str) -> None:
    target = os.path.join(folder, *[part for part in info.filename.split("/") if part not in ("", ".")])
    if info.is_dir():
        os.makedirs(target, mode=0o755, exist_ok=True)
        return
    os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
    mode = 0o755 if (info.external_attr >> 16) & 0o111 else 0o644
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with archive.open(info) as source, open(fd, "wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
