"""Group distillation joint with pruning."""

import dataclasses

import pytest
import torch
from tiny_stacks import LAYERS, WIDTH, batch_for, tiny
from torch.nn import functional

from thrifty.compress.layer_groups import (
    Matching,
    Plan,
    cluster,
    distance,
    distill_and_prune,
    group_loss,
    group_means,
    hidden_states,
    random_masks,
    similarities,
    sizes,
    stack_of,
)
from thrifty.compress.layer_groups.distill import _Run, _schedule, _targets
from thrifty.compress.layer_groups.loss import make_projections
from thrifty.errors import DataError, KnobError, StoreError, UnsupportedModel

pytest.importorskip("transformers")
SHORT = Plan(steps=3, steps_after=2, sparsity=0.3, gate_lr=0.1)
MATCHING = Matching(((0, 1), (2,), (3,)))


def stacked(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batches(name, count=3):
    return [batch_for(name, seed=s) for s in range(count)]


def test_the_loss_by_hand():
    p, q = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2), torch.tensor([4.0, 3.0]).view(1, 1, 1, 2)
    frames = torch.ones(1, 1, dtype=torch.bool)
    assert float(group_loss(p, q, frames)) == pytest.approx(1.0 - 24 / 25)
    assert float(group_loss(p, q, frames, Plan(l1=0.5, cosine=0.0, l2=2.0))) == pytest.approx(0.5 + 2.0)
    sigmoid = Plan(l1=0.0, cosine_form="log_sigmoid")
    expected = float(-functional.logsigmoid(torch.tensor(24 / 25)))
    assert float(group_loss(p, q, frames, sigmoid)) == pytest.approx(expected)


def test_padding_does_not_count():
    p, q = stacked(2, 3, 4, 5), stacked(2, 3, 4, 5, seed=1)
    frames = torch.ones(2, 4, dtype=torch.bool)
    frames[1, 2:] = False
    expected = group_loss(p, q, frames)
    p[1, :, 2:] = 1e6
    assert torch.equal(group_loss(p, q, frames), expected)


def test_equal_models_reach_the_floor_which_is_not_zero():
    model = tiny("hubert")
    floor = distance(model, model, batches("hubert"), MATCHING, Plan(cosine=0.7))
    assert floor == pytest.approx(-0.7, abs=1e-6)


def test_a_group_of_one_is_layer_to_layer_distillation():
    teacher, student, batch = tiny("bert"), tiny("roberta"), batch_for("bert", masked=False)
    with torch.no_grad():
        theirs, ours = (hidden_states(stack_of(m), batch)[2] for m in (teacher, student))
        expected = (theirs - ours).abs().mean() - functional.cosine_similarity(ours, theirs, dim=-1).mean()
    assert distance(teacher, student, [batch], Matching(((2,),))) == pytest.approx(float(expected), abs=1e-6)


def test_the_mean_of_a_group_and_its_scales():
    small, large = stacked(1, 4, 6), 1000 * stacked(1, 4, 6, seed=1)
    plain, even = (group_means([small, large], [(0, 1)], normalise)[:, 0] for normalise in (False, True))

    def likeness(x, y):
        return float(functional.cosine_similarity(x, y, dim=-1).mean())

    assert torch.allclose(plain, (small + large) / 2)
    assert likeness(plain, large) > 0.999  # the larger layer hides the smaller one
    assert likeness(even, small) > 0.4
    assert likeness(even, large) < 0.95


def test_matchings():
    found = cluster(similarities(tiny("bert"), batches("bert")).matrix, count=2)
    assert Matching.of(found) == Matching(found.groups, (0, 1))
    assert Matching.single_layers(12) == Matching(((0,), (4,), (8,), (12,)), (0, 1, 1, 1))
    assert Matching.single_layers(4).groups == ((0,), (1,), (3,), (4,))
    assert Matching.single_layers(1) == Matching(((0,), (1,)), (0, 1))


def test_projections_start_as_identities_and_are_shared():
    stack = stack_of(tiny("wavlm"))
    maps = make_projections(stack, Matching.single_layers(LAYERS))
    assert len(maps) == 2
    assert all(torch.equal(m.weight, torch.eye(WIDTH)) and not m.bias.any() for m in maps)


