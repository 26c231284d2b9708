"""A stand-in for the authors' released FocusDiT: its inference forward and its checkpoint's layout, in plain torch.

Written only from the facts known about the release (shared/focusdit.md), not from `pretrain/`, and it imports nothing
of it: a test that finds the importer and this file in agreement compares two separate readings of the same facts.
It is small and plain where the release is fast, knows no training (no dropout), and refuses the settings whose
meaning the facts do not give.

Shape letters: B samples, C latent channels, H and W the latent's height and width, p the patch's side, N = (H/p)(W/p)
image tokens, D = heads · head width, L text tokens.
"""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

# What the facts describe; any other value of these keys is a model that this file cannot restate.
ONLY_KNOWN = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_single",
    "patch_size_t": 1,
    "use_q_mask": True,
    "use_rope": True,
    "use_softmask": True,
    "use_timestep": True,
}

# A small model's config.json. `cross_attention_dim` and `out_channels` are filled in by `write_release`.
CONFIG: dict[str, Any] = {
    "_class_name": "FocusDiT",
    "_diffusers_version": "0.30.2",
    **ONLY_KNOWN,
    "attention_head_dim": 12,
    "attention_mode": "xformers",
    "attention_type": "default",
    "caption_channels": 10,
    "cross_attention_dim": None,
    "double_self_attention": False,
    "downsampler": None,
    "dropout": 0.0,
    "in_channels": 3,
    "interpolation_scale_h": 1.0,
    "interpolation_scale_t": 1.0,
    "interpolation_scale_w": 1.0,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "num_attention_heads": 4,
    "num_embeds_ada_norm": 1000,
    "num_layers": 5,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": None,
    "patch_size": 2,
    "sample_size": [16, 24],
    "sample_size_t": 1,
    "upcast_attention": False,
    "use_additional_conditions": None,
    "use_linear_projection": False,
    "use_stable_fp32": False,
}


class ReleasedOutput(NamedTuple):
    """What a forward gives."""

    prediction: Tensor  # [B,C,1,H,W]
    masks: Tensor  # [blocks,B,N], each in (0,1)


def ffn_widths(layers: int, width: int, layout: str = "tapered") -> list[int]:
    """The FFN's hidden width in every block: `tapered` as released, or `uniform`, the DiT baseline's 4D."""
    if layout == "uniform":
        return [4 * width] * layers
    if layout != "tapered":
        raise ValueError(f"no such FFN layout: {layout!r}")
    step = 2 * width // max(1, (layers - 1) // 2)
    return [3 * width + min(i, layers - 1 - i) * step for i in range(layers)]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def rotary_angles(rows: int, columns: int, third: int, scale_h: float, scale_w: float, like: Tensor) -> Tensor:
    """The angles of every token [N, 3·third]: thirds for time (always 0), row and column, each two equal halves.

    They are made in fp32 and rounded to the tokens' precision, before cosine and sine are taken.
    """
    freq = 10000 ** -(torch.arange(0, third, 2, dtype=torch.float32, device=like.device) / third)
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float32, device=like.device) / scale_h,
        torch.arange(columns, dtype=torch.float32, device=like.device) / scale_w,
        indexing="ij",
    )
    positions = torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3, 1)
    return (positions * freq).repeat(1, 1, 2).flatten(1).to(like.dtype)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate-half inside each third of the head width; x is [B,heads,N,head width]."""
    first, second = x.unflatten(-1, (3, 2, -1)).unbind(-2)
    turned = torch.stack([-second, first], dim=-2).flatten(-3)
    return x * angles.cos() + turned * angles.sin()


class TimestepEmbedder(nn.Module):
    """A sinusoid of 256 (cosines first) of the timestep, as it is, then two linear layers."""

    def __init__(self, width: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(256, width), nn.Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:
        t = timestep.float()
        freq = 10000 ** -(torch.arange(128, dtype=t.dtype, device=t.device) / 128)
        angles = t[:, None] * freq
        wave = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight)
        return self.linear_2(F.silu(self.linear_1(wave)))


class AdaLNSingle(nn.Module):
    """The time embedding [B,D] and its projection [B,6D], shared by all blocks."""

    def __init__(self, width: int):
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedder(width)})
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.emb["timestep_embedder"](timestep)
        return embedded, self.linear(F.silu(embedded))


class CaptionProjection(nn.Module):
    def __init__(self, text_width: int, width: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(text_width, width), nn.Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))


class Attention(nn.Module):
    """Attention to every token of `source`: no padding mask. Rotary on q and k where angles are given."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, source: Tensor, angles: Tensor | None = None) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(source), self.to_v(source))
        )
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return self.to_out[0]((weights @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        into, out = nn.ModuleDict({"proj": nn.Linear(width, hidden)}), nn.Linear(hidden, width)
        self.net = nn.ModuleList([into, nn.Identity(), out])  # index 1 is a dropout's, which has no weights

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](F.gelu(self.net[0]["proj"](x), approximate="tanh"))


class TableAdaLN(nn.Module):
    """MaskGen's AdaLN: a table of its own over the integer timesteps; the chunks are (scale, shift)."""

    def __init__(self, width: int, steps: int):
        super().__init__()
        self.emb = nn.Embedding(steps + 1, width)
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(self.emb(timestep.long())))[:, None].chunk(2, dim=-1)
        return modulate(F.layer_norm(x, x.shape[-1:], eps=1e-5), shift, scale)


