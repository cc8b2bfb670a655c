"""The projectors that ours are compared with: float64 references, and what sets each apart."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_projectors import features_for, randomise, relative_error

from llava_projectors import ProjectorSpecError, build_projector
from llava_projectors.projectors.delta import head_size
from llava_projectors.projectors.layers import sine_positions
from llava_projectors.tiny import train


def linear(w, name, x):
    bias = w.get(f"{name}.bias")
    return x @ w[f"{name}.weight"].T + (0 if bias is None else bias)


def gelu(x):
    return x * torch.special.ndtr(x)


def positions(side, channels):
    """Sines and cosines of the row, then of the column, number by number: [side*side, channels], float64."""
    quarter = math.ceil(channels / 4)
    found = torch.zeros(side * side, 4 * quarter, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            for k in range(quarter):
                frequency = 2 * math.pi * 64 ** (k / max(1, channels // 4))
                for half, place in enumerate((row, column)):
                    angle = frequency * (place + 0.5) / side
                    found[row * side + column, 2 * half * quarter + k] = math.sin(angle)
                    found[row * side + column, (2 * half + 1) * quarter + k] = math.cos(angle)
    return found[:, :channels]


@pytest.mark.parametrize(("side", "channels"), [(1, 4), (3, 8), (5, 10), (4, 3)])
def test_sine_positions(side, channels):
    for dtype in (torch.float32, torch.bfloat16):
        found = sine_positions(side, torch.zeros(2, channels, dtype=dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), positions(side, channels).to(dtype).float(), atol=1e-2, rtol=0)
        if dtype == torch.float32:
            torch.testing.assert_close(found.double(), positions(side, channels), atol=2e-5, rtol=0)


def mlp(w, name, x):
    return linear(w, f"{name}.2", gelu(linear(w, f"{name}.0", x)))


def norm(w, name, x, eps=1e-6):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def pool(x, s):
    """[B, H, W, C], region by region over the patches that are there."""
    count = math.ceil(x.shape[1] / s)
    rows = [
        [x[:, i * s : i * s + s, j * s : j * s + s].flatten(1, 2).mean(1) for j in range(count)] for i in range(count)
    ]
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def depthwise(w, name, x):
    """A 3x3 convolution with a border of zeros, as nine shifted products."""
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    kernel = w[f"{name}.weight"][:, 0]
    shifted = [padded[:, i : i + height, j : j + width] * kernel[:, i, j] for i in range(3) for j in range(3)]
    return sum(shifted) + w[f"{name}.bias"]


def avg_pool(p, w, x):
    return mlp(w, "mlp", pool(x, p.stride)).flatten(1, 2)


def pixel_shuffle(p, w, x):
    s, side = p.stride, x.shape[1]
    count = math.ceil(side / s)
    tokens = []
    for i in range(count):
        for j in range(count):
            places = [(i * s + di, j * s + dj) for di in range(s) for dj in range(s)]
            zero = torch.zeros_like(x[:, 0, 0])
            tokens.append(torch.cat([x[:, r, c] if r < side and c < side else zero for r, c in places], -1))
    return mlp(w, "mlp", norm(w, "norm", torch.stack(tokens, 1), 1e-5))


def ldpv2(p, w, x):
    x = pool(mlp(w, "mlp", x), p.stride)
    return (x + depthwise(w, "position", x)).flatten(1, 2)


def c_abstractor(p, w, x):
    def blocks(name, x):
        for i in range(len(getattr(p, name))):
            at = f"{name}.{i}"
            y = linear(w, f"{at}.expand", norm(w, f"{at}.norm", x))
            y = depthwise(w, f"{at}.depthwise", y * y.sigmoid())
            y = y * y.sigmoid()
            squeezed = linear(w, f"{at}.squeeze", y.flatten(1, 2).mean(1))
            gate = linear(w, f"{at}.excite", squeezed * squeezed.sigmoid()).sigmoid()
            x = x + linear(w, f"{at}.contract", y * gate[:, None, None])
        return x

    x = blocks("after", pool(blocks("before", linear(w, "embed", x)), p.stride))
    return mlp(w, "readout", x.flatten(1, 2))


def resampler(p, w, x):
    patches = norm(w, "norm_patches", linear(w, "embed", x.flatten(1, 2)))
    queries = norm(w, "norm_queries", w["queries"]) + positions(p.query_side, w["queries"].shape[-1])
    names = ("to_query", "to_key", "to_value")
    out, _ = F.multi_head_attention_forward(
        queries[:, None].expand(-1, len(x), -1),
        (patches + positions(x.shape[1], patches.shape[-1])).transpose(0, 1),
        patches.transpose(0, 1),
        p.hidden_size, p.num_heads, None, torch.cat([w[f"{n}.bias"] for n in names]), None, None, False, 0.0,
        w["merge.weight"], w["merge.bias"], use_separate_proj_weight=True,
        q_proj_weight=w["to_query.weight"], k_proj_weight=w["to_key.weight"], v_proj_weight=w["to_value.weight"],
    )  # fmt: skip
    return linear(w, "readout", norm(w, "norm", out.transpose(0, 1)))


def regions_of(side, s):
    """The places of each region's patches, cut off at the border."""
    count = math.ceil(side / s)
    corners = [(i * s, j * s) for i in range(count) for j in range(count)]
    return [
        [(r, c) for r in range(top, min(top + s, side)) for c in range(left, min(left + s, side))]
        for top, left in corners
    ]


