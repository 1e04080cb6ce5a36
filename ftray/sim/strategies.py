"""Strategies of hypothesis: schedules of faults, what a world is made of, and ways to make a failing run simpler.

Role: pure. It is imported by property tests, and by the shrinker when hypothesis is installed; nothing else of ftray
needs hypothesis.

What hypothesis takes for simple: few faults; at the beginning and at round times; short; of head 0, without the flag;
few heads and clients; little time.

`simpler` begins at a run that has failed. hypothesis can't be handed a first example to shrink, and finds it
here because nearly all it draws means "as it was": each number is drawn from a large range of which only the smallest
numbers are changes, 0 the greatest one. To shrink is to make numbers small, so changes are what it tries to make,
and keeps those with which the run still fails.

Rejected: a private runner of hypothesis with a prepared choice sequence (its form changes with each release);
drawing schedules anew until one fails as the seed's did (most failures are rare).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st

from ftray.sim.faults import KINDS, LEADER, Fault
from ftray.sim.world import Options

AS_IT_WAS = (1 << 16) - 1
"""What is drawn ranges from 0 to this."""


# --- drawn from nothing -----------------------------------------------------------------------------------------------


@st.composite
def faults(draw: st.DrawFn, kinds: Sequence[str], heads: int, clients: int, length_ms: float) -> Fault:
    """One fault, with the number 0."""
    kind = draw(st.sampled_from([name for each in kinds for name, _ in KINDS[each]]))
    if kind.endswith("_client"):
        target = draw(st.integers(0, max(0, clients - 1)))
    else:
        target = draw(st.sampled_from([0, LEADER, *range(1, heads)]))
    return Fault(
        number=0,
        at_ms=10.0 * draw(st.integers(0, max(0, int(length_ms / 10.0) - 1))),
        kind=kind,
        target=target,
        other=draw(st.integers(0, heads - 1)),
        duration_ms=10.0 * draw(st.integers(1, 150)),
        amount=draw(st.integers(0, 99)) / 100.0,
        flag=draw(st.booleans()),
    )


def schedules(
    kinds: Sequence[str], heads: int, clients: int, length_ms: float, faults_max: int = 20
) -> st.SearchStrategy[tuple[Fault, ...]]:
    """Schedules in the order of time, numbered from 0."""
    if not kinds:
        return st.just(())
    drawn = st.lists(faults(kinds, heads, clients, length_ms), max_size=faults_max)
    return drawn.map(
        lambda each: tuple(
            replace(fault, number=number) for number, fault in enumerate(sorted(each, key=lambda fault: fault.at_ms))
        )
    )


@st.composite
def options(
    draw: st.DrawFn,
    *,
    heads: Sequence[int] = (3, 5),
    clients_max: int = 10,
    seconds: Sequence[float] = (1.0, 2.0, 3.0),
    kinds: Sequence[str] = tuple(KINDS),
    faults_max: int = 20,
) -> Options:
    """A world's options, with a schedule for it."""
    size, length_s = draw(st.sampled_from(heads)), draw(st.sampled_from(seconds))
    clients = draw(st.integers(0, clients_max))
    return Options(
        heads=size,
        clients=clients,
        faults=tuple(kinds),
        seconds=length_s,
        pause_ms=draw(st.sampled_from([180.0, 60.0])),
        small=draw(st.booleans()),
        schedule=draw(schedules(kinds, size, clients, length_s * 1000.0, faults_max)),
    )


# --- beginning at one that has failed ---------------------------------------------------------------------------------


def _times(value: float) -> list[float]:
    """Simpler times: none, and rounder ones, the roundest first."""
    return [0.0, *(step * (value // step) for step in (1000.0, 500.0, 100.0, 50.0, 10.0, 1.0))]


def _durations(value: float) -> list[float]:
    """Shorter ones, then rounder ones."""
    return [*(each for each in (10.0, 50.0, 100.0, 200.0, 500.0) if each < value), *_times(value)[3:]]


def _amounts(value: float) -> list[float]:
    return [0.0, 0.5, round(value, 1), round(value, 2)]


@st.composite
def simpler(draw: st.DrawFn, failed: Options) -> Options:
    """`failed`, which has a schedule, or something simpler. It draws as often each time, so that nothing shifts."""

    def one_of(usual: float, choices: Sequence[float]) -> float:
        distinct = [each for number, each in enumerate(choices) if each != usual and each not in choices[:number]]
        drawn = draw(st.integers(0, AS_IT_WAS))
        return distinct[drawn] if drawn < len(distinct) else usual

    old = failed.schedule or ()
    clients = int(one_of(failed.clients, [each for each in (0, 1, 2, 3, 5) if each < failed.clients]))
    changed = []
    for fault in old:
        kept = draw(st.integers(0, AS_IT_WAS)) > 0
        new = replace(
            fault,
            target=int(one_of(fault.target, [0])),
            flag=bool(one_of(fault.flag, [False])),
            other=int(one_of(fault.other, [0])),
            duration_ms=one_of(fault.duration_ms, [each for each in _durations(fault.duration_ms) if each > 0]),
            at_ms=one_of(fault.at_ms, _times(fault.at_ms)),
            amount=one_of(fault.amount, _amounts(fault.amount)),
        )
        if new.kind.endswith("_client") and new.target >= clients:
            new = replace(new, target=0)
        if kept:
            changed.append(new)
    last_ms = max((fault.at_ms + 2 * fault.duration_ms for fault in changed), default=0.0)
    length_s = 0.5 * (int(last_ms / 500.0) + 1)  # all faults are over by then
    seconds = one_of(failed.seconds, [length_s] if length_s < failed.seconds else [])
    return replace(failed, clients=clients, seconds=seconds, schedule=tuple(changed), only=None)
