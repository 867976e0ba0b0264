"""`thrifty llm loop`, `shift` and `decode` say what the library finds, and refuse everything wrong at once."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_text import causal_folder, jsonl, masked_folder

from thrifty.cli import main
from thrifty.cli.llm import decode, loop, shift
from thrifty.llm import d5p4
from thrifty.llm.causal_shift import PLACEMENTS, curves
from thrifty.llm.inner_loop import GRANULARITIES, KV_MODES, MODES, Plan, read_plan
from thrifty.llm.loading import DTYPES, batches, completion_losses, encode, load_model, read_jsonl
from thrifty.llm.questions import accuracy, question_batches, read_questions

TEXTS = [{"text": f"{w} and {w[::-1]} are words, {w}!"} for w in ("one", "seven", "never", "blue", "words")]
ASKED = [{"prompt": f"{a} and {b} are", "choices": [f" {a + b}", f" {a * b}, or so", " a cat"], "answer": a % 3}
         for a in (2, 3, 4) for b in (5, 6)]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and data."""
    place = tmp_path_factory.mktemp("llm")
    causal_folder(place / "model", blocks=3, scale=2.0)
    masked_folder(place / "masked")
    jsonl(place / "texts.jsonl", TEXTS)
    jsonl(place / "asked.jsonl", ASKED)
    (place / "text.txt").write_text(" ".join(t["text"] for t in TEXTS))
    return place


