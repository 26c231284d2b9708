"""The authors' released checkpoint as a `DiT`: its settings, names and shapes translated.

Letters: D width, C latent channels, E the text encoder's width, p patch.

What differs from this project's own layout: queries, keys and values are three linear maps there; the query mask's MLP is fed
[input, previous mask], whose last column is `premask` here; the patch embedding is a convolution. What the release computes
otherwise than the paper says (its mask's time table is indexed by truncated timesteps, the previous mask enters every layer,
scale comes before shift) is `mask: release` here too, so the results are the same.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pretrain.models.config import DiTConfig
from pretrain.models.focusdit.ffn import local_size
from pretrain.models.focusdit.mask import TIMESTEPS

SHIFT = 3.0  # of the times towards noise, when sampling
# Settings that decide the backbone's shape; each must be there.
SHAPE = (
    "num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "caption_channels", "patch_size",
    "sample_size", "norm_eps", "use_q_mask",
)  # fmt: skip
# Settings with one supported value. Each must be there (`attention_type` alone may be left out): without them the released code
# would compute something else, such as positions without rotation.
SUPPORTED: dict[str, Any] = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_single",
    "num_embeds_ada_norm": TIMESTEPS,
    "patch_size_t": 1,
    "use_rope": True,
    "use_softmask": True,
    "use_timestep": True,
}
# Settings that change nothing for one image: of training, of the time axis, of how (not what) is computed.
WITHOUT_EFFECT = (
    "_class_name", "_diffusers_version", "_name_or_path", "attention_mode", "dropout", "interpolation_scale_t",
    "mask_threshold", "norm_num_groups", "sample_size_t", "upcast_attention", "use_stable_fp32",
)  # fmt: skip
READ_BELOW = ("cross_attention_dim", "out_channels", "interpolation_scale_h", "interpolation_scale_w")


def read_config(content: dict[str, Any], ffn_widths: list[int], ignore: tuple[str, ...] = ()) -> DiTConfig:
    """The backbone that a released `config.json` describes.

    Args:
        ffn_widths: each block's FFN entries, as its weights have them: no setting names the layout.
        ignore: unknown settings that shall not count.

    Raises:
        ValueError: naming every setting that is missing or not supported.
    """
    problems = [f"{key}: missing" for key in SHAPE if content.get(key) is None]
    problems += [
        f"{key}: missing; the released model has {value!r}"
        for key, value in SUPPORTED.items()
        if key not in content and key != "attention_type"
    ]
    if problems:
        raise ValueError("; ".join(problems))
    width = content["num_attention_heads"] * content["attention_head_dim"]
    wanted = SUPPORTED | {"cross_attention_dim": width, "out_channels": content["in_channels"]}
    problems = [
        f"{key}: {content[key]!r} is not supported, only {value!r}"
        for key, value in wanted.items()
        if content.get(key, value) != value
    ]
    known = {*SHAPE, *wanted, *WITHOUT_EFFECT, *READ_BELOW, *ignore}
    # An unknown setting that is off is as good as absent.
    problems += [f"{key}: {value!r} is unknown" for key, value in content.items() if key not in known and value]
    scale, problem = _position_scale(content, ignore)
    problems += [problem] if problem else []
    config = DiTConfig(
        width=width,
        heads=content["num_attention_heads"],
        depth=content["num_layers"],
        patch=content["patch_size"],
        latent_channels=content["in_channels"],
        text_width=content["caption_channels"],
        mask="release" if content["use_q_mask"] else "none",
        ffn="uniform" if set(ffn_widths) == {4 * width} else "tapered",
        rotary="release",
        position_scale=scale,
        norm_eps=content["norm_eps"],
    )
    problems += config.problems()
    tapered = [local_size(config.ffn, width, 0, block, config.depth) for block in range(config.depth)]
    if ffn_widths and ffn_widths != tapered:
        problems.append(f"FFN widths {ffn_widths} are neither {4 * width} in each block nor the release's {tapered}")
    if problems:
        raise ValueError("; ".join(problems))
    return config


def _position_scale(content: dict[str, Any], ignore: tuple[str, ...]) -> tuple[float, str]:
    """The scale of rows and columns, and why it cannot be read, where they differ.

    The released code keeps its angles by their number alone: on square pictures the columns are turned by the rows' scale, on
    others by their own, or by that of a picture drawn before.
    """
    size = content["sample_size"]
    sides = size if isinstance(size, list) else (size, size)
    given = [content.get(f"interpolation_scale_{side}") for side in "hw"]
    by_default = [side / base for side, base in zip(sides, (30, 40), strict=True)]
    rows, columns = (default if scale is None else scale for scale, default in zip(given, by_default, strict=True))
    if rows == columns or "interpolation_scale_w" in ignore:
        return rows, ""
    return rows, (
        f"interpolation_scale_h: {given[0]}, interpolation_scale_w: {given[1]}: rows are divided by {rows:g} and columns by "
        f"{columns:g}, but the released code turns the columns of square pictures by the rows' scale, so what such weights "
        "learned depends on their pictures; --ignore interpolation_scale_w takes the rows' for both, as it was on square ones"
    )


def layout(c: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a released checkpoint with its shape."""
    D, p, C = c.width, c.patch, c.latent_channels
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed.proj.weight": (D, C, p, p),
        "pos_embed.proj.bias": (D,),
        "scale_shift_table": (2, D),
    }

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    linear("caption_projection.linear_1", c.text_width, D)
    linear("caption_projection.linear_2", D, D)
    linear("adaln_single.emb.timestep_embedder.linear_1", 256, D)
    linear("adaln_single.emb.timestep_embedder.linear_2", D, D)
    linear("adaln_single.linear", D, 6 * D)
    linear("proj_out", D, p * p * C)
    for i in range(c.depth):
        block = f"transformer_blocks.{i}"
        shapes[f"{block}.scale_shift_table"] = (6, D)
        for attention in ("attn1", "attn2"):
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                linear(f"{block}.{attention}.{part}", D, D)
        entries = local_size(c.ffn, D, c.shared_width, i, c.depth)
        linear(f"{block}.ff.net.0.proj", D, entries)
        linear(f"{block}.ff.net.2", entries, D)
        if c.mask != "none":
            shapes[f"{block}.mgen_q.norm.emb.weight"] = (TIMESTEPS + 1, D)
            linear(f"{block}.mgen_q.norm.linear", D, 2 * D)
            for n, (inputs, outputs) in enumerate(pairwise((D, *c.mask_hidden, 1)), start=1):
                linear(f"{block}.mgen_q.MLP.fc{n}", inputs + 1, outputs)
    return shapes