def stf(p, w, x):
    s, side = p.stride, x.shape[1]
    joined = F.pad(mlp(w, "join", x), (0, 0, 0, -side % s, 0, -side % s))
    tokens = [torch.cat([joined[:, r, c] for r, c in places], -1) for places in regions_of(side + -side % s, s)]
    return mlp(w, "fuse", torch.stack(tokens, 1))


def delta(p, w, x):
    """Keys and values are projected patch by patch, and each region's attention is its own softmax."""
    s, side, width = p.stride, x.shape[1], p.mm_hidden_size

    def project(name, x):
        low_rank = w[f"{name}.widen.weight"] @ w[f"{name}.narrow.weight"]
        return norm(w, f"{name}.norm", gelu(x @ (w[f"{name}.shared.weight"] + low_rank).T))

    def attention(q, k, v):
        """[B, n, d] each."""
        return (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v

    def block(x):
        """[B, h, w, C]"""
        y = linear(w, "refine.enter", x)
        q, k, v = linear(w, "refine.query_key_value", norm(w, "refine.norm", y, 1e-5)).flatten(1, 2).chunk(3, -1)
        size = p.refine.head_size
        heads = [attention(*(t[..., at : at + size] for t in (q, k, v))) for at in range(0, q.shape[-1], size)]
        y = y + linear(w, "refine.merge", torch.cat(heads, -1)).view(y.shape)
        local = linear(w, "refine.branch", y)
        kernel = w["refine.convolve.weight"]
        padded = F.pad(local, (0, 0, 1, 1, 1, 1))
        height, columns = x.shape[1:3]
        convolved = []
        for at in range(0, local.shape[-1], size):  # groups as wide as heads
            shifted = [
                padded[:, i : i + height, j : j + columns, at : at + size] @ kernel[at : at + size, :, i, j].T
                for i in range(3)
                for j in range(3)
            ]
            convolved.append(sum(shifted))
        convolved = norm(w, "refine.norm_convolved", torch.cat(convolved, -1), 1e-5)
        local = local + linear(w, "refine.mix", convolved.clamp(min=0))
        z = torch.cat([y, local], -1)
        return z + linear(w, "refine.contract", linear(w, "refine.expand", z).clamp(min=0))

    image = F.pad(x[..., -width:].permute(0, 3, 1, 2), (0, -side % s, 0, -side % s), mode="replicate")
    count = math.ceil(side / s)
    coarse = block(F.interpolate(image, size=(count, count), mode="bilinear").permute(0, 2, 3, 1)).flatten(1, 2)
    query = project("to_query", coarse + positions(count, coarse.shape[-1]))
    key, value = project("to_key", x), project("to_value", x)
    in_weight, in_bias = w["attend.in_proj_weight"].chunk(3), w["attend.in_proj_bias"].chunk(3)
    tokens = []
    for index, places in enumerate(regions_of(side, s)):
        own = [torch.stack([t[:, r, c] for r, c in places], 1) for t in (key, value)]
        q, k, v = (t @ m.T + b for t, m, b in zip((query[:, index, None], *own), in_weight, in_bias))
        size = width // p.attend.num_heads
        heads = [attention(*(t[..., at : at + size] for t in (q, k, v))) for at in range(0, width, size)]
        tokens.append(linear(w, "attend.out_proj", torch.cat(heads, -1)))
    return mlp(w, "mlp", torch.cat(tokens, 1))


REFERENCES = (avg_pool, pixel_shuffle, ldpv2, c_abstractor, resampler, stf, delta)
BASELINES = [
    *(f"{name}:stride={s}" for name in ("avg_pool", "pixel_shuffle", "ldpv2", "c_abstractor") for s in (2, 3, 4)),
    "resampler:num_queries=16",
    "avg_pool:layers=3+7",
    "c_abstractor:depth=1,layers=2+5+7",
    "stf",
    "stf:stride=3,layers=3+7,inner_size=24",
    "stf:stride=4,layers=7",
    "delta",
    "delta:scale_factor=3,layers=3+7,rank=2",
    "delta:scale_factor=4,layers=7",
]


@pytest.mark.parametrize("type_string", BASELINES)
@pytest.mark.parametrize("side", [12, 11], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_values_and_gradients_equal_naive_reference(type_string, side, dtype, tolerance):
    torch.manual_seed(0)
    projector = randomise(build_projector(type_string, 16, 20)).to(dtype)
    twin = copy.deepcopy(projector).double()
    weights = dict(twin.named_parameters())
    x = features_for(projector, side=side, dtype=dtype).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    reference = next(function for function in REFERENCES if function.__name__ == projector.name)

    out, expected = projector(x), reference(twin, weights, x64.unflatten(1, (side, side)))
    assert out.shape == expected.shape
    assert relative_error(out, expected) < tolerance
    loss_weight = torch.randn(out.shape, dtype=torch.float64)
    (out * loss_weight.to(dtype)).sum().backward()
    (expected * loss_weight).sum().backward()
    assert relative_error(x.grad, x64.grad) < tolerance * 3
    # These shift all scores of a query alike: no gradient.
    names = [name for name in weights if name not in ("to_key.bias", "to_key.norm.bias")]
    ours = torch.cat([projector.get_parameter(name).grad.double().flatten() for name in names])
    assert relative_error(ours, torch.cat([weights[name].grad.flatten() for name in names])) < tolerance * 3


def test_the_resamplers_queries_start_small():
    torch.manual_seed(0)
    assert build_projector("resampler", 32, 512).queries.std().item() == pytest.approx(0.02, rel=0.02)
    assert build_projector("resampler:num_queries=1", 32, 16)(torch.zeros(2, 9, 32)).shape == (2, 1, 16)


def test_the_resamplers_queries_know_where_they_are():
    """Positions of queries and patches agree: a query's is nearest to those of the patches under it."""
    like = torch.zeros(1, 64)
    queries, patches = sine_positions(4, like), sine_positions(12, like)
    nearest = torch.cdist(queries, patches).argmin(-1)
    assert nearest.tolist() == [(3 * i + 1) * 12 + 3 * j + 1 for i in range(4) for j in range(4)]


def test_the_sizes_of_the_peers_are_the_published_at_clip_larges_width():
    with torch.device("meta"):
        peers = build_projector("stf"), build_projector("delta")
    stf, delta = ({name: tuple(p.shape) for name, p in peer.named_parameters()} for peer in peers)
    assert (stf["join.0.weight"], stf["join.2.weight"]) == ((4096, 8192), (1024, 4096))
    assert (stf["fuse.0.weight"], stf["fuse.2.weight"]) == ((16384, 4096), (4096, 16384))
    assert delta["refine.enter.weight"] == (768, 1024)
    assert delta["refine.convolve.weight"] == (256, 32, 3, 3)
    assert delta["refine.expand.weight"] == (2048, 1024)
    assert (delta["to_key.shared.weight"], delta["to_key.narrow.weight"]) == ((1024, 4096), (16, 4096))
    assert (peers[1].attend.num_heads, peers[1].refine.head_size) == (8, 32)


def test_heads_divide_any_width():
    for channels in range(2, 300):
        assert channels % head_size(channels) == 0
        assert 0 < 3 * (channels // head_size(channels)) // 4 < channels // head_size(channels)


def test_low_rank_projection_starts_as_published():
    torch.manual_seed(0)
    projection = build_projector("delta", 256, 64).to_key
    assert projection.shared.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for layer in (projection.narrow, projection.widen):  # Xavier
        assert layer.weight.abs().max().item() == pytest.approx((6 / sum(layer.weight.shape)) ** 0.5, rel=0.01)


@pytest.mark.parametrize(
    ("type_string", "message"),
    [
        ("resampler:num_queries=100000000001", "num_queries=100000000001 must be a square"),
        ("resampler:num_queries=0", "num_queries=0 must be a square number, such as 64 or 144"),
        ("c_abstractor:depth=0", "depth=0 must be at least 1"),
        ("avg_pool:stride=5", "bad value '5'"),
        ("stf:inner_size=0", "inner_size=0 must be at least 1"),
        ("stf:scale_factor=3", "unknown option 'scale_factor'.*did you mean 'stride'"),
        ("delta:rank=0", "rank=0 must be at least 1"),
        ("delta:stride=3", "unknown option 'stride'.*did you mean 'scale_factor'"),
    ],
)
def test_bad_options_are_explained(type_string, message):
    with pytest.raises(ProjectorSpecError, match=message):
        build_projector(type_string)


@pytest.mark.parametrize(
    ("type_string", "tokens"),
    [
        ("avg_pool", 36),
        ("pixel_shuffle", 36),
        ("ldpv2", 36),
        ("c_abstractor", 36),
        ("resampler:num_queries=64", 64),
        ("stf:layers=1+4+7", 36),
        ("delta", 36),
    ],
)
def test_through_llavas_own_scripts(tiny, can_train, type_string, tokens):
    """Both stages in a subprocess, then LLaVA's own loader: the very weights, and the tokens the type promises."""
    from llava.model.builder import load_pretrained_model

    name = type_string.partition(":")[0]
    adapter, output = tiny.pretrain(f"{name}-pretrain", type_string)
    assert f"{type_string}: 144 -> {tokens} visual tokens per image" in output
    checkpoint, _ = tiny.finetune(name, type_string, adapter / "mm_projector.bin")
    for folder in (adapter, checkpoint):
        assert all(0 < value < 20 for value in train.losses(folder))
    _, model, _, _ = load_pretrained_model(str(checkpoint), None, "llava", device="cpu", device_map="cpu")
    projector = model.get_model().mm_projector.state_dict()
    saved = load_file(checkpoint / "model.safetensors")
    assert len(projector) == sum("mm_projector" in key for key in saved)
    assert all(torch.equal(value, saved[f"model.mm_projector.{key}"].half()) for key, value in projector.items())
    assert model.get_vision_tower().num_patches == tokens
