"""Pages that need no other file: what the report of a sweep and that of an evaluation are made of."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .3rem .7rem; border-bottom: 1px solid #ddd }
th { text-align: left } td:not(:first-child), th:not(:first-child) { text-align: right; white-space: nowrap }
.wide { overflow-x: auto } tbody tr:first-child { font-weight: 600 } table.runs tbody tr { font-weight: 400 }
img { max-width: 100% } code, pre { background: #f4f4f4; padding: .1rem .3rem; white-space: pre-wrap }
.failed { color: #a00 }
"""


def page(title: str, body: Iterable[str]) -> str:
    """All of a page; empty parts of the body are left out."""
    head = f"<!doctype html><meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>"
    return "\n".join([head, *filter(None, body)]) + "\n"


def table(rows: Sequence[Sequence[str]], kind: str = "rows") -> str:
    """A table whose first row is its head."""
    head = "".join(f"<th>{escape(label)}</th>" for label in rows[0])
    below = ("".join(f"<td>{escape(text)}</td>" for text in row) for row in rows[1:])
    body = "\n".join(f"<tr>{row}</tr>" for row in below)
    return f"<div class='wide'><table class='{kind}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def picture(png: bytes, said: str) -> str:
    """A picture with a caption, in the page itself."""
    content = base64.b64encode(png).decode()
    image = f"<img alt='{escape(said)}' src='data:image/png;base64,{content}'>"
    return f"<figure>{image}<figcaption>{escape(said)}</figcaption></figure>"
