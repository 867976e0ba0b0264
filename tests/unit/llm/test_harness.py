"""lm-eval on changed models gives what lm-eval gives on the models themselves; diffusion models: known likelihoods."""

from __future__ import annotations

import copy
import runpy
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_llms import tiny, tokens
from tiny_text import MASKED, Pair, Unigram, causal_folder, characters, jsonl, masked_folder

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'thrifty[lm_eval]'")

from thrifty.errors import Incompatible, KnobError
from thrifty.llm.causal_shift import attenuate
from thrifty.llm.d5p4 import is_greedy, log_likelihood_bound
from thrifty.llm.families import parts_of
from thrifty.llm.gallop import Select, Tune, select, tune
from thrifty.llm.harness import DiffusionLM, ThriftyLM, _pieces, harness_model
from thrifty.llm.inner_loop import Plan
from thrifty.llm.loading import Encoded

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {file}, cache_dir: {cache}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
"""
GENERATE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {file}, cache_dir: {cache}}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{goal}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 6, do_sample: false}}
metric_list:
  - {{metric: exact_match}}
"""


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """A function: model of lm-eval -> everything that two local tasks found, samples included; no network."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    pairs = [(a, b) for a in (2, 3) for b in (4, 5)]
    choices = [[f" {a + b}", f" {a * b} or more", " a cat"] for a, b in pairs]
    questions = [
        {"prompt": f"{a} and {b} make", "choices": c, "answer": a % 3} for (a, b), c in zip(pairs, choices, strict=True)
    ]
    goals = [{"prompt": f"Count to {n}:", "goal": str(n)} for n in (3, 4)]
    for name, text, lines in (("tiny_choice", CHOICE, questions), ("tiny_text", GENERATE, goals)):
        file = jsonl(folder / f"{name}.jsonl", lines)
        (folder / f"{name}.yaml").write_text(text.format(name=name, file=file, cache=folder / "cache"))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    refused = pytest.MonkeyPatch()

    def no_network(self, address):
        raise AssertionError(f"lm-eval connects to {address}")

    refused.setattr(socket.socket, "connect", no_network)

    def run(model, limit=None):
        found = simple_evaluate(
            model=model, tasks=["tiny_choice", "tiny_text"], task_manager=manager, bootstrap_iters=0, limit=limit
        )
        answers = {name: [(s["doc_id"], s["filtered_resps"]) for s in of] for name, of in found["samples"].items()}
        return found["results"], answers

    yield run
    refused.undo()


@pytest.fixture
def model():
    """A tiny Llama that the test may change, with four blocks that do something."""
    return tiny("llama", width=16, scale=2.0)


def plain(model, **options):
    """Return lm-eval's own adapter around a model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=characters(), backend="causal", **options)


def unrolled(model, plan):
    """Return a copy of a model whose blocks are physically repeated."""
    twin = copy.deepcopy(model)
    parts = parts_of(twin)
    blocks = torch.nn.ModuleList(copy.deepcopy(parts.blocks[i]) for i in plan.order(len(parts.blocks)))
    for place, block in enumerate(blocks):
        block.self_attn.layer_idx = place
    parts.replace_blocks(blocks)
    twin.config.num_hidden_layers = len(blocks)
    return twin


def test_base_one_pass_and_undone_are_lm_evals_own(model, evaluate):
    expected = evaluate(plain(model, batch_size=3))
    assert evaluate(harness_model(model, characters(), batch_size=3)) == expected
    once = harness_model(model, characters(), Plan(1, 3, passes=1), batch_size=3)
    assert evaluate(once) == expected
    assert once.get_model_info()["thrifty"]["plan"]["passes"] == 1
    once.undo()
    twice = harness_model(model, characters(), Plan(1, 3, passes=2), batch_size=3)
    assert evaluate(twice)[1] != expected[1]
    twice.undo()
    assert evaluate(plain(model, batch_size=3)) == expected


def test_a_looped_model_is_its_unrolled_copy(model, evaluate):
    plan = Plan(1, 3, passes=3, mode="naive")
    expected = evaluate(plain(unrolled(model, plan), batch_size=2))
    lm = harness_model(model, characters(), plan, batch_size=2)
    assert evaluate(lm) == expected
    model.config.use_cache = False  # lm-eval scores with whatever the configuration says
    assert evaluate(lm) == expected
    lm.undo()
    one = evaluate(harness_model(model, characters(), plan, batch_size=1), limit=3)[1]
    for task, rows in one.items():
        for (_, found), (_, wanted) in zip(rows, expected[1][task][:3], strict=True):
            for a, b in zip(found, wanted, strict=True):
                assert a == b if isinstance(a, str) else a[0] == pytest.approx(b[0], abs=1e-4)


