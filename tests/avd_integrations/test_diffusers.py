import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from safetensors.torch import load_file
from torch import Tensor

import tiny_pipeline
from avd_core import FlowMatchingSchedule, HalfRateInterpolationSampler, LatentFrameInterpolator
from avd_core.sampling import SamplerKind
from avd_integrations.diffusers import (
    FewStepScheduler,
    LatentFrameInterpolatorModel,
    WanHalfRatePipeline,
    frame_positions,
)

GRID = (1000.0, 900.0, 757.0, 522.0)
MODULE = "avd_integrations.diffusers"
PROMPT = "a red square moves right"
SIZE: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 17}
SHAPE = (1, 16, 5, 4, 6)
RATES = [(2, 2, 1, 1), (4, 2, 1, 1), (1, 1, 1, 1), (4, 4, 2, 2)]
PAGE = (Path(__file__).parents[2] / "docs" / "diffusers.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def interpolator(channels: int = 16) -> LatentFrameInterpolator:
    """One whose frames differ from linear interpolation."""
    network = LatentFrameInterpolator(channels, (8, 8, 8))
    torch.nn.init.normal_(network.output.weight, std=0.3)
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``avd export`` writes it."""
    folder = tiny_pipeline.build(tmp_path_factory.mktemp("exported") / "student")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchLCMScheduler"]
    index["interpolator"] = [MODULE, "LatentFrameInterpolatorModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    scheduler = {
        "_class_name": "FlowMatchLCMScheduler",
        "_diffusers_version": "0.35.0",
        "_timesteps": GRID,
        "num_train_timesteps": 1000,
        "shift": 1.9199,
        "shift_terminal": 0.522,
    }
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    interpolator().save_pretrained(folder / "interpolator")
    return folder


@pytest.fixture
def pipeline(folder: Path) -> WanHalfRatePipeline:
    return silent(WanHalfRatePipeline.from_pretrained(folder))


def silent(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline: Any, prompt: str | list[str] | None = PROMPT, **options: Any) -> Tensor:
    frames: Tensor = pipeline(prompt, output_type="latent", **{**SIZE, **options}).frames
    return frames


@contextmanager
def messages() -> Iterator[list[str]]:
    """What diffusers and this module log."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger("diffusers"), logging.getLogger(MODULE)]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield found
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def sampled_by_hand(
    pipeline: WanHalfRatePipeline,
    noise: Tensor,
    draws: Any,
    rates: tuple[int, ...],
    positions: Any = "consecutive",
    prompts: tuple[str, ...] = (PROMPT,),
    guidance_scale: float = 1.0,
    sampler: SamplerKind = "re-noise",
) -> Tensor:
    """``avd_core``'s sampler over the same transformer; strided positions by its rotary embedding of a longer clip."""
    embeds, negative = pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=guidance_scale > 1, max_sequence_length=512
    )
    schedule, transformer = FlowMatchingSchedule(), pipeline.transformer

    def velocity(x_t: Tensor, timesteps: Tensor, text: Tensor, places: list[int] | None) -> Tensor:
        if places is None:
            return transformer(x_t, timesteps, text).sample
        forward = transformer.rope.forward

        def at_places(hidden_states: Tensor) -> tuple[Tensor, ...]:
            frame = hidden_states[:, :, :1].expand(-1, -1, max(places) + 1, -1, -1)
            return tuple(table.unflatten(1, (max(places) + 1, -1))[:, places].flatten(1, 2) for table in forward(frame))

        transformer.rope.forward = at_places
        try:
            return transformer(x_t, timesteps, text).sample
        finally:
            del transformer.rope.forward

    def denoise(x_t: Tensor, timesteps: Tensor, frame_positions: list[int] | None = None) -> Tensor:
        predicted = velocity(x_t, timesteps, embeds, frame_positions)
        if guidance_scale > 1:
            without = velocity(x_t, timesteps, negative, frame_positions)
            predicted = without + guidance_scale * (predicted - without)
        return schedule.velocity_to_x_0(predicted, x_t, timesteps)

    sampled = HalfRateInterpolationSampler(
        denoise, pipeline.interpolator, GRID, rates=rates, positions=positions, sampler=sampler
    )
    return sampled(noise, draws)


# --- The scheduler


