"""What a head remembers of the other heads' disks, so that one which has gone back in time is recognised.

Role: logic; asks nobody, and forgets all when its process ends.

A head's directory may come back from a backup, or with a machine that was restored, or be copied and started a second
time. Its identity is right then, and yet what it has promised since is forgotten: it could vote twice in a term, and
its acknowledgements were counted for writes that it does not have. No head can see that in its own directory; those
that have heard it can.

Rules
- A head's term never falls. As long as it stays in a term, what it has acknowledged in that term, or has sent while it
  led, stays in its log. Both are durable before they are told (`replica.py`), so a crash breaks neither. Whoever comes
  back with less is refused, and stops.
- A process draws a number when it starts (`boot`). When two numbers replace each other again and again, two processes
  run with one identity. (Once or twice is no proof: a greeting of a process that is dead may have been held up.)

What this does not see: a copy that comes when all who remember have been restarted, or that has met only those who do
not know. So a directory must not be copied; `docs/heads.md` says it.

Rejected: to keep this in the journal (a sync more for each message that says something new); a count of starts in the
directory (a supervisor that starts an old copy again and again overtakes it).
"""

from __future__ import annotations

from ftray.gcs.raft.log import RaftLog
from ftray.gcs.raft.messages import Ack, Append, Hello, TermMessage

BOOTS_KEPT = 16
RETURNS_MAX = 3
"""So often each of two processes may take the other one's place."""


class _Known:
    __slots__ = ("boot", "boots", "index", "returns", "term")

    def __init__(self, boot: int) -> None:
        self.term = 0
        self.index = 0
        """The last entry that it has, for as long as it stays in that term."""
        self.boot = boot
        self.boots: dict[int, int] = {}
        """Those before, latest last, and how often each has come back."""
        self.returns = 0
        """How often the present one has."""


class Memory:
    """See the module. Heads are named by their ids."""

    def __init__(self, raft_log: RaftLog) -> None:
        self._log = raft_log
        self._known: dict[bytes, _Known] = {}

    def heard(self, peer: bytes, message: TermMessage) -> None:
        """A member has said this."""
        known = self._known.get(peer)
        if known is None or message.term < known.term:
            return
        if message.term > known.term:
            known.term, known.index = message.term, 0
        if type(message) is Append:
            known.index = max(known.index, message.previous_index + len(message.entries))
        elif type(message) is Ack and message.success and message.term == self._log.term:
            known.index = max(known.index, message.next_index - 1)

    def why_not(self, hello: Hello) -> str:
        """Why the head that greets so can't be the one that it says it is; '' if nothing speaks against it."""
        known = self._known.get(hello.replica_id)
        if known is None or hello.boot == known.boot:
            return ""  # of one process, a greeting over a second link may be older than what has come over the first
        who = f"replica {hello.replica_id.hex()} at {hello.endpoint}"
        if known.returns >= RETURNS_MAX and known.boots.get(hello.boot, 0) >= RETURNS_MAX:
            return (
                f"{who} runs twice: two processes have the same identity, because a directory was copied. Stop one of "
                "them, and let it join with an empty directory of its own (ftray heads add)"
            )
        if hello.boot in known.boots:
            return ""  # what a process has said once and what comes of it later may be in any order, too
        if hello.term < known.term or (hello.term == known.term and hello.last_index < known.index):
            return (
                f"{who} comes with term {hello.term} and {hello.last_index} entries, and has been at term {known.term} "
                f"with {known.index} entries here before: its directory is an older copy, or its disk has lost what "
                "was written, so that what it had promised is forgotten. Start it with its latest directory; if that "
                "is lost, start it with an empty one as a new head (ftray start --head --address), and let it take the "
                "former's place (ftray heads replace)"
            )
        return ""

    def greeted(self, hello: Hello) -> None:
        """A member has greeted, and nothing spoke against it."""
        known = self._known.get(hello.replica_id)
        if known is None:
            known = self._known[hello.replica_id] = _Known(hello.boot)
        elif known.boot != hello.boot:
            returns = known.boots.pop(hello.boot, -1) + 1
            known.boots[known.boot] = known.returns
            known.boot, known.returns = hello.boot, returns
            if len(known.boots) > BOOTS_KEPT:
                del known.boots[next(iter(known.boots))]
        if hello.term > known.term:  # its entries it need not have acknowledged to anybody
            known.term, known.index = hello.term, 0
