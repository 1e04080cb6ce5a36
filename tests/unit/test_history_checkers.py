"""Histories and their checkers: what they refuse, what they find, and in which words they say it."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import ClassVar

import pytest

from chaos.checkers import exactly_once
from chaos.checkers.exactly_once import ConflictingIncrementError, check_counter
from chaos.checkers.history import (
    History,
    HistoryError,
    MalformedLineError,
    MalformedOperationError,
    Operation,
    OverlappingOperationsError,
    Recorder,
    RecorderError,
    UnsupportedValueError,
    Value,
    merged,
)  # fmt: skip
from chaos.checkers.linearizability import Verdict, check
from chaos.checkers.models import (
    STALE,
    CasRegister,
    ExactlyOnceCounter,
    FifoQueue,
    KeyValue,
    Model,
    ModelError,
    NamedActors,
    Register,
    SetOfValues,
    State,
    UnknownActionError,
)  # fmt: skip
from chaos.checkers.monotonic import Change, MalformedLogError, Resumed, Snapshot, Told, check_log, check_stream


def op(
    process: str, begin: float, end: float | None, call: str, *arguments: object, result: object = None
) -> Operation:
    return Operation(process, begin, end, call, arguments, result)  # type: ignore[arg-type]


# --- histories -------------------------------------------------------------------------------------------------------


def test_a_recorder_keeps_the_order_of_events_when_time_stands_still() -> None:
    recorder = Recorder()
    first = recorder.invoke("a", 5.0, "write", 1)
    recorder.complete(first, 5.0)
    second = recorder.invoke("b", 5.0, "read")
    recorder.complete(second, 4.0, 1)
    one, two = recorder.history()
    assert one.completed_ms is not None and two.completed_ms is not None
    assert 5.0 == one.invoked_ms < one.completed_ms < two.invoked_ms < two.completed_ms < 5.000001
    assert str(two) == "b: read() → 1 [5 to 5 ms]"


def test_the_three_ends_of_an_operation() -> None:
    recorder = Recorder()
    recorder.fail(recorder.invoke("a", 1, "write", 1), 2)
    recorder.lose(recorder.invoke("a", 3, "write", [2, [3]]))
    recorder.invoke("b", 4, "read")
    failed, lost, still_open = recorder.history()
    assert (failed.failed, failed.unknown, lost.unknown, still_open.unknown) == (True, False, True, True)
    assert str(failed) == "a: write(1) → failed [1 to 2 ms]"
    assert str(lost) == "a: write((2, (3,))) → ? [3 ms, no answer]"
    assert repr(recorder.history()) == "<History of 3 operations by 2 processes>"


def test_a_recorder_refuses_what_cannot_be() -> None:
    recorder = Recorder()
    ticket = recorder.invoke("a", 1, "read")
    with pytest.raises(OverlappingOperationsError, match=r"invokes write\(1\) while its read\(\) is open: lose\(\)"):
        recorder.invoke("a", 2, "write", 1)
    with pytest.raises(UnsupportedValueError, match=r"no bytes \(b'x'\): record value.hex\(\)"):
        recorder.complete(ticket, 2, b"x")
    with pytest.raises(MalformedOperationError, match="now_ms is nan"):
        recorder.complete(ticket, float("nan"))
    recorder.complete(ticket, 2, 7)  # what was refused has ended nothing
    for end in (lambda: recorder.complete(ticket, 3), lambda: recorder.lose(ticket), lambda: recorder.fail(99, 3)):
        with pytest.raises(RecorderError, match=r"no operation with ticket \d+ is open"):
            end()
    assert [each.result for each in recorder.history()] == [7]


def test_lines_there_and_back() -> None:
    history = History(
        [
            op("a", 0.1 + 0.2, 1e300, "put", "ключ", ("x", (1, None)), result=10**30),
            Operation(7, 1, None, "get", ("\ud800",)),
            Operation("b", 2, 3, "get", failed=True),
        ]
    )
    lines = list(history.to_lines())
    assert History.from_lines(["\n", *lines, "  "]) == history
    assert lines[2] == (
        '{"process":"b","invoked_ms":2,"completed_ms":3,"action":"get","arguments":[],"result":null,"failed":true}\n'
    )
    assert hash(History.from_lines(lines)) == hash(history)


GOOD = '"process": "a", "invoked_ms": 1, "completed_ms": 2, "action": "get"'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", r"a JSON object is expected, not \[1\]"),
        ("{" + GOOD + ', "result": NaN}', "NaN is not JSON"),
        ("{" + GOOD + ', "result": {"a": 1}}', "histories hold no dict"),
        ("{" + GOOD + ', "value": 1}', "unknown field 'value'"),
        ('{"process": "a"}', "the field 'invoked_ms' is missing"),
        ("{" + GOOD.replace('"a"', "null") + "}", "process is None, and should be a str or an int"),
        ("{" + GOOD.replace('"get"', '""') + "}", "action is '', and should be a name"),
        ("{" + GOOD.replace("1", '"1"') + "}", "invoked_ms is '1', and should be a number of milliseconds"),
        ("{" + GOOD.replace("2", "0.5") + "}", "before it was invoked at 1 ms: do all times come from one clock"),
        ("{" + GOOD.replace("2", "null") + ', "result": 1}', "has a result, but completed_ms is None"),
        ("{" + GOOD.replace("2", "null") + ', "failed": true}', "has failed, but completed_ms is None"),
        ("{" + GOOD + ', "failed": 1}', "failed is 1, and should be a bool"),
        ("{" + GOOD + ', "arguments": "xy"}', "arguments are 'xy', and should be a tuple"),
    ],
)
def test_a_line_that_is_no_operation_is_refused_with_its_number(line: str, says: str) -> None:
    with pytest.raises(MalformedLineError, match=says) as caught:
        History.from_lines(["{" + GOOD + "}\n", "", line])
    assert caught.value.line == 3
    assert isinstance(caught.value, HistoryError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.line, again.reason) == (str(caught.value), 3, caught.value.reason)


def test_a_process_does_one_thing_at_a_time() -> None:
    says = r"'a' invoked read\(\) at 2 ms, when its write\(1\) was open until 3"
    with pytest.raises(OverlappingOperationsError, match=says):
        History([op("a", 1, 3, "write", 1), op("a", 2, 4, "read")])
    lost = [op("a", 1, None, "write", 1), op("a", 2, 4, "read"), op("a", 4, 5, "read")]
    assert len(merged([History(lost), History([op("b", 1, 9, "read")])])) == 4


# --- linearizability -------------------------------------------------------------------------------------------------


def test_the_words_for_a_stale_read() -> None:
    history = History(
        [
            op("a", 1, 2, "write", 1),
            op("b", 3, 4, "write", 2),
            op("a", 5, 7, "cas", 2, 3, result=True),
            op("c", 5, 6, "read", result=2),
            op("c", 6.5, 8, "read", result=1),
        ]
    )
    report = check(history, CasRegister())
    assert report.verdict is Verdict.NOT_LINEARIZABLE
    assert str(report) == """\
