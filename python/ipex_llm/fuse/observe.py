"""How a model calls its modules: a few short runs with the arguments of every call written down.

The runs are those that decide whether a fused module behaves: a prompt, a token, several tokens on
a cache, a batch with left padding.
"""

from __future__ import annotations

import torch
from torch import nn

from ipex_llm.fuse.prove import Step
from ipex_llm.fuse.trace import undisturbed
from ipex_llm.tensor import LowBitTensor


class Unobservable(Exception):
    """The model could not be run here; the text says why."""


def worth_watching(module: nn.Module) -> bool:
    """Whether it holds at least two low-bit matrices, below itself."""
    count = 0
    for inner in module.modules():
        if inner is not module and isinstance(inner._parameters.get("weight"), LowBitTensor):
            count += 1
            if count == 2:
                return True
    return False


def observe(model: nn.Module) -> dict[str, list[list[Step]]]:
    """Module name -> scenarios of steps, for every module worth watching that was called."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "main_input_name"):
        raise Unobservable("not a transformers model: its inputs are not known")
    if model.main_input_name != "input_ids":
        raise Unobservable(f"its main input is {model.main_input_name}, not token ids")
    if getattr(config, "is_encoder_decoder", False):
        raise Unobservable("an encoder-decoder model")
    watched = {name: m for name, m in model.named_modules() if name and worth_watching(m)}
    seen: dict[str, list[list[Step]]] = {name: [] for name in watched}
    training = [m for m in model.modules() if m.training]
    handles = []
    current: dict[str, list[Step]] = {}
    valid: list[torch.Tensor] = []

    def note(name):
        def hook(module, args, kwargs):
            steps = current.setdefault(name, [])
            steps.append(Step(args, kwargs, valid[0]))

        return hook

    vocabulary = int(getattr(config.get_text_config(), "vocab_size", 0) or 0)
    if vocabulary < 8:
        raise Unobservable("its vocabulary is not known")
    generator = torch.Generator().manual_seed(1)

    def ids(batch: int, tokens: int) -> torch.Tensor:
        # Not the first and last ones: padding and other special tokens live there.
        return torch.randint(4, vocabulary - 1, (batch, tokens), generator=generator)

    try:
        for module in training:
            module.training = False
        for name, module in watched.items():
            handles.append(module.register_forward_pre_hook(note(name), with_kwargs=True))
        with undisturbed(None):
            runs = [(1, (12, 1, 3), 0), (2, (9, 1, 3), 4)]
            cached = True
            while runs:
                batch, lengths, padding = runs.pop(0)
                current.clear()
                past = None
                mask = torch.ones((batch, 0), dtype=torch.long)
                for length in lengths:
                    extra = torch.ones((batch, length), dtype=torch.long)
                    if padding and past is None:
                        extra[1, :padding] = 0
                    mask = torch.cat((mask, extra), 1)
                    valid[:] = [extra.bool()]
                    arguments = {"input_ids": ids(batch, length), "use_cache": cached}
                    if padding:
                        arguments["attention_mask"] = mask
                    if past is not None:
                        arguments["past_key_values"] = past
                    try:
                        out = model(**arguments)
                    except Exception:
                        if not cached or past is not None or any(seen.values()):
                            raise
                        # Models without attention have no length to ask their cache for.
                        cached = False
                        runs = [(1, (12,), 0), (2, (9,), 4)]
                        current.clear()
                        break
                    past = getattr(out, "past_key_values", None)
                    if past is None:
                        break  # no cache: one step tells all
                for name, steps in current.items():
                    seen[name].append(list(steps))
    except Exception as error:
        text = str(error).strip().splitlines()
        raise Unobservable(
            f"running it raised {type(error).__name__}: {text[0] if text else ''}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return {name: scenarios for name, scenarios in seen.items() if scenarios}
