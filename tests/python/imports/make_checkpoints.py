"""Makes tests/data/imports/: checkpoints written by other tools themselves, small, once.

Each part runs in an environment that has its tool; none is needed to run the tests.

    python make_checkpoints.py ipex_llm       ipex-llm 2.2.0, bigdl-core-cpp 2.6.0 (--no-deps),
                                                torch 2.1.2, transformers 4.37.2, accelerate 0.23.0
    python make_checkpoints.py bitsandbytes   bitsandbytes 0.50.2, torch 2.13, transformers 5.23
    python make_checkpoints.py gptqmodel      gptqmodel 7.7.0, torch 2.13
    python make_checkpoints.py autoawq        the sources of autoawq 0.2.9 on PYTHONPATH
    python make_checkpoints.py compressed_tensors   compressed-tensors 0.20.0, torch 2.13

Beside every checkpoint lies what its own tool makes of it (outputs or dequantized weights).
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import types
from pathlib import Path

import torch
from torch import nn

DATA = Path(__file__).parents[2] / "data" / "imports"
LEGACY_TYPES = (
    "sym_int4 asym_int4 sym_int5 asym_int5 sym_int8 nf3 nf4 fp4 fp8_e4m3 fp8_e5m2 fp16 bf16"
).split()
ON_THE_CPU = ("sym_int4", "asym_int4", "sym_int5", "asym_int5", "sym_int8", "bf16")


def numbers(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Weights from integers, so that the tests have them without a file."""
    state, values = seed, []
    for _ in range(rows * columns):
        state = (1664525 * state + 1013904223) % 2**32
        values.append((state >> 16) - 32768)
    return torch.tensor(values, dtype=torch.float32).reshape(rows, columns) * 2.0**-17


def fill(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.dim() == 2:
                parameter.copy_(numbers(*parameter.shape, seed))
            elif name.endswith("bias"):
                parameter.copy_(numbers(1, *parameter.shape, seed)[0])
    return model.eval()


def tiny(kind: str, **changes):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        **{
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 72,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            **changes,
        }
    )
    return fill(getattr(transformers, f"{kind}ForCausalLM")(config))


