"""Which of a model's blocks tell real clips from generated ones, by the roll-off points of what they put out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from avd_core import spectral_rolloff
from avd_trainer.models.condition import Condition
from avd_trainer.models.features import block_outputs, tapped_by_default
from avd_trainer.models.samplers import schedule
from avd_trainer.models.transformer import VelocityModel
from avd_trainer.runtime.errors import UserError

QUANTILES = {"5%": 0.05, "50%": 0.5, "95%": 0.95}
LEVELS = (900.0, 700.0, 500.0, 300.0, 100.0)
"""Timesteps to which clips are noised before the blocks see them."""
TAPPED = 3
"""Blocks that are recommended: as many as public discriminators tap."""
SWAPS = 2000
"""Random swaps of real and generated clips, for :func:`chance`."""
MAX_CHANCE = 0.05
"""A block that chance alone would let separate so much with a larger probability is not recommended."""
CRITERION = (
    "Separation: distance of the means of real and generated clips, in standard deviations of single clips, over all "
    f"channels. The {TAPPED} blocks are recommended that separate most over all noise levels (root mean square), if "
    f"chance explains none of them (at most {MAX_CHANCE:g})."
)


class Distribution(BaseModel):
    """Roll-off points of all clips and channels, in cycles per token."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    mean: float
    """Their mean."""
    std: float
    """Their standard deviation."""
    quantiles: dict[str, float]
    """``5%``, ``50%`` and ``95%``."""


class LevelSpectrum(BaseModel):
    """A block at one noise level."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    timestep: float
    """To which clips were noised, 0 to 1000."""
    real: Distribution
    """Of real clips."""
    generated: Distribution
    """Of generated clips."""
    separation: float
    """See :func:`separation`."""


class BlockSpectrum(BaseModel):
    """A block at all noise levels."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    block: int
    """Counted from 0."""
    separation: float
    """Over all noise levels, root mean square."""
    chance: float
    """Of that one; see :func:`chance`."""
    levels: tuple[LevelSpectrum, ...]
    """In the order that was asked for."""