class MaskGen(nn.Module):
    """Q-MaskGen: [B,N,D] and the previous mask [B,N,1], read again as the last column of all five layers, to a mask."""

    def __init__(self, width: int, steps: int):
        super().__init__()
        self.norm = TableAdaLN(width, steps)
        sizes = [width, 512, 128, 32, 16, 1]
        self.MLP = nn.ModuleDict({f"fc{i + 1}": nn.Linear(sizes[i] + 1, sizes[i + 1]) for i in range(5)})

    def forward(self, x: Tensor, previous: Tensor, timestep: Tensor) -> Tensor:
        y = self.norm(x, timestep)
        for i in range(1, 6):
            y = self.MLP[f"fc{i}"](torch.cat([y, previous], dim=-1))
            y = F.relu(y) if i < 5 else y.sigmoid()
        return y


class Block(nn.Module):
    def __init__(self, config: dict[str, Any], width: int, hidden: int):
        super().__init__()
        heads, eps, affine = (config[k] for k in ("num_attention_heads", "norm_eps", "norm_elementwise_affine"))
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))
        self.norm1 = nn.LayerNorm(width, eps, affine)
        self.attn1 = Attention(width, heads)
        self.attn2 = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps, affine)
        self.ff = FeedForward(width, hidden)
        self.mgen_q = MaskGen(width, config["num_embeds_ada_norm"])

    def forward(
        self, x: Tensor, text: Tensor, time: Tensor, timestep: Tensor, mask: Tensor, angles: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`time` [B,6D] is the shared projection, `mask` the previous block's."""
        six = (self.scale_shift_table + time.unflatten(-1, (6, -1)))[:, :, None]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = six.unbind(1)
        y = modulate(self.norm1(x), shift_msa, scale_msa)
        x = x + gate_msa * self.attn1(y, y, angles)
        x = x + self.attn2(x, text)  # its input is not normalised
        mask = self.mgen_q(x, mask, timestep)
        return x + mask * gate_mlp * self.ff(modulate(self.norm2(x), shift_mlp, scale_mlp)), mask


class ReleasedFocusDiT(nn.Module):
    """The released model, from its config.json's keys. `ffn` is the widths' layout, which no key tells."""

    def __init__(self, config: dict[str, Any], ffn: str = "tapered"):
        super().__init__()
        for key, value in ONLY_KNOWN.items():
            if config[key] != value:
                raise ValueError(f"{key}={config[key]!r}: the facts only tell of {value!r}")
        width = config["num_attention_heads"] * config["attention_head_dim"]
        if config["cross_attention_dim"] != width or config["attention_head_dim"] % 6:
            raise ValueError("cross_attention_dim must be heads · head width, and the head width a multiple of 6")
        size, p = config["sample_size"], config["patch_size"]
        size_h, size_w = size if isinstance(size, (list, tuple)) else (size, size)
        scale_h, scale_w = config["interpolation_scale_h"], config["interpolation_scale_w"]
        self.scale_h = size_h / 30 if scale_h is None else scale_h
        self.scale_w = size_w / 40 if scale_w is None else scale_w
        self.third, self.patch = config["attention_head_dim"] // 3, p

        self.pos_embed = nn.ModuleDict({"proj": nn.Conv2d(config["in_channels"], width, p, stride=p)})
        self.caption_projection = CaptionProjection(config["caption_channels"], width)
        self.adaln_single = AdaLNSingle(width)
        widths = ffn_widths(config["num_layers"], width, ffn)
        self.transformer_blocks = nn.ModuleList(Block(config, width, hidden) for hidden in widths)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.proj_out = nn.Linear(width, p * p * config["out_channels"])

    def forward(self, latents: Tensor, text: Tensor, timestep: Tensor) -> ReleasedOutput:
        """Latents [B,C,1,H,W], text [B,1,L,text width], timestep [B] in 0..1000, a float or an integer."""
        grid = self.pos_embed["proj"](latents.squeeze(2))
        rows, columns = grid.shape[-2:]
        x = grid.flatten(2).transpose(1, 2)
        words = self.caption_projection(text.squeeze(1))
        embedded, time = self.adaln_single(timestep)
        angles = rotary_angles(rows, columns, self.third, self.scale_h, self.scale_w, like=x)

        mask, masks = torch.ones_like(x[..., :1]), []
        for block in self.transformer_blocks:
            x, mask = block(x, words, time, timestep, mask, angles)
            masks.append(mask.squeeze(-1))

        # The last layer adds the time embedding itself, not its projection.
        shift, scale = (self.scale_shift_table + embedded[:, None])[:, :, None].unbind(1)
        x = self.proj_out(modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale))
        x = x.unflatten(-1, (self.patch, self.patch, -1)).unflatten(1, (rows, columns))  # [B,rows,columns,p,p,C]
        image = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return ReleasedOutput(image.unsqueeze(2), torch.stack(masks))


