"""Sentence embeddings from a low-bit model: which of the sentences is nearest to the query?

python examples/sentence_embeddings.py MODEL --low-bit sym_int8
"""

import argparse

from sentence_transformers import SentenceTransformer

from ipex_llm import optimize_model

SENTENCES = [
    "The cat sleeps on the sofa.",
    "Interest rates rose again this month.",
    "She repaired the engine of the old car.",
]

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="a sentence-transformers directory")
parser.add_argument("--low-bit", default="sym_int8")
parser.add_argument("--query", default="A kitten is having a nap.")
options = parser.parse_args()

model = optimize_model(SentenceTransformer(options.model), low_bit=options.low_bit)
scores = model.similarity(model.encode([options.query]), model.encode(SENTENCES))[0]
for score, sentence in sorted(zip(scores.tolist(), SENTENCES, strict=True), reverse=True):
    print(f"{score:.3f}  {sentence}")