@pytest.fixture(autouse=True)
def _here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def run(capsys, *words):
    """Return what a method prints as JSON."""
    assert main(["llm", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words):
    assert main(["llm", *words]) == 2
    return capsys.readouterr().err


def test_the_names_are_the_librarys():
    assert set(loop.MODES) == set(MODES)
    assert (loop.GRANULARITIES, loop.KV_MODES, shift.PLACEMENTS) == (GRANULARITIES, KV_MODES, PLACEMENTS)
    assert (decode.METHODS, decode.FORMS, decode.QUALITIES) == (d5p4.METHODS, d5p4.FORMS, d5p4.QUALITIES)
    from thrifty.cli.llm.shared import DTYPES as NAMES

    assert set(NAMES) == set(DTYPES)


# --- loop


def test_the_effect_of_a_plan(capsys):
    found = run(capsys, "loop", "--model", "model", "--plan", "1:3:2", "--data", "texts.jsonl", "--batch", "2")
    model, tokenizer = load_model("model")
    rows = list(batches(encode(read_jsonl("texts.jsonl"), tokenizer, 256, end=False), 2))
    with torch.inference_mode():
        base = torch.cat([-completion_losses(model, b) for b in rows]).double().mean()
    assert found["base"] == pytest.approx(float(base), abs=1e-6)
    assert found["plan"]["end"] == 3
    assert found["extra_share"] == pytest.approx(2 / 3)
    looped, noise = found["plans"]
    assert (looped["mode"], noise["mode"]) == ("uniform", "noise")
    assert found["against_noise"]["mean"] == pytest.approx(looped["difference"] - noise["difference"])
    once = run(capsys, "loop", "--model", "model", "--plan", "0:3:1", "--data", "asked.jsonl")
    assert once["plans"][0]["difference"] == 0 == once["plans"][1]["high"]
    assert (once["score"], once["examples"]) == ("accuracy", len(ASKED))
    assert (
        main(["llm", "loop", "--model", "model", "--plan", "0:1:3", "--data", "asked.jsonl", "--mode", "naive"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "plan: blocks 0 to 0 run 3 times (naive, per block); +67 % blocks" in shown
    assert "looped against noise" in shown


def test_accuracy_is_the_likeliest_completion(folder):
    model, tokenizer = load_model("model")
    asked = read_questions("asked.jsonl")
    right = []
    for q in asked:
        totals = []
        for choice in q.choices:
            ids = torch.tensor([tokenizer(q.prompt + choice)["input_ids"]])
            with torch.inference_mode():
                log_p = torch.log_softmax(model(ids).logits[0, :-1].double(), -1).gather(1, ids[0, 1:, None])
            totals.append(float(log_p[len(q.prompt) - 1 :].sum()))
        right.append(float(int(np.argmax(totals)) == q.answer))
    for size in (1, 4):
        with torch.inference_mode():
            got = [accuracy(model, b) for b in question_batches(asked, tokenizer, 64, size)]
        assert torch.cat(got).tolist() == right
    assert 0 < sum(right) < len(right)  # a test that could fail


def test_a_scan_with_its_map(capsys, tmp_path):
    words = ["loop", "--model", "model", "--scan", "--data", "texts.jsonl", "--passes", "2,3", "--longest", "2"]
    found = run(capsys, *words, "--state", str(tmp_path / "s.json"), "--map", str(tmp_path / "m.html"))
    plans = [(c["plan"]["start"], c["plan"]["end"], c["plan"]["passes"]) for c in found["scan"]["cells"]]
    spans = [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)]
    assert plans == [(a, b, n) for n in (2, 3) for a, b in spans]
    page = (tmp_path / "m.html").read_text()
    assert page.count("<svg") == 2
    assert run(capsys, *words, "--state", str(tmp_path / "s.json")) == found
    one = run(capsys, *words[:6], "--blocks", "1:3", "--map", str(tmp_path / "m.svg"))
    assert len(one["scan"]["cells"]) == 3
    assert (tmp_path / "m.svg").read_text().startswith("<svg")
    assert "several numbers of passes need .html" in refused(capsys, *words, "--map", str(tmp_path / "m.svg"))
    assert main(["llm", *words]) == 0
    assert "judge a plan on others" in capsys.readouterr().out


def test_a_plan_beside_the_model_and_text(capsys, folder):
    assert "there is no plan" in refused(capsys, "loop", "--model", "model")
    found = run(capsys, "loop", "--model", "model", "--plan", "1:2:3", "--mode", "naive", "--save-plan",
                "--prompt", "one and", "--tokens", "5")  # fmt: skip
    assert read_plan("model") == Plan(1, 2, 3, "naive")
    assert found["looped_text"] != found["text"]
    again = run(capsys, "loop", "--model", "model", "--prompt", "one and", "--tokens", "5")
    assert again["looped_text"] == found["looped_text"]
    (folder / "model" / "inner_loop.json").unlink()


def test_loop_refuses_everything_at_once(capsys, folder):
    (folder / "bad.jsonl").write_text(json.dumps(ASKED[0]) + "\n" + json.dumps({**ASKED[0], "answer": 3}) + "\n")
    said = refused(
        capsys, "loop", "--model", "no", "--plan", "3:1:2", "--data", "bad.jsonl", "--limit", "0", "--prompt", ""
    )
    for words in (
        "no does not exist",
        "3..1 is no range",
        "line 2: answer must be the place",
        "--limit is 0",
        "--prompt is",
    ):
        assert words in said, words
    assert "the model has blocks 0..2" in refused(capsys, "loop", "--model", "model", "--plan", "1:9:2")
    assert "give START:END:PASSES, such as" in refused(capsys, "loop", "--model", "model", "--plan", "1-3")
    assert "--scan needs --data" in refused(capsys, "loop", "--model", "model", "--scan")
    assert "is not a list of passes" in refused(capsys, "loop", "--model", "model", "--scan", "--passes", "1")


# --- shift


def test_curves_and_turns(capsys, tmp_path):
    words = ["shift", "--model", "model", "--text", "texts.jsonl", "--skip", "1"]
    found = run(capsys, *words, "--csv", str(tmp_path / "c.csv"), "--trace", str(tmp_path / "t.html"),
                "--prompt", "one!", "--attenuate", "1:0.5", "2:0")  # fmt: skip
    model, tokenizer = load_model("model")
    rows = list(batches(encode(read_jsonl("texts.jsonl"), tokenizer, 256, end=False), 4))
    expected = curves(model, rows, 1).to_json()
    assert found["curves"]["output_match"] == expected["curves"]["output_match"]
    assert found["transitions"]["match"] == expected["transitions"]["match"]
    assert found["attenuation"]["alphas"] == {"1": 0.5, "2": 0.0}
    loss = found["attenuation"]["loss"]
    assert loss["difference"] == pytest.approx(loss["attenuated"] - loss["base"])
    assert loss["difference"] != 0
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 5
    assert "Decoding trajectory" in (tmp_path / "t.html").read_text()
    assert main(["llm", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["depth", "0", "1", "2", "3"]
    assert [line.startswith("turn by ") for line in lines[6:9]] == [True] * 3


def test_plain_text_is_cut(capsys, folder):
    words = ["shift", "--model", "model", "--text", "text.txt", "--max-tokens", "20"]
    found = run(capsys, *words, "--limit", "3", "--trace", "t.html")
    assert found["sequences"] == 3
    assert found["positions"] + sum(found["excluded"].values()) == 60
    (folder / "empty.txt").write_text("  ")
    said = refused(
        capsys, "shift", "--model", "no", "--text", "empty.txt", "--attenuate", "x", "--prompt", "a", "--skip", "-1"
    )
    for part in (
        "no does not exist",
        "empty.txt is empty",
        "'x': attenuation is BLOCK:ALPHA",
        "--skip is -1",
        "--prompt is the",
    ):
        assert part in said, part
    assert "blocks are 0..2" in refused(capsys, *words, "--attenuate", "7:0.5")


# --- decode


def test_texts_with_quality_and_diversity(capsys):
    words = [
        "decode",
        "--model",
        "masked",
        "--prompt",
        "one",
        "--masks",
        "6",
        "--steps",
        "4",
        "--keep",
        "3",
        "--children",
        "2",
    ]
    found = run(capsys, *words, "--baseline", "--seed", "2")
    mine, plain = found["runs"]
    assert (mine["name"], plain["name"]) == ("D5P4", "independent samples")
    assert mine["forward_passes"] == plain["forward_passes"] == 3 * 2 * (4 + 1)  # with the clean-up step
    assert len(mine["texts"]) == 3
    assert all(t.startswith("one") for t in mine["texts"])
    assert 1 <= mine["vendi"] <= 3
    assert mine["bound"] < 0
    denoiser, tokenizer = d5p4.load_masked_lm("masked")
    start = torch.tensor([*tokenizer("one", add_special_tokens=False)["input_ids"], *[denoiser.mask_id] * 6])
    selector = d5p4.Select(seed=2)
    made = d5p4.sample(denoiser, 3, 2, 4, selector, start=start, generator=torch.Generator().manual_seed(2))
    assert mine["texts"] == [
        tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in made.representatives
    ]
    other = run(capsys, *words, "--seed", "2", "--quality", "self_certainty")
    made = d5p4.sample(
        denoiser, 3, 2, 4, d5p4.Select(quality="self_certainty", seed=2), start=start,
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    assert other["runs"][0]["texts"] == [
        tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in made.representatives
    ]
    assert (found["selector"]["quality"], other["selector"]["quality"]) == ("entropy", "self_certainty")
    again = run(capsys, *words, "--baseline", "--seed", "2")
    assert [r["texts"] for r in again["runs"]] == [r["texts"] for r in found["runs"]]
    one = run(
        capsys,
        "decode",
        "--model",
        "masked",
        "--prompt",
        "a [MASK][MASK]b",
        "--keep",
        "1",
        "--guidance",
        "2",
        "--block",
        "2",
    )
    assert all(text[:2] == "a " and text[-1] == "b" for text in one["runs"][0]["texts"])
    assert one["runs"][0]["self_bleu"] is None
    assert main(["llm", *words, "--method", "greedy_beam"]) == 0
    assert "greedy_beam:" in capsys.readouterr().out


def test_decode_refuses_everything_at_once(capsys, folder):
    masked_folder(folder / "maskless", mask=False)
    said = refused(
        capsys, "decode", "--model", "no", "--keep", "0", "--masks", "0", "--guidance", "-1", "--temperature", "-1"
    )
    for part in ("no holds no config.json", "--keep is 0", "--masks is 0", "--guidance is -1", "--temperature is -1",
                 "--guidance needs a --prompt"):  # fmt: skip
        assert part in said, part
    assert "has no mask token" in refused(capsys, "decode", "--model", "maskless")
    assert "cannot be loaded as a masked language model" in refused(capsys, "decode", "--model", "model")
    assert "are 93; the model takes 62" in refused(
        capsys, "decode", "--model", "masked", "--prompt", "one", "--masks", "90"
    )
    assert "more than masks" in refused(
        capsys, "decode", "--model", "masked", "--prompt", "[MASK][MASK]", "--guidance", "2"
    )
