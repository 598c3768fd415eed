import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from embedding.vit import View, ViT, resize_positions, rope_tables, rotate
from embedding.vit_config import ViTConfig

SMALL = {"width": 32, "depth": 2, "heads": 2, "patch_size": 4, "layer_scale": 0.5}
V2 = {"n_registers": 0, "position": "learned", "key_bias": True, "patch_size": 14, "image_size": 518, "norm_eps": 1e-6}
V1 = V2 | {"patch_size": 16, "image_size": 224, "layer_scale": None}
S, B, L = ({"width": w, "depth": d, "heads": h} for w, d, h in ((384, 12, 6), (768, 12, 12), (1024, 24, 16)))
G = {"width": 1536, "depth": 40, "heads": 24, "ffn": "swiglu"}
SIX = {"ffn": "swiglu", "mlp_ratio": 6.0}
HUGE = {"width": 1280, "depth": 32, "heads": 20}
SO400M = {"width": 1152, "depth": 27, "heads": 18, "mlp_ratio": 3.7778}
SEVEN_B = {"width": 4096, "depth": 40, "heads": 32, "ffn": "swiglu", "mlp_ratio": 3.0, "swiglu_align": 64}


def small(**options):
    vit = ViT(ViTConfig(**{**SMALL, **options}), seed=1).eval()
    with torch.no_grad():  # what starts at 0 could hide a wrong place
        for name, p in vit.named_parameters():
            if name.endswith("bias") or name == "mask_token":
                p.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return vit


def pictures(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


VARIANTS = [
    {},
    {"n_registers": 0, "ffn": "swiglu"},
    {"qkv_bias": False, "layer_scale": None},
    {"position": "learned", "image_size": 16, "key_bias": True},
    {"position": "learned", "image_size": 16, "n_registers": 0},
]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (S | V2, 22_056_576),
        (S | V2 | {"n_registers": 4}, 22_058_112),
        (S | V2 | {"image_size": 224}, 21_629_184),
        (S | V2 | {"image_size": 224, "patch_size": 16}, 21_675_264),
        (S | V2 | {"image_size": 224, "ffn": "swiglu"}, 21_635_328),
        (B | V2, 86_580_480),
        (B | V2 | {"n_registers": 4}, 86_583_552),
        (B | V2 | {"image_size": 224}, 85_725_696),
        (B | V2 | {"image_size": 224, "patch_size": 16}, 85_817_856),
        (B | V2 | {"image_size": 224, "ffn": "swiglu"}, 85_737_984),
        (L | V2, 304_368_640),
        (L | V2 | {"n_registers": 4}, 304_372_736),
        (L | V2 | {"image_size": 224}, 303_228_928),
        (L | V2 | {"image_size": 224, "patch_size": 16}, 303_351_808),
        (L | V2 | {"image_size": 224, "ffn": "swiglu"}, 303_655_168),
        (G | V2, 1_136_480_768),
        (G | V2 | {"n_registers": 4}, 1_136_486_912),
        (G | V2 | {"image_size": 224}, 1_134_771_200),
        (S | V1, 21_665_664 + 384),  # DINO has no mask token
        (B | V1, 85_798_656 + 768),
        (S, 21_596_544),
        (S | SIX, 28_692_864),
        (B, 85_660_416),
        (L, 303_129_600),
        (L | SIX, 403_891_200),
        (HUGE | SIX, 840_592_640),
        (SEVEN_B | {"qkv_bias": False}, 6_716_035_072),
        (S | {"key_bias": True}, 21_601_152),
        (S | SIX | {"key_bias": True}, 28_697_472),
        (B | {"key_bias": True}, 85_669_632),
        (L | {"key_bias": True}, 303_154_176),
        (L | SIX | {"key_bias": True}, 403_915_776),
        (HUGE | SIX | {"key_bias": True}, 840_633_600),
        (L | {"key_bias": True, "n_registers": 0}, 303_150_080),
        (HUGE | {"key_bias": True, "n_registers": 0}, 630_749_440),
        (SO400M | {"key_bias": True, "n_registers": 0}, 415_406_592),
    ],
)
def test_published_parameter_counts(options, count):
    with torch.device("meta"):
        vit = ViT(ViTConfig(**options))
    assert sum(p.numel() for p in vit.parameters()) == count
    assert all(p.is_meta for p in vit.parameters())


