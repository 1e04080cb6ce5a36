"""Wrong use gets an error that says what is wrong, and hurts nothing: after each one the session works on."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from integration.harness import is_running, run_driver

import ftray
from ftray import exceptions

pytestmark = pytest.mark.usefixtures("session")


def add_remote() -> Any:
    @ftray.remote
    def add(a: Any, b: Any) -> Any:
        return a + b

    return add


@pytest.fixture(autouse=True)
def _works_on(session: Any) -> Iterator[None]:
    yield
    assert ftray.get([add_remote().remote(i, 1) for i in range(5)], timeout=20) == [1, 2, 3, 4, 5]


class Model:
    """Something with a part that can't be pickled."""

    def __init__(self) -> None:
        self.name = "model"
        self.lock = threading.Lock()


# --- what cannot be pickled -----------------------------------------------------------------------------------------


def test_an_argument_that_cannot_be_pickled_is_named() -> None:
    add = add_remote()
    cases = [
        (lambda: add.remote(threading.Lock(), 1), "argument 1"),
        (lambda: add.remote(1, {"model": [Model()]}), r"argument 2\['model'\]\[0\]\.lock"),
        (lambda: add.remote(a=1, b=(x for x in "ab")), "argument 'b'"),
        (lambda: add.remote(1, sys._getframe()), "argument 2"),
    ]
    for call, path in cases:
        with pytest.raises(exceptions.SerializationError, match=path) as caught:
            call()
        assert isinstance(caught.value, TypeError)
        caught.value.__traceback__ = None


def test_put_of_what_cannot_be_pickled_names_the_part() -> None:
    with pytest.raises(exceptions.SerializationError, match=r"value\.lock"):
        ftray.put(Model())
    with pytest.raises(exceptions.SerializationError, match=r"value\['a'\]\[1\]"):
        ftray.put({"a": [1, threading.Lock()]})


def test_a_closure_that_cannot_be_pickled_is_named() -> None:
    held = threading.Lock()

    @ftray.remote
    def uses() -> Any:
        return held.locked()

    with pytest.raises(exceptions.SerializationError, match="function .*uses: closure variable 'held'"):
        uses.remote()


def test_a_class_that_cannot_be_pickled_is_named() -> None:
    held = threading.Lock()

    @ftray.remote
    class Uses:
        def look(self) -> Any:
            return held.locked()

    with pytest.raises(exceptions.SerializationError, match="closure variable 'held'"):
        Uses.remote()


def test_a_result_that_cannot_be_pickled_fails_the_task() -> None:
    @ftray.remote
    def one() -> Any:
        return {"lock": threading.Lock()}

    @ftray.remote(num_returns=2)
    def two() -> Any:
        return 1, threading.Lock()

    with pytest.raises(exceptions.SerializationError, match=r"return value\['lock'\]"):
        ftray.get(one.remote(), timeout=20)
    with pytest.raises(exceptions.SerializationError, match="return value 1"):
        ftray.get(two.remote()[0], timeout=20)


def test_nesting_too_deep_to_pickle() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    try:
        with pytest.raises(exceptions.SerializationError, match="nests too deeply"):
            ftray.put(deep)
        with pytest.raises(exceptions.SerializationError, match="argument 1: nests too deeply"):
            add_remote().remote(deep, 1)
    finally:
        while deep:  # its own end must not recurse either
            deep = deep.pop()

    @ftray.remote
    def make() -> Any:
        value: Any = []
        for _ in range(100_000):
            value = [value]
        return value

    with pytest.raises(exceptions.SerializationError, match="return value: nests too deeply"):
        ftray.get(make.remote(), timeout=20)


def test_an_argument_that_cannot_be_read_back_fails_the_task() -> None:
    def explode() -> None:
        raise RuntimeError("cannot be rebuilt")

    class Bomb:
        def __reduce__(self) -> Any:
            return explode, ()

    with pytest.raises(exceptions.SerializationError, match="cannot be rebuilt"):
        ftray.get(add_remote().remote(Bomb(), 1), timeout=20)

    @ftray.remote
    def make() -> Any:
        return Bomb()

    with pytest.raises(exceptions.SerializationError, match="cannot be rebuilt"):
        ftray.get(make.remote(), timeout=20)


