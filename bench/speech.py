"""Whisper through openai-whisper: its float32 model against low-bit ones, encoder and whole.

    python bench/speech.py [--low-bit sym_int8] [--threads 2] [--repeats 3]

The contenders take turns, so that a noisy machine slows all alike; medians are reported.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import torch

import ipex_llm


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--low-bit", default="sym_int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    import whisper

    import real_models

    audio = whisper.load_audio(str(real_models.speech()))
    model = whisper.load_model(str(real_models.whisper_tiny()))
    mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(audio))[None]
    contenders = {"float32": model}
    for name, fusing in (("low-bit, not fused", False), ("low-bit, fused", True)):
        contenders[name] = ipex_llm.optimize_model(
            copy.deepcopy(model), arguments.low_bit, optimize_llm=fusing
        )
    encoder: dict[str, list[float]] = {name: [] for name in contenders}
    whole: dict[str, list[float]] = {name: [] for name in contenders}
    texts = {}
    settings = {"language": "en", "fp16": False, "temperature": 0.0}
    with torch.no_grad():
        for name, contender in contenders.items():  # the first call fuses
            texts[name] = contender.transcribe(audio, **settings)["text"]
        for _ in range(arguments.repeats):
            for name, contender in contenders.items():
                encoder[name].append(seconds(lambda c=contender: c.encoder(mel)))
                whole[name].append(seconds(lambda c=contender: c.transcribe(audio, **settings)))
    print(ipex_llm.optimization_report(contenders["low-bit, fused"]))
    for name in contenders:
        times = [statistics.median(kind[name]) for kind in (encoder, whole)]
        ratios = [
            statistics.median(kind["float32"]) / t
            for kind, t in zip((encoder, whole), times, strict=True)
        ]
        print(
            f"{name}: encoder {1e3 * times[0]:.0f} ms ({ratios[0]:.2f} x), transcription "
            f"{1e3 * times[1]:.0f} ms ({ratios[1]:.2f} x): {texts[name].strip()}"
        )


if __name__ == "__main__":
    main()
