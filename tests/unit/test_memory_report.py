"""`ftray memory`: who holds what, and what nobody should hold. Pure: answers are written down here."""

from __future__ import annotations

from typing import Any

from ftray.cli.memory_report import build, confirmed

DRIVER, WORKER = "d" * 32, "e" * 32
PINNERS = {"driver": DRIVER, "worker": WORKER, "gone": "f" * 32}


def reference(object_id: str, *, owned: bool = True, state: str = "store", size: int = 100, why: str = "") -> Any:
    return {
        "object_id": object_id, "owner": DRIVER, "owned": owned, "state": state, "size_bytes": size,
        "reasons": [why or "local reference"], "site": "",
    }  # fmt: skip


def process(worker_id: str, kind: str, *rows: Any, pinned: tuple[str, ...] = ()) -> dict[str, Any]:
    stored = [row["object_id"] for row in rows if row["owned"] and row["state"] == "store"]
    totals = {"objects": len(rows), "owned": 0, "pending": 0, "inline_bytes": 0, "store_bytes_owned": 0}
    said = {"totals": totals, "rows": list(rows), "stored": stored, "pinned": list(pinned)}
    pid = {DRIVER: 1, WORKER: 2}[worker_id]
    return {"worker_id": worker_id, "pid": pid, "kind": kind, "running": "", "error": "", "answer": said}


def stored(object_id: str, *, owner: str = DRIVER, primary: bool = True, size: int = 100, **pins: int) -> Any:
    return {
        "object_id": object_id, "size": size, "state": pins.pop("state", "sealed"), "owner": owner, "creator": owner,
        "primary": primary, "pins": {PINNERS[name]: count for name, count in pins.items()},
    }  # fmt: skip


def answer(*processes: Any, objects: tuple[Any, ...] = ()) -> dict[str, Any]:
    return {"node_id": "n", "processes": list(processes), "objects": list(objects), "store": {}}


def test_what_is_held_as_it_should_be_has_no_problem() -> None:
    report = build(
        answer(
            process(DRIVER, "driver", reference("a"), reference("b", state="inline", size=5)),
            process(WORKER, "worker", reference("a", owned=False, why="argument of a running task"), pinned=("a",)),
            objects=(stored("a", worker=1),),
        )
    )
    assert report["problems"] == []
    assert report["pinned_bytes"] == report["reachable_bytes"] == 100
    assert [each["object_id"] for each in report["objects"]] == ["a", "b"]
    reasons = {holder["process"]: holder["reasons"] for holder in report["objects"][0]["holders"][:2]}
    assert reasons == {"driver 1": ["local reference"], "worker 2": ["argument of a running task", "mapped"]}


def test_a_primary_copy_that_its_owner_does_not_know_is_unreachable() -> None:
    report = build(answer(process(DRIVER, "driver"), objects=(stored("a"),)))
    assert [each["kind"] for each in report["problems"]] == ["unreachable"]
    assert (report["pinned_bytes"], report["reachable_bytes"]) == (100, 0)


def test_so_is_one_whose_owner_is_gone() -> None:
    report = build(answer(process(DRIVER, "driver"), objects=(stored("a", owner="f" * 32),)))
    assert [each["kind"] for each in report["problems"]] == ["unreachable"]


def test_an_owner_that_does_not_answer_is_given_the_benefit_of_the_doubt() -> None:
    silent = {**process(DRIVER, "driver"), "answer": None, "error": "busy"}
    report = build(answer(silent, objects=(stored("a", driver=1),)))
    assert report["problems"] == [] and report["reachable_bytes"] == 100


def test_an_object_that_the_store_has_lost() -> None:
    report = build(answer(process(DRIVER, "driver", reference("a"))))
    assert [each["kind"] for each in report["problems"]] == ["lost"]


def test_pins_of_the_dead_and_of_those_that_do_not_know() -> None:
    report = build(
        answer(
            process(DRIVER, "driver", reference("a"), reference("b")),
            process(WORKER, "worker"),
            objects=(stored("a", gone=1), stored("b", worker=1)),
        )
    )
    assert [each["kind"] for each in report["problems"]] == ["stray pin", "stray pin"]


def test_what_is_being_written_is_no_problem() -> None:
    creating = {**stored("a", worker=1), "state": "creating"}
    assert build(answer(process(DRIVER, "driver"), process(WORKER, "worker"), objects=(creating,)))["problems"] == []


def test_only_what_both_looks_find_is_confirmed() -> None:
    first = build(answer(process(DRIVER, "driver"), objects=(stored("a"), stored("b"))))
    second = build(answer(process(DRIVER, "driver", reference("a")), objects=(stored("a"), stored("b"), stored("c"))))
    assert [each["object_id"] for each in confirmed(first, second)["problems"]] == ["b"]


def test_the_result_of_an_attempt_that_failed_is_known_to_who_runs_it_again() -> None:
    """A worker that dies after it has stored its result, before it could say so, leaves that to the next attempt."""
    owner = process(DRIVER, "driver", reference("a", state="pending", size=0))
    owner["answer"]["expected"] = ["a"]
    report = build(answer(owner, objects=(stored("a"),)))
    assert report["problems"] == [] and report["reachable_bytes"] == report["pinned_bytes"] == 100
