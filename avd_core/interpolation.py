"""Inserting frames into latent clips: the network of Sec. 8 of the paper, and what it has to beat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from avd_core._checks import check_floating, check_number

# Ten pairs of 60 x 104 take 1.2 times as long in one piece as five and five.
_CPU_CHUNK_PIXELS = 32_768

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


class LatentFrameInterpolator(nn.Module):
    """Predicts the latent frame between each neighbouring pair with a U-Net (You et al., Sec. 8).

    The two frames are joined along channels (``2 C``). They go through three levels of convolutions with max pooling
    between them, and back through transposed convolutions, with a skip connection at each level. A 1x1 convolution
    gives the ``C`` channels of the new frame.

    It differs from the released code in two ways. The network's output is added to the mean of the two frames and is
    zero at first, so that training starts from linear interpolation. And it normalises over groups of a sample's own
    channels, so that a frame does not depend on its batch, in training or evaluation.

    Height and width may be any from 4 on. Those that 4 does not divide are padded by their edge and cut again.

    Args:
        channels: C, latent channels. Wan2.1: 16.
        widths: Channels of the three levels; multiples of 8.
        chunk_size: How many pairs the network takes at once, which limits its memory. None takes all; on a CPU only as
            many as fit its cache, since more at once are slower there. Results change by rounding only.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> interpolator = LatentFrameInterpolator(channels=16)
        >>> interpolator(torch.randn(1, 16, 11, 60, 104)).shape
        torch.Size([1, 16, 21, 60, 104])
    """

    def __init__(
        self, channels: int = 16, widths: Sequence[int] = (32, 64, 128), *, chunk_size: int | None = None
    ) -> None:
        super().__init__()
        _check_options(channels, widths, chunk_size)
        self.channels = channels
        self.widths = tuple(widths)
        self.chunk_size = chunk_size
        outer, middle, inner = self.widths
        self.encoder_outer = _block(2 * channels, outer)
        self.encoder_middle = _block(outer, middle)
        self.encoder_inner = _block(middle, inner)
        self.up_middle = nn.ConvTranspose2d(inner, middle, 2, stride=2)
        self.decoder_middle = _block(2 * middle, middle)
        self.up_outer = nn.ConvTranspose2d(middle, outer, 2, stride=2)
        self.decoder_outer = _block(2 * outer, outer)
        self.output = nn.Conv2d(outer, channels, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]

    def forward(self, latents: Tensor) -> Tensor:
        """Insert frames.

        Args:
            latents: ``[B, C, F, H, W]`` floating point, ``F >= 2``.

        Returns:
            ``[B, C, 2 F - 1, H, W]`` of the same dtype: the frames that came, bit for bit, at even places, and what
            lies between them at odd ones.

        Raises:
            TypeError: If ``latents`` is not floating point.
            ValueError: If it has another shape, one frame, other channels, or a height or width below 4.
        """
        self.check_input(latents)
        if latents.shape[2] < 2:
            raise ValueError("latents has one frame; there is nothing between one frame. Pass at least two.")
        return interleave(latents, self.between(latents[:, :, :-1], latents[:, :, 1:]))

    def between(self, before: Tensor, after: Tensor) -> Tensor:
        """The frames between two clips, frame by frame: ``[B, C, F, H, W]`` twice to the same shape."""
        batch = len(before)
        pairs = rearrange(torch.cat([before, after], dim=1), "b c f h w -> (b f) c h w")
        # Channels last is what convolutions are fastest in, on CPUs and on GPUs with tensor cores.
        pairs = pairs.contiguous(memory_format=torch.channels_last)
        chunks = torch.split(pairs, self.chunk_size or _default_chunk(pairs))
        corrections = torch.cat([self._correct(chunk.to(self.output.weight.dtype)) for chunk in chunks])
        # The mean is taken in the clips' own precision: a network in bfloat16 rounds its correction alone.
        mean = torch.lerp(before, after, 0.5)
        return mean + rearrange(corrections, "(b f) c h w -> b c f h w", b=batch).to(mean.dtype)

    def check_input(self, latents: Tensor) -> None:
        """Whether clips have the channels and the size that this network takes; raises as :meth:`forward`."""
        check_floating("latents", latents)
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise ValueError(
                f"latents must have shape [B, {self.channels}, F, H, W], got {list(latents.shape)}. This interpolator "
                f"has {self.channels} channels; train one for another latent space."
            )
        if latents.numel() == 0:
            raise ValueError(f"latents must not be empty, got {list(latents.shape)}.")
        if min(latents.shape[3:]) < 4:
            raise ValueError(
                f"latents must be at least 4 high and wide for three levels, got {latents.shape[3]} x "
                f"{latents.shape[4]}."
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and safetensors weights, as diffusers lays out its models."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": type(self).__name__, "channels": self.channels, "widths": self.widths}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / WEIGHTS_FILE, {"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, chunk_size: int | None = None) -> Self:
        """Read what :meth:`save_pretrained` wrote, here or in diffusers; in evaluation mode, on the CPU.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If a file is damaged or of another model.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            config = json.loads((folder / CONFIG_FILE).read_text())
            model = cls(config["channels"], config["widths"], chunk_size=chunk_size)
            model.load_state_dict(load_file(folder / WEIGHTS_FILE))
        except FileNotFoundError:
            raise
        except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{folder} holds no LatentFrameInterpolator: {error}. Pass a folder that save_pretrained wrote."
            ) from error
        return model.eval()

    def _correct(self, pairs: Tensor) -> Tensor:
        """``[N, 2 C, H, W]`` to ``[N, C, H, W]``."""
        height, width = pairs.shape[2:]
        padded = F.pad(pairs, (0, -width % 4, 0, -height % 4), mode="replicate")
        outer = self.encoder_outer(padded)
        middle = self.encoder_middle(F.max_pool2d(outer, 2))
        inner = self.encoder_inner(F.max_pool2d(middle, 2))
        middle = self.decoder_middle(torch.cat([middle, self.up_middle(inner)], dim=1))
        outer = self.decoder_outer(torch.cat([outer, self.up_outer(middle)], dim=1))
        correction: Tensor = self.output(outer)[:, :, :height, :width]
        return correction


