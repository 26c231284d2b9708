"""Patches against a convolution, rotary positions against complex numbers, sinusoids and projections written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.models.embeddings import PatchEmbed, TextProjection, TimeEmbed, rotary_positions, sincos_positions

CPU = torch.device("cpu")


def test_patch_embed_is_a_strided_convolution():
    torch.manual_seed(0)
    embed = PatchEmbed(channels=3, patch=2, width=10)
    latent = torch.randn(2, 3, 8, 6)
    kernel = embed.proj.weight.reshape(10, 3, 2, 2)  # [D, C, p, p], as the release stores it
    expected = F.conv2d(latent, kernel, embed.proj.bias, stride=2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(latent), expected)


def turned(layout: str, x_BhNd: torch.Tensor, grid: tuple[int, int], scales: tuple[float, float]) -> torch.Tensor:
    """Rotary positions as a product of complex numbers, token by token: entry k of a part turns with entry k + half."""
    coordinates = {"halves": ("row", "column"), "thirds": ("time", "row", "column")}[layout]
    parts = []
    for name, part in zip(coordinates, x_BhNd.chunk(len(coordinates), dim=-1), strict=True):
        width = part.shape[-1]
        z = torch.complex(*part.double().chunk(2, dim=-1))
        for token in range(grid[0] * grid[1]):
            row, column = token // grid[1] / scales[0], token % grid[1] / scales[1]
            position = {"time": 0, "row": row, "column": column}[name]
            for k in range(width // 2):
                angle = position / 10000 ** (2 * k / width)
                z[..., token, k] *= complex(math.cos(angle), math.sin(angle))
        parts += [z.real, z.imag]
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize(("scale", "scales"), [(1.0, (1, 1)), (2.0, (2, 2)), ((2.0, 0.75), (2, 0.75))])
@pytest.mark.parametrize("layout", ["halves", "thirds"])
def test_rotary_against_complex_numbers(layout, scale, scales):
    """Rows and columns are divided by the scale, or each by its own."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5 * 4, 24)
    rotary = rotary_positions(layout, (5, 4), 24, scale, CPU, torch.float32)
    torch.testing.assert_close(rotary.turn(x).double(), turned(layout, x, (5, 4), scales), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["halves", "thirds"])
def test_rotary_keeps_lengths_and_the_origin(layout):
    x = torch.randn(1, 2, 12, 24)
    y = rotary_positions(layout, (3, 4), 24, 1.0, CPU, torch.float32).turn(x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(y[:, :, 0], x[:, :, 0])
    assert not torch.allclose(y[:, :, 1:], x[:, :, 1:])


def test_the_time_of_an_image_is_0():
    x = torch.randn(1, 1, 12, 24)
    y = rotary_positions("thirds", (3, 4), 24, 1.0, CPU, torch.float32).turn(x)
    assert torch.equal(y[..., :8], x[..., :8])


@pytest.mark.parametrize("layout", ["halves", "thirds"])
def test_position_scale_2_on_a_doubled_grid(layout):
    """Every second row and column of the 512 px grid has the angles of the 256 px grid."""
    small = rotary_positions(layout, (3, 4), 24, 1.0, CPU, torch.float32)
    large = rotary_positions(layout, (6, 8), 24, 2.0, CPU, torch.float32)
    for name in ("cos_Nd", "sin_Nd"):
        every_second = getattr(large, name).unflatten(0, (6, 8))[::2, ::2]
        torch.testing.assert_close(every_second, getattr(small, name).unflatten(0, (3, 4)))


@pytest.mark.parametrize(("scale", "scales"), [(1.0, (1, 1)), ((2.0, 0.75), (2, 0.75))])
def test_absolute_positions_written_out(scale, scales):
    """Sines and cosines of the row, then of the column, each divided by its scale."""
    got = sincos_positions((3, 5), 16, scale, CPU, torch.float64)
    frequencies = [10000 ** (-k / 4) for k in range(4)]
    expected = [
        [
            wave(position * f)
            for position in (token // 5 / scales[0], token % 5 / scales[1])
            for wave in (math.sin, math.cos)
            for f in frequencies
        ]
        for token in range(15)
    ]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)


def test_rotary_angles_stay_exact_in_bf16():
    """Angles are made in fp32 and only their cosines and sines rounded."""
    exact = rotary_positions("halves", (64, 64), 96, 1.0, CPU, torch.float32)
    rounded = rotary_positions("halves", (64, 64), 96, 1.0, CPU, torch.bfloat16)
    assert rounded.cos_Nd.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.cos_Nd.float(), exact.cos_Nd, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(rounded.sin_Nd.float(), exact.sin_Nd, rtol=2**-8, atol=1e-6)


def test_time_embed_has_cosines_first():
    torch.manual_seed(0)
    embed = TimeEmbed(8).double()
    waves = torch.tensor(
        [
            [wave(t * 10000 ** (-k / 128)) for wave in (math.cos, math.sin) for k in range(128)]
            for t in (0.0, 0.5, 250.0, 1000.0)
        ],
        dtype=torch.float64,
    )
    first, second = embed.linear_1, embed.linear_2
    expected = F.linear(F.silu(F.linear(waves, first.weight, first.bias)), second.weight, second.bias)
    got = embed(torch.tensor([0.0, 0.5, 250.0, 1000.0]))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)  # angles up to 1000 in fp32


def test_time_embed_in_bf16_tells_near_timesteps_apart():
    """The sinusoids are made in fp32: bf16 cannot count to 1000 in ones."""
    embed = TimeEmbed(8).to(torch.bfloat16)
    a, b = embed(torch.tensor([998.0, 999.0]))
    assert a.dtype == torch.bfloat16
    assert not torch.equal(a, b)


def test_text_projection():
    torch.manual_seed(0)
    project, tokens = TextProjection(6, 8), torch.randn(5, 6)
    h = tokens @ project.linear_1.weight.T + project.linear_1.bias
    gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    torch.testing.assert_close(project(tokens), gelu @ project.linear_2.weight.T + project.linear_2.bias)