def test_a_module_that_workers_lack_is_named() -> None:
    import types

    module = types.ModuleType("only_in_the_driver")
    exec("def double(x):\n    return 2 * x\n", module.__dict__)
    sys.modules["only_in_the_driver"] = module
    try:
        double: Any = module.__dict__["double"]
        with pytest.raises(exceptions.FtrayError, match="only_in_the_driver"):
            ftray.get(ftray.remote(double).remote(1), timeout=20)
    finally:
        del sys.modules["only_in_the_driver"]


# --- references -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [ftray.get, ftray.wait], ids=["get", "wait"])
@pytest.mark.parametrize("value", [5, "text", None, {1: 2}, b"bytes", object()], ids=lambda v: type(v).__name__)
def test_get_and_wait_of_what_is_no_reference(call: Any, value: Any) -> None:
    with pytest.raises(TypeError, match=f"takes .*not {type(value).__name__}"):
        call(value)
    with pytest.raises(TypeError, match=f"item 1 is {type(value).__name__}"):
        call([ftray.put(1), value])


def test_wait_of_a_single_reference_says_how() -> None:
    with pytest.raises(TypeError, match=r"ftray\.wait\(\[ref\]\)"):
        ftray.wait(ftray.put(1))  # type: ignore[arg-type]


def test_put_of_a_reference_says_what_to_do() -> None:
    with pytest.raises(TypeError, match="put of an ObjectRef"):
        ftray.put(ftray.put(1))


def test_an_actor_handle_is_no_reference() -> None:
    @ftray.remote
    class Actor:
        pass

    actor = Actor.remote()
    with pytest.raises(TypeError, match="actor handle"):
        ftray.get(actor)
    with pytest.raises(TypeError, match="ActorHandle"):
        ftray.get([actor])


@pytest.mark.parametrize("timeout", [-1, "soon", float("nan"), True])
def test_wrong_timeouts(timeout: Any) -> None:
    for call in (ftray.get, ftray.wait):
        with pytest.raises((TypeError, ValueError), match="timeout must"):
            call([ftray.put(1)], timeout=timeout)


def test_a_reference_pickled_by_hand_works_and_keeps_its_object() -> None:
    ref = ftray.put("kept")
    data = pickle.dumps(ref)
    del ref
    assert ftray.get(pickle.loads(data)) == "kept"

    @ftray.remote
    def load(data: bytes) -> Any:
        return ftray.get(pickle.loads(data))

    assert ftray.get(load.remote(data), timeout=20) == "kept"


def test_a_reference_captured_by_a_function_keeps_its_object() -> None:
    ref = ftray.put("captured")

    @ftray.remote
    def read() -> Any:
        return ftray.get(ref)

    assert ftray.get(read.remote(), timeout=20) == "captured"


