"""store: saved models come back bit for bit, or are refused with everything that does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from saved_models import RECIPES, SavedNet, probe, saved_net, small_task
from torch import nn
from torch.nn.utils import parametrize

from thrifty.compress import Lossless, Prune, Quantize, compress
from thrifty.errors import StoreError
from thrifty.recipe import Recipe
from thrifty.store import is_saved, load, load_weights, read_manifest, save

FIXTURES = Path(__file__).parent.parent / "fixtures"
STEPS = {
    "nothing": (),
    "lossless": (Lossless(),),
    "prune": (Prune(0.5, recover_epochs=0),),
    "int8": (Quantize(bits=8),),
    "int16": (Quantize(bits=16),),
    "prune int4": (Prune(0.25, recover_epochs=0), Quantize(bits=8, weight_bits=4, scales="power_of_two")),
    "lossless int8": (Lossless(), Quantize(bits=8)),
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("original", [SavedNet, saved_net()], ids=["class", "model"])
def test_every_bit_comes_back(steps, original, tmp_path):
    before = compress(saved_net(), Recipe(steps), small_task())
    save(before, tmp_path / "m")
    after = load(tmp_path / "m", original)
    assert torch.equal(after(probe()), before(probe()))
    assert not after.training
    again = {name: value.clone() for name, value in after.state_dict().items()}
    assert all(torch.equal(value, again[name]) for name, value in before.state_dict().items())
    assert is_saved(tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("schema", [1])
def test_models_of_every_schema_load(schema, name):
    folder = FIXTURES / f"saved_schema_{schema}"
    model = load(folder / name, SavedNet)
    expected = torch.tensor(json.loads((folder / f"{name}_outputs.json").read_text()))
    with torch.no_grad():
        if "int8" in name:
            assert torch.equal(model(probe()), expected)
        else:
            torch.testing.assert_close(model(probe()), expected)


def test_the_original_is_not_changed(tmp_path):
    save(compress(saved_net(), Recipe((Prune(0.5, recover_epochs=0),)), small_task()), tmp_path / "m")
    original = saved_net()
    before = {k: v.clone() for k, v in original.state_dict().items()}
    load(tmp_path / "m", original)
    assert all(torch.equal(v, before[k]) for k, v in original.state_dict().items())


class Tied(nn.Module):
    """One convolution applied twice, a weight that two layers share, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.once = nn.Conv1d(4, 4, 3, padding=1)
        self.again = self.once
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(self.again(self.once(x))))


def test_shared_tensors_are_stored_once_and_stay_shared(tmp_path):
    torch.manual_seed(0)
    model = Tied().eval()
    save(model, tmp_path / "m")
    assert set(read_manifest(tmp_path / "m")["shared"]) == {"again.weight", "again.bias", "b.weight"}
    back = load(tmp_path / "m", Tied)
    assert back.again is back.once
    assert back.b.weight is back.a.weight
    x = torch.randn(2, 4, 8)
    assert torch.equal(back(x), model(x))


def test_a_shared_layer_that_was_replaced_stays_shared(tmp_path):
    model = Tied()
    model.once = model.again = nn.Conv1d(4, 4, 5, padding=2)
    save(model, tmp_path / "m")
    back = load(tmp_path / "m", Tied)
    assert back.again is back.once
    assert back.once.kernel_size == (5,)


def test_half_precision_comes_back_and_a_wrong_type_is_refused(tmp_path):
    save(saved_net().half(), tmp_path / "m")
    assert load(tmp_path / "m", lambda: SavedNet().half()).head.weight.dtype == torch.float16
    with pytest.raises(StoreError, match=r"head\.weight: saved as \(3, 24\) float16, the model has \(3, 24\) float32"):
        load(tmp_path / "m", SavedNet)


