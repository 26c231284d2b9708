"""A plan's figures, by topic: model, memory, time and money of each stage; data and checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from data_prep.encoders import DOWNSAMPLE
from data_prep.schema import sample_bytes
from pretrain.models.cost import count_parameters
from pretrain.plan.encoding import encoding_flops
from pretrain.plan.figures import Figure, to_text, write
from pretrain.plan.measured import read_run
from pretrain.plan.setting import Setting, setting_of
from pretrain.plan.stage import HOST_COPY_GBS, NCCL_GIB, USABLE, MicroBatch, Stage
from pretrain.plan.sweep import sweep
from pretrain.resilience.capacity import GIB, checkpoint_bytes, kept_checkpoint_bytes

TB, GB = 1e12, 1e9


def run(args: argparse.Namespace) -> str:
    """Computes and writes a plan; returns its text."""
    setting = setting_of(args, read_run(args.measured) if args.measured else None)
    stages = [Stage.load(name, args.overrides, setting) for name in args.stages]
    figures = [figure for stage in stages for figure in of_stage(stage, sides_of(stages))]
    figures += of_all(stages, setting)
    write(figures, asdict(setting), args.out)
    text = f"{to_text(figures)}\n\nwritten: {args.out}/plan.txt, plan.csv, plan.json"
    return f"{text}\n\n{sweep(stages, args.out)}" if args.sweep else text


def sides_of(stages: Sequence[Stage]) -> list[int]:
    """The resolutions in pixels of a data set that serves all these stages."""
    return sorted({stage.config.data.resolution for stage in stages})


def of_stage(stage: Stage, sides: Sequence[int]) -> Iterator[Figure]:
    """The figures of one stage, which reads a data set whose samples hold the resolutions `sides`."""
    idle = stage.setting.cluster.gpus - stage.cluster.gpus
    about = (
        f"{stage.name}: {stage.config.model.preset} at {stage.config.data.resolution} px, batch {stage.batch:,}, "
        f"{stage.config.steps:,} steps, on {stage.cluster.gpus:,} × {stage.cluster.gpu.device}"
        + (f" ({idle:,} more stand idle: they would not divide the batch)" if idle else "")
    )
    topics = {
        "model": _model(stage),
        "memory": _memory(stage),
        "time": _time(stage),
        "reading": _reading(stage, sides),
        "exchange": _exchange(stage),
        "checkpoints": _checkpoints(stage),
    }
    for topic, rows in topics.items():
        for row in rows:
            yield Figure(about, topic, *row)


Row = tuple[str, float | int | str, str, str]


def _model(stage: Stage) -> Iterator[Row]:
    counts = count_parameters(stage.model)
    yield "parameters", counts.total, "", "counted on modules without memory"
    for name, count in (("attention", counts.attention), ("FFNs", counts.ffn), ("query masks", counts.query_mask)):
        yield f"  of them {name}", count, "", "likewise"
    rows, columns = stage.grid
    tokens = f"{rows * columns:,} image tokens, {stage.setting.caption_tokens:g} of text"
    yield "FLOPs of an image, forward", stage.forward_flops / 1e12, "TFLOP", f"products of {tokens}; 2 a multiply-add"
    routing = stage.config.routing.name
    trained = "three forward passes" + ("" if routing == "none" else f", with {routing} in its share of the steps")
    yield "FLOPs of an image, trained", stage.training_flops / 1e12, "TFLOP", trained
    yield "FLOPs of the stage", stage.flops / 1e18, "EFLOP", "of an image, trained × batch × steps"


def _memory(stage: Stage) -> Iterator[Row]:
    parts, gpus, memory = stage.states, stage.cluster.gpus, stage.cluster.gpu.memory_gib
    bits = "bf16" if stage.bf16 else "fp32"
    yield "weights", parts.weights / GIB, "GiB a GPU", f"{bits}, all parameters on each GPU"
    yield (
        "gradients and their accumulation",
        parts.gradients / GIB,
        "GiB a GPU",
        "fp32, one buffer for both, all parameters",
    )
    share = f"fp32, 1/{gpus} of the parameters"
    yield "masters", parts.masters / GIB, "GiB a GPU", share
    yield "moments", parts.moments / GIB, "GiB a GPU", f"{share}, twice; once for those of Muon"
    yield "average of the weights", parts.average / GIB, "GiB a GPU", share
    yield "buckets of the reduction", 0, "GiB a GPU", "parts of the gradients' buffer: it is reduced in place"
    yield "NCCL's buffers", NCCL_GIB, "GiB a GPU", "assumed; in the share that is left free"
    configured = stage.deepspeed["train_micro_batch_size_per_gpu"]
    for recompute in (False, True):
        words = " with recompute" if recompute else ""
        one = stage.activations(MicroBatch(1, recompute))
        yield (
            f"activations of an image{words}",
            one / GIB,
            "GiB a GPU",
            "what the forward pass keeps for the backward pass",
        )
        largest = stage.largest_micro(recompute)
        how = f"divides {stage.batch:,} on {gpus} GPUs; states and activations within {USABLE:.0%} of {memory:g} GiB"
        yield f"largest micro-batch{words}", largest or "none fits", "images", how
        for images in sorted({configured, largest} - {0}):
            total = parts.total + stage.activations(MicroBatch(images, recompute))
            how = "states and activations" + ("; the config's micro-batch" if images == configured else "")
            yield f"memory at micro-batch {images}{words}", total / GIB, "GiB a GPU", how


def _time(stage: Stage) -> Iterator[Row]:
    setting, images = stage.setting, stage.config.steps * stage.batch
    micro = stage.micro
    accumulation = stage.batch // (stage.cluster.gpus * micro.images)
    words = " with recompute" if micro.recompute else ""
    yield (
        "micro-batch",
        micro.images,
        "images",
        f"the largest that fits{words}; {accumulation} of them a step on each GPU",
    )
    yield "images", images, "", "steps × batch"
    yield "epochs", images / setting.samples, "", f"images / {setting.samples:,} samples"
    yield "MFU", 100 * setting.mfu, "%", setting.mfu_from
    rate = f"{stage.cluster.gpus} GPUs × {stage.cluster.gpu.bf16_tflops:g} TFLOP/s × MFU"
    yield "seconds of a step", stage.step_s, "s", f"FLOPs of an image, trained × batch / ({rate})"
    yield "images a second", stage.batch / stage.step_s, "1/s", "batch / seconds of a step"
    yield (
        "hours",
        stage.hours,
        "h",
        "steps × seconds of a step; without failures, checkpoints and previews",
    )
    yield "GPU-days", stage.gpu_hours / 24, "", f"hours × {setting.cluster.gpus} GPUs / 24"
    if setting.price is not None:
        yield "money", stage.gpu_hours * setting.price, "", f"hours × {setting.cluster.gpus} GPUs × {setting.price:g}"


def _reading(stage: Stage, sides: Sequence[int]) -> Iterator[Row]:
    per_node = stage.batch / stage.step_s / stage.cluster.nodes
    size = _sample_bytes(stage, sides)
    yield "samples", per_node, "1/s a node", "images a second / nodes: what the loaders of a node must give"
    yield (
        "reading",
        per_node * size / GB,
        "GB/s a node",
        f"samples × {size / 1e6:.3f} MB: a sample is read with all its resolutions",
    )
    workers = max(1, stage.config.data.workers) * stage.cluster.gpus_per_node  # 0: the training process loads
    yield "each loader process", per_node / workers, "samples/s", f"of {workers} on a node (data.workers × GPUs)"


def _exchange(stage: Stage) -> Iterator[Row]:
    gpus, whole = stage.cluster.gpus, stage.parameters
    others = (gpus - 1) / gpus
    reduced, gathered = 4 * whole * others, (2 if stage.bf16 else 4) * whole * others
    exchanged = 4 * whole / gpus * others
    yield (
        "reduction of the gradients",
        reduced / GB,
        "GB a step",
        "fp32, (N - 1)/N of 4 bytes a parameter, once a step, in each GPU's place of the ring",
    )
    yield (
        "exchange of partitions",
        exchanged / GB,
        "GB a step",
        "fp32, 1/N of the sums, sent to the GPUs whose partitions they are",
    )
    yield "gathering of the weights", gathered / GB, "GB a step", "(N - 1)/N of all weights, once a step"
    if stage.cluster.nodes > 1:
        total = reduced + gathered + exchanged * stage.cluster.gpus_per_node
        yield (
            "network, mean",
            total / stage.step_s / GB,
            "GB/s a node",
            "all of it passes each node's network once a ring / seconds of a step",
        )
        last = (
            stage.micro.images
            * 2
            / 3
            * stage.training_flops
            / (stage.cluster.gpu.bf16_tflops * 1e12 * stage.setting.mfu)
        )
        there = stage.cluster.network_gbs * stage.cluster.gpus_per_node
        how = f"the reduction within the last backward pass of {last:.3g} s; --network gives {there:g} GB/s a node"
        yield "network, to hide the reduction", reduced / last / GB, "GB/s a node", how


def _checkpoints(stage: Stage) -> Iterator[Row]:
    size, cluster, keep = checkpoint_bytes(stage.config), stage.cluster, stage.config.checkpoint
    yield (
        "a checkpoint",
        size / GB,
        "GB",
        f"{size / stage.parameters:.3g} bytes a parameter: weights, moments and average in fp32",
    )
    yield (
        "all that are kept",
        kept_checkpoint_bytes(stage.config) / TB,
        "TB",
        f"keep_last {keep.keep_last}, keep_every {keep.keep_every}, one being written",
    )
    yield "writing one", stage.checkpoint_write_s, "s", f"at {cluster.disk_gbs:g} GB/s in all (--disk)"
    how = f"1/{cluster.gpus} of it to host memory at {HOST_COPY_GBS:g} GB/s (assumed); the writing goes on in the background"
    yield (
        "training stands still for",
        stage.checkpoint_stop_s,
        "s",
        how if keep.background else "it is written at once",
    )
    yield (
        "time between checkpoints",
        keep.every * stage.step_s / 60,
        "min",
        f"checkpoint.every {keep.every} × seconds of a step",
    )


def _sample_bytes(stage: Stage, sides: Sequence[int]) -> float:
    """Bytes of a sample that holds these resolutions."""
    model, tokens = stage.model, stage.setting.caption_tokens
    features = stage.feature_width
    return sample_bytes(sides, model.latent_channels, DOWNSAMPLE, model.text_width, tokens, feature_width=features)


def of_all(stages: Sequence[Stage], setting: Setting) -> Iterator[Figure]:
    """The figures of all stages together: the data set that they share, and sums."""
    model, sides = stages[0].model, sides_of(stages)
    fullest = max(stages, key=lambda stage: stage.feature_width)  # one data set serves all
    size = _sample_bytes(fullest, sides)
    pixels = " and ".join(map(str, sides))
    what = f"latents at {pixels} px, mean and std in fp16; text of {setting.caption_tokens:g} tokens in bf16"
    if width := fullest.feature_width:
        what += f"; features of DINOv2's base, {width} wide, in fp16 (encoding them is not counted)"
    rows: list[tuple[str, Row]] = [
        ("data", ("a sample", size / 1e6, "MB", what)),
        (
            "data",
            (
                "shards",
                setting.samples * size / TB,
                "TB",
                f"× {setting.samples:,} samples, all large enough for {sides[-1]} px",
            ),
        ),
    ]
    flops = encoding_flops(sides, model.latent_channels, model.text_width, setting.caption_tokens)
    if flops is None:
        hours: float | str = "not known"
        how = f"no encoders with width {model.text_width} and {model.latent_channels} channels are in pretrain/plan/encoding.py"
    else:
        hours = setting.samples * flops / (setting.cluster.gpu.bf16_tflops * 1e12 * setting.mfu) / 3600
        how = f"{flops / 1e12:.2f} TFLOP a sample (T5 and the VAE's encoder) at the same MFU; CPUs decode pictures beside it"
    rows.append(("data", ("encoding", hours, "GPU-hours", how)))
    total = sum(stage.gpu_hours for stage in stages)
    rows.append(("sum", ("hours", sum(stage.hours for stage in stages), "h", "of all stages")))
    rows.append(("sum", ("GPU-days", total / 24, "", "of all stages, without encoding")))
    if setting.price is not None:
        rows.append(("sum", ("money, training", total * setting.price, "", f"GPU-hours × {setting.price:g}")))
        if not isinstance(hours, str):
            rows.append(("sum", ("money, encoding", hours * setting.price, "", f"GPU-hours × {setting.price:g}")))
    for part, row in rows:
        yield Figure("all stages", part, *row)