@pytest.fixture
def adapter(model, tmp_path):
    """An adapter file of the model, which is the base again."""
    data = [Encoded(tuple(row), 2) for row in tokens(8, 10, vocabulary=70).tolist()]
    made = tune(model, data, select(model, data, Select(density=0.1)), Tune(lr=0.05, steps=5))
    made.save(tmp_path / "a.safetensors")
    made.unmerge(model)
    return tmp_path / "a.safetensors", made


def test_an_adapter_file_and_a_merged_model_are_the_same(model, adapter, evaluate):
    path, made = adapter
    base = evaluate(plain(model))
    applied = harness_model(model, characters(), adapters=[path])
    found = evaluate(applied)
    applied.undo()
    merged = copy.deepcopy(model)
    made.merge(merged)
    assert found == evaluate(plain(merged))
    assert found[1] != base[1]
    assert evaluate(plain(model)) == base


def test_loop_attenuation_and_adapter_together(model, adapter, evaluate):
    """The order of changes is fixed: a block that is attenuated is so in every pass."""
    path, made = adapter
    plan = Plan(1, 3, passes=2, mode="naive")
    lm = harness_model(model, characters(), plan, {2: 0.5}, [path])
    found = evaluate(lm)
    lm.undo()
    by_hand = copy.deepcopy(model)
    made.merge(by_hand)
    by_hand = unrolled(by_hand, plan)
    with attenuate(by_hand, {2: 0.5, 4: 0.5}, form="module"):  # block 2 is at places 2 and 4
        assert evaluate(plain(by_hand)) == found
    with pytest.raises(KnobError, match="blocks are 0"):
        harness_model(model, characters(), adapters=[path], attenuation={9: 0.5})
    harness_model(model, characters(), adapters=[path]).undo()  # the refusal has left the base
    with pytest.raises(Incompatible, match="wrong base checksum"):
        harness_model(tiny("llama", width=16, seed=1), characters(), adapters=[path])
    with pytest.raises(KnobError, match="scope 'position'"):
        harness_model(model, characters(), Plan(1, 3, mode="alignment", scope="last"))


def test_names_of_the_registry(tmp_path, evaluate):
    from lm_eval.api.registry import get_model

    folder = causal_folder(tmp_path / "m")
    arguments = f"model={folder},plan=1:3:2,mode=reference,attenuate=0:0.5+2:0.25,max_length=64"
    lm = get_model("thrifty").create_from_arg_string(arguments, {"batch_size": 2, "device": None})
    assert isinstance(lm, ThriftyLM)
    assert (lm.max_length, lm.batch_size) == (64, 2)
    of = lm.changed.changes
    assert of.plan == Plan(1, 3, 2, "reference")
    assert of.attenuation == {0: 0.5, 2: 0.25}
    again = harness_model(lm.undo(), characters(), of.plan, of.attenuation, max_length=64, batch_size=2)
    found = evaluate(again)
    assert evaluate(get_model("thrifty").create_from_arg_string(arguments, {"batch_size": 2})) == found
    with pytest.raises(KnobError, match="mode without a plan"):
        get_model("thrifty").create_from_arg_string(f"model={folder},mode=naive")


def test_the_module_runs_lm_evals_command_line(monkeypatch):
    names, called = [], []

    def register(name):
        assert name not in names, "registered twice"
        names.append(name)
        return lambda kind: kind

    monkeypatch.setattr("lm_eval.api.registry.register_model", register)
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: called.append(list(names)))
    monkeypatch.delitem(sys.modules, "thrifty.llm.harness")
    runpy.run_module("thrifty.llm.harness", run_name="__main__")
    assert called == [["thrifty", "thrifty-diffusion"]]


def test_the_bound_is_tight_for_exact_denoisers():
    torch.manual_seed(3)
    joint = torch.rand(5, 5) ** 3
    joint /= joint.sum()
    generator = torch.Generator().manual_seed(0)
    both = torch.tensor([True, True])
    for ids in ([0, 1], [3, 3], [4, 2]):
        found = log_likelihood_bound(Pair(joint), torch.tensor(ids), both, generator, samples=4000, batch=500)
        assert found.error > 0
        assert found.value == pytest.approx(float(joint[ids[0], ids[1]].log()), abs=3 * found.error)
        one = log_likelihood_bound(Pair(joint), torch.tensor(ids), torch.tensor([False, True]), generator)
        assert (one.passes, one.tokens, one.error) == (1, 1, 0.0)
        assert one.value == pytest.approx(float((joint[ids[0], ids[1]] / joint[ids[0]].sum()).log()), abs=1e-6)


