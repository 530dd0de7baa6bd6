"""Checkpoint formats: what is written is read back bit for bit, by hand as well; peers' settings; what doesn't fit is said in one line."""

import re

import pytest
import torch

from normtweak import PackedLinear, formats
from normtweak.formats.scheme import patterns
from normtweak_kernels import QuantizedWeight


def packed(n, k, bits, groups, symmetric, *, bias=False, perm=False):
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scales = (torch.rand(groups, n) * 0.1 + 0.01).half()
    zeros = None if symmetric else torch.randint(1, 2**bits, (groups, n), dtype=torch.uint8)
    plain = PackedLinear.from_weight(QuantizedWeight(codes, scales, zeros, bits), torch.randn(n) if bias else None)
    order = torch.cat([part.sort().values for part in torch.randperm(k).split(k // groups)]) if perm else None
    return PackedLinear(plain.qweight, plain.scales, plain.zeros, plain.bias, bits=bits, in_features=k, perm=order)


def opened(name, linear, **more):
    return formats.open_format(formats.describe(name, {"a.b": formats.Scheme.of(linear)}, ["c"]) | more)


def same(a, b):
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("qweight", "scales", "zeros", "perm", "bias")]
    return all((x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in pairs) and a.bits == b.bits


SHAPES = [(16, 32, 1), (24, 192, 3), (7, 96, 2)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "k", "groups"), SHAPES)
@pytest.mark.parametrize("name", formats.WRITTEN)
def test_round_trip(name, bits, symmetric, n, k, groups):
    linear = packed(n, k, bits, groups, symmetric, bias=n == 24)
    form = opened(name, linear)
    tensors = form.write("a.b", linear)
    expected = form.tensors(form.scheme("a.b"), n, k)
    assert {leaf: (t.dtype, tuple(t.shape)) for leaf, t in tensors.items() if leaf != "bias"} == expected
    assert same(form.read("a.b", tensors, n, k), linear)


@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_act_order(name, bits):
    linear = packed(16, 96, bits, 3, False, perm=True)
    form = opened(name, linear, desc_act=True)
    tensors = form.write("a.b", linear)
    assert sorted(tensors["g_idx"].tolist()) == [0] * 32 + [1] * 32 + [2] * 32
    again = form.read("a.b", tensors, 16, 96)
    assert same(again, linear)
    # by the format's own definition, column by column
    codes = by_hand(tensors["qweight"].t(), bits, 96)
    zeros = linear.zeros.float()[tensors["g_idx"].long()].t()
    weight = (codes - zeros) * linear.scales.float()[tensors["g_idx"].long()].t()
    assert torch.equal(again.dequantize(), weight)


@pytest.mark.parametrize("name", formats.WRITTEN)
def test_reading_does_not_depend_on_the_default_device(name):
    linear = packed(16, 96, 4, 3, False)
    form = opened(name, linear)
    tensors = form.write("a.b", linear)
    with torch.device("meta"):  # as torch.set_default_device("cuda") with tensors that were read on the CPU
        assert same(form.read("a.b", tensors, 16, 96), linear)


@pytest.mark.parametrize("dynamic", [["-:a"], "-:a", {"+:a": "4"}, {"+:a": [4]}])
def test_rules_of_the_wrong_kind_are_one_line(dynamic):
    with pytest.raises(ValueError, match="load: dynamic must be a table of patterns and their settings, got"):
        formats.open_format({"quant_method": "gptq", "bits": 4, "dynamic": dynamic})


def test_a_rule_without_settings_changes_nothing():
    form = formats.open_format({"quant_method": "gptq", "bits": 4, "dynamic": {"+:a": None}})
    assert form.scheme("a") == form.scheme("b") == formats.Scheme(4, -1, True)


def by_hand(words, bits, count):
    """Rows of words -> rows of codes, least significant first."""
    rows = []
    for row in words.tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row))
        rows.append([(stream >> (bits * i)) % 2**bits for i in range(count)])
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors_by_hand(bits):
    """weight = (value - zero point) * scale, values and zero points stored with 2**(bits-1) added."""
    linear = packed(24, 192, bits, 3, False)
    tensors = opened("compressed-tensors", linear).write("a.b", linear)
    half = 2 ** (bits - 1)
    values = by_hand(tensors["weight_packed"], bits, 192) - half
    points = by_hand(tensors["weight_zero_point"].t(), bits, 24).t() - half
    weight = (values - points.repeat_interleave(64, 1)) * tensors["weight_scale"].float().repeat_interleave(64, 1)
    assert torch.equal(weight, linear.dequantize())


