"""How a model calls its modules: a few short runs with the arguments of every call written down.

The runs are those that decide whether a fused module behaves: a prompt, a token, several tokens on
a cache, a batch with left padding.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import nn

from ipex_llm.fuse.prove import Step
from ipex_llm.fuse.recognise import expert_parameters
from ipex_llm.fuse.state import STATE, watched_by
from ipex_llm.fuse.trace import preserved, undisturbed
from ipex_llm.tensor import LowBitTensor


class Unobservable(Exception):
    """The model could not be run here; the text says why."""


def worth_watching(module: nn.Module) -> bool:
    """Whether it holds at least two low-bit matrices below itself, or experts in 3-D tensors."""
    if len(expert_parameters(module)) > 1:
        return True
    count = 0
    for inner in module.modules():
        if inner is not module:
            count += isinstance(inner._parameters.get("weight"), LowBitTensor)
            count += 2 * (len(expert_parameters(inner)) > 1)
            if count >= 2:
                return True
    return False


def knows_inputs(model: nn.Module) -> bool:
    """Whether the model says how it is called: transformers' models do."""
    return getattr(model, "config", None) is not None and hasattr(model, "main_input_name")


# (batch, lengths of the steps: a prompt, a token, several; padding at the left)
_FIRST = ((1, (7, 1), 0),)
_AGAIN = ((2, (6, 1, 2), 3),)
_WITHOUT_SEVERAL = ((2, (6, 1), 3),)
_SOURCE = 14  # tokens of an encoder: no length that a decoder has