@pytest.mark.parametrize("name", ["wavlm", "hubert", "wav2vec2", "whisper", "bert", "llama"])
def test_every_family_is_distilled_and_pruned(name):
    model, kinds = tiny(name), ("heads", "units", "channels") if name not in ("bert", "llama") else ("heads", "units")
    before = {n: p.clone() for n, p in model.named_parameters()}
    plan = dataclasses.replace(SHORT, kinds=kinds)
    made = distill_and_prune(model, batches(name), MATCHING, plan)
    stack = stack_of(model)
    start, end = sizes(stack, made.masks)
    assert 1 - end / start == pytest.approx(0.3, abs=0.1)  # a head of these models is a large piece
    assert sum(p.numel() for p in stack_of(made.model).trunk.parameters()) == sizes(stack, made.masks, "trunk")[1]
    assert made.report.cost.params == sum(p.numel() for p in made.model.parameters())
    assert made.report.rows[1].cost.params == made.report.cost.params  # as expected before anything was cut
    assert [h["stage"] for h in made.history] == ["gates"] * 3 + ["after"] * 2
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.isfinite(hidden_states(stack_of(made.model), batch_for(name))[-1]).all()


def test_equal_seeds_give_equal_students():
    first, second, other = (
        distill_and_prune(tiny("bert"), batches("bert"), MATCHING, dataclasses.replace(SHORT, seed=s))
        for s in (0, 0, 1)
    )
    assert all(torch.equal(first.masks[n], second.masks[n]) for n in first.masks)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert any(not torch.equal(first.masks[n], other.masks[n]) for n in first.masks)


