"""`thrifty llm adapt`: tune, merge, take out, compare; everything wrong at once; an interrupted run goes on."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from tiny_text import causal_folder, jsonl, masked_folder

from thrifty.cli import main
from thrifty.cli.llm import adapt
from thrifty.llm.gallop import SCORES, Adapter
from thrifty.llm.gallop.selection import SCOPES

ROWS = [{"prompt": f"say {w}:", "completion": f" {w}."} for w in ("one", "two", "three", "four", "five", "six")]
SMALL = ["--density", "0.05", "--batch", "3", "--steps", "3", "--lr", "0.01"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with a model and data."""
    monkeypatch.chdir(tmp_path)
    causal_folder(tmp_path / "model", blocks=2)
    jsonl(tmp_path / "train.jsonl", ROWS)
    jsonl(tmp_path / "valid.jsonl", ROWS[:2])
    return tmp_path


def tune(*more):
    return main(["llm", "adapt", "--model", "model", "--data", "train.jsonl", *SMALL, *more])


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    of_a, of_b = weights(a), weights(b)
    return of_a.keys() == of_b.keys() and all(torch.equal(of_a[n], of_b[n]) for n in of_a)


def test_the_names_are_the_librarys():
    assert set(SCORES) == set(adapt.SCORES)
    assert SCOPES == adapt.SCOPES


def test_tune_merge_apply_take_out(place, capsys):
    assert (
        tune("--validation", "valid.jsonl", "--out", "new/a.safetensors", "--merge", "merged", "--json", "a.json")
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "loss,",
        "training",
        "validation",
        "tuned:",
        "adapter:",
        "merged:",
        "JSON:",
    ]
    found = json.loads((place / "a.json").read_text())
    made = Adapter.load(place / "new" / "a.safetensors")
    assert made.count == found["scalars"] == round(0.05 * found["eligible"])
    assert found["losses"]["training data"]["after"] < found["losses"]["training data"]["before"]
    assert found["losses"]["validation"]["examples"] == 2
    assert found["bytes"] == (place / "new" / "a.safetensors").stat().st_size
    assert (place / "new" / "a.safetensors").stat().st_mode & 0o044  # not the owner's alone
    assert not (place / "new" / "a.safetensors.run").exists()

    assert main(["llm", "adapt", "--model", "model", "--apply", "new/a.safetensors", "--out", "applied"]) == 0
    assert same(place / "applied", place / "merged")
    assert not same(place / "applied", place / "model")
    changed = sum(int((weights(place / "applied")[n] != t).sum()) for n, t in weights(place / "model").items())
    assert 0 < changed <= made.count
    assert main(["llm", "adapt", "--model", "merged", "--unmerge", "--out", "back"]) == 0
    assert same(place / "back", place / "model")
    assert main(["llm", "adapt", "--model", "applied", "--unmerge", "new/a.safetensors", "--out", "back2"]) == 0
    assert same(place / "back2", place / "model")
    assert {p.name for p in place.iterdir() if p.name[0] == "."} == set()  # nothing half written
    capsys.readouterr()
    assert main(["llm", "adapt", "--model", "merged", "--apply", "new/a.safetensors", "--out", "twice"]) == 2
    assert "merged already" in capsys.readouterr().err
    assert main(["llm", "adapt", "--model", "model", "--unmerge", "--out", "x"]) == 2
    assert "holds no thrifty_adapter.safetensors; name the adapter" in capsys.readouterr().err


