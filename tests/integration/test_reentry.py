"""Calls of ftray from places where programs do not expect to be: finalisers, and threads that a shutdown surprises."""

from __future__ import annotations

from integration.harness import run_driver

FINALISERS = """
import gc, sys
import ftray

ftray.init(num_cpus=1)

@ftray.remote
def nothing():
    return None

outcomes = {"inside": 0, "outside": 0}

class Cycle:
    def __init__(self):
        self.me = self

    def __del__(self):
        try:
            ftray.get(nothing.remote()) if outcomes["outside"] < 5 else nothing.remote()
            outcomes["outside"] += 1
        except ftray.exceptions.ReentrantCallError:
            outcomes["inside"] += 1

gc.set_threshold(20)
for i in range(3_000):
    Cycle()
    ftray.put([i])
    if i % 50 == 0:
        assert ftray.get(nothing.remote()) is None
gc.collect()
assert outcomes["inside"] > 0 and outcomes["outside"] > 0, outcomes
print("done")
"""

SURPRISED = """
import threading
import ftray

ftray.init(num_cpus=1)

@ftray.remote
def forever():
    threading.Event().wait()

begun = threading.Event()
said = []

def wait():
    ref = forever.remote()
    begun.set()
    try:
        ftray.get(ref)
    except ftray.exceptions.FtrayError as error:
        said.append(str(error))

thread = threading.Thread(target=wait)
thread.start()
begun.wait()
ftray.shutdown()
thread.join()
assert "shutdown" in said[0], said
print("done")
"""


def test_a_finaliser_that_interrupts_the_runtime_gets_an_error_not_a_deadlock() -> None:
    with run_driver(FINALISERS) as driver:
        assert driver.finish() == 0
        assert "done" in driver.dump()


def test_a_thread_in_get_learns_of_the_shutdown() -> None:
    with run_driver(SURPRISED) as driver:
        assert driver.finish() == 0
        assert "done" in driver.dump()
