"""Spatiotemporal masked autoencoders: the method, in one file that needs torch alone.

"Masked Autoencoders As Spatiotemporal Learners", Feichtenhofer, Fan, Li, He, arXiv 2205.09113.
Cut a video into spacetime patches, hide 90 % of them at random, encode the visible tenth with a
plain ViT, and let a small decoder predict the hidden pixels.

    model = MaskedAutoencoder(**SIZES["large"])
    loss = model(video)            # video: (B, 3, 16, 224, 224), uint8 or normalised float

`Classifier` puts a head on the same encoder; `from_released` reads the official checkpoints.

The letters in the shapes at the line's end:
    B  clips                                    N  tokens of a clip, N = t * h * w
    T, H, W  frames, height, width of a video   K  visible tokens, M  hidden tokens, K + M = N
    u, p, q  frames, height, width of a patch   P  numbers in a patch, P = u * p * q * C
    t, h, w  patches along each axis, the grid  C  channels, D  width of a token
"""

import math
import re
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

PIXEL_MEAN, PIXEL_STD = 0.45, 0.225  # of every channel, where white is 1 (both official codes)

# ---------------------------------------------------------------------------------------- patches

def grid_size(video_size, patch):
    """(T, H, W) and (u, p, q) -> (t, h, w), or ValueError when patches do not fill the video."""
    for name, length, step in zip(("frames", "height", "width"), video_size, patch):
        if length < 1 or step < 1 or length % step:
            raise ValueError(f"{name} {length} cannot be cut into patches of {step}: "
                             f"give a multiple of {step}, or another patch")
    return tuple(length // step for length, step in zip(video_size, patch))

def patchify(video, patch):
    """(B, C, T, H, W) -> (B, N, P), N in the order (t, h, w), P in the order (u, p, q, C).

    Moves numbers and computes nothing. `unpatchify` is its inverse."""
    (B, C, *size), (u, p, q) = video.shape, patch
    t, h, w = grid_size(size, patch)
    x = video.reshape(B, C, t, u, h, p, w, q)
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1)  # (B, t, h, w, u, p, q, C)
    return x.reshape(B, t * h * w, u * p * q * C)  # (B, N, P)

def unpatchify(patches, patch, grid):
    """(B, N, P) -> (B, C, T, H, W), for a patch (u, p, q) and a grid (t, h, w)."""
    (B, N, P), (u, p, q), (t, h, w) = patches.shape, patch, grid
    x = patches.reshape(B, t, h, w, u, p, q, P // (u * p * q))
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B, C, t, u, h, p, w, q)
    return x.reshape(B, -1, t * u, h * p, w * q)  # (B, C, T, H, W)

def normalise(pixels):
    """uint8 0..255 -> float32, mean 0 and std 1 in natural video. Floats are normalised already."""
    if pixels.is_floating_point():
        return pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    return (pixels.float() / 255 - PIXEL_MEAN) / PIXEL_STD

# ------------------------------------------------------------------------------------------ masks

STRATEGIES = ("agnostic", "tube", "frame", "block")

def mask_noise(strategy, batch, grid, generator=None, device=None):
    """Random numbers in [0, 1) for `random_masking`. Their shape decides what is hidden together.

    agnostic  (B, t, h, w)  every token on its own: the paper's choice
    tube      (B, 1, h, w)  space only: a position is visible in all frames or in none
    frame     (B, t, 1, 1)  time only: a time slice is visible as a whole or hidden as a whole
    block     (B, t, h, w)  the tokens of a cube share one number; a cube is a quarter of the grid
                            along each axis, rounded up, and at least 2 tokens
    """
    t, h, w = grid
    sides = [max(2, math.ceil(length / 4)) for length in grid]  # of a cube
    cubes = [math.ceil(length / side) for length, side in zip(grid, sides)]
    shapes = {"agnostic": (t, h, w), "tube": (1, h, w), "frame": (t, 1, 1), "block": cubes}
    if strategy not in shapes:
        raise ValueError(f"mask strategy {strategy!r} is unknown: choose {', '.join(STRATEGIES)}")
    noise = torch.rand(batch, *shapes[strategy], generator=generator, device=device)
    if strategy == "block":
        for axis, (length, side) in enumerate(zip(grid, sides), start=1):
            noise = noise.repeat_interleave(side, dim=axis).narrow(axis, 0, length)
    return noise

