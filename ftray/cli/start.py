"""`ftray start`: a head node, or a node that joins.

Role: shell. Turns options into the node's spec, checks beforehand what can be checked (so that the error is a good
one), starts the node, and says how to use and stop it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import click

from ftray.cli.options import Amount, ByteSize, JsonObject, addresses, json_option, session_root_option
from ftray.cli.output import FAILED, Failure, finish, report
from ftray.raylet.session import default_root, find_sessions

DEFAULT_PORT = 6380
DEFAULT_HOST = "127.0.0.1"
HEADS_JOURNAL = "heads.journal"
"""As in `gcs/raft_host.py`, which would be slow to import."""


@click.command("start")
@click.option("--head", is_flag=True, help="Start a new cluster, with this node as its head.")
@click.option("--address", metavar="HOST:PORT[,..]", help="Join the cluster whose head (or heads) listen there.")
@click.option(
    "--heads",
    metavar="HOST:PORT[,..]",
    help="With --head: all heads of the cluster, the same list for each; --host and --port say which one this is.",
)
@click.option(
    "--gcs-dir",
    type=click.Path(file_okay=False),
    help="With --head: where the cluster's state is kept. A head that starts there again goes on where it was.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help=f"Port of the head; 0 takes any free one.  [default: {DEFAULT_PORT}]",
)
@click.option(
    "--host",
    help="Address this node listens on. The default is reachable from this machine alone; 0.0.0.0 from everywhere.  "
    f"[default: {DEFAULT_HOST}, or what --heads says]",
)
@click.option("--num-cpus", type=Amount(), help="CPUs to offer.  [default: all of this machine]")
@click.option("--num-gpus", type=Amount(), help="GPUs to offer.  [default: those found]")
@click.option("--memory", type=ByteSize(), help="Memory to offer to tasks that ask for some, such as 8GB.")
@click.option("--resources", type=JsonObject(numbers=True), metavar="JSON", help="More resources: '{\"disk\": 2}'.")
@click.option("--labels", type=JsonObject(numbers=False), metavar="JSON", help="Labels: '{\"zone\": \"b\"}'.")
@click.option("--object-store-memory", type=ByteSize(), help="Size of the object store, such as 2GB or 512MiB.")
@click.option("--block", is_flag=True, help="Stay in the foreground; Ctrl-C stops the node.")
@session_root_option
@json_option
def command(**options: Any) -> None:
    """Start a node on this machine: the head of a new cluster, or one that joins a cluster.

    Returns when the node is ready, and leaves it running in the background until `ftray stop`. A cluster is guarded by
    a token. The head makes one, unless FTRAY_TOKEN is set, and writes it to a file that is yours alone; every other
    machine gets it in FTRAY_TOKEN. On the head's own machine it is found without.

    A cluster with several heads (three, or five) outlives the loss of one (two). Each is started with the same list
    and the same FTRAY_TOKEN, and is ready when a majority runs. A head for a cluster that runs already is started with
    --head --address, and then added with `ftray heads add`.

    \b
    Examples:
      ftray start --head                                   # on this machine, for this machine
      ftray start --head --host 0.0.0.0 --num-cpus 8       # for other machines to join
      FTRAY_TOKEN=... ftray start --address 10.0.0.5:6380  # on another machine
      ftray start --head --port 0 --json                   # for scripts
      ftray start --head --heads a:6380,b:6380,c:6380 --host a --gcs-dir /var/lib/ftray   # on machine a

    \b
    Exit codes:
      0  the node is ready (with --block: it was stopped)
      1  it did not start; the message says why and what to do
      2  the command line is wrong
      3  no head answers at --address
    """
    spec = _spec(options)
    as_json = options["as_json"]
    if options["block"]:
        _block(spec, as_json)
    finish(as_json, lambda: _start(spec)[1], lambda answer: _show(answer, blocking=False))


def _spec(options: dict[str, Any]) -> dict[str, Any]:
    head, address, heads = options["head"], options["address"], options["heads"]
    for name in ("address", "heads", "gcs_dir", "host"):  # as from a variable of the shell that is not set
        if options[name] is not None and not options[name].strip():
            raise click.BadParameter("it is empty", param_hint=f"--{name.replace('_', '-')}")
    if not head and not address:
        raise click.UsageError("say either --head (a new cluster) or --address HOST:PORT (join one)")
    if not head and options["port"] is not None:
        raise click.UsageError("--port is the head's: a node that joins takes any free one")
    if not head and (heads or options["gcs_dir"]):
        raise click.UsageError("--heads and --gcs-dir are for heads: add --head")
    if address and heads:
        raise click.UsageError("say either --heads (a new cluster) or --address (a new head for one that runs)")
    if head and address and not options["port"]:
        raise click.UsageError(
            "say either --head (a new cluster) or --address (join one), not both; or, for a new head of the cluster at "
            "--address, with --host and --port where the other heads reach it"
        )
    address = _addresses(address, "--address")
    listed = _addresses(heads, "--heads")
    return {
        **_head_spec(options, listed, address),
        "head": head,
        "address": "" if head else ",".join(address),
        "num_cpus": options["num_cpus"],
        "num_gpus": options["num_gpus"],
        "memory": options["memory"],
        "resources": options["resources"] or {},
        "labels": options["labels"] or {},
        "object_store_bytes": options["object_store_memory"],
        "session_root": os.path.abspath(options["session_root"] or default_root()),
        "lifeline": bool(options["block"]),
    }


def _addresses(text: str | None, option: str) -> list[str]:
    try:
        return addresses(text) if text else []
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=option) from None


def _head_spec(options: dict[str, Any], heads: list[str], address: list[str]) -> dict[str, Any]:
    """Where this node listens, and which of several heads it is."""
    host, port = options["host"], options["port"]
    if not options["head"]:
        return {"host": host or DEFAULT_HOST, "port": 0}
    directory = os.path.abspath(options["gcs_dir"]) if options["gcs_dir"] else None
    # A head that goes on with its directory needs no list.
    again = directory is not None and os.path.exists(os.path.join(directory, HEADS_JOURNAL))
    if not heads and not address and not again:
        return {
            "host": host or DEFAULT_HOST,
            "port": DEFAULT_PORT if port is None else port,
            **({"gcs_dir": directory} if directory is not None else {}),
        }
    if heads:
        mine = _which_one(heads, host, port)
    else:
        mine = f"tcp:{host or DEFAULT_HOST}:{DEFAULT_PORT if port is None else port}"
    own_host, _, own_port = mine.removeprefix("tcp:").rpartition(":")
    if directory is None:
        root = os.path.abspath(options["session_root"] or default_root())
        directory = os.path.join(root, f"gcs-{own_host}-{own_port}")
    return {
        "host": host or own_host,
        "port": int(own_port),
        "heads": heads or address,
        "head_endpoint": mine,
        "join": bool(address),
        "gcs_dir": directory,
    }


def _which_one(heads: list[str], host: str | None, port: int | None) -> str:
    """The one of the heads that is started here."""
    if len(set(heads)) != len(heads):
        raise click.BadParameter("the same head is named twice", param_hint="--heads")
    found = [
        head
        for head in heads
        if host in (None, "0.0.0.0", "::", head.removeprefix("tcp:").rpartition(":")[0])
        and port in (None, int(head.rpartition(":")[2]))
    ]
    if len(found) != 1:
        named = ", ".join(head.removeprefix("tcp:") for head in heads)
        if host is None and port is None:
            what = f"several heads are listed ({named})"
        else:
            what = f"--host and --port name {'more than one' if found else 'none'} of the heads ({named})"
        raise click.UsageError(f"{what}: say with --host, --port or both which of them this one is")
    return found[0]


def _start(spec: dict[str, Any]) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    from ftray.cli import launch

    if spec["head"]:
        if spec["port"]:
            launch.check_port_free(spec["host"], spec["port"])
        if spec.get("gcs_dir"):
            spec["token"] = _token_for(spec).hex()
        new = bool(spec.get("join")) and not os.path.exists(os.path.join(spec["gcs_dir"], HEADS_JOURNAL))
        if new:
            # One that has been a member goes on with what it knows, whoever answers at this moment.
            launch.check_heads(spec["heads"], bytes.fromhex(spec["token"]))
    else:
        new = False
        spec["token"] = _token_for(spec).hex()
        launch.check_heads(spec["address"].split(","), bytes.fromhex(spec["token"]))
    process, ready = launch.spawn(spec)
    if not spec["lifeline"]:
        launch.let_go(process)
    heads = [endpoint.removeprefix("tcp:") for endpoint in ready["gcs_endpoints"] if endpoint.startswith("tcp:")]
    mine = spec.get("head_endpoint", "").removeprefix("tcp:")
    answer = {
        "head": spec["head"],
        "new_cluster": spec["head"] and not spec.get("gcs_dir"),
        "waits_as": mine if spec.get("join") and (new or mine not in heads) else "",
        "node_id": ready["node_id"],
        "pid": ready["pid"],
        "cluster_id": ready["cluster_id"],
        "address": ",".join(heads),
        "session_dir": ready["session_dir"],
        "session_root": spec["session_root"],
        "token_file": os.path.join(ready["session_dir"], "token"),
        "raylet_endpoint": ready["raylet_endpoint"],
        "gcs_endpoints": ready["gcs_endpoints"],
    }
    return process, answer


def _token_for(spec: dict[str, Any]) -> bytes:
    """The token of the cluster to join: FTRAY_TOKEN, or that of a node of it that runs here."""
    text = os.environ.get("FTRAY_TOKEN", "").strip()
    if not text:
        wanted = set(spec["address"].split(",")) | set(spec.get("heads", ()))
        for session in find_sessions(spec["session_root"]):
            if wanted & set(session.get("gcs_endpoints", ())):
                text = session["token"]
                break
        else:
            from ftray.cli.launch import TOKEN_REMEDY

            if spec["head"]:
                raise Failure(
                    "a head that keeps its state, or that is one of several, needs the cluster's token",
                    "set FTRAY_TOKEN to the same for all heads, always. To make one: "
                    "python -c 'import secrets; print(secrets.token_hex(32))'",
                )
            raise Failure("joining a cluster needs its token, and no node of it runs on this machine", TOKEN_REMEDY)
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise Failure("FTRAY_TOKEN is not a token: it must be the hexadecimal text of a token file") from None


def _show(answer: dict[str, Any], blocking: bool) -> None:
    kind = "head node of a new cluster" if answer["new_cluster"] else "head node" if answer["head"] else "node"
    click.secho(f"The {kind} is ready: {answer['node_id'][:12]}, process {answer['pid']}.", bold=True)
    lines = [("Use it from Python", 'ftray.init(address="auto")')]
    if answer["address"]:
        lines.append(("Join another node", f"FTRAY_TOKEN=$(cat TOKEN_FILE) ftray start --address {answer['address']}"))
    if answer["waits_as"]:
        at = answer["waits_as"]
        lines.insert(0, ("It has no vote yet", f"ftray heads add {at}, or ftray heads replace OLD {at}"))
    root = answer["session_root"]
    if root != default_root():
        lines.insert(0, ("First", f"export FTRAY_SESSION_ROOT={root}"))
    lines += [
        ("The token file", f"{answer['token_file']} (copy it to machines that join, by a safe way)"),
        ("Look at it", "ftray status"),
        ("Logs", os.path.join(answer["session_dir"], "logs")),
        ("Stop it", "Ctrl-C" if blocking else "ftray stop"),
    ]
    for what, how in lines:
        click.echo(f"  {what + ':':<20} {how}")


def _block(spec: dict[str, Any], as_json: bool) -> None:
    """Stays until the node ends, or the user ends it."""
    import json

    try:
        process, answer = _start(spec)
    except Failure as failure:
        report(as_json, failure)
        sys.exit(failure.exit_code)
    assert process.stdin is not None
    try:
        if as_json:
            click.echo(json.dumps({"ok": True, **answer}))
        else:
            _show(answer, blocking=True)
        code = process.wait()
    except KeyboardInterrupt:
        process.stdin.close()  # the lifeline
        code = process.wait()
    if code:
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        click.secho(f"Error: the node ended {how}; see {answer['session_dir']}/logs/raylet.log", err=True, fg="red")
    sys.exit(FAILED if code else 0)
