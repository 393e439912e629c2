"""Plain text out of what packages hold: manual pages, web pages, Perl's and Python's files as they are.

`packages` names the reader of each source.

    python -c "from training.reference_moe.markup import manual_page; print(manual_page('.SH NAME\nls'))"
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

# Requests of a manual page that define or compute; the rest show what stands behind them.
SILENT = frozenset({"TH", "Dd", "Dt", "Os", "ds", "de", "nr", "ie", "el", "if", "so", "ad", "hy", "ft", "tr"})
FONT = re.compile(r"\\[fFmM](\[[^\]]*\]|\(..|.)")
SIZE = re.compile(r"\\s[-+]?\d")
NAMED_CHARACTER = re.compile(r"\\(\((aq|em|en|bu|co|lq|rq|dq|ti|ha)|\*\((..)|\*\[[^\]]*\])")
CHARACTERS = {
    "aq": "'",
    "em": "—",
    "en": "–",
    "bu": "•",
    "lq": "“",
    "rq": "”",
    "dq": '"',
    "ti": "~",
    "ha": "^",
}
HIDDEN_TAGS = frozenset({"script", "style", "head", "title"})
BREAKING_TAGS = frozenset(
    {"p", "div", "li", "tr", "dt", "dd", "pre", "h1", "h2", "h3", "h4", "h5", "br", "table"}
)
EMPTY_LINES = re.compile(r"\n\s*\n+")


def plain(text: str) -> str:
    """The text as it is."""
    return text


def manual_page(text: str) -> str:
    """What a manual page in roff says, its headings and paragraphs kept, its requests and fonts left out."""
    return _tidied("\n".join(line for of in text.splitlines() if (line := _manual_line(of)) is not None))


def _manual_line(line: str) -> str | None:
    if line.startswith(("'\\\"", '.\\"', "\\'", "..")):
        return None
    if line.startswith((".", "'")):
        request, _, rest = line[1:].strip().partition(" ")
        if request in SILENT or not request.isalpha():
            return None
        line = rest.replace('"', "").strip()
    line = NAMED_CHARACTER.sub(
        lambda found: CHARACTERS.get(found[2] or "", ""), SIZE.sub("", FONT.sub("", line))
    )
    return line.replace("\\&", "").replace("\\-", "-").replace("\\ ", " ").replace("\\e", "\\")


def web_page(text: str) -> str:
    """What a page in HTML shows; a line for each block."""
    reader = _Shown()
    reader.feed(text)
    reader.close()
    return _tidied("".join(reader.parts))


class _Shown(HTMLParser):
    """Collects what stands between tags."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0
        self._kept = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in HIDDEN_TAGS
        self._kept += tag == "pre"
        if tag in BREAKING_TAGS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in HIDDEN_TAGS
        self._kept -= tag == "pre"
        if tag in BREAKING_TAGS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data if self._kept else re.sub(r"\s+", " ", data))


def _tidied(text: str) -> str:
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return EMPTY_LINES.sub("\n\n", lines).strip() + "\n"
