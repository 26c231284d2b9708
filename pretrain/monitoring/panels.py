"""Named panels of TensorBoard's page "Custom Scalars": charts of curves that belong together.

Each chart shows the curves whose tags begin as one of its regular expressions says. The panels are the same for all runs, so that
TensorBoard shows the curves of several runs in one chart.
"""

from __future__ import annotations

PANELS = {
    "health": {
        "loss": ["train/loss", "validation/loss$", "validation_ema.*/loss$"],
        "loss by timestep": ["loss_by_timestep/"],
        "loss by source of the data": ["loss_by_source/"],
        "alignment with the vision encoder's features, negative cosine": ["alignment/negative_cosine"],
        "validation loss of the averages, by noise level": ["validation_ema.*/loss_t"],
        "validation loss, by noise level": ["validation/loss_t"],
        "gradient norm": ["train/gradient_norm"],
        "steps skipped since the last point": ["train/steps_skipped"],
        "steps with a clipped gradient, %": ["train/steps_clipped_percent"],
        "learning rate": ["train/learning_rate"],
        "norm of the parameters, by part": ["parameter_norm/"],
        "norm of a step's update, by part": ["update_norm/"],
    },
    "speed": {
        "images a second": ["speed/images_per_s"],
        "MFU, %": ["speed/mfu_percent"],
        "seconds a step: mean, median, 95th percentile": ["speed/step_"],
        "seconds a step of each process: median": ["process_step_p50_s/"],
        "seconds a step of each process: 95th percentile": ["process_step_p95_s/"],
        "seconds of forward passes of each process": ["process_forward_s/"],
        "slowest process": ["speed/slowest_process$"],
        "forward passes of the slowest process behind the median's, %": ["speed/slowest_process_behind"],
        "stop for a checkpoint, s": ["speed/checkpoint_stop_s"],
        "tokens a second": ["speed/tokens_per_s"],
        "peak of memory, GiB": ["memory/"],
        "hours to go": ["progress/hours_to_go"],
        "GPU-days so far and to go": ["progress/gpu_days"],
    },
    "masks": {
        "mean of each block's query mask": ["mask_mean/"],
        "standard deviation over an image's tokens": ["mask_spread/"],
        "tokens under 0.15, %": ["mask_under_"],
        "FLOPs saved by leaving FFNs out under 0.15, %": ["mask_saving/"],
        "mean by timestep": ["mask_mean_by_timestep/"],
        "shared expert's part of the FFNs' outputs, %": ["shared_expert_percent/"],
    },
    "samples": {"judged pictures": ["evaluate/"]},
    "data": {
        "waiting for data, % of the time": ["speed/data_wait_percent"],
        "epochs": ["progress/epochs"],
        "images": ["progress/images"],
        "tokens": ["progress/tokens"],
    },
}
