"""What all Python tests share: no network, the `slow` marker, and real models from packages."""

from __future__ import annotations

import os

# Before anything imports huggingface_hub, which reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

import real_models


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: runs in `make test-full`")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def smollm2_dir() -> str:
    """SmolLM2-135M-Instruct, an ordinary transformers checkpoint directory in bf16."""
    return str(real_models.smollm2())


@pytest.fixture(scope="session")
def minilm_dir() -> str:
    """all-MiniLM-L6-v2, a sentence-transformers directory in fp32."""
    return str(real_models.minilm())


@pytest.fixture
def whisper_tiny():
    """Inside the test `whisper.load_model("tiny")` works: Whisper tiny.en, offline."""
    with real_models.whisper_cache():
        yield "tiny"


@pytest.fixture(scope="session")
def speech() -> str:
    """A WAV file in which real_models.SENTENCE is spoken."""
    return str(real_models.speech())