def random_masking(noise, grid, mask_ratio):
    """Choose the visible tokens: those of the smallest noise. The others are hidden.

    noise: (B, a, b, c), where each of a, b, c is the grid's length or 1, see `mask_noise`.
    Returns token numbers ids_keep (B, K) and ids_mask (B, M), in the order of their noise. K is
    floor(N * (1 - mask_ratio)), 156 of 1568 at 0.9, the same for all clips; tubes and frames are
    kept whole, at least one of them. Raises ValueError when nothing would be hidden.
    """
    B, *cells = noise.shape
    t, h, w = grid
    if len(cells) != 3 or any(cell not in (1, length) for cell, length in zip(cells, grid)):
        raise ValueError(f"noise of shape {tuple(noise.shape)} does not fit (B, {t}, {h}, {w})")
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask ratio {mask_ratio} is out of range: give a number between 0 and 1")
    a, b, c = cells
    kept = max(1, math.floor(a * b * c * (1 - mask_ratio) + 1e-6))  # 1e-6: 10 of 100 at 0.9, not 9
    if kept == a * b * c:
        raise ValueError(f"mask ratio {mask_ratio} of {kept} hides nothing: raise the ratio")
    tokens = torch.arange(t * h * w, device=noise.device).view(a, t // a, b, h // b, c, w // c)
    tokens = tokens.permute(0, 2, 4, 1, 3, 5).reshape(a * b * c, -1)  # (cells, tokens of a cell)
    order = noise.flatten(1).argsort(dim=1, stable=True)  # (B, cells)
    return tokens[order[:, :kept]].flatten(1), tokens[order[:, kept:]].flatten(1)  # (B, K), (B, M)

def gather(x, ids):  # (B, N, P), (B, K) -> (B, K, P)
    return x[torch.arange(len(x), device=x.device)[:, None], ids]

# ----------------------------------------------------------------------------------------- layers

class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"width {dim} cannot be divided among {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):  # (B, N, D)
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))  # (B, N, D)

def drop_path(x, rate, training):
    """Stochastic depth (arXiv 1603.09382): leave a residual branch (B, N, D) out of some clips."""
    if not training or rate == 0:
        return x
    keep = torch.rand(len(x), 1, 1, device=x.device) >= rate  # (B, 1, 1)
    return x * keep / (1 - rate)

class Block(nn.Module):
    """A pre-norm transformer block, as in ViT."""

    def __init__(self, dim, heads, mlp_ratio=4, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        width = mlp_ratio * dim
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, width), act=nn.GELU(), fc2=nn.Linear(width, dim)))
        self.drop_path = drop_path

    def forward(self, x):  # (B, N, D)
        x = x + drop_path(self.attn(self.norm1(x)), self.drop_path, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, self.training)

def initialize_weights(module):
    """For `Module.apply`. Norms keep torch's start (1 and 0); tokens and tables have their own."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)  # as mae_st; keeps the variance at any width
        nn.init.zeros_(module.bias)

def small_normal(*shape):
    """A learned table or token, std 0.02 as in both official codes."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02))

