"""Objectives and sampling: torch and einops only.

Convention everywhere: t = 0 is data, t = 1 (timestep 1000) is noise.
"""

from pretrain.diffusion.ddpm import EpsilonPrediction
from pretrain.diffusion.flow import RectifiedFlow
from pretrain.diffusion.guidance import Guidance, Guided
from pretrain.diffusion.objective import Loss, NoisySample, Objective, measure
from pretrain.diffusion.random_numbers import Draw, captions_dropped, draw, kept_tokens
from pretrain.diffusion.sampler import FfnWork, Generated, generate, sample, start_noise
from pretrain.diffusion.step_budget import StepBudget, step_budget
from pretrain.diffusion.switching import BudgetRule, Fixed, Switching, choose_rule

__all__ = [
    "BudgetRule",
    "Draw",
    "EpsilonPrediction",
    "FfnWork",
    "Fixed",
    "Generated",
    "Guidance",
    "Guided",
    "Loss",
    "NoisySample",
    "Objective",
    "RectifiedFlow",
    "StepBudget",
    "Switching",
    "captions_dropped",
    "choose_rule",
    "draw",
    "generate",
    "kept_tokens",
    "measure",
    "sample",
    "start_noise",
    "step_budget",
]
