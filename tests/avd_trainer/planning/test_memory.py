import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from avd_trainer.config.loading import load_config, save_config
from avd_trainer.config.sections import ArchitectureConfig
from avd_trainer.data.in_memory import CaptionedLatents, InMemoryData
from avd_trainer.data.sources import TrainingData
from avd_trainer.models.roles import load_models
from avd_trainer.models.text_encoders.hashed import HashTextEmbedding
from avd_trainer.models.transformer import build_transformer
from avd_trainer.planning.memory import (
    GB,
    Change,
    LiveTensors,
    MemoryPlan,
    find_architecture,
    find_latent_shape,
    meta_models,
    plan,
    render,
    training_activations,
    wan_latent_shape,
)
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.trainer import Trainer

# Wan2.1-1.3B with two blocks, on smaller clips.
ARCHITECTURE = find_architecture("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") | {"num_layers": 2}
SHAPE = (16, 3, 32, 32)
# What a CPU can run in a moment.
SMALL = ArchitectureConfig(
    num_attention_heads=4, attention_head_dim=32, ffn_dim=640, num_layers=4, freq_dim=64, text_dim=64
)
SMALL_SHAPE = (16, 3, 16, 16)
SMALL_TEXT = (8, 64)
ADAPTERS = {"student_lora": {"rank": 64}, "online_lora": {"rank": 64}}
NOT_CHECKPOINTED = {"parallel": {"activation_checkpointing": False}}


def config(**changes: Any) -> TrainConfig:
    values = {"teacher": "none", "data": {"kind": "shapes"}, "max_steps": 3, "batch_size": 8, "online_updates": 1}
    return TrainConfig.model_validate(values | changes)


def planned(shape: tuple[int, ...] = SHAPE, gpus: int = 1, gpu_memory: float = 80.0, **changes: Any) -> MemoryPlan:
    return plan(config(**changes), ARCHITECTURE, shape, gpus=gpus, gpu_memory=gpu_memory)


def nbytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def trainer_of(config: TrainConfig, ranks: Ranks, shape: tuple[int, ...], text: tuple[int, int]) -> Trainer:
    clips = CaptionedLatents(torch.randn(8, *shape), [f"clip {number}" for number in range(8)])
    data = InMemoryData(clips, HashTextEmbedding(*text))
    return Trainer(config, load_models(config, ranks), TrainingData(data, data), ranks)


class FusedRMSNorm(torch.autograd.Function):
    """Keeps what the kernel of a GPU keeps: input, weight, and the reciprocal root for each token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).type_as(x) * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, gradient = x * scale, gradients[0] * weight
        of_x = scale * (gradient - normed * (gradient * normed).mean(-1, keepdim=True))
        return of_x.type_as(x), (gradients[0] * normed).sum(dim=tuple(range(x.ndim - 1))).type_as(weight), None


def fuse_rms_norm(patch: pytest.MonkeyPatch) -> None:
    # PyTorch has that kernel for GPUs alone.
    patch.setattr(F, "rms_norm", lambda x, shape, weight, eps: FusedRMSNorm.apply(x, weight, eps))


def saved_for_backward(forward: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Bytes of what autograd keeps, and of the output; each storage once, those of ``known`` not at all."""
    known = {tensor.untyped_storage()._cdata for tensor in known}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        keep(forward())
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(("size", "parameters"), [("1.3B", 1_418_996_800), ("14B", 14_288_491_584)])
def test_the_known_models_have_the_released_number_of_parameters(size: str, parameters: int) -> None:
    model = meta_models(config(), find_architecture(f"Wan-AI/Wan2.1-T2V-{size}-Diffusers"))["teacher"].build()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "bfloat16"}, {"online_lora": {"rank": 64}, "precision": "bfloat16"}, ADAPTERS],
    ids=["full", "bfloat16", "online adapter", "adapters"],
)
def test_what_stays_is_what_a_trainer_holds_to_the_byte(
    make_config: Callable[..., TrainConfig],
    make_trainer: Callable[..., Trainer],
    teacher_folder: Path,
    changes: dict[str, Any],
) -> None:
    trainer = make_trainer(**changes)
    result = plan(
        make_config(**changes),
        find_architecture(str(teacher_folder)),
        trainer.latent_shape,
        gpus=1,
        gpu_memory=80,
        text_length=4,
    ).peak
    state = {owner: nbytes(tensors.values()) for owner, tensors in trainer.state_tensors().items()}
    frozen = [p for p in trainer.teacher.module.parameters() if not p.requires_grad]
    assert result.frozen_weights == nbytes(frozen)
    assert result.trained_weights == state["student"] + state["online"]
    assert result.optimizer == state["student_optimizer"] + state["online_optimizer"]
    assert result.ema == state["ema"]


