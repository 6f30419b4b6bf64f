"""Formulas of the site as MathML, made while it is built: pages need no script and no network to show them."""

from __future__ import annotations

import html
import logging
import re
from typing import Any

from latex2mathml.converter import convert

LOG = logging.getLogger("mkdocs.hooks.math")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
# The converter does not know the commands on the left.
WORDS = ((r"\arg\min", r"\mathrm{argmin}"), (r"\Bigl\|", r"\|"), (r"\Bigr\|", r"\|"))


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Replace the formulas that `pymdownx.arithmatex` has marked; a formula left undone is a warning."""

    def mathml(match: re.Match[str]) -> str:
        latex = html.unescape(match[3]).strip()
        source = latex
        for word, replacement in WORDS:
            latex = latex.replace(word, replacement)
        markup = convert(latex, display="block" if match[2] == "[" else "inline")
        if "\\" in markup or "<mi>&</mi>" in markup:
            LOG.warning("%s: formula not understood: %s", page.file.src_path, source)
        return f'<{match[1]} class="formula">{markup}</{match[1]}>'

    return FORMULA.sub(mathml, content)
