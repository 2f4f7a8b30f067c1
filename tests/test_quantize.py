"""Codes against the definition, the layers against plain products of what they hold, and bad input in words."""

import copy

import pytest
import torch
import torch.nn.functional as F
from minillm_kernels import cpu
from minillm_kernels.gated_mlp import gated_mlp
from minillm_kernels.int4_linear import dequantize_int4, int4_linear

from minillm.errors import MinillmError
from minillm.linear import Int4Linear, Int8Linear, Linear, QuantizeSpec, make_linear, parse_quantize
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config
from minillm.load.quantize import fill_rows, quantize_int4, quantize_int8
from minillm.options import GROUP_SIZES

WORDS = (None, "int8", "int4-g32", "int4-g64", "int4-g128")


def test_the_groups_a_caller_may_ask_for_are_those_of_the_kernels():
    """Written down a second time in options.py, which cannot ask there: it does without torch."""
    assert GROUP_SIZES == cpu.GROUP_SIZES


def round_to_nearest(weight, group_size):
    """The baseline: 16 codes spread evenly over each group's range, zero included; returns the weights it gives."""
    grouped = weight.view(weight.shape[0], -1, group_size)
    low, high = grouped.amin(2, keepdim=True).clamp(max=0), grouped.amax(2, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).half().float().clamp(min=2**-24)
    zero = (-low / scale).round().clamp(0, 15)
    return (((grouped / scale + zero).round().clamp(0, 15) - zero) * scale).view_as(weight)


def dequantize_int8(codes, scale):
    """codes [N, K] int8, scale [N] -> float32 [N, K]."""
    return codes.float() * scale[:, None]


