"""The backbone against an independent plain-torch reference, and its invariances.

Letters: B images, C latent channels, D width.
"""

import cmath
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F
from backbones import Storages, predict, predict_cached
from torch import Tensor

from pretrain.models import CachedConditioning, DiT, DiTConfig, PackedText
from pretrain.models.focusdit.mask import dropout_factors
from pretrain.models.mixers.base import TokenState

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = DiTConfig(
    width=24, heads=2, depth=3, patch=2, latent_channels=3, text_width=10, shared_width=2, mask_hidden=(16, 12, 8, 4)
)
KINDS = list(product(("none", "release", "adaln_single"), ("uniform", "shared", "tapered")))


def build(config: DiTConfig = PLAIN, seed: int = 0) -> DiT:
    """A model in fp64 with random parameters, as after some training: nothing is 0. The same whatever ran before."""
    torch.manual_seed(seed)
    model = DiT(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return model


def inputs(images: int = 3, rows: int = 4, columns: int = 6, lengths=(5, 1, 3)) -> tuple[Tensor, Tensor, PackedText]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(images, 3, rows * 2, columns * 2, dtype=torch.float64, generator=generator)
    timestep = 1000 * torch.rand(images, generator=generator)
    texts = [torch.randn(n, 10, dtype=torch.float64, generator=generator) for n in lengths[:images]]
    return latent, timestep, PackedText.pack(texts)


def pick(latent: Tensor, timestep: Tensor, text: PackedText, *which: int) -> tuple[Tensor, Tensor, PackedText]:
    """A batch of the chosen images."""
    index = list(which)
    return latent[index], timestep[index], PackedText.pack([text.captions()[i] for i in index])


def reference(model: DiT, latent_CHW: Tensor, timestep: Tensor, caption_LE: Tensor) -> Tensor:
    """The backbone for one image and `mask: none`, in plain torch, head by head and token by token."""
    heads, p = model.config.heads, model.config.patch
    C, H, W = latent_CHW.shape
    rows, columns = H // p, W // p

    def linear(name: str, x: Tensor) -> Tensor:
        module = model.get_submodule(name)
        return x @ module.weight.T + (0 if module.bias is None else module.bias)

    def norm(x: Tensor, eps: float = model.config.norm_eps) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    def turn(x_Nd: Tensor) -> Tensor:
        """Each token's first half turns by its row, its second half by its column."""
        x_Nd, quarter = x_Nd.clone(), x_Nd.shape[-1] // 4
        for token in range(rows * columns):
            for start, position in ((0, token // columns), (2 * quarter, token % columns)):
                for k in range(quarter):
                    a, b = start + k, start + k + quarter
                    z = cmath.exp(1j * position * 10000 ** (-k / quarter))
                    old_a, old_b = x_Nd[token, a].clone(), x_Nd[token, b].clone()
                    x_Nd[token, a] = z.real * old_a - z.imag * old_b
                    x_Nd[token, b] = z.real * old_b + z.imag * old_a
        return x_Nd

    def attention(q: Tensor, k: Tensor, v: Tensor, rotate: bool) -> Tensor:
        results = []
        for q_h, k_h, v_h in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
            if rotate:
                q_h, k_h = turn(q_h), turn(k_h)
            results.append(torch.softmax(q_h @ k_h.T / q_h.shape[-1] ** 0.5, -1) @ v_h)
        return torch.cat(results, -1)

    angle = timestep.double() * 10000 ** (-torch.arange(128).double() / 128)
    time = linear("time_embed.linear_1", torch.cat([angle.cos(), angle.sin()]))
    time = linear("time_embed.linear_2", F.silu(time))
    modulation_6D = linear("time_modulation", F.silu(time)).reshape(6, -1)
    text = linear(
        "text_projection.linear_2", F.gelu(linear("text_projection.linear_1", caption_LE), approximate="tanh")
    )
    patches = [latent_CHW[:, r * p : r * p + p, c * p : c * p + p] for r in range(rows) for c in range(columns)]
    x = linear("patch_embed.proj", torch.stack([patch.reshape(-1) for patch in patches]))

    for i, block in enumerate(model.blocks):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.scale_shift_table + modulation_6D
        q, k, v = linear(f"blocks.{i}.self_attention.qkv", norm(x) * (1 + scale_msa) + shift_msa).chunk(3, -1)
        x = x + gate_msa * linear(f"blocks.{i}.self_attention.out", attention(q, k, v, rotate=True))
        k, v = linear(f"blocks.{i}.cross_attention.kv", text).chunk(2, -1)
        seen = attention(linear(f"blocks.{i}.cross_attention.q", x), k, v, rotate=False)
        x = x + linear(f"blocks.{i}.cross_attention.out", seen)
        z = norm(x) * (1 + scale_mlp) + shift_mlp
        update = linear(f"blocks.{i}.ffn.value", F.gelu(linear(f"blocks.{i}.ffn.key", z), approximate="tanh"))
        x = x + gate_mlp * update

    shift, scale = model.final.scale_shift_table + time
    output, result = linear("final.proj", norm(x, 1e-6) * (1 + scale) + shift), torch.empty_like(latent_CHW)
    for token, (row, column, channel) in product(range(len(output)), product(range(p), range(p), range(C))):
        y, z = token // columns * p + row, token % columns * p + column
        result[channel, y, z] = output[token, (row * p + column) * C + channel]
    return result


@torch.no_grad()
@pytest.mark.parametrize("norm_eps", [1e-6, 100.0])
def test_the_adaln_single_backbone_against_the_reference(norm_eps):
    """`norm_eps` is of the blocks' LayerNorms, not of the last one: large enough to tell beside large tokens."""
    model, (latent, _, text) = build(replace(PLAIN, norm_eps=norm_eps)), inputs()
    timestep = torch.tensor([3.5, 0.0, 11.0])  # small: the sinusoids' angles are made in fp32
    got = predict(model, latent, timestep, text)
    assert got.masks_KBN is None
    assert got.sample_BCHW.std() > 0.1
    for b in range(3):
        expected = reference(model, latent[b], timestep[b], text.captions()[b])
        torch.testing.assert_close(got.sample_BCHW[b], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("ffn", ["uniform", "shared", "tapered"])
@pytest.mark.parametrize("mask", ["release", "adaln_single"])
def test_with_masks_of_ones_it_is_the_plain_dit(mask, ffn):
    focus = build(replace(PLAIN, mask=mask, ffn=ffn))
    plain = DiT(replace(PLAIN, ffn=ffn)).double().eval()
    rest = plain.load_state_dict(focus.state_dict(), strict=False)
    assert not rest.missing_keys
    assert all(".query_mask." in name for name in rest.unexpected_keys)
    given = inputs()
    masked, expected = predict(focus, *given), predict(plain, *given).sample_BCHW
    assert not torch.allclose(masked.sample_BCHW, expected)
    assert masked.masks_KBN.shape == (3, 3, 24)

    for block in focus.blocks:
        block.query_mask.last.linear.bias.fill_(1e3)
    ones = predict(focus, *given)
    assert (ones.masks_KBN == 1).all()
    torch.testing.assert_close(ones.sample_BCHW, expected, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("mask", ["release", "adaln_single"])
def test_masks_of_zeros_silence_the_ffn(mask):
    """Eq. 3: the mask weights the FFN's output, so that without it no FFN matters."""
    model, given = build(replace(PLAIN, mask=mask, ffn="shared")), inputs()
    for block in model.blocks:
        block.query_mask.last.linear.bias.fill_(-1e3)
    before = predict(model, *given)
    assert (before.masks_KBN == 0).all()
    for parameter in [*model.shared_expert.parameters(), *(p for b in model.blocks for p in b.ffn.parameters())]:
        parameter.add_(1)
    assert torch.equal(predict(model, *given).sample_BCHW, before.sample_BCHW)


@torch.no_grad()
@pytest.mark.parametrize("mask", ["release", "adaln_single"])
def test_each_block_gives_its_mask_to_the_next_and_the_first_gets_ones(mask):
    """The masks, remade block by block from what the query masks were given."""
    model, given, seen = build(replace(PLAIN, mask=mask)), inputs(), []
    for block in model.blocks:
        block.query_mask.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    masks_KBN = predict(model, *given).masks_KBN
    assert (seen[0] == 1).all()
    for block in (1, 2):
        assert torch.equal(seen[block].squeeze(-1), masks_KBN[block - 1])
    assert masks_KBN.std() > 0.01


def test_gradients_flow_from_mask_to_mask():
    """Not detached: with silent FFNs the chain of masks alone links the last block's mask to the first's parameters."""
    model = build(replace(PLAIN, mask="adaln_single"))
    for block in model.blocks:
        torch.nn.init.zeros_(block.ffn.value.weight)
        torch.nn.init.zeros_(block.ffn.value.bias)
    predict(model, *inputs()).masks_KBN[-1].sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.blocks[0].query_mask.parameters())


@torch.no_grad()
@pytest.mark.parametrize("shared_width", [1, 3])
def test_the_shared_layout_is_the_uniform_one_with_common_entries(shared_width):
    """Eq. 5: the same model, its blocks' vocabularies made of their own entries and the shared ones."""
    config = replace(PLAIN, mask="adaln_single", ffn="shared", shared_width=shared_width)
    shared, uniform = build(config), DiT(replace(config, ffn="uniform")).double().eval()
    state = shared.state_dict()
    expert = {name: state.pop(f"shared_expert.{name}") for name in ("key.weight", "key.bias", "value.weight")}
    for i in range(config.depth):
        for name, entries in expert.items():
            state[f"blocks.{i}.ffn.{name}"] = torch.cat(
                [state[f"blocks.{i}.ffn.{name}"], entries], dim=1 if name == "value.weight" else 0
            )
    uniform.load_state_dict(state)
    torch.testing.assert_close(predict(shared, *inputs()).sample_BCHW, predict(uniform, *inputs()).sample_BCHW)


@torch.no_grad()
def test_the_query_mask_reads_the_cross_attentions_output():
    """Eq. 2: in one block, what the mask is given is x after self- and cross-attention."""
    model, seen = build(replace(PLAIN, mask="release", depth=1)), {}
    block = model.blocks[0]
    block.cross_attention.register_forward_hook(lambda _, a, out: seen.update(before=a[0], cross=out))
    block.query_mask.register_forward_pre_hook(lambda _, a: seen.update(mask=a[0]))
    predict(model, *inputs())
    assert torch.equal(seen["mask"], seen["before"] + seen["cross"])


@torch.no_grad()
@pytest.mark.parametrize(("mask", "ffn"), KINDS)
def test_a_result_does_not_depend_on_batch_order_or_neighbours(mask, ffn):
    model, given = build(replace(PLAIN, mask=mask, ffn=ffn)), inputs()
    together = predict(model, *given).sample_BCHW
    turned = predict(model, *pick(*given, 2, 0, 1)).sample_BCHW
    torch.testing.assert_close(turned, together[[2, 0, 1]])
    for b in range(3):
        torch.testing.assert_close(predict(model, *pick(*given, b)).sample_BCHW, together[b : b + 1])


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(5, 1, 3), (4, 4, 4), (2, 2, 5)])
@pytest.mark.parametrize(("mask", "ffn"), KINDS)
def test_caches_change_nothing(mask, ffn, lengths):
    """Captions without padding, one attention for each length, give what the padded rectangle gives."""
    model, (latent, _, text) = build(replace(PLAIN, mask=mask, ffn=ffn)), inputs(lengths=lengths)
    timestep = torch.full((3,), 412.0, dtype=torch.float64)
    assert len(model.encode_text(text)) == 3
    got, expected = predict_cached(model, latent, timestep, text), predict(model, latent, timestep, text)
    torch.testing.assert_close(got.sample_BCHW, expected.sample_BCHW)
    torch.testing.assert_close(got.masks_KBN, expected.masks_KBN)


@torch.no_grad()
def test_text_caches_add_up_to_the_cache_of_all_captions():
    """Text and repeated null text, as guidance needs them."""
    model, (latent, _, text) = build(replace(PLAIN, mask="release")), inputs()
    timestep = torch.full((3,), 412.0, dtype=torch.float64)
    null = PackedText.pack([torch.randn(3, 10, dtype=torch.float64)])  # as long as its neighbour: one run or two
    both = latent.repeat(2, 1, 1, 1), timestep.repeat(2)
    expected = predict(model, *both, text + null * 3).sample_BCHW
    assert (expected[:3] - expected[3:]).abs().max() > 1e-3
    (time,) = model.embed_times(timestep[:1])
    for cache in (model.encode_text(text) + model.encode_text(null) * 3, model.encode_text(text + null * 3)):
        got = model(both[0], CachedConditioning(time, cache))
        torch.testing.assert_close(got.sample_BCHW, expected)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(5, 1, 3), (4, 4, 4)])
