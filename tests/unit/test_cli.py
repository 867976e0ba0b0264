"""The command line: exit codes, one line of truth, everything wrong in a sentence."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from saved_models import saved_net, small_task

from thrifty import __version__
from thrifty.budget import Budget
from thrifty.cli import main
from thrifty.cli.parser import comments, make_parser
from thrifty.cli.reference import renewed, verbs
from thrifty.compress import TECHNIQUES
from thrifty.cost import Cost
from thrifty.errors import StoreError
from thrifty.report import Report

NET = f"{Path(__file__).parent.parent / 'support' / 'saved_models.py'}:SavedNet"
BAD = """
import torch
from torch import nn

class Odd(nn.Module):
    def forward(self, x):
        return torch.erf(x).sigmoid().flatten(1)

class Boom(nn.Module):
    def __init__(self):
        raise ValueError("no such thing")

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 60000)

    def forward(self, x):
        return self.head(x.flatten(1))

model = nn.Linear(2, 2)
number = 3

def leave():
    import sys
    sys.exit(3)

def needs(width):
    return nn.Linear(width, 2)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with data, weights and a file of bad models."""
    folder = tmp_path_factory.mktemp("cli")
    task = small_task()
    x = torch.cat([task.train.x, task.validation.x, task.test.x]).numpy()
    y = torch.cat([task.train.y, task.validation.y, task.test.y]).numpy()
    np.savez(folder / "data.npz", x=x, y=y, classes=np.array(["a", "b", "c"]))
    save_file(saved_net().state_dict(), folder / "w.safetensors")
    (folder / "bad.py").write_text(BAD)
    (folder / "syntax.py").write_text("def f(:\n")
    torch.save(saved_net(), folder / "whole.pt")
    return folder


@pytest.fixture
def inputs(place, monkeypatch) -> list[str]:
    """The arguments that name model, weights and data; the current folder is `place`."""
    monkeypatch.chdir(place)
    return [NET, "--weights", "w.safetensors", "--data", "data.npz"]


def test_help_answers_without_torch():
    code = (
        "import sys; from thrifty.cli import main; code = main(['--help']); "
        "sys.exit(code or 'torch' in sys.modules or 'jinja2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in ("optimize", "compress", "deploy", "check", "profile", "train", "report", "list"):
        assert verb in done.stdout


def test_import_thrifty_is_light_and_its_names_load():
    import thrifty

    code = "import sys, thrifty; thrifty.Budget; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    for name in thrifty.__all__:
        assert getattr(thrifty, name).__name__ == name
    with pytest.raises(AttributeError, match="Budgets"):
        thrifty.Budgets  # noqa: B018


def test_version_and_no_verb(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"thrifty {__version__}"
    assert main([]) == 2


def test_budget_flags_are_the_fields_of_budget():
    words = [NET, "--data", "d", "--flash", "64KiB", "--ram", "16KB", "--instructions", "5M", "--macs", "1k",
             "--params", "7", "--max-drop", "1%"]  # fmt: skip
    args = make_parser().parse_args(["optimize", *words])
    budget = Budget(**{name: getattr(args, name) for name in Budget.__dataclass_fields__})
    assert budget == Budget(65536, 16000, 5_000_000, 1000, 7, 0.01)


def test_the_page_of_the_command_line_shows_the_flags_of_the_parser():
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    assert renewed(page) == page, "run: python -m thrifty.cli.reference docs/cli.md"
    for verb, parser in verbs().items():
        assert f"## {verb}\n" in page
        for flag in (flag for action in parser._actions for flag in action.option_strings if flag[:3] != "-h"):
            assert flag == "--help" or f"`{flag}" in page


def test_every_field_of_budget_is_explained():
    assert set(comments(Budget)) == set(Budget.__dataclass_fields__)


def test_compress_saves_a_model_that_deploy_proves(inputs, tmp_path, capsys):
    steps = ["--step", "prune", "ratio=0.5", "recover_epochs=0", "--step", "quantize", "bits=8"]
    out = tmp_path / "out"
    assert main(["compress", *inputs, *steps, "--params", "10k", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1].startswith("within budget: params ")
    assert shown.splitlines()[-1].endswith(f"report: {out}/report.html")
    assert {p.name for p in out.iterdir()} == {"model", "recipe.toml", "report.html", "report.json", "report.md"}

    saved = [str(out / "model"), "--factory", NET, "--data", "data.npz"]
    flags = ["--target", "host", "--samples", "40", "--json", "--out", str(tmp_path / "deployed")]
    assert main(["deploy", *saved, *flags]) == 0
    report = Report.from_json(capsys.readouterr().out)
    assert report.parity is not None
    assert report.parity.samples == {"torch": 40, "program": 40, "host C": 40}
    assert report.within_budget
    assert (tmp_path / "deployed" / "c" / "model.c").is_file()


def test_a_recipe_file_does_what_the_steps_do(inputs, tmp_path, capsys):
    step = ["--step", "prune", "ratio=0.5", "recover_epochs=0"]
    main(["compress", *inputs, *step, "--out", str(tmp_path / "a")])
    recipe = str(tmp_path / "a" / "recipe.toml")
    main(["compress", *inputs, "--recipe", recipe, "--out", str(tmp_path / "b")])
    first, second = (tmp_path / n / "model" / "weights.safetensors" for n in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_the_report_names_the_compiler(inputs, capsys):
    assert main(["profile", *inputs, "--target", "cortex-m4", "--json"]) == 0
    assert re.match("arm-none-eabi-gcc|clang|zig", json.loads(capsys.readouterr().out)["environment"]["compiler"])


def test_outside_the_budget_is_exit_code_1(inputs, tmp_path, capsys):
    words = ["--step", "prune", "ratio=0.5", "recover_epochs=0", "--params", "10", "--out", str(tmp_path)]
    assert main(["compress", *inputs, *words]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("NOT within budget: params")


def test_check_lists_everything_at_once(inputs, capsys):
    assert main(["check", "bad.py:Odd", "cortex-m4", "--data", "data.npz"]) == 1
    shown = capsys.readouterr().out
    assert "aten.erf.default" in shown
    assert "aten.sigmoid.default" in shown
    assert "cannot be deployed on Arm Cortex-M4F: 2 reason(s)" in shown.splitlines()[-1]
    assert main(["check", NET, "cortex-m4"]) == 0
    assert "can be deployed" in capsys.readouterr().out


def test_check_takes_its_target_anywhere_and_answers_in_json(inputs, capsys):
    for words in ([], ["cortex-m4"], ["--target", "cortex-m4"], ["--seed", "1", "cortex-m4"]):
        assert main(["check", NET, *words, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer == {"model": NET, "target": "cortex-m4", "deployable": True, "refusals": []}
    assert main(["check", "bad.py:Odd", "--data", "data.npz", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert not answer["deployable"]
    assert len(answer["refusals"]) == 2


def test_what_compress_wrote_is_found_by_its_folder(inputs, tmp_path, capsys):
    out = str(tmp_path / "small")
    assert main(["compress", *inputs, "--step", "quantize", "bits=8", "--out", out]) == 0
    assert main(["check", out, "--factory", NET, "--data", "data.npz"]) == 0
    assert main(["check", NET, "--weights", out, "--data", "data.npz"]) == 0
    capsys.readouterr()
    assert main(["check", out, "--data", "data.npz"]) == 2
    assert f"add --factory {NET}" in capsys.readouterr().err


def test_a_module_of_the_current_folder_is_found(inputs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", ".")])
    assert main(["check", "bad:Wide", "--input-shape", "64"]) == 0


def test_a_folder_with_the_name_of_a_data_set_is_told(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert main(["check", "zoo:lenet", "--data", "digits"]) == 2
    assert "digits is what lies here under this name, not the data set" in capsys.readouterr().err


def test_the_line_of_truth_names_the_test_split(inputs, tmp_path, capsys):
    words = ["--target", "host", "--split", "test", "--samples", "8", "--out", str(tmp_path)]
    assert main(["deploy", *inputs, *words]) == 0
    shown = capsys.readouterr().out
    assert "test split, used once: accuracy" in shown
    assert " on test     report:" in shown.splitlines()[-1]


def test_check_says_that_a_board_is_too_small(inputs, capsys):
    assert main(["check", "bad.py:Wide", "nucleo-l452re", "--input-shape", "64"]) == 1
    shown = capsys.readouterr().out
    assert "flash: 14.9 MiB of constants" in shown
    assert "RAM: 235 KiB of activations" in shown


def test_profile_counts_layers(inputs, capsys):
    assert main(["profile", *inputs[:3]]) == 0
    shown = capsys.readouterr().out
    assert "hidden" in shown
    assert main(["profile", *inputs[:3], "--json"]) == 0
    report = Report.from_json(capsys.readouterr().out)
    assert sum(layer.macs or 0 for layer in report.layers) == report.cost.macs


def test_train_writes_weights_that_load(inputs, tmp_path, capsys):
    out = tmp_path / "w.safetensors"
    words = ["train", NET, "--data", "data.npz", "--epochs", "2", "--lr", "0.01", "--knobs", "schedule=constant"]
    assert main([*words, "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"weights: {out}")
    assert main(["profile", NET, "--weights", str(out), "--data", "data.npz"]) == 0


def test_a_named_architecture_takes_its_shape_from_the_data(capsys):
    assert main(["profile", "zoo:LeNet", "--data", "digits", "--limit", "60"]) == 0
    assert "1 × 8 × 8" in capsys.readouterr().out


def test_list_names_every_technique_and_its_knobs(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for name, kind in TECHNIQUES.items():
        assert name in shown
        assert all(knob in shown for knob in kind.__dataclass_fields__)
    for word in ("cortex-m4", "zoo:lenet", "spoken-digits"):
        assert word in shown
    assert main(["list", "targets"]) == 0
    assert "zoo:lenet" not in capsys.readouterr().out


def test_report_is_shown_again_and_turned_into_html(tmp_path, capsys):
    report = Report("again", Budget(flash_bytes=100))
    report.add("start", Cost(flash_bytes=50))
    report.write(tmp_path)
    page = tmp_path / "out.html"
    assert main(["report", str(tmp_path), "--html", str(page)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"within budget: flash 50 of 100 B     report: {page}"
    assert page.read_text() == report.to_html()
    assert main(["report", str(tmp_path / "report.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == report.verdict


BAD_REQUESTS = {
    "deploy zoo:lenett --data digits": "close: lenet",
    "deploy zoo:lenet --data digitz": "close: digits",
    "deploy zoo:lenet --model-args chanels=3 --data digits": "no option 'chanels'",
    "deploy zoo:lenet --data digits --target cortex-m5": "close: cortex-m7, cortex-m4",
    "deploy bad.py:Bom --data data.npz": "bad.py has no 'Bom'; close: Boom",
    "deploy bad.py:Boom --data data.npz": "bad.py line 11: ValueError: no such thing",
    "deploy bad.py:model --data data.npz": "is a model; give the class",
    "deploy bad.py:number --data data.npz": "is a int",
    "deploy nothing.py:Net --data data.npz": "there is no file nothing.py",
    "deploy nonsense --data data.npz": "'nonsense' is no model",
    "deploy . --data data.npz": "is no model saved by thrifty",
    "deploy bad.py:Wide --weights w.safetensors --data data.npz": "head.weight: saved as (3, 24)",
    "deploy bad.py:Wide --weights none.pt --data data.npz": "there is no file none.pt",
    "deploy bad.py:Odd --data data.npz --out out": "2 part(s) of the model cannot be used",
    "deploy zoo:lenet --data digits --samples 0": "--samples is 0",
    "check bad.py:Wide cortex-m4 --input-shape 3": "does not run on an input of shape (3,)",
    "check bad.py:Odd cortex-m4": "give --data or --input-shape",
    "compress bad.py:Wide --data data.npz": "--recipe FILE, or --step",
    "compress bad.py:Wide --data data.npz --step prun": "close: prune",
    "compress bad.py:Wide --data data.npz --step prune ratio=2": "must be in [0, 1)",
    "compress bad.py:Wide --data data.npz --step prune ratio": "not of the form key=value",
    "compress bad.py:Wide --data data.npz --recipe none.toml": "none.toml",
    "optimize zoo:lenet --data digits --flash 64K": "could mean two sizes",
    "optimize zoo:lenet --data digits --time-limit soon": "'soon' is not a time",
    "optimize zoo:lenet --data none.npz --max-drop 1%": "none.npz is no file",
    "optimize zoo:lenet --data digits --limit 60 --out o": "budget is empty",
    "train zoo:lenet --data digits --out weights.bin": "must end in .safetensors",
    "report none.json": "none.json cannot be read",
    "report bad.py": "no report of thrifty",
    "lits": "'lits' is not known; close: list",
    "list zoos": "close: zoo",
    "deploy zoo:lenet --data digits --wieghts x": "unrecognized arguments: --wieghts x; close: --weights",
    "deploy zoo:lenet --data digits --flash -5KiB": "'-5KiB' is not a size",
    "optimize zoo:lenet --data digits --max-drop -1%": "'-1%' is not a score drop",
    "check zoo:lenet cortex-m4 host": "unrecognized arguments: host",
    "check zoo:lenet cortex-m4 --target host": "two targets",
    "check bad.py:leave --input-shape 1": "bad.py:leave failed in bad.py line 26: SystemExit: 3",
    "check bad.py:needs --input-shape 1": "bad.py:needs failed: TypeError: needs() missing 1",
    "check no_such_package:Net": "no_such_package failed: ModuleNotFoundError",
    "check bad.py:Wide --model-args classes=x": "bad.py:Wide (classes='x') failed: TypeError",
    "check syntax.py:Net": "syntax.py failed: SyntaxError",
    "compress zoo:lenet --data digits --step lossless --out data.npz": "data.npz is a file; choose another folder",
    "deploy zoo:lenet --data digits --out data.npz/x": "data.npz is a file; choose another folder",
    "optimize zoo:lenet --data digits --max-drop 1% --out data.npz": "data.npz is a file; choose another folder",
    "train zoo:lenet --data digits --out data.npz/w.safetensors": "data.npz is a file; choose another folder",
    "profile zoo:lenet --out data.npz": "data.npz is a file; choose another folder",
    "profile zoo:lenet --target cortex-m44": "close: cortex-m4",
    "profile bad.py:Wide --input-shape 64 --weights whole.pt": "holds more than tensors, and reading it would run its",
    "report data.npz": "data.npz is no report of thrifty: it is not text",
}  # fmt: skip


@pytest.mark.parametrize("command", BAD_REQUESTS)
def test_a_bad_request_is_one_message_and_exit_code_2(command, inputs, capsys):
    assert main(command.split()) == 2
    shown = capsys.readouterr()
    assert BAD_REQUESTS[command] in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert not Path("o").exists() or not any(Path("o").rglob("*.c"))


def test_a_full_disk_is_exit_code_2(inputs, tmp_path, monkeypatch, capsys):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("thrifty.store.save_file", full)
    words = ["--step", "prune", "ratio=0.5", "recover_epochs=0", "--out", str(tmp_path)]
    assert main(["compress", *inputs, *words]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_what_the_system_refuses_is_exit_code_2(inputs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = ["--step", "prune", "ratio=0.5", "recover_epochs=0", "--out", str(tmp_path / "file")]
    assert main(["compress", *inputs, *words]) == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize(("verb", "hint"), [("optimize", "--resume"), ("compress", "interrupted")])
def test_ctrl_c_is_exit_code_130_and_says_how_to_go_on(verb, hint, inputs, tmp_path, monkeypatch, capsys):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("thrifty.cli.verbs.search", stop)
    monkeypatch.setattr("thrifty.cli.verbs.apply_recipe", stop)
    more = ["--max-drop", "1%"] if verb == "optimize" else ["--step", "quantize"]
    assert main([verb, *inputs, *more, "--out", str(tmp_path / "o")]) == 130
    assert hint in capsys.readouterr().err


def test_an_earlier_search_is_not_overwritten(inputs, tmp_path, capsys):
    (tmp_path / "search").mkdir()
    assert main(["optimize", *inputs, "--max-drop", "1%", "--out", str(tmp_path)]) == 2
    assert "add --resume" in capsys.readouterr().err


def test_errors_of_the_library_are_not_lost(inputs, monkeypatch, capsys):
    def refuse(*_: object, **__: object) -> None:
        raise StoreError("a reason")

    monkeypatch.setattr("thrifty.cli.verbs.search", refuse)
    assert main(["optimize", *inputs, "--max-drop", "1%", "--out", "none"]) == 2
    assert capsys.readouterr().err == "thrifty: a reason\n"
