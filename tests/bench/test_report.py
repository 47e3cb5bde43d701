"""What is made of rows: tables, CSV, pictures, HTML in a real browser, README.md's section, two runs compared."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from limits import scaled

from matmul_grad import check_timing, console
from matmul_grad.bench import commands, html, plots, readme, results, stats, tables

CHROMIUM = shutil.which("chromium")
PHONE = 500  # pixels: the narrowest window of a headless browser


def rows(row: Any, ratio: float = 1.25) -> list[dict[str, Any]]:
    layouts = [
        ("forward", "NN"),
        ("forward", "NT"),
        ("forward", "TN"),
        ("dgrad", "NN"),
        ("wgrad", "NN"),
        ("step", "NN"),
    ]
    return [
        row(ratio * (1 + i / 10), product, dtype, layout, n)
        for dtype in ("f32", "f64")
        for n in (8, 64, 256)
        for i, (product, layout) in enumerate(layouts)
    ]


def save(path: Path, result: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, row: Any, result: Any) -> Path:
    """A folder with every file of a run."""
    path = save(tmp_path_factory.mktemp("written") / "run" / "bench.json", result(rows(row)))
    assert commands.main(["report", str(path)], "bench") == 0
    return path.parent


def test_every_file_is_written(written: Path) -> None:
    names = {str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()}
    drawn = {f"pictures/{name}.{kind}" for name in plots.PICTURES for kind in ("png", "svg")}
    assert names == {"bench.json", "bench.csv", "bench.md", "bench.html"} | drawn
    for path in written.rglob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert "| 1 thread | f32 | forward | torch | 1.37 (1.30–1.44) | 1.25 | NN 8×8×8 | 9 |" in (
        written / "bench.md"
    ).read_text(encoding="utf-8")


def test_pictures_are_the_same_for_the_same_rows(written: Path) -> None:
    before = {path: path.read_bytes() for path in written.rglob("*.*g")}
    assert commands.main(["report", str(written / "bench.json")], "bench") == 0
    assert {path: path.read_bytes() for path in written.rglob("*.*g")} == before


def test_pictures_without_rows_are_left_out(tmp_path: Path, row: Any, result: Any) -> None:
    html.write_all(result(rows(row)), tmp_path)
    few = result([row(n=64, product="dgrad")])
    html.write_all(few, tmp_path)
    assert {path.stem for path in (tmp_path / "pictures").iterdir()} == {"ratios", "passes"}
    html.write_all(result([{**row(), "seconds": {}, "ratio": {}, "wrong": {"torch": "no"}}]), tmp_path)
    assert list((tmp_path / "pictures").iterdir()) == []


def test_nothing_overlaps(row: Any, result: Any) -> None:
    """Titles, labels, figures and legends of every picture, as they are drawn: apart, and inside."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    for name, figure in plots.draw(result(rows(row))).items():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        whole = figure.bbox.padded(1)
        texts = [t for t in figure.findobj(Text) if isinstance(t, Text) and t.get_visible() and t.get_text().strip()]
        boxes = {t: t.get_window_extent(canvas.get_renderer()) for t in texts}
        for axis in figure.axes:  # ticks beyond an axis are kept, and not drawn
            for across, ticks in ((0, axis.get_xticklabels(which="both")), (1, axis.get_yticklabels(which="both"))):
                low, high = axis.bbox.padded(1).get_points()[:, across]
                for tick in ticks:
                    if tick in boxes and not low <= boxes[tick].get_points()[:, across].mean() <= high:
                        del boxes[tick]
        for t, box in boxes.items():
            assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and box.y1 <= whole.y1, f"{name}: {t.get_text()!r}"
        for one, other in itertools.combinations(boxes, 2):
            overlap = boxes[one].shrunk(0.9, 0.8).overlaps(boxes[other].shrunk(0.9, 0.8))
            assert not overlap, f"{name}: {one.get_text()!r} and {other.get_text()!r}"


