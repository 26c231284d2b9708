"""Named panels of TensorBoard's page "Custom Scalars": charts of curves that belong together.

Each chart shows the curves whose tags begin as one of its regular expressions says. The panels are the same for all runs, so that
TensorBoard shows the curves of several runs in one chart.
"""

from __future__ import annotations

PANELS = {
    "health": {
        "loss": ["train/loss", "validation/loss$", "validation_ema/loss$"],
        "loss by timestep": ["loss_by_timestep/"],
        "validation loss of the average, by noise level": ["validation_ema/loss_t"],
        "validation loss, by noise level": ["validation/loss_t"],
        "gradient norm": ["train/gradient_norm"],
        "skipped steps": ["train/steps_skipped"],
        "learning rate": ["train/learning_rate"],
    },
    "speed": {
        "images a second": ["speed/images_per_s"],
        "MFU, %": ["speed/mfu_percent"],
        "seconds a step": ["speed/step_s"],
        "stop for a checkpoint, s": ["speed/checkpoint_stop_s"],
        "tokens a second": ["speed/tokens_per_s"],
        "peak of memory, GiB": ["memory/"],
    },
    "masks": {"mean of each block's query mask": ["mask_mean/"]},
    "samples": {"judged pictures": ["evaluate/"]},
    "data": {"waiting for data, % of the time": ["speed/data_wait_percent"]},
}
