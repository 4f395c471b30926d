"""Small random models of every architecture that the installed transformers knows.

No checkpoint and no network: a default configuration is made small by the names of its fields, the
same way in every nested configuration, and the class is constructed from it. What cannot be made
small like that is reported as such, not counted as passed.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator

import torch
from torch import nn

# Fields that several families share, under the names they use for them.
_SMALL = {
    64: """hidden_size hidden_size_global d_model n_embd dim embed_dim model_dim embedding_size word_embed_proj_dim
        decoder_hidden_size encoder_hidden_size attention_hidden_size projection_dim hidden_dim
        decoder_hidden_dim vision_embed_dim output_dim proj_dim d_embed audio_hidden_size
        cross_attention_hidden_size tokenizer_hidden_size qformer_hidden_size width
        text_embed_dim out_hidden_size lru_width entity_emb_size dim_model rnn_hidden_size
        hidden_size_per_layer_input emb_dim adapter_in_dim adapter_out_dim""",
    96: """intermediate_size ffn_dim n_inner d_ff encoder_ffn_dim decoder_ffn_dim dim_ff
        ffn_hidden_size dim_feedforward shared_expert_intermediate_size mlp_dim d_inner
        shared_intermediate_size intermediate_size_mlp moe_shared_expert_intermediate_size
        ffn_intermediate_size decoder_intermediate_size vision_intermediate_size
        dense_intermediate_size prefix_dense_intermediate_size""",
    48: "moe_intermediate_size expert_ffn_hidden_size expert_intermediate_size",
    2: """num_hidden_layers n_layer num_layers encoder_layers decoder_layers n_layers
        num_encoder_layers num_decoder_layers num_experts_per_tok num_experts_per_token top_k top_k_experts
        moe_topk moe_top_k moe_k num_decoder_blocks num_encoder_blocks_layers num_blocks_per_stage
        depth num_key_value_heads num_kv_heads n_head_kv multi_query_group_num
        num_global_key_value_heads attention_num_key_value_heads num_selected_experts n_activated
        num_attention_layers decoder_num_layers encoder_num_layers num_transformer_layers
        vision_layers text_layers""",
    4: """num_attention_heads n_head num_heads encoder_attention_heads decoder_attention_heads
        n_heads num_local_experts num_experts n_routed_experts moe_num_experts
        decoder_num_attention_heads encoder_num_attention_heads num_attention_head
        num_self_attention_heads num_cross_attention_heads linear_num_value_heads linear_num_heads""",
    16: """head_dim d_kv kv_channels attention_head_dim qk_nope_head_dim v_head_dim d_head dim_head
        state_size ssm_state_size mamba_d_state global_head_dim attention_head_size
        linear_key_head_dim linear_value_head_dim linear_head_dim swa_head_dim kv_lora_rank
        q_lora_rank""",
    8: """qk_rope_head_dim num_mel_bins feature_size index_head_dim mamba_n_heads
        mamba_chunk_size""",
    99: "vocab_size vocab_size_per_layer_input text_vocab_size audio_vocab_size",
    128: """max_position_embeddings n_positions max_source_positions max_target_positions
        seq_length max_seq_len max_sequence_length n_ctx block_size relative_attention_num_buckets
        max_seq_length context_length max_2d_position_embeddings_ mamba_d_ssm""",
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
    "mm_tokens_per_image": 4,
    "image_grid_pinpoints": [[32, 32]],
    "dropout": 0.0,
    "layerdrop": 0.0,
    "use_cache": False,
}
_DEPTHS = {
    "depths", "depth", "layers", "num_blocks", "encoder_depths", "decoder_depths", "stage_depths",
    "stage_num_blocks", "layer_depths", "blocks_per_stage", "num_layers", "num_encoder_blocks",
    "hidden_layers", "stage_layers",
}  # fmt: skip


def _strips() -> dict:
    """The kernels, strides and paddings that PaddleOCR's detectors have no defaults for."""
    kernels = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
    for ratio, k in (("longratio", 7), ("midratio", 5), ("shortratio", 3)):
        half = k // 2
        kernels[f"vertical_long_to_small_conv_{ratio}"] = [[k, 1], [1, 1], [half, 0]]
        kernels[f"horizontal_small_to_long_conv_{ratio}"] = [[1, k], [1, 1], [0, half]]
        kernels[f"symmetric_conv_long_{ratio}"] = [[k, k], [1, 1], [half, half]]
    return kernels