class Layers(nn.Module):
    """64 inputs and 128, with a bias and without; 40 inputs stay float in the archived project."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(64, 16)
        self.two = nn.Linear(128, 8, bias=False)
        self.odd = nn.Linear(40, 4)


def emptied(name: str) -> Path:
    shutil.rmtree(DATA / name, ignore_errors=True)
    (DATA / name).mkdir(parents=True)
    return DATA / name


def save_outputs(directory: Path, **tensors: torch.Tensor) -> None:
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "expected.safetensors")


# ---- the archived project ------------------------------------------------------------------------


def make_ipex_llm() -> None:
    from ipex_llm import optimize_model
    from ipex_llm.transformers import AutoModelForCausalLM

    for low_bit in LEGACY_TYPES:
        directory = emptied(f"legacy_{low_bit}")
        model = fill(Layers())
        model.config = types.SimpleNamespace(model_type="")  # its fp8 asks for one
        model = optimize_model(model, low_bit=low_bit)
        model.save_low_bit(str(directory))
        if low_bit in ON_THE_CPU:
            dtype = model.one.weight.dtype if low_bit == "bf16" else torch.float32
            with torch.no_grad():
                one, two = model.one(torch.eye(64).to(dtype)), model.two(torch.eye(128).to(dtype))
            save_outputs(directory, one=one.float(), two=two.float())

    ids = torch.arange(1, 13)[None]
    # Its optimize_model merges q, k and v of Llama.
    directory = emptied("legacy_llama")
    model = optimize_model(tiny("Llama"), low_bit="sym_int4")
    with torch.no_grad():
        logits = model(ids).logits
    model.save_low_bit(str(directory))
    save_outputs(directory, logits=logits)
    # Qwen2 has biases, and its MLP is padded; the other API, in shards.
    directory = emptied("legacy_qwen2")
    with tempfile.TemporaryDirectory() as float_directory:
        tiny("Qwen2", intermediate_size=192).save_pretrained(float_directory)
        model = AutoModelForCausalLM.from_pretrained(
            float_directory, load_in_low_bit="asym_int4", torch_dtype=torch.float32
        )
    with torch.no_grad():
        logits = model(ids).logits
    model.save_low_bit(str(directory), max_shard_size="30KB")
    save_outputs(directory, logits=logits)


# ---- bitsandbytes --------------------------------------------------------------------------------


def make_bitsandbytes() -> None:
    import bitsandbytes
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    variants = {
        "bnb_nf4": {"bnb_4bit_quant_type": "nf4"},
        "bnb_nf4_double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "bnb_fp4": {"bnb_4bit_quant_type": "fp4"},
    }
    for name, options in variants.items():
        directory = emptied(name)
        with tempfile.TemporaryDirectory() as float_directory:
            # 96 inputs: blocks of 64 numbers lie across the ends of rows.
            tiny("Llama", intermediate_size=96).to(torch.bfloat16).save_pretrained(float_directory)
            model = LlamaForCausalLM.from_pretrained(
                float_directory,
                quantization_config=BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options
                ),
                dtype=torch.bfloat16,
            )
        model.save_pretrained(directory)
        expected = {}
        for key, module in model.named_modules():
            if key.endswith(("k_proj", "down_proj")):
                state = module.weight.quant_state
                absmax = state.absmax
                if state.nested:
                    absmax = bitsandbytes.functional.dequantize_blockwise(absmax, state.state2)
                    absmax = absmax + state.offset
                # Its plain-torch path. The native one of 0.50.2 takes another block's absmax for
                # some numbers where rows are not whole blocks.
                expected[key] = _dequantize_4bit_compute(
                    module.weight.data.reshape(-1),
                    absmax,
                    state.code,
                    state.blocksize,
                    state.shape,
                    torch.float32,
                )
        save_outputs(directory, **expected)

    directory = emptied("bnb_int8")
    with tempfile.TemporaryDirectory() as float_directory:
        tiny("Llama").save_pretrained(float_directory)
        model = LlamaForCausalLM.from_pretrained(
            float_directory, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )
    model.save_pretrained(directory)
    weight = model.model.layers[0].self_attn.k_proj.weight
    dense = bitsandbytes.functional.int8_vectorwise_dequant(weight.CB, weight.SCB)
    save_outputs(directory, **{"model.layers.0.self_attn.k_proj": dense})


# ---- GPTQModel -----------------------------------------------------------------------------------

# Every layout in one model, as its "dynamic" configuration allows: bits, group size, symmetric,
# act-order.
GPTQ_LAYERS = {
    "q_proj": (4, 32, True, False),
    "k_proj": (4, 64, False, False),
    "v_proj": (8, 32, True, False),
    "o_proj": (3, 32, False, False),
    "gate_proj": (2, 32, False, False),
    "up_proj": (4, -1, True, False),
    "down_proj": (4, 32, True, True),
}


def make_gptqmodel() -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    for layout in ("gptq", "gptq_v2"):
        directory = emptied(layout)
        model = tiny("Llama", dtype="float16").half()
        tensors, expected = dict(model.state_dict()), {}
        for name, module in model.model.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            name, kind = f"model.{name}", name.rpartition(".")[2]
            bits, group, symmetric, act_order = GPTQ_LAYERS[kind]
            weight = module.weight.float()
            n, k = weight.shape
            size = k if group == -1 else group
            index = torch.arange(k) // size
            if act_order:
                index = index[torch.randperm(k, generator=torch.Generator().manual_seed(0))]
            top = (1 << bits) - 1
            scales, zeros = torch.empty(n, k // size), torch.empty(n, k // size)
            for g in range(k // size):
                part = weight[:, index == g]
                low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
                if symmetric:
                    scales[:, g] = torch.maximum(-low, high) * 2 / top
                    zeros[:, g] = (top + 1) // 2
                else:
                    scales[:, g] = (high - low) / top
                    # Version 1 of the layout stores zero - 1: 0 has no place there.
                    zeros[:, g] = (-low / scales[:, g]).round().clamp(1, top)
            scales = scales.half().float()
            packed = TorchLinear(
                bits=bits,
                group_size=size,
                sym=symmetric,
                desc_act=act_order,
                in_features=k,
                out_features=n,
                register_buffers=True,
                format=layout,
            )
            module.weight.data = weight
            packed.pack_original(module, scales, zeros, index.int())
            expected[name] = _dequantized(packed)
            if layout == "gptq":
                convert_gptq_v2_to_v1_format_module(packed, QuantizeConfig(bits=bits))
            del tensors[f"{name}.weight"]
            for key in ("qweight", "qzeros", "scales", "g_idx"):
                tensors[f"{name}.{key}"] = getattr(packed, key)
        quantization = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 32,
            "sym": True,
            "desc_act": False,
            "checkpoint_format": layout,
        }
        save_checkpoint(directory, model, tensors, quantization)
        if layout == "gptq":  # the weights of the other are the same
            save_outputs(directory, **expected)


def _dequantized(packed) -> torch.Tensor:
    scales, packed.scales = packed.scales, packed.scales.float()
    packed.post_init()
    weight = packed.dequantize_weight().T.float()
    packed.scales = scales
    return weight


# ---- AutoAWQ -------------------------------------------------------------------------------------


def make_autoawq() -> None:
    # Its package imports models of other releases of transformers: only these two modules are used.
    for name in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):
        sys.modules[name] = types.ModuleType(name)
        root = next(
            Path(p) / name.replace(".", "/") for p in sys.path if (Path(p) / "awq").exists()
        )
        sys.modules[name].__path__ = [str(root)]
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.modules.linear.gemv import WQLinear_GEMV
    from awq.utils.packing_utils import dequantize_gemm

    for layout, cls in (("gemm", WQLinear_GEMM), ("gemv", WQLinear_GEMV)):
        directory = emptied(f"awq_{layout}")
        model, group = tiny("Llama", dtype="float16").half(), 32
        tensors, expected = {}, {}
        for name, value in model.state_dict().items():
            tensors[name] = value
        for name, module in model.model.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            name = f"model.{name}"
            weight = module.weight.float()
            n, k = weight.shape
            groups = weight.reshape(n, k // group, group)
            low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
            scales = ((high - low) / 15).half()
            zeros = (-low / scales.float()).round().clamp(0, 15)
            if layout == "gemm":
                scales, zeros = scales.T.contiguous(), zeros.T.contiguous()
            module.weight.data = module.weight.data.float()
            packed = cls.from_linear(module, 4, group, scales=scales.float(), zeros=zeros)
            del tensors[f"{name}.weight"]
            for key in ("qweight", "qzeros", "scales"):
                tensors[f"{name}.{key}"] = getattr(packed, key)
            if name.endswith("k_proj"):
                if layout == "gemm":
                    expected[name] = dequantize_gemm(
                        packed.qweight, packed.qzeros, packed.scales.float(), 4, group
                    ).T
                else:  # its kernels need a GPU; the packed weight is the one that was rounded
                    wide = scales.float().repeat_interleave(group, 1)
                    shift = zeros.repeat_interleave(group, 1)
                    codes = ((weight + shift * wide) / wide).round()
                    expected[name] = (codes - shift) * wide
        save_checkpoint(
            directory,
            model,
            tensors,
            {
                "quant_method": "awq",
                "bits": 4,
                "group_size": group,
                "zero_point": True,
                "version": layout,
            },
        )
        save_outputs(directory, **expected)


# ---- compressed-tensors --------------------------------------------------------------------------

# By layer: the compressor, and how its weights are quantized.
COMPRESSED_LAYERS = {
    "q_proj": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "k_proj": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "v_proj": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "o_proj": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "gate_proj": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "up_proj": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "down_proj": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
    ),
}


def make_compressed_tensors() -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    directory = emptied("compressed_tensors")
    model = tiny("Llama", dtype="float16").half()
    tensors, expected, groups = dict(model.state_dict()), {}, {}
    for name, module in model.model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        name, kind = f"model.{name}", name.rpartition(".")[2]
        layout, options = COMPRESSED_LAYERS[kind]
        scheme = QuantizationScheme(
            targets=[f"re:.*{kind}"], weights=QuantizationArgs(**options), format=layout
        )
        state = {"weight": module.weight.float(), **_scales_of(module.weight.float(), options)}
        compressor = BaseCompressor.get_value_from_registry(layout)
        packed = compressor.compress(state, scheme)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{key}": value for key, value in packed.items()}
        exact = dict(packed)
        if exact["weight_scale"].is_floating_point():
            exact["weight_scale"] = exact["weight_scale"].float()
        expected[name] = compressor.decompress(exact, scheme)["weight"].float()
        groups[f"group_{len(groups)}"] = json.loads(scheme.model_dump_json())
    tensors["model.layers.0.self_attn.o_proj.input_scale"] = torch.ones(1)
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }
    save_checkpoint(directory, model, tensors, quantization)
    save_outputs(directory, **expected)


def _scales_of(weight: torch.Tensor, options: dict) -> dict[str, torch.Tensor]:
    n, k = weight.shape
    size = options.get("group_size", k)
    parts = weight.reshape(n, k // size, size)
    if options["strategy"] == "tensor":
        parts = weight.reshape(1, 1, -1)
    low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
    largest, bits = torch.maximum(-low, high), options["num_bits"]
    if options.get("type") == "float" and bits == 8:
        return {"weight_scale": (largest / 448).float().reshape(-1, *[1] * (len(largest) > 1))}
    if options.get("type") == "float":
        return {"weight_scale": torch.exp2(torch.ceil(torch.log2(largest / 6)))}
    if options.get("symmetric", True):
        return {"weight_scale": (largest * 2 / (2**bits - 1)).half()}
    scales = ((high - low) / (2**bits - 1)).half()
    zeros = (-low / scales).round() - 2 ** (bits - 1)
    return {"weight_scale": scales, "weight_zero_point": zeros.to(torch.int8)}


def save_checkpoint(directory: Path, model, tensors: dict, quantization: dict) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config, indent=1, default=str))


if __name__ == "__main__":
    with torch.no_grad():
        globals()[f"make_{sys.argv[1]}"]()