def test_parameter_names_are_those_of_the_export():
    names = {name for name, _ in small(position="learned", image_size=16, depth=1).named_parameters()}
    block = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "qkv.weight", "qkv.bias", "proj.weight"]
    block += ["proj.bias", "ls1", "ls2", "ffn.fc1.weight", "ffn.fc1.bias", "ffn.fc2.weight", "ffn.fc2.bias"]
    top = ["patch_embed.weight", "patch_embed.bias", "cls_token", "mask_token", "pos_embed", "registers"]
    assert names == {*top, "norm.weight", "norm.bias", *(f"blocks.0.{name}" for name in block)}
    assert set(small(depth=1).state_dict()) == names - {"pos_embed"}  # rotary tables are not state


def explicit(vit, images, mask=None):
    """The whole network in plain formulas, every head and token written out."""
    c, w = vit.config, dict(vit.named_parameters())
    b, gh, gw = len(images), images.shape[2] // c.patch_size, images.shape[3] // c.patch_size
    pixels = images.unfold(2, c.patch_size, c.patch_size).unfold(3, c.patch_size, c.patch_size)
    pixels = pixels.permute(0, 2, 3, 1, 4, 5).reshape(b, gh * gw, -1)
    x = pixels @ w["patch_embed.weight"].flatten(1).T + w["patch_embed.bias"]
    if mask is not None:
        x = torch.stack([torch.where(m[:, None], w["mask_token"][0, 0], row) for m, row in zip(mask, x, strict=True)])
    cls = w["cls_token"].expand(b, -1, -1)
    if c.position == "learned":
        x, cls = x + w["pos_embed"][:, 1:], cls + w["pos_embed"][:, :1]
    x = torch.cat([cls, w["registers"].expand(b, -1, -1), x], 1)
    for i in range(c.depth):
        p = {k.removeprefix(f"blocks.{i}."): v for k, v in w.items() if k.startswith(f"blocks.{i}.")}
        one = torch.ones(c.width)
        y = F.layer_norm(x, (c.width,), p["norm1.weight"], p["norm1.bias"], c.norm_eps)
        x = x + p.get("ls1", one) * (explicit_attention(c, p, y, gh, gw) @ p["proj.weight"].T + p["proj.bias"])
        y = F.layer_norm(x, (c.width,), p["norm2.weight"], p["norm2.bias"], c.norm_eps)
        x = x + p.get("ls2", one) * explicit_ffn(c, p, y)
    return F.layer_norm(x, (c.width,), w["norm.weight"], w["norm.bias"], c.norm_eps)


def explicit_ffn(c, p, y):
    def linear(x, name):
        return x @ p[f"ffn.{name}.weight"].T + p[f"ffn.{name}.bias"]

    if c.ffn == "mlp":
        h = linear(y, "fc1")
        return linear(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))), "fc2")
    gate = linear(y, "gate")
    return linear(gate * torch.sigmoid(gate) * linear(y, "up"), "down")


def explicit_attention(c, p, y, gh, gw):
    d, e, prefix = c.width, c.width // c.heads, 1 + c.n_registers
    bias = torch.zeros(3 * d)
    if c.qkv_bias:
        bias = p["qkv.bias"] if c.key_bias else torch.cat([p["qkv.bias"][:d], torch.zeros(d), p["qkv.bias"][d:]])
    out = torch.zeros_like(y)
    for head in range(c.heads):
        q, k, v = (y @ p["qkv.weight"][s : s + e].T + bias[s : s + e] for s in (j * d + head * e for j in range(3)))
        if c.position == "rope":
            turns = [torch.eye(e)] * prefix + [
                rotation((i, j), (gh, gw), e, c.rope_base) for i in range(gh) for j in range(gw)
            ]
            turn = torch.stack(turns)
            q, k = (torch.einsum("nij,bnj->bni", turn, z) for z in (q, k))
        out[..., head * e : (head + 1) * e] = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(e), -1) @ v
    return out