def waves(length, dim):
    """Sines and cosines along an axis, with periods from 2 * length to 2 tokens: (length, dim)."""
    period = 2 * length ** torch.linspace(1, 0, dim // 2)  # (dim / 2,)
    phase = 2 * math.pi * (torch.arange(length)[:, None] + 0.5) / period  # (length, dim / 2)
    return torch.cat([phase.sin(), phase.cos()], dim=1)

def separable_pos_embed(grid, dim, start):
    """Learned position tables for time (t, D) and space (h * w, D).

    start: "normal", small random numbers as in both official codes; or "waves", sines and cosines,
    time in the first quarter of D, space in the rest: near tokens are similar from the first step.
    """
    (t, h, w), a, b = grid, dim // 4, 3 * dim // 8
    if start == "normal":
        return small_normal(t, dim), small_normal(h * w, dim)
    if start != "waves" or dim % 16:
        raise ValueError(f"positions {start!r} of width {dim}: choose normal, or waves and 16 * n")
    space = torch.cat([waves(h, b).repeat_interleave(w, 0), waves(w, b).repeat(h, 1)], dim=1)
    return nn.Parameter(F.pad(waves(t, a), (0, dim - a))), nn.Parameter(F.pad(space, (a, 0)))

# ---------------------------------------------------------------------------------------- encoder

class Encoder(nn.Module):
    """A plain ViT over the tokens it is given: the visible ones in pre-training, else all of them.

    positions: how the position tables start, see `separable_pos_embed`. drop_path: rate of the last
    block, growing linearly from 0 at the first. checkpointing: compute activations again in the
    backward pass instead of keeping them; less memory, a third more time.
    """

    def __init__(self, *, frames=16, height=224, width=224, channels=3, patch=(2, 16, 16),
                 dim=1024, depth=24, heads=16, mlp_ratio=4, positions="normal", drop_path=0.0,
                 checkpointing=False):
        super().__init__()
        self.video_size, self.patch, self.channels = (frames, height, width), tuple(patch), channels
        self.grid = grid_size(self.video_size, self.patch)
        self.checkpointing = checkpointing
        self.patch_embed = nn.Linear(math.prod(patch) * channels, dim)
        self.cls_token = small_normal(1, dim)
        self.pos_embed_class = small_normal(1, dim)
        self.pos_embed_temporal, self.pos_embed_spatial = separable_pos_embed(
            self.grid, dim, positions)  # (t, D), (h * w, D)
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_ratio, drop_path * i / max(1, depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(initialize_weights)

    def patchify(self, video):
        """(B, C, T, H, W) -> (B, N, P). Raises ValueError for another size or kind of numbers."""
        size = (self.channels, *self.video_size)
        if tuple(video.shape[1:]) != size:
            raise ValueError(f"video of shape {tuple(video.shape)}: this model takes (B, *{size})")
        if video.dtype != torch.uint8 and not video.is_floating_point():
            raise ValueError(f"video of {video.dtype}: give uint8 0..255, or normalised floats")
        return patchify(video, self.patch)

    def pos_embed(self):
        """Time + space for all tokens: (N, D)."""
        return (self.pos_embed_temporal[:, None] + self.pos_embed_spatial).flatten(0, 1)

    def forward(self, patches, ids_keep=None):
        """(B, N, P) -> class token and patch tokens before the last norm, (B, 1 + K, D).

        ids_keep (B, K): the tokens to encode; None for all, K = N. Bytes are gathered first and
        normalised after, so hidden patches cost nothing.
        """
        pos_embed = self.pos_embed()  # (N, D)
        if ids_keep is not None:
            patches = gather(patches, ids_keep)  # (B, K, P)
            pos_embed = F.embedding(ids_keep, pos_embed)  # (B, K, D)
        x = normalise(patches).to(self.patch_embed.weight.dtype)
        x = self.patch_embed(x) + pos_embed  # (B, K, D)
        cls = (self.cls_token + self.pos_embed_class).expand(len(x), 1, -1)  # (B, 1, D)
        x = torch.cat([cls, x], dim=1)  # (B, 1 + K, D)
        for block in self.blocks:
            recompute = self.checkpointing and self.training
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x

    def features(self, video):
        """A whole video after the last norm: patch tokens (B, N, D) and class token (B, D)."""
        x = self.norm(self(self.patchify(video)))
        return x[:, 1:], x[:, 0]

# ------------------------------------------------------------------------------------ autoencoder

class MaskedAutoencoder(nn.Module):
    """The paper's Figure 1: encode the visible tenth, decode all tokens, compare hidden pixels.

    target    "frame": the first frame of each patch (paper code: 16 x 16 x 3 numbers); "patch": all
    norm_pix  normalise each target patch to mean 0, variance 1 (Table 2: 84.4 against 83.8 %)
    The decoder has one joint position table, class token first, and continues the encoder's class
    token, as in the paper code. For the other arguments see `Encoder`.
    """

    def __init__(self, *, decoder_dim=512, decoder_depth=4, decoder_heads=8, target="frame",
                 norm_pix=True, mlp_ratio=4, positions="normal", dim=1024, **encoder):
        super().__init__()
        if target not in ("frame", "patch"):
            raise ValueError(f"target {target!r} is unknown: choose frame or patch")
        self.encoder = Encoder(dim=dim, mlp_ratio=mlp_ratio, positions=positions, **encoder)
        self.target, self.norm_pix = target, norm_pix
        u, p, q = self.encoder.patch
        self.target_patch = (1 if target == "frame" else u, p, q)
        self.target_numbers = math.prod(self.target_patch) * self.encoder.channels  # first of P
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = small_normal(1, decoder_dim)
        self.decoder_pos_embed = small_normal(1 + math.prod(self.encoder.grid), decoder_dim)
        if positions == "waves":
            time, space = separable_pos_embed(self.encoder.grid, decoder_dim, positions)
            self.decoder_pos_embed.data[1:] = (time[:, None] + space).flatten(0, 1)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, decoder_heads, mlp_ratio) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, self.target_numbers)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(initialize_weights)

    def forward(self, video, mask_ratio=0.9, noise=None, decode_ratio=1.0):
        """The loss on the hidden patches of a video (B, C, T, H, W), uint8 or normalised float.

        noise: see `mask_noise`; None draws agnostic noise. decode_ratio: the share of the hidden
        patches that is decoded and predicted; 1.0 is the paper, less saves time as in VideoMAE V2
        (arXiv 2303.16727) and CrossMAE (arXiv 2401.14391).
        """
        if not 0 < decode_ratio <= 1:
            raise ValueError(f"decode ratio {decode_ratio}: give a number above 0, at most 1")
        patches = self.encoder.patchify(video)  # (B, N, P)
        ids_keep, ids_mask = self.masking(patches, mask_ratio, noise)  # (B, K), (B, M)
        ids_mask = ids_mask[:, :max(1, round(decode_ratio * ids_mask.shape[1]))]
        latent = self.encoder.norm(self.encoder(patches, ids_keep))  # (B, 1 + K, D)
        prediction = self.decode(latent, ids_keep, ids_mask)  # (B, M, target)
        target, _ = self.targets(patches, ids_mask)  # (B, M, target)
        return self.loss(prediction, target)

    @staticmethod
    def loss(prediction, target):
        """Mean squared error (Section 3); both (B, M, target). The only place that knows it."""
        return F.mse_loss(prediction.to(target.dtype), target)

    def masking(self, patches, mask_ratio, noise=None):
        """ids_keep (B, K) and ids_mask (B, M) for a batch of patches, see `random_masking`."""
        if noise is None:
            noise = mask_noise("agnostic", len(patches), self.encoder.grid, device=patches.device)
        if len(noise) != len(patches):
            raise ValueError(f"noise for {len(noise)} clips, but a video of {len(patches)}")
        return random_masking(noise, self.encoder.grid, mask_ratio)

    def decode(self, latent, ids_keep, ids_mask):
        """Class and visible tokens (B, 1 + K, D) -> pixels of the hidden patches (B, M, target).

        The order of tokens does not matter to attention, only their positions do. So the mask
        tokens follow the visible ones, and the predictions are the last M rows.
        """
        rows = F.pad(ids_keep + 1, (1, 0))  # (B, 1 + K) of the position table; 0: class token
        visible = self.decoder_embed(latent) + F.embedding(rows, self.decoder_pos_embed)
        hidden = self.mask_token + F.embedding(ids_mask + 1, self.decoder_pos_embed)
        x = torch.cat([visible, hidden], dim=1)  # (B, 1 + K + M, D)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, rows.shape[1]:]))  # (B, M, target)

    def targets(self, patches, ids_mask):
        """What to predict, (B, M, target), and the (mean, std) that it was normalised with."""
        x = normalise(gather(patches[:, :, :self.target_numbers], ids_mask))  # (B, M, target)
        if not self.norm_pix:
            return x, (0.0, 1.0)
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True)  # (B, M, 1), unbiased, as paper
        std = (variance + 1e-6).sqrt()
        return (x - mean) / std, (mean, std)

    @torch.no_grad()
    def reconstruct(self, video, mask_ratio=0.9, noise=None):
        """Fill in the hidden patches: video (B, C, T', H, W) as float from 0 (black) to 1 (white),
        not clipped, and its mask (B, t, h, w), bool, True where hidden.

        With target="frame" only the first frame of each patch is predicted, T' = t; with "patch"
        T' = T. With norm_pix=True a prediction has no brightness and contrast: they are taken from
        the original, so do not judge these two by the picture.
        """
        patches = self.encoder.patchify(video)  # (B, N, P)
        ids_keep, ids_mask = self.masking(patches, mask_ratio, noise)
        latent = self.encoder.norm(self.encoder(patches, ids_keep))
        _, (mean, std) = self.targets(patches, ids_mask)
        filled = normalise(patches[:, :, :self.target_numbers]).clone()  # (B, N, target)
        rows = torch.arange(len(filled), device=filled.device)[:, None]
        prediction = self.decode(latent, ids_keep, ids_mask).to(filled.dtype)  # (B, M, target)
        filled[rows, ids_mask] = prediction * std + mean
        mask = torch.ones(filled.shape[:2], dtype=torch.bool, device=filled.device)  # (B, N)
        mask = mask.scatter(1, ids_keep, False).view(-1, *self.encoder.grid)
        pixels = unpatchify(filled, self.target_patch, self.encoder.grid)
        return pixels * PIXEL_STD + PIXEL_MEAN, mask

