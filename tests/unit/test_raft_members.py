"""Who belongs to the cluster: forming it, losing a disk, adding, removing and replacing heads."""

from __future__ import annotations

import pytest
from raft_world import Disk, Host, World

from ftray.gcs.raft import membership
from ftray.gcs.raft.errors import MembershipMismatchError, ReplicaRefusedError, ReplicaRemovedError
from ftray.gcs.raft.membership import Member
from ftray.gcs.state.tables import Code, Result


def made(heads: int = 3, seed: int = 1) -> World:
    world = World(seed, heads)
    world.start()
    world.write(b"first")
    return world


def newcomer(world: World, name: str = "new:1") -> Host:
    host = Host(world, name, tuple(world.hosts), Disk(world.new_id()), join=True)
    world.hosts[name] = host
    host.start()
    return host


def endpoints(host: Host) -> list[str]:
    assert host.replica is not None
    return sorted(member.endpoint for member in host.replica.members if member.voter)


def ask(world: World, what: str, replica_id: bytes, *args: object) -> list[Result]:
    """Asks the leader for a change, again and again until it is taken."""
    while True:
        leader, results = world.leader(), list[Result]()
        assert leader.replica is not None
        getattr(leader.replica, what)(replica_id, *args[:1], results.append, *args[1:])
        leader.turn()
        world.run_until(lambda results=results: bool(results))
        if results[0].code not in (Code.NOT_LEADER, Code.UNAVAILABLE):
            return results
        world.run(20)


# --- forming ----------------------------------------------------------------------------------------------------------


def test_nobody_takes_part_before_all_know_each_other() -> None:
    world = World(1, 3)
    hosts = list(world.hosts.values())
    hosts[0].start()
    hosts[1].start()
    world.run(3000)
    assert all(host.engine is None for host in hosts)
    hosts[2].start()
    world.write(b"a")
    world.converge()


def test_a_restart_while_the_cluster_is_formed_changes_nothing() -> None:
    for moment in range(12):
        world = World(moment, 3)
        world.start()
        world.run(0.5 * moment)
        victim = list(world.hosts.values())[moment % 3]
        victim.crash()
        victim.start()
        world.write(b"a")
        world.converge()


def test_a_disk_that_is_lost_while_the_cluster_is_formed_is_noticed() -> None:
    """No two majorities with different tables may come about."""
    refused = 0
    for moment in range(20):
        world = World(moment, 3)
        world.start()
        world.run(0.3 * moment)
        victim = list(world.hosts.values())[moment % 3]
        victim.crash()
        victim.lose_disk()
        victim.start()
        world.run(1500)
        tables = {host.replica.members for host in world.hosts.values() if host.engine is not None and host.replica}
        assert len(tables) <= 1
        refused += any(isinstance(error, ReplicaRefusedError) for error in world.stops)
    assert 0 < refused < 20


def test_heads_with_different_lists_refuse_each_other() -> None:
    world = World(1, 3)
    world.hosts["head2:1"].heads = ("head0:1", "head2:1")
    world.start()
    world.run(100)
    errors = [error for error in world.stops if isinstance(error, MembershipMismatchError)]
    assert errors and "head0:1, head1:1, head2:1" in str(errors[0]) and "head0:1, head2:1. " in str(errors[0])


def test_a_list_that_the_disk_contradicts_is_refused() -> None:
    world = made()
    host = world.hosts["head1:1"]
    host.crash()
    host.heads = ("head0:1", "head1:1")
    host.start()
    assert isinstance(host.error, MembershipMismatchError)
    assert "head0:1, head1:1, but" in str(host.error) and "head0:1, head1:1, head2:1" in str(host.error)
    host.heads = ()
    host.start()
    world.converge()
    host.crash()
    host.endpoint = "elsewhere:1"
    host.start()
    assert "elsewhere:1" in str(host.error)


def test_a_head_that_is_not_in_its_own_list_does_not_start() -> None:
    world = World(1, 2)
    world.hosts["head0:1"].heads = ("head1:1", "head2:1")
    world.hosts["head0:1"].start()
    assert isinstance(world.hosts["head0:1"].error, MembershipMismatchError)


# --- a lost disk ------------------------------------------------------------------------------------------------------


def test_a_head_with_an_emptied_disk_is_refused_and_replaced() -> None:
    world = made()
    victim = next(host for host in world.hosts.values() if not host.leads)
    former = victim.disk.replica_id
    victim.crash()
    victim.lose_disk()
    victim.start()
    world.run(200)
    assert isinstance(victim.error, ReplicaRefusedError) and victim.replica is None
    assert victim.endpoint in str(victim.error) and "ftray heads replace" in str(victim.error)
    # It never had a part in anything, and joins in place of its former self.
    victim.join = True
    victim.start()
    world.run(200)
    leader = world.leader()
    assert leader.replica is not None
    assert leader.replica.guests == [(victim.disk.replica_id, victim.endpoint)]
    assert ask(world, "add_head", victim.disk.replica_id, victim.endpoint, former)[0].ok
    world.run_until(lambda: endpoints(world.leader()) == sorted(world.hosts))
    world.run_until(lambda: len(world.leader().replica.members) == 3)  # type: ignore[union-attr]
    world.converge()
    assert world.has(victim, b"first")
    # From now on it counts: with another one gone it is the majority.
    next(host for host in world.hosts.values() if host is not victim and not host.leads).crash()
    world.write(b"second")
    # And it comes back as a member.
    victim.crash()
    victim.start()
    world.write(b"third")


