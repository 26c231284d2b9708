"""Gradients of several processes against a sum in fp64, and what is exchanged for them; real processes over gloo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import Tiny, adamw, loss_of, tiny
from reductions import CLIPPING, MICRO_BATCHES, STEPS, micro_batch, take_steps
from support import ended, fork, free_port, launcher
from torch import Tensor


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process saved."""
    processes, port = request.param, str(free_port())
    out = tmp_path_factory.mktemp("reductions")
    started = [fork(out / "log", take_steps, out, **launcher(rank, processes, port)) for rank in range(processes)]
    assert ended(started) == [0] * processes, (out / "log").read_text()
    return [torch.load(out / f"{rank}.pt") for rank in range(processes)]


def reference(processes: int, dtype: torch.dtype, table: Callable[[int], bool]) -> tuple[list[dict[str, Tensor]], Tiny]:
    """Mean gradients of each step, added up in fp64 over all micro-batches, and AdamW's masters after them."""
    masters, model = tiny(), tiny().to(dtype)
    optimizer, means = adamw(masters), []
    for step in range(STEPS):
        mean = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in masters.named_parameters()}
        for micro in range(MICRO_BATCHES):
            for rank in range(processes):
                model.zero_grad()
                x = micro_batch(step, micro, rank).to(dtype)
                used = model(x) if table(rank) else model.last(model.first(x).tanh())
                (loss_of(used) / MICRO_BATCHES).backward()
                for name, p in model.named_parameters():
                    mean[name] += 0 if p.grad is None else p.grad.double() / processes
        means.append(mean)
        norm = torch.stack([g.norm() for g in mean.values()]).norm()
        assert norm > CLIPPING
        for name, p in masters.named_parameters():
            p.grad = (mean[name] * CLIPPING / (norm + 1e-6)).float()
        optimizer.step()
        model.load_state_dict(masters.state_dict())
    return means, masters


def whole(
    results: list[dict[str, Any]], case: str, tensors: Callable[[dict[str, Any]], list[Tensor]]
) -> dict[str, Tensor]:
    """Parameters of the groups' partitions, put end to end over the processes."""
    groups = [torch.cat(parts) for parts in zip(*(tensors(r[case]) for r in results), strict=True)]
    slots = results[0][case]["slots"]
    numel = [torch.Size(s["shape"]).numel() for s in slots]
    return {
        s["name"]: groups[s["group"]][s["offset"] : s["offset"] + n].view(s["shape"])
        for s, n in zip(slots, numel, strict=True)
    }


@pytest.mark.parametrize("case", ["fp32", "bf16", "branch"])
def test_the_gradient_is_the_sum_in_fp32(case: str, results) -> None:
    """Of gradients that bf16 sums would lose; also where a parameter is used by one process alone."""
    dtype = torch.bfloat16 if case == "bf16" else torch.float32
    means, masters = reference(len(results), dtype, lambda rank: case != "branch" or rank == 0)
    first = whole(results, case, lambda r: r["gradients"][0])
    for name, mean in means[0].items():
        torch.testing.assert_close(first[name].double(), mean, rtol=1e-6, atol=1e-9)
    got = whole(results, case, lambda r: r["masters"])
    for name, p in masters.named_parameters():
        torch.testing.assert_close(got[name], p.detach(), rtol=1e-5, atol=1e-6)


def test_overlap_has_the_same_bits(results) -> None:
    for result in results:
        overlapped, after = (
            [*(g for step in result[case]["gradients"] for g in step), *result[case]["masters"]]
            for case in ("bf16", "bf16 in the end")
        )
        assert all(torch.equal(a, b) for a, b in zip(overlapped, after, strict=True))


def test_one_reduction_a_step_in_fp32(results) -> None:
    """Not one for each micro-batch; with overlap it begins before the last backward pass has ended."""
    scatter = "reduce_scatter_tensor torch.float32"
    for case in ("fp32", "bf16", "bf16 in the end", "branch"):
        for rank, result in enumerate(results):
            for step, first in zip(result[case]["events"], results[0][case]["events"], strict=True):
                assert [e for e in step if e != "finish"] == [e for e in first if e != "finish"]
                assert step[: MICRO_BATCHES - 1] == ["finish"] * (MICRO_BATCHES - 1)
                last = step[MICRO_BATCHES - 1 :]
                buckets = last.count(scatter)
                assert buckets >= 3
                assert sorted(last) == sorted([scatter] * buckets + ["finish", "batch_isend_irecv"])
                if case != "branch" or rank == 0:
                    assert (last.index("finish") > 0) == (case != "bf16 in the end")
