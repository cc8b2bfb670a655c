"""The projectors against the published numbers, naive float64 references, and their contract."""

import copy
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llava_projectors import ProjectorSpecError, build_projector, list_projectors
from llava_projectors.projectors.base import Projector, multi_level_layers
from llava_projectors.projectors.convolutions import LevelNorm
from llava_projectors.projectors.grid import region_mask
from llava_projectors.projectors.layers import head_count
from llava_projectors.projectors.tokenpacker import downsample_bilinear

GOLDEN = Path(__file__).parent / "data" / "tokenpacker.npz"
STRIDES = {"saep": "saep:stride={}", "tokenpacker": "tokenpacker:scale_factor={}"}
OURS = [pattern.format(s) for pattern in STRIDES.values() for s in (2, 3, 4)]
BASELINES = [
    "avg_pool",
    "pixel_shuffle:stride=3",
    "ldpv2",
    "stf:layers=4+7",
    "c_abstractor:stride=4",
    "delta",
]
ALL_TYPES = OURS + BASELINES
MANY_HEADS = " with 8 heads"
RESAMPLER = "resampler:num_queries=16"  # no stride, so it is named where a test does not ask for one
# The LLM's own linear layers, by the names LoRA looks for in Llama, Mistral and MPT.
LLM_LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "Wqkv")


def features_for(projector, side=12, batch=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    channels = projector.num_levels * projector.mm_hidden_size
    return torch.randn(batch, side * side, channels, generator=generator, dtype=torch.float64).to(dtype)


def published_weights():
    """The weights of the golden data (LLM width 512), by its recipe."""
    golden = np.load(GOLDEN)
    weights = {}
    for index, (name, shape) in enumerate(zip(golden["names"], golden["shapes"])):
        draw = np.random.RandomState(1000 + index).standard_normal(tuple(map(int, re.findall(r"\d+", str(shape)))))
        if name.startswith("ln_") and name.endswith("weight"):
            value = 1 + 0.1 * draw
        else:
            value = (0.1 if draw.ndim == 1 else 0.03) * draw
        weights[str(name)] = torch.from_numpy(value.astype(np.float32))
    return weights


@pytest.mark.parametrize("scale_factor", [2, 3, 4])
def test_tokenpacker_equals_published(scale_factor):
    equals_published(build_projector(f"tokenpacker:scale_factor={scale_factor}", 1024, 512), scale_factor)


def equals_published(projector, scale_factor):
    """Values and gradients of the published code, by the recipe of the golden data."""
    golden = np.load(GOLDEN)
    parameters = dict(projector.named_parameters())
    assert sorted(parameters) == list(golden["names"])
    projector.load_state_dict(published_weights())
    levels = torch.from_numpy(np.random.RandomState(7).standard_normal((4, 2, 576, 1024)).astype(np.float32))

    out = projector(torch.cat(list(levels), dim=-1))

    expected = torch.from_numpy(golden[f"s{scale_factor}_out"])
    assert relative_error(out[..., :64], expected) < 1e-5
    assert out.norm().item() == pytest.approx(golden[f"s{scale_factor}_out_norm"].item(), rel=1e-5)
    weight = torch.from_numpy(np.random.RandomState(8).standard_normal(tuple(out.shape)).astype(np.float32))
    (out * weight).sum().backward()
    for index, name in enumerate(golden["names"]):
        # In float64: a float32 norm over four million elements is itself off by 1e-4.
        gradient, norm = parameters[name].grad.double(), float(golden[f"s{scale_factor}_grad_norm"][index])
        if name == "ln_k_1.bias":  # shifts all scores of a region alike, which softmax ignores
            assert max(gradient.norm().item(), norm) < 1e-4
            continue
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-4)
        head = torch.from_numpy(golden[f"s{scale_factor}_grad_head"][index])
        assert relative_error(gradient.flatten()[:8], head) < 1e-4


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def naive_saep(p, x):
    """SAEP by loops over output patches and kernel positions; `p` is in float64."""
    weights = dict(p.named_parameters())
    batch, patches, _ = x.shape
    side, s = math.isqrt(patches), p.stride
    grid = x.double().view(batch, side, side, -1)

    def layer_norm(y, name):
        y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, keepdim=True, unbiased=False) + 1e-6)
        return y * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def convolve(value, name):
        """Depthwise 3x3, stride 1, with a border of zeros, as a sum of shifted products."""
        kernel = weights[f"{name}.weight"][:, 0]
        height = value.shape[1]
        padded = F.pad(value, (0, 0, 1, 1, 1, 1))
        total = weights[f"{name}.bias"]
        for i in range(3):
            for j in range(3):
                total = total + padded[:, i : i + height, j : j + height] * kernel[:, i, j]
        return total

    def blocks(value, name):
        for index in range(len(getattr(p, name))):
            at = f"{name}.{index}"
            y = convolve(layer_norm(value, f"{at}.norm"), f"{at}.depthwise.0")
            y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
            value = value + y @ weights[f"{at}.pointwise.weight"].T + weights[f"{at}.pointwise.bias"]
        return value

    if isinstance(p.levels, LevelNorm):
        normalised = [
            (block - block.mean(-1, keepdim=True)) / torch.sqrt(block.var(-1, keepdim=True, unbiased=False) + 1e-6)
            for block in grid.chunk(p.num_levels, -1)
        ]
        grid = torch.cat(normalised, -1)

    def aggregate(value):
        return value @ weights["aggregate.weight"].T + weights["aggregate.bias"]

    def reduce(value):
        kernel, bias = weights["depthwise.weight"][:, 0], weights["depthwise.bias"]
        k = kernel.shape[-1]
        before = (k - s + 1) // 2
        count = math.ceil(side / s)
        out = value.new_zeros(batch, count, count, value.shape[-1])
        for i in range(count):
            for j in range(count):
                total = bias.expand(batch, -1).clone()
                for di in range(k):
                    for dj in range(k):
                        row, column = i * s - before + di, j * s - before + dj
                        if 0 <= row < side and 0 <= column < side:
                            total = total + value[:, row, column] * kernel[:, di, dj]
                region = value[:, i * s : (i + 1) * s, j * s : (j + 1) * s]
                if p.shortcut == "average":
                    total = total + region.mean((1, 2))
                elif p.shortcut == "max":
                    total = total + region.flatten(1, 2).max(1).values
                out[:, i, j] = total
        return out

    pointwise_first = p.order == "pointwise_first"
    y = reduce(blocks(aggregate(grid), "before")) if pointwise_first else aggregate(reduce(grid))
    y = layer_norm(blocks(y, "after").flatten(1, 2), "norm")
    y = y @ weights["readout.0.weight"].T + weights["readout.0.bias"]
    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    return y @ weights["readout.2.weight"].T + weights["readout.2.bias"]


