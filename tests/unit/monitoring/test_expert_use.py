"""The shared expert's part, against sizes computed from the experts' inputs one block after the other."""

from __future__ import annotations

import pytest
import torch

from pretrain.distributed.world import World
from pretrain.models import DiT, PackedText, preset
from pretrain.monitoring.expert_use import ExpertUse


def model_of(name: str, **changed: object) -> DiT:
    torch.manual_seed(0)
    model = DiT(preset(name)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # a fresh block changes nothing
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def compute(model: DiT, seed: int) -> None:
    c, numbers = model.config, torch.Generator().manual_seed(seed)
    text = PackedText.pack([torch.randn(n, c.text_width, generator=numbers) for n in (3, 5)])
    latent_BCHW = torch.randn(2, c.latent_channels, 8, 8, generator=numbers)
    with torch.no_grad():
        model(latent_BCHW, model.condition(torch.tensor([100.0, 900.0]), text))


def test_against_sizes_computed_from_the_inputs() -> None:
    model, seen = model_of("focusdit_tiny"), []
    assert model.shared_expert is not None
    hook = model.shared_expert.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    use = ExpertUse(model)
    with use.measured():
        for seed in (1, 2):
            compute(model, seed)
    hook.remove()
    expected = []
    for k in range(model.config.depth):
        z = torch.cat([seen[k], seen[model.config.depth + k]]).double()
        sizes = []
        for expert in (model.block(k).ffn, model.shared_expert):
            assert expert is not None
            hidden = torch.nn.functional.gelu(
                z @ expert.key.weight.T.double() + expert.key.bias.double(), approximate="tanh"
            )
            output = hidden @ expert.value.weight.T.double()
            sizes.append(
                (output if expert.value.bias is None else output + expert.value.bias.double()).square().mean() ** 0.5
            )
        expected.append(100 * (sizes[1] / (sizes[0] + sizes[1])).item())
    found = use.scalars(World.alone())
    assert list(found) == [f"shared_expert_percent/block_{k:02d}" for k in range(model.config.depth)]
    assert list(found.values()) == pytest.approx(expected, rel=1e-5)
    assert max(expected) > min(expected)


def test_nothing_is_left_behind_and_nothing_is_said_without_a_shared_expert() -> None:
    model = model_of("focusdit_tiny")
    with pytest.raises(KeyError), ExpertUse(model).measured():
        raise KeyError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    plain = model_of("dit_tiny")
    use = ExpertUse(plain)
    with use.measured():
        compute(plain, 1)
    assert use.scalars(World.alone()) == {}
