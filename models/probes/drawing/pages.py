"""A page of predictions with thumbnails in it: one HTML file that needs nothing else."""

import base64
import io
from html import escape
from typing import Any

from PIL import Image

from data.sources.decode import UnreadableImage, read_image

SIDE = 112  # pixels of a thumbnail
STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222 }
h2 { margin: 1.5em 0 .5em }
.images { display: flex; flex-wrap: wrap; gap: 12px }
figure { margin: 0; width: 132px; overflow-wrap: anywhere; font-size: 12px }
img { display: block; width: 112px; height: 112px; object-fit: contain; background: #eee }
.bar { height: 4px; width: 112px; background: #ddd; margin: 3px 0 } .bar div { height: 4px; background: #1f77b4 }
small { color: #777 }
"""


def thumbnails(title: str, line: str, rows: list[dict[str, Any]], most: int) -> str:
    """The page: images by class, the least sure first.

    Args:
        title, line: what predicted, and what it found.
        rows: of predictions.csv.
        most: images shown; of more, the least sure.
    """
    shown = sorted(rows, key=lambda row: row["probability"])[:most]
    groups: dict[str, list[str]] = {}
    for row in sorted(shown, key=lambda row: (row["class"], row["probability"])):
        groups.setdefault(row["class"], []).append(_figure(row))
    parts = [
        f"<h2>{escape(name)} <small>{len(found)}</small></h2>\n<div class='images'>\n{''.join(found)}</div>"
        for name, found in groups.items()
    ]
    left = f"<p>The {most} least sure of {len(rows)} images.</p>" if len(rows) > most else ""
    head = f"<meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>"
    body = "\n".join([f"<h1>{escape(title)}</h1><p>{escape(line)}</p>{left}", *parts])
    return f"<!doctype html>\n<html><head>{head}</head>\n<body>\n{body}\n</body></html>\n"


def _figure(row: dict[str, Any]) -> str:
    others = [f"{escape(row[f'class_{n}'])} {row[f'probability_{n}']:.0%}" for n in (2, 3) if f"class_{n}" in row]
    return (
        f"<figure><img src='data:image/jpeg;base64,{_thumbnail(row['file'])}' loading='lazy'>"
        f"<div class='bar'><div style='width:{row['probability']:.0%}'></div></div>"
        f"{row['probability']:.1%} <small>{', '.join(others)}</small><br>{escape(row['file'])}</figure>\n"
    )


def _thumbnail(file: str) -> str:
    encoded = io.BytesIO()
    try:
        image = read_image(file)
    except UnreadableImage:  # as colours: the model saw other channels
        image = Image.new("RGB", (SIDE, SIDE), "grey")
    image.thumbnail((SIDE, SIDE))
    image.save(encoded, "JPEG", quality=80)
    return base64.b64encode(encoded.getvalue()).decode()
