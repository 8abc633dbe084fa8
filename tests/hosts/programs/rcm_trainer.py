"""rCM's trainer, model, configuration and checkpoints take steps, save and go on, with the lines of docs/hosts/rcm.md.

Stood in for: CUDA's device by the CPU; flash_attn, triton and transformer_engine by nothing at all, torchvision's
operators by declarations; Wan by a pointwise network, its VAE by nothing (batches come processed). The sCM's derivative
is by rCM's finite differences (``fd_type=2``), as its kernel needs a GPU. rCM's own code and megatron's are real.
"""

import importlib
import json
import math
import shlex
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from by_hand import RegressionByHand, noting
from page_lines import code_blocks
from rcm_on_cpu import CPU, stand_in

scratch = Path(sys.argv[1])
SHAPE = (2, 3, 5, 4, 4)
VALUES = math.prod(SHAPE[1:])
FLOOR, SHARPNESS = 0.5, 2.0


stand_in(scratch)

import rcm.models.t2v_model_distill_rcm as host  # noqa: E402
from imaginaire.lazy_config import LazyCall, instantiate  # noqa: E402
from imaginaire.utils import misc  # noqa: E402
from imaginaire.utils.config_helper import override  # noqa: E402
from rcm.checkpointers.dcp_distill import DistributedCheckpointer_Distill  # noqa: E402
from rcm.configs.defaults.optimizer import AdamWConfig  # noqa: E402
from rcm.trainers.trainer_distillation import ImaginaireTrainer_Distill  # noqa: E402

from avd_core import AVDConfig  # noqa: E402
from avd_core.matching import distribution_matching_loss  # noqa: E402
from avd_integrations import rcm as adapter  # noqa: E402
from references import reference_motion  # noqa: E402

HOST = host.T2VDistillModel_rCM
original_dmd_step = HOST._student_dmd_step
consistency, matching, samples = [], [], []


HOST._student_scm_step = noting(HOST._student_scm_step, consistency)
HOST._student_dmd_step = noting(HOST._student_dmd_step, matching)
HOST.backward_simulation = noting(HOST.backward_simulation, samples)


class Net(nn.Module):
    """A pointwise transformer, so to say; predicts the velocity, and notes what was asked of it with gradient."""

    seen = []

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(SHAPE[1], SHAPE[1], 1)

    def init_weights(self) -> None:
        torch.manual_seed(1)
        self.layer.reset_parameters()

    def disable_context_parallel(self) -> None:
        pass

    def forward(
        self, x_B_C_T_H_W: Tensor, timesteps_B_T: Tensor, crossattn_emb: Tensor, data_type: Any = None
    ) -> Tensor:
        time = timesteps_B_T.reshape(-1, 1, 1, 1, 1) / 1000
        output = self.layer(x_B_C_T_H_W) + time * crossattn_emb.mean()
        if output.requires_grad:
            self.seen.append((x_B_C_T_H_W.detach(), timesteps_B_T.detach(), output.detach(), crossattn_emb))
        return output


class Tokenizer:
    latent_ch = SHAPE[1]


def page_overrides() -> list[str]:
    """What docs/hosts/rcm.md adds to the command line."""
    command = code_blocks("rcm.md", "bash")[0].replace("\\\n", " ")
    words = shlex.split(command)
    return [word for word in words[words.index("--") + 1 :] if word.startswith(("experiment", "model.", "+model."))]


def configuration(overrides: list[str]) -> Any:
    """The host's own experiment, smaller."""
    small = {
        "net": LazyCall(Net)(), "net_teacher": LazyCall(Net)(), "net_fake_score": LazyCall(Net)(),
        "tokenizer": LazyCall(Tokenizer)(), "teacher_ckpt": "", "neg_embed_path": "", "fsdp_shard_size": 1,
        "precision": "float32", "tangent_warmup": 1, "student_update_freq": 2, "state_ch": SHAPE[1], "fd_type": 2,
        "optimizer_fake_score": AdamWConfig,
    }  # fmt: skip
    registry = importlib.import_module("rcm.configs.registry_distill")
    config = override(registry.make_config(), ["--", *overrides])
    for name, value in small.items():
        config.model.config[name] = value
    config.optimizer = AdamWConfig
    config.optimizer.lr = 0.1
    config.scheduler.warm_up_steps = [0]
    return config


def batches() -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(7)
    for index in range(20):
        yield {
            "latents": (0.2 + index % 3) * torch.randn(SHAPE, generator=generator),
            "videos": torch.zeros(SHAPE[0], 3, SHAPE[2], 8, 8),
            "t5_text_embeddings": torch.randn(SHAPE[0], 2, 6, generator=generator),
            "is_processed": True,
        }