def rotation(patch, grid, e, base):
    """The rotation matrix (e, e) of the patch (row, column) of a grid (rows, columns)."""
    m = torch.zeros(e, e, dtype=torch.float64)
    for n in range(e // 2):
        axis = 0 if n < e // 4 else 1
        centre = 2 * (patch[axis] + 0.5) / grid[axis] - 1
        a = 2 * math.pi * centre / base ** (2 * (n % (e // 4)) / (e / 2))
        m[n, n] = m[n + e // 2, n + e // 2] = math.cos(a)
        m[n, n + e // 2], m[n + e // 2, n] = -math.sin(a), math.sin(a)
    return m.float()


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_explicit_formulas(options, masked):
    vit, images = small(**options), pictures(3, 3, 16, 16)
    mask = pictures(3, 16, seed=5) > 0 if masked else None
    with torch.no_grad():
        out, want = vit(images, mask), explicit(vit, images, mask)
    assert out.cls.shape == (3, 32)
    assert out.registers.shape == (3, vit.config.n_registers, 32)
    torch.testing.assert_close(torch.cat([out.cls[:, None], *out[1:]], 1), want, rtol=1e-5, atol=1e-5)


def test_tall_grid_equals_explicit_formulas():
    vit, images = small(), pictures(1, 3, 24, 8)
    torch.testing.assert_close(vit(images).patches, explicit(vit, images)[:, 5:], rtol=1e-5, atol=1e-5)


def test_kernel_of_attention_does_not_matter():
    vit, images = small(), pictures(2, 3, 16, 16)
    with sdpa_kernel(SDPBackend.MATH):
        want = vit(images)
    torch.testing.assert_close(vit(images).patches, want.patches, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", VARIANTS)
def test_images_do_not_see_each_other(options):
    vit, x, y = small(**options), pictures(2, 3, 16, 16), pictures(3, 3, 16, 16, seed=1)
    with torch.no_grad():
        for both, a, b in zip(vit(torch.cat([x, y])), vit(x), vit(y), strict=True):
            torch.testing.assert_close(both, torch.cat([a, b]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", VARIANTS)
def test_masked_patches_are_the_mask_token(options):
    """A masked patch leaves no trace, and only the masked ones are replaced."""
    vit, images = small(**options), pictures(1, 3, 16, 16)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 6] = True  # row 1, column 2
    changed = images.clone()
    changed[:, :, 4:8, 8:12] = 7.0
    with torch.no_grad():
        assert torch.equal(vit(images, mask).cls, vit(changed, mask).cls)
        assert not torch.allclose(vit(images, mask).cls, vit(images).cls)
        assert not torch.allclose(vit(images, ~mask).cls, vit(changed, ~mask).cls)
        assert torch.equal(vit(images, mask & False).patches, vit(images).patches)


@pytest.mark.parametrize("mask", [None, torch.zeros(2, 16, dtype=torch.bool), torch.ones(2, 16, dtype=torch.bool)])
@pytest.mark.parametrize("options", VARIANTS)
def test_every_parameter_gets_a_gradient(mask, options):
    vit = small(**options).train()
    out = vit(pictures(2, 3, 16, 16), mask)
    (out.cls.square().sum() + out.registers.sum() + out.patches[:, :, 0].sum()).backward()
    assert [n for n, p in vit.named_parameters() if p.grad is None] == []
    used = bool(vit.mask_token.grad.abs().sum() > 0)
    assert used == (mask is not None and bool(mask.any()))


def test_without_branches_the_output_is_the_norm_of_the_embeddings():
    vit, images = small(layer_scale=1e-5), pictures(2, 3, 8, 12)
    for block in vit.blocks:
        block.ls1.data.zero_()
        block.ls2.data.zero_()
    embedded = vit.patch_embed(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(vit(images).patches, vit.norm(embedded))
    torch.testing.assert_close(vit(images).registers, vit.norm(vit.registers).expand(2, -1, -1))


def test_without_positions_patches_are_a_set():
    vit, images = small(position="learned", image_size=16), pictures(2, 3, 16, 16)
    vit.pos_embed.data.zero_()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    tiles = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, order].unflatten(2, (4, 4))
    shuffled = tiles.permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 16, 16)
    torch.testing.assert_close(vit(shuffled).cls, vit(images).cls, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vit(shuffled).patches, vit(images).patches[:, order], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(small()(shuffled).cls, small()(images).cls)


def test_rotation_keeps_norms_and_depends_on_the_difference_alone():
    q, k = pictures(64), pictures(64, seed=1)
    rope = rope_tables((7, 9), 64, 0, 100.0)
    turned_q, turned_k = (rotate(z.expand(63, 64), rope) for z in (q, k))
    torch.testing.assert_close(turned_q.norm(dim=1), q.norm().expand(63))
    dots = (turned_q @ turned_k.T).view(7, 9, 7, 9)
    for dy, dx in ((0, 0), (1, 0), (2, 3), (5, 7)):
        same = torch.stack([dots[y, x, y + dy, x + dx] for y in range(7 - dy) for x in range(9 - dx)])
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=0, atol=1e-4)
    assert (dots[0, 0] - dots[0, 0, 0, 0]).abs().max() > 1


def test_rotation_of_centre_prefix_and_mirror():
    x = pictures(8, 64)
    rope = rope_tables((3, 1), 64, 5, 100.0)
    turned = rotate(x, rope)
    assert torch.equal(turned[:5], x[:5])  # CLS and registers, bit for bit
    assert torch.equal(turned[6], x[6])  # the centre of an odd grid
    mirror = rope_tables((3, 1), 64, 5, 100.0, scale=-1.0)
    torch.testing.assert_close(rotate(turned, mirror), x)  # R(-p) = R(p)^T


@pytest.mark.parametrize(("head_width", "longest"), [(64, 74.989), (128, 86.596)])
def test_rotary_periods_and_extent(head_width, longest):
    for side in (4, 14):
        rope = rope_tables((side, side), head_width, 0, 100.0)
        angle = torch.atan2(rope.sin[-1], rope.cos[-1])
        edge, quarter = 1 - 1 / side, head_width // 4
        periods = torch.tensor([100 ** (i / quarter) for i in range(quarter)])
        assert periods[-1].item() == pytest.approx(longest, abs=1e-3)
        want = 2 * math.pi * edge / periods
        want = torch.atan2(want.sin(), want.cos())
        torch.testing.assert_close(angle, torch.cat([want, want]), rtol=1e-4, atol=1e-4)


def test_tables_stay_float32_and_are_kept_in_eval():
    vit = small().to(torch.bfloat16)
    with torch.inference_mode():
        assert vit(pictures(1, 3, 16, 16)).cls.dtype == torch.bfloat16
    (first,) = vit._tables.values()
    assert first.cos.dtype == torch.float32
    vit(pictures(1, 3, 16, 16))
    assert vit._tables[(4, 4, "cpu")] is first
    vit.float().train()
    vit(pictures(1, 3, 16, 16)).cls.sum().backward()  # a table from inference mode serves training
    for side in range(1, 60):
        vit(pictures(1, 3, 4, 4 * side))
    assert len(vit._tables) <= 32


def test_bfloat16_autocast_is_near():
    vit, images = small(), pictures(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        near = vit(images, torch.ones(2, 16, dtype=torch.bool)).patches
    exact = vit(images, torch.ones(2, 16, dtype=torch.bool)).patches
    assert F.cosine_similarity(near.float(), exact, dim=-1).min() > 0.999


def test_one_rescale_a_forward_from_the_generator():
    vit, images = small(rope_rescale=2.0), pictures(1, 3, 16, 16)
    assert torch.equal(vit(images).cls, small()(images).cls)  # eval: none
    vit.train()
    g = torch.Generator().manual_seed(3)
    first, second = vit(images, generator=g), vit(images, generator=g)
    assert not torch.equal(first.cls, second.cls)
    assert torch.equal(vit(images, generator=torch.Generator().manual_seed(3)).cls, first.cls)
    u = torch.rand(1, generator=torch.Generator().manual_seed(3)).item()
    by_hand = small().eval()
    by_hand._tables[(4, 4, "cpu")] = rope_tables((4, 4), 16, 5, 100.0, scale=math.exp((2 * u - 1) * math.log(2)))
    torch.testing.assert_close(by_hand(images).cls, first.cls)
    with pytest.raises(ValueError, match="must be given a generator"):
        vit(images)


@pytest.mark.parametrize(("b", "rate", "n"), [(64, 0.3, 44), (64, 0.4, 38), (10, 0.3, 7), (1, 0.4, 1), (7, 0.1, 6)])
def test_stochastic_depth_keeps_a_fixed_number_of_images(b, rate, n):
    vit = small(depth=1, drop_path=rate).train()
    vit.blocks[0].ls2.data.zero_()  # one branch alone, so that every image shows what it took
    images = pictures(b, 3, 4, 4)
    whole = View(b, 6, rope_tables((1, 1), 16, 5, 100.0))
    embedded = vit._embed(images, None, (1, 1))
    full = vit.blocks[0].attention_branch(embedded.flatten(0, 1), [whole]).view(embedded.shape)
    vit.norm = torch.nn.Identity()
    x = torch.cat([vit._embed(images, None, (1, 1))], 1)
    out = vit(images, generator=torch.Generator().manual_seed(0))
    taken = torch.cat([out.cls[:, None], *out[1:]], 1) - x
    kept = taken.abs().amax((1, 2)) > 0
    assert kept.sum() == n
    torch.testing.assert_close(taken[kept], full[kept] * b / n, rtol=1e-4, atol=1e-5)


def test_a_rescale_a_block_turns_each_block_by_its_own():
    vit, images = small(rope_rescale=2.0, rope_rescale_per="block").train(), pictures(1, 3, 16, 16)
    draws = vit.draw(1, torch.Generator().manual_seed(3))
    assert len(set(draws.rope_scales)) == len(vit.blocks) == 2
    out = vit(images, generator=torch.Generator().manual_seed(3))
    x = vit._embed(images, None, (4, 4)).flatten(0, 1)
    for block, scale in zip(vit.blocks, draws.rope_scales, strict=True):
        x = block(x, [View(1, 21, rope_tables((4, 4), 16, 5, 100.0, scale=scale))])
    assert torch.equal(out.cls, vit.norm(x)[:1])


@pytest.mark.parametrize("options", [*VARIANTS, {"drop_path": 0.4, "rope_rescale": 2.0}], ids=str)
def test_views_in_one_pass_are_views_one_by_one(options):
    vit = small(**options).train()
    views = [pictures(6, 3, 16, 16), pictures(10, 3, 8, 8, seed=1), pictures(2, 3, 8, 24, seed=2)]
    mask = torch.rand(6, 16, generator=torch.Generator().manual_seed(3)) < 0.4
    generator = torch.Generator().manual_seed(4)
    draws = [vit.draw(len(view), generator) for view in views]
    packed = vit.forward_views(views, [mask, None, None], draws)
    sum(tokens.patches.square().sum() for tokens in packed).backward()
    gradients = {name: p.grad.clone() for name, p in vit.named_parameters()}
    vit.zero_grad()
    apart = [vit.forward_views([v], [m], [d])[0] for v, m, d in zip(views, [mask, None, None], draws, strict=True)]
    sum(tokens.patches.square().sum() for tokens in apart).backward()
    for ours, theirs in zip(packed, apart, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for name, p in vit.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_stochastic_depth_is_off_in_eval_and_unbiased():
    options, images = {"depth": 1, "drop_path": 0.5}, pictures(4, 3, 8, 8)
    assert torch.equal(small(**options)(images).cls, small(depth=1)(images).cls)
    vit = small(**options).train()
    counts = torch.zeros(4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        counts += torch.bincount(vit.draw(4, generator).kept[0, 0], minlength=4)
    assert (counts / 400 - 0.5).abs().max() < 0.1


def test_positions_at_the_native_grid_are_exact_and_constants_stay():
    pos = pictures(1, 17, 8)
    assert torch.equal(resize_positions(pos, (4, 4)), pos)
    wide = resize_positions(pos, (3, 9))
    assert wide.shape == (1, 28, 8)
    assert torch.equal(wide[:, :1], pos[:, :1])
    want = F.interpolate(pos[:, 1:].transpose(1, 2).view(1, 8, 4, 4), (3, 9), mode="bicubic", antialias=True)
    assert torch.equal(wide[0, 1:].T.reshape(8, 3, 9), want[0])
    constant = resize_positions(torch.full((1, 17, 8), 2.5), (7, 2))
    torch.testing.assert_close(constant, torch.full((1, 15, 8), 2.5))
    assert small(position="learned", image_size=16)(pictures(1, 3, 8, 24)).patches.shape == (1, 12, 32)


def test_same_seed_same_weights_and_no_global_randomness():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b, c = (ViT(ViTConfig(**SMALL), seed=seed) for seed in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.blocks[0].qkv.weight, c.blocks[0].qkv.weight)


@pytest.mark.parametrize("options", VARIANTS)
def test_initial_values(options):
    config = ViTConfig(**{**SMALL, "width": 128, **options})
    for name, p in ViT(config).named_parameters():
        leaf = name.split(".")[-1]
        assert torch.isfinite(p).all(), name
        if "patch_embed" in name:
            bound = (3 * 16) ** -0.5
            assert 0.9 * bound < p.abs().max() <= bound
        elif leaf in ("ls1", "ls2"):
            assert torch.equal(p, torch.full_like(p, 0.5))
        elif leaf == "bias" or name == "mask_token":
            assert not p.any(), name
        elif "norm" in name:
            assert torch.equal(p, torch.ones_like(p))
        elif p.numel():
            assert p.std().item() == pytest.approx(0.02, rel=0.25), name


def test_a_copy_is_a_vit_of_its_own():
    vit = small()
    vit(pictures(1, 3, 16, 16))
    twin = copy.deepcopy(vit)
    twin.cls_token.data.add_(1)
    assert not torch.equal(twin(pictures(1, 3, 16, 16)).cls, vit(pictures(1, 3, 16, 16)).cls)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "vit.width must be a multiple of vit.heads: got 384 and 5"),
        ({"heads": 64}, "vit.width / vit.heads must be a multiple of 4: got 384 / 64"),
        ({"depth": 0}, "vit.depth must be at least 1: got 0"),
        ({"n_registers": -1}, "vit.n_registers must be at least 0: got -1"),
        ({"ffn": "relu"}, "vit.ffn must be 'mlp' or 'swiglu': got 'relu'"),
        ({"position": "sine"}, "vit.position must be 'rope' or 'learned': got 'sine'"),
        ({"position": "learned"}, r"vit.image_size must be a multiple of vit.patch_size \(16\).*got None"),
        ({"position": "learned", "image_size": 100}, "got 100"),
        ({"position": "learned", "image_size": 32, "rope_rescale": 2.0}, "vit.rope_rescale must be null"),
        ({"image_size": 224}, "vit.image_size must be null with rope positions: got 224"),
        ({"rope_rescale": 0.5}, "vit.rope_rescale must be at least 1, or null: got 0.5"),
        ({"drop_path": 1.0}, r"vit.drop_path must be in \[0, 1\): got 1.0"),
        ({"mlp_ratio": 0.0}, "vit.mlp_ratio must be above 0: got 0.0"),
        ({"key_bias": True, "qkv_bias": False}, "vit.key_bias must be false without vit.qkv_bias"),
    ],
)
def test_configs_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**options)


def test_inputs_that_do_not_fit_are_named():
    vit = small()
    with pytest.raises(ValueError, match=r"sides that are multiples of 4: got .*\[1, 3, 16, 18\]"):
        vit(pictures(1, 3, 16, 18))
    with pytest.raises(ValueError, match=r"mask must be bool \(1, 16\): got torch.bool \(1, 15\)"):
        vit(pictures(1, 3, 16, 16), torch.ones(1, 15, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        vit(pictures(1, 3, 16, 16), torch.ones(1, 16))


def from_hf(state, prefix):
    """Weights of a transformers model, in memory, under the names of ours."""
    names = {"attention.o_proj": "proj", "layer_scale1.lambda1": "ls1", "layer_scale2.lambda1": "ls2"}
    names |= {"mlp.up_proj": "ffn.fc1", "mlp.down_proj": "ffn.fc2", "mlp.fc1": "ffn.fc1", "mlp.fc2": "ffn.fc2"}
    if any("gate_proj" in name for name in state):
        names |= {"mlp.gate_proj": "ffn.gate", "mlp.up_proj": "ffn.up", "mlp.down_proj": "ffn.down"}
    top = {"embeddings.cls_token": "cls_token", "embeddings.mask_token": "mask_token", "layernorm": "norm"}
    top |= {"embeddings.register_tokens": "registers", "embeddings.position_embeddings": "pos_embed", prefix: "blocks."}
    top |= {"embeddings.patch_embeddings.projection": "patch_embed", "embeddings.patch_embeddings": "patch_embed"}
    ours, qkv = {}, {}
    for theirs, value in state.items():
        name = theirs
        for old, new in (top | names).items():
            name = name.replace(old, new)
        head, found, part = name.partition("attention.")
        if found:
            qkv.setdefault(f"{head}qkv.{part.rpartition('.')[2]}", []).append(("qkv".index(part[0]), value))
        else:
            ours[name] = value
    ours |= {name: torch.cat([v for _, v in sorted(parts, key=lambda p: p[0])]) for name, parts in qkv.items()}
    ours["mask_token"] = ours["mask_token"].view(1, 1, -1)
    ours.setdefault("registers", torch.zeros(1, 0, ours["mask_token"].shape[-1]))
    return ours


@pytest.mark.parametrize("kind", ["dinov3", "dinov3 swiglu", "dinov3 no bias", "dinov2 registers", "dinov2 swiglu"])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_transformers(kind, masked):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "image_size": 16}
    options = {"layer_norm_eps": 1e-5, "initializer_range": 0.2}
    torch.manual_seed(0)
    if kind.startswith("dinov3"):
        gated, bias = "swiglu" in kind, "no bias" not in kind
        options |= {"layerscale_value": 0.5, "use_gated_mlp": gated, "hidden_act": "silu" if gated else "gelu"}
        options |= {"query_bias": bias, "value_bias": bias, "num_register_tokens": 4}
        hidden = ViTConfig(**SMALL, ffn="swiglu").ffn_hidden if gated else 128
        config = transformers.DINOv3ViTConfig(**shape, **options, intermediate_size=hidden)
        theirs, ours, prefix = transformers.DINOv3ViTModel(config), {"qkv_bias": bias}, "model.layer."
        ours["ffn"] = "swiglu" if gated else "mlp"
    else:
        options |= {"layerscale_value": 0.5, "use_swiglu_ffn": "swiglu" in kind}
        ours = {"position": "learned", "image_size": 16, "key_bias": True, "n_registers": 0}
        ours["ffn"] = "swiglu" if "swiglu" in kind else "mlp"
        prefix = "encoder.layer."
        if "registers" in kind:
            ours["n_registers"] = 3
            config = transformers.Dinov2WithRegistersConfig(**shape, **options, num_register_tokens=3)
            theirs = transformers.Dinov2WithRegistersModel(config)
        else:
            theirs = transformers.Dinov2Model(transformers.Dinov2Config(**shape, **options))
    theirs.eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.3)
    vit = ViT(ViTConfig(**SMALL | ours)).eval()
    vit.load_state_dict(from_hf(theirs.state_dict(), prefix))
    images, mask = pictures(2, 3, 16, 16), pictures(2, 16, seed=5) > 0 if masked else None
    with torch.no_grad():
        want = theirs(images, bool_masked_pos=mask).last_hidden_state
        out = vit(images, mask)
    torch.testing.assert_close(torch.cat([out.cls[:, None], *out[1:]], 1), want, rtol=1e-5, atol=1e-5)
