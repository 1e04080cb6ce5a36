"""The reference table, one rule at a time. How several tables play together is in property_tests/test_references.py."""

from __future__ import annotations

from itertools import pairwise

import pytest

from ftray.ownership.references import (
    COVERED,
    LOST,
    REGISTERED,
    REGISTERING,
    AckReturns,
    AddBorrower,
    BorrowLost,
    Effect,
    Forgot,
    Freed,
    PinAtOwner,
    ReferenceTable,
    RemoveBorrower,
    TaskMayReply,
    is_held,
)

ME, OWNER, OTHER = b"me", b"owner", b"other"
AT_OWNER = "unix:/owner"
A, B, C = b"a" * 20, b"b" * 20, b"c" * 20


@pytest.fixture
def table() -> ReferenceTable:
    return ReferenceTable(ME)


def effects(table: ReferenceTable) -> list[Effect]:
    """What the table wants done; it must not contradict itself when this is asked."""
    table.check()
    return table.take_effects()


def freed(table: ReferenceTable) -> list[bytes]:
    return [effect.object_id for effect in effects(table) if isinstance(effect, Freed)]


def borrow(table: ReferenceTable, object_id: bytes = A) -> None:
    """A registered reference with one ObjectRef."""
    table.add_borrowed(object_id, OWNER, AT_OWNER)
    table.add_local(object_id)
    table.register(object_id)
    table.registered(OWNER, [object_id])
    assert effects(table) == [AddBorrower(OWNER, AT_OWNER, [object_id])]
    assert table.entries[object_id].registration == REGISTERED


# Counts


def test_owned_object_is_freed_with_its_last_reference(table: ReferenceTable) -> None:
    entry = table.add_owned(A)
    table.add_local(A)
    table.remove_local(A)
    assert effects(table) == [] and is_held(entry)
    table.remove_local(A)
    assert effects(table) == [Freed(A, entry)]
    assert table.entries == {}


def test_letting_go_of_an_unknown_object_is_no_error(table: ReferenceTable) -> None:
    table.remove_local(A)
    table.remove_submitted([A])
    table.borrower_removed(A, OTHER)
    table.handed_off("unknown")
    table.registered(OWNER, [A], [B])
    table.process_died(OTHER)
    assert table.owner_died(OWNER) == []
    assert table.pin_forever(A) is False
    assert effects(table) == []


def test_a_hold_on_an_unknown_object_is_an_error_that_changes_nothing(table: ReferenceTable) -> None:
    table.add_owned(A)
    with pytest.raises(KeyError):
        table.add_local(B)
    with pytest.raises(KeyError):
        table.set_contains(A, [A, B])
    with pytest.raises(KeyError):
        table.hand_off("reply", [A, B], OTHER)
    table.remove_local(A)
    assert freed(table) == [A]


def test_unfinished_task_holds_its_arguments(table: ReferenceTable) -> None:
    table.add_owned(A)
    table.add_submitted([A, A])
    table.remove_local(A)
    assert freed(table) == []
    table.remove_submitted([A, A])
    assert freed(table) == [A]


def test_an_id_that_a_re_execution_makes_again_counts_up(table: ReferenceTable) -> None:
    assert table.add_owned(A) is table.add_owned(A)
    table.remove_local(A)
    assert freed(table) == []


def test_outer_object_holds_inner_ones(table: ReferenceTable) -> None:
    for object_id in (A, B, C):
        table.add_owned(object_id)
    table.set_contains(B, [A])
    table.set_contains(C, [B, A])
    for object_id in (A, B):
        table.remove_local(object_id)
    assert freed(table) == []
    table.remove_local(C)
    assert freed(table) == [C, B, A]


def test_new_contents_replace_the_old(table: ReferenceTable) -> None:
    for object_id in (A, B, C):
        table.add_owned(object_id)
    table.set_contains(C, [A])
    table.remove_local(A)
    table.set_contains(C, [A, B])  # a reconstruction returns them again
    assert freed(table) == []
    table.set_contains(C, [B])
    assert freed(table) == [A]


