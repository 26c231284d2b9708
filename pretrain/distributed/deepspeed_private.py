"""DeepSpeed's inner state, reached here and nowhere else; docs/dependencies.md says what breaks without each name.

`engine.py` keeps exact fp32 weights, an average and checkpoints of its own beside ZeRO-2, and replaces its reduction of gradients
and its search for overflow. DeepSpeed has no public interface for these.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import deepspeed
from deepspeed.utils import groups
from torch import Tensor

from pretrain.distributed import torch_private

PRIVATE = {
    "deepspeed.ops": ("__compatible_ops__",),
    "deepspeed.utils.groups": ("_WORLD_GROUP",),
    "DeepSpeedEngine": (
        "is_gradient_accumulation_boundary",
        "optimizer",
        "was_step_applied",
        "zero_overlap_comm",
        "zero_reduce_bucket_size",
    ),
    "DeepSpeedZeroOptimizer": (
        "averaged_gradients",
        "bit16_groups",
        "bit16_groups_flat",
        "check_grad_overflow",
        "check_overflow",
        "dp_process_group",
        "optimizer",
        "overflow",
        "overlapping_partition_gradients_reduce_epilogue",
        "parallel_partitioned_bit16_groups",
        "param_groups",
        "process_gradients",
        "scaled_global_norm",
        "single_partition_of_fp32_groups",
    ),
}
"""The names that are used below, by their owner: the table of docs/dependencies.md."""


def disable_shared_memory_collectives() -> None:
    """Keeps DeepSpeed from compiling its CPU collectives for over a minute at the first start; training uses none of them."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def forget_process_groups() -> None:
    """Lets a later start in the same process make its own groups: DeepSpeed keeps the first start's for ever."""
    groups._WORLD_GROUP = None


class Zero:
    """ZeRO-2's optimizer inside a DeepSpeed engine, under the names of this project.

    Attributes:
        masters: this process's fp32 partition [n] of each optimizer group, in DeepSpeed's own memory.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine):
        self._engine = engine
        self._zero: Any = engine.optimizer
        self.masters: list[Tensor] = list(self._zero.single_partition_of_fp32_groups)

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """AdamW's state of each master: `step`, `exp_avg`, `exp_avg_sq`; empty before the first step."""
        return self._zero.optimizer.state

    @property
    def step_applied(self) -> bool:
        """True where the last call of the engine's `step` updated the parameters."""
        return self._engine.was_step_applied()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """AdamW's settings of each optimizer group."""
        return self._zero.param_groups

    def parameters(self, group: int) -> list[Tensor]:
        """A group's parameters in their order in the flat buffer."""
        return self._zero.bit16_groups[group]

    def flat_weights(self, group: int) -> Tensor:
        """A group's flat buffer of the module's weights, with padding."""
        return self._zero.bit16_groups_flat[group]

    def flat_partition(self, group: int, rank: int) -> Tensor:
        """The part of a group's flat buffer that process `rank` updates."""
        return self._zero.parallel_partitioned_bit16_groups[group][rank]

    def set_timeout(self, timeout: timedelta) -> None:
        """Sets the longest that ZeRO's collectives may take: DeepSpeed makes its group with a timeout of torch's own."""
        if (group := self._zero.dp_process_group) is not None:
            torch_private.set_timeout(timeout, group)

    @property
    def overlaps(self) -> bool:
        """`zero_optimization.overlap_comm`."""
        return bool(self._engine.zero_overlap_comm())

    @property
    def bucket_size(self) -> int:
        """`zero_optimization.reduce_bucket_size`, in elements."""
        return int(self._engine.zero_reduce_bucket_size())

    def replace_reduction(
        self, add: Callable[[Tensor, bool], None], finish: Callable[[bool], None], partitions: list[Tensor]
    ) -> None:
        """Lets others add up the gradients and reduce them over the processes.

        Args:
            add: called in each backward pass for each parameter once its gradient is complete, and whether this is the step's
                last micro-batch.
            finish: called after each backward pass, and whether it was the step's last.
            partitions: this process's partition [n] of each group's mean gradient, complete after the last `finish`. Clipping
                scales them in place.
        """

        def process_gradients(parameter: Tensor, group: int) -> None:
            add(parameter, self._engine.is_gradient_accumulation_boundary())

        def epilogue() -> None:
            last = self._engine.is_gradient_accumulation_boundary()
            finish(last)
            if last:
                self._zero.averaged_gradients.update({group: [p] for group, p in enumerate(partitions)})

        self._zero.process_gradients = process_gradients
        self._zero.overlapping_partition_gradients_reduce_epilogue = epilogue

    def replace_overflow_check(self, check: Callable[[], bool], norm: Callable[[], Tensor]) -> None:
        """Lets `check` decide about each step, and `norm` give what clipping divides by.

        DeepSpeed by itself looks at the gradients twice, once for overflow and once for the norm; so one pass serves both.

        Args:
            check: called once before each update; where it returns False, nothing is updated.
            norm: called after it; the gradient's norm over all processes, a scalar.
        """

        def check_overflow(partition_gradients: bool = True) -> None:
            self._zero.overflow = not check()

        def scaled_global_norm(norm_type: int = 2) -> Tensor:
            return norm()

        self._zero.check_grad_overflow = True
        self._zero.check_overflow = check_overflow
        self._zero.scaled_global_norm = scaled_global_norm
