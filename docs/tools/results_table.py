"""The first numbers of README.md, its short table and what follows on thin products, from the files of bench/results.

python docs/tools/results_table.py    writes all three anew
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matmul_grad.bench import results, stats
from matmul_grad.bench.results import Result
from matmul_grad.bench.shapes import CPU_TARGETS, CPU_THIN, Shape
from matmul_grad.bench.stats import NONE, Row
from matmul_grad.bench.workloads import CAST, OURS, TORCH
from matmul_grad.markdown import between

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
DTYPES = {"f32": "float32", "f64": "float64", "bf16": "bfloat16", "f16": "float16"}
ISAS = {"avx512": "AVX-512", "avx2": "AVX2"}
THREADS = (1, 2)
RATIOS = "*-cpu-ratio-*.json"
HEAD = (
    "dtype", "instruction set", "against", "1 thread: mean", "worst", "2 threads: mean", "worst",
    "memory beside the result", "machine", "date",
)  # fmt: skip
MIB = 1 << 20
TELLING = 0.9  # the share of rows that have to tell the memory of a call


def newest(pattern: str, dtype: str) -> dict[str, Result]:
    """Of each instruction set the newest run that is complete for a dtype."""
    found: dict[str, Result] = {}
    for path in RESULTS.glob(pattern):
        result = results.load(path)
        isa = result["stamp"]["instruction set"].split()[0]
        if is_complete(result, dtype) and (isa not in found or moment(result) > moment(found[isa])):
            found[isa] = result
    return found


def is_complete(result: Result, dtype: str) -> bool:
    """Whether a run has all that it measures of a dtype: one of some dtypes that came to its end has."""
    if result["whole"]:
        return True
    settings = result.get("settings", {})
    asked = dtype in settings.get("dtypes", ()) and {"products", "thin"} <= set(settings.get("rows", ()))
    return asked and settings.get("threads") == list(THREADS) and len(result["rows"]) == result["planned"]


def moment(result: Result) -> tuple[str, str]:
    return results.moment(result["stamp"])


def group(result: Result, shapes: Sequence[Shape]) -> list[Row]:
    """Products of these shapes; not steps, nor what a call of the operator costs."""
    rows = [row for row in result["rows"] if (row["m"], row["n"], row["k"]) in shapes]
    return [row for row in rows if row["product"] == "forward" and not row.get("mode")]


def products(result: Result, dtype: str, threads: int, shapes: Sequence[Shape] = CPU_TARGETS) -> list[Row]:
    """Products that were timed beside torch; without others asked for, of squares and of layers of transformers."""
    rows = [row for row in group(result, shapes) if (row["dtype"], row["threads"]) == (dtype, threads)]
    return [row for row in rows if stats.ratio(row, CAST) or stats.ratio(row)]


def baseline(rows: Sequence[Row]) -> str:
    """What the ratios are to: torch, or a cast to float32 and back where that was timed and is faster."""
    timed = [row for row in rows if stats.ratio(row, CAST)]
    both = [row for row in timed if stats.ratio(row)]
    if both and geometric_mean(both, TORCH) <= geometric_mean(both, CAST):
        return TORCH
    return CAST if timed else TORCH


def ratio(row: Row, other: str) -> float:
    """The time of another way over the time of this package."""
    found = stats.ratio(row, other) or stats.ratio(row) or stats.ratio(row, CAST)
    assert found is not None
    return found.median


def geometric_mean(rows: Sequence[Row], other: str) -> float:
    return statistics.geometric_mean(ratio(row, other) for row in rows)


def against(rows: Sequence[Row]) -> str:
    if not rows:
        return NONE
    return "cast to float32, `mm`, cast back" if baseline(rows) == CAST else "`torch.mm`"


def mean(rows: Sequence[Row]) -> str:
    return f"{geometric_mean(rows, baseline(rows)):.2f}" if rows else NONE


def worst(rows: Sequence[Row]) -> str:
    if not rows:
        return NONE
    value, row = min(((ratio(row, baseline(rows)), row) for row in rows), key=lambda pair: pair[0])
    return f"{value:.2f} at {row['layout']} {row['m']}×{row['n']}×{row['k']}"


def memory(result: Result | None, dtype: str) -> str:
    """The most that a call takes beside its result, and the most that torch, or casting, takes.

    A few rows may not tell, where a thread used memory that had been freed before: the others are taken. In older
    files that is the rule, and nothing is shown.
    """
    rows = group(result, CPU_TARGETS) if result else []
    rows = [row for row in rows if row["dtype"] == dtype and "peak bytes" in row]
    casts = any(CAST in row["peak bytes"] for row in rows) and baseline([row for row in rows if "ratio" in row]) == CAST
    other, known = (CAST, "casting") if casts else (TORCH, "torch")
    rows = [row for row in rows if {OURS, other} <= set(row["peak bytes"])]
    found = [(stats.extra_bytes(row, OURS), stats.extra_bytes(row, other)) for row in rows]
    told = [(ours, theirs) for ours, theirs in found if ours is not None and theirs is not None]
    if not told or len(told) < TELLING * len(rows):
        return NONE
    ours, theirs = (max(taken) / MIB for taken in zip(*told, strict=True))
    return f"{ours:.1f} MiB ({known} {theirs:.1f})"


def line(dtype: str, isa: str, ratios: Result | None, bench: Result | None) -> list[str]:
    """One row of the table."""
    measured = [products(ratios, dtype, threads) if ratios else [] for threads in THREADS]
    cells = [DTYPES[dtype], ISAS[isa], against(measured[0])]
    for rows in measured:
        cells += [mean(rows), worst(rows)]
    held = memory(ratios, dtype)
    used = [ratios]
    if held == NONE and (held := memory(bench, dtype)) != NONE:
        used.append(bench)
    stamps = [result["stamp"] for result in used if result]
    machines, dates = ({stamp[key]: None for stamp in stamps} for key in ("CPU", "date"))
    return [*cells, held, ", ".join(machines) or "not measured yet", ", ".join(dates) or NONE]


def table() -> str:
    """Markdown, a row for each dtype and instruction set."""
    ratios, benches = ({dtype: newest(kind, dtype) for dtype in DTYPES} for kind in (RATIOS, "*/bench.json"))
    rows = [line(dtype, isa, ratios[dtype].get(isa), benches[dtype].get(isa)) for isa in ISAS for dtype in DTYPES]
    return "\n".join(f"| {' | '.join(row)} |" for row in (HEAD, ("---",) * len(HEAD), *rows))


def thin() -> str:
    """What the table leaves out: one column, one row by a square, short k; nothing where none was measured."""
    parts: dict[tuple[str, str], list[str]] = {}
    for dtype, name in DTYPES.items():
        for isa, result in newest(RATIOS, dtype).items():
            if rows := products(result, dtype, 1, CPU_THIN):
                text = f"{name} {mean(rows)} (worst {worst(rows)}, against {against(rows)})"
                parts.setdefault((isa, result["stamp"]["date"]), []).append(text)
    found = [
        f"On {ISAS[isa]}, one thread, {date}, their means are: {'; '.join(texts)}."
        for (isa, date), texts in sorted(parts.items(), key=lambda item: list(ISAS).index(item[0][0]))
    ]
    first = "Other thin products (one column, one row by a square of 4096, k of 1 or 2) are not in the table."
    return textwrap.fill(" ".join([first, *found]), 100, break_on_hyphens=False) if found else ""


def headline() -> str:
    """What one gains, in two numbers."""
    ratios = newest(RATIOS, "f32")
    isa = next(isa for isa in ISAS if isa in ratios)
    stamp, (one, two) = ratios[isa]["stamp"], (products(ratios[isa], "f32", threads) for threads in THREADS)
    torch = next(part for part in stamp["versions"].split(", ") if part.startswith("torch "))
    return (
        f"On CPU, float32 products run **{mean(one)} times** as fast as `torch.mm` on one thread and\n"
        f"**{mean(two)} times** as fast on two (geometric means of {len(one)} shapes and layouts, {torch},\n"
        f"{stamp['CPU']} with {ISAS[isa]}, {stamp['date']})."
    )


def written(page: str) -> str:
    """``page`` with its three parts as the committed results have them."""
    for name, text in (("headline", headline()), ("results", table()), ("thin", thin())):
        page = between(page, name, text)
    return page


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
