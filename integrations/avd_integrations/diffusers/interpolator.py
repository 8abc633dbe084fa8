"""The frame interpolator as a model of diffusers."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from avd_core import LatentFrameInterpolator


class LatentFrameInterpolatorModel(ModelMixin, LatentFrameInterpolator, ConfigMixin):
    """:class:`avd_core.LatentFrameInterpolator` as a model of diffusers: a pipeline saves, loads, casts and moves it.

    The files are the same: either class loads what the other has saved. New, it interpolates linearly.

    Args:
        channels: C, latent channels. Wan2.1: 16.
        widths: Channels of the three levels; multiples of 8.

    Raises:
        ValueError: If an option is out of range.

    Attributes:
        chunk_size: Pairs that the network takes at once, as there; None by default. Is not saved.
    """

    __module__ = "avd_integrations.diffusers"  # as saved pipelines name it, whichever file it is in

    @register_to_config
    def __init__(self, channels: int = 16, widths: Sequence[int] = (32, 64, 128)) -> None:
        # ModelMixin's own would call the network's without arguments.
        LatentFrameInterpolator.__init__(self, channels, widths)
        self._gradient_checkpointing_func = None