class ByHand(RegressionByHand):
    """Eq. 5-8 in plain arithmetic, from what the student's network saw and said: nothing of TrigFlow."""

    def __init__(self, angles: list[float]) -> None:
        super().__init__(sharpness=SHARPNESS)
        self.temporal_loss = []
        self.levels = {t: math.sin(t) / (math.sin(t) + math.cos(t)) for t in angles}  # of rectified flow

    def regression(self, clips: Tensor, seen: tuple[Tensor, Tensor, Tensor, Tensor], text: Tensor) -> float:
        """In the host's scale: a sum over the batch."""
        x, times, output, embedding = seen
        assert torch.equal(embedding, text)
        targets, steps = [], []
        for clip, x_t, time in zip(clips.double(), x.double(), times.flatten() / 1000, strict=True):
            step, sigma = min(self.levels.items(), key=lambda level: abs(level[1] - time.item()))
            assert abs(sigma - time.item()) < 1e-5, (sigma, time)
            noise = (x_t - (1 - sigma) * clip) / sigma
            assert abs(noise.std() - 1) < 0.2
            targets.append(noise - clip)
            steps.append(step)
        return len(clips) * 2 * VALUES * self.accumulate(output, torch.stack(targets), steps)

    def motion(self, video: Tensor, added_gradient: Tensor) -> float:
        """The same of Eq. 8, whose gradient is compared, too."""
        x = video.detach().double().requires_grad_()
        temporal_loss = -((x - x.mean(dim=2, keepdim=True)).square().mean() + 1e-6).log()
        self.temporal_loss.append(temporal_loss.item())
        scale = len(video) * 2 * VALUES
        (gradient,) = torch.autograd.grad(scale * 0.05 * temporal_loss.clamp_min(FLOOR), x)
        slack = 1e-3 * gradient.abs().max().item()
        torch.testing.assert_close(added_gradient.double(), gradient, rtol=1e-3, atol=slack)
        return scale * reference_motion(video.tolist(), FLOOR)


def noting_gradient(method: Callable[..., Any], log: list[Tensor]) -> Callable[..., Any]:
    """The adapter's step over the host's; notes the gradient that it adds to the sample's."""

    def call(ctx: Any, iteration: int) -> Any:
        result = method(ctx, iteration)
        added = (result[1] - matching[-1][2][1]).sum()
        log.append(torch.autograd.grad(added, samples[-1][2][0], retain_graph=True)[0])
        return result

    return call


def train(config: Any, model: Any, by_hand: ByHand, max_iter: int) -> list[int]:
    """The host's loop, from its latest checkpoint on, to a checkpoint. Gives the iteration of each batch."""
    config.trainer.max_iter = max_iter
    trainer = ImaginaireTrainer_Distill.__new__(ImaginaireTrainer_Distill)
    trainer.config, trainer.callbacks, trainer.training_timer = config, mock.MagicMock(), misc.TrainingTimer()
    trainer.checkpointer = DistributedCheckpointer_Distill(config.checkpoint, config.job)
    step, steps, gradients = trainer.training_step, [], []
    model._student_dmd_step = noting_gradient(model._student_dmd_step, gradients)

    def checked_step(
        model_ddp: Any, grad_scaler: Any, data_batch: dict[str, Any], iteration: int, grad_accum_iter: int
    ) -> Any:
        if not steps:
            by_hand.check_cache(model.avd.objective.regression.cache)
        before = parameters(model.net)
        for log in (consistency, matching, samples, Net.seen):
            log.clear()
        result = step(model_ddp, grad_scaler, data_batch, iteration=iteration, grad_accum_iter=grad_accum_iter)
        log, loss, gathered = result
        steps.append(iteration)
        student = iteration >= 1 and (iteration - 1) % 2 == 0
        assert any(name.startswith("avd/") for name in log) == student, (iteration, list(log))
        if student:
            # With gradient: the student for sCM (which asks it without, too), then for the regression, then for DMD.
            by_host = sum(log[0][2][1].sum().item() for log in (consistency, matching))
            video = samples[0][2][0]
            regression = by_hand.regression(data_batch["latents"], Net.seen[1], data_batch["t5_text_embeddings"])
            motion = by_hand.motion(video, gradients[-1])
            added = [log["avd/regression/loss"], log["avd/motion/loss"]]
            assert math.isclose(added[0].item() * 2 * VALUES * SHAPE[0], regression, rel_tol=1e-4)
            assert math.isclose(added[1].item() * 2 * VALUES * SHAPE[0], motion, rel_tol=1e-4)
            assert math.isclose(loss.item(), by_host + regression + motion, rel_tol=1e-5)
            assert torch.equal(before, parameters(model.net)) == (gathered != 0)
        if gathered == 0:
            by_hand.end_step()
        by_hand.check_cache(model.avd.objective.regression.cache)
        return result

    trainer.training_step = checked_step
    trainer.train(model, list(batches()), [])
    return steps


