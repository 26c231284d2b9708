"""Q-MaskGen against a reference that really concatenates the previous mask, and the ways of its dropout and gradients."""

from itertools import product

import pytest
import torch
from torch import nn

from pretrain.models.dit import Prediction
from pretrain.models.focusdit.mask import KINDS, QueryMask, dropout_factors

WIDTH, HIDDEN = 24, (16, 12, 8, 4)
B, N = 3, 7


def run(module: QueryMask, x: torch.Tensor, previous: torch.Tensor, time: torch.Tensor, timestep: torch.Tensor):
    """The mask, with the time read as each block does in training."""
    return module(x, previous, *module.embed_time(time, timestep))


def seeded(kind: str) -> QueryMask:
    """A query mask with random parameters, so that no unit and no previous mask is without effect."""
    module = QueryMask(WIDTH, kind, HIDDEN).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return module


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, previous mask, time embedding, timestep."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, N, WIDTH, dtype=torch.float64, generator=generator)
    previous = torch.rand(B, N, 1, dtype=torch.float64, generator=generator)
    time = torch.randn(B, WIDTH, dtype=torch.float64, generator=generator)
    return x, previous, time, torch.tensor([0.0, 417.9, 1000.0])


def reference(
    module: QueryMask, x: torch.Tensor, previous: torch.Tensor, time: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """Eq. 2, one image at a time: norm, then five linear maps, each of [h, previous mask]."""
    results = []
    for b in range(len(x)):
        if module.kind == "release":
            row = module.time_table.weight[int(timestep[b])]
            row = row * torch.sigmoid(row)
            both = module.time_linear.weight @ row + module.time_linear.bias
            scale, shift = both[:WIDTH], both[WIDTH:]
        else:
            scale, shift = module.time_shift[0] + time[b], module.time_shift[1] + time[b]
        centred = x[b] - x[b].mean(-1, keepdim=True)
        h = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + scale) + shift
        stack = [*module.layers, module.last]
        assert len(stack) == 5
        for number, layer in enumerate(stack):
            linear = nn.Linear(layer.linear.in_features + 1, layer.linear.out_features).double()
            linear.weight = nn.Parameter(torch.cat([layer.linear.weight, layer.premask[:, None]], dim=1))
            linear.bias = layer.linear.bias
            h = linear(torch.cat([h, previous[b]], dim=-1))
            h = h.clamp(min=0) if number < 4 else h
        results.append(1 / (1 + torch.exp(-h)))
    return torch.stack(results)


@pytest.mark.parametrize("kind", ["release", "adaln_single"])
def test_against_the_reference(kind):
    module, given = seeded(kind), inputs()
    got = run(module, *given)
    assert got.shape == (B, N, 1)
    torch.testing.assert_close(got, reference(module, *given))
    assert 0 < got.min() < got.max() < 1
    assert got.std() > 0.01, "the reference would be met by a constant"


@pytest.mark.parametrize("layer", range(5))
def test_the_previous_mask_enters_each_layer(layer):
    module, (x, previous, time, timestep) = seeded("release"), inputs()
    before = run(module, x, previous, time, timestep)
    chosen = [*module.layers, module.last][layer]
    with torch.no_grad():
        chosen.premask.add_(0.5)
    assert not torch.allclose(run(module, x, previous, time, timestep), before)
    for other in [*module.layers, module.last]:
        nn.init.zeros_(other.premask)
    without = run(module, x, previous, time, timestep)
    assert torch.equal(run(module, x, torch.rand_like(previous), time, timestep), without)


def test_the_releases_table_is_indexed_by_truncated_timesteps():
    module, (x, previous, time, _) = seeded("release"), inputs()
    assert module.time_table.num_embeddings == 1001

    def at(*timesteps: float) -> torch.Tensor:
        return run(module, x, previous, time, torch.tensor(timesteps))

    assert torch.equal(at(0.999, 417.0, 1000.0), at(0.0, 417.999, 1000.0))
    changed = at(1.0, 416.999, 999.999)
    for one, other in zip(at(0.0, 417.0, 1000.0), changed, strict=True):
        assert not torch.allclose(one, other)


def test_the_release_ignores_the_shared_time_embedding_and_adaln_single_the_timestep():
    x, previous, time, timestep = inputs()
    release, single = seeded("release"), seeded("adaln_single")
    assert torch.equal(run(release, x, previous, time, timestep), run(release, x, previous, time + 1, timestep))
    assert torch.equal(run(single, x, previous, time, timestep), run(single, x, previous, time, timestep / 2))
    assert not torch.allclose(run(single, x, previous, time, timestep), run(single, x, previous, time + 1, timestep))


