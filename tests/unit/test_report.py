"""Report: values, JSON, Markdown, one HTML file."""

from __future__ import annotations

import html.parser
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty.budget import Budget
from thrifty.cost import Cost
from thrifty.deploy.program import Buffer, Call, Plan, Program
from thrifty.errors import DataError, StoreError
from thrifty.report import Block, Candidate, Layer, Memory, Parity, Report, Table, pictures, svg, write_text

EVIL = "<script>alert('x')</script>|`&\"]]>"


def full_report() -> Report:
    report = Report(
        f"optimize {EVIL}", Budget(flash_bytes=65536, ram_bytes=40000, instructions=10**7, max_drop=0.01),
        target="cortex-m4", seed=3, metric="accuracy",
    )  # fmt: skip
    report.add(
        "start", Cost(params=9000, flash_bytes=250_000, ram_bytes=80_000, instructions=5 * 10**7, macs=10**6), 0.98
    )
    report.add(
        "prune 0.5", Cost(params=4000, macs=4 * 10**5), 0.97, 1.25, {"ratio": np.float64(0.5), "keep": ("a",)}, "cut"
    )
    final = Cost(params=4000, flash_bytes=16_000, ram_bytes=5_000, instructions=10**6, macs=4 * 10**5)
    report.add("deploy", final, 0.975, host_us=812.0)
    for i in range(12):
        cost = Cost(flash_bytes=9000 * (i + 1), ram_bytes=4000 + 100 * i, instructions=10**5 * (i + 1))
        score = 0.1 if i == 5 else 0.95 + 0.002 * i
        report.candidates.append(Candidate(f"{EVIL} {i}", cost, "", score, i < 3, i % 3 == 0, i == 1))
    report.candidates.append(Candidate("broken", Cost(), error=f"Incompatible {EVIL}"))
    report.layers = [
        Layer(f"conv{i}", EVIL, "conv", (8, 4, 4), 1000 * i, 10 * i, None if i == 2 else 5000, error, 0.01 * i)
        for i, error in enumerate((31.5, math.inf, None, -math.inf))
    ]
    blocks = (Block(EVIL, 0, 600, 0, 1), Block("b", 600, 400, 1, 2), Block("scratch of conv1", 0, 100, 2, 2))
    report.memory = Memory(blocks, 1000, 980, ("conv0", "conv1", EVIL))
    report.parity = Parity({"program": 100, "host C": 100}, {"host C": 0})
    report.tables.append(Table(EVIL, ("layer", EVIL), [("conv", 0.25), (EVIL, None)], EVIL))
    report.notes.append(EVIL)
    report.files = {"C project": "c", EVIL: "javascript:alert(1)"}
    report.test_scores = (0.981, 0.976)
    return report


def test_the_verdict_uses_the_last_row_and_the_test_split():
    report = full_report()
    assert report.cost.flash_bytes == 16_000
    assert report.score_drop == pytest.approx(0.005)
    assert report.verdict.startswith("within budget: flash 16 of 64 KiB")
    report.test_scores = None
    assert report.score_drop == pytest.approx(0.98 - 0.975)


def test_bytes_that_differ_on_an_engine_are_never_within_budget():
    report = full_report()
    report.parity = Parity({"program": 9, "host C": 9}, {"host C": 2})
    assert not report.within_budget
    assert report.verdict.startswith("NOT equal on all engines: host C differs on 2")


def test_json_round_trip_keeps_every_value():
    report = full_report()
    again = Report.from_json(report.to_json())
    assert again.to_json() == report.to_json()
    assert (again.budget, again.memory, again.layers, again.candidates) == (
        report.budget, report.memory, report.layers, report.candidates,
    )  # fmt: skip


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_round_trip(value):
    report = Report(environment={})
    report.add("start", Cost(energy_uj=value), score=value, knobs={"x": value})
    again = Report.from_json(report.to_json())
    assert again.rows[0].score == value
    assert again.rows[0].cost.energy_uj == value


def test_nan_is_refused_with_its_place():
    report = Report()
    report.add("start", Cost(), score=math.nan)
    with pytest.raises(DataError, match=r"report\.rows\[0\]\.score"):
        report.to_json()


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "no report"), ("[]", "no report"), ('{"schema": 99}', "schema 99"), ('{"schema": 1}', "damaged")],
)
def test_what_is_no_report_is_refused(text, words):
    with pytest.raises(DataError, match=words):
        Report.from_json(text)


