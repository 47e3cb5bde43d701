"""The diagrams of docs/images: python docs/tools/diagrams.py draws them anew, as SVG."""

from __future__ import annotations

import html
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "images"
INK, GREY, BLUE, ORANGE, GREEN = "#333333", "#999999", "#b8d0ee", "#f6c894", "#bfe0b8"
FONT = "font-family='sans-serif' font-size='14'"


class Drawing:
    """A list of SVG elements with a size and a description for those who cannot see it."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.elements: list[str] = []

    def box(self, x: int, y: int, width: int, height: int, fill: str = "none", text: str = "") -> None:
        shape = f"x='{x}' y='{y}' width='{width}' height='{height}'"
        self.elements.append(f"<rect {shape} fill='{fill}' stroke='{INK}'/>")
        for index, line in enumerate(text.splitlines()):
            middle = y + height / 2 + 5 + 18 * (index - text.count("\n") / 2)
            self.text(x + width // 2, middle, line, "middle")

    def text(self, x: float, y: float, text: str, anchor: str = "start", colour: str = INK) -> None:
        place = f"x='{x:g}' y='{y:g}' text-anchor='{anchor}' fill='{colour}'"
        self.elements.append(f"<text {place} {FONT}>{html.escape(text)}</text>")

    def arrow(self, x1: int, y1: int, x2: int, y2: int) -> None:
        ends = f"x1='{x1}' y1='{y1}' x2='{x2}' y2='{y2}'"
        self.elements.append(f"<line {ends} stroke='{INK}' marker-end='url(#tip)'/>")

    def svg(self) -> str:
        head = (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {self.width} {self.height}' role='img'>\n"
            f"<title>{html.escape(self.title)}</title>\n"
            "<defs><marker id='tip' markerWidth='9' markerHeight='8' refX='8' refY='4' orient='auto'>"
            f"<path d='M0,0 L9,4 L0,8 z' fill='{INK}'/></marker></defs>\n"
            f"<rect width='{self.width}' height='{self.height}' fill='white'/>\n"
        )
        return head + "\n".join(self.elements) + "\n</svg>\n"


def loops() -> Drawing:
    """The five loops: which part of A, B and C each one fixes, and where that part lies."""
    drawing = Drawing(760, 420, "The five loops around the microkernel, and the parts of A, B and C that they fix")
    rows = (
        ("for jc in n by NC", "a panel of B, NC columns wide", "L3"),
        ("for pc in k by KC", "KC rows of it are packed", "L3"),
        ("for ic in m by MC", "a block of A, MC × KC", "L2"),
        ("for jr in NC by NR", "one column panel of B, KC × NR", "L1"),
        ("for ir in MC by MR", "one tile of C, MR × NR", "registers"),
    )
    for level, (loop, part, place) in enumerate(rows):
        x, y = 20 + 24 * level, 20 + 58 * level
        drawing.box(x, y, 740 - 2 * x + 20, 390 - y - 12 * level, "white")
        drawing.text(x + 12, y + 26, loop)
        drawing.text(x + 190, y + 26, part, colour=GREY)
        drawing.text(640 - 12 * level, y + 26, place, "end", GREY)
    drawing.box(150, 288, 460, 36, ORANGE, "microkernel: MR × NR multiply-adds for each p in KC")
    return drawing


def call() -> Drawing:
    """One call on CPU, from Python to the microkernel, and where it leaves for PyTorch."""
    drawing = Drawing(760, 470, "The way of one call of matmul_grad.mm on CPU")
    steps = (
        ("matmul_grad.mm(a, b)\nPython", BLUE),
        ("torch.ops.matmul_grad.mm\ntorch's dispatcher", BLUE),
        ("entry under AutogradCPU\ncompiled by Numba", GREEN),
        ("entry under CPU\nchecks operands, allocates C", GREEN),
        ("driver\nloops, packing, threads", GREEN),
        ("microkernel\none tile of C in registers", ORANGE),
    )
    for index, (text, fill) in enumerate(steps):
        y = 15 + 75 * index
        drawing.box(60, y, 270, 52, fill, text)
        if index:
            drawing.arrow(195, y - 23, 195, y - 1)
    drawing.box(460, 165, 270, 52, BLUE, "operator in Python\nautograd, modes, subclasses")
    drawing.box(460, 240, 270, 52, "#eeeeee", "aten::mm\nPyTorch's kernel")
    drawing.arrow(330, 191, 459, 191)
    drawing.text(395, 184, "gradient, mode", "middle", GREY)
    drawing.arrow(330, 266, 459, 266)
    drawing.text(395, 259, "unsupported", "middle", GREY)
    drawing.arrow(459, 210, 331, 248)
    drawing.text(345, 338, "no Python and no GIL", colour=GREY)
    drawing.text(345, 358, "between the entry and the microkernel", colour=GREY)
    return drawing


def packing() -> Drawing:
    """What packing does to B: columns of one register tile, one step of k after the other."""
    drawing = Drawing(760, 300, "Packing: a panel of B is copied so that it is read from front to back")
    size, columns, rows = 30, 8, 5
    for p in range(rows):
        for j in range(columns):
            fill = ORANGE if j < 4 else BLUE
            drawing.box(30 + size * j, 60 + size * p, size, size, fill, f"{p}{j}")
    drawing.text(30, 40, "B in memory: k rows, n columns, element pj")
    drawing.text(30, 245, "rows lie apart by the stride of B", colour=GREY)
    for panel, fill in enumerate((ORANGE, BLUE)):
        for index in range(3):
            y = 75 + 70 * panel
            text = "  ".join(f"{index}{4 * panel + s}" for s in range(4))
            drawing.box(370 + 110 * index, y, 110, size, fill, text)
        drawing.text(710, y + 20, "…")
    drawing.arrow(278, 100, 365, 90)
    drawing.arrow(278, 150, 365, 160)
    drawing.text(370, 40, "packed: panels of NR = 4 columns, row after row")
    drawing.text(370, 205, "the microkernel reads each panel from front to back", colour=GREY)
    drawing.text(370, 225, "the last panel is padded with zeros to NR columns", colour=GREY)
    return drawing


DRAWINGS = {"loops": loops, "call": call, "packing": packing}


def main() -> None:
    for name, draw in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