def test_int8_moves_no_weight_by_more_than_half_a_step():
    torch.manual_seed(0)
    weight = torch.randn(300, 1001) * torch.logspace(-6, 3, 300)[:, None]  # several pieces, many magnitudes
    weight[7] = 0
    codes, scale = quantize_int8(weight)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert codes.abs().max() == 127
    step = weight.abs().amax(1, keepdim=True) / 127
    error = (dequantize_int8(codes, scale).double() - weight.double()).abs()
    assert (error <= step * (0.5 + 1e-4)).all()  # 127 * 2^-24 and such for the roundings on the way
    assert dequantize_int8(codes, scale)[7].eq(0).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int4_is_packed_as_documented(group_size, dtype):
    """Unpacked here element by element from the words of the layout; each weight within reach of its code."""
    torch.manual_seed(1)
    weight = torch.randn(20, 256).to(dtype)
    packed, scale, zero = quantize_int4(weight, group_size)
    assert (packed.dtype, scale.dtype, zero.dtype) == (torch.uint8, torch.float16, torch.uint8)
    assert packed.shape == (20, 128)
    assert scale.shape == zero.shape == (256 // group_size, 20)
    expected = torch.empty(20, 256)
    for k in range(256):
        group, i = divmod(k, group_size)
        byte = packed[:, group * group_size // 2 + i % (group_size // 2)].int()
        code = byte % 16 if i < group_size // 2 else byte // 16
        expected[:, k] = (code - zero[group].int()) * scale[group].float()
    assert torch.equal(dequantize_int4(packed, scale, zero, group_size), expected)
    assert zero.max() <= 15


@pytest.mark.parametrize(("group_size", "gain"), [(32, 0.08), (64, 0.07), (128, 0.09)])
def test_int4_search_beats_round_to_nearest(group_size, gain):
    """On normal weights by the share of squared error the docstring states (less a margin for the draw), and in no
    group at all worse: round to nearest is among the candidates."""
    torch.manual_seed(2)
    weight = torch.randn(256, 1024)
    found = dequantize_int4(*quantize_int4(weight, group_size), group_size) - weight
    plain = round_to_nearest(weight, group_size) - weight
    assert found.square().sum() < (1 - gain) * plain.square().sum()
    per_group = [e.view(-1, group_size).square().sum(1) for e in (found, plain)]
    assert (per_group[0] <= per_group[1] * (1 + 1e-5)).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int4_in_c_gives_the_codes_of_the_torch_code(group_size, dtype, monkeypatch):
    """Bit for bit: 37 rows of many magnitudes, weights on a coarse grid (equal errors) and groups of nothing."""
    if not cpu.available():
        pytest.skip("no C compiler")
    torch.manual_seed(7)
    weight = torch.randn(37, 1024) * torch.logspace(-7, 3, 37)[:, None]
    weight[5:15] = torch.randint(-9, 10, (10, 1024)) / 16
    weight[3], weight[4, :512] = 0, 1.5
    # All below 0, and so near it that the scale is one or two of float16's smallest: the zero point would pass 15.
    weight[16:20] = -torch.rand(4, 1024) * torch.tensor([1.2, 1.3, 1.4, 2.4])[:, None] * 15 * 2**-24
    weight = weight.to(dtype)
    in_c = quantize_int4(weight, group_size)
    transposed = quantize_int4(weight.t().contiguous().t(), group_size)
    monkeypatch.setattr(cpu, "available", lambda: False)
    for found, other, expected in zip(in_c, transposed, quantize_int4(weight, group_size), strict=True):
        assert torch.equal(found, expected)
        assert torch.equal(other, expected)


def test_int4_of_awkward_groups():
    weight = torch.zeros(6, 32)
    weight[1] = 1.0  # constant
    weight[2] = -3e-4  # constant, negative
    weight[3, 5] = 100.0  # a single spike
    weight[4] = torch.linspace(5, 6, 32)  # far from zero: the range is stretched to include it
    weight[5] = 1e-9  # below what float16 can scale
    result = dequantize_int4(*quantize_int4(weight, 32), 32)
    assert result[0].eq(0).all()
    for row in (1, 2):  # a constant is up to 15 whole steps of a float16 scale, off by half its spacing
        torch.testing.assert_close(result[row], weight[row], rtol=2**-11, atol=15 * 2**-25)
    torch.testing.assert_close(result[3], weight[3], rtol=2**-11, atol=0)
    assert (result[4] - weight[4]).abs().max() < 6 / 15
    assert result[5].abs().max() < 2**-24


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("bias", [False, True])
def test_layers_filled_by_row_slices_equal_one_filled_at_once(word, bias):
    torch.manual_seed(3)
    weight, values = torch.randn(100, 256).bfloat16(), torch.randn(100)
    layers = [make_linear(256, 100, bias, parse_quantize(word), torch.float32) for _ in range(2)]
    fill_rows(layers[0], 0, weight)
    for start, stop in ((40, 100), (0, 33), (33, 40)):
        fill_rows(layers[1], start, weight[start:stop])
    if bias:
        for layer in layers:
            layer.bias.data.copy_(values)
    for a, b in zip(layers[0].state_dict().values(), layers[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    x = torch.randn(2, 3, 256)
    held = held_weight(layers[0])
    expected = F.linear(x.double(), held.double(), values.double() if bias else None)
    with torch.no_grad():
        torch.testing.assert_close(layers[0](x).double(), expected, rtol=1e-3, atol=1e-3 * expected.std().item())


def held_weight(layer):
    if isinstance(layer, Linear):
        return layer.weight
    if isinstance(layer, Int8Linear):
        return dequantize_int8(layer.weight, layer.scale)
    return dequantize_int4(layer.packed, layer.scale, layer.zero, layer.group_size)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_is_activation_of_the_first_half_times_the_second(word, bias, activation):
    torch.manual_seed(4)
    layer = make_linear(128, 96, bias, parse_quantize(word), torch.float32)
    fill_rows(layer, 0, torch.randn(96, 128) / 8)
    if bias:
        layer.bias.data.normal_()
    x = torch.randn(5, 128)
    gate, up = F.linear(x, held_weight(layer), layer.bias).double().chunk(2, dim=-1)
    gate = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    with torch.no_grad():
        torch.testing.assert_close(layer.gated(x, activation).double(), gate * up, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("word", WORDS)
def test_eager_and_compiled_layers_agree_and_compile_to_one_graph(word):
    torch.manual_seed(5)
    layer = make_linear(128, 64, True, parse_quantize(word), torch.bfloat16)
    fill_rows(layer, 0, torch.randn(64, 128))
    layer.bias.data.normal_()
    plain = make_linear(128, 64, False, parse_quantize(word), torch.bfloat16)
    fill_rows(plain, 0, torch.randn(64, 128))
    x = torch.randn(3, 128).bfloat16()

    def both(x):
        return layer(x), plain.gated(x, "silu")

    with torch.no_grad():
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(x)
        assert all(map(torch.equal, compiled, both(x)))


def test_dense_layer_gives_gradients():
    layer = Linear(8, 6, True, torch.float32)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, 8, requires_grad=True)
    (layer(x).square().sum() + layer.gated(x, "silu").sum()).backward()
    assert all(t.grad.abs().sum() > 0 for t in (x, layer.weight, layer.bias))


@pytest.mark.parametrize("word", ["int8", "int4-g32"])
def test_layers_are_built_on_meta_and_keep_their_scales_when_cast(word):
    """`model.to(bfloat16)` rounds parameters; rounding the scales too would change every weight."""
    with torch.device("meta"):
        layer = make_linear(64, 10, True, parse_quantize(word), torch.float32)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    layer = layer.to_empty(device="cpu")
    torch.manual_seed(6)
    fill_rows(layer, 0, torch.randn(10, 64))
    layer.bias.data.zero_()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer = layer.to(torch.bfloat16)
    after = layer.state_dict()
    assert after.pop("bias").dtype == torch.bfloat16
    assert before.keys() - after.keys() == {"bias"}
    assert all(
        torch.equal(before[name], tensor) and before[name].dtype == tensor.dtype for name, tensor in after.items()
    )
    assert layer(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16


def test_layers_hold_exactly_the_bytes_of_the_format():
    def size(layer):
        return sum(tensor.nbytes for tensor in layer.state_dict().values())

    assert size(make_linear(256, 100, False, parse_quantize("int8"), torch.bfloat16)) == 100 * 256 + 100 * 4
    assert size(make_linear(256, 100, True, parse_quantize("int4-g32"), torch.bfloat16)) == 100 * (128 + 8 * 3 + 2)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_the_quantized_head_of_a_tied_model_gives_its_embeddings_logits(quantize, checkpoint):
    """It has codes of its own, made of the embedding: each weight within half a step of its row's largest / 127."""
    folder = checkpoint("llama3.2")
    config = load_config(folder)
    assert config.tie_word_embeddings
    model = load_decoder(folder, config, torch.float32, "cpu", quantize=quantize, quantize_head=True)
    hidden = torch.randn(5, config.hidden_size, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        weight = model.embedding.weight.double()  # [V, d]
        logits, exact = model.logits(hidden).double(), hidden.double() @ weight.t()
    # Its own codes and scales are weights that a step reads; what two modules share is one.
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    assert model.weight_bytes == sum(tensors.values())
    half_step = weight.abs().amax(1) / 254  # [V]
    # The activations are rounded to int16 besides, and sums of 48 are float32: together far below 1 % of the former.
    assert ((logits - exact).abs() <= 1.01 * half_step * hidden.abs().sum(1, keepdim=True).double()).all()
    assert exact.std() > 0.5


def test_words():
    assert parse_quantize(None) is None
    assert parse_quantize("int8") == QuantizeSpec(8)
    assert parse_quantize("int4") == QuantizeSpec(4, 64)
    assert parse_quantize("int4-g128") == QuantizeSpec(4, 128)
    for word in WORDS[1:]:
        assert str(parse_quantize(word)) == word
    for wrong in ("int5", "int4-g48", "INT8", "", "int8-g64", 8):
        with pytest.raises(MinillmError, match="choose one of int8, int4, int4-g32"):
            parse_quantize(wrong)


@pytest.mark.parametrize("in_c", [False, True])
def test_int4_of_weights_further_apart_than_a_float16_scale_reaches(in_c, monkeypatch):
    """15 steps of 65504 is the widest group there can be; beyond, 97 % of the values would be lost in silence."""
    if not in_c:
        monkeypatch.setattr(cpu, "available", lambda: False)
    weight = torch.zeros(40, 64)
    weight[39, 3], weight[39, 4] = 600_000.0, -380_000.0
    result = dequantize_int4(*quantize_int4(weight, 64), 64)
    assert (result - weight).abs().max() < 65504 * 0.6
    for high, low in ((982_560.0 * 1.01, 0.0), (600_000.0, -400_000.0), (1e38, 0.0), (3e38, -3e38)):
        weight[39, 3], weight[39, 4] = high, low
        with pytest.raises(MinillmError, match=r'too far apart for int4; use quantize="int8"'):
            quantize_int4(weight, 64)
        codes, scale = quantize_int8(weight)
        assert (dequantize_int8(codes, scale) - weight).abs().max() <= high / 254 * 1.01


def test_int4_in_torch_clamps_both_ends(monkeypatch):
    """A group all of whose weights are negative, or all positive, still has zero in its range: codes stay in 0..15."""
    monkeypatch.setattr(cpu, "available", lambda: False)
    for sign in (1, -1):
        weight = sign * torch.linspace(1, 6, 32).repeat(4, 2)
        packed, scale, zero = quantize_int4(weight, 32)
        assert zero.eq(0 if sign > 0 else 15).all()
        assert (dequantize_int4(packed, scale, zero, 32) - weight).abs().max() < 6 / 15


@pytest.mark.parametrize("in_c", [False, True])
def test_weights_that_are_not_finite_are_refused(in_c, monkeypatch):
    if not in_c:
        monkeypatch.setattr(cpu, "available", lambda: False)
    for wrong in (float("nan"), float("inf"), -float("inf")):
        weight = torch.ones(40, 64)
        weight[39, 3] = wrong
        with pytest.raises(MinillmError, match="infinite or not a number"):
            quantize_int8(weight)
        with pytest.raises(MinillmError, match="infinite or not a number"):
            fill_rows(Int4Linear(64, 40, False, torch.float32), 0, weight)


def test_errors_name_the_shape_and_the_way_out():
    with pytest.raises(
        MinillmError, match=r'96 inputs and 10 outputs .* groups of 64; use quantize="int4-g32" or "int8"'
    ):
        make_linear(96, 10, False, QuantizeSpec(4, 64), torch.float32)
    with pytest.raises(MinillmError, match=r'50 inputs and 10 outputs .* use quantize="int8"'):
        quantize_int4(torch.ones(10, 50), 64)
    with pytest.raises(MinillmError, match="groups hold 32, 64, 128 inputs, not 48"):
        quantize_int4(torch.ones(10, 96), 48)


@pytest.mark.parametrize("group_size", [32, 128])
def test_scales_in_either_order_of_memory(group_size):
    """As a CPU likes them, and as a GPU does: the same bits. The groups fill two registers and a part of a third."""
    generator = torch.Generator().manual_seed(1)
    packed, scale, zero = quantize_int4(torch.randn(70, 37 * group_size, generator=generator), group_size)
    assert scale.stride() == zero.stride() == (1, 37)
    for rows in (1, 6, 20):
        x = torch.randn(rows, 37 * group_size, generator=generator)
        expected = int4_linear(x, packed, scale, zero, group_size)
        assert torch.equal(int4_linear(x, packed, scale.contiguous(), zero.contiguous(), group_size), expected)
        assert torch.equal(int4_linear(x, packed, scale, zero.contiguous(), group_size), expected)
        both = gated_mlp(x, packed, "silu", scale, zero, group_size)
        assert torch.equal(gated_mlp(x, packed, "silu", scale.contiguous(), zero, group_size), both)
    with pytest.raises(ValueError, match="scale and zero must be contiguous"):
        int4_linear(x, packed, torch.cat([scale, scale])[::2], zero, group_size)


def test_an_int4_layer_keeps_the_order_of_its_device():
    layer = Int4Linear(128, 10, False, torch.float32, group_size=32)
    fill_rows(layer, 0, torch.randn(10, 128))
    for moved in (layer, copy.deepcopy(layer), layer.to("cpu"), layer.to(torch.bfloat16)):
        assert moved.scale.stride() == moved.zero.stride() == (1, 4)
        assert torch.equal(moved.scale, layer.scale)