def test_contents_of_an_object_that_is_gone_are_not_held(table: ReferenceTable) -> None:
    table.add_owned(A)
    table.set_contains(B, [A])
    table.remove_local(A)
    assert freed(table) == [A]


def test_a_long_chain_of_objects_is_freed_without_recursion(table: ReferenceTable) -> None:
    ids = [index.to_bytes(20, "big") for index in range(5_000)]
    table.add_owned(ids[0])
    for inner, outer in pairwise(ids):
        table.add_owned(outer)
        table.set_contains(outer, [inner])
        table.remove_local(inner)
    table.remove_local(ids[-1])
    assert freed(table) == ids[::-1]


# The owner's side


def test_borrower_holds_the_object(table: ReferenceTable) -> None:
    table.add_owned(A)
    assert table.borrower_added(A, OTHER)
    table.remove_local(A)
    assert freed(table) == []
    table.borrower_removed(A, b"somebody else")
    assert freed(table) == []
    table.borrower_removed(A, OTHER)
    assert freed(table) == [A]
    assert not table.borrower_added(A, OTHER)


def test_who_does_not_own_an_object_has_no_borrowers(table: ReferenceTable) -> None:
    borrow(table)
    assert not table.borrower_added(A, OTHER)


def test_death_of_a_borrower_lets_go_of_all_it_held(table: ReferenceTable) -> None:
    for object_id in (A, B, C):
        table.add_owned(object_id)
        table.borrower_added(object_id, OTHER)
        table.remove_local(object_id)
    table.borrower_added(C, OWNER)
    table.process_died(OTHER)
    assert sorted(freed(table)) == [A, B]


# Running tasks


def test_a_task_that_keeps_nothing_costs_no_message(table: ReferenceTable) -> None:
    table.begin_task("task")
    entry = table.note_task_ref("task", A, OWNER, AT_OWNER)
    assert table.note_task_ref("task", A, OWNER, AT_OWNER) is entry
    table.add_local(A)
    table.remove_local(A)
    assert effects(table) == []
    assert table.end_task("task")
    assert effects(table) == [Forgot(A, entry)]


def test_what_a_task_keeps_is_registered_before_the_reply(table: ReferenceTable) -> None:
    table.begin_task("task")
    for object_id in (A, B):
        table.note_task_ref("task", object_id, OWNER, AT_OWNER)
        table.add_local(object_id)
    table.note_task_ref("task", C, OTHER, "unix:/other").local += 1
    assert not table.end_task("task")
    assert effects(table) == [AddBorrower(OWNER, AT_OWNER, [A, B]), AddBorrower(OTHER, "unix:/other", [C])]
    table.registered(OWNER, [A, B])
    assert effects(table) == []
    table.registered(OTHER, [C])
    assert effects(table) == [TaskMayReply("task")]


def test_any_hold_counts_at_the_end_of_a_task(table: ReferenceTable) -> None:
    table.begin_task("task")
    for object_id in (A, B):
        table.note_task_ref("task", object_id, OWNER, AT_OWNER)
    table.add_owned(C)
    table.set_contains(C, [A])
    table.add_submitted([B])
    assert not table.end_task("task")
    assert effects(table) == [AddBorrower(OWNER, AT_OWNER, [A, B])]


def test_objects_of_our_own_need_no_cover(table: ReferenceTable) -> None:
    entry = table.add_owned(A)
    table.begin_task("task")
    assert table.note_task_ref("task", A, ME, "unix:/me") is entry
    assert table.end_task("task")
    assert effects(table) == []


def test_what_is_registered_already_delays_nobody(table: ReferenceTable) -> None:
    borrow(table)
    table.begin_task("task")
    table.note_task_ref("task", A, OWNER, AT_OWNER)
    assert table.end_task("task")
    assert effects(table) == []


