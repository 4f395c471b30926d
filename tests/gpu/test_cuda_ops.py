"""The CUDA operators against the CPU ones: every format, odd shapes, every kernel."""

import itertools

import pytest
import torch

from ipex_llm import formats, ops

FORMATS = (
    [f for f in formats.FORMATS.values()]
    if isinstance(formats.FORMATS, dict)
    else list(formats.FORMATS)
)
NAMES = [f.name for f in FORMATS]
BY_NAME = {f.name: f for f in FORMATS}
ROW_SCALED = ("fp8_e4m3", "fp8_e5m2")
FULL = ("fp16", "bf16")
QMV, QMM, DIRECT, SCRATCH, EXACT, EIGHT = range(6)
_lowbit = torch.ops.lowbit


def grouped(name: str) -> bool:
    return name not in ROW_SCALED + FULL


def make(name: str, n: int, k: int, group: int = 0, seed: int = 0):
    """(packed on the CPU, packed on the GPU, format number, group, exponent, fp64 weight)."""
    generator = torch.Generator().manual_seed(seed + n * 7919 + k)
    # Rows of different size, none so small that its scale needs an exponent.
    weight = torch.randn(n, k, generator=generator)
    weight *= 0.1 + torch.rand(n, 1, generator=generator)
    number = BY_NAME[name].number
    group = group if grouped(name) else 0
    packed, exponent = _lowbit.quantize(weight, number, group)
    exact = _lowbit.dequantize(packed, [n, k], number, group, int(exponent), torch.float64)
    gpu = ops.move_packed(packed, "cuda", k, number, group)
    return packed, gpu, number, group, int(exponent), exact


def activations(m: int, k: int, dtype, seed: int = 1):
    generator = torch.Generator().manual_seed(seed + m)
    return torch.randn(m, k, generator=generator).to(dtype)


def assert_close(got, x, weight, bias=None, name="", rounded_weights=False):
    """|error| <= u_out |out| + u_w sum |x w| + fp32 sums, element by element.

    u = 2^-8 (bf16) or 2^-11 (fp16): half a unit in the last place of a number just above a power of
    two. Codebook entries (nf3, nf4) are rounded to the dtype of x by every kernel;
    `rounded_weights`: the whole weight is. fp32 sums of exact products: 2^-19 of the sum of
    magnitudes is generous for these K.
    """
    u = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[got.dtype]
    expected = x.double() @ weight.T
    magnitude = x.double().abs() @ weight.abs().T
    if bias is not None:
        expected = expected + bias.double()
        magnitude = magnitude + bias.double().abs()
    inexact = (name in ("nf3", "nf4")) + 2 * rounded_weights
    bound = 1.001 * u * expected.abs() + (inexact * u + 2.0**-19) * magnitude + 1e-30
    if rounded_weights and got.dtype == torch.float16:  # subnormal weights: 2^-25 each
        bound = bound + 2.0**-25 * x.double().abs().sum(-1, keepdim=True)
    got = got.double().cpu()
    assert torch.isfinite(got).all()
    worst = ((got - expected).abs() / bound).max()
    assert worst <= 1, f"{float(worst)} times the bound"


