"""FastGen with networks of a few hundred weights: what the programs beside this file share."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from page_lines import MOST_LINES, code_blocks
from without_gpu import declare_torchvision_operators, stand_in_for_wandb

declare_torchvision_operators()
stand_in_for_wandb(Path(sys.argv[1]))

from fastgen.callbacks.callback import Callback  # noqa: E402
from fastgen.configs.methods.config_dmd2 import create_config  # noqa: E402
from fastgen.networks.network import FastGenNetwork  # noqa: E402
from fastgen.trainer import Trainer  # noqa: E402
from fastgen.utils import LazyCall as L  # noqa: E402
from fastgen.utils import instantiate  # noqa: E402
from fastgen.utils.checkpointer import Checkpointer, FSDPCheckpointer  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

T_LIST = [0.999, 0.937, 0.833, 0.624, 0.0]
SHAPE = [4, 5, 4, 4]

time.sleep = lambda seconds: None  # FastGen's trainer naps for ten seconds at its end


class TinyVideoNet(FastGenNetwork):
    """Predicts a velocity on rectified flow's path, as Wan does, from what it sees, the time and the condition."""

    def __init__(
        self, channels: int = 4, net_pred_type: str = "flow", schedule_type: str = "rf", **kwargs: Any
    ) -> None:
        super().__init__(net_pred_type=net_pred_type, schedule_type=schedule_type, **kwargs)
        self.inner, self.outer = nn.Conv3d(channels, 8, 3, padding=1), nn.Conv3d(8, channels, 3, padding=1)
        self.embed = nn.Linear(11, 8)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Tensor | None = None,
        r: Any = None,
        return_features_early: bool = False,
        feature_indices: Any = None,
        return_logvar: bool = False,
        fwd_pred_type: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        time = self.noise_scheduler.rescale_t(t).to(x_t.dtype) / 1000
        embedding = self.embed(torch.cat([condition, time.view(-1, 1)], dim=1))
        output = self.outer(torch.tanh(self.inner(x_t) + embedding[:, :, None, None, None]))
        output = output.to(x_t.dtype)
        target = fwd_pred_type or self.net_pred_type
        return self.noise_scheduler.convert_model_output(x_t, output, t, self.net_pred_type, target)


class Clips:
    """Clips that never end, with one-hot conditions; another order in every epoch of every run."""

    def __init__(self, shape: Sequence[int], batch_size: int = 3, sampler_start_idx: int = 0, **kwargs: Any) -> None:
        self.shape, self.batch_size = tuple(shape), batch_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            labels = torch.eye(10)[torch.randint(10, (self.batch_size,))]
            real = 0.5 * torch.randn(self.batch_size, *self.shape) + torch.randn(self.batch_size, 1, 1, 1, 1)
            yield {"real": real[:, :, 0] if len(self.shape) == 3 else real, "condition": labels,
                   "neg_condition": torch.zeros_like(labels)}  # fmt: skip


class ImageClips(Clips):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            labels = torch.eye(10)[torch.randint(10, (self.batch_size,))]
            yield {"real": torch.randn(self.batch_size, *self.shape), "condition": labels,
                   "neg_condition": torch.zeros_like(labels)}  # fmt: skip


def video_config(folder: Path | str, max_iter: int) -> Any:
    """DMD2 on tiny video latents: four steps, a student update in every second iteration, guidance."""
    config = create_config()
    config.model.device = "cpu"
    config.model.net = L(TinyVideoNet)()
    config.model.input_shape = SHAPE
    config.model.gan_loss_weight_gen = 0
    config.model.guidance_scale = 3.0
    config.model.student_update_freq = 2
    config.model.student_sample_steps = 4
    config.model.sample_t_cfg.t_list = T_LIST
    config.model.sample_t_cfg.time_dist_type = "shifted"
    config.model.sample_t_cfg.min_t, config.model.sample_t_cfg.max_t = 0.001, 0.999
    config.model.net_optimizer.lr = config.model.fake_score_optimizer.lr = 1e-3
    config.dataloader_train = L(Clips)(shape=SHAPE, batch_size=3)
    config.trainer.callbacks = DictConfig({})
    config.trainer.max_iter = max_iter
    config.trainer.save_ckpt_iter = 10**6
    config.trainer.checkpointer.save_dir = str(folder)
    return config


def lines_of_the_page(block: int = 0) -> str:
    """The user's code, as docs/hosts/fastgen.md gives it."""
    lines = code_blocks("fastgen.md", "python")[block]
    assert len(lines.splitlines()) <= MOST_LINES
    return lines


def train(config: Any, checkpointer: type[Checkpointer] | None = None) -> tuple[Trainer, Any]:
    """What FastGen's train.py does with a configuration."""
    config.model_class.config = config.model
    model = instantiate(config.model_class)
    config.model_class.config = None
    trainer = Trainer(config)
    if checkpointer is not None:
        trainer.checkpointer = checkpointer(config.trainer.checkpointer)
    trainer.run(model)
    return trainer, model


__all__ = ["Callback", "Checkpointer", "DictConfig", "FSDPCheckpointer", "L", "Trainer", "instantiate"]