def test_saves_and_loads_its_grid_and_nothing_else(tmp_path: Path) -> None:
    FewStepScheduler(timesteps=torch.tensor([999, 640.5, 20]), num_train_timesteps=1000).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved.pop("_diffusers_version")
    assert saved == {
        "_class_name": "FewStepScheduler", "num_train_timesteps": 1000, "timesteps": [999.0, 640.5, 20.0],
        "sampler": "re-noise",
    }  # fmt: skip
    with messages() as found:
        loaded = FewStepScheduler.from_pretrained(tmp_path)
    assert not found
    assert loaded.timesteps.tolist() == [999.0, 640.5, 20.0]
    assert torch.equal(loaded.sigmas, torch.tensor([999, 640.5, 20, 0]) / 1000)


def test_step_is_that_of_diffusers_lcm_scheduler_and_of_the_sampler() -> None:
    ours, theirs = FewStepScheduler(GRID), FlowMatchLCMScheduler()
    theirs.set_timesteps(timesteps=GRID)
    ours.set_timesteps(4)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    mine = his = noise = torch.randn(2, 4, 3, 4, 4)
    draws, others, thirds = generator(), generator(), generator()
    for timestep in ours.timesteps:
        mine = ours.step(mine.sin(), timestep, mine, generator=draws).prev_sample
        (his,) = theirs.step(his.sin(), timestep, his, generator=others, return_dict=False)
    torch.testing.assert_close(mine, his, rtol=0, atol=1e-6)
    schedule = FlowMatchingSchedule()
    sampler = HalfRateInterpolationSampler(
        lambda x_t, timesteps: schedule.velocity_to_x_0(x_t.sin(), x_t, timesteps), torch.nn.Identity(), GRID, 0
    )
    assert torch.equal(mine, sampler(noise, thirds))


def test_straight_on_it_steps_as_diffusers_euler_scheduler_and_draws_nothing() -> None:
    ours, theirs = FewStepScheduler(GRID, sampler="ode"), FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=[timestep / 1000 for timestep in GRID])
    mine = his = torch.randn(2, 4, 3, 4, 4)
    draws = generator()
    untouched = draws.get_state()
    for timestep in theirs.timesteps:
        mine = ours.step(mine.sin(), timestep, mine, generator=draws).prev_sample
        (his,) = theirs.step(his.sin(), timestep, his, return_dict=False)
    torch.testing.assert_close(mine, his, rtol=0, atol=1e-6)
    assert torch.equal(draws.get_state(), untouched)


def test_an_exports_scheduler_says_how_its_student_goes_on() -> None:
    exported = {"_class_name": "FlowMatchEulerDiscreteScheduler", "_timesteps": [1000.0, 500.0], "_sampler": "ode"}
    with messages() as found:
        scheduler = FewStepScheduler.from_config(exported)
    assert not found
    assert (scheduler.config.timesteps, scheduler.config.sampler) == ([1000.0, 500.0], "ode")
    with pytest.raises(ValueError, match="sampler must be"):
        FewStepScheduler(sampler="euler")  # type: ignore[arg-type]


def test_samples_stay_float32_between_the_steps() -> None:
    scheduler = FewStepScheduler(GRID)
    sample = torch.randn(1, 4, 3, 4, 4)
    (after,) = scheduler.step(sample.bfloat16(), 1000, sample, return_dict=False)
    assert after.dtype == torch.float32
    assert not torch.equal(after, after.bfloat16().float())


def test_one_generator_per_sample_makes_it_independent_of_the_batch() -> None:
    sample = torch.randn(2, 4, 3, 4, 4)
    (both,) = FewStepScheduler(GRID).step(sample, 1000, sample, [generator(1), generator(2)], return_dict=False)
    (second,) = FewStepScheduler(GRID).step(sample[1:], 1000, sample[1:], [generator(2)], return_dict=False)
    assert torch.equal(both[1:], second)


def test_another_number_of_steps_is_told_once() -> None:
    scheduler = FewStepScheduler(GRID)
    with messages() as found:
        scheduler.set_timesteps(4)
        scheduler.set_timesteps()
        assert not found
        scheduler.set_timesteps(50)
        scheduler.set_timesteps(25)
    assert scheduler.timesteps.tolist() == list(GRID)
    (message,) = found
    assert "4 steps, at timesteps 1000, 900, 757, 522; num_inference_steps=50 is ignored" in message