# ------------------------------------------------------------------------------------- classifier

class Classifier(nn.Module):
    """The encoder over all tokens; mean of the patch tokens -> LayerNorm -> dropout -> linear.

    batch_norm=True: a batch-norm without parameters before the linear layer, as in MAE's linear
    probe. The other arguments are `Encoder`'s.
    """

    def __init__(self, *, classes, dropout=0.0, batch_norm=False, dim=1024, **encoder):
        super().__init__()
        self.encoder = Encoder(dim=dim, **encoder)
        probe_norm = nn.BatchNorm1d(dim, eps=1e-6, affine=False)
        self.head_norm = probe_norm if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # all classes equally likely at first
        nn.init.zeros_(self.head.bias)

    def pooled(self, video):
        """(B, C, T, H, W) -> (B, D). The encoder's norm follows the mean, as in both codes."""
        x = self.encoder(self.encoder.patchify(video))[:, 1:]  # (B, N, D), no class token
        return self.encoder.norm(x.mean(dim=1))  # (B, D)

    def forward(self, video):
        """(B, C, T, H, W), uint8 or normalised float -> (B, classes), before the softmax."""
        return self.head(self.dropout(self.head_norm(self.pooled(video))))

# ------------------------------------------------------------------------------------------ sizes

# base, large and huge are the paper's ViT-B, L and H and its decoder, 512 wide and 4 deep. small is
# ViT-S with a narrower decoder. tiny is for small pictures on a CPU: its positions start as waves.
SIZES = {
    "tiny": dict(dim=128, depth=2, heads=4, decoder_dim=64, decoder_depth=1, decoder_heads=2,
                 positions="waves"),
    "small": dict(dim=384, depth=12, heads=6, decoder_dim=192, decoder_depth=4, decoder_heads=3),
    "base": dict(dim=768, depth=12, heads=12),  # 86 M encoder parameters
    "large": dict(dim=1024, depth=24, heads=16),  # 304 M
    "huge": dict(dim=1280, depth=32, heads=16),  # 632 M
}

