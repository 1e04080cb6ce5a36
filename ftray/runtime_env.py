"""Runtime environments: what a program may say of the environment of its tasks and actors, checked and normalised.

Role: pure. `RuntimeEnv` checks fields where they are written. `api/packaging.py` turns local paths into packages of the
cluster; what is left then is plain data, which travels as JSON (`encode`) and is named by a hash of it (`key_of`).

Rules:
- A child's environment is its parent's with its own fields over it; only `env_vars` are merged, variable by variable.
- `config` says how to set up, not what: two environments that differ in it alone are the same.
- `excludes` concerns packing, and is gone once that is done.

Rejected: one class for each field (they have nothing in common but being checked); accepting unknown fields (a typing
error would be found out by an import that fails on another machine).
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from ftray.exceptions import RuntimeEnvSetupError
from ftray.ids import content_hash

FIELDS = ("env_vars", "working_dir", "py_modules", "excludes", "worker_process_setup_hook", "config")
LATER = frozenset(
    (
        "pip", "uv", "conda", "py_executable", "container", "image_uri", "java_jars", "nsight", "rocprof_sys",
        "mpi", "plugins",
    )
)  # fmt: skip
"""Fields of Ray's that this version does not have: named, so that the error is not a riddle."""

THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
    "BLIS_NUM_THREADS",
)  # fmt: skip
"""What numerical libraries read, once, when they are imported."""

SETUP = "the set-up of its runtime environment"
"""What an actor was doing (`DeathCauseRecord.what`) whose environment could not be set up."""

SETUP_TIMEOUT_S = 600
"""The default of `config["setup_timeout_seconds"]`."""

PACKAGE_URI = re.compile(r"gcs://ftray_pkg_([0-9a-f]{32})\.(zip|whl)")
HOOK_URI = re.compile(r"gcs://ftray_hook_([0-9a-f]{32})")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class RuntimeEnvConfig(dict[str, Any]):
    """How an environment is set up: `setup_timeout_seconds` (600; -1 is without end), and `eager_install` (True), which
    for a job's environment begins the download at `init` rather than with the first task.

    Raises TypeError or ValueError.
    """

    def __init__(self, setup_timeout_seconds: int = SETUP_TIMEOUT_S, eager_install: bool = True) -> None:
        if isinstance(setup_timeout_seconds, bool) or not isinstance(setup_timeout_seconds, int):
            raise TypeError(f"setup_timeout_seconds must be a whole number, not {setup_timeout_seconds!r}")
        if setup_timeout_seconds < 1 and setup_timeout_seconds != -1:
            raise ValueError(f"setup_timeout_seconds must be 1 or more, or -1, not {setup_timeout_seconds}")
        if not isinstance(eager_install, bool):
            raise TypeError(f"eager_install must be a bool, not {eager_install!r}")
        super().__init__(setup_timeout_seconds=setup_timeout_seconds, eager_install=eager_install)

    def __reduce__(self) -> tuple[Any, ...]:
        return RuntimeEnvConfig, (self["setup_timeout_seconds"], self["eager_install"])


class RuntimeEnv(dict[str, Any]):
    """An environment for `init(runtime_env=...)` or the option `runtime_env`; a plain dict does as well.

    - `env_vars`: environment variables, strings by strings; `${NAME}` in a value stands for what the node has.
    - `working_dir`: a folder or a .zip file; tasks start in a copy of it, and can import from it.
    - `py_modules`: packages to import: folders, .py, .zip and .whl files, or imported modules.
    - `excludes`: patterns of `.gitignore` for files that are left out of folders.
    - `worker_process_setup_hook`: a function without arguments, or its name as "module.function", which each worker
      calls before anything else of the program.
    - `config`: `RuntimeEnvConfig`, or a dict.

    Fields that are None are left out. Raises TypeError for an unknown field or a wrong type, ValueError for a wrong
    value, RuntimeEnvSetupError for a field of Ray's that this version has not.
    """

    def __init__(
        self,
        *,
        env_vars: Mapping[str, str] | None = None,
        working_dir: Any = None,
        py_modules: Sequence[Any] | None = None,
        excludes: Sequence[str] | None = None,
        worker_process_setup_hook: Any = None,
        config: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        _refuse(others)
        given = {
            "env_vars": None if env_vars is None else _variables(env_vars),
            "working_dir": None if working_dir is None else _path("working_dir", working_dir),
            "py_modules": None if py_modules is None else _modules(py_modules),
            "excludes": None if excludes is None else _patterns(excludes),
            "worker_process_setup_hook": _hook(worker_process_setup_hook),
            "config": None if config is None else _config(config),
        }
        super().__init__({name: value for name, value in given.items() if value is not None})

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> RuntimeEnv:
        """A checked copy of what a program has given. Raises as the constructor does."""
        if not isinstance(value, Mapping):
            raise TypeError(f"runtime_env must be a dict or a RuntimeEnv, not {value!r}")
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"the fields of a runtime_env are named by strings, not {name!r}")
        return cls(**value)

    @property
    def says_something(self) -> bool:
        """Whether a worker has to do anything for it."""
        return any(self.get(name) for name in FIELDS if name not in ("config", "excludes"))

    @property
    def setup_timeout_s(self) -> float:
        """How long the set-up may take, in seconds."""
        seconds = self.get("config", {}).get("setup_timeout_seconds", SETUP_TIMEOUT_S)
        return float("inf") if seconds == -1 else float(seconds)

    @property
    def uris(self) -> list[str]:
        """The packages that it names."""
        named = [*self.get("py_modules", ()), self.get("working_dir", "")]
        return [each for each in named if isinstance(each, str) and PACKAGE_URI.fullmatch(each)]

    def __reduce__(self) -> tuple[Any, ...]:
        return RuntimeEnv.of, (dict(self),)