def test_axes_have_units(row: Any, result: Any) -> None:
    drawn = plots.draw(result(rows(row)))
    assert list(drawn) == list(plots.TITLES)
    labels = {name: " ".join(a.get_xlabel() + a.get_ylabel() for a in figure.axes) for name, figure in drawn.items()}
    for name, unit in (
        ("throughput", "GFLOP/s"), ("roofline", "operations a byte"), ("overhead", "µs a call"),
        ("passes", "torch's time / ours"), ("ratios", "torch's time / ours"),
    ):  # fmt: skip
        assert unit in labels[name]


def test_csv_is_what_the_rows_say(written: Path) -> None:
    text = (written / "bench.csv").read_text(encoding="utf-8")
    assert "# CPU: Some <CPU>, 2 cores\n" in text
    lines = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    assert len(lines) == 36 * 2 and tuple(lines[0]) == results.COLUMNS
    ours = next(line for line in lines if line["contender"] == "matmul_grad" and line["n"] == "64")
    assert float(ours["GFLOP/s"]) == pytest.approx(1.0)
    assert float(ours["share of peak"]) == pytest.approx(0.5) and ours["verdict"] == "right"
    assert float(ours["share of bandwidth"]) == pytest.approx(12 * 64**2 / (2e-9 * 64**3) / 1e10, rel=1e-4)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            self.images.append(values["src"] or "")
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href") and not (v or "").startswith("data:")]


