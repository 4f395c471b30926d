"""Text from a low-bit language model of transformers; optionally saves it, or starts from a save.

python examples/text_generation.py MODEL "Why is the sky blue?" --low-bit nf4 --save model-nf4
python examples/text_generation.py model-nf4 "Why is the sky blue?" --tokenizer MODEL
"""

import argparse
import time
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from ipex_llm import optimize_model
from ipex_llm.optimize import load_low_bit, low_memory_init

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="a checkpoint directory, or one that save_low_bit wrote")
parser.add_argument("prompt")
parser.add_argument("--tokenizer", help="where the tokenizer lies, if not with the model")
parser.add_argument("--low-bit", default="sym_int4")
parser.add_argument("--tokens", type=int, default=64)
parser.add_argument("--save", metavar="DIR")
options = parser.parse_args()

if (Path(options.model) / "ipex_llm.json").is_file():
    with low_memory_init():
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    model = load_low_bit(model, options.model)
else:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    model = optimize_model(model, low_bit=options.low_bit)
tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.model)
if options.save:
    model.save_low_bit(options.save)

if tokenizer.chat_template:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": options.prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
else:
    inputs = tokenizer(options.prompt, return_tensors="pt")
began = time.perf_counter()
out = model.generate(**inputs, max_new_tokens=options.tokens, do_sample=False)
seconds = time.perf_counter() - began
answer = out[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True).strip())
print(f"{len(answer)} tokens in {seconds:.1f} s, prompt included")
