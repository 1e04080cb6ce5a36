"""The cheap checkers of histories: counters against the exact one, watch streams against a twin with plain lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from histories import mutate, simulate
from hypothesis import given
from hypothesis import strategies as st

from chaos.checkers.exactly_once import check_counter
from chaos.checkers.history import Value
from chaos.checkers.linearizability import Verdict, check
from chaos.checkers.models import ExactlyOnceCounter
from chaos.checkers.monotonic import Change, Resumed, Snapshot, Told, check_log, check_stream

seeds = st.integers(0, 2**32)
ROUNDS = 20
"""In each example."""


@given(seed=seeds)
def test_a_counter_is_blamed_only_for_what_is_wrong(seed: int) -> None:
    rng, model = Random(seed), ExactlyOnceCounter()
    for _ in range(ROUNDS):
        history = simulate(rng, model, rng.randint(1, 20), clients=rng.randint(1, 4), lose=rng.choice((0, 0.2)))
        assert check_counter(history).ok, "\n".join(map(str, history))
        changed = mutate(rng, mutate(rng, history))
        report = check_counter(changed)
        if not report.ok and check(changed, model, steps_max=20_000).verdict is not Verdict.UNDECIDED:
            assert not check(changed, model).ok, "\n".join([*map(str, changed), str(report)])


def test_most_wrong_totals_are_found() -> None:
    found = 0
    for seed in range(100):
        rng, model = Random(seed), ExactlyOnceCounter()
        history = simulate(rng, model, 60, clients=3, lose=0, eager=0.4)
        answered = [each for each in history if not each.unknown and isinstance(each.result, int)]
        wrong = rng.choice(answered)
        assert isinstance(wrong.result, int)
        changed = [each if each is not wrong else replace(each, result=wrong.result + 3) for each in history]
        found += not check_counter(changed).ok
    assert found >= 75, found


def as_of(log: Sequence[Change], revision: int) -> dict[Value, Value]:
    items = {each.key: each.value for each in log if each.revision <= revision}
    return {key: value for key, value in items.items() if value is not None}


def is_right(log: Sequence[Change], stream: Sequence[Told], keys: set[str], until: int) -> bool:
    """The twin: what is still to come is a list that is made anew each time."""
    log = [each for each in log if each.key in keys]
    told, coming = 0, list(log)
    for each in stream:
        if isinstance(each, Change):
            if not coming or coming.pop(0) != each:
                return False
            told = each.revision
        elif isinstance(each, Resumed):
            if coming != [one for one in log if one.revision > each.after]:
                return False
            told = each.after
        else:
            if each.revision < told or dict(each.items) != as_of(log, each.revision):
                return False
            told, coming = each.revision, [one for one in log if one.revision > each.revision]
    return all(one.revision > until for one in coming)


def random_log(rng: Random) -> list[Change]:
    log: list[Change] = []
    for revision in range(1, rng.randint(1, 8)):
        for key in rng.sample("xyz", rng.choice((1, 1, 2))):
            log.append(Change(revision, key, rng.choice((None, 1, 2))))
    return log


def right_stream(rng: Random, log: Sequence[Change], keys: set[str]) -> list[Told]:
    """What a watcher may be told, with resumptions and snapshots between revisions."""
    stream: list[Told] = []
    skipped = 0
    for revision in range(1, 9):
        if revision <= skipped:
            continue
        stream += [each for each in log if each.revision == revision and each.key in keys]
        if rng.random() < 0.3:
            stream.append(Resumed(revision))
        elif rng.random() < 0.2:
            skipped = min(8, revision + rng.randrange(3))
            stream.append(Snapshot(skipped, as_of([each for each in log if each.key in keys], skipped)))
    return stream


def spoiled(rng: Random, stream: list[Told]) -> list[Told]:
    """The stream with one thing changed, which may be wrong then."""
    if not stream:
        return stream
    place = rng.randrange(len(stream))
    each = stream[place]
    kind = rng.choice(("drop", "twice", "swap", "change", "cut"))
    if kind == "drop":
        return stream[:place] + stream[place + 1 :]
    if kind == "twice":
        return stream[: place + 1] + stream[place:]
    if kind == "cut":
        return stream[:place]
    if kind == "swap":
        other = rng.randrange(len(stream))
        stream = list(stream)
        stream[place], stream[other] = stream[other], each
        return stream
    if isinstance(each, Change):
        each = replace(each, revision=each.revision + rng.choice((-1, 0, 1)), value=rng.choice((None, 1, 2)))
    elif isinstance(each, Resumed):
        each = Resumed(max(0, each.after + rng.choice((-1, 1))))
    else:
        each = replace(each, revision=max(0, each.revision + rng.choice((-1, 1))))
    return [*stream[:place], each, *stream[place + 1 :]]


@given(seed=seeds)
def test_streams_are_judged_as_by_the_twin(seed: int) -> None:
    rng = Random(seed)
    for _ in range(ROUNDS):
        log = random_log(rng)
        keys = set(rng.sample("xyz", rng.randint(1, 3)))
        until = rng.choice((0, 8))
        assert check_log(log).ok
        stream = right_stream(rng, log, keys)
        report = check_stream(log, stream, keys=keys, until=until)
        assert report.ok and is_right(log, stream, keys, until), (log, stream, str(report))
        stream = spoiled(rng, stream)
        report = check_stream(log, stream, keys=keys, until=until)
        assert report.ok == is_right(log, stream, keys, until), (log, stream, keys, str(report))