SHAPES = [(16, 64), (48, 128), (17, 40), (33, 96), (1, 32), (130, 200), (100, 1), (256, 320)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_repacking_is_lossless(name, group):
    if not grouped(name) and group != 32:
        pytest.skip("the format has no groups")
    for n, k in [*SHAPES, (272, 1024), (64, 416)]:
        packed, gpu, number, group_size, _, _ = make(name, n, k, group)
        assert gpu.shape == packed.shape
        back = ops.move_packed(gpu, "cpu", k, number, group_size)
        assert torch.equal(back, packed), (n, k)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_and_embedding_equal_the_cpu(name, dtype):
    for (n, k), group in itertools.product(SHAPES, [32, 64]):
        packed, gpu, number, group_size, exponent, _ = make(name, n, k, group)
        cpu = _lowbit.dequantize(packed, [n, k], number, group_size, exponent, dtype)
        got = _lowbit.dequantize(gpu, [n, k], number, group_size, exponent, dtype)
        assert torch.equal(got.cpu(), cpu), (n, k, group)
        ids = torch.tensor([[n - 1, 0], [n // 2, n // 3]])
        rows = _lowbit.embedding(gpu, ids.cuda(), n, k, number, group_size, exponent, dtype)
        assert torch.equal(rows.cpu(), cpu[ids])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_on_odd_shapes(name, dtype):
    for (n, k), m in itertools.product(SHAPES, [1, 7, 40]):
        _, gpu, number, group, exponent, exact = make(name, n, k)
        x = activations(m, k, dtype)
        bias = activations(1, n, torch.float32)[0]
        args = (n, k, number, group, exponent)
        got = _lowbit.linear(x.cuda(), gpu, bias.cuda(), *args, 0)
        assert got.dtype == dtype and got.shape == (m, n)
        assert_close(got, x, exact, bias, name, rounded_weights=True)


FUSED = [name for name in NAMES if name not in FULL]


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_decode_kernel(name, dtype, group):
    if not grouped(name) and group != 32:
        pytest.skip("the format has no groups")
    for n, k in [(16, 64), (200, 192), (257, 1024), (1000, 1600)]:
        _, gpu, number, group_size, exponent, exact = make(name, n, k, group)
        for m in (1, 3, 8, 9, 16, 21, 32):
            x = activations(m, k, dtype)
            shapes = [(1, 1, 4, 1), (3, 2, 3, 2), (4, 1, 8, 4)] + (
                [(7, 1, 5, 1), (8, 2, 2, 2)] if m <= 16 else []
            )
            for shape in shapes:
                if shape[3] * 64 > k:
                    continue
                for early in (0, 1):
                    got = _lowbit.linear_variant(
                        x.cuda(),
                        gpu,
                        None,
                        n,
                        k,
                        number,
                        group_size,
                        exponent,
                        [QMV, *shape, early],
                    )
                    assert_close(got, x, exact, name=name)
                    again = _lowbit.linear_variant(
                        x.cuda(),
                        gpu,
                        None,
                        n,
                        k,
                        number,
                        group_size,
                        exponent,
                        [QMV, *shape, early],
                    )
                    assert torch.equal(got, again)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [32, 64, 256])
def test_wgmma_kernel(name, dtype, group):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma needs compute capability 9.0")
    if not grouped(name) and group != 32:
        pytest.skip("the format has no groups")
    for n, k in [(16, 64), (130, 192), (257, 1024)]:
        _, gpu, number, group_size, exponent, exact = make(name, n, k, group)
        if exponent and dtype == torch.float16:
            continue  # refused: scaled weights would overflow; select() dequantizes to fp32
        for m, tokens in [
            (1, 8),
            (8, 8),
            (9, 8),
            (13, 16),
            (32, 16),
            (1, 32),
            (32, 32),
            (33, 64),
            (64, 64),
            (33, 32),
            (100, 64),
            (72, 64),
            (128, 128),
            (200, 128),
            (130, 128),
            (300, 256),
            (257, 256),
        ]:
            x = activations(m, k, dtype)
            for rows, splits in ((128, 1), (128, 2), (64, 1), (64, 8), (48, 1), (112, 4)):
                if splits * 128 > k or (rows <= 64 and tokens > 64):
                    continue
                got = _lowbit.linear_variant(
                    x.cuda(),
                    gpu,
                    None,
                    n,
                    k,
                    number,
                    group_size,
                    exponent,
                    [QMM, rows, tokens, splits, 1],
                )
                # Weights are rounded to the dtype of x, too.
                assert_close(got, x, exact, name=name, rounded_weights=True)


@pytest.mark.parametrize("name", ["sym_int4", "asym_int4", "nf3", "sym_int8", "fp8_e4m3"])
def test_tokens_past_the_last(name):
    """A tile of more tokens than there are: what an earlier call left in shared memory (NaN)
    reaches no result, and a row's result does not depend on how many rows there are."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma needs compute capability 9.0")
    n, k = 256, 1024
    _, gpu, number, group, exponent, exact = make(name, n, k, 64)
    # A thread block for every multiprocessor leaves NaN in all of them.
    wide = 128 * torch.cuda.get_device_properties("cuda").multi_processor_count
    _, everywhere, *_ = make(name, wide, k, 64)
    tiles = [(1, 8), (3, 16), (17, 32), (33, 64), (70, 128), (129, 256)]
    for (m, tokens), splits in itertools.product(tiles, (1, 2)):
        variant = [QMM, 128, tokens, splits, 1]
        poison = torch.full((tokens, k), float("nan"), dtype=torch.bfloat16, device="cuda")
        x = activations(tokens, k, torch.bfloat16)
        all_rows = _lowbit.linear_variant(
            x.cuda(), gpu, None, n, k, number, group, exponent, variant
        )
        _lowbit.linear_variant(poison, everywhere, None, wide, k, number, group, 0, variant)
        some = _lowbit.linear_variant(
            x[:m].contiguous().cuda(), gpu, None, n, k, number, group, exponent, variant
        )
        assert torch.equal(some, all_rows[:m])
        assert_close(some, x[:m], exact, name=name, rounded_weights=True)


@pytest.mark.parametrize("name", ROW_SCALED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp8_tensor_cores(name, dtype):
    """Against the product of the same e4m3 activations: 2^-11 of the sum of magnitudes for the
    tensor cores' sums, which keep about 14 bits, and the rounding of the result."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma needs compute capability 9.0")
    for (n, k), m in itertools.product([(16, 64), (130, 192), (257, 1024)], [1, 65, 72, 300]):
        _, gpu, number, group, exponent, exact = make(name, n, k)
        x = activations(m, k, dtype) * torch.logspace(-2, 2, m)[:, None].to(dtype)
        bias = activations(1, n, torch.float32)[0]
        scale = x.float().abs().amax(-1, keepdim=True) / 448
        eight = (x.float() * (1 / scale)).to(torch.float8_e4m3fn).double() * scale.double()
        expected = eight @ exact.T + bias.double()
        magnitude = eight.abs() @ exact.abs().T + bias.double().abs()
        u = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
        bound = 1.001 * u * expected.abs() + 2.0**-11 * magnitude + 1e-30
        args = (x.cuda(), gpu, bias.cuda(), n, k, number, group, exponent)
        for tokens, splits in itertools.product((64, 128, 256), (1, 2)):
            if splits * 128 > k:
                continue
            got = _lowbit.linear_variant(*args, [EIGHT, tokens, splits, 1])
            worst = ((got.double().cpu() - expected).abs() / bound).max()
            assert worst <= 1, (n, k, m, tokens, splits, float(worst))
    # Chosen where it pays: many tokens.
    _, gpu, number, group, exponent, _ = make(name, 4096, 2048)
    x = activations(1024, 2048, dtype).cuda()
    args = (x, gpu, 4096, 2048, number, group, exponent, 3)
    assert _lowbit.linear_choice(*args).startswith("eight")
    once, twice = (_lowbit.linear(x, gpu, None, *args[2:]) for _ in range(2))
    assert torch.equal(once, twice)


@pytest.mark.parametrize("name", NAMES)
def test_scratch_path_and_exact_precision(name):
    n, k = 144, 320
    _, gpu, number, group, exponent, exact = make(name, n, k)
    x = activations(50, k, torch.bfloat16)
    got = _lowbit.linear_variant(x.cuda(), gpu, None, n, k, number, group, exponent, [SCRATCH])
    assert_close(got, x, exact, name=name, rounded_weights=True)
    x = activations(3, k, torch.float32)
    got = _lowbit.linear(x.cuda(), gpu, None, n, k, number, group, exponent, 1)
    assert_close(got, x, exact, name=name)


def make_experts(name: str, experts: int, n: int, k: int, group: int = 0):
    """As make(), for a stack of matrices [experts, n, k]."""
    generator = torch.Generator().manual_seed(n + k)
    weight = torch.randn(experts, n, k, generator=generator)
    number = BY_NAME[name].number
    group = group if grouped(name) else 0
    packed, exponent = _lowbit.quantize(weight, number, group)
    shape = [experts, n, k]
    exact = _lowbit.dequantize(packed, shape, number, group, int(exponent), torch.float64)
    return ops.move_packed(packed, "cuda", k, number, group), number, group, int(exponent), exact


def assert_experts_close(got, x, ends, exact, **options):
    begin = 0
    for expert, end in enumerate(ends):
        if end > begin:
            assert_close(got[begin:end], x[begin:end], exact[expert], **options)
            begin = end


COUNTS = [
    [1, 0, 0, 1, 1, 0, 2],
    [0, 0, 0, 0, 0, 0, 1],
    [3, 17, 0, 8, 9, 1, 0],
    [40, 0, 70, 5, 0, 33, 64],
    [0, 300, 0, 0, 1, 257, 0],
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_grouped_linear(name, dtype):
    experts, n, k = 7, 200, 192
    packed, number, group, exponent, exact = make_experts(name, experts, n, k)
    for counts in COUNTS:
        ends = torch.tensor(counts).cumsum(0)
        x = activations(int(ends[-1]) + 3, k, dtype)  # three rows of nobody
        args = (n, k, number, group, exponent)
        got = _lowbit.linear_grouped(
            x.cuda(), packed, ends.int().cuda(), *args, 1 if dtype == torch.float32 else 0
        )
        rounded = dtype != torch.float32 and sum(counts) > 32
        options = {"name": name, "rounded_weights": rounded or name in FULL}
        assert_experts_close(got, x, ends.tolist(), exact, **options)


@pytest.mark.parametrize("name", ["sym_int4", "asym_int5", "nf3", "nf4", "sym_int8", "fp8_e5m2"])
def test_grouped_linear_in_every_shape(name):
    experts, n, k = 40, 144, 320
    for group in (0, 32):
        packed, number, group, exponent, exact = make_experts(name, experts, n, k, group)
        variants = [
            [QMV, run, tiles, warps_n, warps_k, splits, early]
            for run in (8, 16, 32)
            for tiles, warps_n, warps_k, splits in [(1, 1, 4, 1), (2, 2, 2, 2), (4, 1, 8, 1)]
            for early in (0, 1)
        ] + [[QMM, rows, t, 1] for t in (8, 16, 32, 64, 128, 256) for rows in (64, 128)]
        variants = [v for v in variants if v[0] == QMV or v[2] <= 64 or v[1] == 128]
        for seed, most in enumerate((2, 30, 200)):
            generator = torch.Generator().manual_seed(seed)
            counts = torch.randint(0, most, (experts,), generator=generator)
            counts[torch.randint(0, experts, (15,), generator=generator)] = 0
            ends = counts.cumsum(0)
            x = activations(int(ends[-1]), k, torch.bfloat16)
            for variant in variants:
                args = (x.cuda(), packed, ends.int().cuda(), n, k, number, group, exponent, variant)
                got = _lowbit.linear_grouped_variant(*args)
                assert_experts_close(
                    got, x, ends.tolist(), exact, name=name, rounded_weights=variant[0] == QMM
                )
                assert torch.equal(got, _lowbit.linear_grouped_variant(*args))


def test_grouped_linear_never_leaves_its_tensors():
    packed, number, group, exponent, _ = make_experts("sym_int4", 5, 64, 128)
    args = (64, 128, number, group, exponent)
    x = activations(50, 128, torch.bfloat16).cuda()
    for ends in ([-7, 3, 2, 1000, 2**31 - 1], [60, 60, 60, 60, 60], [0] * 5, [9, 8, 7, 6, 5]):
        ends = torch.tensor(ends, dtype=torch.int32, device="cuda")
        assert _lowbit.linear_grouped(x, packed, ends, *args, 0).shape == (50, 64)
        for variant in ([QMV, 8, 1, 1, 4, 1, 1], [QMM, 64, 64, 1]):
            _lowbit.linear_grouped_variant(x, packed, ends, *args, variant)
    torch.cuda.synchronize()
    empty = _lowbit.linear_grouped(x[:0], packed, ends, *args, 0)
    assert empty.shape == (0, 64)
    for bad in (ends.long(), ends[None], ends[:4], ends.cpu()):
        with pytest.raises(RuntimeError, match=r"linear(_grouped)?: "):
            _lowbit.linear_grouped(x, packed, bad, *args, 0)


def assert_same_bytes(name, weight, on_gpu=None, group=0):
    """Quantizes on both sides; `on_gpu`: the same numbers there, laid out as the caller wants."""
    number = BY_NAME[name].number
    packed, exponent = _lowbit.quantize(weight, number, group)
    gpu, gpu_exponent = _lowbit.quantize(weight.cuda() if on_gpu is None else on_gpu, number, group)
    assert gpu.is_cuda and int(gpu_exponent) == int(exponent)
    assert torch.equal(ops.move_packed(gpu, "cpu", weight.shape[-1], number, group), packed)
    return int(exponent)


@pytest.mark.parametrize("name", NAMES)
def test_quantize_gives_the_bytes_of_the_cpu(name):
    for n, k in [(1, 1), (16, 32), (70, 200), (33, 97), (48, 576), (5, 1040)]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            weight = activations(n, k, dtype)
            assert_same_bytes(name, weight)
            wide = torch.zeros(n + 1, 2 * k + 3, dtype=dtype, device="cuda")
            for view in (wide[1:, 3 : k + 3], wide[:n, 1 : 2 * k + 1 : 2]):
                view.copy_(weight)
                assert_same_bytes(name, weight, view)
            turned = torch.empty(k, n, dtype=dtype, device="cuda").T.copy_(weight)
            assert_same_bytes(name, weight, turned)
        if grouped(name):
            for group in (32, 128, 256):
                assert_same_bytes(name, activations(n, k, torch.float32), group=group)
    for shape in ((3, 20, 100), (2, 2, 32, 64)):
        assert_same_bytes(name, torch.randn(shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("name", NAMES)
def test_quantize_of_unusual_numbers_gives_the_bytes_of_the_cpu(name):
    ties = torch.arange(-128.0, 128.0).repeat(3, 1) / 16
    zeros = torch.zeros(20, 96)
    zeros[3, 7] = -0.0
    zeros[4, 9] = 1e-45
    exponents = []
    for weight in (
        ties,
        zeros,
        -ties.abs(),
        torch.full((17, 65), -3.0),
        activations(18, 128, torch.float32) * 1e30,
        activations(18, 128, torch.float32) * 1e-30,
        activations(18, 128, torch.float32) * 1e-43,
        activations(18, 128, torch.float32) * torch.logspace(-40, 38, 18)[:, None],
        torch.tensor([[3.4e38, -3.4e38] * 40]),
        torch.tensor([[65504.0, -65504.0] * 40]),
    ):
        exponents.append(assert_same_bytes(name, weight))
    assert name == "bf16" or any(exponents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_quantize_names_the_first_weight_that_is_not_finite(dtype):
    weight = torch.randn(40, 96).to(dtype).cuda()
    weight[7, 5], weight[7, 4], weight[30, 0] = float("nan"), float("-inf"), float("nan")
    number = BY_NAME["sym_int4"].number
    with pytest.raises(RuntimeError, match=r"\[7, 4\] is -inf"):
        _lowbit.quantize(weight, number, 0)
    with pytest.raises(RuntimeError, match=r"\[0, 30\] is nan"):
        _lowbit.quantize(weight.T, number, 0)


def test_exponents_three_dimensions_and_strides():
    weight = activations(40, 128, torch.float32) * 1e30
    number = BY_NAME["sym_int4"].number
    packed, exponent = _lowbit.quantize(weight, number, 0)
    assert int(exponent) != 0
    gpu = ops.move_packed(packed, "cuda", 128, number, 0)
    exact = _lowbit.dequantize(packed, [40, 128], number, 0, int(exponent), torch.float64)
    x = activations(6, 128, torch.bfloat16).reshape(2, 3, 128)
    got = _lowbit.linear(x.cuda(), gpu, None, 40, 128, number, 0, int(exponent), 0)
    assert got.shape == (2, 3, 40)
    assert_close(got.reshape(6, 40), x.reshape(6, 128), exact, rounded_weights=True)
    strided = activations(12, 256, torch.bfloat16).cuda()[::2, 64:192]
    got = _lowbit.linear(strided, gpu, None, 40, 128, number, 0, int(exponent), 0)
    assert_close(got, strided.cpu(), exact, rounded_weights=True)
    odd = activations(12, 130, torch.bfloat16).cuda()[:, 1:129]  # rows not 16-byte aligned
    got = _lowbit.linear(odd, gpu, None, 40, 128, number, 0, int(exponent), 0)
    assert_close(got, odd.cpu(), exact, rounded_weights=True)


def test_a_nonfinite_token_stays_alone():
    n, k = 64, 256
    for m in (2, 40):
        _, gpu, number, group, exponent, _ = make("sym_int4", n, k)
        x = activations(m, k, torch.bfloat16)
        x[1, 5] = float("nan")
        got = _lowbit.linear(x.cuda(), gpu, None, n, k, number, group, exponent, 0).cpu()
        assert got[1].isnan().all()
        assert torch.isfinite(got[torch.arange(m) != 1]).all()


def test_cuda_graph_and_streams():
    n, k = 512, 1024
    _, gpu, number, group, exponent, exact = make("nf4", n, k)
    for m in (1, 48):
        x = activations(m, k, torch.bfloat16).cuda()
        args = (gpu, None, n, k, number, group, exponent, 0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            _lowbit.linear(x, *args)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                y = x
                for _ in range(3):
                    y = _lowbit.linear(x, *args)
        x.copy_(activations(m, k, torch.bfloat16, seed=9))
        graph.replay()
        torch.cuda.synchronize()
        assert_close(y, x.cpu(), exact, name="nf4", rounded_weights=True)


@pytest.mark.parametrize(
    "change",
    ["device", "dtype", "shape", "bias"],
)
def test_bad_input_is_refused(change):
    n, k = 64, 128
    _, gpu, number, group, exponent, _ = make("sym_int4", n, k)
    x = activations(2, k, torch.bfloat16).cuda()
    args = [x, gpu, None, n, k, number, group, exponent, 0]
    if change == "device":
        args[0] = x.cpu()
    elif change == "dtype":
        args[0] = x.to(torch.int32)
    elif change == "shape":
        args[0] = x[:, :64]
    else:
        args[2] = torch.zeros(3, device="cuda")
    with pytest.raises(RuntimeError):
        _lowbit.linear(*args)