def test_a_reference_of_another_session_is_refused() -> None:
    code = """
    import pickle
    ftray.init(num_cpus=1)
    ref = ftray.put("old")
    data = pickle.dumps(ref)
    ftray.shutdown()
    ftray.init(num_cpus=1)

    @ftray.remote
    def identity(x):
        return x

    calls = [
        lambda: ftray.get(ref), lambda: ftray.wait([ref]), lambda: identity.remote(ref),
        lambda: identity.remote([ref]), lambda: ftray.put([ref]), lambda: ref.future(), lambda: pickle.dumps(ref),
    ]
    for call in calls:
        try:
            call()
        except ftray.exceptions.ForeignRefError as error:
            assert "session that is over" in str(error)
        else:
            raise AssertionError("no error")
    try:
        ftray.get(pickle.loads(data), timeout=10)
    except (ftray.exceptions.ForeignRefError, ftray.exceptions.ObjectLostError) as error:
        print("loaded", type(error).__name__)
    assert ftray.get(identity.remote(1)) == 1
    ftray.shutdown()
    """
    run_driver(code).close()


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_cpus": -1}, ValueError, "num_cpus"),
        ({"num_cpus": "1"}, TypeError, "num_cpus"),
        ({"num_cpus": float("nan")}, ValueError, "num_cpus"),
        ({"num_gpus": 0.5j}, TypeError, "num_gpus"),
        ({"memory": -5}, ValueError, "memory"),
        ({"resources": {"x": -1}}, ValueError, "x"),
        ({"resources": {"CPU": 1}}, ValueError, "num_cpus"),
        ({"resources": ["x"]}, TypeError, "resources"),
        ({"resources": {5: 1}}, TypeError, "resources"),
        ({"num_returns": -1}, ValueError, "num_returns .* at least 0"),
        ({"num_returns": 1.5}, TypeError, "num_returns .* whole number"),
        ({"num_returns": "many"}, ValueError, "num_returns"),
        ({"max_retries": -2}, ValueError, "max_retries .* -1"),
        ({"max_retries": True}, TypeError, "max_retries"),
        ({"retry_exceptions": [5]}, TypeError, "retry_exceptions"),
        ({"retry_exceptions": "ValueError"}, TypeError, "retry_exceptions"),
        ({"name": 5}, TypeError, "name"),
        ({"num_cpu": 1}, TypeError, "unknown option 'num_cpu'.*did you mean 'num_cpus'"),
        ({"max_restarts": 1}, TypeError, "max_restarts"),
        ({"runtime_env": {"env_var": {}}}, TypeError, "unknown field 'env_var'.*did you mean 'env_vars'"),
        ({"runtime_env": {"pip": ["x"]}}, exceptions.RuntimeEnvSetupError, "'pip' is not available in this version"),
        ({"runtime_env": "env"}, TypeError, "runtime_env must be a dict"),
    ],
    ids=str,
)
def test_wrong_options_of_tasks(options: dict[str, Any], error: type[Exception], text: str) -> None:
    def function() -> None: ...

    with pytest.raises(error, match=text):
        ftray.remote(**options)(function)
    with pytest.raises(error, match=text):
        ftray.remote(function).options(**options)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_cpus": -1}, ValueError, "num_cpus"),
        ({"max_restarts": "often"}, TypeError, "max_restarts"),
        ({"max_restarts": -2}, ValueError, "max_restarts"),
        ({"max_concurrency": 0}, ValueError, "max_concurrency .* at least 1"),
        ({"lifetime": "long"}, ValueError, "lifetime"),
        ({"name": ""}, TypeError, "name"),
        ({"get_if_exists": 1}, TypeError, "get_if_exists"),
        ({"event_loop": "twisted"}, ValueError, "event_loop"),
        ({"max_retries": 1}, TypeError, "unknown option 'max_retries'"),
        ({"num_returns": 1}, TypeError, "unknown option 'num_returns'"),
    ],
    ids=str,
)
def test_wrong_options_of_actors(options: dict[str, Any], error: type[Exception], text: str) -> None:
    class Actor:
        pass

    with pytest.raises(error, match=text):
        ftray.remote(**options)(Actor)
    with pytest.raises(error, match=text):
        ftray.remote(Actor).options(**options)


def test_wrong_options_of_methods() -> None:
    with pytest.raises(TypeError, match="unknown option 'num_cpus' of an actor method"):
        ftray.method(num_cpus=1)

    @ftray.remote
    class Actor:
        def hello(self) -> None: ...

    actor = Actor.remote()
    with pytest.raises(ValueError, match="num_returns"):
        actor.hello.options(num_returns=-1)


@pytest.mark.parametrize("target", [5, "text", None, object()], ids=lambda v: type(v).__name__)
def test_remote_on_what_cannot_be_remote(target: Any) -> None:
    with pytest.raises(TypeError, match="goes on a function or a class"):
        ftray.remote(target)


def test_remote_twice_and_with_positional_options() -> None:
    with pytest.raises(TypeError, match=r"is remote already; use \.options"):
        ftray.remote(add_remote())
    with pytest.raises(TypeError, match="options are keywords"):
        ftray.remote(lambda: 1, 2)  # type: ignore[call-overload]


def test_a_function_that_captures_too_much_says_so() -> None:
    data = bytes(70 << 20)

    @ftray.remote
    def large() -> int:
        return len(data)

    with pytest.raises(ValueError, match=r"large.*ftray\.put"):
        large.remote()


# --- workers that misbehave -----------------------------------------------------------------------------------------


def test_a_worker_that_exits_while_it_pickles_its_result() -> None:
    class Exits:
        def __reduce__(self) -> Any:
            os._exit(7)

    @ftray.remote(max_retries=0)
    def make() -> Any:
        return [bytes(200_000), Exits()]

    with pytest.raises(exceptions.WorkerCrashedError, match="exited with code 7"):
        ftray.get(make.remote(), timeout=20)


