"""The pictures of a run, by matplotlib: each a function of the result, or None where there is nothing to draw.

Colours are Okabe and Ito's, which the colour-blind can tell apart; each backend has a marker of its own too.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from . import stats
from .backends import IMPLEMENTATIONS
from .inputs import IN_L1
from .shapes import CUBES, SMALL
from .workloads import LAYOUTS, STEP, TORCH

TITLES = {
    "throughput": "Throughput of square products",
    "ratios": "torch's time over ours, shape by layout and pass",
    "roofline": "Roofline of this machine",
    "passes": "Forward, gradients and the whole step against torch",
    "overhead": "Time of a call where there is little to multiply",
}
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vP*X"
STYLE = {
    "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "legend.frameon": False, "svg.hashsalt": "matmul_grad", "svg.fonttype": "path", "axes.axisbelow": True,
}  # fmt: skip
WIDTH, DPI = 7.2, 150
FOLDER = "pictures"  # beside the rows
HALF = 0.5  # a ratio whose colour is the strongest, as its inverse has

Result = dict[str, Any]
Key = tuple[str, int, str]  # device, threads, dtype


def draw(result: Result) -> dict[str, Figure]:
    """Every picture that there is something for, by name."""
    made = {}
    with matplotlib.rc_context(STYLE):
        for name, picture in PICTURES.items():
            figure = picture(result)
            if figure is not None:
                made[name] = figure
    return made


def saved(figure: Figure, kind: str) -> bytes:
    """As a file; the same bytes for the same figure."""
    with matplotlib.rc_context(STYLE), io.BytesIO() as file:
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(file, format=kind, dpi=DPI, metadata=metadata)
        return file.getvalue()


def look(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Colour and marker, the same in every picture."""
    index = names.index(name) % len(COLOURS)
    return {"color": COLOURS[index], "marker": MARKERS[index], "label": name}


def panels(count: int, height: float, title: str) -> tuple[Figure, list[Axes]]:
    """One below the other, as a phone shows them."""
    figure = Figure(figsize=(WIDTH, height * count + 0.7), layout="constrained")
    figure.suptitle(title, fontweight="bold")
    return figure, list(figure.subplots(count, 1, squeeze=False)[:, 0])


def by_dtype(rows: Sequence[stats.Row]) -> dict[Key, list[stats.Row]]:
    """Plain products only: batches and modes have no place among the shapes."""
    found: dict[Key, list[stats.Row]] = {}
    for row in rows:
        if row.get("batch", 1) == 1 and not row.get("mode"):
            found.setdefault((row["device"], row["threads"], stats.group_of(row).dtype), []).append(row)
    return found


def head(key: Key) -> str:
    device, threads, dtype = key
    where = f"{threads} thread{'s' * (threads > 1)}" if device == "cpu" else device
    return f"{dtype}, {where}"


def unit(rows: Sequence[stats.Row]) -> tuple[float, str]:
    """GFLOP/s, or TFLOP/s where there are thousands of them."""
    most = max((stats.rate(row, name) or 0 for row in rows for name in row.get("seconds", {})), default=0)
    return (1e3, "TFLOP/s") if most > 5000 else (1.0, "GFLOP/s")


def throughput(result: Result) -> Figure | None:
    """Rate against size, with the spread of the rounds, beneath the measured peak."""
    cubes = [r for r in result["rows"] if r["m"] == r["n"] == r["k"] and r["product"] == "forward"]
    cubes = [r for r in cubes if r["layout"] == "NN" and r.get("seconds") and (r["m"],) * 3 in CUBES + SMALL]
    keys = {key: rows for key, rows in by_dtype(cubes).items() if len(rows) > 1}
    if not keys:
        return None
    names, (scale, per) = stats.backends(cubes), unit(cubes)
    figure, axes = panels(len(keys), 3.0, TITLES["throughput"])
    for axis, (key, rows) in zip(axes, keys.items(), strict=True):
        rows = sorted(rows, key=lambda row: row["n"])
        for name in names[::-1]:  # ours on top
            mine = [row for row in rows if name in row["seconds"]]
            times = [row[f"{stats.clock(row)}seconds"][name] for row in mine]
            sizes = [row["n"] for row in mine]
            low, middle, high = (
                [row["flops"] / t[part] / 1e9 / scale for row, t in zip(mine, times, strict=True)]
                for part in ("high", "median", "low")
            )
            axis.plot(sizes, middle, markersize=5, **look(name, names))
            axis.fill_between(sizes, low, high, color=look(name, names)["color"], alpha=0.2, linewidth=0)
        peak = ceiling(rows)
        if peak:
            axis.axhline(peak / scale, color="#444444", linestyle="--", label="measured\npeak")
        axis.set(title=head(key), ylabel=per, ylim=(0, None))
        log_axis(axis, sorted({row["n"] for row in rows}))
        legend(axis, names)
    axes[-1].set_xlabel("n, of n × n matrices; shaded: between the quartiles")
    return figure


