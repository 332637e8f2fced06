"""A start for the VAE: its residual streams carry the clips' principal components, from pixels to latents and back.

Each downsampling keeps the strongest components of what it joins: 2 x 2 pixels, or two frames. The result is
linear, close to the best linear code of 8 x 8 x 4 blocks, and known before any training. Decoding starts from
the transposes; nearest-neighbour upsampling can only approximate them, so the decoder's path is trained first.
"""

import math

import torch
from torch import Tensor, nn

from .vae_network import AttentionBlock, Downsample, ResidualBlock, Upsample, WholeClipVAE

CONSTANT = 5.0  # carried beside the signal, so that the norm before a head hardly bends it
DEVIATION = 0.25  # of each component on the last stream
LOG_VARIANCE = -8.5  # of the posterior
NUM_PAIRED = 15  # components carried as +x and -x, since silu(x) - silu(-x) = x; one more rides on a constant
NUM_CARRIED = 2 * NUM_PAIRED + 2  # channels of the deepest stream that this takes: +x, -x, a constant, the last one on a constant
CONSTANTS = slice(2 * NUM_PAIRED, NUM_CARRIED)
FAINT = 0.1  # of the usual initial weights, where nothing is known


@torch.no_grad()
def initialise_from_pca(vae: WholeClipVAE, video: Tensor) -> None:
    """Sets all weights from clips, (B, 3, F, H, W) in -1..1 with F = 4n+1 > 1."""
    dim = vae.encoder.conv1.out_channels
    bases, deviations = principal_bases(video.transpose(1, 2), (min(dim - 1, 12), 2 * dim - 1, NUM_PAIRED + 1))
    gains = DEVIATION / deviations
    for module in vae.modules():
        if isinstance(module, (ResidualBlock, AttentionBlock)):
            _scale(module.last, FAINT)
        if isinstance(module, (Downsample, Upsample)):
            _scale(module.resample[1], FAINT)
        if isinstance(module, ResidualBlock) and module.shortcut is not None:
            _scale(module.shortcut, FAINT)
            _identity(module.shortcut.weight[:, :, 0, 0, 0])
    for module in vae.encoder.modules():
        if isinstance(module, (ResidualBlock, AttentionBlock)):
            _scale(module.last, 0.0)
    _set_encoder(vae.encoder, bases, gains)
    _set_decoder(vae.decoder, bases, gains)
    for conv in (vae.conv1, vae.conv2):
        conv.weight.copy_(torch.eye(conv.in_channels).view_as(conv.weight))
        conv.bias.zero_()


def principal_bases(video: Tensor, num_kept: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    """(B, F, 3, H, W) -> an orthonormal basis (kept, joined) for each downsampling, and the latents' deviations (16,)."""
    bases, x = {}, video
    for level, kept in enumerate(num_kept):
        blocks = _quads(x)
        bases[f"space{level}"] = _strongest(blocks, kept)
        x = torch.einsum("kc,bfchw->bfkhw", bases[f"space{level}"], blocks) / 2
        if level > 0:
            pairs = torch.cat([x[:, 1::2], x[:, 2::2]], dim=2)
            bases[f"time{level}"] = _aligned(_strongest(pairs, kept))
            later = torch.einsum("kc,bfchw->bfkhw", bases[f"time{level}"], pairs) / math.sqrt(2)
            x = torch.cat([x[:, :1], later], dim=1)
    return bases, x.std(dim=(0, 1, 3, 4))


def _quads(x: Tensor) -> Tensor:
    """(B, F, C, H, W) -> (B, F, 4C, H/2, W/2), the pixel's place before the channel."""
    return x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 4, 6, 2, 3, 5).flatten(2, 4)


def _strongest(x: Tensor, kept: int) -> Tensor:
    """(B, F, C, H, W) -> the `kept` directions of largest second moment, (kept, C)."""
    samples = x.transpose(1, 2).transpose(0, 1).flatten(1).double()
    _, directions = torch.linalg.eigh(samples @ samples.T)
    return directions.flip(1)[:, :kept].T.float().contiguous()


def _aligned(basis: Tensor) -> Tensor:
    """Turned so that a still pair gives what a single frame does, as nearly as can be: the first latent frame has no pair."""
    mean = torch.cat([torch.eye(len(basis))] * 2, dim=1)
    u, _, v = torch.linalg.svd(mean @ basis.T)
    return u @ v @ basis


def _set_encoder(encoder: nn.Module, bases: dict[str, Tensor], gains: Tensor) -> None:
    first, second, third = (layer for layer in encoder.downsamples if isinstance(layer, Downsample))
    _scale(encoder.conv1, FAINT)
    encoder.conv1.weight[:3] = 0
    encoder.conv1.weight[range(3), range(3), 2, 1, 1] = 1
    encoder.conv1.bias[-1] = first.resample[1].bias[-1] = second.resample[1].bias[-1] = second.time_conv.bias[-1] = CONSTANT
    _set_quads(first.resample[1].weight, bases["space0"] / 2)
    _set_quads(second.resample[1].weight, bases["space1"] / 2)
    second.time_conv.weight.zero_()
    second.time_conv.bias[:-1] = 0
    _set_pairs(second.time_conv.weight, bases["time1"] / math.sqrt(2))
    rows = bases["space2"] / 2 * gains[:, None]
    _set_quads(third.resample[1].weight, torch.cat([rows[:-1], -rows[:-1], torch.zeros_like(rows[:1]), rows[-1:]]))
    third.resample[1].bias[CONSTANTS] = CONSTANT
    rows = bases["time2"].unflatten(1, (2, -1)) / math.sqrt(2) * gains[:, None, None] / gains
    inputs = torch.cat([rows[:, :, :-1], torch.zeros(len(rows), 2, NUM_PAIRED + 1), rows[:, :, -1:]], dim=2)
    shifts = -CONSTANT * rows[:, :, -1].sum(1)  # the last component comes with a constant added
    conv = third.time_conv
    conv.weight.zero_()
    _set_pairs(conv.weight, torch.cat([inputs[:-1], -inputs[:-1], torch.zeros_like(inputs[:1]), inputs[-1:]]).flatten(1))
    conv.bias[:NUM_CARRIED] = torch.cat([shifts[:-1], -shifts[:-1], torch.zeros(1), shifts[-1:]])
    conv.bias[CONSTANTS] += CONSTANT
    _set_encoder_head(encoder.head)


