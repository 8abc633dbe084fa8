"""Methods scm and rcm against rCM's own losses and sampler: same weights, clips and draws, values and gradients.

Stood in for: CUDA's device by the CPU, what needs a GPU by nothing (``rcm_on_cpu.py``), Wan by a small smooth network,
whose forward derivative (``withT``), which rCM's Wan computes by its kernel, is PyTorch's. The rest is rCM's own code.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any
from unittest import mock

from rcm_on_cpu import CPU, stand_in

stand_in(Path(sys.argv[1]))

import torch  # noqa: E402
from rcm.models.t2v_model_distill_rcm import T2VDistillModel_rCM as Host  # noqa: E402
from rcm.utils.denoiser_scaling import RectifiedFlow_TrigFlowWrapper  # noqa: E402
from rcm.utils.timestep_utils import LogNormal, rf_to_trig_time, shift_rf_time  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from avd_trainer.data.batches import Batch  # noqa: E402
from avd_trainer.methods.base import Setting, Turn  # noqa: E402
from avd_trainer.methods.rcm import RCM, RCMMethodConfig  # noqa: E402
from avd_trainer.methods.trigflow import to_angles, to_timesteps  # noqa: E402
from avd_trainer.models.condition import Condition  # noqa: E402
from avd_trainer.models.samplers import FewStepSampler  # noqa: E402

B, SHAPE = 3, (4, 5, 6, 6)
VALUES = math.prod(SHAPE)
GUIDANCE = 5.0


class Net(nn.Module):
    """A flow model; as rCM calls it, also with tangents, and as we do."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.before, self.after = (nn.Conv3d(SHAPE[0], SHAPE[0], 3, padding=1) for _ in range(2))

    def velocity(self, x: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        time = (timesteps.reshape(-1, 1, 1, 1, 1) / 200).sin()
        return x + self.after(torch.tanh(self.before(x) + time + text.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)))

    def forward(self, x_B_C_T_H_W: Any, timesteps_B_T: Any, crossattn_emb: Tensor, withT: bool = False) -> Any:
        if withT:
            return torch.func.jvp(
                lambda x, t: self.velocity(x, t, crossattn_emb),
                (x_B_C_T_H_W[0], timesteps_B_T[0]),
                (x_B_C_T_H_W[1], timesteps_B_T[1]),
            )
        return self.velocity(x_B_C_T_H_W, timesteps_B_T, crossattn_emb)


