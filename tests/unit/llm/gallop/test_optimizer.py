from __future__ import annotations

import copy

import pytest
import torch
from gallop_cases import all_of, changed, copies, dense_gradients, rows, small, weights_of
from tiny_llms import FAMILIES

from thrifty.errors import DataError, Incompatible, KnobError, StoreError
from thrifty.llm.gallop import Select, SparseAdamW, select
from thrifty.llm.gallop.masters import read_masters, rest_for, write_masters
from thrifty.llm.gallop.partial_gradient import way_of
from thrifty.llm.gallop.tuning import checkpoint_blocks
from thrifty.llm.loading import collate, completion_losses


def some(model, density=0.1, **knobs):
    return select(model, (), Select(density=density, score="random", **knobs))


def backward(model, data, share=1.0):
    (completion_losses(model, collate(data)).mean() * share).backward()


def steps(model, optimizer, n=5, data=None):
    for _ in range(n):
        backward(model, data or rows(6))
        optimizer.step()


def dense_adamw(model, n=5, clip=0.0, lr=1e-2, **more):
    names = weights_of(model)
    for p in model.parameters():
        p.requires_grad_(False)
    for p in names.values():
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(names.values(), lr=lr, **more)
    for _ in range(n):
        optimizer.zero_grad()
        backward(model, rows(6))
        if clip:
            torch.nn.utils.clip_grad_norm_(names.values(), clip)
        optimizer.step()


