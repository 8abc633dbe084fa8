"""FastVideo on a CPU: its own Wan role model with a small transformer and made-up clips, and what a CPU lacks.

Everything between the YAML and the optimizer is FastVideo's, but for: weights and VAE (made up), the data loader (a
few clips in memory), FSDP's loader (``fully_shard`` is called here), and the three stand-ins of :func:`stand_in`.
"""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from without_gpu import declare_torchvision_operators


def stand_in() -> None:
    """For what FastVideo asks of CUDA: a state of its random numbers, an attention kernel, torchvision's operators."""
    declare_torchvision_operators()
    from fastvideo.platforms import current_platform

    torch.cuda.get_rng_state, torch.cuda.set_rng_state = torch.get_rng_state, lambda state: None
    type(current_platform).get_attn_backend_cls = classmethod(
        lambda cls, *args, **kwargs: "fastvideo.attention.backends.sdpa.SDPABackend"
    )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")


stand_in()

from fastvideo.configs.models.dits.wanvideo import WanVideoArchConfig, WanVideoConfig  # noqa: E402
from fastvideo.models.dits.wanvideo import WanTransformer3DModel  # noqa: E402
from fastvideo.train.callbacks.callback import Callback  # noqa: E402
from fastvideo.train.entrypoint.train import run_training_from_config  # noqa: E402, F401
from fastvideo.train.methods.distribution_matching.dmd2 import DMD2Method  # noqa: E402, F401
from fastvideo.train.models.wan import WanModel  # noqa: E402
from fastvideo.train.utils.module_state import apply_trainable  # noqa: E402

CHANNELS, FRAMES, SIDE, BATCH = 16, 3, 4, 2
MEAN, STD = [0.25 * (c % 3) for c in range(CHANNELS)], [0.5 + 0.25 * (c % 2) for c in range(CHANNELS)]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class Clips:
    """Endless batches as FastVideo's loader gives them, before normalisation; its position is in checkpoints."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            batch = self.batch(self.position)
            self.position += 1
            yield batch

    @staticmethod
    def batch(position: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(100 * position + rank())
        still = torch.randn(BATCH, CHANNELS, 1, SIDE, SIDE, generator=generator)
        moving = torch.randn(BATCH, CHANNELS, FRAMES, SIDE, SIDE, generator=generator)
        return {
            "vae_latent": 0.5 * still + 0.1 * moving,
            "text_embedding": torch.randn(BATCH, 4, 8, generator=generator),
            "text_attention_mask": torch.ones(BATCH, 4),
            "info_list": [{} for _ in range(BATCH)],
        }

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class TinyWan(WanModel):
    """Records what the student is called with where there is gradient, and the gradient that its answers are given."""

    log = []

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def _load_transformer(self, *, trainable: bool, **_: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(int(trainable))
            architecture = WanVideoArchConfig(
                num_attention_heads=2, attention_head_dim=12, in_channels=CHANNELS, out_channels=CHANNELS,
                text_dim=8, freq_dim=16, ffn_dim=32, num_layers=1,
            )  # fmt: skip
            transformer = WanTransformer3DModel(WanVideoConfig(arch_config=architecture), {})
            for parameter in transformer.parameters():
                torch.nn.init.normal_(parameter, std=0.15)
        transformer = apply_trainable(transformer, trainable=trainable)
        return fully_shard(transformer) if dist.get_world_size() > 1 else transformer

    def init_preprocessors(self, training_config: Any) -> None:
        self.vae = SimpleNamespace(latents_mean=MEAN, latents_std=STD)
        self._init_timestep_mechanics()
        self.dataloader = Clips()

    def add_noise(self, clean_latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        noisy = super().add_noise(clean_latents, noise, timestep)
        self._record("add_noise", clean=clean_latents, noise=noise, times=timestep, noisy=noisy)
        return noisy

    def predict_noise(self, noisy_latents: Tensor, timestep: Tensor, batch: Any, **options: Any) -> Tensor:
        output = super().predict_noise(noisy_latents, timestep, batch, **options)
        self._record(
            "predict_noise", noisy=noisy_latents, times=timestep, output=output, options=options,
            gradients=_watched(output),
        )  # fmt: skip
        return output

    def predict_x0(self, *args: Any, **options: Any) -> Tensor:
        x_0 = super().predict_x0(*args, **options)
        self._record("predict_x0", x_0=x_0, gradients=_watched(x_0))
        return x_0

    def _record(self, call: str, **values: Any) -> None:
        if self.vae is not None and torch.is_grad_enabled():
            kept = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
            self.log.append((call, SimpleNamespace(**kept)))


def _watched(tensor: Tensor) -> list[Tensor]:
    """A list that gets the tensor's gradient when a run goes back."""
    gradients = []
    if tensor.requires_grad:
        tensor.register_hook(gradients.append)
    return gradients


class History(Callback):
    """Keeps what the trainer logs, and the method."""

    metrics = []
    methods = []

    def on_train_start(self, method: Any, iteration: int = 0) -> None:
        self.methods.append(method)

    def on_training_step_end(self, method: Any, loss_dict: dict[str, Any], iteration: int = 0) -> None:
        TinyWan.log.append(("step", None))
        self.metrics.append(dict(loss_dict))
