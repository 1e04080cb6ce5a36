"""Print the page about errors, docs/errors.md, from the docstrings of ftray/exceptions.py.

The docstrings are what messages say, so the page can't say anything else. Errors that belong to what is not there yet
are listed apart, as a table here says, so that programs may name them already.

Usage: python .ci/errors_page.py > docs/errors.md
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ftray import exceptions  # noqa: E402

NOT_YET = frozenset(
    (
        "NodeDiedError", "TaskPlacementGroupRemoved", "ActorPlacementGroupRemoved", "ObjectFetchTimedOutError",
        "ReferenceCountingAssertionError", "ObjectReconstructionFailedError",
        "ObjectReconstructionFailedMaxAttemptsExceededError", "ObjectReconstructionFailedLineageEvictedError",
    )
)  # fmt: skip
"""Defined, and not raised by this version."""

HEAD = """\
# Errors

<!-- Made by .ci/errors_page.py from the docstrings in ftray/exceptions.py. -->

All are in `ftray.exceptions`, and all but `ActorExit` are instances of `FtrayError`. Each one survives pickling with
its attributes. What a task raises arrives at `ftray.get` as an instance of its own type and of `TaskError`:

```python
import ftray

ftray.init(num_cpus=2)


@ftray.remote
def parse(text):
    return int(text)


try:
    ftray.get(parse.remote("seven"))
except ValueError as error:
    print(error.function_name, "failed:", error.cause)
    print(isinstance(error, ftray.exceptions.TaskError))
```
```text
parse failed: invalid literal for int() with base 10: 'seven'
True
```

What a death caused says who died, where, how, and of what, with the last lines that the process wrote to stderr:

```python
import os
import signal


@ftray.remote(max_retries=0)
def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


try:
    ftray.get(crash.remote())
except ftray.exceptions.WorkerCrashedError as error:
    print(error)
    print(error.death.signal_name())
```
```text
The worker ... (pid ...) on node ... was killed by SIGSEGV while running crash...
SIGSEGV
```

## All of them
"""


def classes() -> list[type[BaseException]]:
    """The public error classes, in the order of their definition; aliases left out."""
    return [
        each
        for name, each in vars(exceptions).items()
        if isinstance(each, type)
        and issubclass(each, BaseException)
        and each.__module__ == exceptions.__name__
        and each.__name__ == name
        and not name.startswith("_")
    ]


def aliases() -> list[tuple[str, str]]:
    """(alias, name of the class)."""
    return [
        (name, each.__name__)
        for name, each in vars(exceptions).items()
        if isinstance(each, type) and issubclass(each, BaseException) and each.__name__ != name
    ]


def bases(cls: type[BaseException]) -> str:
    """The public base classes, as the page names them."""
    names = []
    for base in cls.__bases__:
        while base.__name__.startswith("_"):
            base = base.__bases__[0]
        names.append(f"`{base.__name__}`")
    return ", ".join(names)


def rows(chosen: list[type[BaseException]]) -> str:
    lines = ["| error | is a | when, and what to do |", "| --- | --- | --- |"]
    for cls in chosen:
        first, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")
        more = [" ".join(part.split()) for part in rest.split("\n\n") if part.startswith("Attribute")]
        lines.append(f"| `{cls.__name__}` | {bases(cls)} | {' '.join([' '.join(first.split()), *more])} |")
    return "\n".join(lines)


def page() -> str:
    found = classes()
    known = {cls.__name__ for cls in found}
    if not known >= NOT_YET:
        raise SystemExit(f"no such errors: {sorted(NOT_YET - known)}")
    return "\n".join(
        [
            HEAD,
            rows([cls for cls in found if cls.__name__ not in NOT_YET]),
            "",
            "## Not raised by this version",
            "They belong to what is not there yet (see the status in the [README](../README.md#status)); programs may",
            "name them already.",
            "",
            rows([cls for cls in found if cls.__name__ in NOT_YET]),
            "",
            "## Names that Ray's users know",
            "| name | is |",
            "| --- | --- |",
            *(f"| `{alias}` | `{name}` |" for alias, name in aliases()),
            "",
        ]
    )


if __name__ == "__main__":
    sys.stdout.write(page())
