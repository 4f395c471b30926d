"""The programs in examples/, run with their documented command lines."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from test_remote_code import STYLE, float_model

import real_models

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run_example(name: str, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.strip().splitlines()

    return run_example


def test_whisper(run, whisper_tiny, speech):
    heard = run("whisper_transcribe.py", speech, "--low-bit", "sym_int5", "--save", "saved")
    assert heard == [real_models.SENTENCE]
    assert run("whisper_transcribe.py", speech, "--load", "saved") == heard


def test_text_generation(run, smollm2_dir):
    question = ("What is the capital of France?", "--tokens", "12")
    lines = run("text_generation.py", smollm2_dir, *question, "--low-bit", "nf4", "--save", "saved")
    assert "Paris" in lines[0]
    assert run("text_generation.py", "saved", *question, "--tokenizer", smollm2_dir)[0] == lines[0]


def test_sentence_embeddings(run, minilm_dir):
    best = run("sentence_embeddings.py", minilm_dir)[0]
    assert "cat" in best


def test_remote_code(run, tmp_path):
    """Plain transformers 5 cannot load code without post_init, so the float checkpoint is given as
    a class that has one, as an updated checkpoint would."""
    model = float_model(tmp_path / "code", torch.float32)
    checkpoint = tmp_path / "checkpoint"
    model.save_pretrained(checkpoint)
    code = (STYLE / "modeling_chatglm.py").read_text()
    last_line = "empty_init=empty_init, device=device)\n"
    assert code.count(last_line) == 1
    code = code.replace(last_line, last_line + "        self.post_init()\n")
    # A constructor that transformers itself puts on the meta device must not use skip_init.
    code = code.replace("empty_init=True", "empty_init=False")
    (checkpoint / "modeling_chatglm.py").write_text(code)

    first = run("remote_code.py", str(checkpoint), "--save", "saved")
    assert "ChatGLMForConditionalGeneration: 320 logits" in first[0]
    assert run("remote_code.py", "saved") == first
