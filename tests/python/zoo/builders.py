"""Small random models of every architecture that the installed transformers knows.

No checkpoint and no network: a default configuration is made small by the names of its fields, the
same way in every nested configuration, and the class is constructed from it. What cannot be made
small like that is reported as such, not counted as passed.
"""

from __future__ import annotations

import dataclasses
import inspect

import torch
from torch import nn

# Fields that several families share, under the names they use for them.
_SMALL = {
    64: """hidden_size d_model n_embd dim embed_dim model_dim embedding_size word_embed_proj_dim
        decoder_hidden_size encoder_hidden_size attention_hidden_size projection_dim hidden_dim
        decoder_hidden_dim vision_embed_dim output_dim proj_dim d_embed audio_hidden_size
        cross_attention_hidden_size tokenizer_hidden_size qformer_hidden_size width
        text_embed_dim out_hidden_size lru_width entity_emb_size dim_model rnn_hidden_size
        hidden_size_per_layer_input emb_dim""",
    96: """intermediate_size ffn_dim n_inner d_ff encoder_ffn_dim decoder_ffn_dim dim_ff
        ffn_hidden_size dim_feedforward shared_expert_intermediate_size mlp_dim d_inner
        shared_intermediate_size intermediate_size_mlp moe_shared_expert_intermediate_size
        ffn_intermediate_size decoder_intermediate_size vision_intermediate_size
        dense_intermediate_size prefix_dense_intermediate_size""",
    48: "moe_intermediate_size expert_ffn_hidden_size expert_intermediate_size",
    2: """num_hidden_layers n_layer num_layers encoder_layers decoder_layers n_layers
        num_encoder_layers num_decoder_layers num_experts_per_tok num_experts_per_token top_k
        moe_topk moe_top_k moe_k num_decoder_blocks num_encoder_blocks_layers num_blocks_per_stage
        depth num_key_value_heads num_kv_heads n_head_kv multi_query_group_num
        num_global_key_value_heads attention_num_key_value_heads num_selected_experts n_activated
        num_attention_layers decoder_num_layers encoder_num_layers num_transformer_layers
        vision_layers text_layers""",
    4: """num_attention_heads n_head num_heads encoder_attention_heads decoder_attention_heads
        n_heads num_local_experts num_experts n_routed_experts moe_num_experts
        decoder_num_attention_heads encoder_num_attention_heads num_attention_head
        num_self_attention_heads num_cross_attention_heads linear_num_value_heads""",
    16: """head_dim d_kv kv_channels attention_head_dim qk_nope_head_dim v_head_dim d_head dim_head
        state_size ssm_state_size mamba_d_state global_head_dim attention_head_size
        linear_key_head_dim linear_value_head_dim swa_head_dim kv_lora_rank q_lora_rank""",
    8: "qk_rope_head_dim num_mel_bins feature_size index_head_dim",
    99: "vocab_size vocab_size_per_layer_input text_vocab_size audio_vocab_size",
    128: """max_position_embeddings n_positions max_source_positions max_target_positions
        seq_length max_seq_len max_sequence_length n_ctx block_size relative_attention_num_buckets
        max_seq_length context_length max_2d_position_embeddings_""",
    32: "image_size",
}
_BY_NAME = {name: value for value, names in _SMALL.items() for name in names.split()}
_FIXED = {
    "patch_size": 8,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_dense_layers": 1,
    "linear_num_key_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "image_token_id": 90,
    "image_token_index": 90,
    "video_token_id": 91,
    "video_token_index": 91,
    "audio_token_id": 92,
    "audio_token_index": 92,
    "vision_start_token_id": 93,
    "vision_end_token_id": 94,
    "boi_token_id": 95,
    "eoi_token_id": 96,
    "dropout": 0.0,
    "layerdrop": 0.0,
    "use_cache": False,
}
# What the names above cannot say: sizes that must fit each other in a way of their own.
OVERRIDES = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "reformer": {"is_decoder": True},
    "zamba": {"layers_block_type": ["mamba", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"num_layers": 1, "head_dim": 8, "num_key_value_heads": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
}
# Families whose rotary embedding is cut into time, height and width by absolute sizes.
_THREE_AXES = ("vl", "glm4v", "glm46v", "ocr", "omni", "glm_image", "paddle", "ernie4_5_vl")
MOST_PARAMETERS = 100_000_000  # a zoo of real sizes would not fit into a test run


class NotSmall(Exception):
    """The architecture cannot be built small by the names of its fields."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One class of one architecture."""

    task: str  # the Auto mapping it was found in
    model_type: str
    class_name: str

    @property
    def id(self) -> str:
        return f"{self.task}/{self.model_type}/{self.class_name}"


TASKS = {
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq_lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "text_encoding": "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
    "speech_seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
    "audio_classification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "image_classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "object_detection": "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "semantic_segmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "universal_segmentation": "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
    "depth_estimation": "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
    "video_classification": "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "image_text_to_text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "base": "MODEL_MAPPING_NAMES",  # only types that no task above has
}


def cases(tasks=tuple(TASKS)) -> list[Case]:
    """Every class, each once, under the first task that lists it."""
    from transformers.models.auto import modeling_auto

    found: list[Case] = []
    classes: set[str] = set()
    types: set[str] = set()
    for task, mapping in TASKS.items():
        for model_type, names in getattr(modeling_auto, mapping).items():
            if task == "base" and model_type in types:
                continue
            for name in (names,) if isinstance(names, str) else names:
                if name not in classes:
                    classes.add(name)
                    types.add(model_type)
                    found.append(Case(task, model_type, name))
    return [case for case in found if case.task in tasks]


def build(case: Case) -> nn.Module:
    """A small model of `case` with random weights, in evaluation mode; raises NotSmall."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = getattr(transformers, case.class_name, None)
    if cls is None:
        raise NotSmall("the class is not exported by this transformers")
    config_class = CONFIG_MAPPING[case.model_type]
    try:
        config = _config_for(cls, small_config(config_class, OVERRIDES.get(case.model_type)))
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(config).parameters())
        if size > MOST_PARAMETERS:
            raise NotSmall(f"{size / 1e6:.0f} million parameters")
        torch.manual_seed(0)
        model = cls(config).eval()
    except NotSmall:
        raise
    except Exception as error:
        raise NotSmall(f"{type(error).__name__}: {_first_line(error)}") from error
    randomize(model)
    return model


def small_config(config_class, overrides: dict | None = None):
    """The default configuration with small numbers, nested configurations included."""
    known = set(inspect.signature(config_class.__init__).parameters)
    for base in config_class.__mro__:
        known |= set(getattr(base, "__annotations__", ()))
    default = None
    try:
        default = config_class()
        known |= set(default.to_dict())
    except Exception:
        pass  # some need arguments: their signature has told the names
    values = {name: value for name, value in {**_BY_NAME, **_FIXED}.items() if name in known}
    for name in [*values]:
        usual = _value(default, name)
        if isinstance(usual, list | tuple):  # one number per stage: as it is; sides: two of them
            if name == "image_size" and len(usual) == 2:
                values[name] = [values[name]] * 2
            else:
                del values[name]
    rope = _value(default, "rope_parameters")
    model_type = getattr(config_class, "model_type", "")
    if isinstance(rope, dict) and any(part in model_type for part in _THREE_AXES):
        values["rope_parameters"] = {**rope, "mrope_section": [2, 3, 3]}  # half of head_dim 16
    if "qk_rope_head_dim" in values:
        values.pop("head_dim", None)  # latent attention derives it, and has a key per head
        if "num_key_value_heads" in values:
            values["num_key_value_heads"] = values.get("num_attention_heads", 4)
    for name, sub_class in (getattr(config_class, "sub_configs", None) or {}).items():
        nested = _value(default, name)
        sub_class = type(nested) if hasattr(nested, "to_dict") else sub_class
        if hasattr(sub_class, "to_dict"):
            try:
                values[name] = small_config(sub_class)
            except Exception:
                continue
    values.update(overrides or {})
    as_dicts = {k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in values.items()}
    only_given = {k: v for k, v in values.items() if k not in _FIXED or k in (overrides or {})}
    for attempt in (values, as_dicts, only_given):
        try:
            return config_class(**attempt)
        except Exception as error:
            last = error
    raise last


def _value(config, name: str):
    """A field of a configuration; None where it has none, or one per layer."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _config_for(cls, config):
    """Classes for the text part of a larger model take that part of its configuration."""
    expected = getattr(cls, "config_class", None)
    if expected is None or isinstance(config, expected):
        return config
    for name in getattr(type(config), "sub_configs", None) or ():
        nested = getattr(config, name, None)
        if isinstance(nested, expected):
            return nested
    return config


def randomize(model: nn.Module) -> None:
    """Fresh models have ones, zeros and tied scales, which hide a dropped bias or a wrong norm."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.empty(parameter.shape).uniform_(-0.5, 0.5, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(0.2 * noise.to(parameter.dtype))
            elif not parameter.any():
                parameter.add_(0.1 * noise.to(parameter.dtype))


def inputs(model: nn.Module) -> list[dict]:
    """Candidate inputs, the likeliest first; the first that the float model accepts is taken."""
    config = model.config
    text = getattr(config, "get_text_config", lambda: config)()
    generator = torch.Generator().manual_seed(2)
    vocabulary = min(getattr(text, "vocab_size", None) or 90, 90)
    ids = torch.randint(3, max(4, vocabulary), (2, 10), generator=generator)
    accepted = set(inspect.signature(model.forward).parameters)
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or 32
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    frames = getattr(vision, "num_frames", None) or getattr(vision, "frames_per_clip", None) or 4
    patch = getattr(vision, "patch_size", None) or 8
    patch = patch if isinstance(patch, int) else patch[0]
    patch = channels * (getattr(vision, "temporal_patch_size", None) or 1) * patch**2
    mels = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 8

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    candidates = [
        {"input_ids": ids},
        {"input_ids": ids, "decoder_input_ids": ids[:, :4]},
        {"pixel_values": normal(2, channels, height, width)},
        {"pixel_values": normal(1, channels, 64, 64)},
        {"pixel_values": normal(1, channels, 224, 224)},
        {"pixel_values": normal(1, channels, 256, 256)},
        {"pixel_values": normal(1, channels, 384, 384)},
        {"pixel_values": normal(1, frames, channels, height, width)},
        {"pixel_values_videos": normal(1, frames, channels, height, width)},
        {"pixel_values": normal(2, channels, height, width), "input_ids": ids},
        {"hidden_states": normal(16, patch), "grid_thw": torch.tensor([[1, 4, 4]])},
        {"pixel_values": normal(16, patch), "grid_thw": torch.tensor([[1, 4, 4]])},
        {"input_values": normal(2, 4000)},
        {"input_values": normal(2, 4000), "decoder_input_ids": ids[:, :4]},
        {"input_features": normal(2, mels, 256), "decoder_input_ids": ids[:, :4]},
        {"input_features": normal(2, 64, mels), "decoder_input_ids": ids[:, :4]},
        {"input_features": normal(2, 64, mels)},
        {"input_features": normal(2, 64, 2 * mels)},
        {"input_features": normal(2, mels, 64)},
        {"input_values": normal(2, 1, 4000)},
        {"input_values": normal(2, 64, mels)},
        {"input_values": normal(2, 1024, mels)},
        {"input_features": normal(2, 64, getattr(config, "feature_projection_input_dim", 160))},
        {"input_features": normal(2, 64, getattr(config, "input_feat_per_channel", 80))},
        {"pixel_values": normal(1, channels, 64, 64), "input_ids": ids},
        {"inputs_embeds": normal(2, 10, 64)},
    ]
    return [c for c in candidates if set(c) <= accepted or "kwargs" in accepted]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]