def test_the_first_of_two_tasks_to_end_registers(table: ReferenceTable) -> None:
    # Not the last: its submitter may have the reference from us, and rely on us.
    for task in ("one", "two"):
        table.begin_task(task)
        table.note_task_ref(task, A, OWNER, AT_OWNER).local += 1
    table.remove_local(A)
    assert not table.end_task("one")
    assert not table.end_task("two")
    assert effects(table) == [AddBorrower(OWNER, AT_OWNER, [A])]
    table.registered(OWNER, [A])
    assert effects(table) == [TaskMayReply("one"), TaskMayReply("two")]


def test_a_covered_reference_stays_until_the_last_task_ends(table: ReferenceTable) -> None:
    for task in ("one", "two"):
        table.begin_task(task)
        entry = table.note_task_ref(task, A, OWNER, AT_OWNER)
    assert table.end_task("one")
    assert effects(table) == []
    assert table.entries[A] is entry
    assert table.end_task("two")
    assert effects(table) == [Forgot(A, entry)]


def test_after_the_death_of_the_submitter_references_are_registered_at_once(table: ReferenceTable) -> None:
    table.begin_task("task")
    table.note_task_ref("task", A, OWNER, AT_OWNER).local += 1
    assert not table.end_task("task")  # called early
    table.note_task_ref("task", B, OWNER, AT_OWNER).local += 1
    assert effects(table) == [AddBorrower(OWNER, AT_OWNER, [A, B])]
    assert table.end_task("task")


def test_two_tasks_of_one_name_are_an_error(table: ReferenceTable) -> None:
    table.begin_task("task")
    with pytest.raises(ValueError, match="end it before"):
        table.begin_task("task")


# Leaving, and coming back


def test_registered_reference_leaves_with_a_message(table: ReferenceTable) -> None:
    borrow(table)
    entry = table.entries[A]
    table.remove_local(A)
    assert effects(table) == [RemoveBorrower(OWNER, AT_OWNER, [A]), Forgot(A, entry)]


def test_who_loses_interest_while_registering_leaves_after_the_answer(table: ReferenceTable) -> None:
    table.add_borrowed(A, OWNER, AT_OWNER).local += 1
    table.register(A)
    table.remove_local(A)
    assert effects(table) == [AddBorrower(OWNER, AT_OWNER, [A])]
    entry = table.entries[A]
    assert entry.registration == REGISTERING
    table.registered(OWNER, [A])
    assert effects(table) == [RemoveBorrower(OWNER, AT_OWNER, [A]), Forgot(A, entry)]


def test_who_comes_back_while_registering_stays(table: ReferenceTable) -> None:
    table.add_borrowed(A, OWNER, AT_OWNER).local += 1
    table.register(A)
    table.remove_local(A)
    table.add_local(A)
    table.registered(OWNER, [A])
    assert effects(table) == [AddBorrower(OWNER, AT_OWNER, [A])]


def test_removal_and_new_registration_are_told_in_order(table: ReferenceTable) -> None:
    borrow(table)
    table.remove_local(A)
    table.add_borrowed(A, OWNER, AT_OWNER).local += 1
    table.register(A)
    messages = [effect for effect in effects(table) if not isinstance(effect, Forgot)]
    assert messages == [RemoveBorrower(OWNER, AT_OWNER, [A]), AddBorrower(OWNER, AT_OWNER, [A])]


def test_messages_to_one_owner_are_joined_only_until_they_are_taken(table: ReferenceTable) -> None:
    for object_id in (A, B, C):
        borrow(table, object_id)
    table.remove_local(A)
    table.remove_local(B)
    taken = effects(table)
    table.remove_local(C)
    assert [e.object_ids for e in taken if isinstance(e, RemoveBorrower)] == [[A, B]]
    assert [e.object_ids for e in effects(table) if isinstance(e, RemoveBorrower)] == [[C]]


def test_without_a_registration_there_is_no_removal(table: ReferenceTable) -> None:
    entry = table.add_borrowed(A, OWNER, AT_OWNER)
    table.add_local(A)
    assert entry.registration == COVERED
    table.remove_local(A)
    assert effects(table) == [Forgot(A, entry)]


# Replies with references in them


def test_a_reply_holds_what_is_in_it_until_it_is_acknowledged(table: ReferenceTable) -> None:
    table.add_owned(A)
    table.hand_off("reply", [A, A], OTHER)
    table.remove_local(A)
    assert freed(table) == []
    table.handed_off("reply")
    assert freed(table) == [A]


