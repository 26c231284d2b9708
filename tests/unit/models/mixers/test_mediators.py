"""Attention mediators against attention written out, and against full attention where both must agree.

Letters: B images, N tokens of a grid, n mediators, D width, m heads, d a head's width.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from backbones import predict
from torch import Tensor

from pretrain.models import PRESETS, ComputeBudget, DiT, DiTConfig, PackedText
from pretrain.models.embeddings import Rotary, rotary_positions
from pretrain.models.grids import Grid, square
from pretrain.models.mixers.full import SelfAttention
from pretrain.models.mixers.mediators import MediatorAttention, MediatorsSection, PairBias

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, HEADS = 24, 2
MEDIATED = DiTConfig(
    width=WIDTH,
    heads=HEADS,
    depth=3,
    patch=2,
    latent_channels=3,
    text_width=10,
    attention="mediators",
    mediators=MediatorsSection((1, 4, 16)),
    mask_hidden=(16, 8),
)


def seeded(choices: tuple[int, ...]) -> MediatorAttention:
    torch.manual_seed(0)
    attention = MediatorAttention(WIDTH, HEADS, choices).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return attention


def positions(grid: Grid, cells: Grid | None = None) -> Rotary:
    return rotary_positions("halves", grid, WIDTH // HEADS, 1.0, torch.device("cpu"), torch.float64, cells)


def attend(attention: MediatorAttention, x_BND: Tensor, grid: Grid, n: int) -> Tensor:
    return attention(x_BND, grid, positions(grid), positions(grid, square(n)), n)


def turn(x_d: Tensor, row: float, column: float) -> Tensor:
    """One token's head, its first half turned by its row, its second by its column."""
    parts, quarter = [], len(x_d) // 4
    for half, place in zip(x_d.chunk(2), (row, column), strict=True):
        angle = place * 10000 ** (-torch.arange(quarter).double() / quarter)
        a, b = half.chunk(2)
        parts += [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
    return torch.cat(parts)


def at(line: Tensor, token: int, tokens: int) -> Tensor:
    """The last axis read linearly at a token's middle, when it is stretched over so many tokens."""
    place = min(max((token + 0.5) * line.shape[-1] / tokens - 0.5, 0), line.shape[-1] - 1)
    low = int(place)
    high = min(low + 1, line.shape[-1] - 1)
    return line[..., low] * (1 - place + low) + line[..., high] * (place - low)


def bias(tables: PairBias, grid: Grid, row: int, column: int) -> Tensor:
    """[m, n] of one token."""
    map_ = at(at(tables.map, column, grid[1]), row, grid[0])
    return map_ + at(tables.row, row, grid[0]) + at(tables.column, column, grid[1])


def reference(attention: MediatorAttention, x_ND: Tensor, grid: Grid, n: int) -> Tensor:
    """One image, token by token and mediator by mediator."""
    (rows, columns), side, width = grid, math.isqrt(n), WIDTH // HEADS
    places = [(r, c) for r in range(rows) for c in range(columns)]
    q, k, v = (part.unflatten(-1, (HEADS, width)) for part in attention.qkv(x_ND).chunk(3, -1))
    mediators, middles = [], []
    for i in range(side):
        for j in range(side):
            covered = [
                number
                for number, (r, c) in enumerate(places)
                if math.floor(i * rows / side) <= r < math.ceil((i + 1) * rows / side)
                and math.floor(j * columns / side) <= c < math.ceil((j + 1) * columns / side)
            ]
            mediators.append(q[covered].mean(0))
            middles.append(torch.tensor([places[number] for number in covered]).double().mean(0).tolist())
    gather = torch.stack([bias(attention.gather_bias[str(n)], grid, r, c) for r, c in places], -1)
    spread = torch.stack([bias(attention.spread_bias[str(n)], grid, r, c) for r, c in places])
    heads = []
    for m in range(HEADS):
        t = torch.stack([turn(each[m], *middle) for each, middle in zip(mediators, middles, strict=True)])
        q_m = torch.stack([turn(each[m], *place) for each, place in zip(q, places, strict=True)])
        k_m = torch.stack([turn(each[m], *place) for each, place in zip(k, places, strict=True)])
        seen = (t @ k_m.T / width**0.5 + gather[m]).softmax(-1) @ v[:, m]
        heads.append((q_m @ t.T / width**0.5 + spread[:, m]).softmax(-1) @ seen)
    v_ND, local = v.flatten(1), torch.zeros(len(places), WIDTH).double()
    for number, (r, c) in enumerate(places):
        local[number] = attention.local.bias
        for other, (row, column) in enumerate(places):
            if abs(row - r) <= 1 and abs(column - c) <= 1:
                local[number] += v_ND[other] * attention.local.weight[:, 0, row - r + 1, column - c + 1]
    return attention.out(torch.cat(heads, -1) + local)


@torch.no_grad()
@pytest.mark.parametrize(("grid", "n"), [((4, 4), 4), ((5, 7), 4), ((5, 7), 16), ((9, 3), 9), ((3, 4), 1)])
def test_it_is_attention_through_mediators(grid, n):
    attention, x = seeded((n,)), torch.randn(2, math.prod(grid), WIDTH, dtype=torch.float64)
    got = attend(attention, x, grid, n)
    for image, result in zip(x, got, strict=True):
        torch.testing.assert_close(result, reference(attention, image, grid, n), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_with_a_mediator_for_each_token_it_is_full_attention():
    """Every token takes from its own mediator alone; the convolution and the gathering's bias are left out."""
    grid, N = (16, 16), 256
    attention, full = seeded((N,)), SelfAttention(WIDTH, HEADS).double()
    full.qkv.load_state_dict(attention.qkv.state_dict())
    full.out.load_state_dict(attention.out.state_dict())
    for silent in (*attention.local.parameters(), *attention.gather_bias.parameters()):
        silent.zero_()
    spread = attention.spread_bias[str(N)]
    spread.map.zero_()
    own = 1e4 * torch.eye(16).double()  # lines of 16 places over sides of 16 tokens are those lines
    spread.row.copy_(own.repeat_interleave(16, 0).expand_as(spread.row))
    spread.column.copy_(own.repeat(16, 1).expand_as(spread.column))
    x = torch.randn(2, N, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(attend(attention, x, grid, N), full(x, positions(grid)))


@torch.no_grad()
@pytest.mark.parametrize("grid", [(16, 16), (32, 32), (5, 24)])
def test_tables_are_stretched_as_torch_does(grid):
    tables = seeded((4,)).gather_bias["4"]
    map_ = F.interpolate(tables.map, grid, mode="bilinear", align_corners=False)
    row = F.interpolate(tables.row, grid[0], mode="linear", align_corners=False)
    column = F.interpolate(tables.column, grid[1], mode="linear", align_corners=False)
    expected = map_ + row[:, :, :, None] + column[:, :, None, :]
    torch.testing.assert_close(tables(grid), expected.flatten(2))


@torch.no_grad()
def test_tables_are_the_same_function_of_the_picture_at_512_px():
    """Linear ramps over the picture stay these ramps, tokens at the edges aside."""
    tables = PairBias(1, 1).double()
    tables.map.copy_(((torch.arange(7) + 0.5) / 7)[:, None] + 2 * ((torch.arange(7) + 0.5) / 7))
    tables.row.copy_(3 * (torch.arange(16) + 0.5) / 16)
    tables.column.copy_(-(torch.arange(16) + 0.5) / 16)
    for side in (16, 32):
        got, place = tables((side, side)).unflatten(-1, (side, side))[0, 0], (torch.arange(side) + 0.5).double() / side
        inside = slice(side // 8, -side // 8)
        expected = 4 * place[:, None] + place
        torch.testing.assert_close(got[inside, inside], expected[inside, inside], rtol=0, atol=1e-6)


@torch.no_grad()
def test_each_number_has_tables_of_its_own():
    attention, x = seeded((1, 4)), torch.randn(1, 20, WIDTH, dtype=torch.float64)
    before = {n: attend(attention, x, (4, 5), n) for n in (1, 4)}
    for bias_ in (attention.gather_bias["4"], attention.spread_bias["4"]):
        for table in bias_.parameters():
            table.add_(torch.randn_like(table))
    assert torch.equal(attend(attention, x, (4, 5), 1), before[1])
    assert not torch.allclose(attend(attention, x, (4, 5), 4), before[4])


@torch.no_grad()
def test_it_runs_in_bf16():
    attention, x = seeded((4,)), torch.randn(2, 35, WIDTH, dtype=torch.float64)
    exact = attend(attention, x, (5, 7), 4)
    places = [rotary_positions("halves", (5, 7), 12, 1.0, x.device, torch.bfloat16, cells) for cells in (None, (2, 2))]
    half = attention.to(torch.bfloat16)(x.bfloat16(), (5, 7), *places, 4)
    assert half.dtype == torch.bfloat16
    assert (half.double() - exact).norm() < 0.05 * exact.norm()


@torch.no_grad()
def test_it_runs_under_autocast():
    attention, x = seeded((4,)).float(), torch.randn(2, 35, WIDTH)
    places = [rotary_positions("halves", (5, 7), 12, 1.0, x.device, torch.float32, cells) for cells in (None, (2, 2))]
    exact = attention(x, (5, 7), *places, 4)
    with torch.autocast("cpu", torch.bfloat16):
        half = attention(x, (5, 7), *places, 4)
    assert (half - exact).norm() < 0.05 * exact.norm()


def test_initialisation_is_as_the_table_says():
    torch.manual_seed(0)
    model = DiT(replace(MEDIATED, width=96))
    for block in model.blocks:
        attention = block.self_attention
        assert (attention.out.weight == 0).all()
        assert (attention.local.bias == 0).all()
        assert attention.local.weight.abs().max() <= 1 / 3
        assert attention.local.weight.std().item() == pytest.approx(3**-1.5, rel=0.1)
        tables = [*attention.gather_bias.parameters(), *attention.spread_bias.parameters()]
        assert len(tables) == 18
        assert torch.cat([t.flatten() for t in tables]).std().item() == pytest.approx(0.02, rel=0.05)


def inputs(images: int = 2, grid: Grid = (5, 7)) -> tuple[Tensor, Tensor, PackedText]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(images, 3, grid[0] * 2, grid[1] * 2, dtype=torch.float64, generator=generator)
    texts = [torch.randn(n, 10, dtype=torch.float64, generator=generator) for n in (5, 1, 3)[:images]]
    return latent, torch.full((images,), 400.0), PackedText.pack(texts)


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 4, 16])
def test_the_backbone_attends_through_so_many(n):
    """The backbone gives each block the grid, and the mediators their cells' centres."""
    torch.manual_seed(0)
    model, seen = DiT(replace(MEDIATED, position_scale=(2.0, 0.5))).double(), []
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    for block in model.blocks:
        block.self_attention.register_forward_hook(lambda layer, a, out: seen.append((layer, a, out)))
    predict(model, *inputs(), budget=ComputeBudget.of(mediators=n))
    assert len(seen) == 3
    for attention, (x, grid, rotary, rotary_mediators, number), out in list(seen):
        assert (grid, number) == ((5, 7), n)
        width, side = WIDTH // HEADS, square(n)
        own = rotary_positions("halves", grid, width, (2.0, 0.5), x.device, x.dtype)
        coarse = rotary_positions("halves", grid, width, (2.0, 0.5), x.device, x.dtype, side)
        assert torch.equal(rotary.cos_Nd, own.cos_Nd) and torch.equal(rotary.sin_Nd, own.sin_Nd)
        assert torch.equal(rotary_mediators.sin_Nd, coarse.sin_Nd) and len(coarse.sin_Nd) == n
        assert torch.equal(attention(x, grid, own, coarse, n), out)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"numbers": (4, 15)}, "mediators.numbers: 15 is not the square of a whole number"),
        ({"numbers": (0, 4)}, "mediators.numbers: 0 is not the square of a whole number"),
        ({"numbers": (16, 4)}, r"mediators.numbers: \[16, 4\] must be different numbers, the fewest first"),
        ({"numbers": (4, 4)}, r"mediators.numbers: \[4, 4\] must be different numbers"),
        ({"numbers": ()}, r"mediators.numbers: \[\] must be different numbers"),
        ({"attention": "linear"}, "attention: 'linear' is none of full, mediators"),
    ],
)
def test_refuses_what_it_cannot_build_in_one_line(change, line):
    section = MediatorsSection(change["numbers"]) if "numbers" in change else MEDIATED.mediators
    config = replace(MEDIATED, mediators=section, attention=change.get("attention", "mediators"))
    (problem,) = config.problems()
    assert "\n" not in problem
    with pytest.raises(ValueError, match=line):
        DiT(config)


def test_refuses_pictures_too_small_for_the_mediators():
    torch.manual_seed(0)
    expected = (
        r"^mediators.numbers: 16 \(4 × 4\) do not fit 3 × 7 tokens; leave out the largest, or use larger pictures$"
    )
    with pytest.raises(ValueError, match=expected):
        predict(DiT(MEDIATED).double(), *inputs(grid=(3, 7)))


@pytest.mark.parametrize("name", [n for n, c in PRESETS.items() if c.attention == "mediators"])
def test_presets(name):
    assert PRESETS[name].problems() == PRESETS[name].grid_problems((16, 16)) == []
