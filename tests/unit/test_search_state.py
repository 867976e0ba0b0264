"""The memory of a search: appended as it goes, read back, refused when it is another search's."""

import errno
import json
import os

import pytest

from thrifty.cost import Cost
from thrifty.errors import StoreError
from thrifty.search import state as module
from thrifty.search.space import Point, Probe, Trial
from thrifty.search.state import State

REQUEST = {"model": "abc", "seed": "0", "budget": "max_drop=0.01"}
INT8 = Point().moved("precision", "int8")


def trial(point=INT8, score=0.9):
    return Trial(
        point, "[[step]]\n", Cost(flash_bytes=7, ram_bytes=5), score, None if score is None else 1 - score, 0.5
    )


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state"


def filled(folder):
    state = State.open(folder, REQUEST)
    state.add_trial(trial())
    state.add_trial(Trial(Point(), "", Cost(), None, None, 0.1, "it does not fit"))
    state.add_probe(Probe(INT8, Cost(macs=3), 0.25))
    state.add_fact("reference", 0.875)
    return state


def test_everything_reads_back(folder):
    first, second = filled(folder), State.open(folder, REQUEST)
    assert second.trials == first.trials
    assert second.probes == first.probes
    assert second.facts == {"reference": 0.875}
    assert (first.resumed, second.resumed) == (0, 3)


def test_without_a_folder_it_is_only_memory(tmp_path):
    state = State.open(None, REQUEST)
    state.add_trial(trial())
    assert INT8 in state.trials
    assert state.model_folder("x") is None
    assert not list(tmp_path.iterdir())
    with pytest.raises(StoreError):
        _ = state.log


def test_another_search_is_refused_and_says_what_differs(folder):
    filled(folder)
    with pytest.raises(StoreError, match="belongs to another search") as caught:
        State.open(folder, {**REQUEST, "seed": "1", "budget": "max_drop=0.02", "new": "yes"})
    text = str(caught.value)
    assert "seed: 0 there, 1 now" in text
    assert "budget: max_drop=0.01 there, max_drop=0.02 now" in text
    assert "new: nothing there, yes now" in text
    assert "model" not in text.replace("models", "")


def test_another_schema_is_refused(folder):
    filled(folder)
    log = folder / "search.jsonl"
    log.write_text(log.read_text().replace('"schema": 1', '"schema": 99', 1))
    with pytest.raises(StoreError, match="another version"):
        State.open(folder, REQUEST)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_torn_by_a_kill_is_dropped(folder, cut):
    filled(folder)
    log = folder / "search.jsonl"
    log.write_bytes(log.read_bytes()[:-cut])
    state = State.open(folder, REQUEST)
    assert len(state.trials) == 2
    state.add_fact("reference", 0.5)
    assert State.open(folder, REQUEST).facts == {"reference": 0.5}


def test_a_file_torn_in_its_first_line_starts_again(folder):
    filled(folder)
    (folder / "search.jsonl").write_bytes(b'{"kind": "requ')
    assert State.open(folder, REQUEST).trials == {}
    assert json.loads((folder / "search.jsonl").read_text())["request"] == REQUEST


@pytest.mark.parametrize("line", ["rubbish", "{}", '{"kind": "other"}', "[1]", '{"kind": "trial", "point": 3}'])
def test_an_unreadable_line_is_named(folder, line):
    filled(folder)
    log = folder / "search.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(StoreError, match="line 3 of"):
        State.open(folder, REQUEST)


def test_a_full_disk_is_said_and_leaves_whole_lines(folder, monkeypatch):
    state = filled(folder)
    before = (folder / "search.jsonl").read_bytes()

    class Full:
        """A file whose disk is full after ten bytes."""

        def __init__(self, path, mode):
            self.file = plain_open(path, mode)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def tell(self):
            return self.file.tell()

        def write(self, data):
            self.file.write(data[:10])
            self.file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plain_open = open
    monkeypatch.setattr(module, "open", Full, raising=False)
    with pytest.raises(StoreError, match="No space left on device"):
        state.add_trial(trial(Point().moved("precision", "int16")))
    monkeypatch.undo()
    assert (folder / "search.jsonl").read_bytes() == before
    assert len(State.open(folder, REQUEST).trials) == 2


def test_a_folder_that_cannot_be_made_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot keep its state"):
        State.open(tmp_path / "file" / "state", REQUEST)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match="No space left"):
        State.open(tmp_path / "state", REQUEST)
    assert list((tmp_path / "state").iterdir()) == []


def test_models_of_different_recipes_lie_apart(folder):
    state = State.open(folder, REQUEST)
    assert state.model_folder("a") != state.model_folder("b")
    assert state.model_folder("a").parent == folder / "models"
