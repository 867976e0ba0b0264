"""`thrifty groups` on folders of clips and files of texts."""

import json

import numpy as np
import pytest
import torch
from tiny_stacks import tiny

from thrifty.cli import main
from thrifty.compress.layer_groups import save

transformers = pytest.importorskip("transformers")
wavfile = pytest.importorskip("scipy.io.wavfile")


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, (rate, length) in enumerate([(16000, 4000), (8000, 1500), (44100, 9000)]):
        wave = rng.normal(0, 0.1, length)
        stored = (wave * 32767).astype(np.int16) if number else wave.astype(np.float32)
        wavfile.write(folder / f"{number}.wav", rate, stored)
    wavfile.write(folder / "stereo.wav", 16000, rng.integers(0, 255, (3000, 2)).astype(np.uint8))
    return folder


def test_a_speech_model_and_its_page(tmp_path, clips, capsys):
    save(tiny("hubert"), tmp_path / "model")
    flags = ["--data", str(clips), "--count", "2", "--out", str(tmp_path / "out")]
    code = main(["groups", str(tmp_path / "model"), *flags])
    shown = capsys.readouterr().out
    assert code == 0
    assert "group 2" in shown
    assert "input" in shown
    assert (tmp_path / "out" / "groups.html").read_text(encoding="utf-8").count("<svg") == 2
    found = json.loads((tmp_path / "out" / "groups.json").read_text(encoding="utf-8"))
    assert sorted(i for g in found["groups"] for i in g) == [0, 1, 2, 3]
    assert np.allclose(np.diag(found["cka"]), 1.0)


def test_whisper_hears_as_long_as_the_longest_clip(tmp_path, clips, capsys):
    save(tiny("whisper"), tmp_path / "model")
    flags = ["--data", str(clips), "--distance", "0.3", "--out", str(tmp_path / "out"), "--json", "--seconds", "0.15"]
    assert main(["groups", str(tmp_path / "model"), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    # 0.15 s, but the table of positions of this tiny model ends at 0.2 s: 8 positions of 20 ms at most
    assert found["frames"] == 4 * 8
    assert found["model"] == "WhisperForConditionalGeneration"


def test_a_text_model_and_jsonl(tmp_path, capsys):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "sat", "on", "the", "mat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    save(tiny("bert"), tmp_path / "model")
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "a cat sat"}\n{"text": "on the mat the cat"}\n', encoding="utf-8")
    assert main(["groups", str(tmp_path / "model"), "--data", str(data), "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == 5 + 7
    data.write_text('{"text": "a cat sat"}\n{"words": 1}\nno json\n', encoding="utf-8")
    assert main(["groups", str(tmp_path / "model"), "--data", str(data)]) == 2
    assert "lines [2, 3]" in capsys.readouterr().err


def test_what_cannot_be_read_is_said(tmp_path, clips, capsys):
    save(tiny("hubert"), tmp_path / "model")
    model = str(tmp_path / "model")
    (clips / "bad.wav").write_bytes(b"RIFF no wave")
    wavfile.write(clips / "short.wav", 16000, np.zeros(10, np.int16))
    assert main(["groups", model, "--data", str(clips)]) == 2
    assert "bad.wav" in capsys.readouterr().err
    assert main(["groups", model, "--data", str(tmp_path / "absent")]) == 2
    assert "no folder" in capsys.readouterr().err
    assert main(["groups", model, "--data", str(clips), "--limit", "0", "--seconds", "99"]) == 2
    assert "limit is 0" in (said := capsys.readouterr().err)
    assert "seconds is 99" in said
    assert main(["groups", model, "--data", str(clips), "--count", "2", "--distance", "1"]) == 2
    assert "not both" in capsys.readouterr().err
    assert main(["groups", str(tmp_path / "nothing"), "--data", str(clips)]) == 2
    assert "no Hugging Face model" in capsys.readouterr().err


def test_short_clips_are_named(tmp_path, clips, capsys):
    save(tiny("hubert"), tmp_path / "model")
    wavfile.write(clips / "short.wav", 16000, np.zeros(10, np.int16))
    assert main(["groups", str(tmp_path / "model"), "--data", str(clips)]) == 2
    assert "short.wav: shorter than 25 ms" in capsys.readouterr().err


def test_padded_clips_are_masked(tmp_path, clips):
    from thrifty.compress.layer_groups import stack_of
    from thrifty.compress.layer_groups.inputs import read_batches

    model = tiny("wav2vec2")
    made = read_batches(stack_of(model), clips, tmp_path, batch=2)
    assert [b["input_values"].shape[0] for b in made] == [2, 2]
    assert made[0]["attention_mask"].sum(1).tolist() == [4000, 3000]  # 1500 samples at 8 kHz
    assert torch.isfinite(made[1]["input_values"]).all()
