"""mkdocs hooks: formulas become MathML, which browsers render without scripts; plots of bench/results are copied."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!\$)\$([^$]+)\$(?!\$)")
TAG = re.compile(r"\\tag\{(\w+)\}")
OUTSIDE = re.compile(r"\]\(\.\./(bench/results/[^)]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the plots that a page of docs/ refers to outside docs/."""
    for page in list(files.documentation_pages()):
        for path in OUTSIDE.findall(Path(page.abs_src_path).read_text(encoding="utf-8")):
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Only pages with a math block hold inline formulas."""
    markdown = OUTSIDE.sub(r"](\1)", markdown)
    return INLINE.sub(inline, BLOCK.sub(block, markdown)) if BLOCK.search(markdown) else markdown


def block(match: re.Match[str]) -> str:
    """A formula of its own line, with its number at the right and as its anchor."""
    tag = TAG.search(match[1])
    number = f"<span>({tag[1]})</span>" if tag else ""
    anchor = f' id="{tag[1]}"' if tag else ""
    formula = convert(TAG.sub("", match[1]).strip(), display="block")
    return f'<div class="formula"{anchor}>{formula}{number}</div>\n'


def inline(match: re.Match[str]) -> str:
    return convert(match[1].replace("\n", " "))
