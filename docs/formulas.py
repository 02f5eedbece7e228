"""A hook of MkDocs: formulas that arithmatex has marked become drawings, so that a page needs no script, font or network."""

import re
from html import escape, unescape
from typing import Any

from matplotlib.path import Path
from matplotlib.textpath import TextPath

MARKED = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
EM = 1000  # drawn this large, so that whole numbers are fine enough
LETTERS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}


def on_page_content(html: str, **_: Any) -> str:
    """Replace every formula of a page."""
    return MARKED.sub(lambda found: f'<{found[1]} class="formula">{draw(unescape(found[2]))}</{found[1]}>', html)


def draw(latex: str) -> str:
    """An SVG picture as large as the text around it and on its base line, in its colour; readers aloud get the LaTeX."""
    path = TextPath((0, 0), f"${' '.join(latex.split())}$", size=EM)
    box = path.get_extents()
    left, top, width, height = box.x0, -box.y1, box.width, box.height
    lines = []
    for points, code in path.iter_segments(simplify=False):
        flipped = [round(y if index % 2 == 0 else -y) for index, y in enumerate(points)]
        lines.append(LETTERS[code] + ("" if code == Path.CLOSEPOLY else " ".join(map(str, flipped))))
    style = f"width:{width / EM:.3f}em;height:{height / EM:.3f}em;vertical-align:{box.y0 / EM:.3f}em"
    view = f"{left:.0f} {top:.0f} {width:.0f} {height:.0f}"
    label = escape(latex.strip(), quote=True)
    return f'<svg role="img" aria-label="{label}" viewBox="{view}" style="{style}"><path d="{"".join(lines)}"/></svg>'