def test_the_cache_of_a_prompt_does_not_depend_on_the_others(lengths):
    model, given = build(replace(PLAIN, mask="release", ffn="shared")), inputs(lengths=lengths)
    latent, _, text = given
    together = predict_cached(model, latent, 412.0, text).sample_BCHW
    for b in range(3):
        image, _, caption = pick(*given, b)
        torch.testing.assert_close(predict_cached(model, image, 412.0, caption).sample_BCHW, together[b : b + 1])


@torch.no_grad()
def test_everything_given_matters():
    model, (latent, timestep, text) = build(), inputs()
    base = predict(model, latent, timestep, text).sample_BCHW
    other_text = text.with_tokens(text.tokens_ME + 0.5)
    for changed in (
        predict(model, latent + 0.5, timestep, text),
        predict(model, latent, timestep / 2, text),
        predict(model, latent, timestep, other_text),
    ):
        assert (changed.sample_BCHW - base).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("absolute", ["none", "sincos"])
def test_position_scale_is_used(absolute):
    """Of rows and columns each; twice the same is that one number."""
    model = build(replace(PLAIN, absolute=absolute))

    def scaled(scale: float | tuple[float, float]) -> Tensor:
        other = DiT(replace(model.config, position_scale=scale)).double().eval()
        other.load_state_dict(model.state_dict())
        return predict(other, *inputs()).sample_BCHW

    assert torch.equal(scaled((2.0, 2.0)), scaled(2.0))
    results = [scaled(scale) for scale in (1.0, 2.0, (1.0, 2.0), (2.0, 1.0))]
    for one, other in combinations(results, 2):
        assert (one - other).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("mask", "ffn"), KINDS)
