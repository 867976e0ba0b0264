"""A tuning run that was interrupted goes on with the same result, bit for bit."""

from __future__ import annotations

import pytest
import torch
from gallop_cases import copies, rows, small

from thrifty.errors import StoreError
from thrifty.llm.gallop import Checkpoint, Select, Tune, fingerprint, select, tune


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, dtype):
    model, data = small(attention_dropout=0.3).to(dtype), rows()  # dropout: its random state is kept too
    chosen = select(model, data, Select(density=0.05))
    settings = Tune(lr=1e-2, steps=7, batch=4)
    whole = tune(model, data, chosen, settings)
    whole.unmerge(model)
    before = copies(model)
    key = {"tune": "x", **fingerprint(model, data)}
    file = Checkpoint(tmp_path / "run", key)
    file.write(chosen)

    def stop(step):
        if step.number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, data, chosen, settings, stop, checkpoint=file)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    numbers = []
    again = Checkpoint(tmp_path / "run", key)
    kept = again.selection()
    adapter = tune(model, data, kept, settings, lambda s: numbers.append(s.number), checkpoint=again)
    assert numbers == [4, 5, 6, 7]
    for name, e in whole.entries.items():
        assert torch.equal(e.index, adapter.entries[name].index)
        assert torch.equal(e.value, adapter.entries[name].value)
    assert adapter.info == whole.info


def test_a_run_of_something_else_is_refused_by_name(tmp_path):
    model, data = small(), rows()
    chosen = select(model, data, Select(density=0.05))
    Checkpoint(tmp_path / "run", {"lr": 1, **fingerprint(model, data)}).write(chosen)
    with pytest.raises(StoreError, match=r"other lr, data"):
        Checkpoint(tmp_path / "run", {"lr": 2, **fingerprint(model, data[1:])}).selection()
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(StoreError, match="no interrupted run"):
        Checkpoint(tmp_path / "bad", {}).selection()
    assert Checkpoint(tmp_path / "none", {}).selection() is None
    with pytest.raises(StoreError, match="cannot be written"):
        Checkpoint(tmp_path / "no" / "where", {}).write(chosen)


def test_it_writes_every_so_often(tmp_path):
    model, data = small(), rows()
    chosen = select(model, data, Select(density=0.05))
    file = Checkpoint(tmp_path / "run", {}, seconds=0)
    tune(model, data, chosen, Tune(steps=2), checkpoint=file)
    kept = []
    tune(small(), data, chosen, Tune(steps=2), kept.append, checkpoint=Checkpoint(tmp_path / "run", {}))
    assert kept == []
