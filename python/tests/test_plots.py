"""Pictures: that what was measured is in them, where it should be."""

import importlib.util
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from vllm_bridge.errors import BridgeError
from vllm_bridge.tools import plots
from vllm_bridge.tools.plots import Panel, PlotParams, Series

SVG = "{http://www.w3.org/2000/svg}"


def picture(*panels: Panel, format: str = "svg") -> bytes:
    return plots._plot(PlotParams("Speed", list(panels), format))


def axes_of(*panels: Panel) -> list[Any]:
    return plots.draw("Speed", list(panels)).axes


def texts(svg: bytes) -> list[str]:
    tree = ElementTree.fromstring(svg)  # noqa: S314 - of our own making
    return ["".join(text.itertext()) for text in tree.iter(f"{SVG}text")]


def test_lines_are_where_the_values_are_with_their_spread() -> None:
    one = Series("one", [0, 1], [10, 30], [9, 20], [12, 31])
    two = Series("two", [0, 1], [5, 8])
    panel = Panel("Tokens", "lines", [one, two], x="at a time", categories=["1", "16"], baseline=7)
    [axes] = axes_of(panel)
    lines = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() in ("o", "s")]
    assert lines == [[[0, 10], [1, 30]], [[0, 5], [1, 8]]]
    assert [7, 7] in [list(line.get_ydata()) for line in axes.lines]
    spread = axes.collections[0].get_segments()
    assert [bar.tolist() for bar in spread] == [[[0, 9], [0, 12]], [[1, 20], [1, 31]]]
    assert axes.get_ylim() == pytest.approx((0, 1.1 * 31))
    found = texts(picture(panel))
    assert {"Speed", "Tokens", "at a time", "1", "16", "one", "two"} <= set(found)


def test_bars_stand_side_by_side_with_their_numbers() -> None:
    series = [Series("a", [0], [1500]), Series("b", [0], [0.25]), Series("c", [], [])]
    [axes] = axes_of(Panel("Rate", "bars", series, categories=["16"]))
    assert [bar.get_height() for bar in axes.patches] == [1500, 0.25]
    left, right = (bar.get_x() + bar.get_width() / 2 for bar in axes.patches)
    assert left == pytest.approx(-right) == pytest.approx(-0.2)
    assert [text.get_text() for text in axes.texts] == ["1,500", "0.25"]


def test_sizes_have_units_and_logarithmic_axes_whole_powers() -> None:
    dots = [Series("q4", [2.5e9], [0.02]), Series("q8", [4e9], [0.03])]
    over = Panel("KL", "dots", dots, unit_x="B", log_y=True)
    bars = Panel("Size", "bars", [Series("q4", [0], [2.5e9]), Series("q8", [0], [4e9])], unit_y="B")
    grown = Panel("Growth", "lines", [Series("q4", [1, 1000], [5, 6])], log_x=True)
    dotted, barred, _lined = axes_of(over, bars, grown)
    assert dotted.get_ylim() == pytest.approx((0.01, 0.1))
    # The same model looks the same everywhere.
    assert dotted.lines[1].get_color() == barred.patches[1].get_facecolor()
    found = texts(picture(over, bars, grown))
    assert {"0.01", "0.1", "2.5 GB", "4.0 GB", "1", "10", "100", "1,000"} <= set(found)


def test_names_are_taken_as_they_are() -> None:
    names = ["_a $x_1$ <b> & c", "\x01\\alpha"]
    panel = Panel("", "lines", [Series(name, [0], [1]) for name in names])
    assert texts(picture(panel))[-2:] == ["_a $x_1$ <b> & c", " \\alpha"]


def test_long_names_and_titles_find_room() -> None:
    names = [
        "requests that wait beside it",
        "a model with a name of sixty characters, which is quite long",
    ]
    panel = Panel("", "lines", [Series(name, [0], [1]) for name in names])
    figure: Any = plots.draw("CPU of a call, over how many there are, " * 3, [panel])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in (*figure.legends, *figure.texts)]
    assert len(boxes) == 2
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_of_nothing_there_is_a_title_alone() -> None:
    empty = Panel("Ratio", "lines", [Series("one", [], [])])
    assert texts(picture(empty)) == texts(picture()) == ["Speed"]


def test_many_points_and_bars_are_left_without_what_would_hide_them() -> None:
    steps = [float(step) for step in range(100)]
    bars = [Series(str(n), [0], [n]) for n in range(1, 13)]
    panels = [Panel("", "lines", [Series("loss", steps, steps)]), Panel("", "bars", bars)]
    lines, many = axes_of(*panels)
    assert lines.lines[0].get_marker() == ""
    assert {text.get_rotation() for text in many.texts} == {90}
    assert len({bar.get_facecolor() for bar in many.patches}) == 12


@pytest.mark.parametrize(
    ("format", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")]
)
def test_the_same_figures_make_the_same_file(format: str, start: bytes) -> None:
    # The ids of clips and markers are an SVG's own.
    panels = [Panel("", "lines", [Series("one", [0, 1], [1, 2])])] if format == "svg" else []
    first = picture(*panels, format=format)
    assert first.startswith(start)
    assert picture(*panels, format=format) == first
    assert not re.search(rb"CreationDate|dc:date|20\d\d-", first)


def test_a_format_that_there_is_not_is_refused() -> None:
    with pytest.raises(BridgeError, match="`jpg`") as caught:
        picture(format="jpg")
    assert caught.value.reason == "invalid_option"
    assert caught.value.remedy == "Take one of `svg`, `png`, `pdf`."


def test_without_matplotlib_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    lacking: Any = lambda name: None if name == "matplotlib" else find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", lacking)
    with pytest.raises(BridgeError) as caught:
        picture()
    assert caught.value.reason == "vllm_not_installed"
    assert caught.value.details == {"missing": ["matplotlib"], "extra": "matplotlib"}
    assert caught.value.remedy == "Run `mix vllm.setup --with matplotlib`."
