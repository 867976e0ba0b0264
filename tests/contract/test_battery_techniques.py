"""The technique battery: every entry of TECHNIQUES, and every pair of them."""

import itertools

import pytest
from checks import (
    bits_of,
    check_cost_falls,
    check_equal_seeds_give_equal_weights,
    check_exports_and_compiles,
    check_hard_torch_is_program,
    check_keeps_the_output_shape,
    check_leaves_the_callers_model_alone,
    check_pair,
    check_store_round_trip,
)
from small import SmallNet, small_task, trained
from torch import nn

from thrifty.compress import TECHNIQUES
from thrifty.errors import KnobError, NothingToDo
from thrifty.recipe import Recipe, technique_name

# What each technique makes smaller, as counted; a new technique needs a line here.
LOWERS = {"quantize": "weight_bytes", "prune": "params", "lossless": "params", "train": None}


@pytest.fixture(scope="module")
def task():
    return small_task()


@pytest.fixture(scope="module")
def nets():
    return {False: trained(), True: trained(spare=True)}


@pytest.fixture(scope="module")
def edited(nets, task):
    """Every technique's example, applied once."""
    return {name: kind.example().edit(nets[True], task) for name, kind in TECHNIQUES.items()}


each = pytest.mark.parametrize("name", sorted(TECHNIQUES))


def test_every_technique_declares_what_it_lowers():
    assert set(LOWERS) == set(TECHNIQUES)
    for name, kind in TECHNIQUES.items():
        assert technique_name(kind.example()) == name


@each
def test_leaves_the_callers_model_alone(name, nets, task):
    assert check_leaves_the_callers_model_alone(TECHNIQUES[name].example(), nets[True], task) == 2


@each
def test_keeps_the_output_shape_and_lowers_its_cost(name, edited, nets, task):
    assert check_keeps_the_output_shape(edited[name], nets[True], task) == 1
    assert check_cost_falls(edited[name], nets[True], task, LOWERS[name]) == (LOWERS[name] is not None)


@each
def test_equal_seeds_give_equal_weights(name, nets, task):
    assert check_equal_seeds_give_equal_weights(TECHNIQUES[name].example(), nets[True], task) == 1


@each
def test_survives_the_store(name, edited, task, tmp_path):
    assert check_store_round_trip(edited[name], SmallNet, task, tmp_path / "saved") == 1


@each
def test_exports_and_compiles(name, edited, task):
    assert check_exports_and_compiles(edited[name], task) == 1


@each
def test_hard_torch_is_program(name, edited, task):
    assert check_hard_torch_is_program(edited[name], task) >= 100


@each
def test_reads_back_from_toml(name):
    example = TECHNIQUES[name].example()
    assert Recipe.from_toml(Recipe((example,)).to_toml(), TECHNIQUES).steps == (example,)


def no_op(name, nets):
    """A technique and a model on which it would change nothing."""
    if name == "prune":
        return TECHNIQUES[name](ratio=0.0), nets[False]
    if name == "quantize":
        return TECHNIQUES[name].example(), nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.ReLU())
    return TECHNIQUES[name].example(), nets[False]


@each
def test_an_edit_that_changes_nothing_raises(name, nets, task):
    if name == "train":
        with pytest.raises(KnobError):
            TECHNIQUES[name](epochs=0)
        return
    technique, model = no_op(name, nets)
    before = bits_of(model)
    with pytest.raises(NothingToDo):
        technique.edit(model, task)
    assert bits_of(model) == before


def test_pairs_work_or_say_why_not(nets, task):
    pairs = {
        (first, second): check_pair(TECHNIQUES[first].example(), TECHNIQUES[second].example(), nets[True], task)
        for first, second in itertools.product(TECHNIQUES, repeat=2)
    }
    assert len(pairs) == len(TECHNIQUES) ** 2
    assert sum(outcome == "works" for outcome in pairs.values()) >= len(pairs) / 2
    assert pairs["prune", "quantize"] == pairs["lossless", "quantize"] == "works"
    assert pairs["quantize", "quantize"] == "Incompatible"
