"""How each objective is sampled: schedulers in diffusers' form."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from pretrain.diffusion.ddpm import BETA_END, BETA_START, STEPS


def build_scheduler(objective: str, shift: float) -> Any:
    """diffusers' scheduler of an objective: flow (Euler, its times shifted towards noise) | epsilon (DPM-Solver++)."""
    if objective == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    return DPMSolverMultistepScheduler(
        num_train_timesteps=STEPS, beta_start=BETA_START, beta_end=BETA_END, beta_schedule="linear", solver_order=2
    )


def set_timesteps(scheduler: Any, steps: int, device: torch.device) -> None:
    """Prepares `steps` evaluations; flow matching starts at pure noise and ends at 1/steps before the shift."""
    if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters and "shift" in scheduler.config:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device)
    else:
        scheduler.set_timesteps(steps, device=device)