not linearizable as a CAS register (5 operations, 8 steps)
All that was answered before 8 ms has an order, and with this answer there is none:
    c: read() → 1 [6.5 to 8 ms]
When the register holds 3, read() returns 3, not 1.
When nothing was open for the last time before it, after 2 operations, the register holds 2.
From there its answer alone is impossible, whatever the others did.
One order of those before it:
    a: write(1) → None [1 to 2 ms]
    b: write(2) → None [3 to 4 ms]
    c: read() → 2 [5 to 6 ms]
    a: cas(2, 3) → True [5 to 7 ms]"""


def test_the_words_for_a_contradiction_between_reads() -> None:
    history = History(
        [
            op("w", 0, 20, "write", "new"),
            op("a", 1, 2, "read", result=None),
            op("a", 3, 4, "read", result="new"),
            op("b", 5, 6, "read", result=None),
        ]
    )
    report = check(history, Register())
    assert report.explanation is not None
    assert report.explanation.minimal
    assert report.explanation.contradiction == (history.operations[2], history.operations[3])
    assert (
        "At the beginning the register holds None.\n"
        "From there these cannot be ordered, and each one's answer is needed for that:\n"
        "    a: read() → 'new' [3 to 4 ms]\n"
        "    b: read() → None [5 to 6 ms]\n"
    ) in str(report)


def test_a_part_is_named_by_its_key() -> None:
    history = [op("a", 0, 1, "put", "x", 1, result=False), op("a", 2, 3, "get", "y", result=1)]
    text = str(check(history, KeyValue()))
    assert text.startswith("not linearizable as a key–value table (2 operations, 2 keys, 2 steps)\n")
    assert "All that was answered on 'y' before 3 ms has an order" in text
    assert "When the table is empty, get('y') returns None, not 1." in text


def test_a_failed_operation_counts_for_nothing_and_a_lost_one_for_either() -> None:
    lost = op("a", 0, None, "write", 1)
    for seen in (None, 1):
        assert check([lost, op("b", 5, 6, "read", result=seen)], Register()).ok
    failed = replace(lost, completed_ms=1, failed=True)
    assert not check([failed, op("b", 5, 6, "read", result=1)], Register()).ok
    # It may take effect after later operations of its client, but only once.
    twice = [lost, op("a", 2, 3, "write", 2), op("b", 4, 5, "read", result=1), op("a", 6, 7, "write", 2)]
    assert check(twice, Register()).ok
    assert not check([*twice, op("b", 8, 9, "read", result=1)], Register()).ok


def test_an_undecided_check_says_what_to_do() -> None:
    puts = [op(f"p{place}", 0, 10, "put", place) for place in range(12)]
    gets = [op("g", 11, 12, "get", result=0), op("g", 13, 14, "get", result=0)]
    report = check([*puts, *gets], FifoQueue(), steps_max=50)
    assert (report.verdict, report.steps, report.explanation) == (Verdict.UNDECIDED, 50, None)
    assert str(report).startswith("undecided as a queue (14 operations, 50 steps)\nThe budget of steps ran out: raise")


def test_a_refuted_part_outweighs_an_undecided_one() -> None:
    history = [op(f"p{place}", 0, 10, "put", "x", place, result=bool(place % 2)) for place in range(9)]
    wrong = op("q", 0, 1, "get", "y", result=1)
    report = check([*history, wrong], KeyValue(), steps_max=5)
    assert report.verdict is Verdict.NOT_LINEARIZABLE
    report = check(history, KeyValue(), steps_max=5)
    assert (report.verdict, report.undecided) == (Verdict.UNDECIDED, ("x",))
    assert "Undecided: 'x'." in str(report)


def test_two_live_actors_of_one_name_are_found() -> None:
    history = [
        op("a", 0, 1, "create", "n", "a1", result=True),
        op("b", 2, 3, "create", "n", "a2", result=True),
    ]
    assert "When 'a1' lives as 'n', create('n', 'a2') returns False, not True." in str(check(history, NamedActors()))
    assert check([*history, op("chaos", 0.5, None, "kill", "n", "a1")], NamedActors()).ok


def test_a_retry_that_counts_twice_is_found() -> None:
    history = [
        op("a", 0, None, "increment", "a", 1, 5),
        op("a", 2, 3, "increment", "a", 1, 5, result=10),
    ]
    assert not check(history, ExactlyOnceCounter()).ok
    assert check([history[0], replace(history[1], result=5)], ExactlyOnceCounter()).ok
    late = [op("a", 2, 3, "increment", "a", 2, 1, result=1), op("a", 4, 5, "increment", "a", 1, 5, result=STALE)]
    assert check(late, ExactlyOnceCounter()).ok


@pytest.mark.parametrize(
    ("model", "call", "says"),
    [
        (Register(), op("a", 0, 1, "cas", 1, 2), "a register does not know 'cas'; it knows read, write"),
        (Register(), op("a", 0, 1, "write"), "write of a register takes 1 argument, not 0"),
        (KeyValue(), op("a", 0, 1, "put", 1), "put of a key–value table takes 2 arguments, not 1"),
        (FifoQueue(), op("a", 0, 1, "put", None), "None can't be put"),
        (NamedActors(), op("a", 0, 1, "create", "n", None), "the actor can't be None"),
        (ExactlyOnceCounter(), op("a", 0, 1, "increment", "a", "1", 1), "the sequence number is '1'"),
        (ExactlyOnceCounter(), op("a", 0, 1, "increment", "a", 1, "1"), "the amount is '1'"),
        (SetOfValues(), op("a", 0, None, "remove", 1), "a set does not know 'remove'"),
    ],
)
def test_what_a_model_does_not_know_is_refused(model: Model, call: Operation, says: str) -> None:
    with pytest.raises(UnknownActionError, match=says):
        check([call], model)


class Liar(Model):
    """Says of its one action that it changes nothing."""

    name = "liar"
    actions: ClassVar[dict[str, int]] = {"bump": 0}

    def initial(self) -> State:
        return 0

    def apply(self, state: State, action: str, arguments: tuple[Value, ...]) -> tuple[State, Value]:
        assert isinstance(state, int)
        return state + 1, None

    def only_looks(self, operation: Operation) -> bool:
        return True


def test_a_model_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ModelError, match="Liar.only_looks says that a: bump"):
        check([op("a", 0, 1, "bump")], Liar())


class Changeable(Register):
    """Has a state that could change under the checker's hands."""

    def initial(self) -> State:
        return []  # type: ignore[return-value]