def naive_tokenpacker(p, x):
    """TokenPacker by loops over queries and heads, each over its own region; `p` is in float64."""
    w = dict(p.named_parameters())
    batch, patches, _ = x.shape
    side, s, channels, heads = math.isqrt(patches), p.stride, p.mm_hidden_size, p.clip_attn.num_heads

    def layer_norm(value, name):
        centred = value - value.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def stack(value, name):
        value = F.gelu(value @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"])
        return value @ w[f"{name}.2.weight"].T + w[f"{name}.2.bias"]

    x = x.double()
    count = math.ceil(side / s)
    image = x[..., -channels:].transpose(1, 2).reshape(batch, channels, side, side)
    image = F.pad(image, (0, count * s - side, 0, count * s - side), mode="replicate")
    coarse = F.interpolate(image, size=(count, count), mode="bilinear").flatten(2).transpose(1, 2)
    in_weight, in_bias = w["clip_attn.in_proj_weight"].chunk(3), w["clip_attn.in_proj_bias"].chunk(3)
    q = layer_norm(coarse @ w["q_proj_1.weight"].T, "ln_q_1") @ in_weight[0].T + in_bias[0]
    k = layer_norm(stack(x, "k_proj_1"), "ln_k_1") @ in_weight[1].T + in_bias[1]
    v = layer_norm(stack(x, "v_proj_1"), "ln_v_1") @ in_weight[2].T + in_bias[2]
    out = torch.zeros_like(q)
    width = q.shape[-1] // heads
    for i in range(count):
        for j in range(count):
            rows, columns = (range(k * s, min(k * s + s, side)) for k in (i, j))
            region = [row * side + column for row in rows for column in columns]
            query = i * count + j
            for h in range(heads):
                head = slice(h * width, (h + 1) * width)
                scores = (k[:, region, head] * q[:, query, None, head]).sum(-1) / math.sqrt(width)
                out[:, query, head] = (scores.softmax(-1)[..., None] * v[:, region, head]).sum(1)
    out = out @ w["clip_attn.out_proj.weight"].T + w["clip_attn.out_proj.bias"]
    return stack(out, "mlp")


NAIVE = {"saep": naive_saep, "tokenpacker": naive_tokenpacker}
PLAIN_SAEP = "saep:blocks_after=0,blocks_before=0,level_norm=none,shortcut=average"  # the separable convolution alone
SAEP_VARIANTS = [
    PLAIN_SAEP,
    "saep:order=depthwise_first,blocks_after=0,shortcut=average",
    "saep:blocks_after=0,shortcut=none",
    "saep:blocks_after=0,blocks_before=0",
    "saep:stride=3,order=depthwise_first,blocks_after=1",
    "saep:stride=3,kernel_size=4,inner_size=24,layers=3+5+7,blocks_after=0",
    "saep:kernel_size=2,order=depthwise_first,shortcut=none,blocks_after=0",
]
SAEP_OPTIONS = [
    "saep:blocks_before=0,blocks_after=2,shortcut=average",
    "saep:blocks_before=2,blocks_after=0,stride=3",
    "saep:order=depthwise_first,blocks_after=1,level_norm=none",
    "saep:readout_size=24,inner_size=20,blocks_after=0",
]


def build_small(type_string):
    """A narrow projector, or with MANY_HEADS one with as many heads as TokenPacker has on CLIP-L."""
    projector = build_projector(type_string.removesuffix(MANY_HEADS), 32, 40)
    if type_string.endswith(MANY_HEADS):
        projector.clip_attn.num_heads = 8
    return projector


@pytest.mark.parametrize("type_string", [*OURS, *SAEP_VARIANTS, *SAEP_OPTIONS, "tokenpacker" + MANY_HEADS])
@pytest.mark.parametrize("side", [12, 13, 11], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_values_and_gradients_equal_naive_reference(type_string, side, dtype, tolerance):
    """Also on grids that no stride divides, where the border regions hold fewer patches."""
    torch.manual_seed(0)
    projector = randomise(build_small(type_string)).to(dtype)
    reference = copy.deepcopy(projector).double()
    x = features_for(projector, side=side, dtype=dtype).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    naive = NAIVE[projector.name]

    out, expected = projector(x), naive(reference, x64)
    assert out.dtype == dtype
    assert relative_error(out, expected) < tolerance
    weight = torch.randn(out.shape, dtype=torch.float64)
    (out * weight.to(dtype)).sum().backward()
    (expected * weight).sum().backward()
    # In bfloat16, another patch of a region may be the largest: what they say is the same, the gradient is elsewhere.
    of_gradients = 0.2 if dtype == torch.bfloat16 and getattr(projector, "shortcut", None) == "max" else tolerance * 2
    assert relative_error(x.grad, x64.grad) < of_gradients
    parameters, references = dict(projector.named_parameters()), dict(reference.named_parameters())
    parameters.pop("ln_k_1.bias", None)  # no gradient: softmax ignores what shifts all scores of a region alike
    if dtype == torch.float32:
        for name, parameter in parameters.items():
            assert relative_error(parameter.grad, references[name].grad) < tolerance * 2, name
    # In bfloat16, gradients that nearly cancel (a bias before LayerNorm and softmax) drown in rounding by themselves.
    together = [torch.cat([p[name].grad.double().flatten() for name in parameters]) for p in (parameters, references)]
    assert relative_error(*together) < of_gradients


def randomise(projector):
    """Weights large enough that no term of the mathematics vanishes, biases and norms included."""
    for parameter in projector.parameters():
        parameter.data.normal_(0, 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return projector


@pytest.mark.parametrize(
    "type_string",
    ["saep", "saep:order=depthwise_first,stride=3", SAEP_OPTIONS[1], "tokenpacker", *BASELINES, RESAMPLER],
)
def test_gradcheck(type_string):
    torch.manual_seed(0)
    projector = randomise(build_projector(type_string, 4, 3)).double()
    x = features_for(projector, side=6, batch=1, dtype=torch.float64).requires_grad_()
    names, values = zip(*projector.named_parameters())

    def function(x, *values):
        return torch.func.functional_call(projector, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(function, (x, *values), fast_mode=True)


@pytest.mark.parametrize("type_string", ALL_TYPES)
@pytest.mark.parametrize(("side", "mm_hidden_size", "hidden_size"), [(12, 33, 7), (24, 200, 11), (36, 48, 5)])
def test_any_size(type_string, side, mm_hidden_size, hidden_size):
    projector = build_projector(type_string, mm_hidden_size, hidden_size)
    out = projector(features_for(projector, side=side, batch=3))
    assert out.shape == (3, (side // projector.stride) ** 2, hidden_size)
    assert out.isfinite().all()


@pytest.mark.parametrize("type_string", [*ALL_TYPES, *SAEP_OPTIONS, RESAMPLER])
def test_non_contiguous_and_empty_input(type_string):
    projector = build_projector(type_string, 16, 8)
    x = features_for(projector)
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    every_second = torch.stack([x, -x], dim=-1).flatten(-2)[..., ::2]
    for view in (transposed, every_second):
        assert not view.is_contiguous()
        torch.testing.assert_close(projector(view), projector(x))
    empty = projector(x[:0])
    assert empty.shape[0] == 0
    empty.sum().backward()


@pytest.mark.parametrize("type_string", ALL_TYPES)
def test_a_token_sees_its_own_region_only_as_far_as_documented(type_string):
    """One changed patch changes the token above it, and for TokenPacker no other."""
    projector = build_projector(type_string, 16, 8)
    x = features_for(projector, batch=1)
    changed = x.clone()
    row, column, s = 7, 4, projector.stride
    changed[0, row * 12 + column] = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(1))
    difference = (projector(changed) - projector(x)).abs().amax(-1).view(12 // s, 12 // s)
    touched = {tuple(index) for index in difference.gt(1e-7).nonzero().tolist()}
    assert (row // s, column // s) in touched
    if projector.name in ("tokenpacker", "avg_pool", "pixel_shuffle", "stf"):
        assert len(touched) == 1


@pytest.mark.parametrize("type_string", [*ALL_TYPES, *SAEP_OPTIONS, RESAMPLER])
def test_no_buffers_and_lora_safe_names(type_string):
    projector = build_projector(type_string, 16, 8)
    assert list(projector.named_buffers()) == []
    for name, _ in projector.named_modules():
        assert not name.endswith(LLM_LINEAR_NAMES), name


@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_downsampling_is_bilinear_interpolation(stride, dtype):
    grid = torch.randn(2, 24, 24, 5).to(dtype)
    expected = F.interpolate(grid.permute(0, 3, 1, 2).float(), scale_factor=1 / stride, mode="bilinear")
    actual = downsample_bilinear(grid, stride)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected.permute(0, 2, 3, 1).to(dtype))


@pytest.mark.parametrize("type_string", [*ALL_TYPES, *SAEP_OPTIONS, RESAMPLER, "tokenpacker" + MANY_HEADS])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16])
def test_autocast(type_string, parameter_dtype):
    """LLaVA's bf16 runs without DeepSpeed use autocast, over weights of either dtype."""
    torch.manual_seed(0)
    projector = build_small(type_string).to(parameter_dtype)
    x = features_for(projector)
    with torch.autocast("cpu", torch.bfloat16):
        out = projector(x)
    out.float().sum().backward()
    assert relative_error(out, projector.float()(x)) < 3e-2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in projector.parameters())


@pytest.mark.parametrize("type_string", [*ALL_TYPES, "saep:blocks_before=1,blocks_after=1"])
def test_training_converges(type_string):
    """A projector learns a function of what its regions hold."""
    torch.manual_seed(0)
    projector = randomise(build_projector(type_string, 16, 8))
    x = features_for(projector, batch=8)
    s = projector.stride
    regions = x[..., -8:].view(8, 12 // s, s, 12 // s, s, 8).mean((2, 4)).flatten(1, 2)
    target = regions / regions.std()
    optimizer = torch.optim.Adam(projector.parameters(), 1e-2)
    values = []
    for _ in range(200):
        loss = F.mse_loss(projector(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0] / 4


@pytest.mark.parametrize(("type_string", "levels"), [("saep", 2), ("tokenpacker", 4)])
def test_bad_features_are_explained(type_string, levels):
    projector = build_projector(type_string, 16, 8)
    expected = rf"expects features \[batch, patches, {levels * 16}\], {levels} hidden states of 16 channels"
    # Other channels; and the right ones, last of two and of four dimensions.
    for shape in ((1, 144, 16), (4, levels * 16), (1, 4, 9, levels * 16)):
        with pytest.raises(ValueError, match=f"{expected}; got {re.escape(str(list(shape)))}"):
            projector(torch.zeros(shape))
    with pytest.raises(ValueError, match="without the CLS token.*got 577 patches"):
        projector(torch.zeros(1, 577, levels * 16))


@pytest.mark.parametrize("type_string", [*OURS, *BASELINES[:-2]])  # the last two look at the whole picture
def test_padding_changes_nothing_where_there_are_patches(type_string):
    """The tokens of whole regions are the same whether or not the grid goes on with a partial region."""
    projector = build_projector(type_string, 16, 8)
    s, whole = projector.stride, 24
    large = features_for(projector, side=whole + 1, batch=1)
    small = large.view(1, 25, 25, -1)[:, :24, :24].flatten(1, 2)
    tokens = projector(large).unflatten(1, (whole // s + 1, -1))
    expected = projector(small).unflatten(1, (whole // s, -1))
    # A kernel that reaches over its region sees the next patch, so its last row and column may differ; and each block
    # behind the stride carries that a token further.
    inner = whole // s - (1 if projector.name in ("saep", "ldpv2") else 0) - len(getattr(projector, "after", ()))
    assert inner > 0
    torch.testing.assert_close(tokens[:, :inner, :inner], expected[:, :inner, :inner])


def test_siglips_grid():
    for type_string, tokens in (("saep", 196), ("tokenpacker", 196), ("saep:stride=3", 81)):
        projector = build_projector(type_string, 16, 8)
        assert projector(features_for(projector, side=27)).shape[1] == tokens
        assert projector.output_side(27, {projector.stride_option: projector.stride}) ** 2 == tokens


def test_default_layers_of_clip_large_are_the_published():
    assert multi_level_layers(23) == (12, 16, 22, 23)


def test_a_mask_is_made_only_where_patches_are_missing():
    assert region_mask(torch.zeros(1, 12, 12, 1), 3) is None
    mask = region_mask(torch.zeros(1, 5, 5, 1), 3)
    assert mask.shape == (1, 2, 3, 2, 3, 1)
    assert mask.sum() == 25


def test_heads_divide_the_width():
    assert [head_count(width) for width in (64, 256, 400, 1000, 1024)] == [1, 2, 2, 5, 8]


def test_a_type_without_a_stride_gives_a_token_a_patch():
    assert Projector.output_side(5, {}) == 5


def test_layers_option_sets_the_input_width():
    assert build_projector("saep:layers=3+7+11", 10, 8).aggregate.in_features == 30


def test_no_layer_outweighs_another_where_each_is_normalised():
    """One layer a hundred times as large, as the last ones of a tower are; without the option, that changes all."""
    projectors = {norm: build_projector(f"saep:layers=3+7,level_norm={norm}", 16, 8) for norm in ("layer", "none")}
    features = features_for(projectors["layer"])
    louder = torch.cat([features[..., :16], 100 * features[..., 16:]], dim=-1)
    errors = {norm: relative_error(projector(louder), projector(features)) for norm, projector in projectors.items()}
    assert errors["layer"] < 1e-4 < 0.1 < errors["none"]
    assert projectors["layer"].state_dict().keys() == projectors["none"].state_dict().keys()


def test_bad_sizes_are_explained():
    with pytest.raises(ProjectorSpecError, match="'saep:stride=4,kernel_size=3'.*kernel_size=3 leaves patches out"):
        build_projector("saep:stride=4,kernel_size=3")
    with pytest.raises(ProjectorSpecError, match="inner_size=0 must be at least 1"):
        build_projector("saep:inner_size=0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("readout_size=0", "readout_size=0 must be at least 1"),
        ("blocks_before=-1", "blocks_before=-1 must be 0 or more"),
        ("blocks_after=-2", "blocks_after=-2 must be 0 or more"),
        ("blocks_before=2,order=depthwise_first", "blocks_before=2 needs order=pointwise_first; or pass blocks_after"),
        ("level_norm=batch", "bad value 'batch' for option 'level_norm'.*valid values are none, layer"),
    ],
)
def test_bad_options_of_saep_are_explained(options, message):
    with pytest.raises(ProjectorSpecError, match=message) as caught:
        build_projector(f"saep:{options}")
    assert f"'saep:{options}'" in str(caught.value)


def test_plain_saep_is_what_it_was():
    """Names, order of the random numbers, and so the very weights that a seed gives."""
    torch.manual_seed(0)
    projector = build_projector(f"{PLAIN_SAEP},layers=12+16+22+23", 16, 8)
    torch.manual_seed(0)
    layers = [
        nn.Linear(64, 16),
        nn.Conv2d(16, 16, 5, stride=2, padding=2, groups=16),
        nn.LayerNorm(16),
        nn.Linear(16, 8),
        nn.Linear(8, 8),
    ]
    names = ["aggregate", "depthwise", "norm", "readout.0", "readout.2"]
    expected = {f"{n}.{key}": value for n, layer in zip(names, layers) for key, value in layer.state_dict().items()}
    state = projector.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_saeps_default_has_the_parts_that_its_docstring_names():
    spelt_out = "saep:blocks_before=1,blocks_after=4,kernel_size=5,layers=12+23,level_norm=layer,shortcut=max"
    default = build_projector("saep", 16, 8)
    assert repr(default) == repr(build_projector(spelt_out, 16, 8))
    assert default.default_layers(23) == (12, 23)
    assert (default.blocks_before, len(default.before), len(default.after)) == (1, 1, 4)
    first_depthwise = build_projector("saep:order=depthwise_first", 16, 8)
    assert (first_depthwise.blocks_before, len(first_depthwise.before), len(first_depthwise.after)) == (0, 0, 4)


def test_tokenpackers_head_size():
    """Eight heads of 4 channels are what the option gives, against the reference with that many heads."""
    torch.manual_seed(0)
    assert build_projector("tokenpacker", 1024, 8).clip_attn.num_heads == 8
    projector = randomise(build_projector("tokenpacker:head_size=4", 32, 40))
    assert projector.clip_attn.num_heads == 8
    x = features_for(projector)
    assert relative_error(projector(x), naive_tokenpacker(copy.deepcopy(projector).double(), x)) < 1e-5
    with pytest.raises(ProjectorSpecError, match="'tokenpacker:head_size=0'.*head_size=0 must be at least 1"):
        build_projector("tokenpacker:head_size=0")
    with pytest.raises(ProjectorSpecError, match="bad value 'scale' for option 'init'.*did you mean 'scaled'"):
        build_projector("tokenpacker:init=scale")


@pytest.mark.parametrize(("init", "std"), [("published", 0.02), ("scaled", 0.04)])
def test_tokenpackers_initial_weights(init, std):
    """At a quarter of the published width; at that width both are the same numbers."""
    torch.manual_seed(0)
    projector = build_projector(f"tokenpacker:init={init}", 256, 128)
    for layer in (projector.q_proj_1, projector.k_proj_1[0], projector.mlp[2], projector.clip_attn.out_proj):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
    torch.manual_seed(0)
    wide = build_projector(f"tokenpacker:init={init},layers=23", 1024, 8)
    torch.manual_seed(0)
    published = build_projector("tokenpacker:layers=23", 1024, 8)
    assert all(torch.equal(value, wide.state_dict()[name]) for name, value in published.state_dict().items())


@pytest.mark.parametrize("name", [*ALL_TYPES, RESAMPLER])
def test_linear_layers_are_found_by_place(name):
    """Forks read the dtype of `mm_projector[0].weight` and set the bias of `mm_projector[-1]`, as of LLaVA's own."""
    projector = build_projector(name, mm_hidden_size=64, hidden_size=96).to(torch.bfloat16)
    assert projector[0].weight.dtype == torch.bfloat16
    assert projector[-1].bias.shape == (96,)
    with pytest.raises(IndexError):
        projector[1000]


@pytest.mark.parametrize("name", list_projectors())
def test_a_compiled_projector_takes_another_grid(name):
    """The compiler holds the number of patches as a symbol from the second grid on."""
    projector = build_projector(name, 32, 16)
    run = torch.compile(projector, fullgraph=True, backend="eager")
    for side in (12, 8, 5):
        features = torch.randn(1, side**2, 32 * projector.num_levels)
        torch.testing.assert_close(run(features), projector(features))