# equality with dense AdamW


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("decay", "clip"), [(0.0, 0.0), (0.1, 0.0), (0.1, 0.01)])
def test_all_scalars_equal_dense_adamw_bit_for_bit(family, decay, clip):
    sparse, dense = small(family), small(family)
    optimizer = SparseAdamW(sparse, all_of(sparse), lr=1e-2, weight_decay=decay, clip=clip)
    assert set(optimizer.ways().values()) == {"dense"}
    steps(sparse, optimizer)
    dense_adamw(dense, weight_decay=decay, clip=clip)
    for (name, a), b in zip(sparse.named_parameters(), dense.parameters()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("scope", ["block", "tensor"])
def test_all_scalars_equal_dense_adamw_in_any_scope(scope):
    sparse, dense = small(), small()
    steps(sparse, SparseAdamW(sparse, all_of(sparse, scope=scope), lr=1e-2))
    dense_adamw(dense, weight_decay=0.0)
    assert all(torch.equal(a, b) for a, b in zip(sparse.parameters(), dense.parameters()))


@pytest.mark.parametrize("gradient", ["dense", "rows", "entries"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_chosen_scalars_move_as_under_a_masked_dense_adamw(gradient, decay):
    """Masked gradients with decay on the chosen only; `rows` and `entries` sum in another order."""
    model, twin = small(), small()
    found = some(model)
    steps(model, SparseAdamW(model, found, lr=1e-2, weight_decay=decay, gradient=gradient), 3)
    names = weights_of(twin)
    before = copies(twin)
    dense_gradient_steps(twin, names, found, decay)
    for name, w in weights_of(model).items():
        mask = found.mask(name)
        assert torch.equal(w[~mask], before[name][~mask])
        tolerance = {"rtol": 0, "atol": 0} if gradient == "dense" else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(w[mask], names[name][mask], **tolerance)


def dense_gradient_steps(model, names, found, decay):
    optimizer = torch.optim.AdamW(names.values(), lr=1e-2, weight_decay=decay)
    before = copies(model)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model, rows(6))
        optimizer.step()
        for name, w in names.items():
            with torch.no_grad():
                w[~found.mask(name)] = before[name][~found.mask(name)]


def test_decay_to_the_pretrained_numbers():
    model = small()
    base = copies(model)
    found = all_of(model)
    optimizer = SparseAdamW(model, found, lr=0.1, weight_decay=0.5, decay_to="pretrained")
    steps(model, optimizer, 1)
    moved = {name: (w - base[name]).abs().max() for name, w in weights_of(model).items()}
    for _ in range(50):  # without gradients, Adam's momentum dies out and decay pulls back
        optimizer.step()
    assert all((w - base[n]).abs().max() < moved[n] for n, w in weights_of(model).items())
    for _ in range(400):
        optimizer.step()
    assert all(torch.allclose(w, base[n], atol=1e-3) for n, w in weights_of(model).items())


# gradients


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gradient", ["auto", "dense", "rows", "entries"])
def test_gradients_of_the_chosen_are_those_of_autograd_and_add_up(family, gradient):
    model = small(family)
    found = some(model, 0.08)
    expected = dense_gradients(model, rows(6), found.shapes)
    optimizer = SparseAdamW(model, found, gradient=gradient)
    backward(model, rows(6), 0.5)
    backward(model, rows(6), 0.5)
    assert not any(p.grad is not None for p in model.parameters())
    for part in optimizer.parts:
        wanted = expected[part.name].flatten()[found.indices[part.name].long()]
        torch.testing.assert_close(part.grad, wanted, rtol=1e-4, atol=1e-6)


def test_dense_accumulation_is_exact():
    model = small()
    found = some(model)
    optimizer = SparseAdamW(model, found, gradient="dense")
    one, two = rows(6), rows(6, seed=1)
    expected = [dense_gradients(model, data, found.shapes) for data in (one, two)]
    backward(model, one)
    backward(model, two)
    for part in optimizer.parts:
        index = found.indices[part.name].long()
        assert torch.equal(part.grad, expected[0][part.name].flatten()[index] + expected[1][part.name].flatten()[index])


@pytest.mark.parametrize("gradient", ["dense", "rows", "entries"])
def test_gradient_checkpointing_changes_nothing(gradient):
    model = small()
    found = some(model)
    with SparseAdamW(model, found, gradient=gradient) as optimizer:
        backward(model, rows(6))
        plain = optimizer.grad.clone()
        optimizer.zero_grad()
        model.train()
        checkpoint_blocks(model, True)
        backward(model, rows(6))
        assert torch.equal(optimizer.grad, plain)
        assert bool(plain.any())


def test_ways_are_chosen_by_cost():
    cpu = torch.device("cpu")
    full, half = torch.float32, torch.bfloat16
    assert way_of(cpu, full, 0.01, 1.0) == "entries"
    assert way_of(cpu, full, 0.02, 0.02) == "rows"
    assert way_of(cpu, full, 0.9, 1.0) == "dense"
    assert way_of(cpu, half, 0.01, 1.0) == "entries"
    assert way_of(cpu, half, 0.1, 1.0) == "dense"  # dense products are four times as quick there
    assert way_of(torch.device("cuda"), full, 0.01, 1.0) == "dense"
    assert way_of(torch.device("cuda"), full, 0.01, 0.1) == "rows"
    model = small(width=32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 9.0
    found = select(model, (), Select(count=32, score="highest"))
    assert SparseAdamW(model, found).ways() == {"model.layers.0.mlp.up_proj.weight": "rows"}


def test_a_tensor_outside_the_blocks_gathers_its_own_gradient():
    model = small("gpt2")
    found = some(model, 0.2, patterns=["transformer.wte.weight", "*.ln_1.weight"])
    expected = dense_gradients(model, rows(6), found.shapes)
    optimizer = SparseAdamW(model, found)
    backward(model, rows(6))
    for part in optimizer.parts:  # the tied embedding holds the sum of both its uses
        torch.testing.assert_close(part.grad, expected[part.name].flatten()[found.indices[part.name].long()])


# what stays


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gradient", ["dense", "rows", "entries"])
def test_untouched_entries_are_untouched(family, gradient):
    model = small(family)
    before, found = copies(model), some(model, 0.03)
    optimizer = SparseAdamW(model, found, lr=1e-2, weight_decay=0.1, gradient=gradient)
    steps(model, optimizer, 3)
    moved = changed(model, before)
    assert moved
    for name, at in moved.items():
        assert set(at.tolist()) <= set(found.indices[name].tolist()), name
    optimizer.restore()
    assert not changed(model, before)


def test_one_scalar_changes():
    model = small()
    before = copies(model)
    found = select(model, rows(), Select(count=1))
    steps(model, SparseAdamW(model, found, lr=1e-2), 2)
    moved = changed(model, before)
    assert [len(at) for at in moved.values()] == [1]


def test_close_gives_the_model_back():
    model = small()
    model.lm_head.weight.requires_grad_(False)
    needs = [p.requires_grad for p in model.parameters()]
    with SparseAdamW(model, some(model, 0.03)) as optimizer:
        assert model.model.layers[0].mlp.up_proj.forward.__qualname__.startswith("PartialGradient")
        backward(model, rows(6))
    assert [p.requires_grad for p in model.parameters()] == needs
    assert not any("forward" in vars(m) for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    copy.deepcopy(model)
    with pytest.raises(Incompatible, match="closed"):
        optimizer.step()


# memory


@pytest.mark.parametrize(("dtype", "gradient"), [("float32", "dense"), ("bfloat16", "dense")])
def test_bytes_kept_are_twenty_a_scalar(dtype, gradient):
    model = small(width=64).to(getattr(torch, dtype))
    found = some(model, 0.2)
    optimizer = SparseAdamW(model, found, gradient=gradient)
    assert optimizer.bytes_kept == 20 * found.count + 4 * len(optimizer.parts)


def test_bytes_kept_with_derived_indices_are_twenty_and_one_a_row():
    model = small(width=64)
    found = some(model, 0.05)
    optimizer = SparseAdamW(model, found, gradient="entries")
    row_ends = sum(4 * (shape[0] + 1) for shape in found.shapes.values())
    assert optimizer.bytes_kept == 20 * found.count + row_ends + 4 * len(optimizer.parts)


def test_no_dense_gradient_outlives_its_hook(monkeypatch):
    """At any hook, no other weight holds a gradient: the peak is one dense gradient."""
    model = small()
    optimizer = SparseAdamW(model, some(model), gradient="dense")
    alive = []

    def spy(p):
        alive.append(sum(q.grad is not None for q in model.parameters()))

    for p in weights_of(model).values():
        p.register_post_accumulate_grad_hook(spy)
    backward(model, rows(6))
    assert len(alive) == len(optimizer.parts)
    assert max(alive) == 0  # this hook runs after the optimiser's: its own gradient is gone already


# bfloat16


def test_masters_come_back_as_written():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1000, generator=generator).bfloat16()
    index = torch.arange(0, 1000, 2, dtype=torch.int32)
    rest = rest_for(weight, 500)
    assert torch.equal(read_masters(weight, index, rest), weight[::2].float())
    odd = weight[1::2].clone()
    values = torch.randn(500, generator=generator) * torch.logspace(-8, 2, 500)
    write_masters(weight, index, rest, values)
    assert torch.equal(read_masters(weight, index, rest), values)
    assert torch.equal(weight[::2], values.bfloat16())
    assert torch.equal(weight[1::2], odd)


def test_masters_half_way_lose_at_most_one_step():
    half = (torch.tensor([1.0, -3.0]).view(torch.int32) + 0x8000).view(torch.float32)
    weight = torch.zeros(2, dtype=torch.bfloat16)
    index = torch.arange(2)
    rest = rest_for(weight, 2)
    write_masters(weight, index, rest, half)
    back = read_masters(weight, index, rest)
    assert int((back.view(torch.int32) - half.view(torch.int32)).abs().max()) <= 1
    assert torch.equal(back.bfloat16(), weight)


def test_a_bfloat16_model_learns_what_its_format_cannot_hold():
    """Many small steps, each below half a bfloat16 step, add up in the masters."""
    model = small().bfloat16()
    found = select(model, (), Select(count=10, score="highest"))
    optimizer = SparseAdamW(model, found, lr=1e-5, gradient="dense")
    start = torch.cat(list(optimizer.values().values()))
    stored = torch.cat([w.flatten() for w in weights_of(model).values()]).clone()
    steps(model, optimizer, 3)
    now = torch.cat(list(optimizer.values().values()))
    assert bool((now != start).all())
    assert torch.equal(torch.cat([w.flatten() for w in weights_of(model).values()]), stored)
    torch.testing.assert_close((now - start).abs(), torch.full((10,), 3e-5), rtol=0.5, atol=0)


# refusals, resuming


def test_bad_knobs_are_refused_together():
    model = small()
    with pytest.raises(KnobError) as caught:
        SparseAdamW(model, some(model), lr=0, betas=(0.9, 1.0), decay_to="one", gradient="row")
    for what in ("lr is 0", "betas are", "decay_to is 'one'", "close: rows"):
        assert what in str(caught.value)
    assert all(p.requires_grad for p in model.parameters())


def test_a_selection_of_another_model_is_refused():
    with pytest.raises(Incompatible, match=r"is missing"):
        SparseAdamW(small("gpt2"), some(small()))
    with pytest.raises(Incompatible, match=r"is \(32, 32\), not \(16, 16\)"):
        SparseAdamW(small(width=32), some(small()))


def test_a_gradient_that_is_no_number_is_refused_before_anything_changes():
    model = small()
    optimizer = SparseAdamW(model, some(model))
    before = copies(model)
    backward(model, rows(6))
    optimizer.parts[2].grad[0] = torch.inf
    with pytest.raises(DataError, match=optimizer.parts[2].name):
        optimizer.step()
    assert not changed(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_from_its_state(dtype):
    whole, halves = small().to(dtype), small().to(dtype)
    found = some(whole)
    steps(whole, SparseAdamW(whole, found, lr=1e-2), 4)
    first = SparseAdamW(halves, found, lr=1e-2)
    steps(halves, first, 2)
    state = first.state_dict()
    first.restore()
    second = SparseAdamW(halves, found, lr=1e-2)
    second.load_state_dict(state)
    steps(halves, second, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters()))
    with pytest.raises(StoreError, match="another selection"):
        second.load_state_dict({"mean": torch.zeros(2)})
