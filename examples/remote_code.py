"""A model whose code lies in its checkpoint directory (ChatGLM2 and its like): optimize and save it
once, then load the save, which carries the code along.

    python examples/remote_code.py CHECKPOINT --save chatglm-int4
    python examples/remote_code.py chatglm-int4

The checkpoint's code runs on your machine: use directories you trust.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModel

from ipex_llm import optimize_model
from ipex_llm.optimize import load_low_bit, low_memory_init

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="a checkpoint directory, or one that save_low_bit wrote")
parser.add_argument("--low-bit", default="sym_int4")
parser.add_argument("--save", metavar="DIR")
options = parser.parse_args()

if (Path(options.model) / "ipex_llm.json").is_file():
    with low_memory_init():
        model = AutoModel.from_pretrained(options.model, torch_dtype="auto", trust_remote_code=True)
    model = load_low_bit(model, options.model)
else:
    model = AutoModel.from_pretrained(options.model, torch_dtype="auto", trust_remote_code=True)
    model = optimize_model(model, low_bit=options.low_bit)
if options.save:
    model.save_low_bit(options.save)

logits = model(torch.arange(10)[None]).logits[0, -1]
print(f"{type(model).__name__}: {logits.numel()} logits, next token {int(logits.argmax())}")
