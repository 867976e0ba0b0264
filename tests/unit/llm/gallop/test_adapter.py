from __future__ import annotations

import copy
import json

import pytest
import torch
from gallop_cases import changed, copies, rows, small
from safetensors.torch import load_file, save_file
from tiny_llms import FAMILIES, tokens

from thrifty.errors import DataError, Incompatible, StoreError
from thrifty.llm.gallop import Adapter, Select, SparseAdamW, Tune, combine, overlap, select, tune
from thrifty.llm.gallop.adapter import Entries


def tuned(model, seed=0, density=0.05, **knobs):
    """Train a copy; return it and its adapter."""
    twin = copy.deepcopy(model)
    found = select(twin, rows(seed=seed), Select(density=density, **knobs))
    return twin, tune(twin, rows(seed=seed), found, Tune(lr=1e-2, steps=3, batch=6), base="tiny")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_reloaded_merged_gives_the_same_logits_and_unmerged_the_base(tmp_path, family, dtype):
    base = small(family).to(dtype)
    before = copies(base)
    model, adapter = tuned(base)
    again = Adapter.load(adapter.save(tmp_path / "a.safetensors"))
    assert again.info == adapter.info
    again.merge(base)
    assert torch.equal(base(tokens()).logits, model(tokens()).logits)
    assert not changed(base, copies(model))
    moved = changed(base, before)
    assert set(moved) <= set(again.entries)
    assert all(set(at.tolist()) <= set(again.entries[n].index.tolist()) for n, at in moved.items())
    again.unmerge(base)
    assert not changed(base, before)
    assert len(list(tmp_path.iterdir())) == 1  # no partial file is left


def test_subtracting_the_change_would_not_restore_the_base():
    """Why the file holds the original numbers."""
    base = small(width=32)
    _, adapter = tuned(base, density=0.5)
    lost = [
        ((e.base + (e.value - e.base)) - (e.value - e.base) != e.base).float().mean() for e in adapter.entries.values()
    ]
    assert max(float(x) for x in lost) > 0.01


def test_header_says_how_it_was_made(tmp_path):
    _, adapter = tuned(small(), score="saft")
    info = Adapter.load(adapter.save(tmp_path / "a")).info
    assert info["base"] == "tiny"
    assert info["selection"]["score"] == "saft"
    assert info["density"] == pytest.approx(0.05, abs=1e-3)
    assert info["steps"] == 3
    assert info["examples"] == 12


def test_an_empty_tensor_is_no_trouble(tmp_path):
    base = small()
    found = select(base, (), Select(count=1, score="highest"))
    with SparseAdamW(base, found) as optimizer:
        adapter = Adapter.of(optimizer)
    assert adapter.count == 1
    Adapter.load(adapter.save(tmp_path / "a")).merge(base)


# refusals


def test_another_base_is_refused_by_checksum():
    base = small()
    _, adapter = tuned(base)
    name = next(iter(adapter.entries))
    other = copy.deepcopy(base)
    with torch.no_grad():  # one entry that the adapter does not even touch
        free = next(i for i in range(9999) if i not in set(adapter.entries[name].index.tolist()))
        other.get_parameter(name).view(-1)[free] += 1e-3
    before = copies(other)
    with pytest.raises(Incompatible, match=rf"{name}: wrong base checksum"):
        adapter.merge(other)
    with pytest.raises(Incompatible, match=r"wrong base checksum, and [0-9]+ of the tuned entries differ"):
        adapter.merge(small(seed=5))
    assert not changed(other, before)


def test_shape_dtype_and_missing_tensors_are_refused():
    base = small()
    _, adapter = tuned(base)
    with pytest.raises(Incompatible, match=r"is \(32, 32\)"):
        adapter.merge(small(width=32))
    with pytest.raises(Incompatible, match="bfloat16"):
        adapter.merge(small().bfloat16())
    with pytest.raises(Incompatible, match="is missing"):
        adapter.merge(small("gpt2"))


def test_merging_twice_and_unmerging_what_is_not_merged_are_refused():
    base = small()
    before = copies(base)
    _, adapter = tuned(base)
    with pytest.raises(Incompatible, match="not what is merged"):
        adapter.unmerge(base)
    adapter.merge(base)
    with pytest.raises(Incompatible, match="merged already"):
        adapter.merge(base)
    name = next(iter(adapter.entries))
    free = next(i for i in range(9999) if i not in set(adapter.entries[name].index.tolist()))
    with torch.no_grad():
        base.get_parameter(name).view(-1)[free] += 1.0
    with pytest.raises(Incompatible, match="other entries were changed too"):
        adapter.unmerge(base)
    assert set(changed(base, before)) <= set(adapter.entries)


