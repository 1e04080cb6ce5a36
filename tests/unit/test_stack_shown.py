"""`ftray stack`: what of a stack people are shown."""

from __future__ import annotations

import pytest

from ftray.cli.stack import _dump_of_user, _of_user
from ftray.cli.stack import _show as show

FRAMES = [
    "/usr/lib/python3/socket.py:10 recv",
    "/home/me/ftray/job.py:3 load",
    "/site/ftray/worker/execution.py:352 execute",
    "/site/ftray/raylet/main.py:1 main",
    "<string>:1 <module>",
]
DUMP = (
    'Thread 0x1 (most recent call first):\n  File "/lib/trio/run.py", line 1 in run\n\n'
    'Current thread 0x2 (most recent call first):\n  File "/home/me/job.py", line 3 in stuck\n'
    '  File "/site/ftray/worker/execution.py", line 352 in execute\n  File "<string>", line 1 in <module>\n'
)


def test_the_runtimes_frames_below_the_users_are_left_out() -> None:
    assert _of_user(FRAMES) == FRAMES[:2]
    assert _of_user(FRAMES[2:]) == FRAMES[2:3], "one is left of a thread that runs nothing of the user's"
    assert _of_user([]) == []


def test_so_are_those_of_a_dump() -> None:
    assert _dump_of_user(DUMP) == [
        "Thread 0x1 (most recent call first):", '  File "/lib/trio/run.py", line 1 in run',
        "Current thread 0x2 (most recent call first):", '  File "/home/me/job.py", line 3 in stuck',
    ]  # fmt: skip
    assert _dump_of_user("(no answer to the signal either: it is stopped)") == [
        "(no answer to the signal either: it is stopped)"
    ]
    assert _dump_of_user("") == []


def test_what_a_silent_worker_runs_is_not_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    silent = {"kind": "worker", "pid": 7, "running": "f", "answer": None, "error": "it does not answer", "dump": DUMP}
    show({"processes": [silent]}, everything=False, idle_too=False)
    shown = capsys.readouterr().out
    assert "worker 7, leased for f" in shown and "line 3 in stuck" in shown and "execution.py" not in shown
    show({"processes": [silent]}, everything=True, idle_too=True)
    assert "execution.py" in capsys.readouterr().out