@pytest.mark.parametrize("timesteps", [(), (900, 1000), (1000, 1000), (1001, 500), (1000, 0), (float("nan"),)])
def test_grids_that_do_not_fall_are_refused(timesteps: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="fall strictly from at most 1000"):
        FewStepScheduler(timesteps)


def test_a_step_after_the_last_is_refused() -> None:
    scheduler, sample = FewStepScheduler((1000.0,)), torch.randn(1, 4, 3, 4, 4)
    scheduler.step(sample, 1000, sample)
    with pytest.raises(ValueError, match="Call set_timesteps"):
        scheduler.step(sample, 1000, sample)
    scheduler.set_begin_index(0)
    assert torch.equal(scheduler.step(sample, 1000, sample).prev_sample, torch.zeros_like(sample))


# --- The interpolator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpolator_reads_what_avd_core_wrote_and_the_other_way(tmp_path: Path, dtype: torch.dtype) -> None:
    original = interpolator().to(dtype)
    clips = torch.randn(SHAPE)
    original.save_pretrained(tmp_path / "core")
    with messages() as found:
        model = LatentFrameInterpolatorModel.from_pretrained(tmp_path / "core", dtype=dtype)
    assert not found
    assert model.dtype == dtype
    assert not model.training
    assert model.state_dict().keys() == original.state_dict().keys()
    assert torch.equal(model(clips), original(clips))
    model.save_pretrained(tmp_path / "diffusers")
    assert load_file(tmp_path / "diffusers" / "diffusion_pytorch_model.safetensors")["output.weight"].dtype == dtype
    back = LatentFrameInterpolator.from_pretrained(tmp_path / "diffusers").to(dtype)
    assert (back.channels, back.widths) == (16, (8, 8, 8))
    assert torch.equal(back(clips), original(clips))


def test_interpolator_is_cast_with_its_pipeline(folder: Path) -> None:
    pipeline = WanHalfRatePipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert pipeline.interpolator.dtype == torch.bfloat16
    assert latents(silent(pipeline)).dtype == torch.float32


# --- Loading and saving


def test_diffusers_own_pipeline_runs_the_exact_grid_with_our_scheduler(folder: Path) -> None:
    with messages() as found:
        pipeline = silent(DiffusionPipeline.from_pretrained(folder))
        pipeline.scheduler = FewStepScheduler.from_config(pipeline.scheduler.config)
    assert type(pipeline) is WanPipeline
    assert all("interpolator" in message and "ignored" in message for message in found)
    seen = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["timestep"].item()), with_kwargs=True
    )
    frames = pipeline(PROMPT, guidance_scale=1.0, num_inference_steps=4, **SIZE).frames
    assert seen == list(GRID)
    assert frames.shape == (1, 17, 32, 48, 3)


def test_half_rate_pipeline_loads_all_without_a_word(folder: Path) -> None:
    with messages() as found:
        pipeline = silent(WanHalfRatePipeline.from_pretrained(folder))
        frames = pipeline(PROMPT, **SIZE).frames
    assert not found
    assert frames.shape == (1, 17, 32, 48, 3)
    assert np.isfinite(frames).all()


def test_save_and_load(pipeline: WanHalfRatePipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "WanPipeline"
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is WanPipeline
    again = silent(WanHalfRatePipeline.from_pretrained(tmp_path))
    expected = latents(pipeline, generator=generator())
    torch.testing.assert_close(latents(again, generator=generator()), expected, rtol=1e-5, atol=1e-5)


def test_without_vae_and_text_encoder(folder: Path, pipeline: WanHalfRatePipeline, tmp_path: Path) -> None:
    bare = silent(WanHalfRatePipeline.from_pretrained(folder, vae=None, text_encoder=None, tokenizer=None))
    embeds, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False, max_sequence_length=512)
    expected = latents(pipeline, generator=generator())
    actual = latents(bare, None, prompt_embeds=embeds, generator=generator())
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    bare.save_pretrained(tmp_path)
    assert not (tmp_path / "vae").exists()
    assert WanHalfRatePipeline.from_pretrained(tmp_path).vae is None
    with pytest.raises(ValueError, match="no text encoder"):
        bare(PROMPT)
    with pytest.raises(ValueError, match=r'no VAE .* output_type="latent"'):
        bare(prompt_embeds=embeds)
    with pytest.raises(ValueError, match="needs negative_prompt_embeds"):
        bare(prompt_embeds=embeds, guidance_scale=3.0, output_type="latent")
    guided = latents(bare, None, prompt_embeds=embeds, negative_prompt_embeds=embeds, guidance_scale=3.0)
    assert guided.shape == SHAPE


