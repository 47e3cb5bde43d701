"""The report: one file of HTML with its pictures inside, for a phone as for a wide screen."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import plots, results, tables

CSS = """\
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; padding: 1rem;
  max-width: 60rem; overflow-wrap: break-word; }
img { display: block; width: 100%; max-width: 46rem; height: auto; margin: 0 auto; }
figure { margin: 1.5rem 0; }
figcaption { color: #444; max-width: 46rem; margin: .3rem auto 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th.word, td.word { text-align: left; }
.facts td { white-space: normal; overflow-wrap: anywhere; }
.verdict { font-size: 1.1rem; }
@media (max-width: 40rem) {
  .summary { font-size: .75rem; }
  .summary th, .summary td { padding: .2rem .25rem; white-space: normal; overflow-wrap: anywhere; }
}
.bad { border-left: 4px solid #d55e00; padding-left: .8rem; }
"""
CAPTIONS = {
    "throughput": "Higher is better. The dashed line is what the multipliers of this machine give on registers alone.",
    "ratios": "Purple squares: this package is faster; orange: slower. Letters are how A and B lie, by rows (N) or "
    "columns (T).",
    "roofline": "No product can lie above the dashed line for long: to the left memory limits it, to the right the "
    "multipliers. Small products whose operands stay in a cache may.",
    "passes": "Bars are geometric means over all shapes; the black line is the worst of them.",
    "overhead": "Shorter is better.",
}


def write_all(result: dict[str, Any], place: Path) -> None:
    """What is written of a run besides its rows; a picture that there is nothing for any more is taken away."""
    drawn = plots.draw(result)
    folder = place / plots.FOLDER
    folder.mkdir(exist_ok=True)
    images = {}
    for name in plots.PICTURES:
        for kind in ("svg", "png"):
            path = folder / f"{name}.{kind}"
            if name not in drawn:
                path.unlink(missing_ok=True)
                continue
            image = plots.saved(drawn[name], kind)
            path.write_bytes(image)
            if kind == "png":
                images[name] = image
    results.write(place / "bench.csv", results.as_csv(result))
    results.write(place / "bench.md", tables.page(result))
    results.write(place / "bench.html", page(result, images))


def page(result: dict[str, Any], drawn: Mapping[str, bytes]) -> str:
    """``drawn``: the PNG of each picture."""
    stamp = result["stamp"]
    title = f"Bench: {stamp['GPU'] if stamp['device'] != 'cpu' else stamp['CPU']}, {stamp['date']}"
    body = [f"<h1>{html.escape(title)}</h1>", *(note(text) for text in tables.notes(result))]
    body += [f'<p class="verdict">{html.escape(tables.verdict(result["rows"]))}</p>']
    body += ["<h2>Geometric means and worst cases</h2>"]
    for where, lines in tables.summaries(result["rows"]).items():
        body += [f"<h3>{html.escape(where)}</h3>", table(tables.SUMMARY, lines, 3, "summary")]
    body += [f"<p>{html.escape(tables.READING)}</p>", *(figure(name, png) for name, png in drawn.items())]
    body += ["<h2>Every comparison</h2>"]
    body += [table(tables.cell_columns(result["rows"]), tables.cell_lines(result), 4)]
    skipped = tables.left_out(result["rows"])
    if skipped:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in skipped)
        body += ["<h2>Left out</h2>", f"<ul>{items}</ul>"]
    body += ["<h2>Machine</h2>", table(["", ""], tables.machine(result), 2, "facts")]
    body += [f"<p>{html.escape(result['protocol'])}</p>"]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{html.escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>\n{CSS}</style></head>\n'
        "<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def figure(name: str, png: bytes) -> str:
    source = base64.b64encode(png).decode("ascii")
    image = f'<img alt="{html.escape(plots.TITLES[name])}" src="data:image/png;base64,{source}">'
    return f"<figure>{image}<figcaption>{html.escape(CAPTIONS[name])}</figcaption></figure>"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int, kind: str = "") -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        words = (' class="word"' if i < left else "" for i in range(len(cells)))
        return (
            "<tr>" + "".join(f"<{tag}{w}>{html.escape(c)}</{tag}>" for w, c in zip(words, cells, strict=True)) + "</tr>"
        )

    lines = [line(columns, "th") if any(columns) else "", *(line(row, "td") for row in rows)]
    return f'<div class="wide"><table class="{kind}">\n' + "\n".join(filter(None, lines)) + "\n</table></div>"


def note(text: str) -> str:
    """A paragraph of `tables.notes`, whose lists are Markdown's."""
    plain = html.escape(text.replace("**", "")).replace("\n\n", "<br>").replace("\n", "<br>")
    return f'<p class="bad">{plain}</p>'
