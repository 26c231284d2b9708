"""The learning rate at its edges, and which parameters decay."""

import pytest
import torch

from pretrain.config import OptimizerSection
from pretrain.distributed.optimizer import build_optimizer, learning_rate
from pretrain.models import DiT, DiTConfig

TINY = DiTConfig(
    width=16, heads=2, depth=2, patch=2, latent_channels=3, text_width=5, mask="release", ffn="shared", mask_hidden=(4,)
)


def rates(steps: int, **fields) -> list[float]:
    config = OptimizerSection(lr=1.0, **fields)
    return [learning_rate(step, steps, config) for step in range(steps)]


def test_warm_up_rises_evenly_to_the_full_rate():
    assert rates(12, warmup_steps=10) == pytest.approx([k / 10 for k in range(1, 11)] + [1, 1])
    assert rates(3, warmup_steps=0) == [1, 1, 1]
    assert rates(3, warmup_steps=1) == [1, 1, 1]
    assert rates(4, warmup_steps=4, schedule="cosine") == pytest.approx([0.25, 0.5, 0.75, 1])


def test_the_rate_scales_with_lr():
    config = OptimizerSection(lr=2e-4, warmup_steps=10)
    assert [learning_rate(step, 100, config) for step in (0, 9, 99)] == pytest.approx([2e-5, 2e-4, 2e-4])


@pytest.mark.parametrize("warmup_steps", [0, 20])
def test_cosine_falls_from_the_full_rate(warmup_steps):
    after = rates(121, warmup_steps=warmup_steps, schedule="cosine")[warmup_steps:]
    assert after[0] == 1
    assert after == sorted(after, reverse=True)
    assert after[len(after) // 2] == pytest.approx(0.55, abs=0.01)


@pytest.mark.parametrize(("steps", "warmup_steps"), [(12, 2), (120, 10), (600, 50)])
def test_cosine_reaches_a_tenth_at_the_last_step(steps, warmup_steps):
    """As the configuration's docstring says: a half cosine down to a tenth at the last step."""
    after = rates(steps, warmup_steps=warmup_steps, schedule="cosine")[warmup_steps:]
    assert after[-1] == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("steps", [10, 11, 12])
def test_cosine_with_hardly_a_step_after_the_warm_up(steps):
    assert all(0.1 <= rate <= 1 for rate in rates(steps, warmup_steps=10, schedule="cosine"))


def test_only_weight_matrices_decay():
    model = DiT(TINY)
    optimizer = build_optimizer(model, OptimizerSection(weight_decay=0.03, lr=1e-3, betas=(0.8, 0.95), eps=1e-6))
    decay, rest = optimizer.param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.03, 0.0)
    assert {(g["lr"], g["betas"], g["eps"]) for g in optimizer.param_groups} == {(1e-3, (0.8, 0.95), 1e-6)}

    names = {p: name for name, p in model.named_parameters()}
    decayed, others = ({names[p] for p in group["params"]} for group in (decay, rest))
    assert decayed == {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert others == set(names.values()) - decayed
    assert len(decay["params"]) + len(rest["params"]) == len(names), "a shared parameter counts once"


def test_tables_and_biases_do_not_decay():
    """With zero gradients a step only decays: weights shrink, everything else stays."""
    model = DiT(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    build_optimizer(model, OptimizerSection(weight_decay=0.5, lr=0.1)).step()
    for name, parameter in model.named_parameters():
        still = name.endswith(("bias", "premask")) or "_table" in name
        assert parameter.unique().tolist() == pytest.approx([1.0 if still else 0.95]), name


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_as_torch_optim_does(weight_decay):
    """On linear maps without biases it is plain AdamW."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Linear(3, 4, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    config = OptimizerSection(lr=0.01, weight_decay=weight_decay)
    optimizers = [
        (ours, build_optimizer(ours, config)),
        (theirs, torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=weight_decay)),
    ]
    x = torch.randn(5, 3)
    for _ in range(3):
        for model, optimizer in optimizers:
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)
