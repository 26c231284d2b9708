"""Muon against torch.optim.Muon, and which matrices are its."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from engines import admit, one_process, refuse
from torch import Tensor, nn

from pretrain.config import OptimizerSection
from pretrain.distributed import muon
from pretrain.distributed.engine import Engine
from pretrain.distributed.muon import orthogonalise, rms_matched_orthogonal
from pretrain.distributed.optimizer import build_optimizer
from pretrain.distributed.world import World
from pretrain.models import DiT, DiTConfig
from pretrain.models.mixers.flexdit import FlexDiTSection

SHAPE = DiTConfig(
    width=16, heads=2, depth=2, patch=2, latent_channels=3, text_width=5, mask="release", ffn="shared", mask_hidden=(4,)
)
CONFIG = OptimizerSection(name="muon", lr=0.02, betas=(0.9, 0.95), momentum=0.9, weight_decay=0.1)
ZERO = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 2},
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with one_process() as world:
        yield world


class Net(nn.Module):
    """Matrices of each form, a bias, and a first map that is not Muon's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide, self.tall = nn.Linear(3, 6), nn.Linear(6, 4, bias=False), nn.Linear(4, 9)

    @property
    def hidden_matrices(self) -> list[nn.Parameter]:
        return [self.wide.weight, self.tall.weight]

    def forward(self, x_B3: Tensor) -> Tensor:
        return self.tall(self.wide(self.first(x_B3).tanh()))


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def loss(model: nn.Module, step: int) -> Tensor:
    return (model(torch.randn(4, 3, generator=torch.Generator().manual_seed(step))) - 1).square().mean()


def of(engine: Engine, partitions: list[Tensor], name: str) -> Tensor:
    (slot,) = [s for s in engine.slots if s.name == name]
    return partitions[slot.group].detach()[slot.offset : slot.offset + slot.numel].reshape(slot.shape)


@pytest.mark.parametrize(
    ("precision", "tolerance"), [(torch.bfloat16, 1e-6), (torch.float32, 2e-2)], ids=["bf16", "fp32"]
)
def test_steps_as_torch_optim_does(
    precision: torch.dtype, tolerance: float, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's Newton–Schulz iterations are always in bf16; the rest of both is in fp32."""
    monkeypatch.setattr(muon, "orthogonalise", lambda matrix, _: orthogonalise(matrix, precision))
    model, theirs = net(), net()
    engine = Engine(model, build_optimizer(model, CONFIG), ZERO, world)
    rest = [p for p in theirs.parameters() if all(p is not h for h in theirs.hidden_matrices)]
    vectors = [p for p in rest if p.ndim == 1]
    references: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            theirs.hidden_matrices, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW([theirs.first.weight], lr=0.02, betas=(0.9, 0.95), weight_decay=0.1),
        torch.optim.AdamW(vectors, lr=0.02, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for step in range(4):
        for optimizer in references:
            optimizer.zero_grad()
        loss(theirs, step).backward()
        for optimizer in references:
            optimizer.step()
        engine.backward(loss(engine.forward, step))
        engine.step(0.02, admit)
    assert engine.updates == 4
    for name, p in theirs.named_parameters():
        mine = of(engine, engine.masters, name)
        torch.testing.assert_close(mine, p.detach(), rtol=tolerance, atol=tolerance * 0.1)
    assert [moment.numel() > 0 for moment in engine.moments()["exp_avg_sq"]] == [True, True, False]


def test_a_step_that_is_not_admitted_leaves_the_momentum(world: World) -> None:
    model = net()
    engine = Engine(model, build_optimizer(model, CONFIG), ZERO, world)

    def state() -> list[Tensor]:
        kept = [*engine.masters, *(m for kind in engine.moments().values() for m in kind)]
        return [t.detach().clone() for t in kept]

    for check, changes in ((admit, True), (refuse, False), (admit, True)):
        before = state()
        engine.backward(loss(engine.forward, 0) * (float("nan") if check is refuse else 1.0))
        engine.step(0.02, check)
        assert engine.applied is changes
        assert any(not torch.equal(a, b) for a, b in zip(before, state(), strict=True)) is changes
    assert engine.updates == 2 and all(t.isfinite().all() for t in state())


@pytest.mark.parametrize("shape", [(32, 32), (24, 96), (96, 24), (1, 8)])
def test_orthogonalised(shape: tuple[int, int]) -> None:
    """The singular vectors stay, and the singular values come near 1: against the SVD."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalise(matrix, torch.float32)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0) > 0.97
    rms = rms_matched_orthogonal(matrix).square().mean().sqrt().item()
    assert 0.6 * 0.2 < rms < 1.3 * 0.2


def test_a_matrix_of_zeros_stays() -> None:
    """A fresh FFN's value matrix has no gradient where its input is 0."""
    assert orthogonalise(torch.zeros(4, 6), torch.float32).count_nonzero() == 0


def test_the_matrices_inside_the_blocks() -> None:
    """And the shared expert's; not the query masks', nor what embeds or ends."""
    model = DiT(SHAPE)
    hidden = {id(p) for p in model.hidden_matrices}
    names = {name for name, p in model.named_parameters() if id(p) in hidden}
    inside = ("self_attention.qkv", "self_attention.out", "cross_attention.q", "cross_attention.kv")
    inside += ("cross_attention.out", "ffn.key", "ffn.value")
    expected = {f"blocks.{i}.{n}.weight" for i in range(2) for n in inside}
    assert names == expected | {"shared_expert.key.weight", "shared_expert.value.weight"}


@pytest.mark.parametrize(
    "config", [SHAPE, DiTConfig(**{**vars(SHAPE), "depth": 8, "density": "flexdit", "flexdit": FlexDiTSection()})]
)
def test_each_parameter_is_in_one_group(config: DiTConfig) -> None:
    model = DiT(config)
    groups = build_optimizer(model, CONFIG).param_groups
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert [(group["weight_decay"], bool(group.get("muon"))) for group in groups] == [
        (0.1, False),
        (0.0, False),
        (0.1, True),
    ]
    assert all(p.ndim == 2 for p in groups[2]["params"])
