"""Settings of the runtime, with their units in their names.

Role: one frozen struct that the node process gets at start and hands to every client in `Registered`, so that all
processes of a session agree. Each value can be set by an environment variable `FTRAY_<NAME>` (upper case) read once,
by the process that starts the node.

Rejected: settings read from the environment wherever they are needed (two processes would disagree).
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

PROTOCOL_VERSION = 1

MEMORY_LIMIT_BYTES_MIN = 256 << 20
_WITHOUT_END = ("task_max_retries", "task_oom_retries")
"""Settings of which -1 means without end."""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Settings that all processes of a session share."""

    inline_bytes_max: int = 100 * 1024
    """Values up to this size travel inside messages; larger ones go to the arena."""
    lease_linger_ms: int = 100
    """How long an owner keeps an idle lease that nobody else asks for."""
    lease_want_max: int = 256
    """The most leases one owner asks for in one scheduling class."""
    pipeline_depth_max: int = 256
    """The most tasks in flight to one worker."""
    pipeline_work_ms: float = 4.0
    """Tasks in flight to one worker stand for about this much work, by measured task time."""
    recall_after_ms: int = 20
    """Tasks queued behind one that has run this long are recalled and given to another worker."""
    block_notice_ms: int = 2
    """A worker that has waited this long in `get` lends its CPU to others."""
    handshake_timeout_ms: int = 10_000
    """A peer that has not authenticated by then is cut off."""
    frame_bytes_max: int = 1 << 30
    """The largest header or payload of one frame."""
    output_backlog_bytes_max: int = 64 << 20
    """A peer that reads so slowly that more than this waits for it is cut off."""
    infeasible_timeout_ms: int = 2_000
    """A task that no node of the cluster could ever run fails after this time (a node may be about to join)."""
    log_file_bytes_max: int = 16 << 20
    """A worker's output file is rotated at this size."""
    log_files_max: int = 4
    """Rotated output files kept for each stream."""
    log_tail_lines: int = 20
    """The last lines of a worker's stderr that are kept for the error about its death."""
    idle_workers_extra: int = 1
    """Workers kept warm beyond the number of CPUs, so that a killed one is replaced at once."""
    idle_worker_kill_ms: int = 10_000
    """Idle workers beyond the number kept warm end after this time."""
    heartbeat_period_ms: int = 100
    heartbeat_timeout_ms: int = 1_000
    task_max_retries: int = 3
    task_oom_retries: int = 10
    """How often a task is repeated whose worker the memory monitor has ended; -1 is without end. Not counted against
    `max_retries`, but a task that may not be retried at all is not."""
    task_oom_pause_ms: int = 200
    """The pause before the first such repetition; it doubles with each, up to 30 s."""
    memory_monitor_period_ms: int = 250
    """How often a node looks at its memory; 0 turns the memory monitor off."""
    memory_threshold_percent: float = 95.0
    """Over this share of the memory's limit the monitor ends a worker."""
    memory_limit_bytes: int = 0
    """A limit for the private memory of all workers of a node together; 0 leaves the machine's or control group's."""
    record_call_sites: int = 0
    """1: remember where each object was made, for `ftray memory` (costs 1 us a call)."""
    task_events_max: int = 10_000
    """What each worker remembers of the tasks it has run, for `ftray timeline`; 0 is nothing."""
    generator_ahead_max: int = 1_000
    """Items of a generator task that may wait unread, unless the task says otherwise."""
    generator_ahead_bytes_max: int = 16 << 20
    """A generator waits while its unread items have this many bytes, however few they are."""
    job_wait_ms: int = 10_000
    """A program that joins while the GCS has no leader waits this long for one, and no more than 15 s."""
    wait_warning_ms: int = 60_000
    """A `get` that has waited this long says in a warning what it waits for."""
    value_bytes_max: int = 64 << 20
    """The largest value in the GCS key-value table (exported functions included)."""
    package_bytes_max: int = 100 << 20
    """The largest folder or file of a runtime environment, unpacked."""
    environment_bytes_max: int = 10 << 30
    """Packages of runtime environments that nothing uses are removed from a node when all take more than this."""
    spill_threshold_percent: float = 80.0
    """Above this share of the object store, objects that nobody looks into are written to disk ahead of need."""
    spill_bytes_max: int = 0
    """The most bytes of spilled objects on a node's disk; 0 is as many as there is room for."""
    store_room_wait_ms: int = 10_000
    """How long `put` and results wait for room in the object store while none can be made."""


def config_from(environ: Mapping[str, str], overrides: Mapping[str, object] | None = None) -> Config:
    """Builds the settings from `FTRAY_*` variables and explicit overrides.

    Raises ValueError naming the variable or option whose value is not a number of the right kind.
    """
    values: dict[str, object] = {}
    for field in msgspec.structs.fields(Config):
        raw = environ.get("FTRAY_" + field.name.upper())
        if raw is not None:
            try:
                values[field.name] = float(raw) if field.type is float else int(raw)
            except ValueError:
                raise ValueError(f"FTRAY_{field.name.upper()}={raw!r} is not a number") from None
    known = {field.name for field in msgspec.structs.fields(Config)}
    for name, value in (overrides or {}).items():
        if name not in known:
            raise ValueError(f"unknown setting {name!r} in _system_config; known are: {', '.join(sorted(known))}")
        values[name] = value
    try:
        config = msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        raise ValueError(f"a setting has the wrong type: {error}") from None
    for field in msgspec.structs.fields(Config):
        value = getattr(config, field.name)
        lowest = -1 if field.name in _WITHOUT_END else 0
        if not value >= lowest:  # not a number is none, either
            raise ValueError(f"{field.name} must be at least {lowest}, not {value}")
    if config.memory_limit_bytes and config.memory_limit_bytes < MEMORY_LIMIT_BYTES_MIN:
        raise ValueError(
            f"memory_limit_bytes is {config.memory_limit_bytes:,}: with less than {MEMORY_LIMIT_BYTES_MIN:,} (256 MiB) "
            "the workers themselves would not fit; 0 means the machine's memory"
        )
    if config.spill_threshold_percent > 100.0:
        raise ValueError(f"spill_threshold_percent must be from 0 to 100, not {config.spill_threshold_percent:g}")
    if not 1.0 <= config.memory_threshold_percent <= 100.0:
        raise ValueError(f"memory_threshold_percent must be from 1 to 100, not {config.memory_threshold_percent:g}")
    return config