class Wider(SavedNet):
    """The net with a parameter of its own that has another shape, and one more."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))


def test_all_tensors_that_do_not_fit_are_listed(tmp_path):
    save(Wider(3), tmp_path / "m")

    def other() -> nn.Module:
        model = Wider(4)
        model.extra = nn.Parameter(torch.ones(2))
        return model

    with pytest.raises(StoreError) as caught:
        load(tmp_path / "m", other)
    assert "missing in the file: extra" in str(caught.value)
    assert "gain: saved as (3,) float32, the model has (4,) float32" in str(caught.value)


def test_another_class_is_refused_with_every_difference(tmp_path):
    save(saved_net(), tmp_path / "m")
    refusal = r"the model itself was a SavedNet; the given one has class Tied(.|\n)*'features\.2'"
    with pytest.raises(StoreError, match=refusal):
        load(tmp_path / "m", Tied)


def test_a_damaged_file_is_refused(tmp_path):
    save(saved_net(), tmp_path / "m")
    path = tmp_path / "m" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="checksum"):
        load(tmp_path / "m", SavedNet)
    path.unlink()
    with pytest.raises(StoreError, match="not complete"):
        load(tmp_path / "m", SavedNet)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[1]", "schema None"),
        ('{"schema": 2, "thrifty": "9.9"}', r"schema 2, written by thrifty 9\.9"),
        ('{"schema": 1}', "damaged: it has no weights"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(tmp_path, text, words):
    save(saved_net(), tmp_path / "m")
    (tmp_path / "m" / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=words):
        load(tmp_path / "m", SavedNet)


def test_unknown_parts_of_a_manifest_are_named(tmp_path):
    save(compress(saved_net(), RECIPES["pruned_int8"], small_task()), tmp_path / "m")
    path = tmp_path / "m" / "manifest.json"
    manifest = json.loads(path.read_text())
    for key, change in (
        ("FancyWrapper", lambda m: m["wrappers"][0].update({"class": "FancyWrapper"})),
        ("FancyLayer", lambda m: m["modules"]["head"].update({"class": "FancyLayer"})),
    ):
        changed = json.loads(json.dumps(manifest))
        change(changed)
        path.write_text(json.dumps(changed))
        with pytest.raises(StoreError, match=key):
            load(tmp_path / "m", SavedNet)


def test_no_folder_is_no_saved_model(tmp_path):
    with pytest.raises(StoreError, match=r"no manifest\.json"):
        load(tmp_path, SavedNet)


def test_a_foreign_folder_is_never_replaced(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match="choose another folder"):
        save(saved_net(), tmp_path / "m")
    assert (tmp_path / "m" / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("broken", ["safetensors.torch.save_file", "os.fsync"])
def test_a_full_disk_leaves_the_old_model_and_nothing_else(tmp_path, monkeypatch, broken):
    save(saved_net(), tmp_path / "m")
    old = (tmp_path / "m" / "weights.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("thrifty.store.save_file" if "save_file" in broken else broken, full)
    with pytest.raises(StoreError, match="No space left on device"):
        save(Tied(), tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m" / "weights.safetensors").read_bytes() == old


def test_a_failed_rename_puts_the_old_model_back(tmp_path, monkeypatch):
    import os

    save(saved_net(), tmp_path / "m")
    rename = os.rename

    def flaky(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr("os.rename", flaky)
    with pytest.raises(StoreError, match="Input/output"):
        save(saved_net(), tmp_path / "m")
    monkeypatch.undo()
    load(tmp_path / "m", SavedNet)


def test_unknown_parametrisations_and_nested_wrappers_are_refused(tmp_path):
    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 2

    model = saved_net()
    parametrize.register_parametrization(model.head, "weight", Half())
    with pytest.raises(StoreError, match=r"'head\.weight' has the parametrisation Half"):
        save(model, tmp_path / "m")
    quantized = compress(saved_net(), Recipe((Quantize(),)), small_task())
    with pytest.raises(StoreError, match="only a whole model"):
        save(nn.Sequential(quantized), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self) -> str:
            return "odd"

        def set_extra_state(self, state: str) -> None:
            pass

    with pytest.raises(StoreError, match="_extra_state"):
        save(Odd(2, 2), tmp_path / "m")


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_plain_weights_are_read_strictly(tmp_path, ending):
    from safetensors.torch import save_file

    model, path = saved_net(), tmp_path / f"w.{ending}"
    if ending == "pt":
        torch.save({"state_dict": model.state_dict()}, path)
    else:
        save_file(model.state_dict(), path)
    assert torch.equal(load_weights(SavedNet(), path)(probe()), model(probe()))
    with pytest.raises(StoreError, match=r"missing in the file: once\.weight(.|\n)*not in the model: head\.bias"):
        load_weights(Tied(), path)


def test_weights_with_nan_are_refused_by_name(tmp_path):
    model = saved_net()
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    torch.save(model.state_dict(), tmp_path / "w.pt")
    with pytest.raises(StoreError, match=r"NaN or infinity in: head\.bias"):
        load_weights(SavedNet(), tmp_path / "w.pt")


def test_pickled_code_is_never_run(tmp_path):
    torch.save(saved_net(), tmp_path / "model.pt")
    with pytest.raises(StoreError, match=r"save model\.state_dict\(\)"):
        load_weights(SavedNet(), tmp_path / "model.pt")
    (tmp_path / "x.pt").write_bytes(b"nonsense")
    with pytest.raises(StoreError, match="cannot be read"):
        load_weights(SavedNet(), tmp_path / "x.pt")
    with pytest.raises(StoreError, match="unknown ending"):
        load_weights(SavedNet(), tmp_path / "x.pkl")
