"""What workers print reaches the driver's terminal and the session's files, and floods hurt nothing."""

from __future__ import annotations

import re
from pathlib import Path

from integration.harness import Driver, run_driver


def test_prints_reach_the_terminal_with_a_prefix() -> None:
    code = """
    session = ftray.init(num_cpus=2)
    say("session", session.session_dir)

    @ftray.remote
    def speak(text):
        print("out", text)
        print("err", text, file=sys.stderr)
        return os.getpid()

    @ftray.remote
    class Speaker:
        def __init__(self):
            print("made")

        def speak(self):
            print("from the actor")
            print("no end of line", end="")
            return os.getpid()

    say("task", ftray.get(speak.remote("hello")))
    speaker = Speaker.remote()
    say("actor", ftray.get(speaker.speak.remote()))
    os.write(1, b"unprefixed from the driver\\n")
    ftray.shutdown()
    """
    with run_driver(code) as driver:
        task, actor = driver.wait_for("task "), driver.wait_for("actor ")
        out, err = driver.out.splitlines(), driver.err.splitlines()
        assert f"(speak pid={task}) out hello" in out
        assert f"(speak pid={task}) err hello" in err
        assert f"(Speaker.speak pid={actor}) from the actor" in out
        assert any(re.fullmatch(rf"\(Speaker\S* pid={actor}\) made", line) for line in out)
        assert any(line.endswith("no end of line") for line in out)
        assert "unprefixed from the driver" in out
        assert "\x01" not in driver.out + driver.err
        logs = list(Path(driver.wait_for("session "), "logs").iterdir())
        texts = {path.name: path.read_text(errors="replace") for path in logs if path.is_file()}
        for text in ("out hello", "err hello", "from the actor", "no end of line"):
            names = [name for name, content in texts.items() if text in content]
            assert names, f"{text!r} is in none of {sorted(texts)}"
            assert any(pid in name for name in names for pid in (task, actor)), names


def test_output_of_a_task_is_there_when_the_program_ends() -> None:
    code = """
    ftray.init(num_cpus=1)

    @ftray.remote
    def speak(i):
        print("line", i)

    ftray.get([speak.remote(i) for i in range(200)])
    """
    with run_driver(code) as driver:
        numbers = [int(n) for n in re.findall(r"\(speak pid=\d+\) line (\d+)", driver.out)]
        assert numbers == list(range(200))


def test_output_of_subprocesses_and_native_code() -> None:
    code = """
    import subprocess
    ftray.init(num_cpus=1)

    @ftray.remote
    def speak():
        subprocess.run(["echo", "from a child"], check=True)
        os.write(2, b"from a descriptor\\n")

    ftray.get(speak.remote())
    ftray.shutdown()
    """
    with run_driver(code) as driver:
        assert re.search(r"^\(.* pid=\d+\) from a child$", driver.out, re.M)
        assert re.search(r"^\(.* pid=\d+\) from a descriptor$", driver.err, re.M)


def test_log_to_driver_false_keeps_it_off_the_terminal() -> None:
    code = """
    session = ftray.init(num_cpus=1, log_to_driver=False)

    @ftray.remote
    def speak():
        print("quiet please")

    ftray.get(speak.remote())
    say("session", session.session_dir)
    ftray.shutdown()
    """
    with run_driver(code) as driver:
        assert "quiet" not in driver.out
        logs = Path(driver.wait_for("session "), "logs")
        assert any("quiet please" in path.read_text(errors="replace") for path in logs.iterdir() if path.is_file())


def test_odd_output_does_no_harm() -> None:
    code = r"""
    ftray.init(num_cpus=1)

    @ftray.remote
    def speak():
        print("umlaut \u00e4 and \U0001f600")
        os.write(1, b"\xff\xfe not text\n")
        os.write(1, b"\x00\x01\x02 control\n")
        print("lone \ud800 surrogate")
        print("\r\n\n")
        sys.stdout.buffer.write(b"raw bytes\n")
        sys.stdout.flush()
        print("x" * 300_000)
        print("last")
        return 1

    assert ftray.get(speak.remote()) == 1
    ftray.shutdown()
    """
    with run_driver(code) as driver:
        for text in ("umlaut \u00e4", "not text", "control", "surrogate", "raw bytes", "last"):
            assert text in driver.out, text


def test_megabytes_of_output_hurt_nothing() -> None:
    code = """
    ftray.init(num_cpus=2)

    @ftray.remote
    def flood(megabytes):
        line = "x" * 99
        for _ in range(megabytes * 10_000):
            print(line)
        return megabytes

    @ftray.remote
    def add(a, b):
        return a + b

    ref = flood.remote(30)
    start = time.monotonic()
    rounds = 0
    while not ftray.wait([ref], timeout=0)[0]:
        assert ftray.get([add.remote(i, 1) for i in range(20)], timeout=20) == list(range(1, 21))
        rounds += 1
        assert time.monotonic() - start < 30
    assert ftray.get(ref, timeout=30) == 30
    assert rounds > 0

    @ftray.remote
    def last():
        print("last words")

    ftray.get(last.remote(), timeout=20)
    # Not getrusage: that counts what the test's own process was before it became this one.
    status = open("/proc/self/status").read()
    say("peak", int(status.split("VmHWM:")[1].split()[0]) // 1024)
    ftray.shutdown()
    """
    with Driver(code) as driver:
        assert driver.finish(60) == 0, driver.dump()
        assert int(driver.wait_for("peak ")) < 250
        driver.check_clean()


def test_a_driver_whose_terminal_is_closed_goes_on() -> None:
    code = """
    session = ftray.init(num_cpus=1)

    @ftray.remote
    def speak(i):
        print("line", i)
        return i

    os.close(1)
    sys.stdout = open(os.devnull, "w")
    assert ftray.get([speak.remote(i) for i in range(20)]) == list(range(20))
    sys.stdout.close()
    assert ftray.get([speak.remote(i) for i in range(20)]) == list(range(20))
    sys.stdout = sys.__stdout__ = None
    ftray.shutdown()
    """
    with Driver(code, flags=()) as driver:
        assert driver.finish() == 0, driver.dump()
        driver.check_clean()
