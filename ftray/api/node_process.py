"""Starting and ending the node process of an embedded session.

Role: shell. The node gets its spec as one line on stdin, answers with one line on stdout, and lives until that stdin
closes: when the driver ends, however it ends, the kernel closes the pipe and the node stops.

Rejected: `atexit` as the only way to stop it (a SIGKILL runs no handler); a pid file (pids are reused).
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ftray.exceptions import FtrayError

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5.0


class NodeProcess:
    """A node process that this process has started and ends."""

    def __init__(self, spec: dict[str, Any]) -> None:
        root = str(Path(__file__).resolve().parents[2])
        code = f"import sys; sys.path.insert(0, {root!r}); from ftray.raylet.main import main; main()"
        # -P: nothing in the current directory can shadow the standard library. A session of its own: Ctrl-C on the
        # terminal reaches the driver alone.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        stdin = self.process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(spec).encode() + b"\n")
            stdin.flush()
        except OSError:
            pass  # it has died already: `ready` says why

    def ready(self) -> dict[str, Any]:
        """What the node says of itself. Raises FtrayError with its own words when it cannot start."""
        process = self.process
        assert process.stdout is not None and process.stderr is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        data = b""
        while not data.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                process.kill()
                process.wait()
                raise FtrayError(f"the node process did not start within {START_TIMEOUT_S:.0f} s")
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                break
            data += chunk
        answer: dict[str, Any] = {}
        if data.endswith(b"\n"):
            answer = json.loads(data)
        if not answer.get("ok"):
            error = answer.get("error", "")
            if not error:
                process.wait()
                error = process.stderr.read().decode("utf-8", "replace").strip() or f"exit code {process.returncode}"
            self.stop()
            raise FtrayError(f"the node process could not start: {error}")
        process.stdout.close()
        process.stderr.close()
        return answer

    def forget(self) -> None:
        """In a forked child: lets go of the lifeline, so that the node ends with the parent."""
        process = self.process
        if process.stdin is not None:
            process.stdin.close()
        process.returncode = 0  # it is no child of this process: nothing to wait for

    def stop(self) -> None:
        """Closes the lifeline and waits for the node to be gone; kills it if it takes too long."""
        process = self.process
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