def parameters(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def check_scale() -> float:
    """The constant between the two losses, by the gradients of rCM's own expression and of ours."""
    shape = (1, 16, 21, 60, 104)
    online_mean, teacher, generated = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).unbind()
    gradients = []
    for batch in (1, 3):
        x_0, real, online = (t.expand(batch, *shape[1:]).clone() for t in (generated, teacher, online_mean))
        x_0.requires_grad_()
        answers = {"fake_score": online, "teacher": real}
        pieces = types.SimpleNamespace(
            config=types.SimpleNamespace(max_simulation_steps_fake=4, teacher_guidance=1.0, loss_scale_dmd=1.0),
            get_effective_iteration=lambda iteration: iteration,
            backward_simulation=lambda *args, x_0=x_0, **kwargs: (x_0, None),
            draw_training_time_D=lambda shape: torch.full(shape, 0.7),
            sync=lambda *args: args,
            denoise=lambda *args, net_type, answers=answers: types.SimpleNamespace(x0=answers[net_type]),
        )
        loss = original_dmd_step(pieces, (x_0.detach(), None, None), 0)[1].sum()  # as its trainer sums
        (theirs,) = torch.autograd.grad(loss, x_0)
        (ours,) = torch.autograd.grad(distribution_matching_loss(x_0, real, online).loss, x_0)
        factor = batch * adapter._sum_of_squares(torch.Size(shape[1:]))
        torch.testing.assert_close(theirs, factor * ours, rtol=1e-4, atol=1e-6)
        gradients.append(factor / batch)
    assert gradients[0] == gradients[1] == 2 * 16 * 21 * 60 * 104
    return gradients[0]


with CPU():
    scale = check_scale()
    overrides = page_overrides()
    assert 1 <= len(overrides) <= 4, overrides
    # What the page sets is the default, so others show that options arrive.
    overrides += [f"model.avd.motion.floor={FLOOR}", f"+model.avd.regression.sharpness={SHARPNESS}"]
    config = configuration(overrides)
    torch.manual_seed(0)
    model = instantiate(config.model)
    angles = model.avd.objective.regression.cache.timesteps.tolist()
    assert [round(angle, 4) for angle in angles] == [1.5583, 1.5, 1.4, 1.0]
    by_hand = ByHand(angles)
    first = train(config, model, by_hand, max_iter=5)
    assert first == [0, 1, 2, 3, 4]

    resumed = instantiate(config.model)
    second = train(config, resumed, by_hand, max_iter=8)
    assert second == [5, 6, 7]

    gathering = configuration([*overrides, "trainer.grad_accum_iter=2"])
    resumed = instantiate(gathering.model)
    third = train(gathering, resumed, by_hand, max_iter=12)
    assert third == [8, 8, 9, 9, 10, 10, 11, 11]
    assert min(by_hand.temporal_loss) < FLOOR < max(by_hand.temporal_loss)

    # The host's own model reads our checkpoint, we read one of its, and another grid is refused.
    saved = resumed.state_dict()
    plain = HOST(config.model.config)
    checkpointer = DistributedCheckpointer_Distill(config.checkpoint, config.job)
    plain.init_optimizer_scheduler(config.optimizer, config.scheduler)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert checkpointer.load(plain, plain.optimizer_dict, plain.scheduler_dict, scaler) == 12
    assert torch.equal(plain.net.layer.weight, resumed.net.layer.weight)
    other = adapter.avd_model(config.model.config, AVDConfig(timesteps=(1.5, 1.4, 1.3, 1.0)))
    other.init_optimizer_scheduler(config.optimizer, config.scheduler)
    with pytest.raises(RuntimeError, match="is for the grid"):
        checkpointer.load(other, other.optimizer_dict, other.scheduler_dict, scaler)
    checkpointer.save(plain, plain.optimizer_dict, plain.scheduler_dict, scaler, iteration=13)
    ours = adapter.avd_model(config.model.config)
    ours.init_optimizer_scheduler(config.optimizer, config.scheduler)
    assert checkpointer.load(ours, ours.optimizer_dict, ours.scheduler_dict, scaler) == 13
    assert not ours.avd.objective.regression.cache.seen.any()

print(json.dumps({"scale": scale, "steps": [*first, *second, *third], "means": by_hand.means}))
