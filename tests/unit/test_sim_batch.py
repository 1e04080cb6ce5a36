"""Batches of seeds, in one process and in several; files of schedules; the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from sim_plants import deletes_do_nothing, program

from ftray.cli.sim import command
from ftray.sim import batch, schedules
from ftray.sim.batch import run_batch
from ftray.sim.faults import LEADER, Fault
from ftray.sim.runner import CRASH, SAFETY, Outcome, faults_of, run_seed
from ftray.sim.world import Options

ROOT = Path(__file__).resolve().parents[2]
SHORT = Options(seconds=1.0, clients=3)


class Kept:
    """A listener that keeps what it is told, and stops after so many seeds."""

    def __init__(self, seeds_max: int = 1000, interrupt: bool = False) -> None:
        self.running: list[int] = []
        self.told: list[tuple[str, int]] = []
        self.outcomes: dict[int, Outcome] = {}
        self._seeds_max = seeds_max
        self._interrupt = interrupt

    def begun(self, seed: int) -> None:
        self.running.append(seed)

    def found(self, outcome: Outcome) -> None:
        self.told.append(("found", outcome.seed))

    def shrinking(self, seed: int, text: str) -> None:
        self.told.append(("shrinking", seed))

    def done(self, outcome: Outcome) -> bool:
        self.told.append(("done", outcome.seed))
        self.outcomes[outcome.seed] = outcome
        if len(self.outcomes) == self._seeds_max and self._interrupt:
            raise KeyboardInterrupt
        return len(self.outcomes) < self._seeds_max


# --- processes --------------------------------------------------------------------------------------------------------


def no_workers() -> bool:
    return not any("ftray.sim.batch" in " ".join(each.cmdline()) for each in psutil.Process().children())


def test_several_processes_find_what_one_does() -> None:
    one, several = Kept(), Kept()
    run_batch(range(5), SHORT, one, keep_log=True)
    run_batch(range(5), SHORT, several, jobs=2, keep_log=True)
    assert sorted(several.outcomes) == list(range(5)) == several.running == one.running
    for seed, outcome in one.outcomes.items():
        other = several.outcomes[seed]
        assert (outcome.trace, outcome.log) == (other.trace, other.log) and outcome.log
    assert no_workers()


def test_logs_of_runs_without_a_failure_are_kept_only_if_asked_for() -> None:
    for jobs in (1, 2):
        kept = Kept()
        run_batch(range(2), SHORT, kept, jobs=jobs)
        assert [each.log for each in kept.outcomes.values()] == [[], []]


def test_a_worker_tells_of_a_failure_then_of_its_progress_and_at_last_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch._Worker, "program", program("deletes_do_nothing"))
    kept = Kept()
    run_batch([0, 1], Options(faults=("clock",), seconds=1.5), kept, jobs=2)
    for seed in (0, 1):
        told = [what for what, about in kept.told if about == seed]
        assert told[0] == "found" and told[-1] == "done" and set(told[1:-1]) == {"shrinking"}
        assert kept.outcomes[seed].kind == SAFETY and kept.outcomes[seed].faults == []


def test_a_seed_whose_process_dies_has_failed_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch._Worker, "program", program("seed_two_kills_its_process"))
    kept = Kept()
    run_batch(range(6), SHORT, kept, jobs=2)
    assert {seed for seed, each in kept.outcomes.items() if each.ok} == {0, 1, 3, 4, 5}
    assert kept.outcomes[2].kind == CRASH and "signal SIGKILL" in kept.outcomes[2].message
    assert kept.outcomes[2].replay == "ftray sim run --seed 2 --clients 3 --seconds 1.0"


@pytest.mark.parametrize("jobs", [1, 2])
def test_whoever_has_heard_enough_stops_the_workers(jobs: int) -> None:
    kept = Kept(2)
    run_batch(range(100_000), SHORT, kept, jobs=jobs)
    assert len(kept.outcomes) == 2 and no_workers()
    kept = Kept(2, interrupt=True)
    with pytest.raises(KeyboardInterrupt):
        run_batch(range(100_000), SHORT, kept, jobs=jobs)
    assert no_workers()


def test_ctrl_c_ends_a_batch_with_what_has_been_found() -> None:
    words = ["sim", "run", "--seeds", "0..99999", "--seconds", "1", "--jobs", "2", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ftray.cli", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, process_group=0,
    )  # fmt: skip
    workers: list[psutil.Process] = []
    while len(workers) < 2:  # they are started when everything else is ready
        assert process.poll() is None
        workers = psutil.Process(process.pid).children()
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    answer = json.loads(output)
    assert (process.returncode, answer["interrupted"], answer["ok"], answer["failed"]) == (130, True, False, [])
    assert answer["seeds_asked"] == 100_000 and not errors
    assert not psutil.wait_procs(workers, timeout=30)[1]


# --- files of schedules -----------------------------------------------------------------------------------------------

FAULT = Fault(7, 123.45678901234567, "kill", LEADER, 1, 1 / 3, 0.1, True)


def text_of(**changes: object) -> str:
    fault = {**json.loads(schedules.encode((FAULT,)))["faults"][0], **changes}
    return json.dumps({"version": 1, "faults": [fault]})


def test_a_schedule_is_read_as_it_was_written(tmp_path: Path) -> None:
    drawn = tuple(faults_of(17, Options()))
    path = tmp_path / schedules.file_name(17, drawn)
    path.write_bytes(schedules.encode(drawn, "how"))
    assert schedules.read(path) == drawn and json.loads(path.read_text())["replay"] == "how"
    schedules.check(drawn, 3, Options().clients, 6000.0)
    assert path.name != schedules.file_name(17, drawn[1:]) and path.name.startswith("ftray-sim-17-")


def test_a_seeds_schedule_in_a_file_makes_the_same_run() -> None:
    drawn = tuple(faults_of(7, SHORT))
    given = Options(seconds=1.0, clients=3, faults=(), schedule=drawn)
    assert run_seed(7, given).trace == run_seed(7, SHORT).trace


def test_the_schedule_in_the_documentation_is_one(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "simulation.md").read_text()
    path = tmp_path / "shown.json"
    path.write_text(text.split("```json\n")[1].split("```")[0])
    code, output = invoke("--seed", "9", "--heads", "5", "--clients", "0", "--seconds", "1", "--schedule", str(path))
    assert code == 0 and "power of the leader at 860 ms" in output


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "can't be read: No such file"),
        ("", "is no schedule"),
        ("[" * 100_000, "is no schedule"),
        ("\xff\x00", "is no schedule"),
        ('{"version": 1}', "missing required field `faults`"),
        ('{"version": 2, "faults": []}', "has version 2; this ftray knows version 1"),
        ('{"version": 1, "faults": [], "more": 1}', "unknown field `more`"),
        (text_of(at_ms="soon"), "at `$.faults[0].at_ms`"),
        (text_of(kind="fire"), "faults[0]: there is no fault 'fire': there are kill, power"),
        (text_of(at_ms=6000.0), "faults[0]: at_ms is 6000: faults happen from 0 to 6000 ms (--seconds)"),
        (text_of(at_ms=-1.0), "faults[0]: at_ms is -1"),
        (text_of(at_ms=float("nan")), "is no schedule"),
        (text_of(duration_ms=0.0), "faults[0]: duration_ms is 0"),
        (text_of(duration_ms=1e300), "faults[0]: duration_ms is 1e+300"),
        (text_of(amount=1.5), "faults[0]: amount is 1.5"),
        (text_of(target=3), "faults[0]: target is 3: there are 3 heads, from 0, and -1 is the leader"),
        (text_of(target=2**70), "faults[0]"),
        (text_of(other=-1), "faults[0]: other is -1"),
        (text_of(kind="cut_client", target=LEADER), "faults[0]: target is -1: there are "),
        (text_of(kind="cut_client", target=100), "clients, from 0 (--clients)"),
        (json.dumps({"version": 1, "faults": 2 * json.loads(text_of())["faults"]}), "two faults have the number 7"),
    ],
)
def test_a_file_that_is_no_schedule_is_named_and_refused(text: str | None, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    result = CliRunner().invoke(command, ["run", "--seed", "1", "--schedule", str(path)])
    assert result.exit_code == 2
    assert complaint in result.output and str(path) in result.output


# --- the command ------------------------------------------------------------------------------------------------------


def invoke(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(command, ["run", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_command_runs_seeds_and_says_how_it_went() -> None:
    code, output = invoke("--seeds", "0..1", "--seconds", "1", "--clients", "3", "--jobs", "1", "--json")
    answer = json.loads(output)
    assert (code, answer["ok"], answer["seeds"], answer["failed"]) == (0, True, 2, [])
    assert answer["virtual_hours"] > 2 / 3600 and answer["virtual_seconds_per_cpu_second"] > 0
    code, output = invoke("--seeds", "0..1", "--seconds", "1", "--clients", "3", "--jobs", "1")
    assert code == 0 and output.startswith("2 seeds, 0 failed: ")


def test_one_seed_is_shown_with_its_log_and_its_trace() -> None:
    code, output = invoke("--seed", "1", "--seconds", "1")
    assert code == 0 and "all faults end" in output
    assert f"trace {run_seed(1, Options(seconds=1.0)).trace}" in output


def test_the_command_shows_what_failed_and_how_to_replay_it(tmp_path: Path) -> None:
    with deletes_do_nothing():
        code, output = invoke("--seed", "1", "--seconds", "1.5", "--faults", "clock", "--out", str(tmp_path / "made"))
    assert code == 1
    assert "\nseed 1: safety failure: " in output  # at once, before it is made smaller
    assert "  ftray sim run --seed 1 --seconds 1.5 --faults clock\n" in output
    assert "The end of the event log" in output and "Faults (shrunk from " in output
    (path,) = (tmp_path / "made").iterdir()
    assert f"--schedule {path}" in output and output.splitlines()[-1].endswith(str(path))


def test_a_schedule_that_cannot_be_written_is_shown(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "in")
    with deletes_do_nothing():
        code, output = invoke("--seed", "1", "--seconds", "1.5", "--faults", "clock", "--out", out)
    assert code == 1
    assert "could not be written (Not a directory). Write this to it, to replay the run:" in output
    assert '"version": 1' in output


def test_an_interrupted_batch_says_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seeds: range, options: Options, listener: Any, **more: Any) -> None:
        for seed in range(3):
            listener.begun(seed)
        listener.done(run_seed(0, SHORT))
        listener.found(Outcome(1, options, SAFETY, "wrong\nvery", "", 1.0, 1.0, 0, 0, []))
        listener.shrinking(1, "shrinking: 9 faults -> 3, 12 runs")
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "run_batch", interrupted)
    code, output = invoke("--seeds", "0..9", "--jobs", "1")
    assert code == 1  # since something was found
    assert "interrupted after 1 of 10 seeds, 1 failed" in output
    assert "running when interrupted: seeds 1, 2\n" in output
    assert output.splitlines()[-1] == "  safety: ftray sim run --seed 1"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--seeds", "9..1"], "no range of seeds"),
        (["--seeds", "x"], "no range of seeds"),
        (["--faults", "fire"], "there is no kind 'fire'"),
        (["--seed", "1", "--seeds", "0..2"], "exclude each other"),
        (["--schedule", "x.json", "--faults", "crash"], "exclude each other"),
        (["--only", "a"], "no list of numbers"),
        (["--seed", "1", "--only", "999"], "there is no fault number 999: there are from 0 to "),
        (["--seed", "1", "--faults", "none", "--only", "1"], "there is no fault number 1: there are none at all"),
        (["--jobs", "0"], "0 is not in the range"),
        (["--seed", "1", "--seconds", "nan"], "'nan' is no number"),
        (["--seed", "1", "--seconds", "inf"], "is not in the range"),
        (["--seed", "1", "--pause-ms", "0"], "is not in the range"),
    ],
)
def test_a_wrong_command_line_is_refused(words: list[str], complaint: str) -> None:
    code, output = invoke(*words)
    assert code == 2 and "Error" in output and complaint in output.replace("\n", " ")
