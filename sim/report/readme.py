"""Marked blocks of a Markdown file: what stands between `<!-- report:NAME -->` and `<!-- /report -->` is a report's."""

import difflib
import re
from collections.abc import Mapping

BEGIN = re.compile(r"^<!-- report:([\w.-]+) -->$")
END = "<!-- /report -->"


def split_blocks(text: str) -> list[tuple[str | None, str]]:
    """(None, text outside) and (NAME, text inside) in order; the markers belong to the text outside.

    Raises ValueError naming the line for a block that is not closed, not opened, or opened twice.
    """
    parts: list[tuple[str | None, str]] = []
    name, lines, seen = None, [], set()
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        found = BEGIN.match(line.rstrip("\n"))
        if found and name is not None:
            raise ValueError(f"line {number} begins block {found[1]!r} inside block {name!r}; close it with {END}.")
        if found:
            if found[1] in seen:
                raise ValueError(f"line {number} begins block {found[1]!r} a second time.")
            seen.add(found[1])
            parts.append((None, "".join([*lines, line])))
            name, lines = found[1], []
        elif line.rstrip("\n") == END:
            if name is None:
                raise ValueError(f"line {number} ends a block that was not begun.")
            parts.append((name, "".join(lines)))
            name, lines = None, [line]
        else:
            lines.append(line)
    if name is not None:
        raise ValueError(f"block {name!r} is not closed; write {END} on a line of its own.")
    return [*parts, (None, "".join(lines))]


def rewritten(text: str, contents: Mapping[str, str]) -> str:
    """`text` with the contents of its blocks; blocks without contents stay as they are."""
    parts = split_blocks(text)
    return "".join(contents[name].rstrip("\n") + "\n" if name in contents else part for name, part in parts)


def disagreements(text: str, contents: Mapping[str, str]) -> dict[str, str]:
    """Name -> difference, as `diff -u` writes it, of every block that does not hold its contents."""
    found = {}
    for name, part in split_blocks(text):
        if name in contents and part.rstrip("\n") != contents[name].rstrip("\n"):
            before, after = part.splitlines(), contents[name].splitlines()
            found[name] = "\n".join(difflib.unified_diff(before, after, "file", "run folders", lineterm="", n=1))
    return found