def test_gradients_are_of_the_model_in_work() -> None:
    whole = 4 * sum(
        parameter.numel() for parameter in meta_models(config(), ARCHITECTURE)["student"].build().parameters()
    )
    adapter = planned(online_lora={"rank": 64}).phases
    assert {phase.name: phase.gradients for phase in planned(micro_batch_size=1).phases} == {
        "teacher's answer": whole,  # accumulated over earlier samples
        "student's update": whole,
        "online update": whole,
    }
    assert {phase.name: phase.gradients for phase in adapter} == {
        "teacher's answer": 0,
        "student's update": whole,
        "online update": adapter[0].trained_weights - whole,
    }


def test_the_students_graph_waits_while_the_teacher_answers() -> None:
    answers = set()
    for changes in ({}, NOT_CHECKPOINTED):
        student = meta_models(config(**changes), ARCHITECTURE)["student"]
        kept = training_activations(student, "student", 1, SHAPE, 512).kept
        answers.add(planned(micro_batch_size=1, **changes).phases[0].activations - kept)
    (teacher,) = answers
    assert teacher > 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_block_keeps_as_much_on_the_meta_device_as_in_memory(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    def saved(block: nn.Module, device: str) -> int:
        dtype = getattr(torch, precision)
        tokens, text, time = (torch.zeros(2, n, 128, device=device, dtype=dtype) for n in (30, 5, 6))
        table = torch.zeros(1, 30, 1, 32, device=device)
        known = [*block.parameters(), table]
        return saved_for_backward(lambda: block(tokens.requires_grad_(), text, time, (table, table)), known)

    real = build_transformer(SMALL)
    meta = meta_models(config(precision=precision), dict(real.config))["student"].build_gathered(None).module
    # Only the GPU's kernel keeps the seeds of attention's dropout.
    seeds = 2 * (2 + 1) * 8
    planned = saved(meta.blocks[0], "meta") - seeds
    fuse_rms_norm(monkeypatch)
    assert planned == saved(real.blocks[0].to(getattr(torch, precision)), "cpu")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_keeps_as_much_as_planned(monkeypatch: pytest.MonkeyPatch, checkpointing: bool) -> None:
    """Extrapolated from fewer blocks, beside a real forward of four."""
    model = build_transformer(SMALL).train()
    own = config(parallel={"activation_checkpointing": checkpointing})
    student = meta_models(own, dict(model.config))["student"]
    planned = training_activations(student, "student", 2, SMALL_SHAPE, SMALL_TEXT[0])
    fuse_rms_norm(monkeypatch)
    if checkpointing:
        model.enable_gradient_checkpointing()
    inputs = torch.randn(2, *SMALL_SHAPE), torch.full((2,), 900.0), torch.randn(2, *SMALL_TEXT)
    known = [*model.parameters(), *model.buffers(), *inputs]
    real = saved_for_backward(lambda: model(*inputs, return_dict=False)[0], known)
    # Autograd does not see that checkpoints hold the rotary tables for when they run a block again.
    tables = nbytes(model.rope(inputs[0])) if checkpointing else 0
    assert planned.kept == pytest.approx(real + tables, rel=1e-3)
    assert planned.backward >= planned.forward >= planned.kept


@pytest.mark.parametrize("changes", [{}, ADAPTERS], ids=["full", "adapters"])
def test_few_blocks_say_what_many_take(changes: dict[str, Any]) -> None:
    """On full-size clips, whose activations outweigh everything that does not grow with the number of blocks."""
    shape = wan_latent_shape("832x480x81")
    student = meta_models(config(precision="bfloat16", **changes), ARCHITECTURE | {"num_layers": 4})["student"]
    model = student.build_gathered("student")
    inputs = [torch.empty(1, *rest, device="meta") for rest in (shape, (), (512, 4096))]
    for parameter in model.module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with LiveTensors([*model.module.parameters(), *model.module.buffers(), *inputs]) as live:
        velocity = model(*inputs)
        kept, forward = live.now, live.peak
        torch.autograd.backward(velocity, torch.empty_like(velocity))
    assert training_activations(student, "student", 1, shape, 512) == (kept, forward, live.peak)


def test_live_tensors_are_counted_once_and_forgotten() -> None:
    known = torch.empty(100, device="meta")
    with LiveTensors([known]) as live:
        known.view(10, 10)
        first = known + 1
        assert live.now == 400
        second = first.reshape(10, 10).t()
        assert live.now == 400
        del first
        assert live.now == 400
        del second
        assert live.now == 0
    assert live.peak == 400


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"gpus": 2}, {"gpus": 1}),
        ({"gpus": 8}, {"gpus": 4}),
        ({"gpus": 4}, {"gpus": 4, "parallel": {"replicate": 2}}),
        (ADAPTERS, {"online_lora": {"rank": 64}}),
        ({"online_lora": {"rank": 64}}, {}),
        ({}, NOT_CHECKPOINTED),
        ({}, {"micro_batch_size": None}),
        ({"shape": (16, 2, 32, 32)}, {"shape": SHAPE}),
        ({"precision": "bfloat16"}, {"precision": "float32"}),
        ({"batch_size": 8}, {"batch_size": 16}),
    ],
)
def test_what_should_save_memory_does(less: dict[str, Any], more: dict[str, Any]) -> None:
    one = {"micro_batch_size": 1}
    assert planned(**one | less).peak.allocated < planned(**one | more).peak.allocated