@torch.no_grad()
def randomise(model: ReleasedFocusDiT, seed: int) -> None:
    """Weights that keep activations of order 1, leave no tensor near zero and spread the masks over (0.05, 0.95)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("scale_shift_table"):
            parameter.copy_(0.4 * noise)
        elif name.endswith("norm.emb.weight"):
            parameter.copy_(noise)
        elif name.endswith("bias"):
            parameter.copy_(0.2 * noise + 0.1 * noise.sign())  # none is small, not even a bias of one number
        elif parameter.ndim == 1:  # an affine LayerNorm
            parameter.copy_(1 + 0.2 * noise)
        else:
            gain = 1.0
            if ".MLP." in name:  # balanced rows, or a ReLU's positive outputs would push all masks to one side
                gain, noise = 1.6, noise - noise.mean(dim=1, keepdim=True)
            parameter.copy_(gain / math.sqrt(parameter[0].numel()) * noise)


def write_release(folder: Path, *, ffn: str = "tapered", seed: int = 0, **changes: Any) -> ReleasedFocusDiT:
    """Write a small random release (config.json and the weights) into `folder`; `changes` override the config's keys."""
    if unknown := set(changes) - set(CONFIG):
        raise TypeError(f"no such config key: {sorted(unknown)}")
    config = {**CONFIG, **changes}
    if config["cross_attention_dim"] is None:
        config["cross_attention_dim"] = config["num_attention_heads"] * config["attention_head_dim"]
    if config["out_channels"] is None:
        config["out_channels"] = config["in_channels"]
    with torch.random.fork_rng(devices=[]):  # torch's own initialisation leaves the caller's random state alone
        model = ReleasedFocusDiT(config, ffn).eval()
    randomise(model, seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return model


# ---- the release's way to a picture ----

# The negative prompt as PixArt-alpha's cleaning leaves it: without "jpeg", which it takes for the end of a file's name.
NEGATIVE = (
    "nsfw, lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, "
    "worst quality, low quality, normal quality, artifacts, signature, watermark, username, blurry"
)


def twice_shifted(steps: int, shift: float) -> Tensor:
    """The times: 1000 training times, shifted; their ends, evenly divided, are shifted once more. A last 0 follows."""

    def shifted(sigma: Tensor) -> Tensor:
        return shift * sigma / (1 + (shift - 1) * sigma)

    ends = shifted(torch.tensor([1.0, 1 / 1000], dtype=torch.float64))
    return torch.cat([shifted(torch.linspace(*ends.tolist(), steps, dtype=torch.float64)), torch.zeros(1)])


def padded_embeddings(tokenizer: Any, text_encoder: Any, caption: str, tokens: int) -> Tensor:
    """T5's output on the padded caption [1,1,tokens,width], the padding's too; `caption` is clean but for its case."""
    ids = tokenizer(caption.lower().strip()).input_ids
    mask = torch.zeros(1, tokens, dtype=torch.long)
    mask[0, : len(ids)] = 1
    padded = torch.full((1, tokens), tokenizer.pad_token_id)
    padded[0, : len(ids)] = torch.tensor(ids)
    return text_encoder(padded, attention_mask=mask).last_hidden_state[:, None]


@torch.no_grad()
def draw_as_released(
    model: ReleasedFocusDiT,
    tokenizer: Any,
    text_encoder: Any,
    vae: Any,
    prompt: str,
    seed: int,
    size: tuple[int, int],
    steps: int = 30,
    guidance: float = 5.5,
    shift: float = 3.0,
    tokens: int = 512,
    negative: str = NEGATIVE,
) -> Tensor:
    """A picture [H,W,3] in 8 bits, by a model and a T5 in bf16 and a VAE in fp32; `size` is the latent's."""
    generator = torch.Generator().manual_seed(seed)
    channels = model.proj_out.out_features // model.patch**2
    latents = torch.randn(1, channels, 1, *size, generator=generator, dtype=torch.bfloat16)
    text = torch.cat([padded_embeddings(tokenizer, text_encoder, c, tokens) for c in (negative, prompt)])
    sigmas = twice_shifted(steps, shift).float()
    for now, following in pairwise(sigmas):
        without, wanted = model(torch.cat([latents] * 2), text, (1000 * now).expand(2)).prediction.chunk(2)
        velocity = without + guidance * (wanted - without)
        latents = (latents.float() + (following - now) * velocity).to(torch.bfloat16)
    mean, std = (torch.tensor(v)[:, None, None] for v in (vae.config.latents_mean, vae.config.latents_std))
    decoded = vae.decode(latents[:, :, 0].to(torch.float16) * std + mean, return_dict=False)[0]
    return ((decoded / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)[0].permute(1, 2, 0)
