"""Spatiotemporal masked autoencoders: the method, in one file that needs torch alone.

"Masked Autoencoders As Spatiotemporal Learners", Feichtenhofer, Fan, Li, He, 2022 (arXiv 2205.09113).
Cut a video into spacetime patches, hide 90 % of them at random, encode the visible tenth with a plain
ViT, and let a small decoder predict the pixels that were hidden.

    model = MaskedAutoencoder(**SIZES["large"])
    loss = model(video)                      # video: (B, 3, 16, 224, 224), uint8 or normalised float

`Classifier` puts a head on the same encoder, and `from_released` reads the checkpoints that others have released.

The letters at the ends of lines:
    B  clips                    N  tokens of a clip, N = t * h * w      D  width of a token
    C  channels                 K  visible tokens                       P  numbers in a patch, P = u * p * q * C
    T, H, W  frames, height, width of a video                           u, p, q  frames, height, width of a patch
    t, h, w  patches along time, height and width (the grid)            M  hidden tokens to predict
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

PIXEL_MEAN, PIXEL_STD = 0.45, 0.225  # of every channel, on a scale where white is 1

# ------------------------------------------------------------------------------------------------ patches


def grid_size(video_size, patch):
    """(T, H, W) and (u, p, q) -> (t, h, w), the number of patches along each axis.

    Raises ValueError when a patch does not divide the video.
    """
    for name, length, step in zip(("frames", "height", "width"), video_size, patch):
        if length < 1 or step < 1 or length % step:
            raise ValueError(f"{name} {length} cannot be cut into patches of {step}: give a multiple of {step}, or another patch")
    return tuple(length // step for length, step in zip(video_size, patch))


def patchify(video, patch):
    """Cut a video into patches: (B, C, T, H, W) -> (B, N, P). Moves numbers, computes nothing.

    N runs over (t, h, w) and P over (u, p, q, C), the channel fastest. Exact inverse: `unpatchify`.
    """
    (B, C, *size), (u, p, q) = video.shape, patch
    t, h, w = grid_size(size, patch)
    x = video.reshape(B, C, t, u, h, p, w, q)
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1)  # (B, t, h, w, u, p, q, C)
    return x.reshape(B, t * h * w, u * p * q * C)  # (B, N, P)


def unpatchify(patches, patch, grid):
    """Put patches together again: (B, N, P) -> (B, C, T, H, W), for a patch (u, p, q) and a grid (t, h, w)."""
    (B, N, P), (u, p, q), (t, h, w) = patches.shape, patch, grid
    if N != t * h * w or P % (u * p * q):
        raise ValueError(f"{N} patches of {P} numbers do not fill a grid {t} x {h} x {w} of patches {u} x {p} x {q} x channels")
    x = patches.reshape(B, t, h, w, u, p, q, P // (u * p * q))
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B, C, t, u, h, p, w, q)
    return x.reshape(B, -1, t * u, h * p, w * q)  # (B, C, T, H, W)


def normalise(pixels):
    """uint8 0..255 -> float32 with the mean and spread of natural video. Floats are normalised already: half is widened."""
    if pixels.is_floating_point():
        return pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    return (pixels.float() / 255 - PIXEL_MEAN) / PIXEL_STD


# -------------------------------------------------------------------------------------------------- masks

STRATEGIES = ("agnostic", "tube", "frame", "block")


def mask_noise(strategy, batch, grid, generator=None, device=None):
    """Random numbers in [0, 1) for `split_tokens`: whoever draws small is seen. Their shape is the strategy.

    agnostic  (B, t, h, w)  every token on its own: the paper's choice
    tube      (B, 1, h, w)  space only: a place is seen at all times or never
    frame     (B, t, 1, 1)  time only: a slice of time is seen whole or not at all
    block     (B, t, h, w)  tokens of a cube share their number; a cube is a quarter of the grid along each axis, rounded
                            up, and at least 2 tokens
    """
    t, h, w = grid
    sides = [max(2, math.ceil(length / 4)) for length in grid]  # of a cube
    shapes = {"agnostic": (t, h, w), "tube": (1, h, w), "frame": (t, 1, 1),
              "block": [math.ceil(length / side) for length, side in zip(grid, sides)]}
    if strategy not in shapes:
        raise ValueError(f"mask strategy {strategy!r} is unknown: choose one of {', '.join(STRATEGIES)}")
    noise = torch.rand(batch, *shapes[strategy], generator=generator, device=device)
    if strategy == "block":
        for axis, (length, side) in enumerate(zip(grid, sides), start=1):  # every number is repeated over its cube
            noise = noise.repeat_interleave(side, dim=axis).narrow(axis, 0, length)
    return noise


def split_tokens(noise, grid, mask_ratio):
    """Sort the noise: its smallest numbers are seen, the rest is hidden.

    noise: (B, a, b, c), each of a, b, c either the grid's length or 1, as `mask_noise` makes it.
    Returns the token numbers keep (B, K) and hide (B, M), K + M = N, in the order of their noise. K is
    floor(N * (1 - mask_ratio)), 156 of 1568 at 0.9, and the same for every clip; tubes and frames are kept
    whole, and at least one of them. Raises ValueError unless something is hidden and something is seen.
    """
    B, *cells = noise.shape
    t, h, w = grid
    if len(cells) != 3 or any(cell not in (1, length) for cell, length in zip(cells, grid)):
        raise ValueError(f"noise of shape {tuple(noise.shape)} does not fit the grid {t} x {h} x {w}: each axis is that long, or 1")
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask ratio {mask_ratio} is out of range: give a number between 0 and 1, both excluded")
    a, b, c = cells
    kept = max(1, math.floor(a * b * c * (1 - mask_ratio) + 1e-6))  # 1e-6: 10 of 100 at 0.9, whatever 1 - 0.9 rounds to
    if kept == a * b * c:
        raise ValueError(f"mask ratio {mask_ratio} of {a * b * c} hides nothing: raise the ratio, or use more patches")
    tokens = torch.arange(t * h * w, device=noise.device).view(a, t // a, b, h // b, c, w // c)
    tokens = tokens.permute(0, 2, 4, 1, 3, 5).reshape(a * b * c, -1)  # (cells, tokens of a cell)
    order = noise.flatten(1).argsort(dim=1, stable=True)  # (B, cells)
    return tokens[order[:, :kept]].flatten(1), tokens[order[:, kept:]].flatten(1)  # (B, K), (B, M)


def take(x, index):
    """Rows of x: (B, N, P) and (B, K) -> (B, K, P)."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


