"""Heat maps as images inside the page, whose colours suit a light and a dark page."""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode
from collections.abc import Callable, Sequence

from deepseek_v3.charts.markup import Html, element, image

_LEVELS = 100  # of colour on each side of the middle
_BELOW, _ABOVE, _NOTHING = (46, 125, 209), (232, 119, 26), (190, 30, 40)
_DEAD = 2 * _LEVELS + 1  # the index of the colour of 0
_ROW_PIXELS = 3, 14  # the least and most pixels of a row
_HEIGHT = 160  # pixels that the rows share


def load_map(title: str, caption: str, rows: Sequence[Sequence[float]], row_name: Callable[[int], str]) -> Html:
    """A heat map with a row for each of `rows` and a column for each value, as ratios to a middle of 1.

    Values below 1 are blue, the more the further below; values above are orange, fullest from 3 on; 0 is red. At 1
    the page shows through. `row_name` names the first and the last row.
    """
    pixels = [bytes(_level(value) for value in row) for row in rows]
    height = len(rows) * min(max(_HEIGHT // max(len(rows), 1), _ROW_PIXELS[0]), _ROW_PIXELS[1])
    source = f"data:image/png;base64,{b64encode(_png(pixels)).decode()}"
    picture = image(source, f"{title}. {caption}", class_="heat", style=f"height: {height}px")
    names = element("div", element("span", row_name(0)), element("span", row_name(len(rows) - 1)), class_="rows")
    return element(
        "figure",
        element("h4", title),
        element("div", names, picture, class_="heat-map"),
        element("figcaption", caption),
    )


def heat_legend() -> Html:
    """What the colours of `load_map` mean."""
    meanings = {"none": "no token", "below": "below the mean", "above": "above it, fullest from three times on"}
    keys = [
        element("span", element("i", class_=f"heat-key {name}"), f" {text}", class_="entry")
        for name, text in meanings.items()
    ]
    return element("p", *keys, class_="legend")


def _level(value: float) -> int:
    """The index of the colour of a ratio; the middle has the index _LEVELS."""
    if value <= 0:
        return _DEAD
    share = (value - 1) / 2 if value > 1 else value - 1
    return _LEVELS + round(_LEVELS * min(max(share, -1.0), 1.0))


def _png(rows: Sequence[bytes]) -> bytes:
    """A PNG of one byte per pixel, an index into the colours, whose opacity grows away from the middle."""
    shares = [abs(level - _LEVELS) / _LEVELS for level in range(2 * _LEVELS + 1)]
    colours = [_BELOW] * _LEVELS + [_ABOVE] * (_LEVELS + 1) + [_NOTHING]
    opacity = bytes(round(255 * share) for share in (*shares, 1.0))
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    chunks = [
        (b"IHDR", header),
        (b"PLTE", b"".join(map(bytes, colours))),
        (b"tRNS", opacity),
        (b"IDAT", data),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
