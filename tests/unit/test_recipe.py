from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty.compress import TECHNIQUES
from thrifty.errors import KnobError
from thrifty.recipe import Recipe, toml_value


@dataclass(frozen=True)
class Halve:
    ratio: float = 0.5
    keep: tuple[str, ...] = ()
    limit: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise KnobError(f"Halve.ratio is {self.ratio}; it must be in [0, 1)")

    def edit(self, model: Any, task: Any) -> Any:
        return model


@dataclass(frozen=True)
class BitTrim:
    bits: int
    layers: dict[str, int] = field(default_factory=dict)

    def edit(self, model: Any, task: Any) -> Any:
        return model


TABLE = {"halve": Halve, "bit_trim": BitTrim}


def test_round_trip():
    recipe = Recipe((Halve(0.25, ("a.b", 'c "d"')), BitTrim(4, {"conv 1": 2}), Halve()))
    text = recipe.to_toml()
    assert Recipe.from_toml(text, TABLE) == recipe
    assert text.count("ratio") == 1  # defaults are left out
    assert 'technique = "bit_trim"' in text


def test_steps_come_in_order():
    recipe = Recipe.from_toml('[[step]]\ntechnique = "bit_trim"\nbits = 3\n[[step]]\ntechnique = "halve"\n', TABLE)
    assert list(recipe) == [BitTrim(3), Halve()]
    assert len(recipe) == 2


def test_everything_wrong_is_listed():
    text = """
    seed = 3
    [[step]]
    technique = "halv"
    [[step]]
    technique = "halve"
    ration = 0.5
    [[step]]
    technique = "halve"
    ratio = 2
    [[step]]
    bits = 3
    [[step]]
    technique = "bit_trim"
    """
    with pytest.raises(KnobError) as err:
        Recipe.from_toml(text, TABLE)
    for part in (
        "unknown table 'seed'",
        "step 1: no technique 'halv'; close: halve",
        "step 2: halve has no knob 'ration' (close: ratio)",
        "step 3: Halve.ratio is 2",
        "step 4: it needs a line",
        "step 5: bit_trim:",
    ):
        assert part in str(err.value)


@pytest.mark.parametrize("text", ["", "[[step", '[step]\ntechnique = "halve"'])
def test_texts_that_are_no_recipe(text):
    with pytest.raises(KnobError):
        Recipe.from_toml(text, TABLE)


def test_steps_must_be_techniques():
    with pytest.raises(KnobError, match="step 2 is 'halve'"):
        Recipe((Halve(), "halve"))  # type: ignore[arg-type]
    with pytest.raises(KnobError, match="step 1"):
        Recipe((Halve,))  # type: ignore[arg-type]


def test_none_that_is_no_default_cannot_be_written():
    with pytest.raises(KnobError, match=r"bit_trim.bits is None"):
        Recipe((BitTrim(None),)).to_toml()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('bits = "8"', "bits is '8'; it must be a whole number"),
        ("bits = 8.0", "bits is 8.0; it must be a whole number"),
        ("bits = true", "bits is True; it must be a whole number"),
        ('lr = "fast"', "lr is 'fast'; it must be a number"),
        ("unsigned = 1", "unsigned is 1; it must be true or false"),
        ("scales = 3", "scales is 3; it must be text"),
        ("per_layer = 4", "per_layer is 4; it must be a table whose values are a whole number"),
        ('per_layer = {head = "4"}', "per_layer is {'head': '4'}; it must be a table"),
    ],
)
def test_values_of_another_type_are_refused_in_words(line, words):
    with pytest.raises(KnobError, match=re.escape(words)):
        Recipe.from_toml(f'[[step]]\ntechnique = "quantize"\n{line}', TECHNIQUES)


def test_what_a_technique_declares_as_any_is_not_examined():
    text = '[[step]]\ntechnique = "quantize"\ntraining = {batch = 32, optimizer = "adamw"}'
    assert Recipe.from_toml(text, TECHNIQUES).steps[0].training["batch"] == 32


def test_whole_numbers_are_numbers_and_lists_are_tuples():
    text = '[[step]]\ntechnique = "prune"\nratio = 0\nkeep = ["head"]\nratios = {body = 0.5}'
    assert Recipe.from_toml(text, TECHNIQUES).steps[0].keep == ("head",)


def test_reading_a_file(tmp_path):
    (tmp_path / "r.toml").write_text(Recipe((Halve(0.75),)).to_toml())
    assert Recipe.read(tmp_path / "r.toml", TABLE) == Recipe((Halve(0.75),))
    with pytest.raises(KnobError, match=r"^there is no recipe [^ ]+none\.toml$"):
        Recipe.read(tmp_path / "none.toml", TABLE)


values = st.recursive(
    st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4).map(tuple) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_any_value_reads_back_equal(value):
    import tomllib

    from thrifty.recipe import untangle

    back = untangle(tomllib.loads(f"v = {toml_value(value)}")["v"])
    assert back == value
    assert type(back) is type(value)
