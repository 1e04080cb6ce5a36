"""What the integration tests share: drivers in processes of their own, waiting for a condition, finding leftovers.

Imported as `integration.harness`, in tests and (cheaply: standard library and ftray alone) inside tasks.

Rules: nothing is awaited by a fixed sleep. `wait_until` asks again until a deadline; tasks that must run at the same
time `meet` in a directory. Processes of a session are found by a mark in their environment, which a process keeps from
its start to its end whatever it does.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARK = "FTRAY_TEST_MARK"
POLL_S = 0.005
PRELUDE = """
import os, signal, sys, threading, time
import ftray

sys.stdout.reconfigure(line_buffering=True)

def say(*words):
    "Prints a line in one piece: the output of workers may come from another thread at any time."
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
"""


def wait_until(condition: Callable[[], Any], timeout_s: float = 10.0, what: str = "") -> Any:
    """Asks until the answer is true, and returns it. Raises AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what or getattr(condition, '__name__', condition)}")
        time.sleep(POLL_S)


def wait_for_none(found: Callable[[], Any], timeout_s: float = 10.0, what: str = "leftovers") -> None:
    """Asks until nothing is found. Raises AssertionError that shows what there still is."""
    deadline = time.monotonic() + timeout_s
    while left := found():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} after {timeout_s:g} s: {left}")
        time.sleep(POLL_S)


def meet(directory: str | Path, count: int, timeout_s: float = 10.0) -> None:
    """Returns when `count` callers are here at once: proof that they run at the same time."""
    Path(directory, uuid.uuid4().hex).touch()
    wait_until(lambda: len(os.listdir(directory)) >= count, timeout_s, f"{count} callers at once in {directory}")


def wait_for_file(path: str | Path, timeout_s: float = 20.0) -> None:
    wait_until(Path(path).exists, timeout_s, f"{path} exists")


def overlap_max(spans: Iterable[tuple[float, float]]) -> int:
    """The most spans (start, end) at any one time."""
    events = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    running = most = 0
    for _, change in events:
        running += change
        most = max(most, running)
    return most


# --- processes ------------------------------------------------------------------------------------------------------


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


def marked(mark: str, but: Iterable[int] = ()) -> dict[int, str]:
    """Running processes that were started with this mark: pid -> beginning of the command line."""
    wanted = f"{MARK}={mark}".encode()
    skip = {os.getpid(), *but}
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in skip:
            continue
        try:
            environ = Path("/proc", name, "environ").read_bytes()
            if wanted in environ.split(b"\0") and is_running(int(name)):
                found[int(name)] = Path("/proc", name, "cmdline").read_bytes()[:200].decode(errors="replace")
        except OSError:
            continue
    return found


def shm_files() -> set[str]:
    """Files of this user in /dev/shm."""
    found = set()
    for entry in os.scandir("/dev/shm"):
        try:
            if entry.stat(follow_symlinks=False).st_uid == os.getuid():
                found.add(entry.name)
        except OSError:
            continue
    return found


def session_leftovers(session_dir: str | Path) -> list[str]:
    """What of a session folder must not outlive its node."""
    return [name for name in ("node.json", "token", "sockets", "gcs", "spill") if Path(session_dir, name).exists()]


class Driver:
    """A Python program in a process of its own that uses ftray; its output goes to files that can be looked at."""

    def __init__(self, code: str, env: dict[str, str] | None = None, flags: tuple[str, ...] = ("-W", "error")) -> None:
        self.mark = uuid.uuid4().hex
        self._out = tempfile.TemporaryFile()
        self._err = tempfile.TemporaryFile()
        environ = {name: value for name, value in os.environ.items() if not name.startswith("FTRAY_")}
        environ |= {MARK: self.mark, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **(env or {})}
        self.process = subprocess.Popen(
            [sys.executable, *flags, "-c", PRELUDE + textwrap.dedent(code)],
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            env=environ,
        )

    @property
    def out(self) -> str:
        return os.pread(self._out.fileno(), 1 << 27, 0).decode(errors="replace")

    @property
    def err(self) -> str:
        return os.pread(self._err.fileno(), 1 << 27, 0).decode(errors="replace")

    def wait_for(self, text: str, timeout_s: float = 20.0) -> str:
        """Waits until it has printed a line that begins so; returns the rest of that line."""

        def look() -> str | None:
            for line in self.out.splitlines(keepends=True):
                if line.startswith(text) and line.endswith("\n"):
                    return line
            if self.process.poll() is not None:
                raise AssertionError(f"the driver ended ({self.process.returncode}) before {text!r}\n{self.dump()}")
            return None

        line: str = wait_until(look, timeout_s, f"{text!r} from the driver\n{self.dump()}")
        return line[len(text) :].strip()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def finish(self, timeout_s: float = 20.0) -> int:
        """Waits for its end; returns its code. Raises AssertionError when it hangs."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            self.process.wait(5)
            raise AssertionError(f"the driver did not end within {timeout_s:g} s\n{self.dump()}") from None

    def left(self) -> dict[int, str]:
        """Processes of its session that run."""
        return marked(self.mark, but=(self.process.pid,))

    def check_clean(self, session_dir: str = "", timeout_s: float = 5.0) -> None:
        """Nothing is left of it, at once or in a moment."""
        wait_for_none(self.left, timeout_s, "processes")
        assert not {name for name in shm_files() if "ftray" in name}
        if session_dir:
            wait_for_none(lambda: session_leftovers(session_dir), timeout_s, f"in {session_dir}")

    def dump(self) -> str:
        return f"--- stdout\n{self.out[-3000:]}\n--- stderr\n{self.err[-6000:]}"

    def close(self) -> None:
        """Ends what still runs of it, so that a failed test hurts no other."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in self.left():
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        self._out.close()
        self._err.close()

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def run_driver(code: str, timeout_s: float = 20.0, env: dict[str, str] | None = None) -> Driver:
    """Runs a program to its end; its session must have left no process. Raises AssertionError on a failure."""
    driver = Driver(code, env)
    try:
        code_ = driver.finish(timeout_s)
        assert code_ == 0, f"exit code {code_}\n{driver.dump()}"
        driver.check_clean()
    except BaseException:
        driver.close()
        raise
    return driver


# --- what a session still holds --------------------------------------------------------------------------------------


def entries_left() -> dict[str, Any]:
    """References that this process's table still has (those pickled out of band are pinned for good, and left out)."""
    from ftray.worker.core import get_core

    core = get_core()
    gc.collect()
    with core.lock:
        core.drain()
        core.settle()
        return {row.object_id.hex(): row for row in core.table.snapshot() if not core.entries[row.object_id].pinned}


def held() -> dict[str, Any]:
    """All that this driver and its node's store hold: empty once a program has dropped everything."""
    from ftray.api.context import ask_raylet
    from ftray.worker.core import get_core

    entries = entries_left()
    core = get_core()
    memory = ask_raylet("memory")
    found = {
        "entries": entries,
        "pins": dict(core.objects.pins),
        "unfinished": dict(core.submitter.unfinished),
        "store": memory["objects"],
    }
    return {name: value for name, value in found.items() if value}


def check_drained(timeout_s: float = 5.0) -> None:
    """Everything goes, within `timeout_s`."""
    wait_for_none(held, timeout_s, "held")


def worker_entries() -> int:
    """Inside a task or method: the references that this worker's table has."""
    return len(entries_left())
