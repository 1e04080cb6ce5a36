"""Patterns of `.gitignore`: which files of a folder are left out of its package.

Role: pure. A `Rules` is a list of patterns that belong to one folder; a path is asked of all rules that lie above it,
and the last pattern that matches decides. Whoever walks the tree does not go into a folder that is left out, which is
why nothing in such a folder can be taken back by a later pattern, as in git.

Rejected: `fnmatch` (its `*` crosses folders, and it knows neither anchors nor `**`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable


class Rules:
    """Patterns, in order, relative to the folder `base` (its path with `/` at the end, or "" for the root)."""

    __slots__ = ("base", "patterns")

    def __init__(self, base: str, lines: Iterable[str]) -> None:
        self.base = base
        self.patterns = [parsed for line in lines if (parsed := parse(line)) is not None]

    def decide(self, path: str, is_dir: bool) -> bool | None:
        """Whether the path (with `/`, relative to the root) is left out; None if no pattern says anything of it."""
        if not path.startswith(self.base):
            return None
        inner = path[len(self.base) :]
        for regex, taken, dir_only in reversed(self.patterns):
            if (is_dir or not dir_only) and regex.fullmatch(inner):
                return not taken
        return None


def left_out(rules: Iterable[Rules], path: str, is_dir: bool) -> bool:
    """Whether the rules, the most important last, leave this path out."""
    verdict = False
    for each in rules:
        said = each.decide(path, is_dir)
        if said is not None:
            verdict = said
    return verdict


def parse(line: str) -> tuple[re.Pattern[str], bool, bool] | None:
    """One line as (regular expression for the relative path, whether it takes back, whether it is for folders alone).

    None for an empty line, a comment, and a pattern that can match nothing.
    """
    line = line.rstrip("\r\n")
    stripped = line.rstrip(" ")
    if stripped.endswith("\\") and len(stripped) < len(line):
        stripped += " "  # an escaped space at the end is meant
    line = stripped
    if not line or line.startswith("#"):
        return None
    taken = line.startswith("!")
    if taken:
        line = line[1:]
    dir_only = line.endswith("/")
    if dir_only:
        line = line[:-1]
    if not line or line == "/":
        return None
    anchored = "/" in line
    line = line.removeprefix("/")
    body = _translate(line)
    if body is None:
        return None
    prefix = "" if anchored else "(?:.*/)?"
    return re.compile(prefix + body, re.DOTALL), taken, dir_only


def _translate(pattern: str) -> str | None:
    parts = pattern.split("/")
    out = ""
    last = len(parts) - 1
    for index, part in enumerate(parts):
        if len(part) > 1 and not part.strip("*"):
            if index == last:
                out += ".+" if index else ".*"
            else:
                out += "(?:.*/)?"
            continue
        translated = _translate_part(part)
        if translated is None:
            return None
        out += translated + ("/" if index < last else "")
    return out


def _translate_part(part: str) -> str | None:
    out, at, end = "", 0, len(part)
    while at < end:
        char = part[at]
        at += 1
        if char == "*":
            while at < end and part[at] == "*":
                at += 1
            out += "[^/]*"
        elif char == "?":
            out += "[^/]"
        elif char == "\\":
            if at == end:
                return None  # nothing is escaped: git takes it for invalid
            out += re.escape(part[at])
            at += 1
        elif char == "[":
            found = _translate_class(part, at)
            if found is None:
                return None
            text, at = found
            out += text
        else:
            out += re.escape(char)
    return out


_CLASSES = {
    "alpha": "a-zA-Z", "digit": "0-9", "alnum": "a-zA-Z0-9", "upper": "A-Z", "lower": "a-z", "space": r"\s",
    "xdigit": "0-9A-Fa-f", "punct": r"!-/:-@\[-`{-~", "blank": r" \t", "cntrl": r"\x00-\x1f\x7f", "print": r"\x20-\x7e",
    "graph": r"\x21-\x7e",
}  # fmt: skip


def _translate_class(part: str, at: int) -> tuple[str, int] | None:
    """A bracket expression that begins before `at`; None if it has no end."""
    negated = at < len(part) and part[at] in "!^"
    at += negated
    inner = ""
    first = True
    while True:
        if at >= len(part):
            return None
        char = part[at]
        if char == "]" and not first:
            break
        first = False
        if char == "[" and part.startswith("[:", at):
            close = part.find(":]", at)
            name = part[at + 2 : close] if close > 0 else ""
            if name not in _CLASSES:
                return None
            inner += _CLASSES[name]
            at = close + 2
            continue
        at += 1
        if char == "\\":
            if at >= len(part):
                return None
            char = part[at]
            at += 1
        low = char
        if at + 1 < len(part) and part[at] == "-" and part[at + 1] != "]":
            at += 1
            high = part[at]
            at += 1
            if high == "\\":
                if at >= len(part):
                    return None
                high = part[at]
                at += 1
            if low <= high:
                inner += f"{re.escape(low)}-{re.escape(high)}"
        else:
            inner += re.escape(low)
    at += 1
    if not inner:
        return ("[^/]" if negated else "(?!)"), at
    return f"(?!/)[{'^' if negated else ''}{inner}]", at