class Observation:
    """Runs of a model with the arguments of its modules written down."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.inputs = _Inputs(model)
        self.current: dict[str, list[Step]] = {}

    def first(self) -> dict[str, list[list[Step]]]:
        """Module name -> scenarios of steps, for every module worth watching that was called.

        One scenario: a prompt and a token.
        """
        watched = {n: m for n, m in self.model.named_modules() if n and worth_watching(m)}
        handles = []
        try:
            for name, module in watched.items():
                hook = self._hook(name)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            return self._run(_FIRST)
        except Exception as error:
            text = str(error).strip().splitlines()
            raise Unobservable(
                f"running it raised {type(error).__name__}: {text[0] if text else ''}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()

    def again(self, fused: dict[str, nn.Module]) -> dict[str, list[list[Step]]]:
        """The same of a batch with padding, for modules that are fused.

        Raises what the model raises. A prompt, a token, several tokens.
        """
        names = {id(module): name for name, module in fused.items()}

        def note(module, args, kwargs):
            if id(module) in names:
                self._note(names[id(module)], args, kwargs)

        with watched_by(note):
            try:
                return self._run(_AGAIN)
            except Exception:
                if not self._raises_anyway(fused):
                    raise
            return self._run(_WITHOUT_SEVERAL)

    def _raises_anyway(self, fused: dict[str, nn.Module]) -> bool:
        """Whether the unfused model takes no several tokens on a cache, as some do."""
        states = [(m.__dict__, m.__dict__[STATE]) for m in fused.values()]
        try:
            for attributes, _ in states:
                del attributes[STATE]
            self._run(_AGAIN)
        except Exception:
            return True
        finally:
            for attributes, state in states:
                attributes[STATE] = state
        return False

    def _hook(self, name: str):
        own = threading.get_ident()  # others may call the model, or a part of it, meanwhile

        def hook(module, args, kwargs):
            if threading.get_ident() == own:
                self._note(name, args, kwargs)

        return hook

    def _note(self, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        steps = self.current.setdefault(name, [])
        steps.append(Step(args, kwargs, self.inputs.valid(args, kwargs)))

    def _run(self, runs) -> dict[str, list[list[Step]]]:
        seen: dict[str, list[list[Step]]] = {}
        training = [m for m in self.model.modules() if m.training]
        try:
            for module in training:
                module.training = False
            with preserved(self.model), undisturbed(None):
                for run in runs:
                    self.current = {}
                    try:
                        self.inputs.run(*run)
                    except Exception:
                        # Models without attention have no length to ask their cache for.
                        if not self.inputs.cached or runs is not _FIRST:
                            raise
                        self.inputs.cached = False
                        self.current = {}
                        self.inputs.run(*run)
                    for name, steps in self.current.items():
                        seen.setdefault(name, []).append(steps)
        finally:
            self.current = {}
            for module in training:
                module.training = True
        return seen


class _Inputs:
    """Makes inputs for a model from what its configuration says, and runs it."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.config = model, model.config
        self.generator = torch.Generator().manual_seed(1)
        self.cached = True
        self.decodes = bool(getattr(self.config, "is_encoder_decoder", False))
        self.takes = set(inspect.signature(model.forward).parameters)
        self.main = model.main_input_name
        self.masks: list[torch.Tensor] = []
        text = self.config.get_text_config()
        self.vocabulary = int(getattr(text, "vocab_size", 0) or 0)
        if (self.main == "input_ids" or self.decodes) and self.vocabulary < 8:
            raise Unobservable("its vocabulary is not known")
        if self.main != "input_ids" and self._signal(1) is None:
            raise Unobservable(f"its main input is {self.main}, whose shape is not known")

    def valid(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """Which tokens of the hidden states among the arguments are not padding."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() == 3:
                for mask in self.masks:
                    if mask.shape == value.shape[:2]:
                        return mask
                return torch.ones(value.shape[:2], dtype=torch.bool)
        return self.masks[-1]

    def run(self, batch: int, lengths: tuple[int, ...], padding: int) -> None:
        """A prompt and what follows; without a cache, one step tells all."""
        first = self._source(batch, padding) if self.main != "input_ids" or self.decodes else {}
        prefix = "decoder_" if self.decodes else ""
        if not self.decodes and self.main != "input_ids":
            self.masks = [torch.ones((batch, 1), dtype=torch.bool)]
            self.model(**first)
            return
        past = None
        mask = torch.ones((batch, 0), dtype=torch.long)
        for length in lengths:
            new = torch.ones((batch, length), dtype=torch.long)
            if padding and past is None:
                new[1, :padding] = 0
            mask = torch.cat((mask, new), 1)
            self.masks = [*self.masks[:1], new.bool()] if self.decodes else [new.bool()]
            arguments = {**first, f"{prefix}input_ids": self._ids(batch, length)}
            if self._accepts("use_cache"):
                arguments["use_cache"] = self.cached
            if padding:
                arguments[f"{prefix}attention_mask"] = mask
            if past is not None:
                arguments["past_key_values"] = past
            out = self.model(**arguments)
            past = getattr(out, "past_key_values", None)
            if past is None or not self.cached:
                return
            if self.decodes:
                first.pop(self.main, None)
                first["encoder_outputs"] = (out.encoder_last_hidden_state,)

    def _accepts(self, name: str) -> bool:
        return name in self.takes or "kwargs" in self.takes

    def _ids(self, batch: int, tokens: int) -> torch.Tensor:
        # Not the first and last ones: padding and other special tokens live there.
        shape = (batch, tokens)
        return torch.randint(4, self.vocabulary - 1, shape, generator=self.generator)

    def _source(self, batch: int, padding: int) -> dict[str, torch.Tensor]:
        """What the encoder reads."""
        if self.main != "input_ids":
            self.masks = [torch.ones((batch, 1), dtype=torch.bool)]
            return {self.main: self._signal(batch)}
        mask = torch.ones((batch, _SOURCE), dtype=torch.long)
        if padding:
            mask[1, -padding:] = 0
        self.masks = [mask.bool()]
        source = {"input_ids": self._ids(batch, _SOURCE)}
        return {**source, "attention_mask": mask} if padding else source

    def _signal(self, batch: int) -> torch.Tensor | None:
        """Pictures or spectrograms; None where the configuration does not tell their shape."""
        config = self.config
        if self.main == "pixel_values":
            vision = getattr(config, "vision_config", config)
            channels, size = (getattr(vision, n, None) for n in ("num_channels", "image_size"))
            if not isinstance(channels, int) or size is None:
                return None
            sides = (size, size) if isinstance(size, int) else tuple(size)
            shape = (batch, channels, *sides)
        elif self.main == "input_features":
            mels, frames = (
                getattr(config, n, None) for n in ("num_mel_bins", "max_source_positions")
            )
            if not isinstance(mels, int) or not isinstance(frames, int):
                return None
            shape = (batch, mels, 2 * frames)
        else:
            return None
        noise = torch.randn(shape, generator=self.generator)
        return noise.to(next(p.dtype for p in self.model.parameters() if p.is_floating_point()))
