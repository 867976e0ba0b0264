"""Budget: how limits are written, checked and told."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty.budget import Budget, format_bytes, format_count, parse_bytes, parse_count, parse_drop
from thrifty.cost import Cost
from thrifty.errors import KnobError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64KiB", 65536),
        ("64 KB", 64000),
        ("1.5MiB", 1572864),
        ("300", 300),
        ("300 b", 300),
        ("1e3", 1000),
        (".5KiB", 512),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "KiB", "-3", "0", "64 pounds", "1..2KiB", "nan", "inf", "1e99GiB", "0x10"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(KnobError, match="size"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["64K", "64k", "2M"])
def test_an_ambiguous_size_names_both_meanings(text):
    with pytest.raises(KnobError, match=r"iB \(1024\) or .*B \(1000\)"):
        parse_bytes(text)


@pytest.mark.parametrize(("text", "count"), [("1.5M", 1_500_000), ("20k", 20_000), ("7_000", 7000), ("1G", 10**9)])
def test_counts(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["1KiB", "x", "-1", "0"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(KnobError, match="count"):
        parse_count(text)


@pytest.mark.parametrize(("text", "drop"), [("1%", 0.01), ("0.5pt", 0.005), ("0.02", 0.02), ("0", 0.0), ("1 %", 0.01)])
def test_drops(text, drop):
    assert parse_drop(text) == pytest.approx(drop)


@pytest.mark.parametrize("text", ["1 percent", "-1%", ""])
def test_what_is_no_drop_is_refused(text):
    with pytest.raises(KnobError, match="score drop"):
        parse_drop(text)


@given(st.integers(1, 2**40))
def test_a_written_size_reads_back_within_its_digits(size):
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.006)


@given(st.integers(1, 10**14))
def test_a_written_count_reads_back_within_its_digits(count):
    assert parse_count(format_count(count)) == pytest.approx(count, rel=0.006)


@pytest.mark.parametrize(
    "knobs",
    [
        {"flash_bytes": 0},
        {"ram_bytes": -1},
        {"macs": 1.5},
        {"params": True},
        {"max_drop": -0.1},
        {"max_drop": math.nan},
    ],
)
def test_limits_outside_their_range_are_refused(knobs):
    with pytest.raises(KnobError, match=next(iter(knobs))):
        Budget(**knobs)


def test_all_violations_are_given_at_once_with_how_far():
    budget = Budget(flash_bytes=65536, ram_bytes=16384, instructions=1000, macs=10, params=5, max_drop=0.01)
    cost = Cost(flash_bytes=70000, ram_bytes=16384, instructions=999, macs=11, params=6)
    found = {v.limit: v.over for v in budget.check(cost, 0.03)}
    assert found == {"flash": 4464, "MACs": 1, "params": 1, "score": pytest.approx(0.02)}


def test_what_was_not_measured_is_not_within_budget():
    (violation,) = Budget(flash_bytes=100).check(Cost(macs=3))
    assert violation.actual is None
    assert violation.over is None
    assert str(violation) == "flash not measured; the limit is 100 B"
    assert Budget(flash_bytes=100).excess(Cost()) == 0


def test_nan_is_never_within_budget():
    assert Budget(max_drop=0.5).check(Cost(), math.nan)


def test_a_drop_of_exactly_the_limit_is_within():
    assert not Budget(max_drop=0.01).check(Cost(), 0.98 - 0.97)
    assert not Budget(max_drop=0.0).check(Cost(), 0.0)
    assert Budget(max_drop=0.0).check(Cost(), 1e-4)


def test_excess_ranks_the_nearest():
    budget = Budget(flash_bytes=100, ram_bytes=100)
    assert budget.excess(Cost(flash_bytes=150, ram_bytes=90)) == pytest.approx(0.5)
    assert budget.excess(Cost(flash_bytes=120, ram_bytes=120)) == pytest.approx(0.4)
    assert budget.excess(Cost(flash_bytes=100, ram_bytes=1)) == 0


def test_the_line_of_truth():
    budget = Budget(flash_bytes=65536, ram_bytes=16384, max_drop=0.01)
    within = budget.verdict(Cost(flash_bytes=16384, ram_bytes=5000), 0.008)
    assert within == "within budget: flash 16 of 64 KiB, ram 4.9 of 16 KiB, score -0.008"
    outside = budget.verdict(Cost(flash_bytes=100_000, ram_bytes=5000), 0.031)
    assert outside == "NOT within budget: flash 98 of 64 KiB, ram 4.9 of 16 KiB, score -0.031 (limit -0.01)"
    assert Budget(max_drop=0.0).verdict(Cost(), 0.002, "test") == "NOT within budget: score -0.002 on test (limit 0)"
    assert Budget().verdict(Cost(flash_bytes=2048), -0.002) == "no limit was set: flash 2 KiB, score +0.002"
    assert Budget().verdict(Cost()) == "no limit was set"


@given(st.integers(1, 10**8), st.integers(-3, 3))
def test_the_line_never_rounds_to_the_wrong_side(limit, beyond):
    size = max(1, limit + beyond)
    line = Budget(flash_bytes=limit).verdict(Cost(flash_bytes=size))
    shown, allowed = (float(part.split()[0]) for part in line.split("flash ")[1].split(" of "))
    assert (shown > allowed) == (size > limit) or abs(shown - allowed) < 1e-5 * allowed
    assert line.startswith("NOT") == (size > limit)