@pytest.mark.parametrize("delay_ms", [0, 1, 3, 10])
def test_a_worker_that_is_killed_amid_its_reply(delay_ms: int) -> None:
    @ftray.remote(max_retries=0, num_returns=60)
    def make() -> Any:
        threading.Timer(delay_ms / 1000, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return [bytes(90_000) for _ in range(60)]

    @ftray.remote(max_retries=0)
    def large() -> Any:
        threading.Timer(delay_ms / 1000, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return bytes(30_000_000)

    for refs, size in ((make.remote(), 90_000), ([large.remote()], 30_000_000)):
        try:
            values = ftray.get(refs, timeout=20)
        except exceptions.WorkerCrashedError as error:
            assert "SIGKILL" in str(error)  # noqa: PT017
        else:
            assert [len(value) for value in values] == [size] * len(refs)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_task_that_forks_a_child_which_exits() -> None:
    @ftray.remote
    def forks(code: int) -> Any:
        child = os.fork()
        if child == 0:
            os._exit(code)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), os.getpid()

    @ftray.remote
    def exits() -> Any:

        child = os.fork()
        if child == 0:
            sys.exit(3)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), os.getpid()

    code, pid = ftray.get(forks.remote(5), timeout=20)
    assert code == 5
    assert is_running(pid)
    code, pid = ftray.get(exits.remote(), timeout=20)
    assert code == 3
    assert is_running(pid)


def test_a_task_that_forks_a_child_which_returns() -> None:
    @ftray.remote
    def forks() -> Any:
        child = os.fork()
        if child == 0:
            return "from the child"
        _, status = os.waitpid(child, 0)
        return "from the parent", os.waitstatus_to_exitcode(status), os.getpid()

    text, code, pid = ftray.get(forks.remote(), timeout=20)
    assert text == "from the parent"
    assert code == 0
    assert is_running(pid)

    @ftray.remote
    def raises() -> Any:
        child = os.fork()
        if child == 0:
            raise ValueError("from the child")
        os.waitpid(child, 0)
        return "from the parent"

    assert ftray.get(raises.remote(), timeout=20) == "from the parent"


def test_a_forked_child_cannot_use_the_runtime() -> None:
    @ftray.remote
    def forks(box: Any) -> Any:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                ftray.get(box[0])
            except BaseException as error:
                os.write(write, f"{type(error).__name__}: {error}".encode())
            os._exit(0)
        os.close(write)
        os.waitpid(child, 0)
        with os.fdopen(read) as file:
            return file.read(), ftray.get(box[0])

    text, value = ftray.get(forks.remote([ftray.put("value")]), timeout=20)
    assert text.startswith("NotInitializedError")
    assert "os.fork" in text
    assert value == "value"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_task_that_uses_a_pool_of_processes() -> None:
    @ftray.remote
    def pooled() -> Any:
        import multiprocessing

        with multiprocessing.get_context("fork").Pool(2) as pool:
            return pool.map(abs, range(-5, 5))

    assert ftray.get(pooled.remote(), timeout=20) == [abs(i) for i in range(-5, 5)]


def test_a_task_that_closes_its_output_and_changes_directory() -> None:
    @ftray.remote
    def rude() -> str:

        os.chdir("/")
        sys.stdout.close()
        sys.stderr = None  # type: ignore[assignment]
        return "done"

    assert ftray.get(rude.remote(), timeout=20) == "done"


def test_a_task_that_handles_signals_its_own_way() -> None:
    @ftray.remote
    def handles() -> str:
        seen = []
        signal.signal(signal.SIGUSR1, lambda *_: seen.append("seen"))
        os.kill(os.getpid(), signal.SIGUSR1)
        return seen[0]

    assert ftray.get(handles.remote(), timeout=20) == "seen"


def test_a_task_that_leaves_threads_running() -> None:
    @ftray.remote
    def leaves() -> str:
        threading.Thread(target=threading.Event().wait, daemon=False).start()
        return "done"

    assert ftray.get([leaves.remote() for _ in range(3)], timeout=20) == ["done"] * 3
