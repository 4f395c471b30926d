"""Inputs for a forward of any model: recipes by the name of the argument.

A class says what it takes by the names in its signature, and these names mean the same thing in
every family: `pixel_values`, `bbox`, `past_values`. Which of them a class needs, and in which
layout, is found by trying: the candidates come in order, the likeliest first.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import nn

# Arguments that have a default and are needed all the same, wherever a signature has them.
_COMPANIONS = """bbox visual_feats visual_pos input_features_mask qformer_input_ids actions rewards
    returns_to_go timesteps past_time_features past_observed_mask future_values
    future_time_features audio_mel_mask prompt_depth target_sizes merge_sizes
    image_embeds_position_mask pixel_position_ids task_inputs
    spatial_shapes noise timestep image_attention_mask moe_mm_token_type_ids""".split()
# Arguments that one model wants and another cannot take: tried when the plain candidates fail.
_OPTIONAL = ("decoder_input_ids", "pixel_attention_mask", "attention_mask", "padding_mask")


def candidates(model: nn.Module) -> Iterator[dict]:
    """Arguments to try on `model`, each once."""
    parameters = inspect.signature(model.forward).parameters
    accepted = {n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    required = [n for n in accepted if parameters[n].default is inspect.Parameter.empty]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if open_ended and len(accepted) < 2:  # a forward(*args, **kwargs) that hands everything on
        accepted |= {"input_ids", "pixel_values", "input_values", "inputs_embeds"}
    makers = Makers(model.config)
    seeds = {name for seed in makers.seeds(accepted) for name in seed}
    missing = [n for n in required if n not in seeds and not hasattr(makers, n)]
    if missing:
        raise LookupError(f"its forward takes {', '.join(missing)}")
    companions = [n for n in (*required, *_COMPANIONS) if n in accepted]
    if "query_embeds" in accepted:
        companions.append("encoder_hidden_states")
    seen = []
    for optional in ((), [n for n in _OPTIONAL if n in accepted]):
        for seed in makers.seeds(accepted):
            if not set(seed) <= accepted:
                continue
            arguments = dict(seed)
            for name in (*companions, *optional):
                if name not in arguments and hasattr(makers, name):
                    arguments[name] = getattr(makers, name)(arguments)
            shapes = {name: getattr(value, "shape", value) for name, value in arguments.items()}
            if shapes not in seen and set(required) <= set(arguments):
                seen.append(shapes)
                yield arguments


# Where one of these is taken, images come as rows of flattened patches.
_FLAT = {
    "grid_thw", "image_grid_thw", "video_grid_thw", "spatial_shapes", "pixel_position_ids",
    "image_position_ids", "target_sizes",
}  # fmt: skip
MEDIA = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_features"}
# What holds a number per token of the text, and is made anew for a longer text.
_PER_TOKEN = ("input_ids", "decoder_input_ids", "attention_mask", "mm_token_type_ids")


def other_media(model: nn.Module, arguments: dict) -> Iterator[dict]:
    """Plain candidates that bring the text something to look at or listen to."""
    for other in candidates(model):
        if "input_ids" in other and set(other) - set(arguments) & {*MEDIA.values(), "input_values"}:
            yield other


def with_encoder(model: nn.Module, arguments: dict) -> Iterator[dict]:
    """`arguments` and what an encoder would have made, for decoders that attend to one."""
    if "encoder_hidden_states" in inspect.signature(model.forward).parameters:
        states = Makers(model.config).encoder_hidden_states(arguments)
        yield {**arguments, "encoder_hidden_states": states}


def with_media(model: nn.Module, kind: str, arguments: dict) -> Iterator[dict]:
    """`arguments` and an image, a clip or sound, with as many placeholders for it in the text as
    the model makes features of it."""
    name = f"get_{kind}_features"
    owners = [model, getattr(model, "base_model", model)]
    features_of = next((getattr(m, name) for m in owners if hasattr(m, name)), None)
    token = next((t for t in _placeholders(model.config, kind) if t is not None), None)
    if features_of is None or token is None:
        return
    taken = {}
    for owner in owners:  # the outer one may take (**kwargs)
        if hasattr(owner, name):
            taken |= inspect.signature(getattr(owner, name)).parameters
    accepted = set(inspect.signature(model.forward).parameters)
    makers = Makers(model.config)
    width = _number(makers.text, "hidden_size", "d_model", "n_embd") or 1
    counts = []
    needed = [n for n, p in taken.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    names = dict.fromkeys(n for n in (*needed, *_COMPANIONS) if n in accepted and n in taken)
    optional = ("feature_attention_mask", "image_sizes", *_OPTIONAL)
    masks = dict.fromkeys([*names, *(n for n in optional if n in accepted and n in taken)])
    for seed, added in ((s, n) for s in makers.seeds(set(taken)) for n in (names, masks)):
        if not set(seed) <= set(taken) & accepted or "input_ids" in seed:
            continue
        media = dict(seed)
        for name in added:
            if name not in media and name != "input_ids" and hasattr(makers, name):
                media[name] = getattr(makers, name)(media)
        try:
            with torch.no_grad():
                count = _elements(features_of(**media)) // width
        except Exception:
            continue
        shapes = {name: getattr(value, "shape", value) for name, value in media.items()}
        if not 0 < count <= 4096 or (count, shapes) in counts:
            continue
        if len(counts) == 4:  # a model that takes this many kinds of image wants something else
            return
        counts.append((count, shapes))
        ids = arguments["input_ids"][:1]
        ids = torch.cat([ids[:, :2], torch.full((1, count), token), ids[:, 2:]], 1)
        combined = {k: v for k, v in arguments.items() if k not in _PER_TOKEN} | media
        combined["input_ids"] = ids
        if "decoder_input_ids" in arguments:
            combined["decoder_input_ids"] = arguments["decoder_input_ids"][:1]
        if "attention_mask" in accepted:
            combined["attention_mask"] = torch.ones_like(ids)
        types = torch.zeros_like(ids)
        for value, other in enumerate(MEDIA, 1):
            for placeholder in _placeholders(model.config, other):
                types[ids == (-1 if placeholder is None else placeholder)] = value
        yield {**combined, "mm_token_type_ids": types}
        yield combined
        yield {**combined, "token_type_ids": types}


def _placeholders(config, kind: str) -> Iterator[int | None]:
    for ending in ("token_id", "token_index"):
        yield getattr(config, f"{kind}_{ending}", None)


def _elements(features) -> int:
    """Elements of what `get_image_features` and its like return."""
    pooled = getattr(features, "pooler_output", None)
    features = features if pooled is None else pooled
    if hasattr(features, "last_hidden_state"):
        features = features.last_hidden_state
    if isinstance(features, torch.Tensor):
        return features.numel()
    return sum(_elements(part) for part in features)


class Makers:
    """One method per argument; each gets the arguments that are there already."""

    def __init__(self, config):
        self.config = config
        self.text = getattr(config, "get_text_config", lambda: config)()
        self.vision = _part(config, "vision_config", "vision_tower_config", "vit_config")
        self.audio = _part(config, "audio_config", "encoder_config", "speech_config")
        self.generator = torch.Generator().manual_seed(2)
        vocabulary = min(_number(self.text, "vocab_size") or 90, 90)
        self.ids = torch.randint(3, max(4, vocabulary), (2, 10), generator=self.generator)

    def normal(self, *shape) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    # ---- what the rest is built around

    def seeds(self, accepted: set[str]) -> Iterator[dict]:
        ids, normal = self.ids, self.normal
        images = [*self.images()]
        yield {"input_ids": ids}
        yield {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
        for image in images:
            yield {"pixel_values": image}
        yield from ({"pixel_values": clip} for clip in self.clips())
        yield from ({"pixel_values_videos": clip} for clip in self.clips())
        for image in images:
            yield {"pixel_values": image, "input_ids": ids[: len(image)]}
        for clip in self.clips():
            yield {"pixel_values_videos": clip, "input_ids": ids[:1]}
            yield {"pixel_values": clip, "input_ids": ids[:1]}
        for patch in dict.fromkeys(self.patch_sizes()) if accepted & _FLAT else ():
            grid = torch.tensor([[1, 4, 4]])
            yield {"hidden_states": normal(16, patch), "grid_thw": grid}
            yield {"pixel_values": normal(16, patch), "grid_thw": grid}
            yield {"pixel_values": normal(16, patch), "image_grid_thw": grid}
            yield {"pixel_values_videos": normal(16, patch), "video_grid_thw": grid}
            yield {"pixel_values": normal(1, 16, patch)}
            yield {"pixel_values": normal(1, 16, patch), "input_ids": ids[:1]}
            yield {"pixel_values": normal(1, 4, 4, patch)}
        squares = normal(16, 3, self.patch(), self.patch())
        yield {"pixel_values": squares, "image_grid_thw": torch.tensor([[1, 4, 4]])}
        yield {"input_values": normal(2, 4000)}
        yield {"input_values": normal(2, 4000), "decoder_input_ids": ids[:, :4]}
        for features in self.features():
            yield {"input_features": features}
            yield {"input_features": features, "decoder_input_ids": ids[:, :4]}
            yield {"input_features": features, "input_ids": ids[: len(features)]}
            yield {"audio_mel": features}
        yield {"input_values": normal(2, 1, 4000)}
        yield {"input_values": normal(1, 1, 19200)}
        yield {"input_values": normal(1, 1, 19200), "input_features": normal(1, 60, 160)}
        yield {"input_values": normal(1, 19200)}
        yield {"input_values": normal(2, 1, 4000), "input_ids": ids}
        mels = _number(self.config, "num_mel_bins", "feature_size") or 8
        yield {"input_values": normal(2, 64, mels)}
        yield {"input_values": normal(2, 1024, mels)}
        yield {"inputs_embeds": normal(2, 10, _number(self.text, "hidden_size", "d_model") or 64)}
        yield {"inputs": ids}
        for image in images[:3]:
            yield {"inputs": image}
        for name in ("past_values", "query_embeds", "states", "flattened_patches", "noise_embeds"):
            yield {name: getattr(self, name)({})}
        yield {"flattened_patches": self.flattened_patches({}), "decoder_input_ids": ids[:1, :4]}
        channels = _number(self.config, "num_audio_channels", "audio_channels", "num_codebooks")
        if channels:
            yield {"input_ids": self.ids[:, :, None].repeat(1, 1, channels)}
            codes = self.ids[:, :4, None].repeat(1, 1, channels)
            yield {"input_ids": ids, "decoder_input_ids": codes}
        channels = _number(_part(self.config, "decoder_config"), "num_channels")
        if channels:
            codes = self.ids[:, :4, None].repeat(1, 1, channels)
            yield {"input_ids": ids, "decoder_input_ids": codes}
        if "state" in accepted:
            yield {"state": normal(1, _number(self.config, "max_state_dim") or 32)}

    def images(self) -> Iterator[torch.Tensor]:
        size = getattr(self.vision, "image_size", None) or 32
        size = (size, size) if isinstance(size, int) else tuple(size)[:2]
        channels = _number(self.vision, "num_channels", "in_channels", "in_chans") or 3
        yield self.normal(2, channels, *size)
        patch = self.patch()
        for side in dict.fromkeys((64, 32, 8 * patch, 224, 384)):
            if (side, side) != size:
                yield self.normal(1, channels, side, side)

    def clips(self) -> Iterator[torch.Tensor]:
        frames = _number(self.vision, "num_frames", "frames_per_clip") or 4
        size = getattr(self.vision, "image_size", None) or 32
        size = (size, size) if isinstance(size, int) else tuple(size)[:2]
        channels = _number(self.vision, "num_channels", "in_channels", "in_chans") or 3
        yield self.normal(1, frames, channels, *size)
        yield self.normal(1, 2, channels, *size)  # pairs of images to match
        if size[0] < 224:
            yield self.normal(1, frames, channels, 224, 224)

    def patch(self) -> int:
        patch = getattr(self.vision, "patch_size", None) or 8
        return patch if isinstance(patch, int) else patch[0]

    def patch_sizes(self) -> Iterator[int]:
        """Elements of one flattened patch, as families count them."""
        channels = _number(self.vision, "num_channels", "in_channels", "in_chans") or 3
        frames = getattr(self.vision, "temporal_patch_size", None) or 1
        yield channels * frames * self.patch() ** 2
        yield channels * self.patch() ** 2
        yield channels * 2 * self.patch() ** 2

    def features(self) -> Iterator[torch.Tensor]:
        mels = []
        for config in (self.audio, self.config, self.text):
            for name in (
                "num_mel_bins", "feature_size", "input_feat_size", "input_feat_per_channel",
                "feature_projection_input_dim", "input_dim", "n_mels", "input_size", "num_mels",
            ):  # fmt: skip
                mels.append(_number(config, name))
        mels = dict.fromkeys([m for m in mels if m] + [8, 80, 128])
        for m in mels:
            for shape in ((2, m, 256), (2, 64, m), (2, 64, 2 * m), (2, m, 64), (2, 64, 4 * m)):
                yield self.normal(*shape)
            yield self.normal(1, 1, 256, m)
        yield self.normal(1, next(iter(mels)), 3000)

    # ---- text and what goes with it

    def _ids_of(self, arguments) -> torch.Tensor:
        return arguments.get("input_ids", self.ids[: _batch(arguments)])

    def input_ids(self, arguments):
        return self.ids[: _batch(arguments)]

    decoder_input_ids = qformer_input_ids = input_ids

    def token_type_ids(self, arguments):
        return torch.zeros_like(self._ids_of(arguments))

    def attention_mask(self, arguments):
        for name in ("input_features", "input_values", "past_values"):
            if name in arguments and "input_ids" not in arguments:
                return torch.ones(arguments[name].shape[:2], dtype=torch.long)
        return torch.ones_like(self._ids_of(arguments))

    padding_mask = attention_mask

    def feature_attention_mask(self, arguments):
        features = arguments.get("input_features", self.normal(_batch(arguments), 1, 64))
        return torch.ones(features.shape[0], features.shape[-1], dtype=torch.long)

    moe_mm_token_type_ids = token_type_ids

    def image_attention_mask(self, arguments):
        images = arguments["pixel_values"].shape[1] if "pixel_values" in arguments else 1
        return torch.ones(*self._ids_of(arguments).shape, images, dtype=torch.long)

    def bbox(self, arguments):
        corner = torch.arange(10)[None, :, None].expand(_batch(arguments), 10, 4).clone()
        corner[..., 2:] += 5  # x0 <= x1, y0 <= y1
        return corner / 100.0 if "pixel_values" in arguments else corner

    # ---- images

    def pixel_mask(self, arguments):
        image = arguments["pixel_values"]
        return torch.ones(image.shape[0], *image.shape[-2:], dtype=torch.long)

    def pixel_attention_mask(self, arguments):
        image = arguments.get("pixel_values", self.normal(1, 1, 1))
        if image.dim() == 3:
            return torch.ones(image.shape[:2], dtype=torch.long)
        return torch.ones(*image.shape[:-3], *image.shape[-2:], dtype=torch.long)

    def spatial_shapes(self, arguments):
        return torch.tensor([[4, 4]] * _batch(arguments))

    def pixel_position_ids(self, arguments):
        side = torch.arange(4)
        places = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).reshape(1, 16, 2)
        return places.expand(_batch(arguments), 16, 2)

    image_position_ids = pixel_position_ids

    def image_sizes(self, arguments):
        return torch.tensor([[*arguments["pixel_values"].shape[-2:]]] * _batch(arguments))

    def target_sizes(self, arguments):
        return torch.tensor([[4, 4]] * _batch(arguments), dtype=torch.int32)

    def grid_thw(self, arguments):
        return torch.tensor([[1, 4, 4]])

    image_grid_thw = video_grid_thw = grid_thw

    def merge_sizes(self, arguments):
        return torch.tensor([1])

    image_merge_sizes = video_merge_sizes = merge_sizes

    def prompt_depth(self, arguments):
        return self.normal(_batch(arguments), 1, 32, 32).abs()

    def prompt_pixel_values(self, arguments):
        return torch.randn(arguments["pixel_values"].shape, generator=self.generator)

    prompt_masks = prompt_pixel_values

    def task_inputs(self, arguments):
        return self.ids[: _batch(arguments)].repeat(1, 8)[:, :77]

    def image_embeds_position_mask(self, arguments):
        mask = torch.zeros_like(self._ids_of(arguments), dtype=torch.bool)
        mask[:, 1 : 1 + (_number(self.config, "latent_query_num") or 1)] = True
        return mask

    def visual_feats(self, arguments):
        return self.normal(2, 4, _number(self.config, "visual_feat_dim") or 64)

    def visual_pos(self, arguments):
        return self.normal(2, 4, _number(self.config, "visual_pos_dim") or 4)

    # ---- audio

    def input_features(self, arguments):
        return next(self.features())[: _batch(arguments)]

    def input_values(self, arguments):
        return self.normal(_batch(arguments), 1, 4000)

    def input_features_mask(self, arguments):
        features = arguments.get("input_features")
        if features is None:
            return torch.ones(_batch(arguments), 64, dtype=torch.long)
        mels = _number(self.audio, "num_mel_bins")
        frames = features.shape[-1] if features.shape[-2] == mels else features.shape[-2]
        return torch.ones(features.shape[0], frames, dtype=torch.long)

    def audio_mel_mask(self, arguments):
        return torch.zeros(arguments["audio_mel"].shape[:2], dtype=torch.bool)  # True: padding

    # ---- series, states, embeddings

    def _steps(self) -> int:
        context = _number(self.config, "context_length", "prediction_length") or 32
        return context + max(getattr(self.config, "lags_sequence", None) or [0])

    def past_values(self, arguments):
        channels = _number(self.config, "num_input_channels")
        return self.normal(2, self._steps(), *([channels] if channels else []))

    def past_time_features(self, arguments):
        return self.normal(2, self._steps(), _number(self.config, "num_time_features") or 0)

    def past_observed_mask(self, arguments):
        return torch.ones_like(arguments["past_values"])

    def past_values_padding(self, arguments):
        return torch.zeros(arguments["past_values"].shape, dtype=torch.long)

    def freq(self, arguments):
        return torch.zeros(_batch(arguments), 1, dtype=torch.long)

    def future_values(self, arguments):
        channels = _number(self.config, "num_input_channels")
        steps = _number(self.config, "prediction_length") or 4
        return self.normal(2, steps, *([channels] if channels else []))

    def future_time_features(self, arguments):
        steps = _number(self.config, "prediction_length") or 4
        return self.normal(2, steps, _number(self.config, "num_time_features") or 0)

    def states(self, arguments):
        return self.normal(2, 5, _number(self.config, "state_dim") or 17)

    def actions(self, arguments):
        if "states" in arguments:
            return self.normal(2, 5, _number(self.config, "act_dim") or 4)
        chunk = _number(self.config, "chunk_size") or 4
        return self.normal(_batch(arguments), chunk, _number(self.config, "max_action_dim") or 32)

    noise = actions

    def rewards(self, arguments):
        return self.normal(2, 5, 1)

    returns_to_go = rewards

    def timesteps(self, arguments):
        return torch.arange(5)[None].repeat(2, 1)

    def timestep(self, arguments):
        return torch.full((_batch(arguments),), 0.5)

    def query_embeds(self, arguments):
        return self.normal(2, 4, _number(self.config, "hidden_size") or 64)

    noise_embeds = query_embeds

    def context_hidden_states(self, arguments):
        width = _number(self.config, "hidden_size") or 64
        return self.normal(2, 4, width * (_number(self.config, "num_context_layers") or 1))

    def encoder_hidden_states(self, arguments):
        width = _number(self.config, "encoder_hidden_size", "hidden_size") or 64
        return self.normal(_batch(arguments), 10, width)

    def flattened_patches(self, arguments):
        width = _number(self.vision, "patch_embed_hidden_size") or 768
        patches = self.normal(1, 16, 2 + width)
        places = torch.arange(16)
        patches[..., 0], patches[..., 1] = places // 4 + 1, places % 4 + 1
        return patches


def _part(config, *names):
    """The first nested configuration of these names, else the configuration itself."""
    for name in names:
        nested = getattr(config, name, None)
        if hasattr(nested, "to_dict"):
            return nested
    return config


def _number(config, *names) -> int | None:
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:  # one per layer
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _batch(arguments: dict) -> int:
    for value in arguments.values():
        if isinstance(value, torch.Tensor) and value.dim():
            return value.shape[0]
    return 2
