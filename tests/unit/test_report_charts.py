"""Charts of a report: drawn, escaped, inside their picture, and back from JSON."""

import re
import xml.etree.ElementTree as ET

import pytest

from thrifty.errors import DataError
from thrifty.report import Chart, Gallery, Line, Matrix, Report, Table
from thrifty.report.charts import chart, chart_rows, matrix

EVIL = "<script>alert('x')</script>&\"]]>"
CONFUSION = Matrix("Confusions", ("cat", EVIL), ("cat", EVIL, "unknown"), [[8, 2, None], [0, 5, 5]])
CURVE = Chart(
    "Forecast", "shots", "accuracy", [Line("forecast", [1, 5, 20], [60.0, 80.0, 90.0], [50.0, None, 85.0],
    [70.0, None, 95.0]), Line(EVIL, [5], [70.0])], "%", True, 90.0, 5.0, "now", EVIL,
)  # fmt: skip


def drawn(svg):
    return ET.fromstring(svg)


def texts(svg):
    return [node.text for node in drawn(svg).iter() if node.tag.endswith("text")]


def test_a_matrix_has_a_cell_for_each_number():
    svg = matrix(CONFUSION)
    shapes = [node for node in drawn(svg).iter() if node.get("class") == "cell"]
    assert len(shapes) == 6
    opacity = {
        node.get("class"): float(node.get("fill-opacity")) for node in drawn(svg).iter() if node.get("fill-opacity")
    }
    assert set(opacity) == {"cell-right", "cell-wrong"}
    titles = [node.text for node in drawn(svg).iter() if node.tag.endswith("title")]
    assert "true cat, answered cat: 8" in titles
    assert "true cat, answered unknown: –" in titles


def test_colour_is_the_share_of_the_row():
    svg = matrix(Matrix("m", ("a", "b"), ("a", "b"), [[1, 3], [40, 0]]))
    found = [float(n.get("fill-opacity")) for n in drawn(svg).iter() if n.get("fill-opacity")]
    assert found == pytest.approx([0.10 + 0.8 / 4, 0.10 + 0.8 * 3 / 4, 0.9])


def test_a_large_matrix_is_drawn_without_names():
    names = tuple(f"class {i}" for i in range(70))
    svg = matrix(Matrix("m", names, names, [[1] * 70] * 70))
    assert len(texts(svg)) == 2
    assert all(float(n.get("x", 0)) < 1100 for n in drawn(svg).iter())


def test_everything_of_a_chart_is_inside():
    svg = chart(CURVE)
    _, _, width, height = map(float, drawn(svg).get("viewBox").split())
    for node in drawn(svg).iter():
        for x, y in (("x", "y"), ("x1", "y1"), ("x2", "y2"), ("cx", "cy")):
            if node.get(x) is not None:
                assert 0 <= float(node.get(x)) <= width
                assert 0 <= float(node.get(y)) <= height
    assert [t for t in texts(svg) if t in ("1", "5", "20")] == ["1", "5", "20"]
    assert "goal 90 %" in texts(svg)


def test_a_chart_of_one_point_and_of_none():
    assert "circle" in chart(Chart("c", "x", "y", [Line("a", [3], [0.5])], log_x=True))
    assert chart(Chart("c", "x", "y", [])) == ""
    assert matrix(Matrix("m", (), (), [])) == ""


def test_a_chart_as_a_table():
    columns, rows = chart_rows(CURVE)
    assert columns == ("shots", "forecast", "from", "to", EVIL)
    assert rows[1] == ["5", 80.0, None, None, 70.0]
    assert rows[2] == ["20", 90.0, 85.0, 95.0, None]


def report():
    made = Report("r", headline="all well")
    made.charts += [CONFUSION, CURVE, Gallery("Wrong", [("/9j/AAA=", EVIL)], EVIL)]
    made.tables.append(Table("t", ("a",), [[1]]))
    return made


def test_charts_come_back_from_json():
    text = report().to_json()
    again = Report.from_json(text)
    assert again.to_json() == text
    assert again.to_html() == report_with_environment_of(again).to_html()
    assert again.charts[0] == CONFUSION


def report_with_environment_of(other):
    made = report()
    made.environment = other.environment
    return made


def test_the_headline_is_the_verdict_where_there_is_no_budget():
    assert report().verdict == "all well"
    assert "all well" in report().to_html()


def test_names_are_escaped_and_nothing_is_fetched():
    page = report().to_html()
    assert "<script" not in page
    assert len(re.findall("<svg viewBox=.0 0 \\d+ \\d+. style", page)) == 2
    assert set(re.findall(r"(?:src|href)=['\"]([^'\"]{0,22})", page)) == {"data:image/jpeg;base64"}
    assert "from" in report().to_markdown()


def test_a_chart_of_another_kind_is_refused():
    text = report().to_json().replace('"kind": "gallery"', '"kind": "pie"')
    with pytest.raises(DataError, match="pie"):
        Report.from_json(text)