def test_more_gpus_never_hold_more_of_any_model() -> None:
    for changes in ({}, ADAPTERS):
        plans = [planned(gpus=gpus, batch_size=gpus, **changes) for gpus in (1, 2, 3, 5, 8, 64)]
        for part in ("frozen_weights", "trained_weights", "gradients", "optimizer", "ema"):
            sizes = [getattr(result.peak, part) for result in plans]
            assert sizes == sorted(sizes, reverse=True)


def test_sampling_is_a_phase_where_it_is_done_and_holds_the_weights_twice() -> None:
    names = [phase.name for phase in planned().phases]
    *phases, sampling = planned(samples={"every": 1, "count": 2}).phases
    assert [phase.name for phase in phases] == names
    assert sampling.name == "sampling"
    assert (sampling.ema, sampling.gradients) == (2 * phases[0].ema, 0)


def test_a_plan_that_fits_names_no_changes() -> None:
    result = planned()
    assert result.fits
    assert result.changes == ()
    exactly = planned(gpu_memory=result.peak.needed / GB)
    assert exactly.fits


LADDER: dict[str, dict[str, Any]] = {
    "one sample": {"micro_batch_size": 1},
    "activation checkpointing": {"parallel": {"activation_checkpointing": True}},
    "LoRA for the online model": {"online_lora": {"rank": 64}},
    "LoRA for the student": {"student_lora": {"rank": 64}},
    "2 latent frames in place of 3": {"shape": (16, 2, 32, 32)},
}


@pytest.mark.parametrize("enough", LADDER)
def test_changes_that_are_said_to_fit_do(enough: str, tmp_path: Path) -> None:
    applied: dict[str, Any] = {}
    for name in list(LADDER)[: list(LADDER).index(enough) + 1]:
        applied |= LADDER[name]
    gpu_memory = planned(**NOT_CHECKPOINTED | applied).peak.needed / GB
    result = planned(gpu_memory=gpu_memory, **NOT_CHECKPOINTED)
    here = [change for change in result.changes if change.gpus == 1]
    assert enough in here[-1].description
    assert [change.fits for change in here] == [False] * (len(here) - 1) + [True]
    save_config(config(**NOT_CHECKPOINTED), tmp_path / "run.yaml")
    for change in result.changes:
        again = planned_again(change, tmp_path / "run.yaml", gpu_memory)
        assert (again.peak.needed, again.fits) == (change.needed, change.fits)


def planned_again(change: Change, file: Path, gpu_memory: float) -> MemoryPlan:
    changed = load_config(TrainConfig, str(file), list(change.settings))
    return plan(changed, ARCHITECTURE, change.latent_shape, gpus=change.gpus, gpu_memory=gpu_memory)


