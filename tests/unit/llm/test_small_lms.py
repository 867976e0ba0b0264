"""The two small language models of experiments/weights load as any checkpoint, and know more than token frequencies."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from thrifty.llm.d5p4 import load_masked_lm
from thrifty.llm.families import parts_of
from thrifty.llm.loading import Encoded, batches, completion_losses, load_model

WEIGHTS = Path(__file__).resolve().parents[3] / "experiments" / "weights"
PASSAGE = (
    "Return the number of elements in the given array. If the argument is not a string, a ValueError is raised. "
    "The default value is None, in which case the function returns a copy of the object. This method is used to "
    "set the name of the file that is written when the module is loaded. A small bird with a short bill and a long "
    "tail that lives in the trees of North America. Someone who takes part in a game or a sport. "
    "The quality of being easy to use or to understand. The state of a person who has no money."
)


def unigram(ids: list[int]) -> float:
    """Return the entropy of the passage's own token frequencies: no unigram predictor does better on it."""
    counts = Counter(ids)
    return -sum(c / len(ids) * math.log(c / len(ids)) for c in counts.values())


def test_the_causal_one_is_a_llama_that_beats_the_unigram_entropy():
    model, tok = load_model(WEIGHTS / "small_causal_lm")
    assert parts_of(model).family.name == "llama"
    assert parts_of(model).tied
    assert model.dtype == torch.float32
    ids = tok(PASSAGE)["input_ids"]
    assert tok.decode(ids) == PASSAGE
    (batch,) = batches([Encoded(tuple(ids[:128]))], 1)
    with torch.inference_mode():
        loss = float(completion_losses(model, batch))
    assert loss < unigram(ids[:128]) - 0.5
    with torch.inference_mode():
        out = model.generate(batch.ids[:, :8], max_new_tokens=8, do_sample=False)
    assert out.shape[1] <= 16


def test_the_masked_one_beats_the_unigram_entropy_as_an_order_agnostic_bound():
    denoiser, tok = load_masked_lm(WEIGHTS / "small_masked_lm")
    assert denoiser.longest == 128
    ids = torch.tensor(tok(PASSAGE, truncation=True)["input_ids"])
    length = len(ids)
    generator = torch.Generator().manual_seed(0)
    masks = torch.arange(1, length + 1, 4)
    rank = torch.rand(len(masks), length, generator=generator).argsort(1).argsort(1)
    hidden = rank < masks[:, None]
    log_p, _ = denoiser(torch.where(hidden, tok.mask_token_id, ids))
    own = log_p.gather(2, ids.expand(len(masks), -1)[..., None])[..., 0]
    bound = float((-(own * hidden).sum(1) / masks).mean())
    assert bound < unigram(ids.tolist())
    assert float(log_p[..., tok.mask_token_id].max()) < -1e4


@pytest.mark.parametrize("folder", ["small_causal_lm", "small_masked_lm"])
def test_the_files_stay_small(folder):
    assert sum(f.stat().st_size for f in (WEIGHTS / folder).iterdir()) < 3.7e6
