"""Pictures of figures, drawn by matplotlib.

What is drawn is said by Elixir, which knows what the figures mean; how it looks is said here. The
same figures make the same file: nothing in it says when it was made, and what matplotlib is told by
a user's own files does not count.
"""

import asyncio
import importlib.util
import io
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from vllm_bridge.errors import BridgeError
from vllm_bridge.rpc.call import Call

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Also the name by which `mix vllm.setup --with` knows it.
PACKAGE: Final = "matplotlib"

# What each kind of file would say of its making.
FORMATS: Final[dict[str, dict[str, None]]] = {
    "svg": {"Creator": None, "Date": None},
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
}

# A white ground reads on light and dark pages alike. Texts stay texts, and are no formulas.
STYLE: Final[dict[str, Any]] = {
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.facecolor": "white",
    "figure.titlesize": "large",
    # The one that matplotlib brings: the others would be named with each text.
    "font.sans-serif": ["DejaVu Sans"],
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
    "lines.markersize": 5,
    "pdf.fonttype": 42,
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    "svg.hashsalt": "vllm",
    "text.parse_math": False,
}

# One who does not tell colours apart has the markers.
MARKERS: Final = "os^Dv<>P"

# Of a panel: one alone has the width of the title and the legend.
INCHES, ALONE = (5.0, 3.6), (8.0, 4.5)

# How many characters of the title and of the legend go into an inch.
TITLE_TO_INCH, LEGEND_TO_INCH = 10, 12

NUMBER: Final = "{x:,.10g}"  # at an axis

# More than these would be a single thick line, or numbers over each other.
MANY_MARKERS, MANY_BARS = 40, 6


class Series(msgspec.Struct, forbid_unknown_fields=True):
    """What belongs together: a line, or dots or bars of a colour.

    Args:
        label: its name in the legend, and what decides about its colour
        low: from where to where a value is sure, or otherwise spread; empty where nothing is known
    """

    label: str
    x: list[float]
    y: list[float]
    low: list[float] = []
    high: list[float] = []


class Panel(msgspec.Struct, forbid_unknown_fields=True):
    """A system of axes. One in which nothing is to be seen is left out.

    Args:
        categories: what the values 0, 1, … of x are called, where x is not a number
        unit_x: of the numbers at the axis: ``B`` has them written as kB and GB
        baseline: a value of y that all others are to be seen against
    """

    title: str
    kind: Literal["lines", "dots", "bars"]
    series: list[Series]
    x: str = ""
    y: str = ""
    categories: list[str] = []
    log_x: bool = False
    log_y: bool = False
    unit_x: str = ""
    unit_y: str = ""
    baseline: float | None = None


class PlotParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``plot``; see guides/protocol.md."""

    title: str
    panels: list[Panel]
    format: str = "svg"


async def plot(_call: Call, params: PlotParams) -> bytes:
    """The picture, as the bytes of its file."""
    return await asyncio.to_thread(_plot, params)


def _plot(params: PlotParams) -> bytes:
    if params.format not in FORMATS:
        known = ", ".join(f"`{name}`" for name in FORMATS)
        raise BridgeError(
            "invalid_option",
            f"There are no pictures of the format `{params.format}`.",
            {"option": "format", "allowed": list(FORMATS)},
            remedy=f"Take one of {known}.",
        )
    if importlib.util.find_spec(PACKAGE) is None:
        raise BridgeError(
            "vllm_not_installed",
            f"Pictures are drawn by {PACKAGE}, which is not installed.",
            {"missing": [PACKAGE], "extra": PACKAGE},
            remedy=f"Run `mix vllm.setup --with {PACKAGE}`.",
        )
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]):
        file = io.BytesIO()
        draw(params.title, params.panels).savefig(
            file, format=params.format, metadata=FORMATS[params.format]
        )
        return file.getvalue()


def draw(title: str, panels: Sequence[Panel]) -> "Figure":
    """The picture, with two panels in a row."""
    from matplotlib.figure import Figure

    panels = [panel for panel in panels if any(series.x for series in panel.series)]
    labels = list(dict.fromkeys(series.label for panel in panels for series in panel.series))
    columns, rows = min(len(panels), 2) or 1, (len(panels) + 1) // 2 or 1
    width, height = INCHES if len(panels) > 1 else ALONE
    size = (width * columns, height * rows + 0.2 * len(labels))
    figure = Figure(figsize=size, layout="constrained")
    lines = textwrap.fill(_text(title), int(TITLE_TO_INCH * size[0]))
    figure.suptitle(lines, x=0.01, horizontalalignment="left")
    for place, panel in enumerate(panels):
        _panel(figure.add_subplot(rows, columns, place + 1), panel, labels)
    if len(labels) > 1:
        _legend(figure, labels)
    return figure


def _panel(axes: "Axes", panel: Panel, labels: list[str]) -> None:
    axes.set_title(_text(panel.title))
    axes.set_xlabel(_text(panel.x))
    axes.set_ylabel(_text(panel.y))
    axes.set_axisbelow(True)
    present = [series for series in panel.series if series.x]
    for place, series in enumerate(present):
        if panel.kind == "bars":
            _bars(axes, series, panel.unit_y, labels, place, len(present))
        else:
            _marks(axes, series, labels, joined=panel.kind == "lines")
    if panel.baseline is not None:
        axes.axhline(panel.baseline, color="#666666", linewidth=1, linestyle="--")
    _scales(axes, panel)


def _scales(axes: "Axes", panel: Panel) -> None:
    from matplotlib.ticker import EngFormatter, StrMethodFormatter

    if panel.kind == "bars" or panel.categories:
        axes.set_xticks(range(len(panel.categories)), map(_text, panel.categories))
        axes.grid(visible=False, axis="x")
        axes.set_xlim(-0.5, max(len(panel.categories), 1) - 0.5)
    else:
        if panel.log_x:
            axes.set_xscale("log")
        else:
            axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(
            EngFormatter(panel.unit_x) if panel.unit_x else StrMethodFormatter(NUMBER)
        )
    if panel.log_y:
        axes.set_yscale("log")
        # Two powers of ten at least are seen, for they are what has a number.
        low, high = axes.dataLim.minposy, axes.dataLim.ymax
        axes.set_ylim(10 ** math.floor(math.log10(low)), 10 ** (math.floor(math.log10(high)) + 1))
    else:
        # What is twice as high is twice as much, and the numbers above have room.
        room = 1.3 if panel.kind == "bars" and len(axes.patches) > MANY_BARS else 1.1
        axes.set_ylim(0, room * max(axes.dataLim.ymax, 1e-9))
    axes.yaxis.set_major_formatter(
        EngFormatter(panel.unit_y) if panel.unit_y else StrMethodFormatter(NUMBER)
    )
    axes.minorticks_off()


def _marks(axes: "Axes", series: Series, labels: list[str], joined: bool) -> None:
    place = labels.index(series.label)
    axes.errorbar(
        series.x,
        series.y,
        yerr=_spread(series),
        color=_colour(place, labels),
        marker=MARKERS[place % len(MARKERS)] if len(series.x) <= MANY_MARKERS else "",
        linestyle="-" if joined else "",
        elinewidth=1,
        capsize=3,
    )


def _bars(
    axes: "Axes", series: Series, unit: str, labels: list[str], place: int, count: int
) -> None:
    """The bars of a series, beside those of the others, of which there are ``count``."""
    width = 0.8 / count
    bars = axes.bar(
        [x + width * (place - (count - 1) / 2) for x in series.x],
        series.y,
        width=0.9 * width,
        color=_colour(labels.index(series.label), labels),
        yerr=_spread(series),
        error_kw={"elinewidth": 1, "capsize": 3},
    )
    axes.bar_label(
        bars,
        labels=[_number(y, unit) for y in series.y],
        padding=2,
        fontsize="small",
        rotation=90 if count * len(series.y) > MANY_BARS else 0,
    )


def _spread(series: Series) -> list[list[float]] | None:
    if not series.low:
        return None
    return [
        [max(y - low, 0.0) for y, low in zip(series.y, series.low, strict=True)],
        [max(high - y, 0.0) for y, high in zip(series.y, series.high, strict=True)],
    ]


def _legend(figure: "Figure", labels: list[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=_colour(place, labels), marker=MARKERS[place % len(MARKERS)])
        for place in range(len(labels))
    ]
    # Half of the width, but for the mark before a label.
    room = LEGEND_TO_INCH * (figure.get_figwidth() / 2 - 0.6)
    columns = 1 if max(map(len, labels)) > room else 2
    texts = [_text(label) for label in labels]
    figure.legend(handles, texts, loc="outside lower left", ncols=columns)


def _colour(place: int, labels: list[str]) -> Any:
    from matplotlib import colormaps

    colours: Any = colormaps["tab10" if len(labels) <= 10 else "tab20"]
    return colours(place % colours.N)


def _number(value: float, unit: str) -> str:
    from matplotlib.ticker import EngFormatter

    if unit:
        return str(EngFormatter(unit, places=1)(value))
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _text(text: str) -> str:
    """A text that can stand in any file: SVG has no control characters."""
    return "".join(char if char.isprintable() else " " for char in text)


METHODS: dict[str, Any] = {"plot": (PlotParams, plot)}
