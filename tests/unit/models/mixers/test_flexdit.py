"""FlexDiT against an independent plain-torch reference, and against the dense model where both must agree.

Letters: B images, C latent channels, N tokens, n sparse ones, D width, L text tokens, d a head's width, K blocks.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from backbones import predict
from torch import Tensor

from pretrain.models import PRESETS, ComputeBudget, DiT, DiTConfig, PackedText
from pretrain.models.grids import Grid
from pretrain.models.mixers.base import TokenState, TrainingChoice
from pretrain.models.mixers.flexdit import (
    FlexDiTSection,
    GenerateMixer,
    MeanAttention,
    PoolingMixer,
    RecoverMixer,
    SparseMixer,
    bin_of,
    blocks_of,
    removed,
    roles,
    sparse_grid,
    split_of,
)
from pretrain.models.mixers.full import FullMixer

pytestmark = pytest.mark.usefixtures("one_thread")

FLEX = DiTConfig(
    width=24,
    heads=2,
    depth=8,
    patch=2,
    latent_channels=3,
    text_width=10,
    density="flexdit",
    flexdit=FlexDiTSection(sparsity=(0.3, 0.8)),
    mask_hidden=(16, 8),
)
GRID = (5, 7)
CELLS = {0: (4, 6), 3: (2, 3)}  # of GRID, by the bin


def build(config: DiTConfig = FLEX, seed: int = 0) -> DiT:
    """A model in fp64 with random parameters, as after some training: nothing is 0."""
    torch.manual_seed(seed)
    model = DiT(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return model


def inputs(images: int = 2, grid: Grid = GRID) -> tuple[Tensor, Tensor, PackedText]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(images, 3, grid[0] * 2, grid[1] * 2, dtype=torch.float64, generator=generator)
    texts = [torch.randn(n, 10, dtype=torch.float64, generator=generator) for n in (5, 1, 3)[:images]]
    # Small timesteps: the sinusoids' angles are made in fp32.
    return latent, torch.tensor([3.5, 11.0, 0.0])[:images], PackedText.pack(texts)


class Reference:
    """FlexDiT for one image, from the paper's words: blocks by their place in `split`, parameters by their names."""

    def __init__(self, model: DiT, grid: Grid, cells: Grid):
        self.model, self.grid, self.cells = model, grid, cells
        self.heads = model.config.heads
        self.places = {size: self.where(size) for size in (grid, cells)}

    def linear(self, name: str, x: Tensor) -> Tensor:
        module = self.model.get_submodule(name)
        return x @ module.weight.T + (0 if module.bias is None else module.bias)

    def norm(self, x: Tensor, eps: float) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    def where(self, size: Grid) -> Tensor:
        """Row and column of each token, or of each cell's tokens' mean, as torch's adaptive pooling assigns them."""
        rows, columns = self.grid
        row = torch.arange(rows).double()[:, None].expand(rows, columns)
        column = torch.arange(columns).double()[None].expand(rows, columns)
        return F.adaptive_avg_pool2d(torch.stack([row, column])[None], size)[0].flatten(1)

    def turn(self, x_Nd: Tensor, size: Grid) -> Tensor:
        quarter, parts = x_Nd.shape[-1] // 4, []
        for half, place in zip(x_Nd.chunk(2, -1), self.places[size], strict=True):
            angle = place[:, None] * 10000 ** (-torch.arange(quarter).double() / quarter)
            turned = torch.complex(*half.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
            parts += [turned.real, turned.imag]
        return torch.cat(parts, -1)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, sizes: tuple[Grid, Grid] | None) -> Tensor:
        results = []
        for q_h, k_h, v_h in zip(
            q.chunk(self.heads, -1), k.chunk(self.heads, -1), v.chunk(self.heads, -1), strict=True
        ):
            if sizes is not None:
                q_h, k_h = self.turn(q_h, sizes[0]), self.turn(k_h, sizes[1])
            results.append(torch.softmax(q_h @ k_h.T / q_h.shape[-1] ** 0.5, -1) @ v_h)
        return torch.cat(results, -1)

    def among(self, name: str, x: Tensor, x_size: Grid, source: Tensor, source_size: Grid) -> Tensor:
        """Attention of `x` to `source`: queries of the one, keys and values of the other."""
        q = self.linear(f"{name}.qkv", x).chunk(3, -1)[0]
        _, k, v = self.linear(f"{name}.qkv", source).chunk(3, -1)
        return self.linear(f"{name}.out", self.attention(q, k, v, (x_size, source_size)))

    def resize(self, x_NX: Tensor, of: Grid, to: Grid) -> Tensor:
        image = x_NX.T.unflatten(1, of)[None]
        image = F.adaptive_avg_pool2d(image, to) if to == self.cells else F.interpolate(image, to, mode="nearest")
        return image[0].flatten(1).T

    def vocabulary(self, name: str, z: Tensor) -> Tensor:
        return self.linear(f"{name}.value", F.gelu(self.linear(f"{name}.key", z), approximate="tanh"))

    def mask(self, name: str, x: Tensor, m: Tensor, time: Tensor, timestep: Tensor) -> Tensor:
        mask = self.model.get_submodule(name)
        if self.model.config.mask == "release":
            scale, shift = self.linear(f"{name}.time_linear", F.silu(mask.time_table.weight[int(timestep)])).chunk(2)
        else:
            scale, shift = mask.time_shift + time
        h = self.norm(x, 1e-5) * (1 + scale) + shift
        for layer in mask.layers:
            h = F.relu(h @ layer.linear.weight.T + layer.linear.bias + m * layer.premask)
        return torch.sigmoid(h @ mask.last.linear.weight.T + mask.last.linear.bias + m * mask.last.premask)

    def block(self, i: int, x: Tensor, m: Tensor, size: Grid, shared: dict) -> tuple[Tensor, Tensor, Grid]:
        """One block, which its role makes another one in its attention alone."""
        name, config, eps = f"blocks.{i}", self.model.config, self.model.config.norm_eps
        table = self.model.get_submodule(name).scale_shift_table
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = table + shared["modulation"]
        role, attn = self.roles()[i], f"{name}.self_attention"

        def ready(tokens: Tensor) -> Tensor:
            return self.norm(tokens, eps) * (1 + scale_msa) + shift_msa

        if role == "pooling":
            values = self.linear(f"{attn}.value", ready(x))
            update = self.linear(f"{attn}.out", values.mean(0).expand_as(values))
        elif role == "generate":
            shared["waiting"] = x
            all_tokens, x, m, size = x, self.resize(x, size, self.cells), self.resize(m, size, self.cells), self.cells
            update = self.among(attn, ready(x), size, ready(all_tokens), self.grid)
        elif role == "recover":
            sparse, m, size = x, self.resize(m, size, self.grid), self.grid
            up = self.resize(sparse, self.cells, self.grid)
            x = self.linear(f"{name}.from_sparse", up) + self.linear(f"{name}.from_dense", shared["waiting"])
            update = self.among(attn, ready(x), size, ready(sparse), self.cells)
        else:
            update = self.among(attn, ready(x), size, ready(x), size)
        x = x + gate_msa * update
        k, v = self.linear(f"{name}.cross_attention.kv", shared["text"]).chunk(2, -1)
        seen = self.attention(self.linear(f"{name}.cross_attention.q", x), k, v, None)
        x = x + self.linear(f"{name}.cross_attention.out", seen)
        if config.mask != "none":
            m = self.mask(f"{name}.query_mask", x, m, shared["time"], shared["timestep"])
        z = self.norm(x, eps) * (1 + scale_mlp) + shift_mlp
        update = self.vocabulary(f"{name}.ffn", z)
        if config.ffn == "shared":
            update = update + self.vocabulary("shared_expert", z)
        return x + m * gate_mlp * update, m, size

    def roles(self) -> list[str]:
        pooling, modules, sparse, top = split_of(self.model.config.depth, self.model.config.flexdit.split)
        module = ["generate"] + ["sparse"] * sparse + ["recover", "dense"]
        return ["pooling"] * pooling + module * modules + ["dense"] * top

    def __call__(self, latent_CHW: Tensor, timestep: Tensor, caption_LE: Tensor) -> tuple[Tensor, list[Tensor]]:
        (rows, columns), p = self.grid, self.model.config.patch
        angle = timestep.double() * 10000 ** (-torch.arange(128).double() / 128)
        time = self.linear("time_embed.linear_1", torch.cat([angle.cos(), angle.sin()]))
        time = self.linear("time_embed.linear_2", F.silu(time))
        text = F.gelu(self.linear("text_projection.linear_1", caption_LE), approximate="tanh")
        shared = {
            "time": time,
            "timestep": timestep,
            "modulation": self.linear("time_modulation", F.silu(time)).reshape(6, -1),
            "text": self.linear("text_projection.linear_2", text),
        }
        patches = F.unfold(latent_CHW[None], p, stride=p)[0].T
        x, m, size = self.linear("patch_embed.proj", patches), torch.ones(rows * columns, 1).double(), self.grid
        masks = []
        for i in range(len(self.model.blocks)):
            x, m, size = self.block(i, x, m, size, shared)
            masks.append((m if size == self.grid else self.resize(m, size, self.grid))[:, 0])
        shift, scale = self.model.final.scale_shift_table + time
        out = self.linear("final.proj", self.norm(x, 1e-6) * (1 + scale) + shift)
        folded = out.unflatten(-1, (p * p, -1)).permute(2, 1, 0).flatten(0, 1)[None]
        return F.fold(folded, latent_CHW.shape[-2:], p, stride=p)[0], masks