def test_several_adapters(place, capsys):
    assert tune("--out", "a.safetensors") == 0
    assert tune("--out", "b.safetensors", "--score", "random", "--seed", "3", "--json") == 0
    capsys.readouterr()
    assert main(["llm", "adapt", "--overlap", "a.safetensors", "b.safetensors", "a.safetensors", "--json"]) == 0
    pairs = json.loads(capsys.readouterr().out)["overlap"]
    assert [p["common"] for p in pairs][1] == pairs[0]["count_a"]
    assert pairs[0]["share"] < 0.3
    assert (
        main(["llm", "adapt", "--model", "model", "--apply", "a.safetensors", "b.safetensors", "--out", "both"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "by chance" in shown
    both = Adapter.load(place / "both" / adapt.KEPT)
    assert both.count == 2 * pairs[0]["count_a"] - pairs[0]["common"]
    assert main(["llm", "adapt", "--model", "both", "--unmerge", "--out", "back"]) == 0
    assert same(place / "back", place / "model")


def test_an_interrupted_run_goes_on(place, capsys, monkeypatch):
    assert tune("--out", "whole.safetensors") == 0

    @contextmanager
    def stopping(title):
        def move(done, total, text):
            if title == "tuning" and done == 2:
                raise KeyboardInterrupt

        yield move

    with monkeypatch.context() as patched:
        patched.setattr("thrifty.cli.show.progress_bar", stopping)
        assert tune("--out", "a.safetensors") == 130
    assert "with --resume" in capsys.readouterr().err
    assert not (place / "a.safetensors").exists()
    assert tune("--out", "a.safetensors") == 2
    assert "a.safetensors.run is an interrupted run; go on with --resume" in capsys.readouterr().err
    assert tune("--out", "a.safetensors", "--resume", "--lr", "0.5") == 2
    assert "with other tune" in capsys.readouterr().err
    assert tune("--out", "a.safetensors", "--resume") == 0
    whole, resumed = Adapter.load(place / "whole.safetensors"), Adapter.load(place / "a.safetensors")
    assert all(torch.equal(e.value, resumed.entries[n].value) for n, e in whole.entries.items())
    assert not (place / "a.safetensors.run").exists()


def test_everything_wrong_at_once_before_the_model_is_read(place, capsys):
    (place / "bad.jsonl").write_text('{"text": "fine"}\n{"prompt": "no completion"}\nno json\n')
    (place / "merged").mkdir()
    (place / "merged" / "x").touch()
    more = ["--model", "nowhere", "--data", "bad.jsonl", "--density", "2", "--out", "a.bin", "--merge", "merged",
            "--epochs", "0", "--max-tokens", "1", "--knobs", "wumup=3", "epss=2"]  # fmt: skip
    assert main(["llm", "adapt", *more]) == 2
    said = capsys.readouterr().err
    for words in ("nowhere does not exist", "line 2: completion must be text", "line 3: ", "density is 2.0",
                  "a.bin must end in .safetensors", "merged exists already", "epochs is 0", "--max-tokens is 1",
                  "--knobs wumup: close: warmup", "--knobs epss: close: eps"):  # fmt: skip
        assert words in said, words
    assert main(["llm", "adapt"]) == 2
    assert "give one of --data (tune)" in capsys.readouterr().err
    assert main(["llm", "adapt", "--data", "train.jsonl"]) == 2
    assert "--data needs --model" in capsys.readouterr().err
    assert main(["llm", "adapt", "--data", "a", "--overlap", "b"]) == 2
    assert "are different jobs" in capsys.readouterr().err
    assert main(["llm", "adapt", "--model", "nowhere", "--apply", "x", "--out", "merged"]) == 2
    said = capsys.readouterr().err
    assert all(words in said for words in ("nowhere does not", "x is no sparse adapter", "merged exists already"))
    assert main(["llm"]) == 2


def test_wrong_models_and_lengths(place, capsys):
    masked_folder(place / "bert")
    assert main(["llm", "adapt", "--model", "bert", "--data", "train.jsonl", "--out", "a.safetensors"]) == 2
    assert "none of the known families" in capsys.readouterr().err
    assert tune("--max-tokens", "4", "--validation", "valid.jsonl") == 2
    said = capsys.readouterr().err
    assert "--data: with max_tokens = 4" in said
    assert "--validation: with max_tokens = 4" in said
    assert tune("--out", "a.safetensors") == 0
    causal_folder(place / "other", blocks=2, seed=1)
    assert main(["llm", "adapt", "--model", "other", "--apply", "a.safetensors", "--out", "x"]) == 2
    assert "wrong base checksum" in capsys.readouterr().err
    assert not (place / "x").exists()
