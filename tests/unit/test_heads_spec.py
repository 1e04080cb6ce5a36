"""What a node's specification may say of several heads, and of where the GCS keeps its journal."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ftray.raylet.spec import NodeSpec, SpecError, parse_spec

A, B = "tcp:127.0.0.1:1", "tcp:127.0.0.1:2"


def parse(**fields: Any) -> NodeSpec:
    return parse_spec(json.dumps(fields).encode())


def test_heads_that_fit_together() -> None:
    spec = parse(heads=[A, B], head_endpoint=A, gcs_dir="/x")
    assert (spec.heads, spec.head_endpoint, spec.join, spec.gcs_dir) == ([A, B], A, False, "/x")
    assert parse(heads=[A], head_endpoint=B, join=True).join  # it is not one of them yet
    assert parse(head_endpoint=A).heads == []  # its directory says which there are
    assert parse().head_endpoint is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"heads": [A]}, "which one it is"),
        ({"join": True}, "which one it is"),
        ({"heads": [A], "head_endpoint": B}, "not among the heads"),
        ({"heads": [A, "127.0.0.1:2"], "head_endpoint": A}, "tcp:host:port"),
        ({"heads": [A, "unix:/x"], "head_endpoint": A}, "tcp:host:port"),
        ({"head_endpoint": ""}, "host:port"),
        ({"head": False, "address": "h:1", "head_endpoint": A}, "no head"),
        ({"heads": A, "head_endpoint": A}, "is wrong"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        parse(**fields)