def test_unknown_entries_are_refused():
    values = json.loads(full_report().to_json()) | {"surprise": 1}
    with pytest.raises(DataError, match="surprise"):
        Report.from_json(json.dumps(values))


class _Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


def test_the_page_needs_nothing_else_and_runs_nothing():
    page = full_report().to_html()
    reader = _Reader()
    reader.feed(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name == "src"]
    targets = [value for name, value in reader.attributes if name == "href"]
    assert targets
    assert not [t for t in targets if ":" in t.lower()]
    assert "url(" not in page
    assert "@import" not in page


def test_names_from_outside_are_escaped_everywhere():
    report = full_report()
    assert "<script" not in report.to_html()
    assert "<script" not in report.to_markdown()


def test_each_picture_is_valid_xml_with_a_text_alternative():
    page = full_report().to_html()
    drawn = [ET.fromstring(text) for text in re.findall(r'<svg viewBox="0 0 \d+ \d+" style.*?</svg>', page, re.DOTALL)]
    assert len(drawn) == 6  # three scatters, layers, errors, memory
    for picture in drawn:
        assert picture.get("role") == "img"
        names = (picture.get("aria-labelledby") or "").split()
        assert [picture.find(f"*[@id='{name}']") is not None for name in names] == [True, True]


def test_marks_stay_inside_the_picture():
    report = full_report()
    for drawn in pictures.scatters(report):
        for circle in ET.fromstring(drawn).iter("circle"):
            assert pictures.LEFT - 1 <= float(circle.get("cx")) <= pictures.RIGHT + 1
            assert pictures.TOP - 1 <= float(circle.get("cy")) <= pictures.BOTTOM + 1


def test_a_recipe_far_below_the_rest_does_not_flatten_the_picture():
    drawn = pictures.scatter(full_report(), "flash_bytes")
    assert "1 below the shown scores" in drawn
    assert "0.10" not in re.findall(r'class="tick end">([^<]+)<', drawn)


def test_an_empty_report_is_still_a_page():
    report = Report("nothing")
    assert "<svg" not in report.to_html()
    assert "# nothing" in report.to_markdown()
    assert Report.from_json(report.to_json()).rows == []


def test_one_candidate_and_equal_numbers_can_be_drawn():
    report = Report("one")
    report.candidates = [Candidate("only", Cost(flash_bytes=100, ram_bytes=0), score=0.5, chosen=True)] * 2
    assert len(pictures.scatters(report)) == 2


@pytest.mark.parametrize("unit", ["B", "", "score", "dB"])
@given(low=st.floats(1e-3, 1e9), ratio=st.floats(1.0001, 1e6))
def test_ticks_are_few_and_inside_the_axis(unit, low, ratio):
    axis = svg.axis_over([low, low * ratio], 0, 300, unit)
    ticks = axis.ticks(5)
    assert 1 <= len(ticks) <= 12
    assert all(axis.low * (1 - 1e-9) <= value <= axis.high * (1 + 1e-9) for value, _ in ticks)
    pixels = [axis.at(value) for value, _ in ticks]
    assert pixels == sorted(pixels)


def test_the_memory_plan_of_a_program():
    buffers = {name: Buffer(name, (1, 1, 8), "int8") for name in ("input", "a_out")}
    program = Program("m", buffers, (Call("conv", "a", ("input",), "a_out"),), "input", "a_out")
    plan = Plan({"input": 0, "a_out": 8, "a": 16}, 24, 24, {"input": (0, 0), "a_out": (0, 0), "a": (0, 0)},
                {"input": 8, "a_out": 8, "a": 8})  # fmt: skip
    memory = Memory.from_plan(plan, program)
    assert [b.name for b in memory.blocks] == ["input", "a_out", "scratch of a"]
    assert "scratch of a" in pictures.memory_plan(memory)


def test_write_makes_three_files_and_leaves_nothing_else(tmp_path):
    path = full_report().write(tmp_path / "deep" / "out")
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json", "report.md"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / "x", "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StoreError, match="No space left"):
        write_text(tmp_path / "x", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        full_report().write(tmp_path / "file")


def test_the_report_loads_without_torch():
    code = "import sys, thrifty.report; thrifty.report.Report().to_html(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