@pytest.mark.parametrize("kind", ["release", "adaln_single"])
def test_the_order_is_scale_then_shift(kind):
    """With a scale of −1 the tokens have no effect; with a shift of −1 they have."""
    module, (x, previous, time, timestep) = seeded(kind), inputs()
    with torch.no_grad():
        if kind == "release":
            module.time_linear.weight.zero_()
            module.time_linear.bias.copy_(torch.cat([-torch.ones(WIDTH), torch.zeros(WIDTH)]))
        else:
            time = torch.zeros_like(time)
            module.time_shift.copy_(torch.stack([-torch.ones(WIDTH), torch.zeros(WIDTH)]))
    constant = run(module, x, previous, time, timestep)
    assert torch.equal(constant, run(module, torch.randn_like(x), previous, time, timestep))
    with torch.no_grad():
        if kind == "release":
            module.time_linear.bias.copy_(module.time_linear.bias.roll(WIDTH))
        else:
            module.time_shift.copy_(module.time_shift.flip(0))
    assert not torch.allclose(
        run(module, x, previous, time, timestep), run(module, torch.randn_like(x), previous, time, timestep)
    )


def test_dropout_acts_on_the_mask_itself():
    module, (x, previous, time, timestep) = seeded("adaln_single"), inputs()
    keep = dropout_factors(torch.rand(x.shape[:2]), 1, 0.25)[0, ..., None].to(x)
    whole = run(module, x, previous, time, timestep)
    dropped = module(x, previous, *module.embed_time(time, timestep), keep)
    torch.testing.assert_close(dropped, whole * keep)


def test_dropout_from_uniform_numbers():
    """Each image's numbers are for its blocks in turn; what is kept is scaled, so that the mean stays 1."""
    uniform_BX = torch.tensor([[0.0, 0.2, 0.25, 0.3, 0.9, 0.1], [0.9, 0.9, 0.9, 0.2, 0.2, 0.2]])
    keep_KBN = dropout_factors(uniform_BX, 2, 0.25)
    expected = torch.tensor([[[0, 0, 1], [1, 1, 1]], [[1, 1, 0], [0, 0, 0]]]) / 0.75
    torch.testing.assert_close(keep_KBN, expected)
    assert keep_KBN.dtype == torch.float32
    evenly = (torch.arange(1000)[None] + 0.5) / 1000
    assert dropout_factors(evenly, 10, 0.25).mean().item() == pytest.approx(1)


def test_gradients_reach_the_previous_mask():
    """A chain of two: the first block's parameters learn through the second block's mask."""
    first, second = seeded("adaln_single"), seeded("adaln_single")
    x, previous, time, timestep = inputs()
    previous.requires_grad_()
    assert torch.autograd.gradcheck(lambda m: run(first, x, m, time, timestep), previous)
    chained = run(second, x, run(first, x, previous, time, timestep), time, timestep)
    chained.sum().backward()
    assert previous.grad.abs().min() > 0
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in first.parameters())


def test_a_fresh_previous_mask_column_is_0():
    module = QueryMask(WIDTH, "release", HIDDEN)
    assert all((layer.premask == 0).all() for layer in [*module.layers, module.last])


def test_without_the_previous_mask_its_columns_are_0():
    """Table 3, rows B and C."""
    with_it = seeded("adaln_single")
    without = QueryMask(WIDTH, "adaln_single", HIDDEN, previous=False).double()
    without.load_state_dict({k: v for k, v in with_it.state_dict().items() if not k.endswith("premask")})
    x, previous, time, timestep = inputs()
    with torch.no_grad():
        for layer in [*with_it.layers, with_it.last]:
            layer.premask.zero_()
    assert torch.equal(run(without, x, previous, time, timestep), run(with_it, x, previous, time, timestep))
    assert torch.equal(run(without, x, previous, time, timestep), run(without, x, 0 * previous, time, timestep))


def test_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match=", ".join(KINDS)):
        QueryMask(WIDTH, "hard", HIDDEN)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_statistics_equal_plain_sums_over_the_tokens_that_keep_their_mask(dropout: float) -> None:
    """Two images; with token routing the block in the middle has fewer tokens."""
    torch.manual_seed(0)
    before = [torch.rand(2, tokens) * 0.4 for tokens in (12, 7, 12)]
    factors = [dropout_factors(torch.rand(2, m.shape[1]), 1, dropout)[0] for m in before]
    given = tuple((m * f, (3, 4)) for m, f in zip(before, factors, strict=True))
    prediction = Prediction(torch.zeros(2, 1, 3, 4), given, (3, 4))
    statistics_3KB = prediction.mask_statistics_3KB(dropout)
    assert statistics_3KB is not None and statistics_3KB.shape == (3, 3, 2)
    for k, b in product(range(3), range(2)):
        kept = [m.item() for m, factor in zip(before[k][b], factors[k][b], strict=True) if factor]
        mean = sum(kept) / len(kept)
        variance = sum((m - mean) ** 2 for m in kept) / len(kept)
        low = sum(m < 0.15 for m in kept) / len(kept)
        assert statistics_3KB[:, k, b].tolist() == pytest.approx([mean, variance, low], rel=1e-5)


def test_there_are_no_statistics_without_query_masks() -> None:
    assert Prediction(torch.zeros(2, 1, 3, 4), (), (3, 4)).mask_statistics_3KB() is None
