"""Every argument of optimize_model and plan is checked before the model is touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ipex_llm
from ipex_llm import arguments, formats
from ipex_llm.arguments import Options, resolve_options

ALL_13 = (
    "sym_int4 asym_int4 sym_int5 asym_int5 sym_int8 nf3 nf4 fp4 fp8 fp8_e4m3 fp8_e5m2 fp16 bf16"
).split()


def test_the_names_are_those_of_the_core():
    assert list(arguments.LOW_BITS) == ALL_13
    assert set(arguments.LOW_BITS) == set(formats.FORMAT_NAMES)
    for name in arguments.LOW_BITS:
        canonical = arguments.resolve_low_bit("test", "low_bit", name)
        assert canonical == ("fp8_e5m2" if name == "fp8" else name)


def test_an_unknown_low_bit_lists_all_thirteen():
    with pytest.raises(ValueError) as raised:
        ipex_llm.optimize_model(nn.Linear(4, 4), low_bit="int4")
    for name in ALL_13:
        assert name in str(raised.value)
    assert "'int4'" in str(raised.value)


def test_a_low_bit_that_is_near_is_named_whatever_its_case():
    with pytest.raises(ValueError, match="did you mean 'sym_int4'"):
        ipex_llm.optimize_model(nn.Linear(4, 4), low_bit="SYM_INT4")


def test_a_keyword_that_is_near_nothing_gets_no_guess():
    with pytest.raises(TypeError, match=r"'trust_remote_code'\. Known"):
        ipex_llm.optimize_model(nn.Linear(4, 4), trust_remote_code=True)


@pytest.mark.parametrize("value", [4, b"sym_int4", ["sym_int4"], torch.int8])
def test_low_bit_of_another_type_is_a_type_error(value):
    with pytest.raises(TypeError, match="low_bit must be a str"):
        ipex_llm.optimize_model(nn.Linear(4, 4), low_bit=value)


@pytest.mark.parametrize(
    ("keyword", "near"),
    [
        ("modules_to_not_convrt", "modules_to_not_convert"),
        ("cpu_embeding", "cpu_embedding"),
        ("groupsize", "group_size"),
        ("dtype", "torch_dtype"),
        ("embedding_type", "embedding_qtype"),
    ],
)
def test_an_unknown_keyword_names_the_nearest(keyword, near):
    with pytest.raises(TypeError, match=f"{keyword!r}.*{near!r}"):
        ipex_llm.optimize_model(nn.Linear(4, 4), **{keyword: None})
    with pytest.raises(TypeError, match=f"plan: .*{keyword!r}.*{near!r}"):
        ipex_llm.plan(nn.Linear(4, 4), **{keyword: None})


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        (None, "NoneType"),
        ("gpt2", "str"),
        (nn.Linear, "not the class"),
        ({"weight": torch.zeros(2, 2)}, "load it into its model"),
        (type("Pipeline", (), {"model": nn.Linear(2, 2)})(), ".model"),
    ],
)
def test_a_model_that_is_no_module(model, hint):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module") as raised:
        ipex_llm.optimize_model(model)
    assert hint in str(raised.value)


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_group_sizes(size):
    assert resolve_options("test", group_size=size).group_size == size


@pytest.mark.parametrize("low_bit", ["fp8", "fp8_e4m3", "fp8_e5m2", "fp16", "bf16"])
def test_no_group_size_where_there_are_no_groups(low_bit):
    with pytest.raises(ValueError, match="group_size=32 has no meaning"):
        resolve_options("test", low_bit=low_bit, group_size=32)


@pytest.mark.parametrize("size", [0, 1, -64, 48, 512])
def test_other_group_sizes_are_refused(size):
    with pytest.raises(ValueError, match="32, 64, 128, 256"):
        resolve_options("test", group_size=size)


@pytest.mark.parametrize("size", ["64", 64.0, True])
def test_group_size_of_another_type(size):
    with pytest.raises(TypeError, match="group_size must be an int"):
        resolve_options("test", group_size=size)


@pytest.mark.parametrize(
    "flag",
    ["optimize_llm", "cpu_embedding", "lightweight_bmm", "disable_optimize_pre", "progress"],
)
def test_flags_are_booleans(flag):
    with pytest.raises(TypeError, match=f"{flag} must be True or False"):
        resolve_options("test", **{flag: "yes"})


def test_the_skip_list():
    assert resolve_options("t", modules_to_not_convert=None).modules_to_not_convert == ()
    assert resolve_options("t", modules_to_not_convert=("a", "b.*")).modules_to_not_convert == (
        "a",
        "b.*",
    )
    with pytest.raises(TypeError, match=r"write \['lm_head'\]"):
        resolve_options("t", modules_to_not_convert="lm_head")
    with pytest.raises(TypeError, match="must hold str"):
        resolve_options("t", modules_to_not_convert=["a", 3])
    with pytest.raises(ValueError, match="empty name"):
        resolve_options("t", modules_to_not_convert=[""])


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        ("float16", torch.float16),
        ("torch.float32", torch.float32),
        ("auto", None),
        (None, None),
    ],
)
def test_torch_dtype(value, dtype):
    assert resolve_options("t", torch_dtype=value).torch_dtype == dtype


def test_a_wrong_torch_dtype():
    with pytest.raises(ValueError, match="float33"):
        resolve_options("t", torch_dtype="float33")
    with pytest.raises(ValueError, match=r"torch\.int8"):
        resolve_options("t", torch_dtype=torch.int8)
    with pytest.raises(TypeError, match="torch_dtype"):
        resolve_options("t", torch_dtype=16)


def test_the_old_name_of_cpu_embedding():
    with pytest.warns(FutureWarning, match="cpu_embedding"):
        assert resolve_options("t", replace_embedding=True).cpu_embedding
    with pytest.warns(FutureWarning):
        assert resolve_options("t", cpu_embedding=True, replace_embedding=False).cpu_embedding


def test_strict():
    assert resolve_options("t", strict=False).strict is None
    assert resolve_options("t", strict=True).strict == arguments.STRICT_SHARE
    assert resolve_options("t", strict=0.05).strict == 0.05
    assert resolve_options("t", strict=0).strict == 0.0
    for value in (-0.1, 1, 5):
        with pytest.raises(ValueError, match="share"):
            resolve_options("t", strict=value)
    with pytest.raises(TypeError, match="strict"):
        resolve_options("t", strict="yes")


def test_options_survive_json():
    options = resolve_options(
        "t",
        low_bit="fp8",
        modules_to_not_convert=["lm_head"],
        torch_dtype="bfloat16",
        cpu_embedding=True,
        embedding_qtype="sym_int8",
    )
    assert options.low_bit == "fp8_e5m2"
    assert Options.from_dict(options.to_dict()) == options


def test_nothing_is_touched_by_a_wrong_argument():
    model = nn.Sequential(nn.Linear(8, 8))
    weight = model[0].weight
    for wrong in ({"low_bit": "q4"}, {"group_size": 7}, {"nonsense": 1}, {"strict": "x"}):
        with pytest.raises((TypeError, ValueError)):
            ipex_llm.optimize_model(model, **wrong)
    assert model[0].weight is weight
    assert type(model) is nn.Sequential
    assert type(model[0]) is nn.Linear