def test_page_is_one_file(written: Path) -> None:
    text = (written / "bench.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert len(tags.images) == len(plots.PICTURES) and tags.fetched == []
    assert "url(" not in text and "<script" not in text
    assert "Some &lt;CPU&gt;" in text and "<CPU>" not in text


LOOK = """<script>addEventListener("load", () => {
  const images = [...document.images];
  document.body.dataset.missing = images.filter(image => !image.complete || image.naturalWidth < 100).length;
  document.body.dataset.images = images.length;
  const tables = [...document.querySelectorAll(".summary")];
  document.body.dataset.cut = Math.max(...tables.map(table => table.scrollWidth - table.parentElement.clientWidth));
  document.body.dataset.wide = document.documentElement.scrollWidth - innerWidth;
});</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="1 test needs chromium, which is not installed")
def test_page_opens_in_a_browser(written: Path, tmp_path: Path) -> None:
    """No error on the console, no picture missing, nothing wider than a narrow window."""
    page = tmp_path / "looked_at.html"
    page.write_text((written / "bench.html").read_text(encoding="utf-8").replace("</body>", LOOK + "</body>"), "utf-8")
    said = browse(page, tmp_path / "profile")
    assert 'data-missing="0"' in said.stdout, said.stderr
    assert f'data-images="{len(plots.PICTURES)}"' in said.stdout
    assert int(re.findall(r'data-wide="(-?\d+)"', said.stdout)[0]) <= 0
    assert int(re.findall(r'data-cut="(-?\d+)"', said.stdout)[0]) <= 0
    assert "CONSOLE" not in said.stderr
    broken = page.read_text(encoding="utf-8").replace("image/png;base64,iVBOR", "image/png;base64,AAAA", 1)
    page.write_text(broken.replace("<script>", "<script>console.error('planted');"), encoding="utf-8")
    said = browse(page, tmp_path / "profile")
    assert 'data-missing="1"' in said.stdout and "CONSOLE" in said.stderr  # what is planted is seen


def browse(page: Path, profile: Path) -> Any:
    assert CHROMIUM is not None
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        f"--disable-component-update --disable-sync --enable-logging=stderr --window-size={PHONE},900 "
        f"--user-data-dir={profile} --virtual-time-budget=5000 --dump-dom"
    ).split()
    return subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=scaled(120))


def page_with_markers(folder: Path) -> Path:
    page = folder / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n", encoding="utf-8")
    return page


def test_readme_section_is_written_from_rows(written: Path) -> None:
    page = page_with_markers(written.parent)
    assert commands.main(["report", str(written / "bench.json"), "--readme", str(page)], "bench") == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{readme.BEGIN}\nMeasured 2026-01-02 on Some <CPU>, 2 cores (avx2), one thread; ")
    assert text.endswith(f"{readme.END}\nafter\n") and "old" not in text
    assert "| f32 | 64 | 1 | 1 | 1.25 | 1.62 | 1.75 | 1.88 |" in text
    assert "| f32 | geometric mean | | | 1.25 | 1.62 | 1.75 | 1.88 |" in text
    assert "| 1 thread | f32 | forward | torch | 1.37 | 1.25 | NN 8×8×8 |" in text
    assert "![Throughput of square products](run/pictures/throughput.svg)" in text
    assert "the product takes 1.0 µs (torch: 1.3 µs), the whole step takes" in text
    kept = json.loads((written / "bench.json").read_text(encoding="utf-8"))
    assert text.split(readme.BEGIN)[1].split(readme.END)[0].strip() == readme.block(kept, readme.beside(written, page))


@pytest.mark.parametrize(("busy", "status"), [(["--busy"], 0), ([], 2)])
def test_figures_of_a_busy_machine_are_not_written(
    busy: list[str], status: int, tmp_path: Path, row: Any, result: Any, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(html, "write_all", lambda result, place: None)
    some = rows(row)
    some[0]["share of core"] = 0.5
    page, path = page_with_markers(tmp_path), save(tmp_path / "bench.json", result(some))
    assert commands.main(["report", str(path), "--readme", str(page), *busy], "bench") == status
    assert ("old" in page.read_text(encoding="utf-8")) == bool(status)
    line = "bench: --readme: other work ran here during forward-f32-NN-8x8x8-1t, in all 1 comparisons\n"
    assert capsys.readouterr().err == (line if status else "")


def test_readme_leaves_out_what_was_not_timed(row: Any, result: Any) -> None:
    some = rows(row)
    some[0] |= {"seconds": {"torch": some[0]["seconds"]["torch"]}, "ratio": {}, "wrong": {"matmul_grad": "no"}}
    del some[6]["seconds"]
    text = readme.block(result(some))
    assert "| f32 | 64 |" not in text and "| f32 | 256 |" in text and "the product takes" not in text


def test_readme_is_of_a_cpu(tmp_path: Path, row: Any, result: Any, capsys: Any) -> None:
    measured = result([row()])
    measured["stamp"]["device"] = "cuda"
    path, page = save(tmp_path / "bench.json", measured), page_with_markers(tmp_path)
    assert commands.main(["report", str(path), "--readme", str(page)], "bench") == 2
    assert capsys.readouterr().err.count("\n") == 1 and "old" in page.read_text(encoding="utf-8")


def test_readme_without_markers_is_left_alone(tmp_path: Path, written: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(html, "write_all", lambda result, place: None)
    page = tmp_path / "README.md"
    page.write_text("no markers\n", encoding="utf-8")
    assert commands.main(["report", str(written / "bench.json"), "--readme", str(page)], "bench") == 2
    assert capsys.readouterr().err.endswith("once each\n")
    assert page.read_text(encoding="utf-8") == "no markers\n"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda result: result | {"schema": 2}, "schema 2, this version reads 1"),
        (lambda result: {k: v for k, v in result.items() if k != "schema"}, "these are not rows of bench: 'schema'"),
        (lambda result: {k: v for k, v in result.items() if k != "roofs"}, "there is no roofs in it"),
        (lambda result: result | {"rows": [{"m": 1}]}, "these are not rows of bench"),
        (lambda result: result | {"rows": 7}, "these are not rows of bench"),
        (lambda result: [result], "these are not results of bench"),
    ],
)
def test_broken_files_get_one_line(
    change: Any, why: str, tmp_path: Path, row: Any, result: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "x.json", change(result([row()])))
    for arguments in (["report", str(path)], ["compare", str(path), str(path)]):
        assert commands.main(arguments, "bench") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert why in line


def test_comparison_calls_that_different_which_is_beyond_the_spread(
    tmp_path: Path, row: Any, result: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = save(tmp_path / "a.json", result([row(1.0), row(1.0, n=128), row(1.0, n=256), row(1.0, n=512)]))
    second = save(tmp_path / "b.json", result([row(1.5), row(1.05, n=128), row(0.8, n=256), row(1.0, n=99)]))
    compare = ["compare", str(first), str(second)]
    assert commands.main(compare, "bench") == 0
    printed = capsys.readouterr().out
    found = {line.split()[0]: line.split()[3:] for line in printed.splitlines() if line.startswith(" forward")}
    assert found == {
        "forward-f32-NN-64x64x64-1t": ["1.500", "faster"],
        "forward-f32-NN-128x128x128-1t": ["1.050", "within", "spread"],
        "forward-f32-NN-256x256x256-1t": ["0.800", "slower"],
    }
    assert "geometric mean of second / first: 1.080; 2 of 3 beyond their spread." in printed
    assert commands.main([*compare, "--fail-below=0.7"], "bench") == 0
    assert commands.main([*compare, "--fail-below=0.9"], "bench") == 1
    assert capsys.readouterr().err == "bench: forward-f32-NN-256x256x256-1t: 0.800 of the first, below 0.9\n"
    assert commands.main([*compare, "--fail-below=1.1"], "bench") == 1
    assert "geometric mean: 1.080 of the first, below 1.1" in capsys.readouterr().err


def test_comparison_says_which_run_was_disturbed(tmp_path: Path, row: Any, result: Any, capsys: Any) -> None:
    first = save(tmp_path / "a.json", result([row(1.0)]))
    second = save(tmp_path / "b.json", result([row(2.0) | {"share of core": 0.5}]))
    assert commands.main(["compare", str(first), str(second)], "bench") == 0
    printed = capsys.readouterr().out.replace("\n", "")
    assert "b.json: other work ran during 1 of 1 comparisons" in printed and "a.json: other" not in printed


def test_runs_without_torch_are_compared_by_calls_a_second(row: Any) -> None:
    alone = row() | {"ratio": {}, "seconds": {"matmul_grad": {"low": 1.0, "median": 2.0, "high": 4.0}}}
    twice = row() | {"ratio": {}, "seconds": {"matmul_grad": {"low": 0.5, "median": 1.0, "high": 2.0}}}
    (change,) = stats.changes([alone], [twice])
    assert change.ratio == 2.0 and not change.significant


def test_runs_with_nothing_in_common(tmp_path: Path, row: Any, result: Any, capsys: Any) -> None:
    first, second = (save(tmp_path / f"{n}.json", result([row(n=n)])) for n in (8, 16))
    assert commands.main(["compare", str(first), str(second)], "bench") == 2
    assert "have no comparison in common" in capsys.readouterr().err


def test_one_length_of_sums_is_no_evidence(row: Any) -> None:
    """MKL on AVX2 adds 256 products as these kernels do: a run of that one size is no self-comparison."""
    same = {"bits": {"torch": "a", "matmul_grad": "a"}}
    passes = "forward", "dgrad", "wgrad", "step"
    assert stats.twins([row(n=256, product=product, **same) for product in passes]) == []
    assert stats.twins([row(n=1024, product=product, **same) for product in passes]) == []


def test_runs_of_two_machines_are_told(tmp_path: Path, row: Any, result: Any, capsys: Any) -> None:
    first, other = result([row(1.0)]), result([row(2.0)])
    other["stamp"] |= {"CPU": "Another CPU, 8 cores", "versions": "torch 2"}
    paths = [save(tmp_path / name, what) for name, what in (("a.json", first), ("b.json", other))]
    assert commands.main(["compare", str(paths[0]), str(paths[0])], "bench") == 0
    assert "differ in more than this package" not in capsys.readouterr().out
    assert commands.main(["compare", *map(str, paths)], "bench") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "The runs differ in more than this package." in printed
    assert "CPU: Some <CPU>, 2 cores; then Another CPU, 8 cores." in printed
    assert "versions: torch 1; then torch 2." in printed


LONG = {"dtype": "bf16", "m": 4096, "n": 14336, "k": 4096, "threads": 16}


def faster(row: dict[str, Any]) -> dict[str, Any]:
    ratios = {name: {part: 2 * value for part, value in spread.items()} for name, spread in row["ratio"].items()}
    return row | {"ratio": ratios}


def test_tables_fit_a_terminal_of_80_columns(row: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    some = [row(12.5, product) | LONG for product in ("forward", "step")]
    for found in some:
        for what in ("seconds", "ratio"):
            found[what] = found[what] | {"torch.compile": found[what]["torch"]}
    drawn = [(tables.SUMMARY[:-1], [line[:-1] for line in lines], 3) for lines in tables.summaries(some).values()]
    drawn += [(tables.CHANGES, tables.changes(stats.changes(some, [faster(one) for one in some])), 1)]
    drawn += [(check_timing.COLUMNS, [["forward-bf16-4096", *["0.123", "0.122–0.124"] * 2, "12345", "1.05"]], 1)]
    for columns, lines, left in drawn:
        for width in (80, 200):
            console.table(console.make_console(width), columns, lines, left)
            printed = capsys.readouterr().out.splitlines()
            assert max(map(len, printed)) <= width
            assert len(
                [line for line in printed if any(line.strip().startswith(workload[0]) for workload in lines)]
            ) == len(lines)
            assert all(any(workload in line for line in printed) for planned in lines for workload in planned), printed


def test_report_has_a_verdict(written: Path) -> None:
    sentence = (
        "This package is 1.55 times as fast as torch in the geometric mean of 36 comparisons; it is slower in 0 of "
        "them, and slowest, with 1.25, in forward f32 NN 8×8×8. All results are right."
    )
    for name in ("bench.html", "bench.md"):
        assert sentence in (written / name).read_text(encoding="utf-8")


def test_verdict_counts_what_is_wrong(row: Any) -> None:
    some = [row(0.5), row(2.0, n=128), row(n=256) | {"wrong": {"torch": "no"}, "seconds": {}, "ratio": {}}]
    assert tables.verdict(some) == (
        "This package is 1.00 times as fast as torch in the geometric mean of 2 comparisons; it is slower in 1 of "
        "them, and slowest, with 0.50, in forward f32 NN 64×64×64. Results wrong, failed or suspect: 1."
    )


def test_summary_fits_a_phone(written: Path) -> None:
    """Its workloads may break in a narrow window, so nothing of it is cut off; the browser's test measures it."""
    text = (written / "bench.html").read_text(encoding="utf-8")
    narrow = text.split("@media (max-width: 40rem)")[1].split("</style>")[0]
    assert "white-space: normal; overflow-wrap: anywhere" in narrow
    assert text.count('<table class="summary">') == 1


def test_pictures_hold_a_product_in_one_precision(row: Any) -> None:
    rows = [row(), row(precision="tf32"), row(batch=3), row(mode="invariant")]
    assert list(plots.by_dtype(rows).values()) == [rows[:1], rows[1:2]]
    assert [key[-1] for key in plots.by_dtype(rows)] == ["f32", "f32 tf32"]


@pytest.mark.parametrize(("peak", "extra"), [(None, None), (3 << 20, None), ((4 << 20) - 9, 0), (7 << 20, 3 << 20)])
def test_memory_beside_the_result(row: Any, peak: int | None, extra: int | None) -> None:
    found = row(n=1024, **{"peak bytes": {} if peak is None else {"torch": peak}})
    assert stats.extra_bytes(found, "torch") == extra
