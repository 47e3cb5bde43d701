"""Measure, keep the rows in bench/results/, and write README.md's table from them.

    taskset -c 0 python -m bench.readme                   from the root of a checkout, on a machine at rest
    python -m bench.readme --from bench/results/X.json    the table again, from rows that are there

No figure of README.md is typed: all that stands between its markers is this program's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from matmul_grad import machine, rivals, strict, testing, timing

from . import saved

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
KIND = "readme"
CALL = 8  # the size whose time is all overhead
SIZES = (64, 128, 256, 512, 1024, 2048)
TRIES = 60  # of a comparison, for a moment when nothing else runs
PRODUCTS = (*testing.PRODUCTS, rivals.STEP)
DTYPES = ("f32", "f64")

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, help="a file of bench/results: do not measure")
    parser.add_argument("--readme", type=Path, default=saved.ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=saved.RESULTS)
    parser.add_argument("--sizes", type=sizes, default=SIZES, help="default: " + ",".join(map(str, SIZES)))
    parser.add_argument("--seconds", type=float, default=0.5, help="a comparison; default: 0.5")
    parser.add_argument("--busy", action="store_true", help="write figures of a machine that is not at rest too")
    command = parser.parse_args(arguments)
    if command.source:
        result = json.loads(command.source.read_text(encoding="utf-8"))
    else:
        result = measure((CALL, *command.sizes), command.seconds)
        if not command.busy and (busy := disturbed(result)):
            raise SystemExit(f"nothing written: other work ran here during {busy[0]}, in all {len(busy)} comparisons")
        print(f"rows: {saved.save(result, command.results, KIND)}")
    rewrite(command.readme, block(result))
    print(f"table: {command.readme}")


def sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def measure(cubes: Iterable[int], seconds: float) -> dict[str, Any]:
    """Every product at every size, one thread, this package and torch in turns."""
    with timing.threads(1), strict():
        rows = [row for dtype, n in itertools.product(DTYPES, cubes) for row in compare(n, dtype, seconds)]
        stamp = {"date": datetime.now(timezone.utc).date().isoformat(), **machine.describe()}
    return {"stamp": stamp, "protocol": timing.PROTOCOL, "rows": rows}


def compare(n: int, dtype: str, seconds: float) -> list[Row]:
    """The rows of one size: right first, then timed."""
    rivals.assert_right(rivals.RIVALS[rivals.OURS], n, n, n, testing.DTYPES[dtype])
    operands = rivals.draw(n, n, n, testing.DTYPES[dtype])
    rows = []
    for product in PRODUCTS:
        work = {name: rivals.work(mm, product, operands) for name, mm in rivals.RIVALS.items()}
        for _ in range(TRIES):
            share = timing.share_of_core()
            times = timing.interleaved(work, seconds)
            if (had := share()) >= timing.AT_REST:
                break
        row: Row = {"product": product, "dtype": dtype, "m": n, "n": n, "k": n}
        row["flops"], row["rounds"] = rivals.flops(n, n, n, product), len(times[rivals.OURS])
        row["share of core"] = round(had, 3)
        row["seconds"] = {name: timing.quartiles(rounds)._asdict() for name, rounds in times.items()}
        row["ratio"] = timing.ratio(times[rivals.THEIRS], times[rivals.OURS])
        rows.append(row)
        print(f"{product}-{dtype}-{n}: {row['ratio']:.2f}, with {had:.0%} of a core", flush=True)
    return rows


def disturbed(result: dict[str, Any]) -> list[str]:
    """The comparisons during which this process did not have a core to itself."""
    rows = [row for row in result["rows"] if row["share of core"] < timing.AT_REST]
    return [f"{row['product']}-{row['dtype']}-{row['n']}" for row in rows]


def block(result: dict[str, Any]) -> str:
    """What stands between the markers."""
    stamp, rows = result["stamp"], result["rows"]
    found = {(row["product"], row["dtype"], row["n"]): row for row in rows}
    lines = [
        f"Measured {stamp['date']} on {stamp['CPU']} ({stamp['instruction set'].split()[0]}), one thread; "
        f"{stamp['versions']}. Times of torch over times of this package, so above 1 it is faster; square "
        f"matrices; {result['protocol']}.",
        "",
        "| dtype | n | GFLOP/s, torch | GFLOP/s, ours | forward | dgrad | wgrad | whole step |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        cubes = sorted({row["n"] for row in rows if row["dtype"] == dtype} - {CALL})
        for n in cubes:
            rates = [f"{rate(found['forward', dtype, n], name):.0f}" for name in rivals.RIVALS]
            ratios = [f"{found[product, dtype, n]['ratio']:.2f}" for product in PRODUCTS]
            lines.append(f"| {dtype} | {n} | {' | '.join(rates + ratios)} |")
        means = [statistics.geometric_mean(found[product, dtype, n]["ratio"] for n in cubes) for product in PRODUCTS]
        lines.append(f"| {dtype} | geometric mean | | | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    return "\n".join([*lines, "", calls(found)])


def rate(row: Row, name: str) -> float:
    return row["flops"] / row["seconds"][name]["median"] / 1e9


def calls(found: dict[tuple[str, str, int], Row]) -> str:
    """What a call costs where there is next to nothing to multiply."""
    texts = []
    for product, words in (("forward", "the product"), (rivals.STEP, "the whole step")):
        seconds = found[product, "f32", CALL]["seconds"]
        ours, theirs = (seconds[name]["median"] * 1e6 for name in (rivals.OURS, rivals.THEIRS))
        texts.append(f"{words} takes {ours:.1f} µs (torch: {theirs:.1f} µs)")
    return f"At {CALL}×{CALL} in f32, where the time is all overhead, {', '.join(texts)}."


def rewrite(readme: Path, text: str) -> None:
    """Put ``text`` between the markers, which must be there once."""
    page = readme.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise SystemExit(f"{readme} must hold {BEGIN} and {END} once each")
    before, rest = page.split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
