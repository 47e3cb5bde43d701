"""A griffe extension: the docstrings of this project as Markdown that reads well.

Facts in aligned columns become a table, the paragraph before them (the equation) a code block, and so do the examples.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

FACTS = ("shapes", "strides", "dtypes", "units", "aliasing", "rounding", "edges", "errors", "determinism", "source")
FACT = re.compile(rf"({'|'.join(FACTS)}) +(\S.*)")


class Dialect(griffe.Extension):
    """Rewrites each docstring after it was read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """The docstring, paragraph by paragraph."""
    paragraphs = re.split(r"\n\s*\n", text.strip())
    has_facts = [bool(FACT.match(paragraph)) for paragraph in paragraphs]
    written = []
    for index, paragraph in enumerate(paragraphs):
        if has_facts[index]:
            written.append(table(paragraph))
        elif paragraph.startswith(">>>"):
            written.append(f"```pycon\n{paragraph}\n```")
        elif index > 0 and " = " in paragraph and any(has_facts[index + 1 : index + 2]):
            written.append(f"```text\n{paragraph}\n```")
        else:
            written.append(paragraph)
    return "\n\n".join(written)


def table(paragraph: str) -> str:
    """Facts as the rows of a table; an indented line continues the row before it."""
    rows: list[list[str]] = []
    for line in paragraph.splitlines():
        fact = FACT.match(line)
        if fact:
            rows.append([fact[1], fact[2]])
        else:
            rows[-1][1] += f" {line.strip()}"
    cells = "\n".join(f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in rows)
    return f"| | |\n|---|---|\n{cells}"