def test_scales_that_float16_does_not_hold():
    linear = packed(16, 64, 4, 2, True)
    form = opened("compressed-tensors", linear)
    tensors = form.write("a.b", linear)
    coarse = tensors | {"weight_scale": tensors["weight_scale"].bfloat16()}
    assert form.read("a.b", coarse, 16, 64).scales.dtype == torch.float16
    fine = tensors | {"weight_scale": tensors["weight_scale"].float() * 1.0001}
    read = form.read("a.b", fine, 16, 64)
    assert torch.equal(read.scales.t(), fine["weight_scale"])
    assert torch.equal(form.write("a.b", read)["weight_scale"], fine["weight_scale"])
    with pytest.raises(ValueError, match=r"formats: a.b must be of scales that float16 holds"):
        opened("gptq", read).write("a.b", read)


def test_an_old_weight_g_idx():
    linear = packed(16, 64, 4, 2, True)
    form = opened("compressed-tensors", linear)
    g_idx = torch.randperm(64) % 2
    read = form.read("a.b", form.write("a.b", linear) | {"weight_g_idx": g_idx.int()}, 16, 64)
    codes = linear.quantized().codes.float() - 8
    assert torch.equal(read.dequantize(), codes * linear.scales.float()[g_idx].t())
    with pytest.raises(ValueError, match="a.b must be of groups that lie side by side for format compressed-tensors, got act-order groups"):
        form.write("a.b", read)