def test_from_another_pipeline(folder: Path) -> None:
    plain = WanPipeline.from_pretrained(folder, scheduler=UniPCMultistepScheduler())
    network = LatentFrameInterpolatorModel()
    pipeline = silent(WanHalfRatePipeline.from_pipe(plain, scheduler=FewStepScheduler(), interpolator=network))
    assert pipeline.transformer is plain.transformer
    assert latents(pipeline).shape == SHAPE


# --- What it samples


@pytest.mark.parametrize("rates", [(2, 2, 1, 1), (1, 1, 1, 1)])
@torch.no_grad()
def test_straight_on_equals_the_sampler_run_by_hand(pipeline: WanHalfRatePipeline, rates: tuple[int, ...]) -> None:
    pipeline.scheduler = FewStepScheduler(GRID, sampler="ode")
    noise = torch.randn(1, 16, 5, 4, 6)
    actual = latents(pipeline, latents=noise, generator=generator(), rates=rates)
    expected = sampled_by_hand(pipeline, noise, generator(), rates, sampler="ode")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["consecutive", "strided"])
@pytest.mark.parametrize("rates", RATES)
@torch.no_grad()
def test_equals_the_sampler_run_by_hand(pipeline: WanHalfRatePipeline, rates: tuple[int, ...], positions: Any) -> None:
    for frames in (5, 6, 9):
        noise = torch.randn(1, 16, frames, 4, 6)
        actual = latents(pipeline, latents=noise, generator=generator(), rates=rates, positions=positions)
        expected = sampled_by_hand(pipeline, noise, generator(), rates, positions)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_several_prompts_guidance_and_a_generator_each(pipeline: WanHalfRatePipeline) -> None:
    prompts = (PROMPT, "a blue circle moves up")
    draws = [generator(1), generator(2)]
    actual = latents(pipeline, list(prompts), generator=[generator(1), generator(2)], guidance_scale=3.0)
    noise = torch.cat([torch.randn(SHAPE, generator=each) for each in draws])
    expected = sampled_by_hand(pipeline, noise, draws, (2, 2, 1, 1), prompts=prompts, guidance_scale=3.0)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    alone = latents(pipeline, prompts[1], generator=[generator(2)], guidance_scale=3.0)
    torch.testing.assert_close(actual[1:], alone, rtol=1e-4, atol=1e-4)


def test_several_clips_per_prompt(pipeline: WanHalfRatePipeline) -> None:
    clips = latents(pipeline, [PROMPT, "a blue circle"], num_videos_per_prompt=2, generator=generator())
    assert clips.shape == (4, *SHAPE[1:])
    assert len({clip.sum().item() for clip in clips}) == 4


