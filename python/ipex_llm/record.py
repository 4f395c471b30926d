"""What an optimized model remembers of how it was optimized, and which modules remember it."""

from __future__ import annotations

from torch import nn

from ipex_llm.tensor import lowbit_parameters

# Where a root keeps what it was optimized with. In __dict__, so that deepcopy and pickle carry it.
_RECORD = "_ipex_llm_options"


def models_inside(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of low-bit models inside that may be saved on their own: roots as well."""
    return [
        (name, part)
        for name, part in model.named_modules()
        if part is not model and hasattr(type(part), "save_pretrained") and has_low_bit(part)
    ]


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without the wrappers of torch.compile and data parallelism around it."""
    while True:
        if "_orig_mod" in model._modules:  # OptimizedModule; naming it would import the compiler
            model = model._modules["_orig_mod"]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def remember(model: nn.Module, options: dict, *, complete: bool) -> None:
    """Keeps with `model` what it is optimized with; `complete` once that is done."""
    model.__dict__[_RECORD] = {**options, "complete": complete}


def forget(model: nn.Module) -> None:
    """`model` is a float model again."""
    model.__dict__.pop(_RECORD, None)


def options_of(model: nn.Module) -> dict | None:
    """The options `model` was optimized or loaded with, as JSON types; None for other models."""
    state = model.__dict__.get(_RECORD)
    return None if state is None else {k: v for k, v in state.items() if k != "complete"}


def is_complete(model: nn.Module) -> bool:
    """Whether `model` was optimized or loaded without an interruption."""
    state = model.__dict__.get(_RECORD)
    return state is not None and state["complete"]


def has_low_bit(model: nn.Module) -> bool:
    """Whether any parameter of the tree is a LowBitTensor."""
    return next(lowbit_parameters(model), None) is not None