# ----------------------------------------------------------------------------------------- recipe

def learning_rate(step, steps, peak, warmup, start=0.0, end=0.0):
    """Linearly from `start` over the first share `warmup` of the steps, then half a cosine down."""
    warm = warmup * steps
    if step < warm:
        return start + (peak - start) * step / warm
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

def param_groups(model, weight_decay, layer_decay=1.0):
    """Parameter groups for AdamW. No weight decay on biases and other 1-d parameters; a group's
    rate is to be multiplied by its "scale", layer_decay^(L - l) (BEiT, arXiv 2106.08254). Layer l
    is 0 for patches, class token and positions, then the blocks', and L for last norm and head."""
    last, groups = len(model.encoder.blocks) + 1, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            top = not name.startswith("encoder.") or name.startswith("encoder.norm.")
            in_block = re.match(r"encoder\.blocks\.(\d+)\.", name)
            layer = last if top else int(in_block[1]) + 1 if in_block else 0
            decay = weight_decay if parameter.dim() > 1 else 0.0
            key = layer_decay ** (last - layer), decay
            groups.setdefault(key, dict(params=[], weight_decay=decay, scale=key[0]))
            groups[key]["params"].append(parameter)
    return list(groups.values())

# ------------------------------------------------------------------------------------- weights in

RENAMED = (  # patterns in the names of released checkpoints, and what ours have in their place
    (r"^(cls_token|pos_embed_|blocks\.|norm\.)", r"encoder.\1"),
    (r"^patch_embed\.proj\.", "encoder.patch_embed."),
    (r"^head\.projection\.", "head."),
    (r"^pred_head\.projections\.0\.", "decoder_pred."),
    (r"^pred_head\.transforms\.0\.\d+\.(weight|bias)$", r"decoder_norm.\1"),
    (r"^pred_head\.transforms\.0\.", "decoder_blocks."),
)