def test_a_borrowed_reference_in_a_reply_is_registered_first(table: ReferenceTable) -> None:
    table.begin_task("task")
    table.note_task_ref("task", A, OWNER, AT_OWNER)
    table.hand_off("task", [A], OTHER)
    assert not table.end_task("task")
    table.registered(OWNER, [A])
    entry = table.entries[A]
    assert effects(table) == [AddBorrower(OWNER, AT_OWNER, [A]), TaskMayReply("task")]
    table.handed_off("task")
    assert effects(table) == [RemoveBorrower(OWNER, AT_OWNER, [A]), Forgot(A, entry)]


def test_death_of_the_receiver_ends_the_hand_off(table: ReferenceTable) -> None:
    table.add_owned(A)
    table.hand_off("one", [A], OTHER)
    table.hand_off("two", [A], OWNER)
    table.remove_local(A)
    table.process_died(OTHER)
    assert freed(table) == []
    table.process_died(OWNER)
    assert freed(table) == [A]


def test_two_replies_of_one_name_are_an_error(table: ReferenceTable) -> None:
    table.add_owned(A)
    table.hand_off("reply", [A], OTHER)
    with pytest.raises(ValueError, match="token of its own"):
        table.hand_off("reply", [A], OTHER)


def test_returns_are_acknowledged_when_all_references_are_registered(table: ReferenceTable) -> None:
    table.add_owned(A)
    table.add_owned(C)
    table.receive_contained(C, [(A, ME, ""), (B, OWNER, AT_OWNER)], "reply")
    table.remove_local(A)
    assert effects(table) == [AddBorrower(OWNER, AT_OWNER, [B])]
    table.registered(OWNER, [B])
    assert effects(table) == [AckReturns("reply")]
    table.remove_local(C)
    assert [type(effect) for effect in effects(table)] == [Freed, Freed, RemoveBorrower, Forgot]


def test_returns_that_need_no_registration_are_acknowledged_at_once(table: ReferenceTable) -> None:
    table.add_owned(A)
    table.add_owned(C)
    table.receive_contained(C, [(A, ME, "")], "reply")
    assert effects(table) == [AckReturns("reply")]


def test_returns_for_a_result_that_is_gone_are_acknowledged_and_not_kept(table: ReferenceTable) -> None:
    table.receive_contained(C, [(A, OWNER, AT_OWNER)], "reply")
    assert effects(table) == [AckReturns("reply")]
    assert table.entries == {}


def test_a_result_dropped_meanwhile_is_acknowledged_after_the_answer(table: ReferenceTable) -> None:
    table.add_owned(C)
    table.receive_contained(C, [(A, OWNER, AT_OWNER)], "reply")
    table.remove_local(C)
    table.registered(OWNER, [A])
    kinds = [type(effect) for effect in effects(table)]
    assert kinds == [AddBorrower, Freed, AckReturns, RemoveBorrower, Forgot]


# References out of values


def test_outer_object_is_held_until_the_inner_one_is_registered(table: ReferenceTable) -> None:
    borrow(table, B)
    table.note_from_outer(B, A, OTHER, "unix:/other").local += 1
    table.remove_local(B)
    assert effects(table) == [AddBorrower(OTHER, "unix:/other", [A])]
    table.registered(OTHER, [A])
    assert [type(effect) for effect in effects(table)] == [RemoveBorrower, Forgot]
    assert list(table.entries) == [A]


def test_an_argument_of_a_running_task_covers_what_is_in_it_as_well(table: ReferenceTable) -> None:
    table.begin_task("task")
    table.note_task_ref("task", B, OWNER, AT_OWNER)
    table.note_from_outer(B, A, OTHER, "unix:/other").local += 1
    assert effects(table) == []
    assert not table.end_task("task")
    assert [type(effect) for effect in effects(table)] == [Forgot, AddBorrower]
    assert list(table.entries) == [A]


