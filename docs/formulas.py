"""A hook of MkDocs: formulas that arithmatex has marked, from LaTeX to MathML, which browsers show by themselves."""

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

MARKED = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """Replace every formula of a page."""

    def mathml(found: re.Match[str]) -> str:
        tag, latex = found.groups()
        formula = convert(unescape(latex), display="inline" if tag == "span" else "block")
        return f'<{tag} class="formula">{formula}</{tag}>'

    return MARKED.sub(mathml, html)
