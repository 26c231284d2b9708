"""pretrain/models/cost.py against modules built on the meta device and torch's own FLOP counter; the paper's figures."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.models import PRESETS, DiT, DiTConfig, PackedText
from pretrain.models import __main__ as printed
from pretrain.models.cost import count_flops, count_parameters, ffn_flops, grid_of, training_flops

SMALL = DiTConfig(
    width=48, heads=2, depth=5, patch=2, latent_channels=3, text_width=20, shared_width=3, mask_hidden=(16, 8, 4)
)
KINDS = list(product(("none", "release", "adaln_single"), ("uniform", "shared", "tapered")))
IMAGES, CAPTION = 2, 7


def on_meta(config: DiTConfig) -> DiT:
    with torch.device("meta"):
        return DiT(config)


def parameters_of(model: DiT, *parts: str) -> int:
    """Parameters whose path holds one of the module names `parts`."""
    return sum(p.numel() for name, p in model.named_parameters() if set(parts) & set(name.split(".")))


def inputs(config: DiTConfig, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, PackedText]:
    captions = [torch.zeros(CAPTION, config.text_width, device="meta", requires_grad=True) for _ in range(IMAGES)]
    size = (IMAGES, config.latent_channels, rows * config.patch, columns * config.patch)
    latent = torch.zeros(size, device="meta", requires_grad=True)
    return latent, torch.zeros(IMAGES, device="meta"), PackedText.pack(captions)


def assert_parameters_are_counted(config: DiTConfig) -> None:
    model, counted = on_meta(config), count_parameters(config)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.attention == parameters_of(model, "self_attention", "cross_attention")
    assert counted.ffn == parameters_of(model, "ffn", "shared_expert")
    assert counted.query_mask == parameters_of(model, "query_mask")


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_every_preset(name):
    assert_parameters_are_counted(PRESETS[name])


@pytest.mark.parametrize("removed", [(3,), (0, 1, 4)])
@pytest.mark.parametrize(("mask", "ffn"), KINDS)
def test_parameters_without_some_ffns(mask, ffn, removed):
    assert_parameters_are_counted(replace(SMALL, mask=mask, ffn=ffn, removed_ffns=removed))


@pytest.mark.parametrize("removed", [(), (0, 3)])
@pytest.mark.parametrize(("mask", "ffn"), KINDS)
def test_flops_of_a_forward_and_a_training_step(mask, ffn, removed):
    config = replace(SMALL, mask=mask, ffn=ffn, removed_ffns=removed)
    model = on_meta(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(*inputs(config, 4, 6)).sample_BCHW
        forward = counter.get_total_flops()
        assert forward == IMAGES * count_flops(config, (4, 6), CAPTION).total

        modules = counter.get_flop_counts()
        by_part = {
            part: sum(sum(flops.values()) for name, flops in modules.items() if name.endswith(f".{part}"))
            for part in ("self_attention", "cross_attention", "query_mask", "time_linear", "ffn", "shared_expert")
        }
        output.sum().backward()
    counted = count_flops(config, (4, 6), CAPTION)
    assert by_part["self_attention"] + by_part["cross_attention"] == IMAGES * counted.attention
    assert by_part["ffn"] + by_part["shared_expert"] == IMAGES * counted.ffn
    assert by_part["query_mask"] + by_part["time_linear"] == IMAGES * counted.query_mask

    sinusoids = 2 * IMAGES * 256 * config.width  # the only product whose input needs no gradient
    assert counter.get_total_flops() == training_flops(config, IMAGES, (4, 6), IMAGES * CAPTION) - sinusoids


@pytest.mark.parametrize("removed", [(), (1, 4)])
@pytest.mark.parametrize("ffn", ["uniform", "shared", "tapered"])
def test_ffn_flops_of_each_block(ffn, removed):
    """Against the counter, block by block; the shared expert's are spread over the blocks that use it."""
    config = replace(SMALL, ffn=ffn, removed_ffns=removed)
    with FlopCounterMode(display=False) as counter:
        on_meta(config)(*inputs(config, 4, 6))
    modules, tokens = counter.get_flop_counts(), IMAGES * 4 * 6
    used = [block for block in range(config.depth) if block not in removed]
    shared = sum(modules.get("DiT.shared_expert", {}).values()) // len(used)
    counted = [sum(modules[f"DiT.blocks.{b}.ffn"].values()) + shared if b in used else 0 for b in range(config.depth)]
    assert [tokens * flops for flops in ffn_flops(config)] == counted
    assert sum(ffn_flops(config)) == count_flops(config, (4, 6), CAPTION).ffn / (4 * 6)


