"""Charts of documents as Vega-Lite specifications (https://vega.github.io/vega-lite).

Rows are data, in fields called ``v0``, ``v1``, ... (the numbers of the columns) and ``t0``, ... (as
they are shown), so that nothing out of a model becomes a part of an expression. Colours are the
page's own properties, by which the same picture serves light, dark and paper.
"""

from __future__ import annotations

from typing import Any

from qkit.report.document import Chart, Table
from qkit.report.words import show

COLOURS = [f"var(--c{number})" for number in range(1, 9)]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down",
          "triangle-right", "triangle-left"]  # fmt: skip
# Pixels for a bar with its label, for the height of other charts, and the longest label.
BAR, HEIGHT, LABEL = 22, 280, 150

_TEXT = {"labelColor": "var(--ink)", "titleColor": "var(--ink)", "labelFontSize": 12,
         "titleFontSize": 12, "titleFontWeight": "normal"}  # fmt: skip
_CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": _TEXT | {"domainColor": "var(--line)", "tickColor": "var(--line)",
                     "gridColor": "var(--line)", "labelLimit": LABEL, "tickCount": 5},
    "legend": _TEXT | {"orient": "bottom", "columns": 2, "labelLimit": 2 * LABEL,
                       "symbolStrokeWidth": 2},
    "range": {"category": COLOURS, "symbol": SHAPES},
}  # fmt: skip


def vega_lite(table: Table, chart: Chart) -> dict[str, Any]:
    """The specification of ``chart``, whose numbers are those of ``table``."""
    places = [table.index(name) for name in (chart.x, chart.y, chart.by) if name is not None]
    rows = [
        {f"v{place}": row[place] for place in places}
        | {f"t{i}": show(row[i], column.kind) for i, column in enumerate(table.columns)}
        for row in table.rows[: chart.first]
        if all(_drawable(row[place], table.columns[place].kind) for place in places)
    ]
    head = {
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": rows},
        "config": _CONFIG,
    }
    return head | _KINDS[chart.kind](table, chart, len(rows))


def _drawable(value: object, kind: str) -> bool:
    """Text in place of a number has no place on its axis."""
    return kind == "text" or isinstance(value, int | float)


def _axis(table: Table, name: str, **more: Any) -> dict[str, Any]:
    """A quantitative channel of the column ``name``."""
    place = table.index(name)
    kind = table.columns[place].kind
    unit, shown = _UNITS.get(kind, ("", {}))
    axis = {"title": f"{name}{unit}"} | shown
    return {"field": f"v{place}", "type": "quantitative", "axis": axis} | more


# What stands behind the name of an axis, and how its numbers are written.
_UNITS: dict[str, tuple[str, dict[str, Any]]] = {
    "bytes": (" (bytes)", {"format": "~s"}),
    "milliseconds": (" (ms)", {}),
    "decibels": (" (dB)", {}),
    "count": ("", {"format": "~s"}),
    "share": ("", {"format": "~%"}),
}


def _name(table: Table, name: str) -> dict[str, Any]:
    return {"field": f"v{table.index(name)}", "type": "nominal", "title": None, "sort": None}


def _group(table: Table, name: str) -> dict[str, Any]:
    """A channel that tells groups apart, in the same way in all charts of the table: its scale has
    every group that one of them draws."""
    drawn = [table.index(chart.x) for chart in table.charts]
    rows = [row for row in table.rows if any(_drawable(row[x], "") for x in drawn)]
    groups = dict.fromkeys(row[table.index(name)] for row in rows)
    return _name(table, name) | {"scale": {"domain": list(groups)}}


def _hover(table: Table, names: list[str]) -> list[dict[str, Any]]:
    places = dict.fromkeys(table.index(name) for name in names)
    return [{"field": f"t{i}", "title": table.columns[i].name, "type": "nominal"} for i in places]


def _bars(table: Table, chart: Chart, count: int) -> dict[str, Any]:
    names = [column.name for column in table.columns if column.name != "why, or note"]
    encoding = {
        "y": _name(table, chart.y),
        "x": _axis(table, chart.x),
        "tooltip": _hover(table, [chart.y, *names]),
    }
    mark: dict[str, Any] = {"type": "bar", "aria": False}
    if chart.by is None:
        mark["color"] = COLOURS[0]
    else:
        encoding["color"] = _group(table, chart.by)
    return {"height": BAR * count, "mark": mark, "encoding": encoding}


def _points(table: Table, chart: Chart, count: int) -> dict[str, Any]:
    assert chart.by is not None
    by = _group(table, chart.by)
    encoding = {
        "x": _axis(table, chart.x, scale={"zero": True, "nice": True}),
        "y": _axis(table, chart.y, scale={"zero": True, "nice": True}),
        "color": by,
        "shape": by,
        "tooltip": _hover(table, [chart.by, *(column.name for column in table.columns)]),
    }
    mark = {"type": "point", "filled": True, "size": 140, "opacity": 1, "aria": False}
    return {"height": HEIGHT, "mark": mark, "encoding": encoding}


def _steps(table: Table, chart: Chart, count: int) -> dict[str, Any]:
    assert chart.by is not None
    x = _axis(table, chart.x, scale={"zero": False, "nice": False})
    hover = _hover(table, [chart.x, chart.y, chart.by])

    def outline(name: str, mark: dict[str, Any]) -> dict[str, Any]:
        y = _axis(table, name)
        y["axis"] = {"title": "share of the values per unit", "tickCount": 4}
        encoding = {"x": x, "y": y, "color": {"datum": name, "legend": {"title": None}},
                    "tooltip": hover}  # fmt: skip
        return {"mark": mark | {"interpolate": "step", "aria": False}, "encoding": encoding}

    layers = [
        outline(chart.y, {"type": "area", "opacity": 0.45}),
        outline(chart.by, {"type": "line", "strokeWidth": 2}),
    ]
    if chart.grid:
        tick = {"type": "tick", "orient": "vertical", "size": 10, "thickness": 1.5,
                "color": "var(--ink)", "aria": False}  # fmt: skip
        values = [{"level": level} for level in chart.grid]
        place = {"field": "level", "type": "quantitative"}
        layers.append({"data": {"values": values}, "mark": tick,
                       "encoding": {"x": place, "y": {"datum": 0}}})  # fmt: skip
    return {"height": HEIGHT * 2 // 3, "layer": layers}


_KINDS = {"bars": _bars, "points": _points, "steps": _steps}