def test_a_cached_value_holds_what_is_in_it(table: ReferenceTable) -> None:
    borrow(table, B)
    table.receive_contained(B, [(A, OTHER, "unix:/other")], None)
    table.registered(OTHER, [A])
    assert effects(table) == [AddBorrower(OTHER, "unix:/other", [A])]
    table.remove_local(B)
    removed = [effect.object_ids for effect in effects(table) if isinstance(effect, RemoveBorrower)]
    assert removed == [[B], [A]]


# Losses


def test_a_missing_object_is_lost_and_keeps_nobody_waiting(table: ReferenceTable) -> None:
    table.begin_task("task")
    entry = table.note_task_ref("task", A, OWNER, AT_OWNER)
    entry.local += 1
    assert not table.end_task("task")
    table.registered(OWNER, [A], [A])
    assert effects(table) == [AddBorrower(OWNER, AT_OWNER, [A]), BorrowLost(A, entry), TaskMayReply("task")]
    assert entry.registration == LOST
    table.remove_local(A)
    assert effects(table) == [Forgot(A, entry)]


def test_death_of_an_owner_loses_its_objects_and_keeps_nobody_waiting(table: ReferenceTable) -> None:
    borrow(table, A)
    table.add_owned(C)
    table.receive_contained(C, [(B, OWNER, AT_OWNER)], "reply")
    table.remove_local(C)
    assert [type(effect) for effect in effects(table)] == [AddBorrower, Freed]
    assert table.owner_died(OWNER) == [A]
    assert [type(effect) for effect in effects(table)] == [AckReturns, Forgot]
    assert table.owner_died(OWNER) == []
    table.registered(OWNER, [A])  # an answer that was on its way
    assert table.entries[A].registration == LOST
    table.remove_local(A)
    assert [type(effect) for effect in effects(table)] == [Forgot]


def test_an_object_of_our_own_that_comes_back_too_late_is_lost(table: ReferenceTable) -> None:
    entry = table.add_borrowed(A, ME, "unix:/me")
    entry.local += 1
    table.register(A)
    assert effects(table) == [BorrowLost(A, entry)]


# Pins, and looking at it


def test_a_pinned_object_is_never_freed(table: ReferenceTable) -> None:
    table.add_owned(A)
    assert table.pin_forever(A)
    table.remove_local(A)
    assert effects(table) == []
    assert table.snapshot()[0].reasons == ("pinned for good: serialised out of band",)


def test_a_borrower_has_the_owner_pin(table: ReferenceTable) -> None:
    table.begin_task("task")
    table.note_task_ref("task", A, OWNER, AT_OWNER)
    assert table.pin_forever(A)
    assert table.pin_forever(A)
    assert not table.end_task("task")
    assert effects(table) == [PinAtOwner(OWNER, AT_OWNER, [A]), AddBorrower(OWNER, AT_OWNER, [A])]


def test_snapshot_says_why_an_object_lives(table: ReferenceTable) -> None:
    table.add_owned(A)
    table.add_local(A)
    table.borrower_added(A, OTHER)
    table.add_borrowed(B, OWNER, AT_OWNER).local += 1
    table.register(B)
    table.remove_local(B)
    mine, borrowed = table.snapshot()
    assert (mine.object_id, mine.owner, mine.local, mine.borrowers, mine.registration) == (A, None, 2, 1, "")
    assert mine.reasons == ("2 local references", "borrowed by a process")
    assert (borrowed.owner, borrowed.registration) == (OWNER, "registering")
    assert borrowed.reasons == ("waits for the answer of its owner",)


def test_check_finds_a_wrong_count(table: ReferenceTable) -> None:
    entry = table.add_owned(A)
    entry.contained = 1
    with pytest.raises(AssertionError, match="a count differs"):
        table.check()
    entry.contained = entry.local = 0
    with pytest.raises(AssertionError, match="not freed"):
        table.check()


def test_check_finds_an_entry_missing_in_an_index(table: ReferenceTable) -> None:
    table.add_owned(A).borrowers = {OTHER}
    with pytest.raises(AssertionError, match="index of borrowers"):
        table.check()
