"""Transcribes a recording with a low-bit Whisper; optionally saves it, or starts from a save.

python examples/whisper_transcribe.py speech.wav --low-bit sym_int5 --save whisper-int5
python examples/whisper_transcribe.py speech.wav --load whisper-int5
"""

import argparse

import whisper

from ipex_llm import optimize_model
from ipex_llm.optimize import load_low_bit, low_memory_init

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("audio", help="anything ffmpeg reads")
parser.add_argument("--model", default="tiny", help="a name whisper knows, or a checkpoint's path")
parser.add_argument("--language", default="English")
parser.add_argument("--low-bit", default="sym_int4")
parser.add_argument("--save", metavar="DIR")
parser.add_argument("--load", metavar="DIR")
options = parser.parse_args()

if options.load:
    with low_memory_init():
        model = whisper.load_model(options.model)
    model = load_low_bit(model, options.load)
else:
    model = whisper.load_model(options.model)
    model = optimize_model(model, low_bit=options.low_bit)
if options.save:
    model.save_low_bit(options.save)

result = model.transcribe(options.audio, language=options.language)
print(result["text"].strip())
