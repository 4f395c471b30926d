"""The documented Whisper examples, as written, on the real Whisper tiny.en and spoken English."""

import real_models


def heard(result) -> str:
    return result["text"].strip()


def test_example_optimize_and_transcribe(whisper_tiny, speech, tmp_path):
    audio, saved_dir = speech, tmp_path / "saved"
    import whisper

    # Take OpenAI Whisper model as an example
    from ipex_llm import optimize_model

    model = whisper.load_model("tiny")  # Load whisper model under pytorch framework
    before = heard(model.transcribe(audio, verbose=True, language="English"))
    same = model
    model = optimize_model(model)  # With only one line code change
    # Use the optimized model without other API change
    result = model.transcribe(audio, verbose=True, language="English")
    # (Optional) you can also save the optimized model by calling 'save_low_bit'
    model.save_low_bit(saved_dir)

    assert model is same
    assert before == real_models.SENTENCE
    assert heard(result) == real_models.SENTENCE
    assert (saved_dir / "ipex_llm.json").is_file()


def test_example_2_load_into_a_traditional_instance(whisper_tiny, speech, tmp_path):
    audio, saved_dir = speech, str(tmp_path / "saved")
    import whisper

    from ipex_llm import optimize_model

    saved = optimize_model(whisper.load_model("tiny"))
    expected = saved.transcribe(audio, language="English")
    saved.save_low_bit(saved_dir)

    # If the model doesn't fit 'low_memory_init' method,
    # alternatively, you can obtain the model instance through traditional loading method.
    from ipex_llm.optimize import load_low_bit

    model = whisper.load_model("tiny")  # A model instance through traditional loading method
    model = load_low_bit(model, saved_dir)  # Load the optimized model

    result = model.transcribe(audio, language="English")
    assert heard(result) == real_models.SENTENCE
    assert [s["tokens"] for s in result["segments"]] == [s["tokens"] for s in expected["segments"]]


def test_example_2_under_low_memory_init(whisper_tiny, speech, tmp_path):
    """whisper.load_model itself runs unchanged on the meta device: its load_state_dict fills the
    real buffers and skips the parameters."""
    audio, saved_dir = speech, str(tmp_path / "saved")
    import whisper

    from ipex_llm import optimize_model
    from ipex_llm.optimize import load_low_bit, low_memory_init

    saved = optimize_model(whisper.load_model("tiny"))
    expected = saved.transcribe(audio, language="English")
    saved.save_low_bit(saved_dir)

    with low_memory_init():  # Fast and low cost by loading model on meta device
        model = whisper.load_model("tiny")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    model = load_low_bit(model, saved_dir)  # Load the optimized model

    result = model.transcribe(audio, language="English")
    assert heard(result) == real_models.SENTENCE
    assert [s["tokens"] for s in result["segments"]] == [s["tokens"] for s in expected["segments"]]