# --- what travels -----------------------------------------------------------------------------------------------------


def merge(parent: Mapping[str, Any], child: Mapping[str, Any]) -> RuntimeEnv:
    """The environment of a child that says `child`, under a parent that runs in `parent`."""
    merged = {**parent, **child}
    if "env_vars" in parent and "env_vars" in child:
        merged["env_vars"] = {**parent["env_vars"], **child["env_vars"]}
    return RuntimeEnv.of(merged)


def encode(environment: RuntimeEnv) -> str:
    """A packed environment as it travels: JSON, the same for equal environments; empty for one that says nothing."""
    if not environment.says_something:
        return ""
    data = {name: value for name, value in environment.items() if name != "excludes"}
    if data.get("config") == RuntimeEnvConfig():
        del data["config"]
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def decode(text: str) -> RuntimeEnv:
    """What `encode` has made. Raises ValueError or TypeError for what it can't have made."""
    return RuntimeEnv.of(json.loads(text)) if text else RuntimeEnv()


def key_of(environment: RuntimeEnv) -> str:
    """The name of a packed environment: a hash of what it says, `config` left out."""
    said = {name: value for name, value in environment.items() if name != "config"}
    return content_hash(encode(RuntimeEnv.of(said)).encode()).hex()


def expand(variables: Mapping[str, str], base: Mapping[str, str]) -> dict[str, str]:
    """The variables with each `${NAME}` replaced by its value in `base`; by nothing where that has none."""
    return {
        name: _VARIABLE.sub(lambda match: base.get(match[1], ""), value) if "${" in value else value
        for name, value in variables.items()
    }


# --- the checks -------------------------------------------------------------------------------------------------------


def _refuse(others: Mapping[str, Any]) -> None:
    for name in others:
        if name in LATER:
            raise RuntimeEnvSetupError(
                f"runtime_env field {name!r} is not available in this version of ftray: install what it would install "
                f"where the nodes run. Available are: {', '.join(FIELDS)}"
            )
        near = get_close_matches(name, FIELDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise TypeError(f"unknown field {name!r} of runtime_env{hint} Known are: {', '.join(FIELDS)}")


def _variables(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise TypeError(f"env_vars must be a dict of strings by strings, not {value!r}")
    for name, text in value.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError(
                f"env_vars must be strings by strings: {name!r} is {text!r}, of type {type(text).__name__}"
                if isinstance(name, str)
                else f"env_vars must be strings by strings: the name {name!r} is not one"
            )
        if not name or "=" in name or "\0" in name:
            raise ValueError(f"env_vars: {name!r} is no name for an environment variable")
        if "\0" in text:
            raise ValueError(f"env_vars: the value of {name!r} contains a NUL, which the system can't carry")
        try:
            (name + text).encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise ValueError(f"env_vars: {name!r} is {text!r}, which is no text that the system can carry") from None
    return dict(value)


def _path(field: str, value: Any) -> str:
    if hasattr(value, "__fspath__"):
        value = value.__fspath__()
    if not isinstance(value, str):
        raise TypeError(f"{field} must be a path as a string, not {value!r}")
    if not value or "\0" in value:
        raise ValueError(f"{field}: {value!r} is no path; '.' is the current folder")
    scheme, separator, _ = value.partition("://")
    if separator:
        match = PACKAGE_URI.fullmatch(value)
        if match is None:
            raise RuntimeEnvSetupError(
                f"{field}: packages under {scheme}:// are not available in this version of ftray: give a local folder "
                "or file"
            )
        if field == "working_dir" and match[2] != "zip":
            raise ValueError("working_dir: a wheel is no working directory; put it into py_modules")
    return value


def _modules(value: Any) -> list[Any]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise TypeError(f"py_modules must be a list of paths and modules, not {value!r}")
    return [each if isinstance(each, ModuleType) else _path("py_modules", each) for each in value]


def _patterns(value: Any) -> list[str]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise TypeError(f"excludes must be a list of patterns, not {value!r}")
    for pattern in value:
        if not isinstance(pattern, str):
            raise TypeError(f"excludes must be a list of patterns as strings: {pattern!r} is not one")
    return list(value)


def _hook(value: Any) -> Any:
    what = "worker_process_setup_hook"
    if value is None:
        return None
    if isinstance(value, str):
        parts = value.split(".")
        if not HOOK_URI.fullmatch(value) and (len(parts) < 2 or not all(part.isidentifier() for part in parts)):
            raise ValueError(f"{what}: {value!r} does not name a function as 'module.function'")
        return value
    if not callable(value):
        raise TypeError(f"{what} must be a function or 'module.function', not {value!r}")
    if inspect.iscoroutinefunction(value):
        raise TypeError(f"{what} must be a plain function, not a coroutine function: nothing would await it")
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return value  # written in C: it says so itself when it is called
    try:
        signature.bind()
    except TypeError as error:
        name = getattr(value, "__qualname__", None) or repr(value)
        raise TypeError(f"{what}: {name}{signature} is called without arguments ({error})") from None
    return value


def _config(value: Any) -> RuntimeEnvConfig:
    if not isinstance(value, Mapping):
        raise TypeError(f"config of runtime_env must be a dict or a RuntimeEnvConfig, not {value!r}")
    known = ("setup_timeout_seconds", "eager_install")
    for name in value:
        if name not in known:
            near = get_close_matches(str(name), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise TypeError(f"unknown field {name!r} of runtime_env's config{hint} Known are: {', '.join(known)}")
    return RuntimeEnvConfig(**value)