def _set_encoder_head(head: nn.Sequential) -> None:
    norm, _, conv = head
    norm.gamma.fill_(math.sqrt((2 * CONSTANT**2 + 2 * (NUM_PAIRED + 1) * DEVIATION**2) / len(norm.gamma)))
    conv.weight.zero_()
    conv.bias.zero_()
    paired = range(NUM_PAIRED)
    conv.weight[paired, paired, 2, 1, 1] = 1
    conv.weight[paired, range(NUM_PAIRED, 2 * NUM_PAIRED), 2, 1, 1] = -1
    conv.weight[NUM_PAIRED, CONSTANTS.stop - 1, 2, 1, 1], conv.weight[NUM_PAIRED, CONSTANTS.start, 2, 1, 1] = 1, -1
    conv.bias[NUM_PAIRED + 1 :] = LOG_VARIANCE


def _set_decoder(decoder: nn.Module, bases: dict[str, Tensor], gains: Tensor) -> None:
    first, second, third = (layer for layer in decoder.upsamples if isinstance(layer, Upsample))
    _scale(decoder.conv1, FAINT)
    channels = range(len(gains))
    decoder.conv1.weight[list(channels)] = 0
    decoder.conv1.weight[channels, channels, 2, 1, 1] = 1 / gains
    for up, basis in ((first, bases["time2"]), (second, bases["time1"])):
        _scale(up.time_conv, FAINT)
        kept = len(basis)
        for part, target in zip((basis[:, :kept], basis[:, kept:]), up.time_conv.weight.chunk(2)):
            target[:kept] = 0
            target[:kept, :kept, 2, 0, 0] = part.T * math.sqrt(2)
    _set_upsampling(first.resample[1].weight, 2 * bases["space2"])
    _set_upsampling(second.resample[1].weight, 2 * bases["space1"])
    conv = third.resample[1]
    colours = 2 * bases["space0"].unflatten(1, (4, 3))
    _set_upsampling(conv.weight, torch.cat([colours, -colours], dim=2).flatten(1))
    conv.bias[6] = CONSTANT
    norm, _, conv = decoder.head
    norm.gamma.fill_(math.sqrt((CONSTANT**2 + 2) / len(norm.gamma)))
    conv.weight.zero_()
    conv.bias.zero_()
    conv.weight[range(3), range(3), 2, 1, 1] = 1
    conv.weight[range(3), range(3, 6), 2, 1, 1] = -1


def _scale(conv: nn.Module, factor: float) -> None:
    conv.weight.mul_(factor)
    conv.bias.zero_()


def _identity(matrix: Tensor) -> None:
    size = min(matrix.shape)
    matrix[:size, :size] = torch.eye(size)


def _set_quads(weight: Tensor, rows: Tensor) -> None:
    """Stride-2 kernel (out, in, 3, 3) <- rows (k, 4c), read by its upper left 2 x 2 taps."""
    kept, width = len(rows), rows.shape[1] // 4
    weight[:kept] = 0
    weight[:kept, :width, :2, :2] = rows.unflatten(1, (2, 2, width)).permute(0, 3, 1, 2)


def _set_pairs(weight: Tensor, rows: Tensor) -> None:
    """Time kernel (out, in, 3, 1, 1) <- rows (k, 2c), read by its last two taps."""
    kept, width = len(rows), rows.shape[1] // 2
    weight[:kept, :width, 1:, 0, 0] = rows.unflatten(1, (2, width)).transpose(1, 2)


def _set_upsampling(weight: Tensor, basis: Tensor) -> None:
    """Kernel (out, in, 3, 3) after nearest upsampling <- the transpose of basis (k, 4c), as nearly as such a kernel can.

    Means pass through; a difference of two halves is half kept, by a difference against the neighbour.
    """
    kept, width = len(basis), basis.shape[1] // 4
    places = basis.unflatten(1, (2, 2, width)).permute(3, 0, 1, 2)  # (c, k, row, column)
    means, slopes = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.5, 0.0, -0.5])
    weight[:width] = 0
    for row_signs, row_taps in (((0.5, 0.5), means), ((-0.5, 0.5), slopes)):
        for column_signs, column_taps in (((0.5, 0.5), means), ((-0.5, 0.5), slopes)):
            matrix = torch.einsum("ckab,a,b->ck", places, torch.tensor(row_signs), torch.tensor(column_signs))
            weight[:width, :kept] += matrix[:, :, None, None] * torch.outer(row_taps, column_taps)