def test_a_removed_ffn_is_one_that_adds_nothing(mask, ffn):
    """Its own expert's parameters are gone; its block's query mask still goes on to the next."""
    whole = build(replace(PLAIN, mask=mask, ffn=ffn))
    pruned = DiT(replace(whole.config, removed_ffns=(1,))).double().eval()
    rest = pruned.load_state_dict(whole.state_dict(), strict=False)
    assert not rest.missing_keys
    assert rest.unexpected_keys == [f"blocks.1.ffn.{n}" for n in whole.blocks[1].ffn.state_dict()]
    got = predict(pruned, *inputs())
    assert not torch.allclose(got.sample_BCHW, predict(whole, *inputs()).sample_BCHW)

    whole.blocks[1]._vocabulary = lambda shared: torch.zeros_like
    expected = predict(whole, *inputs())
    torch.testing.assert_close(got.sample_BCHW, expected.sample_BCHW, rtol=0, atol=0)
    torch.testing.assert_close(got.masks_KBN, expected.masks_KBN, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize(("mask", "ffn"), KINDS)
def test_a_fresh_models_blocks_change_nothing(mask, ffn):
    torch.manual_seed(0)
    model, (latent, timestep, text) = DiT(replace(PLAIN, mask=mask, ffn=ffn)).double(), inputs()
    fresh = predict(model, latent, timestep, text).sample_BCHW
    assert fresh.std() > 0.1
    untouched = TokenState(model.patch_embed(latent), (4, 6), torch.ones(3, 24, 1))
    torch.testing.assert_close(model.final(untouched, model.time_embed(timestep)), fresh)


@torch.no_grad()
def test_a_fresh_block_ignores_the_text_and_fresh_masks_are_near_0_88():
    torch.manual_seed(0)
    model = DiT(replace(PLAIN, mask="release")).double().eval()
    latent, timestep, text = inputs()
    got = predict(model, latent, timestep, text)
    assert torch.equal(got.sample_BCHW, predict(model, latent, timestep, text.with_tokens(-text.tokens_ME)).sample_BCHW)
    assert got.masks_KBN.median().item() == pytest.approx(0.88, abs=0.1)
    for block in model.blocks:
        torch.nn.init.zeros_(block.query_mask.last.linear.weight)
    assert predict(model, latent, timestep, text).masks_KBN.mean().item() == pytest.approx(0.8808, abs=1e-4)


def test_initialisation_is_as_the_table_says():
    torch.manual_seed(0)
    D = 192
    model = DiT(replace(PLAIN, width=D, mask="release", ffn="shared"))
    for name, p in model.named_parameters():
        if name.endswith("query_mask.last.linear.bias"):
            assert (p == 2).all(), name
        elif name.endswith(("bias", "premask", "attention.out.weight", ".value.weight")):
            assert (p == 0).all(), name
        elif name.endswith("scale_shift_table"):
            gates = [2, 5] if len(p) == 6 else []
            assert (p[gates] == 1).all(), name
            rest = p[[i for i in range(len(p)) if i not in gates]]
            assert rest.std().item() == pytest.approx(D**-0.5, rel=0.15), name
        elif name.endswith("time_table.weight"):
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            assert name.endswith("weight"), name
            bound = (6 / sum(p.shape)) ** 0.5
            assert p.abs().max() <= bound, name
            assert p.numel() < 100 or p.std().item() == pytest.approx(bound / 3**0.5, rel=0.15), name
    single = DiT(replace(PLAIN, mask="adaln_single"))
    assert all((block.query_mask.time_shift == 0).all() for block in single.blocks)


@pytest.mark.parametrize(("mask", "ffn"), KINDS)
def test_recompute_changes_neither_loss_nor_gradients(mask, ffn):
    """Also with dropout."""
    model, (latent, timestep, text) = build(replace(PLAIN, mask=mask, ffn=ffn)).train(), inputs()
    tokens = latent.shape[2] * latent.shape[3] // PLAIN.patch**2
    keep = dropout_factors(torch.rand(len(latent), PLAIN.depth * tokens), PLAIN.depth, 0.3)
    results = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad(set_to_none=True)
        loss = predict(model, latent, timestep, text, keep_KBN=keep).sample_BCHW.square().mean()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for kept, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(kept, recomputed, rtol=0, atol=0)


def test_recompute_keeps_less():
    """Between forward and backward pass: live storages, since saved tensors' hooks do not see recomputed blocks' inputs."""
    model, given = build(replace(PLAIN, ffn="shared")), inputs()

    def kept() -> int:
        with Storages() as storages:
            prediction = predict(model, *given)
        assert prediction.sample_BCHW.requires_grad  # held until here, and with it the graph
        return storages.alive()

    everything = kept()
    model.recompute = True
    assert kept() < 0.5 * everything


@pytest.mark.parametrize(("mask", "ffn"), KINDS)
def test_every_parameter_learns(mask, ffn):
    model = build(replace(PLAIN, mask=mask, ffn=ffn))
    predict(model, *inputs()).sample_BCHW.square().mean().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert still == []


def test_the_last_layers_order_is_row_column_channel():
    model, (latent, timestep, text) = build(), inputs()
    torch.nn.init.zeros_(model.final.proj.weight)
    model.final.proj.bias.data = torch.arange(12, dtype=torch.float64)
    sample = predict(model, latent, timestep, text).sample_BCHW
    assert sample.shape == latent.shape
    for row, column, channel in product(range(2), range(2), range(3)):
        assert (sample[:, channel, row::2, column::2] == (row * 2 + column) * 3 + channel).all()


@torch.no_grad()
def test_it_runs_in_bf16():
    model, (latent, timestep, text) = build(replace(PLAIN, mask="release", ffn="shared")), inputs()
    exact = predict(model, latent, timestep, text).sample_BCHW
    half = predict(model.to(torch.bfloat16), latent.bfloat16(), timestep, text.to("cpu", torch.bfloat16)).sample_BCHW
    assert half.dtype == torch.bfloat16
    assert (half.double() - exact).norm() < 0.2 * exact.norm()


@pytest.mark.parametrize(("height", "width"), [(7, 8), (8, 9)])
def test_refuses_a_latent_that_the_patch_does_not_divide(height, width):
    latent, timestep, text = inputs()
    with pytest.raises(ValueError, match=rf"\({height}, {width}\) is not divisible by the patch of 2"):
        predict(build(), latent[:, :, :1, :1].expand(-1, -1, height, width), timestep, text)


def test_refuses_latents_timesteps_and_captions_that_differ_in_number():
    model, (latent, timestep, text) = build(), inputs()
    with pytest.raises(ValueError, match="2 timesteps and 3 captions do not match"):
        predict(model, latent, timestep[:2], text)
    for forward in (predict, predict_cached):
        with pytest.raises(ValueError, match="2 latents and the conditioning of 3 do not match"):
            forward(model, latent[:2], timestep, text)


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"mask": "hard", "ffn": "wide", "rotary": "fifths"}, ("mask", "ffn", "rotary")),
        ({"depth": 0, "patch": -2, "position_scale": 0.0}, ("depth", "patch", "position_scale")),
        (
            {"ffn": "shared", "shared_width": 4, "mask_dropout": 1.0, "width": 26},
            ("shared_width", "mask_dropout", "width"),
        ),
        (
            {"mask": "hard", "mask_dropout": -0.1, "ffn": "shared", "shared_width": 0},
            ("mask", "mask_dropout", "shared_width"),
        ),
        ({"rotary": "thirds", "width": 32}, ("width",)),
        (
            {"position_scale": (2.0, 0.0), "norm_eps": 0.0, "removed_ffns": (1, 1)},
            ("position_scale", "norm_eps", "removed_ffns"),
        ),
        ({"position_scale": (-1.0, 2.0), "removed_ffns": (0, 3)}, ("position_scale", "removed_ffns")),
        ({"position_scale": (1.0,)}, ("position_scale",)),
        ({"removed_ffns": (-1,)}, ("removed_ffns",)),
    ],
)
def test_refuses_a_wrong_config_with_all_its_problems(change, fields):
    config = replace(PLAIN, **change)
    assert [p.partition(":")[0] for p in sorted(config.problems())] == sorted(fields)
    with pytest.raises(ValueError, match="cannot be built") as refusal:
        DiT(config)
    for field in fields:
        assert f"{field}: " in str(refusal.value)


@pytest.mark.parametrize("heads_width", [(2, 16), (3, 24), (2, 24)])
def test_accepts_what_it_says_it_accepts(heads_width):
    heads, width = heads_width
    config = replace(PLAIN, heads=heads, width=width, position_scale=(0.5, 3.0), removed_ffns=(2, 0))
    assert config.problems() == []
    DiT(config)


@torch.no_grad()
@pytest.mark.parametrize(("mask", "ffn"), KINDS)
def test_cached_times_are_those_of_each_image(mask, ffn):
    """Embedding several timesteps at once, each for all images, changes nothing."""
    model = build(replace(PLAIN, mask=mask, ffn=ffn))
    latent, _, text = inputs()
    timesteps = torch.tensor([1000.0, 412.7, 0.0], dtype=torch.float64)
    for timestep, time in zip(timesteps, model.embed_times(timesteps), strict=True):
        expected = predict(model, latent, timestep.expand(3), text)
        got = model(latent, CachedConditioning(time, model.encode_text(text)))
        torch.testing.assert_close(got.sample_BCHW, expected.sample_BCHW)
        if mask != "none":
            torch.testing.assert_close(got.masks_KBN, expected.masks_KBN)
