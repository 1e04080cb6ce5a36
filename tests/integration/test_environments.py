"""Runtime environments: variables, files, modules and hooks reach tasks and actors, nest, and fail in the open."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from integration.harness import Driver, run_driver, wait_for_file, wait_until

import ftray
from ftray.api import joining
from ftray.exceptions import RuntimeEnvSetupError
from ftray.gcs.state.commands import KvPut
from ftray.gcs.state.packages import PACKAGES
from ftray.ids import content_hash
from ftray.raylet.packages import Manifest, chunk_key, package_uri
from ftray.runtime_env import THREAD_VARIABLES, RuntimeEnv
from ftray.worker.core import get_core
from ftray.worker.objects import Answer
from ftray.worker.waiting import block

SESSION = {"num_cpus": 2, "runtime_env": {"env_vars": {"WHOSE": "job", "JOB": "yes"}}}
pytestmark = pytest.mark.usefixtures("session")


@ftray.remote
def variables(*names: str) -> list[str | None]:
    return [os.environ.get(name) for name in names]


@ftray.remote
def call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def with_env(**fields: Any) -> Any:
    """`call` in an environment."""
    return call.options(runtime_env=fields)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture(autouse=True)
def _others_are_unaffected() -> Iterator[None]:
    yield
    assert ftray.get(variables.remote("WHOSE", "JOB"), timeout=20) == ["job", "yes"]


# --- inheriting -----------------------------------------------------------------------------------------------------


def test_children_inherit_and_override() -> None:
    assert "WHOSE" not in os.environ  # the driver does not run in it
    names = ("WHOSE", "JOB", "OWN", "PATH")
    path = os.environ["PATH"]
    own = {"WHOSE": "task", "OWN": "1", "PATH": "${PATH}:/more"}
    assert ftray.get(variables.options(runtime_env={"env_vars": own}).remote(*names)) == [
        "task", "yes", "1", f"{path}:/more",
    ]  # fmt: skip

    @ftray.remote(runtime_env={"env_vars": {"WHOSE": "actor", "A": "a"}})
    class Parent:
        def child(self, env: dict[str, Any] | None) -> Any:
            task = variables.options(num_cpus=0, runtime_env=env)
            return ftray.get(task.remote("WHOSE", "JOB", "A"))

        def where(self) -> Any:
            return ftray.get_runtime_context().runtime_env, ftray.get_runtime_context().get_runtime_env_string()

    parent = Parent.remote()
    assert ftray.get(parent.child.remote(None)) == ["actor", "yes", "a"]
    assert ftray.get(parent.child.remote({"env_vars": {"A": "child"}})) == ["actor", "yes", "child"]
    env, text = ftray.get(parent.where.remote())
    assert env == {"env_vars": {"WHOSE": "actor", "JOB": "yes", "A": "a"}} and isinstance(env, RuntimeEnv)
    assert text == '{"env_vars":{"A":"a","JOB":"yes","WHOSE":"actor"}}'
    assert ftray.get_runtime_context().runtime_env == SESSION["runtime_env"]
    # `.options` replaces what the decorator says, as it does with all options.
    assert ftray.get(Parent.options(runtime_env={"env_vars": {"B": "b"}}).remote().child.remote(None))[0] == "job"


def test_a_worker_serves_one_environment_only() -> None:
    one, two = {"env_vars": {"N": "1"}}, {"env_vars": {"N": "2"}, "config": {"setup_timeout_seconds": 100}}
    first, none, second, again, same = (
        ftray.get(call.options(num_cpus=2, runtime_env=env).remote(os.getpid))  # one lease at a time
        for env in (one, None, two, one, {**two, "config": {}})
    )
    assert len({first, none, second}) == 3
    assert (first, second) == (again, same)  # the workers are kept, and `config` makes no other environment


# --- files and modules ----------------------------------------------------------------------------------------------


def test_a_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "project"
    module = write(folder / "project_module.py", "VALUE = 1\n")
    write(folder / "data/text.txt", "hello")
    write(folder / "secret.key", "x")
    monkeypatch.chdir(tmp_path)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("project/service.sock")

    def look() -> Any:
        value = importlib.import_module("project_module").VALUE
        return value, sorted(os.listdir()), Path("data/text.txt").read_text(), os.getcwd()

    with sock, caplog.at_level(logging.WARNING, "ftray"):
        task = with_env(working_dir="project", excludes=["*.key"])
        value, names, text, cwd = ftray.get(task.remote(look))
        assert (value, text) == (1, "hello")
        assert [name for name in names if name != "__pycache__"] == ["data", "project_module.py"]
        assert "service.sock (a socket)" in caplog.text
        assert not cwd.startswith(str(tmp_path))
        # A change is another package; the same content is the same, wherever it comes from.
        again = with_env(working_dir=Path("project"), excludes=["*.key"])
        assert ftray.get(again.remote(look))[3] == cwd
        module.write_text("VALUE = 2\n")
        assert ftray.get(with_env(working_dir="project", excludes=["*.key"]).remote(look))[0] == 2
        assert ftray.get(task.remote(look))[0] == 1  # a function keeps what it has begun with

    # What is packed here means the same where a function is called from a worker in another directory.
    inner = call.options(num_cpus=0, runtime_env={"working_dir": "project"})

    def nested() -> Any:
        os.chdir("/")
        return ftray.get(inner.remote(lambda: importlib.import_module("project_module").VALUE))

    assert ftray.get(call.remote(nested)) == 2


def test_python_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "one/folder_module/__init__.py", "from .part import VALUE\n")
    write(tmp_path / "one/folder_module/part.py", "VALUE = 'folder'\n")
    write(tmp_path / "two/file_module.py", "VALUE = 'file'\n")
    write(tmp_path / "three/imported_module/__init__.py", "VALUE = 'imported'\n")
    with zipfile.ZipFile(tmp_path / "made-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("wheel_module.py", "import wheel_data\nVALUE = wheel_data.VALUE\n")
        wheel.writestr("made-1.0.data/purelib/wheel_data.py", "VALUE = 'wheel'\n")
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("zip_module/__init__.py", "VALUE = 'zip'\n")
    monkeypatch.syspath_prepend(str(tmp_path / "three"))
    modules = [
        str(tmp_path / "one/folder_module"), tmp_path / "two/file_module.py",
        importlib.import_module("imported_module"), str(tmp_path / "made-1.0-py3-none-any.whl"),
        str(tmp_path / "archive.zip"),
    ]  # fmt: skip
    sys.modules.pop("imported_module")

    def look() -> Any:
        kinds = ("folder", "file", "imported", "wheel", "zip")
        found = [importlib.import_module(f"{kind}_module") for kind in kinds]
        child = os.popen(f"{sys.executable} -c 'import folder_module; print(folder_module.VALUE)'").read().strip()
        return [module.VALUE for module in found], child, [str(module.__file__) for module in found]

    values, child, files = ftray.get(with_env(py_modules=modules).remote(look))
    assert values == ["folder", "file", "imported", "wheel", "zip"]
    assert child == "folder"  # processes that a task starts find them too
    assert not any(name.startswith(str(tmp_path)) for name in files)


@pytest.mark.parametrize("kind", ["missing", "not a folder", "too large", "no zip", "missing module"])
def test_a_package_that_cannot_be_made_fails_the_call(tmp_path: Path, kind: str) -> None:
    fields: dict[str, Any] = {"working_dir": str(tmp_path / "x")}
    error: type[Exception] = ValueError
    if kind == "missing":
        words = "can't be used: No such file"
    elif kind == "not a folder":
        write(tmp_path / "x", "text")
        words = "not the right kind of file"
    elif kind == "too large":
        with open(write(tmp_path / "x/big.bin", ""), "wb") as file:
            file.truncate(200 << 20)
        error, words = RuntimeEnvSetupError, r"more than 104,857,600 bytes.*big\.bin"
    elif kind == "no zip":
        fields["working_dir"] = str(write(tmp_path / "x.zip", "text"))
        words = "is no zip file"
    else:
        fields = {"py_modules": [str(tmp_path / "nowhere")]}
        words = "py_modules: .*nowhere' can't be used"
    with pytest.raises(error, match=words):
        with_env(**fields).remote(os.getpid)
    with pytest.raises(error, match=words):
        ftray.remote(runtime_env=fields)(Holder).remote()


class Holder:
    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def put_package(data: bytes, manifest: Manifest, chunks: list[bytes]) -> str:
    """Puts a package into the cluster as a driver that is broken might."""
    core = get_core()
    digest = content_hash(data)
    entries = [(digest, ftray_encode(manifest)), *((chunk_key(digest, n), chunk) for n, chunk in enumerate(chunks))]
    for key, value in entries:
        answer = Answer()
        with core.lock:
            core.gcs.command(KvPut(PACKAGES, key, value), answer.give)
            core.settle()
        block(core.reactor, answer.waiter, None)
    return package_uri(data, "zip")


def ftray_encode(manifest: Manifest) -> bytes:
    import msgspec

    return msgspec.msgpack.encode(manifest)


def test_a_package_that_is_damaged_or_not_there() -> None:
    cases = [
        (put_package(b"one", Manifest(3, 4), [b"eno"]), "is damaged: its content does not match its name"),
        (put_package(b"two", Manifest(8, 4), [b"twoo"]), "is damaged: part 2 of 2 is missing"),
        (put_package(b"three", Manifest(1 << 40, 4), []), "over the limit"),
        (put_package(b"four", Manifest(4, 4), [b"four"]), "no usable zip"),
        (package_uri(b"never uploaded", "zip"), "is not in this cluster"),
    ]
    for uri, words in cases:
        for fields in ({"working_dir": uri}, {"py_modules": [uri]}):
            with pytest.raises(RuntimeEnvSetupError, match=words):
                ftray.get(with_env(**fields).remote(os.getpid), timeout=20)
    actor = ftray.remote(Holder).options(runtime_env={"working_dir": cases[0][0]}).remote()
    with pytest.raises(RuntimeEnvSetupError, match="actor Holder was not created.*is damaged"):
        ftray.get(actor.call.remote(os.getpid), timeout=20)


# --- hooks ----------------------------------------------------------------------------------------------------------


def test_a_hook_runs_before_all_else_and_once(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def hook() -> None:
        with open(log, "a") as file:
            print(os.getpid(), os.environ["H"], file=file)
        builtin = __import__("builtins")
        builtin.from_hook = ftray.get(ftray.put("made by the hook"))

    env = {"env_vars": {"H": "h"}, "worker_process_setup_hook": hook}
    task = with_env(**env)
    pids = ftray.get([task.remote(os.getpid) for _ in range(10)])
    assert ftray.get(task.remote(eval, "from_hook")) == "made by the hook"
    actor = ftray.remote(Holder).options(runtime_env=env).remote()
    assert ftray.get(actor.call.remote(eval, "from_hook")) == "made by the hook"
    pids.append(ftray.get(actor.call.remote(os.getpid)))
    lines = log.read_text().split()
    assert set(lines[1::2]) == {"h"}
    assert set(map(str, pids)) <= set(lines[::2]) and len(set(lines[::2])) == len(lines) / 2

    write(tmp_path / "hooks/hook_module.py", "import os\ndef hook():\n    os.environ['BY_NAME'] = 'yes'\n")
    named = with_env(py_modules=[tmp_path / "hooks/hook_module.py"], worker_process_setup_hook="hook_module.hook")
    assert ftray.get(named.remote(os.getenv, "BY_NAME")) == "yes"


def raises() -> None:
    raise LookupError("no licence for this machine")


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (raises, r"worker_process_setup_hook: Traceback.*in raises.*LookupError: no licence"),
        (sys.exit, "worker_process_setup_hook: .*SystemExit"),
        ("no_such_module.hook", "No module named 'no_such_module'"),
        ("os.no_such_function", "has no attribute 'no_such_function'"),
        ("os.sep", "os.sep is '/', which can't be called"),
        (lambda: os._exit(7), "3 workers in a row ended while they applied it; the last one exited with code 7"),
    ],
)
def test_a_bad_hook_fails_its_tasks(hook: Any, words: str) -> None:
    refs = [with_env(worker_process_setup_hook=hook).remote(os.getpid) for _ in range(3)]
    for ref in refs:
        with pytest.raises(RuntimeEnvSetupError, match=f"(?s)the runtime environment of call could not.*{words}"):
            ftray.get(ref, timeout=20)
    if hook is raises:
        actor = ftray.remote(Holder).options(runtime_env={"worker_process_setup_hook": hook}).remote()
        for _ in range(2):
            with pytest.raises(RuntimeEnvSetupError, match=f"(?s)actor Holder was not created.*{words}"):
                ftray.get(actor.call.remote(os.getpid), timeout=20)


def test_a_failure_is_not_for_ever(tmp_path: Path) -> None:
    def hook() -> None:
        assert (tmp_path / "ready").exists(), "not ready"

    task = with_env(worker_process_setup_hook=hook)
    with pytest.raises(RuntimeEnvSetupError, match="not ready"):
        ftray.get(task.remote(os.getenv, "WHOSE"), timeout=20)
    (tmp_path / "ready").touch()
    assert ftray.get(task.remote(os.getenv, "WHOSE"), timeout=20) == "job"


def test_who_is_being_set_up_holds_up_nobody_else(tmp_path: Path) -> None:
    def hook() -> None:
        (tmp_path / "begun").touch()
        wait_for_file(tmp_path / "go")

    slow = with_env(worker_process_setup_hook=hook).remote(os.getenv, "WHOSE")
    wait_for_file(tmp_path / "begun")
    assert ftray.get(variables.remote("JOB"), timeout=20) == ["yes"]
    assert ftray.wait([slow], timeout=0)[0] == []
    (tmp_path / "go").touch()
    assert ftray.get(slow, timeout=20) == "job"


def test_a_set_up_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    def hook() -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(600)

    env = {"worker_process_setup_hook": hook, "config": {"setup_timeout_seconds": 1}}
    with pytest.raises(RuntimeEnvSetupError, match=r"not applied within 1 s \(setup_timeout_seconds\)"):
        ftray.get(with_env(**env).remote(os.getpid), timeout=20)
    pid = (tmp_path / "pid").read_text()
    wait_until(lambda: not Path("/proc", pid).exists(), what="the worker is gone")


def test_a_worker_killed_while_it_is_set_up_is_replaced(tmp_path: Path) -> None:
    def hook() -> None:
        if not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    env = {"worker_process_setup_hook": hook}
    assert ftray.get(with_env(**env).remote(os.getenv, "WHOSE"), timeout=20) == "job"
    (tmp_path / "killed").unlink()
    again = {**env, "env_vars": {"ANOTHER": "1"}}
    actor = ftray.remote(Holder).options(runtime_env=again, max_restarts=1).remote()
    assert ftray.get(actor.call.options(max_task_retries=1).remote(os.getenv, "WHOSE"), timeout=20) == "job"


# --- thread counts --------------------------------------------------------------------------------------------------


def test_numerical_libraries_get_as_many_threads_as_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    names = THREAD_VARIABLES
    said = {"OMP_NUM_THREADS": "7"}
    fresh = iter(range(100))

    def counts(cpus: float | None, **own: str) -> Any:
        env = {"env_vars": {"FRESH": str(next(fresh)), **own}}
        return variables.options(num_cpus=cpus, runtime_env=env).remote(*names)

    one, half, two = ftray.get([counts(None), counts(0.5), counts(2)])
    assert set(one) == set(half) == {"1"} and set(two) == {"2"}
    assert ftray.get(counts(2, **said)) == ["7", "2", "2", "2", "2", "2"]
    actor = ftray.remote(Holder).options(num_cpus=2, runtime_env={"env_vars": {"FRESH": "actor"}}).remote()
    assert ftray.get(actor.call.remote(os.getenv, "OMP_NUM_THREADS")) == "2"
    del actor
    # A program that joins a node says what its own environment says; the node can't know.
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert joining._with_thread_counts(None) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert joining._with_thread_counts(None) == {"env_vars": said}
    assert joining._with_thread_counts({"env_vars": {"OMP_NUM_THREADS": "3", "A": "b"}}) == {
        "env_vars": {"OMP_NUM_THREADS": "3", "A": "b"},
    }


def test_workers_begin_without_libraries_that_read_them() -> None:
    def loaded() -> list[str]:
        return [name for name in ("numpy", "pandas", "scipy", "torch") if name in sys.modules]

    assert ftray.get(with_env(env_vars={"FRESH": "loaded"}).remote(loaded)) == []


# --- the job --------------------------------------------------------------------------------------------------------


def test_the_environment_of_a_job(tmp_path: Path) -> None:
    write(tmp_path / "project/job_module.py", "VALUE = 'job'\n")
    driver = run_driver(
        f"""
        import pytest
        from ftray.exceptions import RuntimeEnvSetupError

        for env, error in [
            ({{"working_dir": "/nowhere"}}, ValueError), ({{"env_vars": {{"A": 1}}}}, TypeError),
            ({{"pip": ["x"]}}, RuntimeEnvSetupError), ({{"working_dr": "."}}, TypeError),
            ({{"py_modules": [{str(tmp_path / "gone")!r}]}}, ValueError),
            ({{"working_dir": {str(tmp_path / "bad")!r}}}, RuntimeEnvSetupError),
        ]:
            if "working_dir" in env and "bad" in env["working_dir"]:  # can be seen only with a cluster
                os.makedirs(env["working_dir"])
                os.symlink("/proc/self/mem", env["working_dir"] + "/memory")
            with pytest.raises(error):
                ftray.init(num_cpus=1, runtime_env=env)
            assert not ftray.is_initialized()

        @ftray.remote
        def look():
            import job_module
            return job_module.VALUE, os.getcwd(), os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]

        with ftray.init(num_cpus=1, runtime_env={{"working_dir": {str(tmp_path / "project")!r}}}) as session:
            value, cwd, omp, mkl = ftray.get(look.remote())
            assert (value, omp, mkl) == ("job", "7", "1")
            assert cwd.startswith(session.session_dir + "/environments/")
        assert not os.path.exists(session.session_dir + "/environments")
        """,
        env={"OMP_NUM_THREADS": "7"},
    )
    driver.close()


def test_a_driver_that_dies_while_its_packages_are_set_up_leaves_nothing(tmp_path: Path) -> None:
    code = f"""
        def hook():
            open({str(tmp_path / "begun")!r}, "w").close()
            time.sleep(600)

        env = {{"worker_process_setup_hook": hook, "config": {{"eager_install": False}}}}
        session = ftray.init(num_cpus=1, runtime_env=env)
        say("session", session.session_dir)
        ref = ftray.remote(os.getpid).remote()
        time.sleep(600)
        """
    with Driver(code) as driver:
        session_dir = driver.wait_for("session")
        wait_for_file(tmp_path / "begun")
        driver.signal(signal.SIGKILL)
        driver.finish()
        driver.check_clean(session_dir)
