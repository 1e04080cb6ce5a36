"""The output of workers on the driver's terminal.

Role: shell. Lines arrive in the loop, which must not block on a terminal, so a thread writes them: stdout lines to
stdout, stderr lines to stderr, each with `(name pid=N)` in front. A line that many workers print at once is printed
once, with a count.
"""

from __future__ import annotations

import queue
import sys
import threading
from typing import Any

from ftray.wire.messages import LogLines

FOLD_MIN = 4
"""The same text from this many workers within a batch is folded."""


class OutputPrinter:
    """Takes `LogLines`; its thread starts with the first."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[LogLines | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __call__(self, message: Any) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ftray-output", daemon=True)
            self._thread.start()
        self._queue.put(message)

    def close(self) -> None:
        """Prints what has arrived, then ends the thread."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(2.0)

    def _run(self) -> None:
        while True:
            message = self._queue.get()
            if message is None:
                return
            lines = list(message.lines)
            dropped = message.dropped
            while not self._queue.empty():
                more = self._queue.get()
                if more is None:
                    write(lines, dropped)
                    return
                lines += more.lines
                dropped += more.dropped
            write(lines, dropped)


def fold(lines: list[tuple[int, str, int, str]]) -> list[tuple[int, str]]:
    """(stream, text to print) for lines of workers, with repeats over several workers folded."""
    pids: dict[tuple[int, str, str], set[int]] = {}
    for stream, name, pid, text in lines:
        pids.setdefault((stream, name, text), set()).add(pid)
    printed: set[tuple[int, str, str]] = set()
    out: list[tuple[int, str]] = []
    for stream, name, pid, text in lines:
        key = (stream, name, text)
        who = name or "worker"
        if len(pids[key]) >= FOLD_MIN and text.strip():
            if key not in printed:
                printed.add(key)
                out.append((stream, f"({who} pid={pid}) {text} [the same from {len(pids[key])} workers]"))
        else:
            out.append((stream, f"({who} pid={pid}) {text}"))
    return out


def write(lines: list[tuple[int, str, int, str]], dropped: int) -> None:
    """Writes lines to the driver's own streams; a closed stream costs the lines, nothing else."""
    for number, target in ((1, sys.stdout), (2, sys.stderr)):
        text = "".join(line + "\n" for stream, line in fold(lines) if stream == number)
        if number == 2 and dropped:
            text += f"(ftray) {dropped} lines of worker output were left out here; the session's log files have them\n"
        if text and target is not None:
            try:
                target.write(text)
                target.flush()
            except (OSError, ValueError):
                pass