class Ours:
    """The same network as a role of a run."""

    def __init__(self, net: Net) -> None:
        self.net = net

    def __call__(self, x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        return self.net.velocity(x_t, timesteps, condition.text)


class Given:
    """Draws that both sides see; each name is a queue of tensors."""

    def __init__(self, steps: int = 1, **draws: list[Tensor]) -> None:
        self.steps, self.draws = steps, {name: list(each) for name, each in draws.items()}

    def normal(self, name: str, shape: Any) -> Tensor:
        return self.draws[name].pop(0)

    def uniform(self, name: str) -> Tensor:
        return self.draws[name].pop(0)

    def named(self, name: str) -> Callable[[Any], Tensor]:
        return lambda shape: self.normal(name, shape)

    def shared_integer(self, name: str, below: int) -> int:
        return self.steps - 1


@contextmanager
def theirs_draw(*tensors: Tensor) -> Iterator[None]:
    """What torch.randn gives rCM, in order."""
    left = list(tensors)
    with (
        mock.patch.object(torch, "randn", side_effect=lambda *_, **__: left.pop(0)),
        mock.patch.object(torch, "randn_like", side_effect=lambda *_, **__: left.pop(0)),
    ):
        yield
    assert not left, f"{len(left)} draws were not asked for"


generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def uniform() -> Tensor:
    return torch.rand(B, generator=generator)


nets = {name: Net(seed) for seed, name in enumerate(("student", "teacher", "online"))}
clips, text, unconditional = normal(B, *SHAPE), normal(B, 2, 6), normal(2, 6)


def host(**options: Any) -> Any:
    """rCM's model without what builds it."""
    config = {
        "teacher_guidance": GUIDANCE, "tangent_warmup": 0, "loss_scale": 100.0, "loss_scale_dmd": 1.0, "fd_type": 0,
        "fd_size": 1e-4, "max_simulation_steps_fake": 4, "dmd_fix_timesteps": False, "sigma_max": 1e7,
        "backward_timesteps": [1.5, 1.4, 1.0], "input_data_key": "videos",
    }  # fmt: skip
    model = SimpleNamespace(
        config=SimpleNamespace(**{**config, **options}),
        scaling=RectifiedFlow_TrigFlowWrapper(1.0, 1000.0),
        tensor_kwargs={"device": "cpu", "dtype": torch.float32},
        net=nets["student"], net_teacher=nets["teacher"], net_fake_score=nets["online"],
        p_G=LogNormal(p_mean=0.7, p_std=1.6),
        sync=lambda *each: each[0] if len(each) == 1 else each,
        get_effective_iteration=lambda iteration: iteration,
        get_effective_iteration_fake=lambda iteration: iteration,
    )  # fmt: skip
    for name in ("denoise", "student_F_withT", "backward_simulation", "draw_training_time_G", "_sample_rf_time"):
        setattr(model, name, MethodType(getattr(Host, name), model))
    return model


def condition_of(text: Tensor) -> Any:
    return SimpleNamespace(to_dict=lambda: {"crossattn_emb": text})


context = (clips, condition_of(text), condition_of(unconditional.expand_as(text)))


def method(**options: Any) -> RCM:
    models = {name: Ours(net) for name, net in nets.items()}
    return RCM(RCMMethodConfig(**options), models, Setting(SHAPE, unconditional, torch.device("cpu")))


def gradients(role: str) -> Tensor:
    """Of the parameters of a network, which are cleared."""
    found = torch.cat([p.grad.flatten() for p in nets[role].parameters()])
    for net in nets.values():
        net.zero_grad()
    return found


def apart(ours: Any, theirs: Any) -> float:
    """Relative distance."""
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    return float((ours - theirs).norm() / theirs.norm())


def consistency(theirs: dict[str, Any], ours: dict[str, Any], iteration: int = 0) -> dict[str, float]:
    """Both losses of sCM."""
    angles, noise = normal(B, 1), normal(B, *SHAPE)
    with CPU(), theirs_draw(angles, noise):
        _, loss = Host._student_scm_step(host(**theirs), context, iteration)
    loss.sum().backward()
    expected = loss.sum().detach(), gradients("student")
    own = method(**ours)
    own.consistency.steps += iteration
    draws = Given(consistency_angles=[angles], consistency_noise=[noise])
    found = own.consistency.loss({"clips": Batch(clips, Condition(text))}, draws, shown=True)
    found.backward(1)
    factor = 2 * B * VALUES  # theirs is a sum, ours half a mean
    value = apart(factor * found.value, expected[0])
    return {"value": value, "gradient": apart(factor * gradients("student"), expected[1])}


def simulated(steps: int) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    return [uniform() for _ in range(3)], [normal(B, *SHAPE) for _ in range(steps)], uniform(), normal(B, *SHAPE)


def their_times(uniforms: list[Tensor]) -> Callable[[Any], Tensor]:
    """Angles by rCM's own functions, of the same uniform draws."""
    left = list(uniforms)
    return lambda shape: rf_to_trig_time(shift_rf_time(left.pop(0).double().view(shape), 5.0))


def matching(steps: int) -> dict[str, float]:
    """Both matching losses, on a sample of so many simulated steps."""
    times, noises, score_time, score_noise = simulated(steps)
    model = host()
    model.draw_training_time_D = their_times([*times[: steps - 1], score_time])
    with CPU(), theirs_draw(*noises, score_noise):
        _, loss = Host._student_dmd_step(model, context, steps - 1)
    loss.sum().backward()
    expected = loss.sum().detach(), gradients("student")
    draws = Given(
        steps, simulation_timesteps=times, trajectory=noises, score_timesteps=[score_time], score_noise=[score_noise],
        consistency_angles=[normal(B, 1)], consistency_noise=[normal(B, *SHAPE)],
    )  # fmt: skip
    _, found = method().losses(Turn("student", ("clips",)), {"clips": Batch(clips, Condition(text))}, draws)
    found.backward(1)
    factor = 2 * B * VALUES
    value = apart(factor * found.value, expected[0])
    return {"value": value, "gradient": apart(factor * gradients("student"), expected[1])}


def online(steps: int) -> dict[str, float]:
    """Both losses of the model that follows the student."""
    times, noises, score_time, score_noise = simulated(steps)
    model = host()
    model.draw_training_time_D = their_times([*times[: steps - 1], score_time])
    with CPU(), torch.no_grad(), theirs_draw(*noises, score_noise), torch.enable_grad():
        _, loss = Host.training_step_critic(model, context, steps - 1)
    loss.sum().backward()
    expected = loss.sum().detach(), gradients("online")
    draws = Given(
        steps, simulation_timesteps=times, trajectory=noises, score_timesteps=[score_time], score_noise=[score_noise]
    )
    (found,) = method().losses(Turn("online", ("clips",)), {"clips": Batch(clips, Condition(text))}, draws)
    found.backward(1)
    factor = B * VALUES  # theirs is a sum, ours a mean
    value = apart(factor * found.value, expected[0])
    return {"value": value, "gradient": apart(factor * gradients("online"), expected[1])}


def sampling() -> float:
    """Samples of four steps; theirs from arctan of a sigma so large that it is pure noise."""
    noises = [normal(B, *SHAPE) for _ in range(4)]
    model = host()
    model.get_data_and_condition = lambda batch: (None, None, *context[1:])
    with CPU(), torch.no_grad(), theirs_draw(*noises[1:], noises[0]):  # theirs draws one more, and takes none of it
        theirs = Host.generate_samples_from_batch(
            model, {"videos": clips}, state_shape=list(SHAPE), num_steps=4, init_noise=noises[0]
        )
    angles = torch.tensor([math.pi / 2, 1.5, 1.4, 1.0], dtype=torch.float64)
    left = list(noises)
    with torch.no_grad():
        ours = FewStepSampler(to_timesteps(angles).tolist())(
            Ours(nets["student"]), Condition(text), unconditional, SHAPE, lambda shape: left.pop(0)
        )
    own = to_angles(torch.tensor(RCMMethodConfig().few_steps, dtype=torch.float64))
    assert (own - angles).abs().max() < 1e-5, own
    return apart(ours, theirs)


forward = {"derivative": "forward"}
report = {
    "forward": consistency({}, forward),
    # Rounding of float32 is as large as the step here, so that the form is compared at a large one.
    "differences": consistency({"fd_type": 2, "fd_size": 0.1}, {"derivative_step": 0.1}),
    "warm-up": consistency({"tangent_warmup": 10}, {**forward, "tangent_warmup": 10}, iteration=3),
    **{f"matching in {steps}": matching(steps) for steps in (1, 2, 4)},
    **{f"online in {steps}": online(steps) for steps in (1, 4)},
    "sampler": {"samples": sampling()},
    "small step": consistency({"fd_type": 2}, {}),
}
print(json.dumps(report))
