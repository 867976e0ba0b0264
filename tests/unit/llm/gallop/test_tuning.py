from __future__ import annotations

import multiprocessing
import os
import socket

import pytest
import torch
import torch.distributed as dist
from gallop_cases import changed, copies, rows, small
from tiny_llms import FAMILIES

from thrifty.errors import DataError, KnobError
from thrifty.llm.gallop import Adapter, Select, Tune, select, tune
from thrifty.llm.loading import Encoded

PATTERN = [Encoded(tuple([3 + (i * k) % 40 for i in range(1, 10)]), 2) for k in range(1, 9)]  # can be learned


def run(model, data=PATTERN, density=0.1, score="gallop", **knobs):
    found = select(model, data, Select(density=density, score=score))
    seen = []
    settings = Tune(**{"lr": 1e-2, "epochs": 4, "batch": 4, "schedule": "constant", **knobs})
    adapter = tune(model, data, found, settings, progress=seen.append)
    return adapter, seen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls(family):
    _, seen = run(small(family), lr=3e-2, epochs=10)
    assert [s.number for s in seen] == list(range(1, 21))
    assert all(s.of == 20 for s in seen)
    first, last = sum(s.loss for s in seen[:2]), sum(s.loss for s in seen[-2:])
    assert last < first - 0.5


def test_schedules():
    rates = {
        s: [x.lr for x in run(small(), steps=5, warmup=0.4, schedule=s)[1]] for s in ("constant", "linear", "cosine")
    }
    assert rates["constant"] == pytest.approx([0.005, 0.01, 0.01, 0.01, 0.01])
    assert rates["linear"] == pytest.approx([0.005, 0.01, 0.01, 0.02 / 3, 0.01 / 3])
    assert rates["cosine"] == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.0025])


def test_micro_batches_add_up_to_the_batch():
    adapters = [run(small(), micro_batch=m)[0] for m in (0, 1, 3)]
    for other in adapters[1:]:
        for name, e in adapters[0].entries.items():
            torch.testing.assert_close(other.entries[name].value, e.value, rtol=1e-3, atol=1e-4)


def test_checkpointing_changes_nothing_and_is_switched_off_again():
    model = small()
    plain, kept = run(small())[0], run(model, checkpointing=True)[0]
    assert all(torch.equal(kept.entries[n].value, e.value) for n, e in plain.entries.items())
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_same_seed_same_result_whatever_the_global_random_state():
    torch.manual_seed(1)
    one = run(small("gpt2", resid_pdrop=0.2))[0]
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    two = run(small("gpt2", resid_pdrop=0.2))[0]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(two.entries[n].value, e.value) for n, e in one.entries.items())
    other = run(small("gpt2", resid_pdrop=0.2), seed=3)[0]
    assert any(not torch.equal(other.entries[n].value, e.value) for n, e in one.entries.items())


def test_scores_see_the_data_in_the_same_order():
    """The choice of the scalars draws nothing from the order of the data."""
    first = {s: run(small(), score=s, lr=1e-9)[1][0].loss for s in ("gallop", "random", "highest")}
    assert len(set(first.values())) == 1


def test_mode_is_kept_and_the_adapter_undoes_the_training():
    model = small()
    before = copies(model)
    adapter, _ = run(model)
    assert not model.training
    assert changed(model, before)
    adapter.unmerge(model)
    assert not changed(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, DataError])
def test_an_interrupt_leaves_the_model_as_it_was(error):
    model = small()
    before = copies(model)

    def stop(step):
        if step.number == 2:
            raise error

    found = select(model, PATTERN, Select(density=0.1))
    with pytest.raises(error):
        tune(model, PATTERN, found, Tune(lr=1e-2, steps=3), progress=stop)
    assert not changed(model, before)
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_loss_that_is_no_number_is_refused():
    model = small()
    found = select(model, (), Select(density=0.1, score="highest"))
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(DataError, match="loss is no finite number"):
        tune(model, PATTERN, found, Tune(steps=1))
    with pytest.raises(DataError, match="no examples"):
        tune(model, [], found)


def test_bad_knobs_are_refused_together():
    with pytest.raises(KnobError) as caught:
        Tune(lr=-1, schedule="line", warmup=1.0, gradient="all")
    for what in ("lr is -1", "close: linear", "warmup is 1.0", "gradient is 'all'"):
        assert what in str(caught.value)


# several processes


def worker(rank, port, count, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    reduced = []
    plain = dist.all_reduce
    dist.all_reduce = lambda tensor, *a, **k: (reduced.append(tensor.numel()), plain(tensor, *a, **k))[1]
    try:
        model = small()
        data = rows(11, seed=2)
        found = select(model, data, Select(density=0.1))
        selecting, reduced[:] = list(reduced), []
        adapter = tune(model, data, found, Tune(lr=1e-2, steps=4, batch=5, schedule="constant"))
        adapter.save(f"{folder}/{rank}.safetensors")
        torch.save({"selecting": selecting, "tuning": reduced, "k": found.count}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_equal_one_and_exchange_k_numbers_a_step(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    multiprocessing.set_forkserver_preload(["transformers.models.llama.modeling_llama", "thrifty.llm.gallop"])
    start = torch.multiprocessing.start_processes
    start(worker, (port, 2, str(tmp_path)), nprocs=2, start_method="forkserver")
    model = small()
    data = rows(11, seed=2)
    found = select(model, data, Select(density=0.1))
    alone = tune(model, data, found, Tune(lr=1e-2, steps=4, batch=5, schedule="constant"))
    ranks = [Adapter.load(tmp_path / f"{r}.safetensors") for r in range(2)]
    for name, e in alone.entries.items():
        assert torch.equal(ranks[0].entries[name].value, ranks[1].entries[name].value)
        assert torch.equal(ranks[0].entries[name].index, e.index)
        torch.testing.assert_close(ranks[0].entries[name].value, e.value, rtol=1e-3, atol=1e-4)
    for r in range(2):
        sent = torch.load(tmp_path / f"{r}.pt")
        assert sent["tuning"] == [found.count] * 4
        assert sum(sent["selecting"]) == found.eligible  # the choice itself: once, every gradient
