"""What is written of a run besides its rows: CSV, Markdown, HTML, and each picture as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import files, html, plots, results, tables


def write(result: dict[str, Any], place: Path) -> None:
    """Into ``place``; a picture that there is nothing for any more is taken away."""
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
    files.write(place / "bench.csv", results.as_csv(result))
    files.write(place / "bench.md", tables.page(result))
    files.write(place / "bench.html", html.page(result, images))
