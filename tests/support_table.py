"""The table of supported versions in README.md, written from test runs.

    python -m pytest --junit-xml=REPORT; python tests/support_table.py REPORT

Run by the interpreter that ran the tests: its versions and machine identify the entry in docs/support.json. An entry
holds the counts of each test file, and a report replaces those of its own files, so a suite may be run in parts.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "support.json"
README = ROOT / "README.md"

PLATFORM = ("torch", "triton", "python", "system", "isa")
OUTCOMES = ("passed", "failed", "skipped")
HEADER = ("torch", "triton", "Python", "system", "instructions", *OUTCOMES, "test files", "date")

Entry = dict[str, Any]


def this_platform() -> dict[str, str]:
    """What identifies an entry."""
    from matmul_grad.kernels.cpu import host

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "none"

    system = f"{platform.system()} {platform.machine()}"
    values = (version("torch"), version("triton"), platform.python_version(), system, host.cpu().isa)
    return dict(zip(PLATFORM, values, strict=True))


def outcomes(report: Path) -> Iterator[tuple[str, str, str]]:
    """(test file, name, outcome) of each test in a JUnit report. What xfails counts as skipped, as pytest writes it."""
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '')}.{case.get('name', '')}"
        file = re.match(r"(\w+\.)*?test_\w+", name)
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        yield file[0] if file else name, name, outcome


def add(entries: list[Entry], where: dict[str, str], date: str, report: Path) -> list[Entry]:
    """``entries`` with a report in place of what was known of its files, and of files that have gone."""
    same = [entry for entry in entries if all(entry[key] == where[key] for key in PLATFORM)]
    files = {file: counts for file, counts in same[0]["files"].items() if is_there(file)} if same else {}
    found: dict[str, Entry] = {}
    for file, name, outcome in outcomes(report):
        counts = found.setdefault(file, {**dict.fromkeys(OUTCOMES, 0), "failures": []})
        counts[outcome] += 1
        if outcome == "failed":
            counts["failures"].append(name)
    entry = {**where, "date": date, "files": dict(sorted((files | found).items()))}
    return sorted([*(other for other in entries if other not in same), entry], key=order)


def is_there(file: str) -> bool:
    return (ROOT / file.replace(".", "/")).with_suffix(".py").is_file()


def order(entry: Entry) -> tuple[Any, ...]:
    def numbers(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version.split("+")[0])]

    return numbers(entry["torch"]), numbers(entry["python"]), entry["system"], entry["isa"]


def table(entries: list[Entry]) -> str:
    """Markdown, one row an entry."""
    rows = [HEADER, ("---",) * 5 + ("--:",) * 4 + ("---",)]
    for entry in entries:
        counts = [sum(file[outcome] for file in entry["files"].values()) for outcome in OUTCOMES]
        rows.append((*(entry[key] for key in PLATFORM), *map(str, counts), str(len(entry["files"])), entry["date"]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_table(page: str, entries: list[Entry]) -> str:
    """``page`` with the table between the markers."""
    from matmul_grad.markdown import between

    return between(page, "support", table(entries))


def load() -> list[Entry]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Add test reports to the table of supported versions in README.md.")
    parser.add_argument("reports", nargs="*", type=Path, metavar="REPORT", help="written by pytest --junit-xml")
    options = parser.parse_args(arguments)
    entries = load()
    for report in options.reports:
        entries = add(entries, this_platform(), datetime.date.today().isoformat(), report)
    RESULTS.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8"), entries), encoding="utf-8")


if __name__ == "__main__":
    main()