def damage(path, **edits):
    """Rewrite a file with other tensors or another header."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["thrifty"])
    tensors = load_file(path)
    name = next(iter(header["tensors"]))
    for kind, change in edits.items():
        if kind == "header":
            change(header)
        elif change is None:
            del tensors[f"{name}.{kind}"]
        else:
            tensors[f"{name}.{kind}"] = change(tensors[f"{name}.{kind}"])
    save_file(tensors, path, metadata={"thrifty": json.dumps(header)})
    return path


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"idx": lambda t: t.flip(0)}, "not ascending"),
        ({"idx": lambda t: torch.cat([t[:-1], t[-2:-1]])}, "not ascending"),
        ({"idx": lambda t: t + 100_000}, r"not ascending inside \[0, "),
        ({"idx": lambda t: t.float()}, "indices are torch.float32"),
        ({"val": lambda t: t * torch.nan}, "NaN"),
        ({"val": lambda t: t[:-1].clone()}, "indices, .* values, .* originals"),
        ({"base": None}, "base is missing"),
        ({"extra": lambda t: t, "val": None}, "val is missing"),
        ({"header": lambda h: h.update(format=9)}, r"format 1 \(its format: 9\)"),
    ],
)
def test_damaged_files_are_refused(tmp_path, edits, message):
    _, adapter = tuned(small())
    path = adapter.save(tmp_path / "a")
    if "extra" in edits:
        edits = {k: v for k, v in edits.items() if k != "extra"}
    with pytest.raises(StoreError, match=message):
        Adapter.load(damage(path, **edits))


def test_what_is_no_adapter_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(StoreError, match="no sparse adapter"):
        Adapter.load(tmp_path / "x")
    with pytest.raises(StoreError, match="no sparse adapter"):
        Adapter.load(tmp_path / "missing")
    save_file({"a": torch.ones(2)}, tmp_path / "y")
    with pytest.raises(StoreError, match="its format: None"):
        Adapter.load(tmp_path / "y")
    _, adapter = tuned(small())
    with pytest.raises(StoreError, match="cannot be written"):
        adapter.save(tmp_path / "no" / "folder")


# several at once


def entry(index, value, base):
    return Entries(torch.tensor(index, dtype=torch.int32), torch.tensor(value), torch.tensor(base), (2, 3), "c")


def test_combined_by_hand():
    one = Adapter({"w": entry([0, 2], [1.5, 3.0], [1.0, 2.0])}, {})
    two = Adapter({"w": entry([2, 5], [2.25, 0.0], [2.0, 4.0]), "v": entry([1], [7.0], [6.0])}, {})
    both = combine([one, two])
    assert both.entries["w"].index.tolist() == [0, 2, 5]
    assert both.entries["w"].value.tolist() == [1.5, 3.25, 0.0]
    assert both.entries["w"].base.tolist() == [1.0, 2.0, 4.0]
    assert both.entries["v"] is two.entries["v"]
    assert combine([one, two], [1.0, -2.0]).entries["w"].value.tolist() == [1.5, 2.5, 12.0]
    found = overlap(one, two)
    assert found["common"] == 1
    assert found["share"] == 0.5
    assert found["jaccard"] == 0.25
    assert found["expected_share"] == pytest.approx(2 * 2 / 6 / 2)
    assert found["tensors"] == {"w": 1}


def test_several_are_merged_and_taken_out_at_once():
    base = small()
    before = copies(base)
    one, two = tuned(base)[1], tuned(base, seed=1)[1]
    both = combine([one, two])
    assert both.count == one.count + two.count - overlap(one, two)["common"]
    both.merge(base)
    for name, e in both.entries.items():
        change = torch.zeros(e.shape).flatten()
        for a in (one, two):
            if name in a.entries:
                x = a.entries[name]
                change[x.index.long()] += x.value - x.base
        torch.testing.assert_close(base.get_parameter(name).flatten(), before[name].flatten() + change)
    both.unmerge(base)
    assert not changed(base, before)
    assert combine([one]).entries == one.entries


def test_adapters_of_different_bases_are_not_combined():
    one, two = tuned(small())[1], tuned(small(seed=3))[1]
    with pytest.raises(Incompatible, match="different bases: model"):
        combine([one, two])
    with pytest.raises(DataError, match="0 and 0"):
        combine([])
    with pytest.raises(DataError, match="1 and 2"):
        combine([one], [1.0, 2.0])


def test_overlap_of_scores():
    model = small(width=32)
    found = {s: select(model, rows(), Select(density=0.05, score=s)) for s in ("gallop", "saft", "lowest", "highest")}
    share = {(a, b): overlap(found[a], found[b])["share"] for a in found for b in found}
    assert all(share[s, s] == 1.0 for s in found)
    assert share["lowest", "highest"] == 0.0
    assert share["gallop", "lowest"] > share["saft", "lowest"]
    assert share["gallop", "saft"] > overlap(found["gallop"], found["saft"])["expected_share"]