# --- adding and removing ----------------------------------------------------------------------------------------------


def test_a_head_is_added_and_votes_when_it_has_caught_up() -> None:
    world = made()
    for number in range(20):
        world.write(b"k%d" % number)
    host = newcomer(world)
    world.run(300)
    assert host.engine is None
    assert ask(world, "add_head", host.disk.replica_id, host.endpoint)[0].ok
    world.run_until(lambda: endpoints(host) == sorted(world.hosts))
    world.converge()
    assert world.has(host, b"k19")
    # Four heads: any two of them stand still, three don't.
    others = [each for each in world.hosts.values() if each is not host]
    others[0].crash()
    world.write(b"three")
    for each in world.hosts.values():
        if each.replica is not None and each is not host:
            each.heads = ()
    others[0].heads = ()
    world.converge()


def test_a_learner_neither_votes_nor_leads() -> None:
    world = made()
    host = newcomer(world)
    world.run(100)
    world.stall("new:1", world.leader().endpoint)  # so it can't be seen to have caught up
    assert ask(world, "add_head", host.disk.replica_id, host.endpoint)[0].ok
    world.run(300)
    assert host.engine is not None and not host.replica._elections.votes  # type: ignore[union-attr]
    for each in list(world.hosts.values()):
        if each is not host:
            each.crash()
    world.run(3000)
    assert not host.engine.leads


def test_a_removed_head_stops_itself() -> None:
    world = made(4)
    victim = next(host for host in world.hosts.values() if not host.leads)
    assert ask(world, "remove_head", victim.disk.replica_id)[0].ok
    world.run(2000)
    assert isinstance(victim.error, ReplicaRemovedError) and victim.replica is None
    del world.hosts[victim.endpoint]
    world.write(b"after")


def test_a_head_that_was_removed_while_it_was_away_learns_it_and_disturbs_nobody() -> None:
    world = made(4)
    victim = next(host for host in world.hosts.values() if not host.leads)
    victim.crash()
    assert ask(world, "remove_head", victim.disk.replica_id)[0].ok
    leader, term = world.leader(), world.leader().engine.term
    victim.start()
    world.run(3000)
    assert isinstance(victim.error, ReplicaRemovedError)
    assert world.leader() is leader and leader.engine.term == term


def test_a_leader_that_is_to_be_removed_hands_over_first() -> None:
    world = made()
    leader = world.leader()
    world.run(100)
    assert ask(world, "remove_head", leader.disk.replica_id)[0].ok
    world.run(2000)
    assert isinstance(leader.error, ReplicaRemovedError)
    del world.hosts[leader.endpoint]
    world.write(b"after")


def test_one_change_at_a_time() -> None:
    world = made(5)
    leader = world.leader()
    replica = leader.replica
    assert replica is not None
    victims = [host.disk.replica_id for host in world.hosts.values() if host is not leader]
    results: list[Result] = []
    replica.remove_head(victims[0], results.append)
    replica.remove_head(victims[1], results.append)
    leader.turn()
    world.run(100)
    assert sorted(result.code for result in results) == [Code.OK, Code.UNAVAILABLE]


@pytest.mark.parametrize("seed", range(25))
def test_changes_under_faults(seed: int) -> None:
    """A replacement goes on under the next leader, whatever crashes meanwhile."""
    world = made(3, seed)
    victim = next(host for host in world.hosts.values() if not host.leads)
    victim.crash()
    host = newcomer(world)
    for each in world.hosts.values():
        each.heads = each.heads if each.join else ()
    world.run(100)
    ask(world, "add_head", host.disk.replica_id, host.endpoint, victim.disk.replica_id)
    del world.hosts[victim.endpoint]
    for _ in range(6):
        world.run(world.rng.uniform(1, 60))
        each = world.rng.choice(list(world.hosts.values()))
        if each.replica is not None:
            each.crash()
        world.run(world.rng.uniform(0, 30))
        if each.replica is None:
            each.start()
    world.run_until(lambda: endpoints(world.leader()) == sorted(world.hosts), 20_000)
    world.run_until(lambda: len(world.leader().replica.members) == 3, 20_000)  # type: ignore[union-attr]
    world.converge()
    assert all(world.has(each, b"first") for each in world.hosts.values())
    assert not world.stops, world.stops


# --- the table --------------------------------------------------------------------------------------------------------


def test_what_a_table_refuses() -> None:
    a, b = Member(b"a" * 16, "a:1"), Member(b"b" * 16, "b:1")
    table = (a, b)
    assert "a member already" in str(membership.add(table, a.replica_id, "c:1"))
    assert "ftray heads replace" in str(membership.add(table, b"c" * 16, "a:1"))
    assert "no replica" in str(membership.add(table, b"c" * 16, "c:1", b"x" * 16))
    assert "no replica" in str(membership.remove(table, b"x" * 16))
    assert "add another one first" in str(membership.remove((a,), a.replica_id))
    larger = membership.add(table, b"c" * 16, "a:1", a.replica_id)
    assert isinstance(larger, tuple) and "still being added" in str(membership.add(larger, b"d" * 16, "d:1"))
    assert membership.next_step(larger, []) is None
    promoted = membership.next_step(larger, [b"c" * 16])
    assert promoted is not None and all(member.voter for member in promoted) and len(promoted) == 3
    assert membership.next_step(promoted, []) == (b, Member(b"c" * 16, "a:1"))  # the order is that of the table