def test_the_joint_run_reaches_half_and_beats_random_pruning():
    """A 2-layer toy: half of the parameters gone, nearer to the teacher than a random half with as many steps."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=8, intermediate_size=64, vocab_size=40,
        max_position_embeddings=20, hidden_act="relu",
    )  # fmt: skip
    teacher = transformers.BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():  # half of the heads and units do next to nothing, as in a trained model
        for layer in teacher.encoder.layer:
            for part in layer.modules():
                if isinstance(part, torch.nn.Linear):
                    part.weight *= 100 / part.in_features**0.5
            layer.attention.output.dense.weight *= (torch.arange(32) // 4 % 2 == 0) * 0.98 + 0.02
            layer.output.dense.weight *= (torch.arange(64) % 2 == 0) * 0.98 + 0.02
    data = [batch_for("bert", size=4, seed=s) for s in range(12)]
    plan = Plan(sparsity=0.5, steps=100, steps_after=30, gate_lr=0.3, lambda_lr=0.02, lr=1e-3, lr_after=5e-4)
    matching = Matching(((0,), (1, 2)))
    made = distill_and_prune(teacher, data, matching, plan)
    start, end = sizes(stack_of(teacher), made.masks)
    assert 1 - end / start == pytest.approx(0.5, abs=0.02)
    assert made.history[99]["sparsity"] == pytest.approx(0.5, abs=0.07)  # the gates got there by themselves
    heads = [made.masks[f"encoder.layer.{i}:heads"] for i in (0, 1)]
    assert [torch.nonzero(h).flatten().tolist() for h in heads] == [[0, 2, 4, 6]] * 2  # those that matter
    masks = random_masks(stack_of(teacher), 0.5)
    longer = dataclasses.replace(plan, steps=0, steps_after=130, lr_after=1e-3)
    control = distill_and_prune(teacher, data, matching, longer, masks)
    fresh = [batch_for("bert", size=4, seed=s) for s in range(100, 104)]
    ours = distance(teacher, made.model, fresh, matching, plan, made.projections)
    theirs = distance(teacher, control.model, fresh, matching, plan, control.projections)
    assert ours < theirs - 0.1


def test_the_student_runs_without_dropout_layer_drop_and_masking():
    """HuBERT's config turns all three on; a student in training mode would not see the teacher's frames."""
    model = tiny("hubert").train()
    model.config.layerdrop = 0.9
    plan = dataclasses.replace(SHORT, l1=0.0)
    made = distill_and_prune(model, batches("hubert", 1), Matching(((3,),)), plan)
    assert model.training
    assert not made.model.training
    assert len(made.history) == 5


def test_gates_keep_their_step_size_unless_told():
    """The schedule ends at 0: it would hold gates and lambdas where they are, short of the target."""
    weight, gate = torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.zeros(()))
    parts = [{"params": [weight], "lr": 1.0, "scheduled": True}, {"params": [gate], "lr": 0.5, "scheduled": False}]
    optimizer = torch.optim.AdamW(parts)
    rates = []
    for step in range(10):
        _schedule(optimizer, step, 10, 0.3)
        rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"]))
    assert [r for r, _ in rates] == pytest.approx([1 / 3, 2 / 3, 1, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7])
    assert {r for _, r in rates} == {0.5}


def test_uniform_students_are_read_by_from_pretrained(tmp_path):
    from thrifty.compress.layer_groups import save

    plan = dataclasses.replace(SHORT, kinds=("units",), uniform=True, sparsity=0.2)
    made = distill_and_prune(tiny("wavlm"), batches("wavlm"), MATCHING, plan)
    again = type(made.model).from_pretrained(save(made.model, tmp_path / "m")).eval()
    batch = batch_for("wavlm")
    with torch.no_grad():
        assert torch.equal(again(**batch).last_hidden_state, made.model(**batch).last_hidden_state)


def test_faults_are_refused_together():
    with pytest.raises(KnobError, match=r"steps is -1.*ramp is 2.*lr is 0.*cosine_form.*kinds holds toes"):
        Plan(steps=-1, ramp=2, lr=0, cosine_form="no", kinds=("toes",))
    model = tiny("bert")
    with pytest.raises(KnobError, match=r"outside 0\.\.3.*3 groups, but 1 projections"):
        distill_and_prune(model, batches("bert"), Matching(((0,), (9,), (1,)), (0,)), SHORT)
    with pytest.raises(DataError, match="no batch"):
        distill_and_prune(model, [], MATCHING, SHORT)
    with pytest.raises(UnsupportedModel, match=r"model\.float"):
        distill_and_prune(model.to(torch.bfloat16), batches("bert"), MATCHING, SHORT)


@pytest.mark.parametrize("stop", [2, 4, 5])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(stop, tmp_path):
    """Cut off in the joint stage, at its end, and after pruning."""
    plan, data = dataclasses.replace(SHORT, steps=4, steps_after=3), batches("hubert")
    whole = distill_and_prune(tiny("hubert"), data, MATCHING, plan)

    def pull_the_plug(done, total, words):
        if done > stop:
            raise KeyboardInterrupt

    given = {"checkpoint": tmp_path / "run.safetensors", "every": 1}
    with pytest.raises(KeyboardInterrupt):
        distill_and_prune(tiny("hubert"), data, MATCHING, plan, progress=pull_the_plug, **given)
    seen = []
    given["progress"] = lambda done, total, words: seen.append(done)
    again = distill_and_prune(tiny("hubert"), data, MATCHING, plan, **given)
    assert seen == list(range(stop + 1, 8))
    assert again.history == whole.history
    assert all(torch.equal(again.masks[n], whole.masks[n]) for n in whole.masks)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))
    with pytest.raises(StoreError, match="another run"):
        distill_and_prune(tiny("hubert"), data, MATCHING, dataclasses.replace(plan, lr=1.0), **given)
    (tmp_path / "run.safetensors").write_bytes(b"junk")
    with pytest.raises(StoreError, match="no checkpoint"):
        distill_and_prune(tiny("hubert"), data, MATCHING, plan, **given)


def test_a_loss_that_is_nan_stops_the_run():
    stack = stack_of(tiny("bert"))
    data = batches("bert", 1)
    targets, maps = _targets(stack, data, MATCHING, SHORT), make_projections(stack, MATCHING)
    run = _Run(data, targets, MATCHING, SHORT, maps, None, 1)
    optimizer = torch.optim.SGD(run.projections.parameters(), lr=1.0)
    with pytest.raises(DataError, match="step 0: the loss is nan"):
        run._step(optimizer, [], torch.tensor(float("nan")))
