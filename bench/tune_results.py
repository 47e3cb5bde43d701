"""The file of winners: `choose` reads ``winners``, people read ``provenance``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..cli_common import UsageError
from . import files

VERSION = 1
SAME = ("GPU", "compute capability", "triton", "matmul-grad")  # what other winners may come of

Row = dict[str, Any]


class Table:
    """{"version": 1, "provenance": {facts, "measured": {key: times}}, "winners": {key: the config's fields}}."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole: dict[str, Any] = {"version": VERSION, "provenance": {"measured": {}}, "winners": {}}
        if path.exists():
            self._whole = read(path)

    @property
    def keys(self) -> list[str]:
        """The problems that are measured: they are not measured again."""
        return list(self._whole["winners"])

    def begin(self, facts: dict[str, str]) -> None:
        """On this GPU, with these versions; UsageError where the file's winners were found on others."""
        before = self._whole["provenance"]
        for name in SAME:
            if self.keys and before.get(name) != facts.get(name):
                found_on = f"winners of {name} {before.get(name)}, and this is {facts.get(name)}"
                raise UsageError(f"tune: {self.path} holds {found_on}: remove it, or name another")
        self._whole["provenance"] = before | facts

    def put(self, row: Row) -> None:
        """A problem's winner, on disk when this returns."""
        self._whole["winners"][row["key"]] = row["winner"]
        self._whole["provenance"]["measured"][row["key"]] = {k: v for k, v in row.items() if k not in ("key", "winner")}
        files.write(self.path, json.dumps(self._whole, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        if whole["version"] != VERSION:
            raise UsageError(f"tune: {path} is of version {whole['version']}, this reads {VERSION}")
        for key, fields in whole["winners"].items():
            dict(fields)
            whole["provenance"]["measured"][key]
        return whole
    except OSError as reason:
        raise UsageError(f"tune: {path}: {reason.strerror}") from reason
    except (ValueError, KeyError, TypeError) as reason:
        raise UsageError(f"tune: {path} is not a table of winners") from reason