def test_greedy_is_one_token_a_step_the_surest_first():
    """The surest first token decides what the other one is: not both argmaxes at once."""
    joint = torch.tensor([[0.30, 0.00, 0.28], [0.02, 0.38, 0.02], [0.0, 0.0, 0.0]]) + 1e-9
    # first: 0 (0.58), second: 1 (0.38); 0 is surer, and given 0 the second is 0
    both = torch.tensor([True, True])
    assert is_greedy(Pair(joint), torch.tensor([0, 0]), both)
    for wrong in ([0, 1], [1, 1], [0, 2]):
        assert not is_greedy(Pair(joint), torch.tensor(wrong), both)
    assert is_greedy(Pair(joint), torch.tensor([1, 1]), torch.tensor([False, True]))


def requests(*arguments):
    """Return what lm-eval hands to a model."""
    return [SimpleNamespace(args=a) for a in arguments]


@pytest.fixture
def unigram():
    """A DiffusionLM that says the same everywhere; its probabilities by character."""
    tokenizer = characters(MASKED)
    p = torch.rand(len(tokenizer), generator=torch.Generator().manual_seed(1)) + 0.1
    p[:4] = 1e-12
    p /= p.sum()
    of = {letter: float(p[i].log()) for letter, i in tokenizer.get_vocab().items()}
    return DiffusionLM(Unigram(p, mask_id=3), tokenizer, samples=600, seed=5), of


def test_likelihoods_of_a_unigram_model(unigram):
    lm, log_p = unigram
    likeliest = max((c for c in log_p if c not in MASKED), key=log_p.get)
    words = ["cab", "a", likeliest * 3, "zigzag lines"]
    found = lm.loglikelihood(requests(*[("some text ", w) for w in words]), disable_tqdm=True)
    for (value, greedy), word in zip(found, words, strict=True):
        word = " " + word  # the blank goes with the continuation, as lm-eval has it
        parts = torch.tensor([log_p[c] for c in word], dtype=torch.float64)
        counts = torch.arange(1, len(word) + 1, dtype=torch.float64)
        n = len(word)  # variance of one sample: of n / l times a sum of l of n, averaged over l
        within = (n - counts) / (counts * max(1, n - 1)) * n * n * parts.var(correction=0)
        assert value == pytest.approx(float(parts.sum()), abs=3 * float((within.mean() / 600).sqrt()) + 1e-4)
        assert not greedy
    assert lm.loglikelihood(requests(("x", likeliest * 3)), disable_tqdm=True)[0][1]
    backwards = lm.loglikelihood(requests(*[("some text ", w) for w in words[::-1]]), disable_tqdm=True)
    assert backwards[::-1] == found
    long = "a long text, " * 12  # 156 tokens; the model takes 64
    assert lm.loglikelihood_rolling(requests((long,)), disable_tqdm=True)[0] == pytest.approx(
        sum(log_p[c] for c in long), rel=0.05
    )
    with pytest.raises(KnobError, match="the model takes 64"):
        lm.loglikelihood(requests(("", long)), disable_tqdm=True)


def test_pieces_score_each_token_once_within_the_length():
    for length in range(1, 40):
        pieces = list(_pieces(length, 7))
        assert [t for _, start, end in pieces for t in range(start, end)] == list(range(length))
        assert all(0 <= first <= start < end <= first + 7 for first, start, end in pieces)


def test_texts_of_a_masked_model(tmp_path, evaluate):
    folder = masked_folder(tmp_path / "m")
    one = DiffusionLM(folder, samples=4, steps=3)
    answers = evaluate(one, limit=2)[1]
    assert evaluate(one, limit=1)[1] == {task: rows[:1] for task, rows in answers.items()}  # from seed and text alone
    several = DiffusionLM(folder, samples=4, steps=3, k=3, w=2, seed=1)
    texts = several.generate_until(
        requests(("Count to 3:", {"until": ["."], "max_gen_toks": 6}), ("Say", {"max_gen_toks": 2})),
        disable_tqdm=True,
    )
    assert [len(of) for of in several.outputs] == [3, 3]
    assert all(text in of for text, of in zip(texts, several.outputs, strict=True))
    assert all(len(t) <= 6 and "." not in t for t in several.outputs[0])
    assert len(set(several.outputs[0])) > 1
    assert several.passes >= 2 * 3 * 2 * 3
    with pytest.raises(KnobError, match=r"k is 0.*samples is 0"):
        DiffusionLM(folder, k=0, samples=0)
