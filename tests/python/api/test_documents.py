"""Every example of README.md and docs/ runs, as written and in order.

A comment `<!-- given: NAME -->` before a Python block names what is there when it starts; blocks of
one document with the same NAME share their variables, as a reader would type them one after the
other. Shell lines must name targets that the Makefile has; the table of types must agree with what
the C++ core packs.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

import real_models

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path) -> list[tuple[str, str, int, str]]:
    """(language, given, line number, text) of each fenced block."""
    found, given, fence = [], "nothing", None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if fence is not None:
            if line.startswith("```"):
                found.append((fence[0], given, fence[1], "\n".join(fence[2]) + "\n"))
                fence, given = None, "nothing"
            else:
                fence[2].append(line)
        elif match := re.match(r"```(\w*)", line):
            fence = (match[1], number, [])
        elif match := re.match(r"<!-- given: (\w+) -->", line):
            given = match[1]
        elif line.strip():
            given = "nothing"
    assert fence is None, f"{path.name}:{fence[1]}: the block never ends"
    return found


def given_nothing(request, directory):
    """The one-liner at the top of the README is about any model."""
    import ipex_llm

    return {"model": torch.nn.Linear(512, 512), "ipex_llm": ipex_llm}


def given_whisper(request, directory):
    import whisper

    request.getfixturevalue("whisper_tiny")
    (directory / "speech.wav").symlink_to(real_models.speech())
    return {"whisper": whisper, "audio": "speech.wav", "saved_dir": "saved"}


def given_smollm2(request, directory):
    (directory / "HuggingFaceTB").mkdir()
    (directory / "HuggingFaceTB" / "SmolLM2-135M-Instruct").symlink_to(real_models.smollm2())
    return {}


def given_minilm(request, directory):
    (directory / "sentence-transformers").mkdir()
    (directory / "sentence-transformers" / "all-MiniLM-L6-v2").symlink_to(real_models.minilm())
    return {}


def given_chatglm(request, directory):
    from test_remote_code import float_model
    from transformers import AutoModel

    from ipex_llm import optimize_model

    model = optimize_model(float_model(directory / "original", torch.float32))
    model.save_low_bit(directory / "saved")
    return {"AutoModel": AutoModel, "saved_dir": "saved"}


def given_gguf(request, directory):
    from gguf_files import VOCABULARY, llama_metadata, llama_tensors, write

    tokens = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": list("abcdefgh") * 12}
    assert len(tokens["tokenizer.ggml.tokens"]) == VOCABULARY
    write(
        directory / "model-Q4_1.gguf", "llama", llama_metadata(1, **tokens), llama_tensors(["Q4_1"])
    )
    return {}


def given_imports(request, directory):
    data = ROOT / "tests" / "data" / "imports"
    (directory / "Llama-2-7B-GPTQ").symlink_to(data / "gptq")
    (directory / "saved_by_ipex_llm").symlink_to(data / "legacy_llama")
    return {}


GIVENS = {
    "nothing": given_nothing,
    "whisper": given_whisper,
    "smollm2": given_smollm2,
    "minilm": given_minilm,
    "chatglm": given_chatglm,
    "gguf": given_gguf,
    "imports": given_imports,
}

EXAMPLES = {}
for document in DOCUMENTS:
    for language, given, line, text in blocks(document):
        if language == "python":
            name = f"{document.relative_to(ROOT)}:{given}"
            EXAMPLES.setdefault(name, (document, given, []))[2].append((line, text))


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, request, tmp_path, monkeypatch):
    document, given, parts = EXAMPLES[name]
    monkeypatch.chdir(tmp_path)
    variables = {"__name__": "__main__", **GIVENS[given](request, tmp_path)}
    precision = torch.is_grad_enabled()
    import ipex_llm

    with ipex_llm.set_activation_precision("auto"):  # an example may change it
        for line, text in parts:
            # Blank lines in front, so that a traceback names the document's own line.
            exec(compile("\n" * line + text, str(document), "exec"), variables)
    assert torch.is_grad_enabled() == precision


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_exist(document):
    targets = set()
    for language, _, _, text in blocks(document):
        if language == "sh":
            targets |= set(re.findall(r"^make ([\w-]+)", text, re.MULTILINE))
    targets |= set(re.findall(r"`make ([\w-]+)", document.read_text(encoding="utf-8")))
    known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets <= known, targets - known


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name}: no {target}"


def test_table_of_types_is_that_of_the_core():
    """Names, order and bits per weight, against the bytes the core packs."""
    from ipex_llm.arguments import LOW_BITS
    from ipex_llm.tensor import LowBitTensor

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| ([\d.]+) \|", text, re.MULTILINE)
    assert [name for name, _ in rows] == list(LOW_BITS)
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1))
    for name, bits in rows:
        packed = LowBitTensor.quantize(weight, name).packed
        stored = 8 * packed.numel() / weight.numel()
        # fp8: 32 bits more per row of 4096
        assert stored == pytest.approx(float(bits), abs=0.008), name


def test_version_is_one():
    import ipex_llm

    project = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "([\d.]+)"', project, re.MULTILINE)[1]
    cmake = re.search(r"project\(lowbit VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())[1]
    assert ipex_llm.__version__ == version == cmake
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_everything_imports_after_setup():
    """What the README promises after `make demo`, from any folder."""
    subprocess.run(
        [
            str(ROOT / ".venv/bin/python"),
            "-c",
            "import ipex_llm, whisper, sentence_transformers",
        ],
        check=True,
        cwd="/",
    )
