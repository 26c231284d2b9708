"""Schedulers in diffusers' form, by which each objective is sampled.

Flow: Euler's steps along the ODE, or Euler–Maruyama's along an SDE with the same distribution at each time
(SiT, arXiv 2401.08740). ε-prediction: DPM-Solver++ (arXiv 2211.01095).

An export may name a class of this file: to load it, diffusers looks for the name SchedulerMixin here, too.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from pretrain.diffusion.ddpm import BETA_END, BETA_START, STEPS


class FlowMatchEulerMaruyamaScheduler(FlowMatchEulerDiscreteScheduler):
    """The flow's reverse SDE (SiT, arXiv 2401.08740), at the same times as the ODE.

    On the path x_t = (1 − t)·x_0 + t·ε the velocity v gives the expected noise, E[ε | x_t] = x_t + (1 − t)·v, and the
    score −E[ε | x_t] / t. With the diffusion w_t = t (the paper's σ_t; the authors' code draws with twice as much), from
    t = 1 to 0, z normal and dt < 0:

        dx = [v − w_t/2 · score] dt + √(w_t·|dt|) · z = [v + E[ε | x_t] / 2] dt + √(t·|dt|) · z

    The last step, to the data, is the ODE's: it draws no noise.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step down in t, for the velocity and the sample [B, C, H, W]; one generator per picture keeps them apart."""
        if self.step_index is None:
            self._init_step_index(timestep)
        t, following = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        if self.step_index == len(self.timesteps) - 1:
            return super().step(model_output, timestep, sample, return_dict=return_dict)
        drift = model_output + (sample + (1 - t) * model_output) / 2
        output = super().step(drift, timestep, sample)
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        output.prev_sample = output.prev_sample + (t * (t - following)).sqrt() * noise
        return output if return_dict else (output.prev_sample,)


SAMPLERS = {"ode": FlowMatchEulerDiscreteScheduler, "sde": FlowMatchEulerMaruyamaScheduler}


def build_scheduler(objective: str, shift: float, sampler: str = "ode") -> SchedulerMixin:
    """The scheduler of an objective: flow (ode | sde, its times shifted towards noise) | epsilon (ode alone).

    Raises:
        ValueError: for a sampler that the objective does not have.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is none of {', '.join(SAMPLERS)}")
    if objective == "flow":
        return SAMPLERS[sampler](num_train_timesteps=1000, shift=shift)
    if sampler == "sde":
        raise ValueError("sampler sde: the flow objective has one, the epsilon objective has none; take ode")
    return DPMSolverMultistepScheduler(
        num_train_timesteps=STEPS, beta_start=BETA_START, beta_end=BETA_END, beta_schedule="linear", solver_order=2
    )


def changed_scheduler(scheduler: Any, sampler: str | None, shift: float | None) -> Any:
    """A model's scheduler as the options `--sampler` and `--shift` change it. Raises ValueError where it cannot be so."""
    if "shift" in scheduler.config:
        kind = SAMPLERS[sampler] if sampler else type(scheduler)
        return kind.from_config(scheduler.config, **({} if shift is None else {"shift": shift}))
    trained = "this model was trained with the epsilon objective, whose sampler"
    if shift is not None:
        raise ValueError(f"--shift: {trained} has no shift")
    if sampler == "sde":
        raise ValueError(f"--sampler sde: {trained} follows an ODE; leave --sampler out")
    return scheduler


def set_timesteps(scheduler: Any, steps: int, device: torch.device) -> None:
    """Prepares `steps` evaluations; flow matching starts at pure noise and ends at 1/steps before the shift."""
    if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters and "shift" in scheduler.config:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device)
    else:
        scheduler.set_timesteps(steps, device=device)