def interpolate_linearly(latents: Tensor) -> Tensor:
    """``[B, C, F, H, W]`` to ``[B, C, 2 F - 1, H, W]``, each frame inserted being the mean of its neighbours."""
    return interleave(latents, torch.lerp(latents[:, :, :-1], latents[:, :, 1:], 0.5))


def repeat_frames(latents: Tensor) -> Tensor:
    """``[B, C, F, H, W]`` to ``[B, C, 2 F - 1, H, W]``, each frame inserted being the one before it."""
    return interleave(latents, latents[:, :, :-1])


def interleave(latents: Tensor, between: Tensor) -> Tensor:
    """``[B, C, F, H, W]`` and the ``F - 1`` frames between them to ``[B, C, 2 F - 1, H, W]``."""
    pairs = torch.stack([latents[:, :, :-1], between], dim=3).flatten(2, 3)
    return torch.cat([pairs, latents[:, :, -1:]], dim=2)


def _default_chunk(pairs: Tensor) -> int:
    if pairs.device.type != "cpu":
        return len(pairs)
    return max(1, _CPU_CHUNK_PIXELS // (pairs.shape[2] * pairs.shape[3]))


def _block(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.GroupNorm(8, width),
        nn.SiLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.GroupNorm(8, width),
        nn.SiLU(),
    )


def _check_options(channels: int, widths: Sequence[int], chunk_size: int | None) -> None:
    check_number("channels", channels, at_least=1)
    if len(widths) != 3 or any(width < 8 or width % 8 for width in widths):
        raise ValueError(f"widths must be three multiples of 8, got {tuple(widths)}.")
    if chunk_size is not None:
        check_number("chunk_size", chunk_size, at_least=1)
