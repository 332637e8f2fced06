"""PCA initialisation of the VAE: its residual streams carry the principal components of clips, from pixels to latents and back.

Each downsampling layer keeps the principal components of the 2 x 2 pixels or two frames that it merges. The encoder is then
linear, close to the best linear code of 8 x 8 x 4 patches, and needs no training. The decoder is initialised with the
transposes, which nearest-neighbour upsampling can only approximate.
"""

import math

import torch
from torch import Tensor, nn

from .vae_network import AttentionBlock, Downsample, ResidualBlock, Upsample, WholeClipVAE

CONSTANT = 5.0  # carried beside the signal, so that the norm before a head is nearly linear in it
STD = 0.25  # of each component in the deepest stream
LOG_VARIANCE = -8.5  # initial value, of the posterior
NUM_PAIRED = 15  # components carried as +x and -x, since silu(x) - silu(-x) = x; one more is added to a constant
NUM_USED = 2 * NUM_PAIRED + 2  # channels used in the deepest stream: +x, -x, a constant, the last component plus a constant
CONSTANTS = slice(2 * NUM_PAIRED, NUM_USED)
RANDOM_SCALE = 0.1  # factor on the default random weights, where PCA gives none


@torch.no_grad()
def initialise_from_pca(vae: WholeClipVAE, video: Tensor) -> None:
    """Initialises all weights from clips (B, 3, F, H, W) in -1..1 with F = 4n+1 > 1."""
    dim = vae.encoder.conv1.out_channels
    bases, stds = principal_bases(video.transpose(1, 2), (min(dim - 1, 12), 2 * dim - 1, NUM_PAIRED + 1))
    gains = STD / stds
    for module in vae.modules():
        if isinstance(module, (ResidualBlock, AttentionBlock)):
            _scale(module.last, RANDOM_SCALE)
        if isinstance(module, (Downsample, Upsample)):
            _scale(module.resample[1], RANDOM_SCALE)
        if isinstance(module, ResidualBlock) and module.shortcut is not None:
            _scale(module.shortcut, RANDOM_SCALE)
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
    """Returns an orthonormal basis (kept, merged) for each downsampling of (B, F, 3, H, W), and the latents' standard deviations (16,)."""
    bases: dict[str, Tensor] = {}
    x = video
    for level, kept in enumerate(num_kept):
        blocks = _space_to_depth(x)
        bases[f"space{level}"] = _principal_directions(blocks, kept)
        x = torch.einsum("kc,bfchw->bfkhw", bases[f"space{level}"], blocks) / 2
        if level > 0:
            pairs = torch.cat([x[:, 1::2], x[:, 2::2]], dim=2)
            bases[f"time{level}"] = _align_to_single_frames(_principal_directions(pairs, kept))
            later = torch.einsum("kc,bfchw->bfkhw", bases[f"time{level}"], pairs) / math.sqrt(2)
            x = torch.cat([x[:, :1], later], dim=1)
    return bases, x.std(dim=(0, 1, 3, 4))


def _space_to_depth(x: Tensor) -> Tensor:
    """(B, F, C, H, W) -> (B, F, 4C, H/2, W/2), ordered by pixel, then channel."""
    return x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 4, 6, 2, 3, 5).flatten(2, 4)


def _principal_directions(x: Tensor, kept: int) -> Tensor:
    """Returns the `kept` directions of largest second moment of (B, F, C, H, W), as (kept, C)."""
    samples = x.transpose(1, 2).transpose(0, 1).flatten(1).double()
    _, directions = torch.linalg.eigh(samples @ samples.T)
    return directions.flip(1)[:, :kept].T.float().contiguous()


def _align_to_single_frames(basis: Tensor) -> Tensor:
    """Rotates the basis (Procrustes) so that a static pair is coded as nearly as possible like a single frame, as the first latent frame has no pair."""
    mean = torch.cat([torch.eye(len(basis))] * 2, dim=1)
    u, _, v = torch.linalg.svd(mean @ basis.T)
    return u @ v @ basis


