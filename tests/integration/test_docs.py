"""The pages for users are true: every Python snippet in README.md and docs/ runs, and prints what the page says.

The ```python blocks of a page are one program, in order; a ```text block after one is what it prints, where `...`
stands for anything. The tables of commands and settings name all there are, with their defaults.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import click
import msgspec
import pytest
from integration.harness import ROOT, Driver

from ftray.cli import COMMANDS, main
from ftray.config import Config

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
PYTHON_PAGES = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Snippet:
    """A Python block, the line it begins in, and what it should print (None: nothing is said)."""

    code: str
    line: int
    prints: str | None = field(default=None)


def snippets(text: str) -> list[Snippet]:
    """The Python blocks of a page."""
    found: list[Snippet] = []
    previous = ""
    for match in FENCE.finditer(text):
        if match[1] == "python":
            found.append(Snippet(match[2], text.count("\n", 0, match.start(2))))
        elif match[1] == "text" and previous == "python":
            found[-1].prints = match[2]
        previous = match[1]
    return found


def program(page: Path, parts: list[Snippet]) -> str:
    """Runs the blocks one after another, with a mark on both streams before each."""
    return f"""
parts = {[(each.code, each.line) for each in parts]!r}
names = {{"__name__": "__main__"}}
for number, (code, line) in enumerate(parts):
    print(f"<<{{number}}>>", flush=True)
    exec(compile("\\n" * line + code, {str(page)!r}, "exec"), names)
print("<<end>>", flush=True)
"""


def matches(printed: str, said: str) -> bool:
    """Whether the text is as said; `...` is anything, and worker output may come at any time."""
    own = "".join(line for line in printed.splitlines(keepends=True) if not re.match(r"\(.* pid=\d+\) ", line))
    pattern = ".*?".join(re.escape(part) for part in said.rstrip("\n").split("..."))
    return re.fullmatch(pattern, own.rstrip("\n"), re.DOTALL) is not None


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.name)
def test_snippets_run_and_print_what_the_page_says(page: Path) -> None:
    parts = snippets(page.read_text(encoding="utf-8"))
    with Driver(program(page, parts)) as driver:
        assert driver.finish(50) == 0, driver.dump()
        outputs = re.split(r"^<<\w+>>\n", driver.out, flags=re.MULTILINE)[1:]
        assert len(outputs) == len(parts) + 1, driver.dump()
        for part, printed in zip(parts, outputs):
            if part.prints is not None:
                where = f"{page.name}:{part.line}"
                assert matches(printed, part.prints), f"{where}\n--- said\n{part.prints}--- is\n{printed}"
        driver.check_clean()


def test_differences_are_seen() -> None:
    (part,) = snippets("# Page\n```python\nprint(1)\n```\nprints\n```text\n1\n...3\n```\n```text\nnot of it\n```\n")
    assert (part.code, part.line, part.prints) == ("print(1)\n", 2, "1\n...3\n")
    assert matches("1\n2\n3\n", "1\n...3\n")
    assert matches("1\n(f pid=7) hello\n3\n", "1\n3\n")
    assert not matches("1\n2\n", "1\n...3\n")
    assert not matches("1\n3\n4\n", "1\n3\n")


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_page_of_errors_is_up_to_date() -> None:
    script = str(ROOT / ".ci" / "errors_page.py")
    made = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    current = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert made.stdout == current, "run: python .ci/errors_page.py > docs/errors.md"


def test_the_page_of_commands_names_every_command_and_option() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    context = click.Context(main)
    for name in COMMANDS:
        command = main.get_command(context, name)
        assert command is not None
        section = re.search(rf"^## `ftray {name}.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        assert section, f"no section about ftray {name}"
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                for option in parameter.opts:
                    if option.startswith("--"):
                        assert f"`{option}" in section[0], f"{option} of ftray {name}"


def test_the_page_of_settings_names_every_setting_with_its_default() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for setting in msgspec.structs.fields(Config):
        row = re.search(rf"^\| `{setting.name}` \| ([^|]*) \|", text, re.MULTILINE)
        assert row, f"no row about {setting.name}"
        assert row[1].replace(",", "") == str(setting.default), f"the default of {setting.name}"