@torch.no_grad()
@pytest.mark.parametrize("bin_", [0, 3])
@pytest.mark.parametrize("mask", ["none", "release", "adaln_single"])
def test_the_backbone_against_the_reference(mask, bin_):
    model, (latent, timestep, text) = build(replace(FLEX, mask=mask, ffn="shared")), inputs()
    got = predict(model, latent, timestep, text, budget=ComputeBudget.of(flexdit=bin_))
    assert got.sample_BCHW.std() > 0.1
    assert (got.masks_KBN is None) == (mask == "none")
    reference = Reference(model, GRID, CELLS[bin_])
    for b in range(2):
        expected, masks = reference(latent[b], timestep[b], text.captions()[b])
        torch.testing.assert_close(got.sample_BCHW[b], expected, rtol=1e-4, atol=1e-4)
        if mask != "none":
            assert got.masks_KBN.shape == (8, 2, 35)
            assert got.masks_KBN[:, b].std(-1).mean() > 1e-3
            torch.testing.assert_close(got.masks_KBN[:, b], torch.stack(masks), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_a_fixed_grid_is_that_at_every_noise_level(t):
    """What the authors' public logs trained: not by the bins, and nothing is left open."""
    config = replace(FLEX, flexdit=FlexDiTSection(grid=(2, 3)))
    model, (latent, _, text) = build(config), inputs()
    timestep = torch.full((2,), 1000 * t)
    got = predict(model, latent, timestep, text).sample_BCHW
    other = build(replace(FLEX, flexdit=FlexDiTSection(sparsity=(0.8, 0.8))))  # 2 × 3 in all bins
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(got, predict(other, latent, timestep, text).sample_BCHW)
    (method,) = config.open_methods
    assert method.choices == (0,)
    assert [method.training_choice(lambda t: t, 0, step) for step in range(9)] == [TrainingChoice(0, (0.0, 1.0))] * 9


@torch.no_grad()
def test_images_of_different_noise_levels_share_a_fixed_grid():
    latent, _, text = inputs()
    model = build(replace(FLEX, flexdit=FlexDiTSection(grid=(2, 3))))
    assert predict(model, latent, torch.tensor([3.0, 990.0]), text).sample_BCHW.isfinite().all()
    with pytest.raises(ValueError, match="share one compute budget"):
        predict(build(), latent, torch.tensor([3.0, 990.0]), text)


@pytest.mark.parametrize(
    ("section", "mend"),
    [
        (FlexDiTSection(grid=(0, 3)), r"flexdit.grid: \[0, 3\] must be rows and columns, each at least 1"),
        (FlexDiTSection(sparsity=(0.3, 0.8), grid=(2, 3)), "flexdit.grid and flexdit.sparsity: .* give one"),
    ],
)
def test_a_fixed_grid_that_cannot_be(section, mend):
    with pytest.raises(ValueError, match=mend):
        DiT(replace(FLEX, flexdit=section))


def test_a_fixed_grid_finer_than_the_tokens():
    model = build(replace(FLEX, flexdit=FlexDiTSection(grid=(8, 8))))
    with pytest.raises(ValueError, match=r"flexdit\.grid: 8 × 8 is finer than the picture's 5 × 7 tokens; lower it"):
        predict(model, *inputs())


@torch.no_grad()
def test_several_modules_against_the_reference():
    """Each module waits for its own tokens."""
    config = replace(FLEX, depth=9, flexdit=FlexDiTSection(split=(0, 2, 1, 1)), mask="adaln_single")
    model, (latent, timestep, text) = build(config), inputs()
    got = predict(model, latent, timestep, text, budget=ComputeBudget.of(flexdit=3)).sample_BCHW
    expected, _ = Reference(model, GRID, CELLS[3])(latent[0], timestep[0], text.captions()[0])
    torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("mask", ["none", "release", "adaln_single"])
def test_with_all_tokens_left_and_w1_the_identity_it_is_the_dense_model(mask):
    """With as many cells as tokens, and y = the sparse tokens, every block attends among all tokens."""
    config = replace(
        FLEX,
        depth=7,
        flexdit=FlexDiTSection(split=(0, 1, 3, 1), sparsity=(1e-6, 1e-6)),
        mask=mask,
        ffn="shared",
    )
    flex, dense = build(config), DiT(replace(config, density="dense")).double().eval()
    recover = flex.blocks[4]
    for linear, value in ((recover.from_sparse, torch.eye(24)), (recover.from_dense, torch.zeros(24, 24))):
        linear.weight.copy_(value)
        linear.bias.zero_()
    rest = dense.load_state_dict(flex.state_dict(), strict=False)
    assert not rest.missing_keys
    assert {name.split(".")[2] for name in rest.unexpected_keys} == {"from_sparse", "from_dense"}
    got, expected = predict(flex, *inputs(), budget=ComputeBudget.of(flexdit=2)), predict(dense, *inputs())
    torch.testing.assert_close(got.sample_BCHW, expected.sample_BCHW)
    if mask != "none":
        torch.testing.assert_close(got.masks_KBN, expected.masks_KBN)


@torch.no_grad()
@pytest.mark.parametrize("sparsity", [(1e-6, 1e-6), (0.3, 0.8)])
def test_at_first_the_sparse_tokens_do_not_touch_the_others(sparsity):
    """With W1 = 0, W2 = I and no attention back, the module is its last two blocks."""
    config = replace(FLEX, depth=7, flexdit=FlexDiTSection(split=(0, 1, 3, 1), sparsity=sparsity))
    flex, dense = build(config), DiT(replace(config, density="dense")).double().eval()
    fresh = DiT(config).blocks[4]
    flex.blocks[4].from_sparse.load_state_dict(fresh.from_sparse.state_dict())
    flex.blocks[4].from_dense.load_state_dict(fresh.from_dense.state_dict())
    for name in ("weight", "bias"):
        getattr(flex.blocks[4].self_attention.out, name).zero_()
    dense.load_state_dict(flex.state_dict(), strict=False)
    for silent in dense.blocks[:4]:
        for part in (silent.self_attention.out, silent.cross_attention.out, silent.ffn.value):
            part.weight.zero_()
            part.bias.zero_()
    torch.testing.assert_close(predict(flex, *inputs()).sample_BCHW, predict(dense, *inputs()).sample_BCHW)
    flex.blocks[4].from_sparse.weight.add_(0.1)
    assert not torch.allclose(predict(flex, *inputs()).sample_BCHW, predict(dense, *inputs()).sample_BCHW)


@torch.no_grad()
@pytest.mark.parametrize("mask", ["none", "release", "adaln_single"])
def test_a_fresh_models_blocks_change_nothing(mask):
    torch.manual_seed(0)
    model, (latent, timestep, text) = DiT(replace(FLEX, mask=mask)).double(), inputs()
    fresh = predict(model, latent, timestep, text).sample_BCHW
    assert fresh.std() > 0.1
    untouched = TokenState(model.patch_embed(latent), GRID, torch.ones(2, 35, 1))
    torch.testing.assert_close(model.final(untouched, model.time_embed(timestep)), fresh)


@torch.no_grad()
def test_mean_attention_is_the_mean_of_all_values():
    torch.manual_seed(0)
    attention, x = MeanAttention(24).double(), torch.randn(2, 35, 24, dtype=torch.float64)
    values = torch.stack([attention.value(token) for token in x.unbind(1)], 1)
    each = torch.stack([attention.out(values.mean(1)) for _ in range(35)], 1)
    torch.testing.assert_close(attention(x).expand_as(x), each)


@torch.no_grad()
def test_blocks_see_as_many_tokens_as_their_role_says():
    model, seen = build(replace(FLEX, mask="release")), []
    for block in model.blocks:
        block.ffn.register_forward_pre_hook(lambda _, a: seen.append(a[0].shape[1]))
    got = predict(model, *inputs(), budget=ComputeBudget.of(flexdit=3))
    assert seen == [35, 6, 6, 6, 6, 35, 35, 35]
    assert [m.shape[1] for m, _ in got.masks] == seen
    assert [grid for _, grid in got.masks] == [GRID, *[(2, 3)] * 4, *[GRID] * 3]


def test_roles_of_a_split():
    module = ("generate", "sparse", "sparse", "sparse", "recover", "dense")
    assert roles(28, None) == ("pooling",) * 2 + module * 4 + ("dense",) * 2
    assert roles(28, (1, 4, 3, 3)) == ("pooling", *module * 4, *("dense",) * 3)
    short = ("generate", "sparse", "sparse", "recover", "dense")
    assert roles(12, None) == ("pooling", *short * 2, "dense")
    mixers = [type(block.mixer) for block in build().blocks]
    assert mixers[:6] == [PoolingMixer, GenerateMixer, SparseMixer, SparseMixer, SparseMixer, RecoverMixer]
    assert mixers[6:] == [FullMixer] * 2
    plain = DiT(replace(FLEX, density="dense", depth=3))
    assert [type(block.mixer) for block in plain.blocks] == [FullMixer] * 3


@pytest.mark.parametrize("name", [n for n, c in PRESETS.items() if c.density == "flexdit"])
def test_every_presets_split_makes_up_its_depth(name):
    config = PRESETS[name]
    assert config.problems() == []
    assert (
        blocks_of(split_of(config.depth, config.flexdit.split))
        == config.depth
        == len(roles(config.depth, config.flexdit.split))
    )


def test_the_presets_are_the_published_ones():
    splits = {name: split_of(c.depth, c.flexdit.split) for name, c in PRESETS.items() if c.density == "flexdit"}
    assert splits == {"flexdit_xl2_512": (2, 4, 3, 2), "flexdit_xl2_256": (1, 4, 3, 3), "flexdit_b2": (1, 2, 2, 1)}


@pytest.mark.parametrize(
    ("side", "sparsity", "sides"),
    [
        (16, (0.61, 0.86), (10, 9, 8, 6)),
        (32, (0.61, 0.86), (20, 18, 15, 12)),
        (32, (0.90, 0.96), (10, 9, 8, 6)),
    ],
)
def test_the_sides_of_each_bin_are_the_published_ones(side, sparsity, sides):
    assert tuple(sparse_grid((side, side), sparsity, b) for b in range(4)) == tuple((s, s) for s in sides)


def test_rows_and_columns_shrink_alike():
    assert sparse_grid((16, 32), (0.61, 0.86), 1) == (9, 18)


def test_bins_of_the_noise_level():
    assert [bin_of(t) for t in (0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 1.0)] == [0, 0, 1, 2, 2, 3, 3]
    shares = [removed((0.6, 0.9), b) for b in range(4)]
    assert shares == pytest.approx([0.6, 0.7, 0.8, 0.9])
    assert all(few < many for few, many in pairwise(shares)), "more is removed near noise"


@torch.no_grad()
def test_the_noise_level_decides_the_grid():
    model, (latent, _, text) = build(), inputs()
    seen = []
    model.blocks[2].ffn.register_forward_pre_hook(lambda _, a: seen.append(a[0].shape[1]))
    for level in (0.0, 0.3, 0.6, 1.0):
        predict(model, latent, torch.full((2,), 1000 * level), text)
    expected = [sparse_grid(GRID, FLEX.flexdit.sparsity, b) for b in range(4)]
    assert seen == [rows * columns for rows, columns in expected]
    assert seen == sorted(seen, reverse=True) and seen[0] > seen[-1]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"depth": 9}, r"flexdit.split: no split is known for 9 blocks \(only for 8, 12, 28\)"),
        ({"split": (1, 1, 3, 2)}, r"flexdit.split: \[1, 1, 3, 2\] makes 9 blocks .*, but depth is 8"),
        ({"split": (2, 0, 3, 6)}, "expected .*one module with one sparse block at least"),
        ({"split": (2, 1, 0, 3)}, "expected .*one module with one sparse block at least"),
        ({"split": (-1, 1, 3, 3)}, "nothing below 0"),
        ({"split": (1, 1, 3)}, "flexdit.split: .*expected four numbers"),
        ({"split": ()}, "flexdit.split: .*expected four numbers"),
        ({"sparsity": (0.0, 0.5)}, "flexdit.sparsity: .* above 0 and below 1"),
        ({"sparsity": (0.5, 1.0)}, "flexdit.sparsity: .* above 0 and below 1"),
        ({"sparsity": (0.6, 0.5)}, "flexdit.sparsity: .* the first not above the second"),
        ({"sparsity": (0.6,)}, "flexdit.sparsity: .* two shares"),
        ({"density": "sparse"}, "density: 'sparse' is none of dense, flexdit"),
    ],
)
def test_refuses_what_it_cannot_build_in_one_line(change, line):
    section = {name: change[name] for name in change.keys() & {"split", "sparsity"}}
    rest = {name: value for name, value in change.items() if name not in section}
    config = replace(FLEX, flexdit=replace(FLEX.flexdit, **section), **rest)
    (problem,) = config.problems()
    assert "\n" not in problem
    with pytest.raises(ValueError, match=line):
        DiT(config)


def test_refuses_pictures_of_which_nothing_would_be_left():
    model, (latent, timestep, text) = (
        build(replace(FLEX, flexdit=FlexDiTSection(sparsity=(0.3, 0.96)))),
        inputs(grid=(2, 7)),
    )
    expected = r"^flexdit.sparsity: 0\.96 of 2 × 7 tokens removed leaves 0 × 1; lower it, or use larger pictures$"
    with pytest.raises(ValueError, match=expected):
        predict(model, latent, timestep, text)
