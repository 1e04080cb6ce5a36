"""Runtime environments as data: what is refused and how, merging, names, variables."""

from __future__ import annotations

import functools
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftray.exceptions import RuntimeEnvSetupError
from ftray.runtime_env import (
    FIELDS,
    LATER,
    RuntimeEnv,
    RuntimeEnvConfig,
    decode,
    encode,
    expand,
    key_of,
    merge,
)

URI = f"gcs://ftray_pkg_{'a' * 32}.zip"
OTHER_URI = f"gcs://ftray_pkg_{'b' * 32}.zip"


def needs(value: int) -> None:
    """A hook that takes an argument."""


def may(value: int = 1) -> None:
    """A hook that can be called without one."""


async def coroutine() -> None:
    """A hook that nothing would await."""


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"env_var": {}}, TypeError, "unknown field 'env_var' of runtime_env; did you mean 'env_vars'"),
        ({"workingdir": "."}, TypeError, "did you mean 'working_dir'"),
        ({"nonsense": 1}, TypeError, "unknown field 'nonsense'.*Known are: env_vars, working_dir"),
        ({1: 2}, TypeError, "named by strings"),
        ({"env_vars": ["A=1"]}, TypeError, "env_vars must be a dict"),
        ({"env_vars": {"A": 1}}, TypeError, "'A' is 1, of type int"),
        ({"env_vars": {"A": None}}, TypeError, "'A' is None"),
        ({"env_vars": {1: "A"}}, TypeError, "the name 1 is not one"),
        ({"env_vars": {"": "x"}}, ValueError, "'' is no name"),
        ({"env_vars": {"A=B": "x"}}, ValueError, "'A=B' is no name"),
        ({"env_vars": {"A": "x\0y"}}, ValueError, "value of 'A' contains a NUL"),
        ({"env_vars": {"A": "x\ud800"}}, ValueError, r"'A' is 'x.ud800', which is no text that the system can carry"),
        ({"env_vars": {"\ud800": "x"}}, ValueError, "which is no text that the system can carry"),
        ({"working_dir": 1}, TypeError, "working_dir must be a path"),
        ({"working_dir": b"/x"}, TypeError, "working_dir must be a path"),
        ({"working_dir": ""}, ValueError, "working_dir: '' is no path"),
        ({"working_dir": "s3://bucket/x.zip"}, RuntimeEnvSetupError, "packages under s3:// are not available"),
        ({"working_dir": "gcs://other.zip"}, RuntimeEnvSetupError, "packages under gcs:// are not available"),
        ({"working_dir": URI.replace("zip", "whl")}, ValueError, "a wheel is no working directory"),
        ({"py_modules": "folder"}, TypeError, "py_modules must be a list"),
        ({"py_modules": [1]}, TypeError, "py_modules must be a path"),
        ({"excludes": "*.log"}, TypeError, "excludes must be a list"),
        ({"excludes": [1]}, TypeError, "1 is not one"),
        ({"worker_process_setup_hook": 1}, TypeError, "must be a function or 'module.function'"),
        ({"worker_process_setup_hook": "function"}, ValueError, "does not name a function as 'module.function'"),
        ({"worker_process_setup_hook": "a.b c"}, ValueError, "does not name a function"),
        ({"worker_process_setup_hook": needs}, TypeError, r"needs\(value.*\).* called without arguments.*'value'"),
        ({"worker_process_setup_hook": coroutine}, TypeError, "not a coroutine function"),
        ({"config": 1}, TypeError, "config of runtime_env must be a dict"),
        ({"config": {"eager_instal": True}}, TypeError, "unknown field 'eager_instal'.*did you mean 'eager_install'"),
        ({"config": {"setup_timeout_seconds": 0}}, ValueError, "1 or more, or -1, not 0"),
        ({"config": {"setup_timeout_seconds": 1.5}}, TypeError, "whole number, not 1.5"),
        ({"config": {"eager_install": "no"}}, TypeError, "eager_install must be a bool"),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_with_words(fields: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        RuntimeEnv.of(fields)


@pytest.mark.parametrize("field", sorted(LATER))
def test_fields_of_ray_that_are_not_there_are_named(field: str) -> None:
    with pytest.raises(RuntimeEnvSetupError, match=f"'{field}' is not available in this version") as caught:
        RuntimeEnv.of({field: ["x"]})
    assert "env_vars" in str(caught.value)


def test_it_is_no_environment_at_all() -> None:
    for value in (1, "x", ["env_vars"]):
        with pytest.raises(TypeError, match="must be a dict or a RuntimeEnv"):
            RuntimeEnv.of(value)  # type: ignore[arg-type]


def test_what_is_right_is_kept_and_copied() -> None:
    variables = {"A": "1"}
    env = RuntimeEnv(
        env_vars=variables, working_dir=Path("/x"), py_modules=["/y", os], excludes=["*.log"],
        worker_process_setup_hook=may, config=RuntimeEnvConfig(setup_timeout_seconds=-1),
    )  # fmt: skip
    variables["A"] = "2"
    assert env["env_vars"] == {"A": "1"} and env["working_dir"] == "/x" and env["py_modules"] == ["/y", os]
    assert env.setup_timeout_s == float("inf")
    assert set(env) == set(FIELDS)
    assert RuntimeEnv(working_dir=None, env_vars={}) == {"env_vars": {}}
    assert RuntimeEnv(worker_process_setup_hook=functools.partial(needs, 1)).says_something
    assert RuntimeEnv(worker_process_setup_hook=print).says_something  # written in C
    assert RuntimeEnv().setup_timeout_s == 600


def test_it_pickles() -> None:
    env = RuntimeEnv(env_vars={"A": "1"}, config={"setup_timeout_seconds": 5})
    again = pickle.loads(pickle.dumps(env))
    assert again == env and type(again) is RuntimeEnv and type(again["config"]) is RuntimeEnvConfig


def test_only_variables_are_merged() -> None:
    parent = RuntimeEnv(env_vars={"A": "a", "B": "b"}, py_modules=[URI], working_dir=URI)
    child = RuntimeEnv(env_vars={"B": "new", "C": "c"}, py_modules=[OTHER_URI])
    assert merge(parent, child) == {
        "env_vars": {"A": "a", "B": "new", "C": "c"}, "py_modules": [OTHER_URI], "working_dir": URI,
    }  # fmt: skip
    assert merge(parent, RuntimeEnv()) == parent
    assert merge(RuntimeEnv(), child) == child


def test_its_name_is_what_it_says() -> None:
    one = RuntimeEnv(env_vars={"A": "1", "B": "2"}, config={"setup_timeout_seconds": 5})
    two = RuntimeEnv(env_vars={"B": "2", "A": "1"})
    assert key_of(one) == key_of(two)
    assert encode(one) != encode(two)  # how it is set up travels too
    assert key_of(RuntimeEnv(env_vars={"A": "1", "B": "3"})) != key_of(two)
    assert encode(RuntimeEnv(env_vars={}, config={"eager_install": False}, excludes=["x"])) == ""
    assert json.loads(encode(two)) == {"env_vars": {"A": "1", "B": "2"}}


texts = st.text(st.characters(exclude_characters="\0"), max_size=5)
environments = st.builds(
    RuntimeEnv,
    env_vars=st.none() | st.dictionaries(st.sampled_from("ABCD"), texts, max_size=3),
    working_dir=st.sampled_from([None, URI, OTHER_URI]),
    py_modules=st.none() | st.lists(st.sampled_from([URI, OTHER_URI]), max_size=2),
    worker_process_setup_hook=st.sampled_from([None, "a.b"]),
    config=st.sampled_from([None, {"setup_timeout_seconds": 9}, {"eager_install": False}]),
)


@given(environments, environments, environments)
def test_packed_environments_travel_whole_and_nest(one: RuntimeEnv, two: RuntimeEnv, three: RuntimeEnv) -> None:
    if one.says_something:
        again = decode(encode(one))
        assert encode(again) == encode(one) and key_of(again) == key_of(one)
        assert {k: v for k, v in again.items() if k != "config"} == {k: v for k, v in one.items() if k != "config"}
    # A grandchild has the same environment whichever way it is put together.
    assert merge(merge(one, two), three) == merge(one, merge(two, three))


@pytest.mark.parametrize("text", ["[1]", "{", '{"pip":["x"]}', '{"env_vars":{"A":1}}', '"x"'])
def test_what_was_never_packed_is_refused(text: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeEnvSetupError)):
        decode(text)


def test_variables_of_the_node_are_put_in() -> None:
    base = {"HOME": "/root", "A": "old"}
    assert expand({"A": "${A}:new", "B": "${NONE}x", "C": "$HOME ${HOME} ${1}", "D": "${D}"}, base) == {
        "A": "old:new", "B": "x", "C": "$HOME /root ${1}", "D": "",
    }  # fmt: skip