def test_states_that_cannot_be_remembered_are_refused() -> None:
    with pytest.raises(ModelError, match="Changeable.initial returns \\[\\], which can't be hashed"):
        check([], Changeable())


# --- exactly once ----------------------------------------------------------------------------------------------------


def increment(begin: float, end: float | None, sequence: int, amount: int = 1, total: object = None) -> Operation:
    return op(f"p{begin}", begin, end, "increment", "a", sequence, amount, result=total)


def test_a_counter_that_adds_up() -> None:
    history = [increment(0, None, 1), increment(2, 3, 1, total=1), increment(4, 5, 2, 2, 3), increment(6, None, 3)]
    report = check_counter([*history, op("r", 8, 9, "read", result=3), op("r", 10, 11, "read", result=4)], final=4)
    assert (report.ok, report.acknowledged, report.uncertain) == (True, 2, 1)
    assert (report.total_min, report.total_max) == (3, 4)
    assert str(report) == "exactly once: 2 increments acknowledged, 1 uncertain"


@pytest.mark.parametrize(
    ("history", "final", "says"),
    [
        ([increment(0, 1, 1, total=1)], 2, "at the end the counter holds 2, and should hold 1: 1 was counted too much"),
        ([increment(0, 1, 1, total=1)], 0, "at the end the counter holds 0, and should hold 1: 1 of what was ack"),
        ([increment(0, None, 1)], 2, "should hold between 0 and 1: 1 was counted too much"),
        (
            [increment(0, 1, 1, total=1), increment(2, 3, 1, total=2)],
            None,
            "request 1 of 'a' was answered 1, and when it was repeated 2: it took effect twice",
        ),
        (
            [increment(0, 9, 1, total=1), increment(1, 8, 2, total=1)],
            None,
            "the same total as after p0: increment('a', 1, 1) → 1 [0 to 9 ms], so one of them is lost",
        ),
        ([op("r", 0, 1, "read", result=1)], None, "the total lies between 0 and 0 then, so the counter has counted"),
        (
            [increment(0, 1, 1, total=1), op("r", 2, 3, "read", result=0)],
            None,
            "the total lies between 1 and 1 then, so the counter has lost 1",
        ),
        (
            [increment(0, None, 1), op("r", 2, 3, "read", result=1), op("r", 4, 5, "read", result=0)],
            None,
            "read() → 0 [4 to 5 ms]: less than was seen before, by r: read() → 1 [2 to 3 ms]",
        ),
        ([op("r", 0, 1, "read", result="1")], None, "a total should be a number"),
        ([increment(0, 1, 1)], None, "a total should be a number"),
    ],
)
def test_a_counter_that_does_not(history: list[Operation], final: int | None, says: str) -> None:
    report = check_counter(history, final=final)
    assert not report.ok
    assert str(report).startswith("not exactly once: ")
    assert says in str(report)