def test_a_zero_point_of_0():
    linear = packed(16, 64, 2, 2, False)
    linear.zeros[1, 3] = 0
    with pytest.raises(ValueError, match=r"a.b must be without a zero point of 0 for format gptq .*, got one"):
        opened("gptq", linear).write("a.b", linear)
    for name in ("gptq_v2", "compressed-tensors"):
        form = opened(name, linear)
        assert same(form.read("a.b", form.write("a.b", linear), 16, 64), linear)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gptq", {"g_idx": torch.zeros(64, dtype=torch.int32)}, "x: g_idx must be 2 groups of 32 inputs each, got groups of other sizes"),
        ("gptq", {"qweight": torch.zeros(4, 16, dtype=torch.int32)}, r"x: repack_gptq: qweight must be int32 \[8, N\]"),
        ("gptq", {"qweight": torch.zeros(8, 8, dtype=torch.int32)}, r"x: qweight must be of 16 columns, got \(8, 8\)"),
        ("gptq", {"qzeros": torch.zeros(2, 1, dtype=torch.int32)}, r"x: unpack_gptq_zeros: qzeros must be int32 \[G, 2\]"),
        ("gptq", {"scales": torch.ones(4, 16)}, r"x: scales must be \[2, 16\], got \(4, 16\)"),
        ("gptq", {"scales": None}, "load: x must be packed with qweight, qzeros and scales, got no scales"),
        ("compressed-tensors", {"weight_packed": torch.zeros(16, 7, dtype=torch.int32)}, r"x: weight_packed must be int32 \(16, 8\)"),
        ("compressed-tensors", {"weight_shape": torch.tensor([16, 32])}, r"x: weight_shape must be \[16, 64\], got \[16, 32\]"),
        ("compressed-tensors", {"weight_scale": torch.ones(16, 4)}, r"x: weight_scale must be \[16, 2\], got \(16, 4\)"),
        ("compressed-tensors", {"weight_zero_point": None}, "x must be packed with weight_scale and weight_zero_point, got no weight_zero_point"),
        ("compressed-tensors", {"weight_zero_point": torch.zeros(1, 2, dtype=torch.int32)}, r"x: weight_zero_point, transposed: unpack_gptq_zeros"),
    ],
)
def test_tensors_that_do_not_fit_together(name, change, message):
    linear = packed(16, 64, 4, 2, False)
    form = formats.open_format(formats.describe(name, {"x": formats.Scheme.of(linear)}, []))
    tensors = {leaf: tensor for leaf, tensor in (form.write("x", linear) | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message) as caught:
        form.read("x", tensors, 16, 64)
    assert "\n" not in str(caught.value)


def test_groups_of_unequal_size():
    form = formats.open_format({"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False})
    tensors = {"qweight": torch.zeros(12, 16, dtype=torch.int32), "qzeros": torch.zeros(2, 2, dtype=torch.int32), "scales": torch.ones(2, 16)}
    with pytest.raises(ValueError, match="x: in_features must be a multiple of the group size 64, as groups must be of one size, got 96"):
        form.read("x", tensors, 16, 96)
    with pytest.raises(ValueError, match="load: x must be packed with g_idx, as desc_act is on, got none"):
        formats.open_format(form.settings | {"desc_act": True}).read("x", tensors, 16, 96)


GROUP = {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}, "targets": ["Linear"]}
PACK = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": GROUP}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PACK | {"format": "int-quantized"}, "load: group_0.format must be pack-quantized, got int-quantized"),
        (PACK | {"config_groups": {"g": GROUP | {"input_activations": {"num_bits": 8}}}}, "g.input_activations must be absent"),
        (PACK | {"config_groups": {"g": GROUP | {"weights": {"num_bits": 8, "type": "float"}}}}, "g.weights.type must be int, got float"),
        (PACK | {"config_groups": {"g": GROUP | {"weights": {"strategy": "block"}}}}, "g.weights.strategy must be channel or group, got block"),
        (PACK | {"config_groups": {"g": GROUP | {"weights": {"num_bits": 5}}}}, "load: bits must be one of 2, 3, 4, 8, got 5"),
        (PACK | {"config_groups": {}}, "load: config_groups must be given, got none"),
        (PACK | {"transform_config": {"config_groups": {}}}, "load: transform_config must be absent, got one"),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
            "load: packing_format must be one of auto_round, .* got auto_round:auto_awq",
        ),
        ({"quant_method": "auto-round", "data_type": "mx_fp"}, "load: data_type must be int, got mx_fp"),
        ({"quant_method": "auto-round", "act_bits": 8}, r"load: act_bits must be 16 .*, got 8"),
        ({"quant_method": "gptq", "pack_dtype": "int16"}, "load: pack_dtype must be int32, got int16"),
    ],
)
def test_settings_that_are_not_read(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        formats.open_format(settings)
    assert "\n" not in str(caught.value)


def test_the_more_exact_target_counts():
    own = {"group_1": {"targets": [r"re:.*mlp"], "weights": {"num_bits": 8, "strategy": "group", "group_size": 32}}}
    own |= {"group_2": {"targets": ["model.layers.0.mlp.up_proj"], "weights": {"num_bits": 2, "symmetric": False, "group_size": 64}}}
    form = formats.open_format(PACK | {"config_groups": PACK["config_groups"] | own, "ignore": ["lm_head", "re:.*gate"]})
    assert form.scheme("model.layers.0.self_attn.q_proj") == formats.Scheme(4, -1, True)
    assert form.scheme("model.layers.1.mlp.up_proj") == formats.Scheme(8, 32, True)
    assert form.scheme("model.layers.0.mlp.up_proj") == formats.Scheme(2, 64, False)
    assert form.scheme("model.layers.0.mlp.gate_proj") is None
    assert form.scheme("lm_head") is None


def test_auto_rounds_settings():
    extra = {"model.layers.0.mlp.down_proj": {"bits": 8, "group_size": None}, r".*q_proj.*": {"bits": 16}}
    settings = {"quant_method": "auto-round", "bits": 2, "group_size": 32, "sym": False, "packing_format": "auto_round", "extra_config": extra}
    form = formats.open_format(settings)
    assert form.v2
    assert form.scheme("model.layers.0.mlp.down_proj") == formats.Scheme(8, 32, False)
    assert form.scheme("model.layers.1.self_attn.q_proj") is None
    assert form.scheme("model.layers.1.self_attn.k_proj") == formats.Scheme(2, 32, False)
    assert not formats.open_format(settings | {"packing_format": "auto_round:auto_gptq"}).v2
    with pytest.raises(ValueError, match="load: extra_config must have paths or regular expressions for keys"):
        formats.open_format(settings | {"extra_config": {"*": {"bits": 8}}}).scheme("x")


@pytest.mark.parametrize("name", formats.WRITTEN)
def test_what_is_described_is_what_is_read(name):
    layers = [f"model.layers.{i}.{leaf}" for i in range(12) for leaf in ("q", "up", "down", "router.gate")]
    plain = ["lm_head", *(path for path in layers if "router" in path or path.endswith("3.q"))]
    chosen = [path for path in layers if path not in plain]
    kinds = {True: formats.Scheme(4, -1, True), False: formats.Scheme(8, 32, False)}
    schemes = {path: kinds[not (path.endswith("down") or ".1.up" in path)] for path in chosen}
    form = formats.open_format(formats.describe(name, schemes, plain, head="lm_head"))
    assert {path: form.scheme(path) for path in layers} == {path: schemes.get(path) for path in layers}
    assert form.scheme("lm_head") is None


def test_patterns():
    paths = [f"layers.{i}.up" for i in range(12)]
    assert list(patterns(paths, ["layers.1.upper", "head"])) == [r"layers\.\d+\.up$"]
    some = list(patterns(paths[1:3], paths[3:] + paths[:1]))
    assert some == [r"layers\.1\.up$", r"layers\.2\.up$"]
    assert [path for path in paths if any(re.match(pattern, path) for pattern in some)] == paths[1:3]