def our_name(name):
    for pattern, ours in RENAMED:
        name = re.sub(pattern, ours, name)
    return name

def from_released(content):
    """A checkpoint of the paper code or of mae_st -> dict(model, model_args, left_out) as ours.

    mae_st's decoder differs (it has a class token of its own) and is left out. One of ours comes
    back as it is. Raises ValueError where a tensor is missing or not finite."""
    released = content.get("model_state", content.get("model"))
    if not isinstance(released, dict) or not all(
            isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in released.items()):
        raise ValueError("no tensors under model_state or model: neither ours nor a released one")
    if bad := [n for n, x in released.items() if x.is_floating_point() and not x.isfinite().all()]:
        raise ValueError(f"{bad[0]} holds numbers that are not finite")
    if isinstance(content.get("model_args"), dict) and "frames" in content["model_args"]:
        return content
    mae_st = any(name.startswith("decoder_blocks.") for name in released)
    left_out = [name for name in released if mae_st and name.startswith(("decoder_", "mask_token"))]
    weights = {our_name(name): x for name, x in released.items() if name not in left_out}
    for name in [name for name in weights if ".attn.q." in name]:  # some have q, k and v apart
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in weights for part in parts):
            qkv = torch.cat([weights.pop(part) for part in parts])  # (3 * D, ...)
            weights[name.replace(".attn.q.", ".attn.qkv.")] = qkv
    weights = {name: x.squeeze(0) if x.dim() == 3 else x for name, x in weights.items()}
    embed = weights.get("encoder.patch_embed.weight", torch.empty(0))
    if embed.dim() != 5 or embed.shape[1] != 3 or embed.shape[3] != embed.shape[4]:
        raise ValueError(f"patch_embed.proj.weight {tuple(embed.shape)} is not (D, 3, u, p, p)")
    weights["encoder.patch_embed.weight"] = embed.permute(0, 2, 3, 4, 1).flatten(1)  # (D, P)
    return dict(model=weights, model_args=released_args(weights, *embed.shape), left_out=left_out)

def released_args(weights, dim, channels, u, p, q):
    """The constructor's arguments, from the shapes of the tensors. Not to be seen there: the heads
    (16 for ViT-L and H, else 64 wide), and that frames are as high as wide."""
    tables = [weights.get(f"encoder.pos_embed_{axis}") for axis in ("temporal", "spatial")]
    if tables[0] is None or tables[1] is None or math.isqrt(len(tables[1])) ** 2 != len(tables[1]):
        raise ValueError("pos_embed_temporal or pos_embed_spatial is missing, or is no square grid")
    t, side = len(tables[0]), math.isqrt(len(tables[1]))
    blocks = {re.match(r"(.*blocks\.\d+\.|)", name)[1] for name in weights} - {""}
    depth = sum(block.startswith("encoder.") for block in blocks)
    arguments = dict(frames=t * u, height=side * p, width=side * q, channels=channels,
                     patch=(u, p, q), dim=dim, depth=depth,
                     heads=16 if dim in (1024, 1280) else max(1, dim // 64))
    if "head.bias" in weights:
        arguments["classes"] = len(weights["head.bias"])
    if "decoder_pos_embed" in weights:
        width = weights["decoder_pos_embed"].shape[-1]
        arguments |= dict(decoder_dim=width, decoder_depth=len(blocks) - depth,
                          decoder_heads=max(1, width // 64))
    return arguments

def interpolate_pos_embed(weights, before, after):
    """New weights with the encoder's position tables for another grid (t, h, w): linear in time,
    bicubic in space."""
    weights, (t, h, w) = dict(weights), after
    if before[0] != t:
        table = weights["encoder.pos_embed_temporal"].float().T[None]  # (1, D, t before)
        weights["encoder.pos_embed_temporal"] = F.interpolate(table, size=t, mode="linear")[0].T
    if tuple(before[1:]) != (h, w):
        table = weights["encoder.pos_embed_spatial"].float().T.view(1, -1, *before[1:])
        table = F.interpolate(table, size=(h, w), mode="bicubic")  # (1, D, h, w)
        weights["encoder.pos_embed_spatial"] = table.flatten(2)[0].T  # (h * w, D)
    return weights
