"""Drawing as SVG text: the same numbers give the same bytes, text stays text, and it is legible on a phone."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

COLOURS = {"safetensors": "#444444", "gguf": "#1f6fb4", "onnx": "#2c8a2c", "gptq": "#c4271f"}
OTHER = "#7d55a8"
WIDTH_IN = 4.2  # about a phone's width, so its text is not made smaller there
ROW_IN = 0.43
FEW = 40  # samples that are drawn as larger dots
GAP = 1.5  # points left free round a name
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "edgeft", "font.family": "sans-serif", "font.size": 8.5, "text.parse_math": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True,
}  # fmt: skip
Box = tuple[float, float, float, float]  # left, bottom, right, top


@contextmanager
def style() -> Iterator[None]:
    """The look of all plots; a name in a script that the measuring font lacks is no news."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def figure(height_in: float) -> Any:
    """An empty figure of the common width, to be made and kept within `style`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    FigureCanvasAgg(made)
    return made


def svg(made: Any) -> str:
    """A figure as an SVG element without metadata, its numbers to a hundredth of a point."""
    text = io.StringIO()
    made.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    found = text.getvalue()
    found = re.sub(r"<metadata>.*?</metadata>\s*", "", found[found.index("<svg") :], flags=re.DOTALL)
    found = re.sub(r'<g id="[A-Za-z0-9_.]+_\d+">', "<g>", found)
    short = re.compile(r"(\d\.\d\d)\d+")
    return re.sub(r'\b(?:d|x|y|transform)="[^"]*"', lambda m: short.sub(r"\1", m[0]), found).strip()


def colour(result: dict[str, Any]) -> str:
    """The colour of a result's format."""
    return COLOURS.get(result.get("format") or "", OTHER)


def fitted(name: str, most: int) -> str:
    """A name on one line, its middle left out where it is longer than `most` characters."""
    name = " ".join(name.split())
    keep = most - 1
    return name if len(name) <= most else f"{name[: keep // 2]}…{name[-(keep - keep // 2) :]}"


def named_rows(names: Sequence[str], figures: Sequence[str], panels: int = 1) -> tuple[Any, list[Any]]:
    """A figure with a row a model: its name and figures stand over the row; `at(i)` is where to draw in it."""
    made = figure(0.55 + ROW_IN * len(names))
    axes = list(made.subplots(1, panels, squeeze=False)[0])
    for each in axes:
        each.set(ylim=(len(names), 0), yticks=[], facecolor="none")
        each.spines["left"].set_visible(panels == 1)
    room = 54 - max((len(text) for text in figures), default=0)
    for i, (name, text) in enumerate(zip(names, figures, strict=True)):
        for each, x, words, side in (
            (axes[0], 0.008, fitted(name, room), "left"),
            (axes[-1], 1.0, text, "right"),
        ):
            each.text(
                x, i + 0.42, words, transform=each.get_yaxis_transform(), ha=side, va="bottom",
                color="#222" if side == "left" else "#444", fontsize=8.5 if side == "left" else 7.8, in_layout=False,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            )  # fmt: skip
    return made, axes


def at(row: int) -> float:
    """The height at which a row's bar or dots stand, under its name."""
    return row + 0.68


def dots(axes: Any, xs: Sequence[float], row: int, ink: str) -> None:
    """Samples as dots of one path, spread over the row's height in a fixed way so that they don't hide each other."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    spread = [at(row) + 0.3 * ((i * 0.618034) % 1 - 0.5) for i in range(len(xs))]
    corners = [(x, y) for x, y in zip(xs, spread, strict=True) for _ in (0, 1)]
    path = Path(corners, [Path.MOVETO, Path.LINETO] * len(xs))
    path.should_simplify = False
    wide, alpha = (4.0, 0.7) if len(xs) <= FEW else (2.4, 0.45)
    axes.add_patch(PathPatch(path, fill=False, edgecolor=ink, lw=wide, alpha=alpha, capstyle="round"))


def names_beside(made: Any, axes: Any, spots: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Write each name beside its point, clear of other names, of points and of the frame; a line leads to one further off."""
    made.draw_without_rendering()
    made.set_layout_engine("none")
    scale = 72 / made.dpi
    where = [tuple(scale * v for v in axes.transData.transform(spot)) for spot in spots]
    frame = axes.get_window_extent()
    room: Box = tuple(scale * v for v in (frame.x0, frame.y0, frame.x1 + 4, frame.y1))
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in where]
    for i in sorted(range(len(names)), key=lambda i: -where[i][1]):
        probe = axes.text(0, 0, names[i])
        extent = probe.get_window_extent()
        probe.remove()
        wide, high = scale * extent.width, scale * extent.height
        dx, dy = _free_place(where[i], (wide, high), taken, room)
        x, y = where[i][0] + dx, where[i][1] + dy
        taken.append((x - GAP, y - GAP, x + wide + GAP, y + high + GAP))
        far = max(abs(dy + high / 2), max(dx, -dx - wide)) > 14
        axes.annotate(
            names[i], spots[i], xytext=(dx, dy), textcoords="offset points", zorder=4, in_layout=False,
            va="bottom", arrowprops={"arrowstyle": "-", "color": "#777", "lw": 0.6, "shrinkB": 3} if far else None,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.4},
        )  # fmt: skip


def _free_place(
    spot: tuple[float, ...], size: tuple[float, float], taken: Sequence[Box], room: Box
) -> tuple[float, float]:
    """The nearest offset of a name's lower left corner at which it covers least."""
    (x, y), (wide, high) = spot, size
    heights = sorted((12.0 * step / 2 for step in range(-24, 25)), key=abs)
    tries = [
        (dx, dy - high / 2)
        for dy in heights
        for dx in (
            (7, -7 - wide) if abs(dy) < 11 else (7, -7 - wide, -wide / 2, 20, -20 - wide, 40, -40 - wide)
        )
    ]

    def cost(offset: tuple[float, float]) -> float:
        box = (x + offset[0], y + offset[1], x + offset[0] + wide, y + offset[1] + high)
        outside = max(0, room[0] - box[0]) + max(0, box[2] - room[2]) + max(0, room[1] - box[1])
        outside += max(0, box[3] - room[3])
        away = abs(offset[1] + high / 2) + max(offset[0], -offset[0] - wide, 0)
        return 20 * outside * high + 10 * sum(_overlap(box, other) for other in taken) + away

    return min(tries, key=cost)


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