@pytest.mark.parametrize(("batch_size", "gpus", "settings"), [(16, 4, ()), (1, 3, ("batch_size=3",))])
def test_the_least_number_of_gpus_that_is_enough_is_found(
    batch_size: int, gpus: int, settings: tuple[str, ...]
) -> None:
    one = {"micro_batch_size": 1}
    gpu_memory = planned(gpus=gpus, batch_size=max(batch_size, gpus), **one).peak.needed / GB
    result = planned(gpu_memory=gpu_memory, batch_size=batch_size, **one)
    (more,) = (change for change in result.changes if change.gpus > 1)
    assert (more.gpus, more.settings, more.fits) == (gpus, settings, True)


def test_a_change_that_contradicts_the_run_is_not_named() -> None:
    result = planned(gpu_memory=0.5, student_weights="student.pt")
    assert result.changes
    assert not any("student_lora" in setting for change in result.changes for setting in change.settings)


def test_the_table_shows_parts_verdict_and_changes() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(planned(gpu_memory=0.5)))
    text = console.export_text()
    for words in ("frozen weights", "online update", "does not fit", "--set online_lora.rank=64", "1 GPU(s) of 0.5 GB"):
        assert words in text
    console.print(render(planned()))
    assert "It fits" in console.export_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 3}, "batch_size 8 cannot be shared out among 3"),
        ({"gpus": 2, "micro_batch_size": 3}, "batch_size 8 cannot be shared out among 2"),
        ({"gpus": 4, "parallel": {"replicate": 3}}, "replicate is 3"),
        ({"shape": (4, 3, 16, 16)}, "16 channels"),
        ({"shape": (16, 3, 15, 16)}, "patches of"),
    ],
)
def test_a_run_that_cannot_be_started_cannot_be_planned(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned(**changes)


def test_a_teacher_that_is_neither_here_nor_known_is_named() -> None:
    with pytest.raises(UserError, match="somebody/model is not on this machine"):
        find_architecture("somebody/model")


def test_architecture_and_clip_of_the_bundled_teacher_are_found() -> None:
    tiny = load_config(TrainConfig, "tiny")
    assert find_architecture(tiny.teacher)["num_layers"] == 4
    assert find_latent_shape(tiny) == (16, 9, 8, 8)
    missing = tiny.model_copy(update={"data": config(data={"kind": "shards", "path": "not/there"}).data})
    assert find_latent_shape(missing) == wan_latent_shape("832x480x81") == (16, 21, 60, 104)


@pytest.mark.parametrize("size", ["832x480", "832x480x80", "830x480x81", "832x0x81", "a x b x c"])
def test_a_size_that_wan_cannot_encode_is_refused(size: str) -> None:
    with pytest.raises(UserError, match="is no size for Wan"):
        wan_latent_shape(size)


@pytest.mark.parametrize(
    "changes",
    [{}, NOT_CHECKPOINTED, ADAPTERS | {"precision": "bfloat16"}],
    ids=["full", "not checkpointed", "adapters"],
)
def test_a_step_on_the_cpu_takes_what_is_planned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ranks: Ranks, changes: dict[str, Any]
) -> None:
    fuse_rms_norm(monkeypatch)
    build_transformer(SMALL).save_pretrained(tmp_path / "teacher")
    own = config(teacher=str(tmp_path / "teacher"), batch_size=1, objective={"timesteps": [1000]}, **changes)
    trainer = trainer_of(own, ranks, SMALL_SHAPE, SMALL_TEXT)
    steps = trainer.run()
    next(steps)  # allocates what stays
    frozen = [p for p in trainer.teacher.module.parameters() if not p.requires_grad]
    held = nbytes(frozen) + sum(nbytes(tensors.values()) for tensors in trainer.state_tensors().values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        next(steps)
    changes_in_time = sorted(
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    now = peak = 0
    for _, size in changes_in_time:
        now += size
        peak = max(peak, now)
    monkeypatch.undo()
    result = plan(own, find_architecture(own.teacher), SMALL_SHAPE, gpus=1, gpu_memory=80, text_length=SMALL_TEXT[0])
    assert result.peak.allocated == pytest.approx(held + peak, rel=0.15)


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
    result = plan(own, find_architecture(own.teacher), shape, gpus=1, gpu_memory=80, text_length=text[0])
    measured = torch.cuda.max_memory_allocated() - before
    assert result.peak.allocated == pytest.approx(measured, rel=0.15)