def _set_encoder(encoder: nn.Module, bases: dict[str, Tensor], gains: Tensor) -> None:
    """Sets the downsampling layers to the bases, scaled by the gains in the deepest stream."""
    first, second, third = (layer for layer in encoder.downsamples if isinstance(layer, Downsample))
    assert second.time_conv is not None and third.time_conv is not None
    _scale(encoder.conv1, RANDOM_SCALE)
    encoder.conv1.weight[:3] = 0
    encoder.conv1.weight[range(3), range(3), 2, 1, 1] = 1
    encoder.conv1.bias[-1] = first.resample[1].bias[-1] = second.resample[1].bias[-1] = second.time_conv.bias[-1] = CONSTANT
    _set_downsampling(first.resample[1].weight, bases["space0"] / 2)
    _set_downsampling(second.resample[1].weight, bases["space1"] / 2)
    second.time_conv.weight.zero_()
    second.time_conv.bias[:-1] = 0
    _set_time_downsampling(second.time_conv.weight, bases["time1"] / math.sqrt(2))
    rows = bases["space2"] / 2 * gains[:, None]
    _set_downsampling(third.resample[1].weight, torch.cat([rows[:-1], -rows[:-1], torch.zeros_like(rows[:1]), rows[-1:]]))
    third.resample[1].bias[CONSTANTS] = CONSTANT
    rows = bases["time2"].unflatten(1, (2, -1)) / math.sqrt(2) * gains[:, None, None] / gains
    inputs = torch.cat([rows[:, :, :-1], torch.zeros(len(rows), 2, NUM_PAIRED + 1), rows[:, :, -1:]], dim=2)
    shifts = -CONSTANT * rows[:, :, -1].sum(1)  # the last component has a constant added
    conv = third.time_conv
    conv.weight.zero_()
    _set_time_downsampling(conv.weight, torch.cat([inputs[:-1], -inputs[:-1], torch.zeros_like(inputs[:1]), inputs[-1:]]).flatten(1))
    conv.bias[:NUM_USED] = torch.cat([shifts[:-1], -shifts[:-1], torch.zeros(1), shifts[-1:]])
    conv.bias[CONSTANTS] += CONSTANT
    _set_encoder_head(encoder.head)


def _set_encoder_head(head: nn.Sequential) -> None:
    """Reads the components from the stream, linearly; the posterior variance is constant."""
    norm, _, conv = head
    norm.gamma.fill_(math.sqrt((2 * CONSTANT**2 + 2 * (NUM_PAIRED + 1) * STD**2) / len(norm.gamma)))
    conv.weight.zero_()
    conv.bias.zero_()
    paired = range(NUM_PAIRED)
    conv.weight[paired, paired, 2, 1, 1] = 1
    conv.weight[paired, range(NUM_PAIRED, 2 * NUM_PAIRED), 2, 1, 1] = -1
    conv.weight[NUM_PAIRED, CONSTANTS.stop - 1, 2, 1, 1], conv.weight[NUM_PAIRED, CONSTANTS.start, 2, 1, 1] = 1, -1
    conv.bias[NUM_PAIRED + 1 :] = LOG_VARIANCE


def _set_decoder(decoder: nn.Module, bases: dict[str, Tensor], gains: Tensor) -> None:
    """Sets the upsampling layers to the transposed bases."""
    first, second, third = (layer for layer in decoder.upsamples if isinstance(layer, Upsample))
    _scale(decoder.conv1, RANDOM_SCALE)
    channels = range(len(gains))
    decoder.conv1.weight[list(channels)] = 0
    decoder.conv1.weight[channels, channels, 2, 1, 1] = 1 / gains
    for up, basis in ((first, bases["time2"]), (second, bases["time1"])):
        assert up.time_conv is not None
        _scale(up.time_conv, RANDOM_SCALE)
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
    """Scales the weight and clears the bias."""
    conv.weight.mul_(factor)
    conv.bias.zero_()


def _identity(matrix: Tensor) -> None:
    """Sets the upper left square to an identity."""
    size = min(matrix.shape)
    matrix[:size, :size] = torch.eye(size)


def _set_downsampling(weight: Tensor, rows: Tensor) -> None:
    """Writes rows (k, 4c) to the upper left 2 x 2 taps of a stride-2 kernel (out, in, 3, 3)."""
    kept, width = len(rows), rows.shape[1] // 4
    weight[:kept] = 0
    weight[:kept, :width, :2, :2] = rows.unflatten(1, (2, 2, width)).permute(0, 3, 1, 2)


def _set_time_downsampling(weight: Tensor, rows: Tensor) -> None:
    """Writes rows (k, 2c) to the last two taps of a time kernel (out, in, 3, 1, 1)."""
    kept, width = len(rows), rows.shape[1] // 2
    weight[:kept, :width, 1:, 0, 0] = rows.unflatten(1, (2, width)).transpose(1, 2)


def _set_upsampling(weight: Tensor, basis: Tensor) -> None:
    """Approximates the transpose of basis (k, 4c) by a kernel (out, in, 3, 3) after nearest-neighbour upsampling.

    Means are exact; half of a difference between the two halves is kept, as a difference to the neighbour.
    """
    kept, width = len(basis), basis.shape[1] // 4
    places = basis.unflatten(1, (2, 2, width)).permute(3, 0, 1, 2)  # (c, k, row, column)
    means, slopes = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.5, 0.0, -0.5])
    weight[:width] = 0
    for row_signs, row_taps in (((0.5, 0.5), means), ((-0.5, 0.5), slopes)):
        for column_signs, column_taps in (((0.5, 0.5), means), ((-0.5, 0.5), slopes)):
            matrix = torch.einsum("ckab,a,b->ck", places, torch.tensor(row_signs), torch.tensor(column_signs))
            weight[:width, :kept] += matrix[:, :, None, None] * torch.outer(row_taps, column_taps)