def test_flops_of_a_mean_caption_length():
    """Everything is linear in the text, so that a mean length stands for the captions."""
    config = replace(SMALL, mask="release", ffn="shared")
    lengths = (3, 4, 12, 7)
    one_by_one = [count_flops(config, (4, 6), length).total for length in lengths]
    assert sum(one_by_one) == pytest.approx(4 * count_flops(config, (4, 6), sum(lengths) / 4).total, abs=4)
    assert training_flops(config, 4, (4, 6), sum(lengths)) == pytest.approx(3 * sum(one_by_one), abs=12)


def test_tokens_of_a_resolution():
    assert [grid_of(PRESETS["dit_1b"], side) for side in (256, 512)] == [(16, 16), (32, 32)]
    assert grid_of(PRESETS["dit_tiny"], 256) == (8, 8)
    with pytest.raises(ValueError, match="not divisible by 8"):
        grid_of(PRESETS["dit_1b"], 264)


def test_the_papers_figures():
    """§5: 1.078B, MaskGen 0.199B, VR saves 0.254B, 1.023B in the end. Which C2 each figure belongs to: docs."""
    base = PRESETS["dit_1b"]
    assert count_parameters(base).total == pytest.approx(1.078e9, rel=0.006)
    assert count_parameters(replace(base, text_width=768)).total / 1e9 == pytest.approx(1.0784, abs=5e-5)
    assert count_parameters(PRESETS["focusdit_1b_shared2d"]).total == pytest.approx(1.023e9, rel=0.006)
    assert count_parameters(replace(base, mask="release")).query_mask / 1e9 == pytest.approx(0.199, abs=5e-4)
    assert count_parameters(replace(base, mask="adaln_single")).query_mask / 1e6 == pytest.approx(24.1, abs=0.05)

    def saving(shared_width: int) -> float:
        shared = replace(base, ffn="shared", shared_width=shared_width)
        return (count_parameters(base).total - count_parameters(shared).total) / 1e9

    assert saving(2) == pytest.approx(0.2549, abs=5e-5)
    assert saving(3) == pytest.approx(0.3823, abs=5e-5)
    for name in ("focusdit_1b", "focusdit_1b_shared2d"):
        saved = count_parameters(replace(base, mask="release")).total - count_parameters(PRESETS[name]).total
        assert saved / 1e9 == pytest.approx(saving(PRESETS[name].shared_width))


def test_parameters_without_8_ffns():
    """Fig. 10: 88% of the parameters are left."""
    whole = replace(PRESETS["dit_1b"], mask="release")
    for removed in (range(8), range(10, 18)):
        pruned = replace(whole, removed_ffns=tuple(removed))
        assert count_parameters(pruned).total / count_parameters(whole).total == pytest.approx(0.882, abs=0.001)


def test_most_of_the_releases_query_mask_is_its_time():
    """Tables 43.1M, their linears 132.2M, MLPs 24.0M: 88% is time conditioning."""
    mask = on_meta(PRESETS["focusdit_release"])
    tables, linears = parameters_of(mask, "time_table"), parameters_of(mask, "time_linear")
    assert tables / 1e6 == pytest.approx(43.1, abs=0.05)
    assert linears / 1e6 == pytest.approx(132.2, abs=0.05)
    assert parameters_of(mask, "query_mask") / 1e6 - 43.1 - 132.2 == pytest.approx(24.0, abs=0.1)
    assert (tables + linears) / parameters_of(mask, "query_mask") == pytest.approx(0.88, abs=0.005)


def test_the_printed_table(capsys, monkeypatch):
    """What `python -m pretrain.models` prints names every preset with its totals, and the paper's figures."""
    monkeypatch.setattr("sys.argv", ["pretrain.models", "--text-tokens", "80"])
    printed.main()
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    for name, config in PRESETS.items():
        assert f"{count_parameters(config).total / 1e6:.2f}M" in rows[name]
        assert f"{count_flops(config, grid_of(config, 512), 80).total / 1e9:.1f}" in rows[name]
    assert rows["dit_1b"][-1] == "1.078B"
    assert rows["focusdit_1b_shared2d"][-1] == "1.023B"
    for figure in ("0.1993B", "0.199B", "0.0241B", "0.2549B", "0.3823B", "0.254B", "80 tokens"):
        assert figure in text
