"""A store under pressure: jobs that are larger than it, a full disk, damaged files, and what is left at the end."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integration.harness import Driver, check_drained, wait_for_file, wait_for_none, wait_until

import ftray
from ftray import exceptions
from ftray.api.context import ask_raylet

MB = 1 << 20
STORE = 32 * MB
SIZE = 4 * MB
COUNT = 3 * STORE // SIZE
SESSION = {"num_cpus": 2, "object_store_memory": STORE, "_system_config": {"store_room_wait_ms": 400}}
pytestmark = pytest.mark.usefixtures("session")


def block(number: int) -> Any:
    """4 MiB that tell where they should be."""
    array = np.arange(SIZE // 8, dtype=np.int64)
    array += number
    return array


def is_block(array: Any, number: int) -> bool:
    return bool(array[0] == number and array[-1] == number + SIZE // 8 - 1 and (np.diff(array) == 1).all())


@ftray.remote
def make(number: int) -> Any:
    return block(number)


@ftray.remote
def look(array: Any, number: int) -> bool:
    return is_block(array, number)


def usage() -> dict[str, int]:
    found: dict[str, int] = ask_raylet("memory")["store"]
    return found


def spill_files(session: Any) -> list[str]:
    try:
        return os.listdir(Path(session.session_dir, "spill"))
    except FileNotFoundError:
        return []


def test_a_job_of_three_times_the_store_runs_through(session: Any) -> None:
    put = [ftray.put(block(i)) for i in range(COUNT)]
    made = [make.remote(i) for i in range(COUNT)]
    # The driver reads while workers read and write.
    wrong: list[int] = []

    def read(refs: Any) -> None:
        for i, ref in enumerate(refs):
            if not is_block(ftray.get(ref, timeout=60), i):
                wrong.append(i)

    reader = threading.Thread(target=read, args=(put,))
    reader.start()
    looks = [look.remote(ref, i) for i, ref in enumerate(made)]
    assert all(ftray.get(looks, timeout=60))
    reader.join(60)
    assert not wrong
    # All at once: more than there is room for in memory.
    for refs in (put, made):
        values = ftray.get(refs, timeout=60)
        assert all(is_block(value, i) for i, value in enumerate(values))
        del values
    seen = usage()
    assert seen["spilled_bytes"] >= 5 * STORE
    assert seen["spilled_bytes_total"] >= seen["spilled_bytes"]
    assert seen["restored_bytes_total"] > 0
    assert seen["used_bytes"] <= STORE
    del put, made, looks, reader, refs
    check_drained()
    wait_for_none(lambda: spill_files(session), 5.0, "spill files")


def test_a_task_with_more_arguments_than_fit() -> None:
    @ftray.remote
    def look_at_all(*arrays: Any) -> list[bool]:
        return [is_block(array, i) for i, array in enumerate(arrays)]

    refs = [ftray.put(block(i)) for i in range(12)]
    assert ftray.get(look_at_all.remote(*refs), timeout=60) == [True] * 12


def test_readers_that_hold_all_make_creators_wait_until_they_let_go(tmp_path: Path) -> None:
    @ftray.remote
    class Reader:
        def hold(self, refs: Any) -> int:
            self.values = ftray.get(refs)
            return len(self.values)

        def let_go(self) -> None:
            self.values = None

    refs = [ftray.put(block(i)) for i in range(7)]
    reader = Reader.remote()
    assert ftray.get(reader.hold.remote(refs), timeout=20) == 7
    with pytest.raises(exceptions.ObjectStoreFullError, match="Drop values that were read"):
        ftray.put(block(8))
    with pytest.raises(exceptions.ObjectStoreFullError):
        ftray.get(make.remote(9), timeout=20)
    ftray.get(reader.let_go.remote())
    assert is_block(ftray.get(ftray.put(block(8))), 8)


def test_what_is_larger_than_the_store_is_refused_at_once_and_evicts_nothing() -> None:
    check_drained()
    refs = [ftray.put(block(i)) for i in range(4)]
    before = usage()
    with pytest.raises(exceptions.ObjectStoreFullError, match=f"the whole store has {STORE:,}"):
        ftray.put(np.zeros(STORE, dtype=np.uint8))
    after = usage()
    assert (after["evicted_total"], after["spilled_bytes_total"]) == (
        before["evicted_total"], before["spilled_bytes_total"],
    )  # fmt: skip
    assert is_block(ftray.get(refs[0]), 0)


def damage(path: Path, how: str) -> None:
    if how == "flipped":
        with path.open("r+b") as file:
            file.seek(SIZE // 2)
            byte = file.read(1)
            file.seek(SIZE // 2)
            file.write(bytes([byte[0] ^ 1]))
    elif how == "cut":
        os.truncate(path, SIZE // 2)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("full", [False, True], ids=["restored", "read directly"])
def test_a_damaged_file_is_a_lost_object_that_says_so(session: Any, how: str, full: bool) -> None:
    refs = [ftray.put(block(i)) for i in range(2 * STORE // SIZE)]
    wait_until(lambda: usage()["spilled_objects"] > 8, what="objects are spilled")
    held = ftray.get(refs[-7:]) if full else []  # with all of memory in use, readers read the file themselves
    on_disk = [row for row in ask_raylet("memory")["objects"] if row["state"] == "spilled"]
    victim = next(ref for ref in refs if ref.hex() == on_disk[0]["object_id"])
    for name in spill_files(session):
        damage(Path(session.session_dir, "spill", name), how)
    with pytest.raises(exceptions.ObjectLostError, match="spilled copy was damaged"):
        ftray.get(victim, timeout=20)
    # A task that wants it is told the same.
    with pytest.raises(exceptions.ObjectLostError, match="spilled copy was damaged"):
        ftray.get(look.remote(victim, 0), timeout=20)
    # What is in memory is as it was, and the store serves on.
    assert all(is_block(value, i) for i, value in enumerate(held, len(refs) - 7))
    del refs, victim, held
    gc.collect()
    assert is_block(ftray.get(ftray.put(block(3))), 3)


def test_a_small_result_of_a_retry_leaves_no_large_copy_behind(tmp_path: Path) -> None:
    @ftray.remote(max_retries=1, num_returns=2)
    def large_then_small() -> Any:
        if not (tmp_path / "again").exists():
            (tmp_path / "again").touch()
            from ftray.worker.core import current_task, get_core
            from ftray.worker.serialization import serialize

            # The first return is sealed, and the worker dies before it replies.
            core, context = get_core(), current_task.get()
            assert context is not None
            owner = bytes.fromhex((tmp_path / "owner").read_text())
            core.objects.write(context.task_id + bytes(4), serialize(bytes(MB)), owner, keep=False)
            (tmp_path / "written").touch()
            os._exit(1)
        return 1, 2

    from ftray.worker.core import get_core

    (tmp_path / "owner").write_text(get_core().worker_id.hex())
    refs = large_then_small.remote()
    assert ftray.get(refs, timeout=20) == [1, 2]
    wait_for_file(tmp_path / "written")
    ids = {ref.hex() for ref in refs}
    wait_for_none(lambda: [row for row in ask_raylet("memory")["objects"] if row["object_id"] in ids])


# --- a full disk, with sessions of their own --------------------------------------------------------------------------

FULL_DISK = """
    import numpy as np
    MB = 1 << 20
    from ftray import exceptions
    session = ftray.init(num_cpus=1, object_store_memory=32 * MB, _system_config={CONFIG})
    FILL
    refs, error = [], None
    for i in range(12):
        try:
            refs.append(ftray.put(np.full(6 * MB, i, dtype=np.uint8)))
        except exceptions.FtrayError as caught:
            error = caught
            break
    assert isinstance(error, exceptions.OutOfDiskError), error
    assert "WHY" in str(error), error
    assert len(refs) >= 5, len(refs)

    @ftray.remote
    def make():
        return np.full(6 * MB, 99, dtype=np.uint8)

    try:
        ftray.get(make.remote())
    except exceptions.OutOfDiskError as caught:
        assert "Nothing that is stored is lost" in str(caught)
    else:
        raise AssertionError("there was room")
    # Nothing is lost, and the store is of use again when something is dropped.
    for i, ref in enumerate(refs):
        assert (ftray.get(ref) == i).all()
    del refs[:3], ref
    assert (ftray.get(ftray.put(np.full(6 * MB, 7, dtype=np.uint8))) == 7).all()
    assert (ftray.get(make.remote()) == 99).all()
    directory = session.session_dir
    ftray.shutdown()
    assert os.listdir(directory) == ["logs"], os.listdir(directory)
    say("fine")
"""


def test_a_full_disk_is_a_typed_error_and_loses_nothing() -> None:
    """The limit of all files stands for the disk; the disk itself is met in the unit tests."""
    config = '{"spill_bytes_max": 14 << 20, "store_room_wait_ms": 300}'
    code = FULL_DISK.replace("{CONFIG}", config).replace("FILL", "").replace("WHY", "spill_bytes_max")
    with Driver(code) as driver:
        assert driver.finish() == 0, driver.dump()
        driver.wait_for("fine")
        driver.check_clean()