# Models of time series must be told how far to look; they have no default for it.
_SERIES = {
    "prediction_length": 4,
    "context_length": 8,
    "label_length": 4,
    "lags_sequence": [1, 2],
    "num_time_features": 2,
}
# What the names above cannot say: sizes that must fit each other in a way of their own.
OVERRIDES = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "nemo_speechlm": {
        "text_config": {"layers_block_type": ["linear_attention", "moe", "full_attention"]}
    },
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": 98},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "ReformerForMaskedLM": {"is_decoder": False, "axial_pos_embds": False},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "num_mem_blocks": 1,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 2}},
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 2,
        }
    },
    "zaya": {"num_experts_per_tok": 1},
    "esmc": {"num_key_value_heads": 4},
    "chameleon": {"vocabulary_map": {"<image>": 90}, "vq_config": {"base_channels": 32}},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "llama4_vision_model": {
        "intermediate_size": 256, "projector_input_dim": 64, "projector_output_dim": 64,
        "vision_output_dim": 64,
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 93, "audio_start_token_id": 94},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 93, "audio_start_token_id": 94},
    "emu3": {"vocabulary_map": {"<image>": 90, "<|extra_200|>": 91}},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "blt": {"encoder_hash_byte_group_vocab": 99},
    "kyutai_speech_to_text": {"vocab_size": 99, "pad_token_id": 3, "audio_pad_token_id": 98},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "mimi": {"upsample_groups": 64},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "data2vec-vision": {"out_indices": [3, 5, 7, 11]},
    "kosmos-2": {"latent_query_num": 4},
    "inkling2": {"vision_config": {"text_hidden_size": 64}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    # Of other widths it projects by convolutions in a plain list, which no state_dict has.
    "oneformer": {"conv_dim": 64, "mask_dim": 64},
    "seggpt": {"image_size": [64, 32]},
    "tvp": {"max_img_size": 64, "num_frames": 2},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2"},
    "beit": {"out_indices": [3, 5, 7, 11]},
    "t5gemma": {"is_encoder_decoder": True},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "autoformer": _SERIES,
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    # Their widths come from image sides and checkpoints' own numbers of channels.
    "perceiver": {
        "d_latents": 64, "num_latents": 16, "num_self_attends_per_block": 2,
        "num_cross_attention_heads": 1, "num_self_attention_heads": 4, "d_model": 64,
    },
    "pp_ocrv5_server_det": {"intraclass_block_config": _strips()},
    "pp_ocrv6_medium_det": {"intraclass_block_config": _strips()},
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


class NoRecipe(NotSmall):
    """Its forward takes something that no recipe makes, however small the model is."""


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


# How much is made small: everything, with a layer of every kind that the default has, or with the
# kinds that the first layers happen to be; only the numbers of layers, tokens and experts, where
# widths must fit each other; only widths, where layers are named by number; nothing.
_WIDTHS = {name for v in (64, 96, 48, 16, 8, 32) for name in _SMALL[v].split()} | {"patch_size"}
_WIDTHS.remove("image_size")
_COUNTS = {*_BY_NAME, *_FIXED} - _WIDTHS - {n for n in _BY_NAME if n.endswith(("heads", "head"))}
DEGREES = {
    "every kind": {*_BY_NAME, *_FIXED},
    "small": {*_BY_NAME, *_FIXED},
    "shallow": _COUNTS,
    "narrow": {*_BY_NAME, *_FIXED} - {n for n in _BY_NAME if "layer" in n} - {"depth"},
    "default": set(_FIXED) - {"patch_size"},
}


def build(case: Case) -> Iterator[nn.Module]:
    """Models of `case` with random weights, in evaluation mode, from the smallest up.

    The first that accepts an input is the one to test. Raises NotSmall, with the reason of the
    smallest, if there is none.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = getattr(transformers, case.class_name, None)
    if cls is None:
        raise NotSmall("the class is not exported by this transformers")
    reasons, tried, built = [], [], False
    for degree in DEGREES:
        try:
            overrides = OVERRIDES.get(case.class_name, OVERRIDES.get(case.model_type))
            config = _config_for(
                cls, small_config(CONFIG_MAPPING[case.model_type], overrides, degree)
            )
            fields = repr(config)
            if fields in tried:
                continue
            tried.append(fields)
            with torch.device("meta"):
                size = sum(p.numel() for p in cls(config).parameters())
            if size > MOST_PARAMETERS:
                raise NotSmall(f"{size / 1e6:.0f} million parameters")
            torch.manual_seed(0)
            model = cls(config).eval()
        except Exception as error:
            while error.__cause__ is not None:  # huggingface_hub wraps what a check said
                error = error.__cause__
            kind = "" if isinstance(error, NotSmall) else f"{type(error).__name__}: "
            reasons.append(f"{kind}{first_line(error)}")
            continue
        randomize(model)
        built = True
        yield model
    if not built:
        raise NotSmall(reasons[0])


def small_config(config_class, overrides: dict | None = None, degree: str = "small"):
    """The default configuration with small numbers, nested configurations included."""
    overrides = {**(overrides or {})}
    known = set(inspect.signature(config_class.__init__).parameters)
    for base in config_class.__mro__:
        known |= set(getattr(base, "__annotations__", ()))
    default = None
    try:
        default = config_class()
        known |= set(default.to_dict())
    except Exception:
        pass  # some need arguments: their signature has told the names
    wanted = DEGREES[degree]
    values = {
        name: value
        for name, value in {**_BY_NAME, **_FIXED}.items()
        if name in known and name in wanted
    }
    per_stage = any(
        isinstance(_value(default, name), list | tuple) for name in ("num_heads", "embed_dims")
    )
    for name in [*values]:
        usual = _value(default, name)
        if isinstance(usual, list | tuple):  # one number per stage: as it is; sides: two of them
            if name == "image_size" and len(usual) == 2:
                values[name] = [values[name]] * 2
            else:
                del values[name]
        elif per_stage and name in _WIDTHS and name != "image_size":
            del values[name]  # it is multiplied from stage to stage, beside the numbers of heads
    if degree in ("every kind", "small", "shallow"):
        for name in known & _DEPTHS:
            usual = _value(default, name)
            if isinstance(usual, list | tuple) and all(isinstance(n, int) for n in usual):
                values[name] = [1] * len(usual)
                values.pop("num_hidden_layers", None)  # the length of that list
                values.pop("num_layers", None)
    rope = _value(default, "rope_parameters")
    model_type = getattr(config_class, "model_type", "")
    if (
        "head_dim" in wanted
        and isinstance(rope, dict)
        and ("mrope_section" in rope or any(part in model_type for part in _THREE_AXES))
    ):
        turned = 8 * (rope.get("partial_rotary_factor") or 1)  # of head_dim 16, half
        sections = [2, 3, 3] if turned == 8 else [1, 1, 2]
        values["rope_parameters"] = {**rope, "mrope_section": sections}
    if "qk_rope_head_dim" in values:
        values.pop("head_dim", None)  # latent attention derives it, and has a key per head
        if "num_key_value_heads" in values:
            values["num_key_value_heads"] = values.get("num_attention_heads", 4)
    for name, spec in (getattr(config_class, "sub_configs_defaults", None) or {}).items():
        if name in overrides and not isinstance(overrides[name], dict):
            continue
        usual = _value(default, name)
        if usual is None and default is not None and name not in overrides and spec.optional:
            continue
        nested = _nested_class(usual, spec)
        if nested is not None:
            given = {k: v for k, v in spec.init_kwargs.items() if k not in wanted}
            given.update(OVERRIDES.get(getattr(nested, "model_type", ""), {}))
            given.update(overrides.pop(name, {}))
            for part in dict.fromkeys((degree, "narrow")):  # outputs may be named by layer
                try:
                    values[name] = small_config(nested, given, part)
                    break
                except Exception:
                    continue
    if degree == "every kind" and default is not None:
        values.update(_every_kind(default, values))
    values.update(overrides)
    as_dicts = {k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in values.items()}
    only_given = {k: v for k, v in values.items() if k not in _FIXED or k in overrides}
    for attempt in (values, as_dicts, only_given):
        try:
            return config_class(**attempt)
        except Exception as error:
            last = error
    raise last


# Lists with the kind of each layer.
_KINDS = ("layer_types", "mlp_layer_types", "indexer_types")


def _every_kind(default, values: dict) -> dict:
    """As many layers as the default has kinds of, one of each; the last is repeated."""
    count = "num_hidden_layers"
    own = [n for n in _KINDS if not isinstance(getattr(type(default), n, None), property)]
    lists = {name: _value(default, name) for name in own}
    kinds = {k: [*dict.fromkeys(v)] for k, v in lists.items() if isinstance(v, list | tuple)}
    layers = max(map(len, kinds.values()), default=1)
    if count not in values or layers < 2:
        return {}
    return {count: layers, **{k: v + v[-1:] * (layers - len(v)) for k, v in kinds.items()}}


def _nested_class(usual, spec):
    """The class of a nested configuration. A backbone of timm gives way to the one of transformers
    that its field falls back to; a nested model without such a field is left as it is."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = getattr(usual, "model_type", "")
    if hasattr(usual, "to_dict") and not model_type.startswith("timm"):
        return type(usual)
    if spec.model_type in CONFIG_MAPPING and not spec.model_type.startswith("timm"):
        return CONFIG_MAPPING[spec.model_type]
    return spec.config_class if hasattr(spec.config_class, "to_dict") else None


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


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]