def test_full_rate_is_diffusers_own_pipeline(folder: Path, pipeline: WanHalfRatePipeline) -> None:
    plain = silent(WanPipeline.from_pretrained(folder, scheduler=pipeline.scheduler))
    torch.manual_seed(7)
    expected = latents(plain, guidance_scale=1.0, num_inference_steps=4)
    torch.manual_seed(7)
    actual = latents(pipeline, half_rate_steps=0)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_same_seed_same_clip_and_the_global_generator_plays_no_part(pipeline: WanHalfRatePipeline) -> None:
    state = torch.get_rng_state()
    first = latents(pipeline, generator=generator(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(latents(pipeline, generator=generator(3)), first)
    assert not torch.equal(latents(pipeline, generator=generator(4)), first)


def test_transformer_sees_no_token_more_than_the_kept_frames(pipeline: WanHalfRatePipeline) -> None:
    tokens: list[int] = []
    pipeline.transformer.blocks[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    for frames, rates, kept in (
        (5, (2, 2, 1, 1), (3, 3, 5, 5)),
        (6, (2, 2, 1, 1), (4, 4, 6, 6)),
        (9, (4, 2, 1, 1), (3, 5, 9, 9)),
        (9, (1, 1, 1, 1), (9, 9, 9, 9)),
    ):
        tokens.clear()
        latents(pipeline, latents=torch.randn(1, 16, frames, 4, 6), rates=rates)
        assert tokens == [count * (4 // 2) * (6 // 2) for count in kept]


def test_two_transformers_take_turns(pipeline: WanHalfRatePipeline) -> None:
    torch.manual_seed(1)
    pipeline.register_modules(transformer_2=WanTransformer3DModel.from_config(pipeline.transformer.config))
    pipeline.register_to_config(boundary_ratio=0.8)
    steps: list[tuple[str, float, int, bool]] = []
    places = pipeline.transformer.rope.freqs_cos.clone()

    def record(model: Any, _: Any, kwargs: dict[str, Any]) -> None:
        name = "first" if model is pipeline.transformer else "second"
        strided = torch.equal(model.rope.freqs_cos[1, :4], places[2, :4])  # the columns of time
        steps.append((name, kwargs["timestep"].item(), kwargs["hidden_states"].shape[2], strided))

    for model in (pipeline.transformer, pipeline.transformer_2):
        model.register_forward_pre_hook(record, with_kwargs=True)
    latents(pipeline, rates=(2, 2, 2, 1), positions="strided")
    assert steps == [
        ("first", 1000, 3, True), ("first", 900, 3, True), ("second", 757, 3, True), ("second", 522, 5, False)
    ]  # fmt: skip
    for model in (pipeline.transformer, pipeline.transformer_2):
        assert torch.equal(model.rope.freqs_cos, places)


# --- What diffusers' users rely on


def test_callback_sees_and_replaces_latents_at_their_rate(pipeline: WanHalfRatePipeline) -> None:
    seen = []

    def record(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((index, timestep.item(), tensors["latents"].shape[2]))
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 3 else {}

    result = latents(pipeline, rates=(4, 2, 1, 1), callback_on_step_end=record)
    assert seen == [(0, 1000, 3), (1, 900, 5), (2, 757, 5), (3, 522, 5)]
    assert torch.equal(result, torch.zeros(SHAPE))


def test_latents_of_another_rate_from_a_callback_are_refused(pipeline: WanHalfRatePipeline) -> None:
    scheduler, places = pipeline.scheduler, pipeline.transformer.rope.freqs_cos.clone()
    config = dict(pipeline.config)
    # The error is held, and with it all that its traceback refers to: nothing is restored by being thrown away.
    with pytest.raises(ValueError, match="others of 5 frames; step 1 runs on 3") as error:
        latents(pipeline, positions="strided", callback_on_step_end=lambda *_: {"latents": torch.zeros(SHAPE)})
    assert pipeline.scheduler is scheduler
    assert dict(pipeline.config) == config
    assert torch.equal(pipeline.transformer.rope.freqs_cos, places)
    assert latents(pipeline).shape == SHAPE
    assert error.traceback


def test_interrupt(pipeline: WanHalfRatePipeline) -> None:
    seen = []

    def stop(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(index)
        pipe._interrupt = True
        return {}

    assert latents(pipeline, callback_on_step_end=stop).shape[2] == 3
    assert seen == [0]
    assert latents(pipeline).shape == SHAPE


def test_progress_bar_counts_the_steps_that_there_are(pipeline: WanHalfRatePipeline) -> None:
    out = io.StringIO()
    pipeline.set_progress_bar_config(file=out)
    with messages() as found:
        latents(pipeline, num_inference_steps=50)
    assert "4/4" in out.getvalue()
    assert len(found) == 1


def test_lora_and_attention_arguments(folder: Path, pipeline: WanHalfRatePipeline, tmp_path: Path) -> None:
    name = "blocks.0.attn1.to_q"
    lora = {f"{name}.lora_A.weight": torch.randn(4, 24), f"{name}.lora_B.weight": torch.randn(24, 4)}
    WanPipeline.save_lora_weights(tmp_path, transformer_lora_layers=lora)
    without = latents(pipeline, generator=generator())
    pipeline.load_lora_weights(tmp_path)
    adapted = latents(pipeline, generator=generator())
    assert (adapted - without).abs().max() > 1e-3
    off = latents(pipeline, generator=generator(), attention_kwargs={"scale": 0.0})
    torch.testing.assert_close(off, without, rtol=1e-5, atol=1e-5)


def test_attention_backend(pipeline: WanHalfRatePipeline) -> None:
    expected = latents(pipeline, generator=generator())
    with attention_backend("native"):  # set_attention_backend also changes the whole process, until this ends
        pipeline.transformer.set_attention_backend("_native_math")
        actual = latents(pipeline, generator=generator())
    processors = [module.processor for module in pipeline.transformer.modules() if hasattr(module, "processor")]
    assert {processor._attention_backend for processor in processors} == {AttentionBackendName._NATIVE_MATH}
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", ["consecutive", "strided"])
def test_model_offload_leaves_the_transformer_where_it_is(pipeline: WanHalfRatePipeline, positions: Any) -> None:
    expected = latents(pipeline, generator=generator(), positions=positions)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert pipeline.transformer._hf_hook.prev_module_hook is not None  # pushes out the text encoder
    hook = pipeline.interpolator._hf_hook
    assert hook.prev_module_hook is None  # pushes out nothing
    for _ in range(2):
        actual = latents(pipeline, generator=generator(), positions=positions)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert pipeline.interpolator._hf_hook is not hook  # taken off and put back with all others


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(folder: Path, pipeline: WanHalfRatePipeline, kind: str) -> None:
    expected = latents(pipeline, generator=generator(), positions="strided")
    pipeline.enable_group_offload(torch.device("cpu"), offload_type=kind, num_blocks_per_group=1)
    for _ in range(2):
        actual = latents(pipeline, generator=generator(), positions="strided")
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# --- Places of frames


def transformer(**options: Any) -> WanTransformer3DModel:
    tiny = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 1, "freq_dim": 16}
    torch.manual_seed(0)
    return WanTransformer3DModel(**{**tiny, "text_dim": 16, "rope_max_seq_len": 16, **options})


@torch.no_grad()
def test_places_of_frames_are_those_of_a_longer_clip() -> None:
    model, places = transformer(), [0, 2, 4, 6, 7]
    whole = model.rope(torch.empty(1, 16, 8, 4, 6))
    plain = model.rope(torch.empty(1, 16, 5, 4, 6))
    with frame_positions(model, places):
        inside = model.rope(torch.empty(1, 16, 5, 4, 6))
    for table, expected in zip(inside, whole, strict=True):
        assert torch.equal(table, expected.unflatten(1, (8, -1))[:, places].flatten(1, 2))
    for table, expected in zip(model.rope(torch.empty(1, 16, 5, 4, 6)), plain, strict=True):
        assert torch.equal(table, expected)


def test_places_are_restored_after_an_error() -> None:
    model = transformer()
    before = model.rope.freqs_cos.clone(), model.rope.freqs_sin.clone()
    with pytest.raises(RuntimeError, match="channels"), frame_positions(model, [0, 3]):
        model(torch.zeros(1, 15, 2, 4, 4), torch.zeros(1), torch.zeros(1, 2, 16))
    assert torch.equal(model.rope.freqs_cos, before[0])
    assert torch.equal(model.rope.freqs_sin, before[1])


@pytest.mark.parametrize(
    ("options", "places", "message"),
    [
        ({}, [0, 16], "from 0 to 15, .* got 0 to 16. Use consecutive"),
        ({}, [-1, 0], "from 0 to 15, .* got -1 to 0"),
        ({"patch_size": (2, 2, 2)}, [0, 2], "2 frames in a token"),
    ],
)
def test_places_that_there_are_not(options: dict[str, Any], places: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message), frame_positions(transformer(**options), places):
        pass


# --- Errors, before any model has run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 1}, "one latent frame .* half_rate_steps=0"),
        ({"half_rate_steps": 5}, "from 0 to 4, the number of steps, got 5"),
        ({"rates": (2, 1)}, "one for each of the 4 steps"),
        ({"rates": (1, 2, 1, 1)}, "powers of two that do not grow"),
        ({"positions": "sparse"}, '"consecutive" or "strided"'),
        ({"latents": torch.zeros(1, 16, 5, 2, 8)}, "at least 4 high and wide"),
        ({"height": 16}, "at least 4 high and wide"),
        ({"latents": torch.zeros(16, 5, 4, 4)}, r"must have shape \[B, 16, F, H, W\]"),
        ({"num_frames": 4 * 64 + 1, "positions": "strided"}, "from 0 to 63, the last place"),
    ],
)
def test_wrong_calls(pipeline: WanHalfRatePipeline, options: dict[str, Any], message: str) -> None:
    refuse_to_run(pipeline)
    with pytest.raises(ValueError, match=message):
        latents(pipeline, **options)


def test_generators_for_other_clips(pipeline: WanHalfRatePipeline) -> None:
    with pytest.raises(ValueError, match="2 generators for 1 clips"):
        latents(pipeline, latents=torch.randn(SHAPE), generator=[generator(), generator()])


def test_pipelines_that_cannot_run_at_half_rate(folder: Path) -> None:
    pipeline = silent(WanHalfRatePipeline.from_pretrained(folder, interpolator=None))
    refuse_to_run(pipeline)
    with pytest.raises(ValueError, match=r"no interpolator .* half_rate_steps=0"):
        latents(pipeline)
    pipeline.register_modules(interpolator=LatentFrameInterpolatorModel(channels=4))
    with pytest.raises(ValueError, match="has 4 channels"):
        latents(pipeline)
    pipeline.register_modules(interpolator=LatentFrameInterpolatorModel())
    pipeline.register_to_config(expand_timesteps=True)
    with pytest.raises(ValueError, match=r"TI2V.* half_rate_steps=0"):
        latents(pipeline)
    pipeline.scheduler = UniPCMultistepScheduler()
    with pytest.raises(TypeError, match=r"got a UniPC.* FewStepScheduler\(timesteps="):
        latents(pipeline)


def test_a_transformer_that_reads_an_image_is_refused(pipeline: WanHalfRatePipeline) -> None:
    transformer = WanTransformer3DModel.from_config({**pipeline.transformer.config, "in_channels": 36})
    with pytest.raises(ValueError, match=r"got one with 36 channels in and 16 out.* `avd sample --image`"):
        WanHalfRatePipeline(scheduler=pipeline.scheduler, transformer=transformer)


def test_runs_at_full_rate_without_interpolator_and_one_frame(folder: Path) -> None:
    pipeline = silent(WanHalfRatePipeline.from_pretrained(folder, interpolator=None))
    pipeline.register_to_config(expand_timesteps=True)
    assert latents(pipeline, half_rate_steps=0, num_frames=1).shape == (1, 16, 1, 4, 6)


def refuse_to_run(pipeline: Any) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a model ran")

    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.register_forward_pre_hook(refuse)


# --- Imports and docs


def test_the_package_imports_no_diffusers() -> None:
    code = "import sys, avd_integrations; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_diffusers_the_import_says_how_to_get_it() -> None:
    code = "import sys; sys.modules['diffusers'] = None; import avd_integrations.diffusers"
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "needs diffusers with its Wan pipeline" in result.stderr
    assert 'pip install "avd-core[trainer,wan]"' in result.stderr


def test_the_page_runs_as_it_stands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(WanHalfRatePipeline, "progress_bar", lambda self, **_: SimpleProgress())
    monkeypatch.setattr(AutoencoderKLWan, "enable_tiling", lambda self: None)  # tiles are larger than these clips
    scope: dict[str, Any] = {
        "prompt_embeds": torch.randn(1, 7, 16),
        "transformer": transformer(rope_max_seq_len=32),
        "timesteps": torch.tensor([1000.0]),
    }
    scope["transformer"].eval()
    results = {}
    for block in BLOCKS:
        # A small clip and no GPU; all else is run as it is read.
        for there, here in (
            ("height=480", "height=32"),
            ("width=832", "width=48"),
            ("num_frames=81", "num_frames=17"),
            ('.to("cuda")', ""),
            ("enable_model_cpu_offload()", 'enable_model_cpu_offload(device="cpu")'),
            ("some/wan-pipeline", "student"),
        ):
            block = block.replace(there, here)
        if "kept_frames(21" in block:
            scope["latents"] = torch.randn(1, 16, 21, 4, 6)
        exec(block, scope)
        results.update({name: scope[name] for name in ("frames", "half", "full", "clip") if name in scope})
    for name in ("frames", "half", "full", "clip"):
        assert results[name].shape == (17, 32, 48, 3), name
    assert scope["difference"] > 0
    assert scope["places"] == list(range(0, 21, 2))
    assert scope["velocity"].shape == (1, 16, 11, 4, 6)
    assert len(BLOCKS) == 8


class SimpleProgress(SimpleNamespace):
    def __enter__(self) -> "SimpleProgress":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self) -> None:
        return None
