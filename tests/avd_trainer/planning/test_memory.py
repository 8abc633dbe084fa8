"""Memory by phase: against what a trainer holds, and against what a step takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from avd_trainer.config.sections import ArchitectureConfig
from avd_trainer.methods.base import forward_equivalents
from avd_trainer.models.condition import Condition
from avd_trainer.models.forward_derivative import directional_derivative
from avd_trainer.models.transformer import VelocityModel, build_transformer
from avd_trainer.planning.activations import derivative_activations, training_activations
from avd_trainer.planning.description import Run, describe, find_architecture
from avd_trainer.planning.disk import plan_disk
from avd_trainer.planning.memory import plan_memory, worst
from avd_trainer.planning.meta_models import meta_models
from avd_trainer.planning.operations import forward_operations, update_operations
from avd_trainer.planning.plan import make_plan
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.trainer import Trainer
from planned_runs import (
    ADAPTERS,
    ARCHITECTURE,
    NOT_CHECKPOINTED,
    ONLINE_ADAPTER,
    SHAPE,
    SMALL_SHAPE,
    SMALL_TEXT,
    config,
    described,
    fuse_rms_norm,
    nbytes,
    peak,
    trainer_of,
)
from runs import MakeConfig, MakeTrainer


def frozen_weights(trainer: Trainer) -> list[Tensor]:
    teacher = trainer.models["teacher"]
    assert isinstance(teacher, VelocityModel)
    return [parameter for parameter in teacher.module.parameters() if not parameter.requires_grad]


@pytest.mark.parametrize(("size", "parameters"), [("1.3B", 1_418_996_800), ("14B", 14_288_491_584)])
def test_the_known_models_have_the_released_number_of_parameters(size: str, parameters: int) -> None:
    model = meta_models(describe(config(), find_architecture(f"Wan-AI/Wan2.1-T2V-{size}-Diffusers"), SHAPE, gpus=1))[
        "teacher"
    ].build()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "bfloat16"}, ONLINE_ADAPTER | {"precision": "bfloat16"}, ADAPTERS],
    ids=["full", "bfloat16", "online adapter", "adapters"],
)
def test_what_stays_is_what_a_trainer_holds_to_the_byte(
    small_teacher: str, ranks: Ranks, changes: dict[str, Any]
) -> None:
    own = config(teacher=small_teacher, **changes)
    trainer = trainer_of(own, ranks, SMALL_SHAPE, SMALL_TEXT)
    run = describe(own, find_architecture(small_teacher), SMALL_SHAPE, gpus=1, text_length=SMALL_TEXT[0])
    planned = worst(plan_memory(run))
    state = {owner: nbytes(tensors.values()) for owner, tensors in trainer.state_tensors().items()}
    frozen = frozen_weights(trainer)
    assert planned.frozen_weights == nbytes(frozen)
    assert planned.trained_weights == state["student"] + state["online"]
    assert planned.optimizer == state["student_optimizer"] + state["online_optimizer"]
    assert planned.ema == state["ema"]


def test_moments_of_a_part_are_counted_in_memory_and_on_disk(
    make_trainer: MakeTrainer, make_config: MakeConfig
) -> None:
    trainer, run = make_trainer("dcm"), make_plan(make_config("dcm")).run
    state = {owner: nbytes(tensors.values()) for owner, tensors in trainer.state_tensors().items()}
    owners = ("student_optimizer", "student_detail_optimizer", "discriminator_optimizer")
    assert worst(plan_memory(run)).optimizer == sum(state[owner] for owner in owners)
    assert state["student_optimizer"] == state["student_detail_optimizer"] > state["student"]
    assert plan_disk(run, 1).checkpoint == sum(state.values())


def test_gradients_are_of_the_model_in_work() -> None:
    full = 4 * sum(parameter.numel() for parameter in meta_models(described())["student"].build().parameters())
    adapter = plan_memory(described(**ONLINE_ADAPTER))
    assert {phase.name: phase.gradients for phase in plan_memory(described(micro_batch_size=1))} == {
        "teacher answer": full,  # accumulated over earlier examples
        "student update": full,
        "online update": full,
    }
    assert {phase.name: phase.gradients for phase in adapter} == {
        "teacher answer": 0,
        "student update": full,
        "online update": adapter[0].trained_weights - full,
    }


def test_the_students_graph_waits_while_the_teacher_answers() -> None:
    answers = set()
    for changes in ({}, NOT_CHECKPOINTED):
        run = described(micro_batch_size=1, **changes)
        kept = training_activations(meta_models(run)["student"], "student", 1, SHAPE, 512).kept
        answers.add(plan_memory(run)[0].activations - kept)
    (teacher,) = answers
    assert teacher > 0


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"gpus": 2}, {"gpus": 1}),
        ({"gpus": 8}, {"gpus": 4}),
        ({"gpus": 4}, {"gpus": 4, "parallel": {"replicate": 2}}),
        (ADAPTERS, ONLINE_ADAPTER),
        (ONLINE_ADAPTER, {}),
        ({}, NOT_CHECKPOINTED),
        ({}, {"micro_batch_size": None}),
        ({"shape": (16, 2, 32, 32)}, {"shape": SHAPE}),
        ({"precision": "bfloat16"}, {"precision": "float32"}),
        ({"batch_size": 8}, {"batch_size": 16}),
    ],
)
def test_what_should_save_memory_does(less: dict[str, Any], more: dict[str, Any]) -> None:
    one = {"micro_batch_size": 1}
    assert peak(**one | less).allocated < peak(**one | more).allocated


def test_more_gpus_never_hold_more_of_any_model() -> None:
    for changes in ({}, ADAPTERS):
        peaks = [peak(gpus=gpus, batch_size=gpus, **changes) for gpus in (1, 2, 3, 5, 8, 64)]
        for part in ("frozen_weights", "trained_weights", "gradients", "optimizer", "ema"):
            sizes = [getattr(phase, part) for phase in peaks]
            assert sizes == sorted(sizes, reverse=True)


def test_sampling_is_a_phase_where_it_is_done_and_holds_the_weights_twice() -> None:
    names = [phase.name for phase in plan_memory(described())]
    *phases, sampling = plan_memory(described(samples={"every": 1, "count": 2}))
    assert [phase.name for phase in phases] == names
    assert sampling.name == "sampling"
    assert (sampling.ema, sampling.gradients) == (2 * phases[0].ema, 0)


@pytest.mark.parametrize(
    "changes",
    [{}, NOT_CHECKPOINTED, ADAPTERS | {"precision": "bfloat16"}],
    ids=["full", "not checkpointed", "adapters"],
)
def test_a_step_on_the_cpu_takes_what_is_planned(
    monkeypatch: pytest.MonkeyPatch, small_teacher: str, ranks: Ranks, changes: dict[str, Any]
) -> None:
    fuse_rms_norm(monkeypatch)
    method = {"few_steps": [1000]} | changes.get("method", {})
    own = config(teacher=small_teacher, batch_size=1, **changes | {"method": method})
    trainer = trainer_of(own, ranks, SMALL_SHAPE, SMALL_TEXT)
    steps = trainer.run()
    next(steps)  # allocates what stays
    frozen = frozen_weights(trainer)
    held = nbytes(frozen) + sum(nbytes(tensors.values()) for tensors in trainer.state_tensors().values())
    taken = taken_by(lambda: next(steps))
    monkeypatch.undo()
    run = describe(own, find_architecture(own.teacher), SMALL_SHAPE, gpus=1, text_length=SMALL_TEXT[0])
    assert worst(plan_memory(run)).allocated == pytest.approx(held + taken, rel=0.15)


def taken_by(call: Callable[[], object]) -> int:
    """Bytes that a call takes at most on the CPU, by the profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    changes_in_time = sorted(
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    now = most = 0
    for _, size in changes_in_time:
        now += size
        most = max(most, now)
    return most


def test_a_forward_derivative_takes_what_is_planned() -> None:
    """More tokens than attention is taken apart into at once, so that its weights weigh."""
    shape, tokens = (16, 5, 32, 32), 16
    student = meta_models(scm("forward"))["student"]
    planned = derivative_activations(student, "student", 1, shape, tokens)
    module = WanTransformer3DModel.from_config(ARCHITECTURE)
    model = VelocityModel(module.requires_grad_(False), None, torch.float32)
    inputs, condition = (torch.randn(1, *shape), torch.tensor([500.0])), Condition(torch.randn(1, tokens, 4096))

    def differentiate() -> Tensor:
        return directional_derivative(lambda x, t: model(x, t, condition), inputs, inputs)

    assert planned == pytest.approx(taken_by(differentiate), rel=0.1)
    assert planned > 3 * 12 * 1024 * (5 * 16 * 16) * 4  # weights of attention, softmax and derivative, of 12 heads


def scm(derivative: str) -> Run:
    method = {"kind": "scm", "derivative": derivative}
    own = {"teacher": "none", "data": {"kind": "shapes"}, "max_steps": 3, "batch_size": 8, "method": method}
    return describe(TrainConfig.model_validate(own), ARCHITECTURE, SHAPE, gpus=1, text_length=512)


def test_what_a_forward_derivative_takes_is_planned_and_counted() -> None:
    exact, near = scm("forward"), scm("differences")
    assert "student derivative" in {phase.name for phase in plan_memory(exact)}
    assert "student derivative" not in {phase.name for phase in plan_memory(near)}
    assert forward_equivalents(exact.calls) == forward_equivalents(near.calls) + 1
    more = update_operations(exact).forward - update_operations(near).forward
    once = forward_operations(meta_models(near)["student"], "student", SHAPE, 512)
    assert more == pytest.approx(once, rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, ADAPTERS], ids=["full", "adapters"])
def test_a_run_on_a_gpu_takes_what_is_planned(tmp_path: Path, ranks: Ranks, changes: dict[str, Any]) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sizes = ArchitectureConfig(
        num_attention_heads=8, attention_head_dim=128, ffn_dim=4096, num_layers=8, freq_dim=256, text_dim=512
    )
    build_transformer(sizes).save_pretrained(tmp_path / "teacher")
    own = config(teacher=str(tmp_path / "teacher"), batch_size=1, precision="bfloat16", **changes)
    shape, text = (16, 21, 30, 52), (512, 512)
    steps = trainer_of(own, ranks, shape, text).run()
    next(steps)
    next(steps)
    run = describe(own, find_architecture(own.teacher), shape, gpus=1, text_length=text[0])
    measured = torch.cuda.max_memory_allocated() - before
    assert worst(plan_memory(run)).allocated == pytest.approx(measured, rel=0.15)