def convert(tensors: dict[str, Tensor], c: DiTConfig) -> dict[str, Tensor]:
    """Released tensors, which must be those of `layout(c)`, to a `DiT(c)`'s; each is used exactly once."""
    left, made = dict(tensors), {}

    def linear(there: str, here: str) -> None:
        made[f"{here}.weight"], made[f"{here}.bias"] = left.pop(f"{there}.weight"), left.pop(f"{there}.bias")

    def joined(there: list[str], here: str) -> None:
        for kind in ("weight", "bias"):
            made[f"{here}.{kind}"] = torch.cat([left.pop(f"{name}.{kind}") for name in there])

    linear("pos_embed.proj", "patch_embed.proj")
    made["patch_embed.proj.weight"] = made["patch_embed.proj.weight"].flatten(1)
    linear("caption_projection.linear_1", "text_projection.linear_1")
    linear("caption_projection.linear_2", "text_projection.linear_2")
    linear("adaln_single.emb.timestep_embedder.linear_1", "time_embed.linear_1")
    linear("adaln_single.emb.timestep_embedder.linear_2", "time_embed.linear_2")
    linear("adaln_single.linear", "time_modulation")
    linear("proj_out", "final.proj")
    made["final.scale_shift_table"] = left.pop("scale_shift_table")
    for i in range(c.depth):
        there, here = f"transformer_blocks.{i}", f"blocks.{i}"
        made[f"{here}.scale_shift_table"] = left.pop(f"{there}.scale_shift_table")
        joined([f"{there}.attn1.to_{part}" for part in "qkv"], f"{here}.self_attention.qkv")
        linear(f"{there}.attn1.to_out.0", f"{here}.self_attention.out")
        linear(f"{there}.attn2.to_q", f"{here}.cross_attention.q")
        joined([f"{there}.attn2.to_{part}" for part in "kv"], f"{here}.cross_attention.kv")
        linear(f"{there}.attn2.to_out.0", f"{here}.cross_attention.out")
        linear(f"{there}.ff.net.0.proj", f"{here}.ffn.key")
        linear(f"{there}.ff.net.2", f"{here}.ffn.value")
        if c.mask != "none":
            made[f"{here}.query_mask.time_table.weight"] = left.pop(f"{there}.mgen_q.norm.emb.weight")
            linear(f"{there}.mgen_q.norm.linear", f"{here}.query_mask.time_linear")
            layers = [*(f"layers.{n}" for n in range(len(c.mask_hidden))), "last"]
            for n, layer in enumerate(layers, start=1):
                target = f"{here}.query_mask.{layer}"
                linear(f"{there}.mgen_q.MLP.fc{n}", f"{target}.linear")
                whole = made[f"{target}.linear.weight"]
                made[f"{target}.linear.weight"] = whole[:, :-1].contiguous()
                made[f"{target}.premask"] = whole[:, -1].contiguous()
    assert not left, f"tensors that were not used: {sorted(left)}"
    return made