class SpectrumReport(BaseModel):
    """What :func:`measure` found."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    clips: int
    """Number of real clips, and of generated ones."""
    blocks: tuple[BlockSpectrum, ...]
    """All blocks, from the first one."""
    recommended: tuple[int, ...]
    """The blocks that separate most, rising; none if chance may explain one of them."""
    published: tuple[int, ...]
    """About one half and three quarters of the blocks, and the last: what public discriminators tap."""


class Spectra(NamedTuple):
    """A report, and what its violins are drawn of.

    Attributes:
        report: The numbers.
        real: For each noise level the roll-offs of real clips, ``[K, N, D]``: blocks, clips, channels.
        generated: The same of generated clips.
    """

    report: SpectrumReport
    real: dict[float, Tensor]
    generated: dict[float, Tensor]


class ClipPair(NamedTuple):
    """A batch of real clips and of generated ones of the same captions, and what they are noised with.

    Attributes:
        real: ``[B, C, F, H, W]``.
        generated: ``[B, C, F, H, W]``.
        condition: What both are conditioned on.
        noise: For each noise level ``[B, C, F, H, W]``, the same for both.
    """

    real: Tensor
    generated: Tensor
    condition: Condition
    noise: dict[float, Tensor]


@torch.no_grad()
def block_rolloffs(model: VelocityModel, x_0: Tensor, noise: Tensor, timestep: float, condition: Condition) -> Tensor:
    """Roll-off points of what each block puts out, with its tokens put back on their grid: ``[K, B, D]``.

    Each of the D channels is a map for each frame of tokens, and has one roll-off of all its frames together.

    Args:
        model: Whose K blocks.
        x_0: ``[B, C, F, H, W]`` clips.
        noise: ``[B, C, F, H, W]``.
        timestep: To which they are noised.
        condition: Their captions, and for image to video their first frames.
    """
    timesteps = x_0.new_full((len(x_0),), timestep)
    x_t = schedule.add_noise(x_0, noise, timesteps)
    patch = model.module.config.patch_size
    grid = [size // side for size, side in zip(x_0.shape[2:], patch, strict=True)]
    outputs = block_outputs(model, x_t, timesteps, condition, range(len(model.module.blocks)))
    maps = (output.transpose(1, 2).reshape(len(x_0), -1, *grid) for output in outputs)
    return torch.stack([spectral_rolloff(map_BDFHW, pool_dim=2) for map_BDFHW in maps])


def pair_products(real: Tensor, generated: Tensor) -> Tensor:
    """How alike the differences of pairs of a real and a generated clip are, ``[N, N]`` float64, 0 on the diagonal.

    Products of the differences of any two pairs, summed over channels and divided by the variance of single clips. If
    nothing sets real and generated clips apart, their mean is 0; otherwise it is the square of :func:`separation`.

    Args:
        real: ``[N, D]`` roll-offs, at least two clips.
        generated: ``[N, D]``, in the same order.
    """
    real, generated = real.double(), generated.double()
    differences = real - generated
    variance = (real.var(0) + generated.var(0)).sum() / 2
    products = torch.where(variance > 0, differences @ differences.T / variance, 0.0)
    return products.fill_diagonal_(0)


def separation(products: Tensor) -> float:
    r"""How far real and generated clips are apart, in standard deviations of single clips, over all channels.

    .. math::
        \sqrt{\max\Bigl(0, \frac{\sum_{i \ne j} \sum_c d_{ic} d_{jc}}
        {N (N - 1) \sum_c (\mathrm{Var}(r_c) + \mathrm{Var}(g_c)) / 2}\Bigr)}

    with the differences ``d = r - g`` of pairs that share caption and noise. Without the diagonal, under the root two
    sets of clips of one kind have 0 on average, however few they are.
    """
    clips = len(products)
    return math.sqrt(max(0.0, float(products.sum()) / (clips * (clips - 1))))


def chance(products: Tensor) -> float:
    """Probability of such a separation, or a larger one, if nothing sets real and generated clips apart.

    In that case they could as well be swapped in any pair: it is the share of :data:`SWAPS` random swaps that separate
    as much, in (0, 1].
    """
    signs = torch.randint(2, (SWAPS, len(products)), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    swapped = ((signs @ products) * signs).sum(1)
    return (1 + int((swapped >= products.sum()).sum())) / (SWAPS + 1)


def measure(model: VelocityModel, batches: Iterable[ClipPair], levels: Sequence[float]) -> Spectra:
    """Show a model real and generated clips, noised alike, and compare what its blocks put out.

    Args:
        model: Whose blocks; for a discriminator on them, its backbone.
        batches: Clips.
        levels: Timesteps to which they are noised, in (0, 1000).

    Raises:
        UserError: If there are fewer than two clips, or what the blocks put out is not finite.
    """
    real: dict[float, list[Tensor]] = {level: [] for level in levels}
    generated: dict[float, list[Tensor]] = {level: [] for level in levels}
    for batch in batches:
        for level in levels:
            for found, x_0 in ((real, batch.real), (generated, batch.generated)):
                found[level].append(block_rolloffs(model, x_0, batch.noise[level], level, batch.condition).cpu())
    spectra = [{level: torch.cat(parts, 1) for level, parts in found.items()} for found in (real, generated)]
    return compare(*spectra)


def compare(real: dict[float, Tensor], generated: dict[float, Tensor]) -> Spectra:
    """Compare roll-offs ``[K, N, D]`` at each noise level.

    Raises:
        UserError: As :func:`measure`.
    """
    clips = next(iter(real.values())).shape[1]
    if clips < 2:
        raise UserError(f"Got {clips} clip: what chance does can be told from two on. Ask for a few dozen.")
    if not all(values.isfinite().all() for each in (real, generated) for values in each.values()):
        raise UserError("The model's blocks put out values that are not finite. Check the weights and the precision.")
    blocks = tuple(_compare(block, real, generated) for block in range(len(next(iter(real.values())))))
    first = sorted(blocks, key=lambda each: -each.separation)[:TAPPED]
    significant = all(each.chance <= MAX_CHANCE for each in first)
    report = SpectrumReport(
        clips=clips,
        blocks=blocks,
        recommended=tuple(sorted(each.block for each in first)) if significant else (),
        published=tapped_by_default(len(blocks)),
    )
    return Spectra(report, real, generated)


def _compare(block: int, real: dict[float, Tensor], generated: dict[float, Tensor]) -> BlockSpectrum:
    products = {level: pair_products(real[level][block], generated[level][block]) for level in real}
    whole = torch.stack([*products.values()]).mean(0)
    levels = tuple(
        LevelSpectrum(
            timestep=level,
            real=_describe(real[level][block]),
            generated=_describe(generated[level][block]),
            separation=separation(products[level]),
        )
        for level in real
    )
    return BlockSpectrum(block=block, separation=separation(whole), chance=chance(whole), levels=levels)


def _describe(values: Tensor) -> Distribution:
    flat, _ = values.flatten().double().sort()
    places = {name: round(level * (len(flat) - 1)) for name, level in QUANTILES.items()}
    return Distribution(
        mean=float(flat.mean()),
        std=float(flat.std(correction=0)),
        quantiles={name: float(flat[place]) for name, place in places.items()},
    )