def ceiling(rows: Sequence[stats.Row]) -> float | None:
    """The highest of the peaks, in GFLOP/s: whatever else ran, some workload met the machine at rest."""
    return max((float(row["peak"]["median"]) for row in rows if "peak" in row), default=None)


def legend(axis: Axes, names: Sequence[str]) -> None:
    """Beside the axis, in the order of ``names`` and then of drawing."""
    handles, labels = axis.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: names.index(labels[i]) if labels[i] in names else len(names))
    axis.legend([handles[i] for i in order], [labels[i] for i in order], loc="center left", bbox_to_anchor=(1.0, 0.5))


def plain(value: float, _: int | None = None) -> str:
    """100 and not 10²."""
    return f"{value:g}"


def log_ticks(axis: Axis) -> None:
    """Powers of ten, and what lies between them where there are few; none of the small ones has a label."""
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 50 else (1,)))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())


def log_axis(axis: Axes, sizes: Sequence[int]) -> None:
    """A label at each size that has room for one."""
    kept: list[int] = []
    for size in sizes:
        if not kept or size >= 1.4 * kept[-1]:
            kept.append(size)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(kept))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(plain))


COLUMNS = [f"forward\n{layout}" for layout in LAYOUTS] + ["dgrad", "wgrad", "step"]


def ratios(result: Result) -> Figure | None:
    """A square for each comparison with torch: its ratio in figures, and as a colour about 1."""
    rows = [row for row in result["rows"] if stats.ratio(row) is not None]
    keys = by_dtype(rows)
    if not keys:
        return None
    tables = {key: ratio_table(some) for key, some in keys.items()}
    lines = [len(shapes) for shapes, _ in tables.values()]
    figure = Figure(figsize=(WIDTH, 0.3 * sum(lines) + 1.1 * len(lines) + 1.4), layout="constrained")
    figure.suptitle(TITLES["ratios"], fontweight="bold")
    axes = figure.subplots(len(lines), 1, squeeze=False, gridspec_kw={"height_ratios": lines})[:, 0]
    image = None
    for axis, (key, (shapes, values)) in zip(axes, tables.items(), strict=True):
        shown = np.clip(np.log2(values), np.log2(HALF), -np.log2(HALF))
        image = axis.imshow(shown, cmap="PuOr", norm=Normalize(np.log2(HALF), -np.log2(HALF)), aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                strong = abs(shown[i, j]) > 0.7
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if strong else "black")
        axis.set_xticks(range(len(COLUMNS)), COLUMNS)
        axis.set_yticks(range(len(shapes)), ["×".join(map(str, shape)) for shape in shapes])
        axis.set(title=head(key), ylabel="m × n × k")
        axis.grid(False)
        axis.tick_params(length=0)
    bar = figure.colorbar(image, ax=list(axes), orientation="horizontal", fraction=0.03, pad=0.01, aspect=40)
    bar.set_ticks([np.log2(r) for r in (0.5, 0.71, 1, 1.41, 2)], labels=["≤ 0.5", "0.71", "1", "1.41", "≥ 2"])
    bar.set_label("torch's time / ours: purple, above 1, this package is faster")
    return figure


def ratio_table(rows: Sequence[stats.Row]) -> tuple[list[tuple[int, int, int]], np.ndarray]:
    """Shapes, and a line of COLUMNS for each; NaN where there is nothing."""
    shapes = sorted({(row["m"], row["n"], row["k"]) for row in rows}, key=lambda s: (s[0] * s[1] * s[2], s))
    values = np.full((len(shapes), len(COLUMNS)), np.nan)
    for row in rows:
        column = f"forward\n{row['layout']}" if row["product"] == "forward" else row["product"]
        spread = stats.ratio(row)
        if column in COLUMNS and spread is not None:
            values[shapes.index((row["m"], row["n"], row["k"])), COLUMNS.index(column)] = spread.median
    return shapes, values