# ------------------------------------------------------------------------------------------------- layers


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} cannot be shared by {heads} heads: give a multiple of {heads}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):  # (B, N, D)
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, N, D / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))  # (B, N, D)


class DropPath(nn.Module):
    """Skip a residual branch for whole clips, while training ("stochastic depth", arXiv 1603.09382)."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):  # (B, N, D)
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.rate  # (B, 1, 1)
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    """A pre-norm transformer block, as in ViT."""

    def __init__(self, dim, heads, mlp_ratio=4, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x):  # (B, N, D)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def initialize_weights(module):
    """For `Module.apply`; tokens and positions are drawn where they are made."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)  # keeps the variance at any width, so it serves the small sizes too
        nn.init.zeros_(module.bias)
    # LayerNorm starts as torch makes it: weight 1, bias 0.


def small_normal(*shape):
    """A learned table or token."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02))


def waves(length, dim):
    """Sines and cosines of the places along an axis, their periods from 2 * length down to 2 places: (length, dim)."""
    period = 2 * length ** torch.linspace(1, 0, dim // 2)  # (dim / 2,)
    phase = 2 * math.pi * (torch.arange(length)[:, None] + 0.5) / period  # (length, dim / 2)
    return torch.cat([phase.sin(), phase.cos()], dim=1)


def position_tables(grid, dim, start):
    """How learned positions begin: time (t, D) and space (h * w, D).

    "normal": small random numbers, as in both codes; "waves": sines and cosines, time in the first quarter of D, height and
    width in the rest, so that near tokens look alike from the first step. Raises ValueError for another start or width.
    """
    (t, h, w), a, b = grid, dim // 4, 3 * dim // 8
    if start == "normal":
        return small_normal(t, dim), small_normal(h * w, dim)
    if start != "waves" or dim % 16:
        raise ValueError(f"positions {start!r} of width {dim} are unknown: choose normal, or waves with a width that 16 divides")
    place = torch.cat([waves(h, b).repeat_interleave(w, 0), waves(w, b).repeat(h, 1)], dim=1)  # (h * w, 3D / 4)
    return nn.Parameter(F.pad(waves(t, a), (0, dim - a))), nn.Parameter(F.pad(place, (a, 0)))


# ------------------------------------------------------------------------------------------------ encoder


class Encoder(nn.Module):
    """A plain ViT over the tokens it is given: the visible ones (pre-training) or all of them (everything else).

    positions says how they start, see `position_tables`. drop_path is the rate of the last block, growing linearly from
    0 at the first. With checkpointing=True the blocks' activations are computed again in the backward pass instead of
    kept: less memory, a third more time.
    """

    def __init__(self, *, frames=16, height=224, width=224, channels=3, patch=(2, 16, 16),
                 dim=1024, depth=24, heads=16, mlp_ratio=4, positions="normal", drop_path=0.0, checkpointing=False):
        super().__init__()
        self.video_size, self.patch, self.channels = (frames, height, width), tuple(patch), channels
        self.grid = grid_size(self.video_size, self.patch)
        self.checkpointing = checkpointing
        self.embed = nn.Linear(math.prod(patch) * channels, dim)
        self.cls_token = small_normal(1, dim)
        self.pos_cls = small_normal(1, dim)
        self.pos_time, self.pos_space = position_tables(self.grid, dim, positions)  # (t, D), (h * w, D)
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_ratio, drop_path * i / max(1, depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(initialize_weights)

    def patches(self, video):
        """(B, C, T, H, W) -> (B, N, P), after a look at the size. Bytes stay bytes."""
        expected = (self.channels, *self.video_size)
        if tuple(video.shape[1:]) != expected:
            raise ValueError(f"video of shape {tuple(video.shape)}: this model takes (B, {', '.join(map(str, expected))})")
        if video.dtype != torch.uint8 and not video.is_floating_point():
            raise ValueError(f"video of {video.dtype}: give uint8 0..255, or floats normalised with mean {PIXEL_MEAN} and std {PIXEL_STD}")
        return patchify(video, self.patch)

    def positions(self):
        """The separable position table, time + space: (N, D)."""
        return (self.pos_time[:, None] + self.pos_space).flatten(0, 1)

    def forward(self, patches, keep=None):
        """(B, N, P) -> class token and tokens (B, 1 + N, D), before the last norm; only those in keep (B, K), if given.

        Bytes are gathered first and normalised after, so hidden patches cost nothing.
        """
        positions = self.positions()  # (N, D)
        if keep is not None:
            patches, positions = take(patches, keep), F.embedding(keep, positions)  # (B, K, P), (B, K, D)
        x = self.embed(normalise(patches).to(self.embed.weight.dtype)) + positions  # (B, K, D), K = N without keep
        cls = (self.cls_token + self.pos_cls).expand(len(x), 1, -1)  # (B, 1, D)
        x = torch.cat([cls, x], dim=1)  # (B, 1 + K, D)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)
        return x

    def features(self, video):
        """What the encoder makes of a whole video, after the last norm: patch tokens (B, N, D), class token (B, D)."""
        x = self.norm(self(self.patches(video)))
        return x[:, 1:], x[:, 0]


# -------------------------------------------------------------------------------------------- autoencoder


class MaskedAutoencoder(nn.Module):
    """The paper's Figure 1: encode the visible tenth, decode everything, compare the pixels that were hidden.

    target    "frame": the first frame of each patch (the paper's code: 16 x 16 x 3 numbers); "patch": all of it
    norm_pix  compare pixels after giving each target patch mean 0 and variance 1 (84.4 against 83.8 % in the paper's
              ablations); False compares them as they are
    positions says how both tables start, see `position_tables`; the decoder's is joint all the same.
    The other arguments: `Encoder` for the frames, sizes, patch, dim, depth, heads, checkpointing.
    """

    def __init__(self, *, decoder_dim=512, decoder_depth=4, decoder_heads=8, target="frame", norm_pix=True,
                 mlp_ratio=4, positions="normal", dim=1024, **encoder):
        super().__init__()
        if target not in ("frame", "patch"):
            raise ValueError(f"target {target!r} is unknown: choose frame (the first of each patch) or patch (all of it)")
        self.encoder = Encoder(dim=dim, mlp_ratio=mlp_ratio, positions=positions, **encoder)
        self.target, self.norm_pix = target, norm_pix
        u, p, q = self.encoder.patch
        self.target_patch = (1 if target == "frame" else u, p, q)
        self.target_numbers = math.prod(self.target_patch) * self.encoder.channels  # the first so many of P
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = small_normal(1, decoder_dim)
        self.decoder_pos = small_normal(1 + math.prod(self.encoder.grid), decoder_dim)  # class token, then all tokens
        if positions == "waves":
            time, space = position_tables(self.encoder.grid, decoder_dim, positions)
            self.decoder_pos.data[1:] = (time[:, None] + space).flatten(0, 1)
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, decoder_heads, mlp_ratio) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, self.target_numbers)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(initialize_weights)

    def forward(self, video, mask_ratio=0.9, noise=None, decode_ratio=1.0):
        """The loss: mean squared error over the hidden patches.

        video: (B, C, T, H, W), uint8 0..255 or normalised float. noise: see `mask_noise`; None draws agnostic noise.
        decode_ratio: share of the hidden patches that the decoder sees and predicts, those of the smallest noise; 1.0
        is the paper, 0.5 about VideoMAE V2's (arXiv 2303.16727) and CrossMAE's (2401.14391) saving.
        """
        if not 0 < decode_ratio <= 1:
            raise ValueError(f"decode ratio {decode_ratio} is out of range: give a number above 0, at most 1")
        patches = self.encoder.patches(video)  # (B, N, P)
        keep, hide = self.split(patches, mask_ratio, noise)  # (B, K), (B, M)
        hide = hide[:, :max(1, round(decode_ratio * hide.shape[1]))]  # all of them, unless asked otherwise
        latent = self.encoder.norm(self.encoder(patches, keep))  # (B, 1 + K, D)
        prediction = self.decode(latent, keep, hide)  # (B, M, target)
        target, _ = self.targets(patches, hide)  # (B, M, target)
        return F.mse_loss(prediction.to(target.dtype), target)

    def split(self, patches, mask_ratio, noise=None):
        """Token numbers keep (B, K) and hide (B, M) of a batch of patches."""
        if noise is None:
            noise = mask_noise("agnostic", len(patches), self.encoder.grid, device=patches.device)
        if len(noise) != len(patches):
            raise ValueError(f"noise for {len(noise)} clips and video of {len(patches)}: give as many")
        return split_tokens(noise, self.encoder.grid, mask_ratio)

    def decode(self, latent, keep, hide):
        """Class and visible tokens (B, 1 + K, D) -> pixels of the hidden patches (B, M, target).

        Attention does not mind the order of its tokens, only their positions count: so the mask tokens stand
        behind the visible ones, nothing is put back in place, and the predictions are the last M rows.
        """
        seen = F.pad(keep + 1, (1, 0))  # (B, 1 + K), rows of the position table; row 0 is the class token's
        visible = self.decoder_embed(latent) + F.embedding(seen, self.decoder_pos)  # (B, 1 + K, D)
        hidden = self.mask_token + F.embedding(hide + 1, self.decoder_pos)  # (B, M, D)
        x = torch.cat([visible, hidden], dim=1)  # (B, 1 + K + M, D)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, seen.shape[1]:]))  # (B, M, target)

    def targets(self, patches, hide):
        """What should be predicted for the hidden patches: (B, M, target), with the (mean, std) that normalised it."""
        x = normalise(take(patches[:, :, :self.target_numbers], hide))  # (B, M, target)
        if not self.norm_pix:
            return x, (0.0, 1.0)
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True)  # (B, M, 1); unbiased, as in the paper's code
        std = (variance + 1e-6).sqrt()
        return (x - mean) / std, (mean, std)

    @torch.no_grad()
    def reconstruct(self, video, mask_ratio=0.9, noise=None):
        """Fill in what was hidden. Returns the video (B, C, T', H, W) as float on a scale of 0 (black) to 1 (white),
        not clipped, and its mask, bool (B, t, h, w), True where hidden.

        With target="frame" only the first frame of each patch was learned, so T' = t and the video is made of those
        frames; with "patch" T' = T. With norm_pix=True a prediction has no brightness or contrast of its own: the
        hidden patch's true mean and variance are borrowed to show it, so do not judge those two by the picture.
        """
        patches = self.encoder.patches(video)  # (B, N, P)
        keep, hide = self.split(patches, mask_ratio, noise)
        latent = self.encoder.norm(self.encoder(patches, keep))
        _, (mean, std) = self.targets(patches, hide)
        filled = normalise(patches[:, :, :self.target_numbers]).clone()  # (B, N, target)
        rows = torch.arange(len(filled), device=filled.device)[:, None]
        filled[rows, hide] = self.decode(latent, keep, hide).to(filled.dtype) * std + mean
        mask = torch.ones(filled.shape[:2], dtype=torch.bool, device=filled.device).scatter(1, keep, False)  # (B, N)
        pixels = unpatchify(filled, self.target_patch, self.encoder.grid) * PIXEL_STD + PIXEL_MEAN
        return pixels, mask.view(-1, *self.encoder.grid)


# --------------------------------------------------------------------------------------------- classifier


class Classifier(nn.Module):
    """The encoder over all tokens; the mean of its patch tokens -> LayerNorm -> dropout -> linear.

    batch_norm=True puts MAE's batch-norm, which has no parameters, before the linear layer: for a frozen encoder.
    The other arguments: `Encoder`, so those of SIZES without the decoder's.
    """

    def __init__(self, *, classes, dropout=0.0, batch_norm=False, dim=1024, **encoder):
        super().__init__()
        self.encoder = Encoder(dim=dim, **encoder)
        self.head_norm = nn.BatchNorm1d(dim, eps=1e-6, affine=False) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # small: training begins with even odds for all classes
        nn.init.zeros_(self.head.bias)

    def pooled(self, video):
        """(B, C, T, H, W) -> (B, D). The encoder's last norm comes after the mean, as in both codes."""
        x = self.encoder(self.encoder.patches(video))[:, 1:]  # (B, N, D), without the class token
        return self.encoder.norm(x.mean(dim=1))  # (B, D)

    def forward(self, video):
        """(B, C, T, H, W), uint8 or normalised float -> (B, classes), before the softmax."""
        return self.head(self.dropout(self.head_norm(self.pooled(video))))


# -------------------------------------------------------------------------------------------------- sizes

# base, large and huge are the paper's ViT-B, ViT-L and ViT-H and share its decoder, 512 wide and 4 deep. small is the
# usual ViT-S with a decoder half as wide; tiny is made for small pictures on two CPU cores, and for tests: its positions
# start as waves, so that near tokens look alike from the first step.
SIZES = {
    "tiny": dict(dim=128, depth=2, heads=4, decoder_dim=64, decoder_depth=1, decoder_heads=2, positions="waves"),
    "small": dict(dim=384, depth=12, heads=6, decoder_dim=192, decoder_depth=4, decoder_heads=3),
    "base": dict(dim=768, depth=12, heads=12),  # 86 M encoder parameters
    "large": dict(dim=1024, depth=24, heads=16),  # 304 M
    "huge": dict(dim=1280, depth=32, heads=16),  # 632 M
}


# --------------------------------------------------------------------------------------------- weights in

RENAMED = {  # how a name in a released checkpoint begins, and ours; the first that fits counts, others stay as they are
    "cls_token": "encoder.cls_token",
    "pos_embed_class": "encoder.pos_cls",
    "pos_embed_temporal": "encoder.pos_time",
    "pos_embed_spatial": "encoder.pos_space",
    "patch_embed.proj.": "encoder.embed.",
    "blocks.": "encoder.blocks.",
    "norm.": "encoder.norm.",
    "head.projection.": "head.",  # the paper's code; mae_st has head. as we do
    "decoder_pos_embed": "decoder_pos",
    "pred_head.projections.0.": "decoder_pred.",
    "pred_head.transforms.0.": "decoder_blocks.",  # the last one of these is the LayerNorm
}


def our_name(name):
    theirs = next((beginning for beginning in RENAMED if name.startswith(beginning)), None)
    if theirs is None:
        return name
    name = RENAMED[theirs] + name[len(theirs):]
    if name.startswith("decoder_blocks.") and name.count(".") == 2:  # decoder_blocks.4.weight
        name = "decoder_norm." + name.split(".")[-1]
    return name.replace(".mlp.fc1.", ".mlp.0.").replace(".mlp.fc2.", ".mlp.2.")


def from_released(content):
    """A released checkpoint, of the paper's code or of mae_st -> dict(model, model_args, left_out), as ours have them.

    mae_st's decoder is another one (it has its own class token) and is left out. One of ours comes back as it is.
    Raises ValueError when a tensor that the sizes are read from is missing.
    """
    if isinstance(content.get("model_args"), dict) and "frames" in content["model_args"]:
        return content
    released = content.get("model_state", content.get("model"))
    if not isinstance(released, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in released.values()):
        raise ValueError("no tensors under model_state or model, so it is neither ours nor a released checkpoint")
    other_decoder = any(name.startswith("decoder_blocks.") for name in released)
    left_out = [name for name in released if other_decoder and name.startswith(("decoder_", "mask_token"))]
    weights = {our_name(name): tensor for name, tensor in released.items() if name not in left_out}
    for name in [name for name in weights if ".attn.q." in name]:  # the paper's code may have q, k and v apart
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in weights for part in parts):
            weights[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([weights.pop(part) for part in parts])  # (3 * D, ...)
    for name, tensor in weights.items():
        if tensor.dim() == 3:  # tables and tokens: (1, n, D)
            weights[name] = tensor.squeeze(0)
    embed = weights.get("encoder.embed.weight", torch.empty(0))
    if embed.dim() != 5 or embed.shape[1] != 3 or embed.shape[3] != embed.shape[4]:
        raise ValueError(f"patch_embed.proj.weight has shape {tuple(embed.shape)}, expected (D, 3, u, p, p)")
    weights["encoder.embed.weight"] = embed.permute(0, 2, 3, 4, 1).flatten(1)  # (D, P), P = u * p * q * C
    return dict(model=weights, model_args=released_arguments(weights, embed.shape), left_out=left_out)


def released_arguments(weights, embed_shape):
    """The constructor's arguments, from the shapes of the tensors. Frames are as high as wide: the table does not tell."""
    for name in ("encoder.pos_time", "encoder.pos_space"):
        if name not in weights:
            raise ValueError(f"{name} (in our names) is missing, the sizes are read from it")
    (dim, channels, *patch), places = embed_shape, len(weights["encoder.pos_space"])
    side = math.isqrt(places)
    if side * side != places:
        raise ValueError(f"pos_embed_spatial has {places} rows, which is not a square")
    heads = {SIZES[size]["dim"]: SIZES[size]["heads"] for size in ("base", "large", "huge")}  # leave no trace in the weights
    arguments = dict(frames=len(weights["encoder.pos_time"]) * patch[0], height=side * patch[1], width=side * patch[2], channels=channels,
                     patch=tuple(patch), dim=dim, depth=len({name.split(".")[2] for name in weights if name.startswith("encoder.blocks.")}),
                     heads=heads.get(dim, max(1, dim // 64)))
    if "head.bias" in weights:
        arguments["classes"] = len(weights["head.bias"])
    if "decoder_pos" in weights:
        decoder_dim = weights["decoder_pos"].shape[-1]
        arguments |= dict(decoder_dim=decoder_dim, decoder_heads=max(1, decoder_dim // 64),
                          decoder_depth=len({name.split(".")[1] for name in weights if name.startswith("decoder_blocks.")}))
    return arguments


def interpolate_positions(weights, before, after):
    """The encoder's position tables for another grid (t, h, w): linear in time, bicubic in space. Returns new weights."""
    weights, (t, h, w) = dict(weights), after
    if before[0] != t:
        table = weights["encoder.pos_time"].float()  # (t before, D)
        weights["encoder.pos_time"] = F.interpolate(table.T[None], size=t, mode="linear")[0].T  # (t, D)
    if tuple(before[1:]) != (h, w):
        table = weights["encoder.pos_space"].float().T.view(1, -1, *before[1:])  # (1, D, h before, w before)
        weights["encoder.pos_space"] = F.interpolate(table, size=(h, w), mode="bicubic").flatten(2)[0].T  # (h * w, D)
    return weights
