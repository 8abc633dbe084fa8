"""Students in diffusers: the exact few steps as a scheduler, and Wan's pipeline at half the frame rate.

A folder that ``avd export`` wrote is loaded by diffusers alone; this package adds the exact grid and half rate.
"""

try:
    # diffusers looks for its own base classes beside those that a saved pipeline names.
    from diffusers import ModelMixin as ModelMixin
    from diffusers import SchedulerMixin as SchedulerMixin

    from avd_integrations.diffusers.half_rate import WanHalfRatePipeline
    from avd_integrations.diffusers.interpolator import LatentFrameInterpolatorModel
    from avd_integrations.diffusers.positions import frame_positions
    from avd_integrations.diffusers.scheduler import FewStepScheduler
except ImportError as error:
    raise ImportError(
        f"avd_integrations.diffusers needs diffusers with its Wan pipeline, and transformers: {error}. Install them "
        'with pip install "avd-core[trainer,wan]".'
    ) from error

__all__ = ["FewStepScheduler", "LatentFrameInterpolatorModel", "WanHalfRatePipeline", "frame_positions"]