def roofline(result: Result) -> Figure | None:
    """Rate against operations a byte, beneath what memory and the multipliers of this machine give."""
    rows = [r for r in result["rows"] if r["product"] == "forward" and r["layout"] == "NN" and r.get("seconds")]
    keys = {k: some for k, some in by_dtype(rows).items() if any("peak" in r for r in some)}
    if not keys:
        return None
    names, (scale, per) = stats.backends(rows), unit(rows)
    names = [name for name in names if name in IMPLEMENTATIONS]
    figure, axes = panels(len(keys), 3.0, TITLES["roofline"])
    for axis, (key, some) in zip(axes, keys.items(), strict=True):
        peak = ceiling(some) or 0.0
        memory = stats.bandwidth(result, some[0])
        x = [stats.intensity(row) for row in some]
        ends = np.geomspace(min(x) / 1.5, max(x) * 1.5, 200)
        roof = np.minimum(peak, ends * memory) if memory else np.full_like(ends, peak)
        axis.plot(ends, roof / scale, color="#444444", linestyle="--", label="measured\nceiling")
        for name in names[::-1]:
            y = [(stats.rate(row, name) or np.nan) / scale for row in some]
            axis.plot(x, y, linestyle="", markersize=6, alpha=0.85, **look(name, names))
        axis.set(xscale="log", yscale="log", ylabel=per)
        log_ticks(axis.xaxis)
        log_ticks(axis.yaxis)
        memory_text = f", {memory:.3g} GB/s" if memory else ""
        axis.set_title(f"{head(key)}: {peak / scale:.3g} {per}{memory_text}")
        legend(axis, names)
    axes[-1].set_xlabel("operations a byte, each operand and result moved once; cold operands")
    return figure


def passes(result: Result) -> Figure | None:
    """Geometric means by dtype and pass, and the worst shape beneath each."""
    found = {
        group: summary
        for group, some in stats.summaries(result["rows"]).items()
        for summary in some
        if summary.backend == TORCH
    }
    if not found:
        return None
    where = list(dict.fromkeys(group.where for group in found))
    figure, axes = panels(len(where), 3.2, TITLES["passes"])
    for axis, here in zip(axes, where, strict=True):
        mine = {group: summary for group, summary in found.items() if group.where == here}
        products = list(dict.fromkeys(group.product for group in mine))
        dtypes = list(dict.fromkeys(group.dtype for group in mine))
        width = 0.8 / len(dtypes)
        tops = [1.0]
        for i, dtype in enumerate(dtypes):
            some = [(products.index(g.product), s) for g, s in mine.items() if g.dtype == dtype]
            at = np.array([x for x, _ in some]) + (i - (len(dtypes) - 1) / 2) * width
            means = [s.mean for _, s in some]
            bars = axis.bar(at, [m.median for m in means], 0.92 * width, color=COLOURS[1:][i % 7], label=dtype)
            for bar, m in zip(bars, means, strict=True):  # at its foot, where no line passes
                x = bar.get_x() + bar.get_width() / 2
                axis.text(x, 0.03, f"{m.median:.2f}", ha="center", va="bottom", color="white", fontweight="bold")
            worst = {"label": "worst shape"} if i == 0 else {}
            axis.plot(at, [s.worst for _, s in some], linestyle="", marker="_", markersize=14, color="black", **worst)
            tops += [m.median for m in means]
        axis.axhline(1.0, color="#444444", linestyle="--", zorder=0.5)
        axis.set_xticks(range(len(products)), products)
        axis.set(title=here, ylabel="torch's time / ours", ylim=(0, 1.15 * max(tops)))
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def overhead(result: Result) -> Figure | None:
    """Microseconds of a call whose operands lie in the first cache."""
    rows = [r for r in result["rows"] if r["product"] in ("forward", STEP) and r["layout"] == "NN"]
    rows = [r for r in rows if r.get("seconds") and r.get("copies") == 1 and r["flops"] <= 6 * (IN_L1 / 4) ** 1.5]
    names = stats.backends(rows)
    keys = by_dtype(rows)
    if not keys:
        return None
    lines = [sum(len(row["seconds"]) + 1 for row in some) for some in keys.values()]
    figure = Figure(figsize=(WIDTH, 0.2 * sum(lines) + 1.0 * len(lines) + 0.9), layout="constrained")
    figure.suptitle(TITLES["overhead"], fontweight="bold")
    axes = figure.subplots(len(lines), 1, squeeze=False, gridspec_kw={"height_ratios": lines})[:, 0]
    for axis, (key, some) in zip(axes, keys.items(), strict=True):
        at, middles, named = 0, [], set[str]()
        for row in some:
            timed = [name for name in names if name in row["seconds"]]
            for i, name in enumerate(timed):
                time = row["seconds"][name]["median"] * 1e6
                first = {} if name in named else {"label": name}
                named.add(name)
                bar = axis.barh(at + i, time, 0.9, color=look(name, names)["color"], **first)
                axis.bar_label(bar, [f"{time:.3g}"], padding=2, fontsize=9)
            middles.append(at + (len(timed) - 1) / 2)
            at += len(timed) + 1
        axis.set_yticks(middles, [f"{row['product']}\n{row['m']}×{row['n']}×{row['k']}" for row in some])
        axis.invert_yaxis()
        axis.margins(x=0.12, y=0.02)
        axis.set(title=head(key), xlabel="µs a call", xscale="log")
        log_ticks(axis.xaxis)
        legend(axis, names)
    return figure


PICTURES: dict[str, Callable[[Result], Figure | None]] = {
    "throughput": throughput, "ratios": ratios, "roofline": roofline, "passes": passes, "overhead": overhead,
}  # fmt: skip
