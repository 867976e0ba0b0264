"""--teacher and its flags."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import saved_net, small_task

from thrifty.cli import main
from thrifty.cli.parser import TAUGHT as FLAGS
from thrifty.objectives import TAUGHT

NET = f"{Path(__file__).parent.parent / 'support' / 'saved_models.py'}:SavedNet"
TEACHERS = """
from torch import nn

def right():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

def wide(classes=9):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
"""
STEP = ["--step", "prune", "ratio=0.5", "recover_epochs=1"]


@pytest.fixture
def inputs(tmp_path, monkeypatch) -> list[str]:
    """The arguments that name model, weights and data, in the current folder."""
    monkeypatch.chdir(tmp_path)
    task = small_task()
    x = torch.cat([task.train.x, task.validation.x, task.test.x]).numpy()
    y = torch.cat([task.train.y, task.validation.y, task.test.y]).numpy()
    np.savez("data.npz", x=x, y=y, classes=np.array(["a", "b", "c"]))
    save_file(saved_net().state_dict(), "w.safetensors")
    Path("teachers.py").write_text(TEACHERS.replace("64", str(x[0].size)))
    return [NET, "--weights", "w.safetensors", "--data", "data.npz"]


def told(out: str) -> str:
    (note,) = [n for n in json.loads((Path(out) / "report.json").read_text())["notes"] if n.startswith("teacher (")]
    return note


def test_the_flag_knows_every_objective_with_a_teacher():
    assert tuple(TAUGHT) == FLAGS


def test_compress_says_what_the_float_model_taught(inputs, capsys):
    assert main(["compress", *inputs, *STEP, "--out", "a"]) == 0
    assert "teacher (distillation from the float model): " in told("a")
    assert "kept" in told("a")
    assert "What the teacher bought" in Path("a/report.md").read_text()
    assert main(["compress", *inputs, *STEP, "--out", "b", "--no-teacher-check"]) == 0
    assert "not compared" in told("b")
    assert main(["compress", *inputs, *STEP, "--out", "c", "--no-teacher"]) == 0
    assert "teacher" not in Path("c/report.md").read_text()


@pytest.mark.parametrize(
    "flags",
    [
        "--objective-weight 2 --objective-knobs temperature=3",
        "--objective graph_distillation --objective-knobs k=4",
        "--teacher teachers.py:right",
        "--teacher teachers.py:wide --teacher-args classes=3 --objective relational_distillation --objective-weight 1",
    ],
)
def test_another_teacher_and_another_objective(flags, inputs, capsys):
    assert main(["compress", *inputs, *STEP, "--out", "o", *flags.split()]) == 0
    assert ("Sequential" in told("o")) == ("teachers.py" in flags)
    assert ("no --teacher-weights" in capsys.readouterr().err) == ("teachers.py" in flags)


def test_train_learns_from_a_teacher(inputs, capsys):
    words = ["train", NET, "--data", "data.npz", "--epochs", "1", "--lr", "0.01"]
    for out, flags in {"alone": [], "taught": ["--teacher", NET, "--teacher-weights", "w.safetensors"]}.items():
        assert main([*words, "--out", f"{out}.safetensors", *flags]) == 0
    alone, taught = (load_file(f"{out}.safetensors") for out in ("alone", "taught"))
    assert not all(torch.equal(alone[k], taught[k]) for k in alone)
    capsys.readouterr()
    teacher = ["--teacher", NET, "--teacher-weights", "w.safetensors"]
    assert main([*words, "--out", "j.safetensors", "--json", *teacher]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == ["teacher: distillation from SavedNet"]


BAD = {
    "compress --teacher-weights w.safetensors": "--teacher-weights needs --teacher MODEL",
    "compress --no-teacher --objective distillation": "--no-teacher and --objective exclude each other",
    "compress --objective destillation": "close: distillation",
    "compress --objective-knobs temprature=3": "close: temperature",
    "compress --teacher teachers.py:wide": "the teacher (4, 9)",
    "compress --teacher teachers.py:rigth": "close: right",
    "compress --teacher teachers.py:right --objective graph_distillation --objective-knobs layers='body'": "no module",
    "train --objective distillation --teacher-args a=1": "--objective needs --teacher MODEL",
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_request_is_one_message_and_exit_code_2(words, inputs, capsys):
    verb, *flags = words.split()
    out = ["--out", "o.safetensors"] if verb == "train" else ["--out", "o", *STEP]
    assert main([verb, *inputs, *out, *flags]) == 2
    shown = capsys.readouterr()
    assert BAD[words] in shown.err
    assert shown.out == ""


def test_a_saved_folder_teaches_when_its_class_is_named(inputs, capsys):
    assert main(["compress", *inputs, *STEP, "--out", "small", "--no-teacher"]) == 0
    capsys.readouterr()
    words = ["compress", *inputs, *STEP, "--out", "o", "--no-teacher-check"]
    assert main([*words, "--teacher", "small"]) == 2
    assert "--teacher file.py:Name --teacher-weights small" in capsys.readouterr().err
    assert main([*words, "--teacher", NET, "--teacher-weights", "small"]) == 0
