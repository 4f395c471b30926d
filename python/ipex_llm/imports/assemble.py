"""An optimized model from weights that are packed already.

What comes out is what optimize_model leaves: ties, fast forwards, fusion, `save_low_bit`, and a
record of the options for load_low_bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ipex_llm import convert, planning
from ipex_llm.arguments import Options
from ipex_llm.finish import finish, optimize_language_model
from ipex_llm.record import remember
from ipex_llm.tensor import LowBitTensor

__all__ = ["optimize_with"]


def optimize_with(
    who: str, model: nn.Module, packed: Mapping[str, LowBitTensor], options: Options
) -> nn.Module:
    """Optimizes `model` in place as optimize_model does, with `packed` weights taken as they are.

    Args:
        who: the public function that errors name.
        model: the float model. Parameters that `packed` replaces may be on the meta device.
        packed: weights by parameter name (of a tied weight, any of its names). Their logical
            shapes must be those of the parameters.
        options: what becomes of every other weight; `options.low_bit=None` leaves them float.

    Raises ValueError or TypeError for names, shapes and models that do not go together before
    anything is touched. A later error (a weight that is not finite) leaves a working model of
    packed and float weights, as an interrupted optimize_model does.
    """
    convert.reject_unconvertible(who, model)
    convert.reject_optimized(who, model)
    slots = _slots(who, model, packed)
    remember(model, options.to_dict(), complete=False)
    with torch.inference_mode(False), torch.no_grad():
        for name, weight in packed.items():
            convert.install_in(slots[name], weight)
    convert.convert(model, options, who)
    optimize_language_model(model, options)
    return finish(model, options)


def _slots(who: str, model: nn.Module, packed) -> dict[str, list[tuple[nn.Module, str]]]:
    """For every packed weight all owners of the parameter that it replaces."""
    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    names: dict[int, str] = {}
    parameters = {}
    by_parameter: dict[int, list[tuple[nn.Module, str]]] = {}
    for module, module_names in planning.module_names(model).values():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            by_parameter.setdefault(id(parameter), []).append((module, attribute))
            for prefix in module_names:
                parameters[f"{prefix}.{attribute}" if prefix else attribute] = parameter
    for name, weight in packed.items():
        parameter = parameters.get(name)
        if parameter is None:
            raise ValueError(
                f"{who}: {type(model).__name__} has no parameter {name!r}; are names and model "
                "those of one architecture?"
            )
        if not isinstance(weight, LowBitTensor):
            raise TypeError(f"{who}: {name!r} must be a LowBitTensor, got {type(weight).__name__}")
        if tuple(weight.shape) != tuple(parameter.shape):
            raise ValueError(
                f"{who}: {name!r} has shape {tuple(parameter.shape)} in the model and "
                f"{tuple(weight.shape)} in the checkpoint"
            )
        if id(parameter) in names:
            raise ValueError(
                f"{who}: {name!r} and {names[id(parameter)]!r} are one tied weight of the model; "
                "give it once"
            )
        names[id(parameter)] = name
        owners[name] = by_parameter[id(parameter)]
    return owners