def test_a_request_is_the_same_when_it_is_repeated() -> None:
    with pytest.raises(ConflictingIncrementError, match="request 1 of 'a' adds 1 in one attempt and 2 in another"):
        check_counter([increment(0, None, 1), increment(2, 3, 1, 2, 3)])


def test_only_the_first_problems_are_shown() -> None:
    assert exactly_once.shown([str(each) for each in range(12)])[-2:] == ["    9", "    (and 2 more)"]


# --- watch streams ---------------------------------------------------------------------------------------------------

LOG = [Change(1, "x", 1), Change(2, "y", 1), Change(3, "x", 2), Change(3, "y", None), Change(5, "x", None)]


def test_streams_that_are_right() -> None:
    whole: list[Told] = [*LOG]
    assert check_stream(LOG, whole, until=5).ok
    assert check_stream(LOG, [*LOG[:2], Resumed(2), *LOG[2:]], until=5).ok
    assert check_stream(LOG, [LOG[0], Resumed(2), LOG[2], Resumed(4), LOG[4]], keys={"x"}, until=9).ok
    assert check_stream(LOG, [LOG[0], Snapshot(4, {"x": 2}), LOG[4]], until=5).ok
    assert check_stream(LOG, [LOG[3]], keys={"y"}, since=2, until=5).ok
    assert check_stream(LOG, [Snapshot(2, {"x": 1, "y": 1, "z": 0})], initial={"z": 0}).ok
    report = check_stream(LOG, [LOG[0], Resumed(1), Snapshot(5)], name="raylet 3")
    assert str(report) == "in order: raylet 3 (1 change, 1 resumption, 1 snapshot)"


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        ([LOG[0], LOG[2]], "it was not told of revision 2 ('y' = 1); then came revision 3 ('x' = 2)"),
        ([LOG[0], LOG[0]], "it was told of revision 1 ('x' = 1) when it was at revision 1: twice, or too late"),
        ([LOG[0], LOG[1], LOG[3]], "it was not told of revision 3 ('x' = 2); then came revision 3 ('y' deleted)"),
        ([Change(1, "x", 7)], "it was told of revision 1 ('x' = 7), but the log has revision 1 ('x' = 1)"),
        ([Change(9, "x", 7)], "it was told of revision 9 ('x' = 7), which is not in the log"),
        ([LOG[0], Resumed(3), LOG[4]], "revision 3 ('y' deleted); then it resumed after revision 3"),
        ([*LOG[:3], Resumed(0)], "it resumed after revision 0, but was told up to 3: 3 changes would come twice"),
        ([*LOG[:3], Snapshot(2, {"x": 1, "y": 1})], "it got a snapshot of revision 2 when it was at 3 already"),
        ([Snapshot(2, {"x": 1})], "in the snapshot of revision 2, 'y' is None, and by the log 1"),
        ([Snapshot(3, {"x": 2, "z": 4})], "in the snapshot of revision 3, 'z' is 4, and by the log None"),
    ],
)
def test_streams_that_are_wrong(stream: list[Told], says: str) -> None:
    report = check_stream(LOG, stream)
    assert len(report.problems) == 1
    assert says in str(report)


def test_the_end_of_a_stream_and_what_it_does_not_watch() -> None:
    assert "it ended at revision 3, and should have gone on to 5" in str(check_stream(LOG, LOG[:4], until=5))
    assert "('y' = 1), which it does not watch" in str(check_stream(LOG, LOG[:2], keys={"x"}))


def test_logs() -> None:
    assert not check_log(LOG).ok
    (gap,) = check_log(LOG).problems
    assert gap == "revision 5 ('x' deleted) comes after revision 3 ('y' deleted): lost between them: 1 revision"
    assert check_log([*LOG[:4], Change(4, "x", None)]).ok
    assert check_log([]).ok
    back = [LOG[1], LOG[0]]
    assert "the log goes back" in str(check_log(back))
    assert "another change of that key in the same revision" in str(check_log([LOG[0], Change(1, "x", 2)]))
    with pytest.raises(MalformedLogError):
        check_stream(back, [])


