"""From an exported folder to clips, by the library and by ``avd sample``."""

import json
import os
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from PIL import Image, ImageSequence
from torch import Tensor

import tiny_pipeline
from avd_core import HalfRateInterpolationSampler
from avd_trainer.config.loading import load_config, save_config
from avd_trainer.data.video_files import save_clip, save_grid
from avd_trainer.inference import generation
from avd_trainer.inference.choices import choose_rates, choose_shape
from avd_trainer.inference.generation import clip_name, decode_clips, embed_prompts
from avd_trainer.inference.students import Student, open_student
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.condition import Condition
from avd_trainer.models.samplers import few_step_rollout, schedule
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.runtime.errors import UserError
from avd_trainer.training.config import TrainConfig
from command_line import run_command as run

GRID = (1000.0, 900.0, 757.0, 522.0)
FULL, HALF = (1, 1, 1, 1), (2, 2, 1, 1)
SHAPE = (16, 5, 4, 6)
SIZE = ("--size", "24x16x17")
RED = "a red circle moves left"


def sample_clips(student: Student, prompts: Sequence[str], *rates: Sequence[int], **options: Any) -> list[list[Tensor]]:
    samples = generation.sample_clips(
        student, prompts, [tuple(each) for each in rates], SHAPE, device=torch.device("cpu"), dtype=torch.float32,
        **options,
    )  # fmt: skip
    return [[sample.latents for sample in row] for row in samples]


def read_mp4(path: Path) -> Tensor:
    with av.open(path) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2) / 255


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run`` of the tiny preset; its exports ``full`` and ``half``, the second with an interpolator."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipeline.save_interpolator(folder / "trained" / "interpolator")
    # What is left of an interpolator's run that was stopped before its first checkpoint.
    (folder / "interpolator").mkdir()
    config = load_config(TrainConfig, "tiny", method="frame_interpolation")
    save_config(config, folder / "interpolator" / "config.yaml", "avd train")
    for arguments in (
        ["train", "tiny", "--output", folder / "run", "--max-steps", 2, "--set", "batch_size=2", "--set",
         "data.clips=4", "--set", "samples.every=null", "--set", "samples.fps=12"],
        ["export", folder / "run", "--output", folder / "full"],
        ["export", folder / "run", "--output", folder / "half", "--interpolator", folder / "trained"],
    ):  # fmt: skip
        status, printed = run(*arguments)
        assert status == 0, printed
    assert "avd sample works without; in diffusers pass vae=None, text_encoder=None, tokenizer=None and" in printed
    return folder


@pytest.fixture(scope="module")
def half(folders: Path) -> Student:
    return open_student(folders / "half")


def test_a_clip_of_a_run_in_three_commands(folders: Path, tmp_path: Path) -> None:
    clip = tmp_path / "new" / "clip.mp4"
    status, printed = run("sample", folders / "full", "--prompt", RED, "--output", clip)
    assert status == 0, printed
    assert f"The clip is in {clip}." in printed
    assert "sample: 4/4" in printed
    assert "decode and write: 2/2" in printed
    assert "full rate (4 steps on all frames): " in printed
    assert read_mp4(clip).shape == (3, 17, 32, 32)  # what it was trained on
    with av.open(clip) as container:
        assert container.streams.video[0].average_rate == 12
    assert os.listdir(clip.parent) == ["clip.mp4"]
    first = clip.read_bytes()
    for seed in (1, 0):
        run("sample", folders / "full", "--prompt", RED, "--output", clip, "--seed", seed)  # over the one before
        assert (clip.read_bytes() == first) is (seed == 0)


def test_samples_are_those_of_the_trainer_and_of_the_sampler(half: Student) -> None:
    ((full, reduced),) = sample_clips(half, [RED], FULL, HALF, seed=7)
    model = VelocityModel(load_transformer(str(half.folder / "transformer")))
    condition = Condition(HashTextEmbedding(TEXT_LENGTH, 32)([RED]))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        expected = few_step_rollout(
            model, condition, SHAPE, GRID, lambda shape: torch.randn(1, *shape, generator=generator)
        ).x_0  # fmt: skip
    torch.testing.assert_close(full, expected[0], rtol=0, atol=1e-5)

    def denoise(x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        return schedule.velocity_to_x_0(model(x_t, timesteps, condition), x_t, timesteps)

    assert half.interpolator is not None
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(1, *SHAPE, generator=generator)
    expected = HalfRateInterpolationSampler(denoise, half.interpolator, GRID, 2)(noise, generator, condition=condition)
    assert torch.equal(reduced, expected[0])
    assert (reduced - full).abs().max() > 1e-2


def test_a_prompts_clip_depends_on_its_seed_and_on_no_other_prompt(half: Student) -> None:
    prompts = [RED, "two cats", RED]
    together = [row[0] for row in sample_clips(half, prompts, HALF, seed=3)]
    for number, prompt in enumerate(prompts):
        ((alone,),) = sample_clips(half, [prompt], HALF, seed=3 + number)
        assert torch.equal(alone, together[number])
    assert not torch.equal(together[0], together[2])


def test_steps_at_half_rate_run_on_fewer_frames(half: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = []

    class Watched(VelocityModel):
        def __call__(self, x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
            frames.append(x_t.shape[2])
            return super().__call__(x_t, timesteps, condition)

    monkeypatch.setattr(generation, "VelocityModel", Watched)
    counted: list[None] = []
    sample_clips(half, [RED], FULL, (4, 2, 1, 1), on_step=lambda: counted.append(None))
    assert frames == [5, 5, 5, 5, 2, 3, 5, 5]
    assert len(counted) == 8


def test_several_prompts_become_a_folder(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a blue square: it moves up, and then, slowly, away\n\n?!\n")
    output = tmp_path / "clips"
    status, printed = run(
        "sample", folders / "half", "--prompt", RED, "--prompts-file", tmp_path / "prompts.txt", "--output", output,
        "--seed", 5, *SIZE,
    )  # fmt: skip
    assert status == 0, printed
    assert f"3 clips are in {output}." in printed
    assert "sample: 12/12" in printed
    assert "decode and write: 6/6" in printed
    assert "half rate (2 steps on every 2nd frame, 2 on all frames): " in printed  # there is an interpolator
    names = ["000-a-red-circle-moves-left.mp4", "001-a-blue-square-it-moves-up.mp4", "002.mp4"]
    assert sorted(os.listdir(output)) == [*names, "prompts.json"]
    rows = json.loads((output / "prompts.json").read_text())
    assert [(row["file"], row["seed"]) for row in rows] == list(zip(names, (5, 6, 7), strict=True))
    assert [row["prompt"] for row in rows][::2] == [RED, "?!"]
    assert all(read_mp4(output / name).shape == (3, 17, 16, 24) for name in names)
    run("sample", folders / "half", "--prompt", "?!", "--output", tmp_path / "alone.mp4", "--seed", 7, *SIZE)
    assert (tmp_path / "alone.mp4").read_bytes() == (output / "002.mp4").read_bytes()


def test_a_file_of_one_prompt_becomes_a_folder_too(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(RED)
    arguments = ("sample", folders / "full", "--prompts-file", tmp_path / "prompts.txt", *SIZE, "--output")
    status, printed = run(*arguments, tmp_path / "clips")
    assert status == 0, printed
    assert f"The clip is in {tmp_path / 'clips'}." in printed
    assert sorted(os.listdir(tmp_path / "clips")) == ["000-a-red-circle-moves-left.mp4", "prompts.json"]
    status, printed = run(*arguments, tmp_path / "clip.mp4")
    assert status == 2
    assert "clip.mp4 is one clip, which is for one --prompt alone. Pass a folder" in printed


@pytest.mark.parametrize(
    ("error", "codes", "said"),
    [(KeyboardInterrupt(), (1, 130), ""), (UserError("The disk burns."), (2,), "error: The disk burns.")],
)
def test_what_is_sampled_before_an_error_is_written(
    wan_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    codes: tuple[int, ...],
    said: str,
) -> None:
    original, load, left = generation._sample, generation.load_transformer, []
    samples: list[Any] = []

    def fail_at_the_third(*arguments: Any) -> Any:
        if len(samples) == 2:
            raise error
        samples.append(original(*arguments))
        return samples[-1]

    def load_transformer(*arguments: Any) -> Any:
        model = load(*arguments)
        left.append(weakref.ref(model))
        return model

    class Codec(generation.WanCodec):
        @classmethod
        def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
            assert [model() for model in left] == [None]  # the transformer has made room
            return super().from_pretrained(*arguments, **options)

    monkeypatch.setattr(generation, "_sample", fail_at_the_third)
    monkeypatch.setattr(generation, "load_transformer", load_transformer)
    monkeypatch.setattr(generation, "WanCodec", Codec)
    prompts = [word for prompt in ("a circle", "a square", "red", "blue") for word in ("--prompt", prompt)]
    arguments = ("sample", wan_student, *prompts, "--seed", 5, "--size", "48x32x9", "--output")
    status, printed = run(*arguments, tmp_path / "clips")
    assert status in codes
    assert "Cut short: 2 of 4 prompts are sampled, and are written before this ends." in printed
    assert said in printed
    assert sorted(os.listdir(tmp_path / "clips")) == ["000-a-circle.mp4", "001-a-square.mp4", "prompts.json"]
    rows = json.loads((tmp_path / "clips" / "prompts.json").read_text())
    assert [(row["prompt"], row["seed"]) for row in rows] == [("a circle", 5), ("a square", 6)]
    # With nothing to save, nothing is in the error's way.
    monkeypatch.setattr(generation, "_sample", lambda *_: fail_at_the_third())
    status, printed = run(*arguments, tmp_path / "none")
    assert status in codes
    assert os.listdir(tmp_path / "none") == []


def test_what_is_written_before_an_error_is_listed(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode_clips(student: Student, latents: Any, **options: Any) -> Any:
        yield next(iter(decode(student, latents, **options)))
        raise UserError("The VAE burns.")

    decode = generation.decode_clips
    monkeypatch.setattr(generation, "decode_clips", decode_clips)
    status, printed = run(
        "sample", folders / "full", "--prompt", "a", "--prompt", "b", "--output", tmp_path / "clips", *SIZE
    )
    assert status == 2
    assert "error: The VAE burns." in printed
    assert [row["file"] for row in json.loads((tmp_path / "clips" / "prompts.json").read_text())] == ["000-a.mp4"]


def test_frames_per_second_and_type_on_request(half: Student, tmp_path: Path) -> None:
    clips = []
    for name, options in (("own", ()), ("asked", ("--fps", 7, "--dtype", "bfloat16"))):
        clips.append(tmp_path / f"{name}.mp4")
        status, printed = run("sample", half.folder, "--prompt", RED, "--output", clips[-1], *SIZE, *options)
        assert status == 0, printed
    for clip, fps, dtype in zip(clips, (12, 7), (torch.float32, torch.bfloat16), strict=True):
        with av.open(clip) as container:
            assert container.streams.video[0].average_rate == fps
        ((sample,),) = generation.sample_clips(half, [RED], [HALF], SHAPE, device=torch.device("cpu"), dtype=dtype)
        (video,) = decode_clips(half, [sample.latents], device=torch.device("cpu"), dtype=dtype)
        (expected,) = save_clip(video, tmp_path / "expected", fps, ["mp4"])
        assert clip.read_bytes() == expected.read_bytes()
    assert not torch.equal(read_mp4(clips[0]), read_mp4(clips[1]))


def test_a_seed_leaves_room_for_those_of_later_prompts(folders: Path, tmp_path: Path) -> None:
    arguments = ("sample", folders / "full", "--prompt", "a", "--prompt", "b", "--output", tmp_path / "clips", *SIZE)
    status, printed = run(*arguments, "--seed", 2**63 - 1)
    assert status == 0, printed
    for seed in (2**63, 2**64):
        status, printed = run(*arguments, "--seed", seed)
        assert status == 2
        assert "--seed" in printed
        assert str(2**63 - 1) in printed


def test_full_and_half_rate_side_by_side(folders: Path, half: Student, tmp_path: Path) -> None:
    clip = tmp_path / "both.gif"
    status, printed = run(
        "sample", folders / "half", "--prompt", RED, "--output", clip, "--side-by-side", "--half-rate-steps", 3, *SIZE
    )
    assert status == 0, printed
    assert "sample: 8/8" in printed
    assert "decode and write: 3/3" in printed
    assert "half rate (3 steps on every 2nd frame, 1 on all frames): " in printed
    assert os.listdir(tmp_path) == ["both.gif"]
    with Image.open(clip) as animation:
        pixels = np.stack([np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(animation)])
    shown = torch.from_numpy(pixels).permute(3, 0, 1, 2) / 255
    # 24 x 16 pixels enlarged eleven times, below their labels.
    assert shown.shape[1] == 17
    assert shown.shape[3] == 2 * 11 * 24
    assert shown.shape[2] > 11 * 16
    strips, pictures = shown[:, :, : -11 * 16], shown[:, 0, -11 * 16 :: 11, ::11]
    assert strips.amax() > 0.5
    (samples,) = sample_clips(half, [RED], FULL, (2, 2, 2, 1))
    versions = [BlockDCTCodec().decode(latents.unsqueeze(0))[0] for latents in samples]
    for found, version in zip(pictures.chunk(2, dim=-1), versions, strict=True):
        assert (found - version[:, 0].clamp(0, 1)).abs().mean() < 0.05
    (expected,) = save_grid(torch.stack(versions), ["full rate", "half rate"], tmp_path / "expected", 12, ["gif"])
    assert clip.read_bytes() == expected.read_bytes()


def test_a_pipeline_of_diffusers_alone(wan_student: Path, tmp_path: Path) -> None:
    student = open_student(wan_student)
    assert (student.timesteps, student.latent_space, student.clip, student.fps) == ((1000, 500), "wan", None, 16)
    assert choose_shape(student, "832x480x81", (1, 1)) == (16, 21, 60, 104)
    status, printed = run(
        "sample", wan_student, "--prompt", RED, "--output", tmp_path / "clip.mp4", "--size", "48x32x9"
    )
    assert status == 0, printed
    assert "full rate (2 steps on all frames): " in printed
    assert read_mp4(tmp_path / "clip.mp4").shape == (3, 9, 32, 48)
    # And it is what diffusers makes of the same noise.
    pipeline = WanPipeline.from_pretrained(wan_student)
    torch.manual_seed(0)
    noise = torch.randn(1, 16, 3, 4, 6)
    expected = pipeline(
        RED, height=32, width=48, num_frames=9, num_inference_steps=2, guidance_scale=1.0, latents=noise,
        output_type="pt",
    ).frames[0]  # fmt: skip
    ((sample,),) = generation.sample_clips(
        student, [RED], [(1, 1)], (16, 3, 4, 6), device=torch.device("cpu"), dtype=torch.float32
    )
    (found,) = decode_clips(student, [sample.latents], device=torch.device("cpu"), dtype=torch.float32)
    torch.testing.assert_close(found, expected.transpose(0, 1), rtol=0, atol=1e-4)
    assert expected.std() > 0.01


def test_one_part_is_in_memory_after_the_other(wan_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[object]] = []

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            assert [part() for part in loaded] == [None] * len(loaded)
            part = original(*arguments, **options)
            loaded.append(weakref.ref(part))
            return part

        monkeypatch.setattr(owner, name, call)

    watch(generation.WanTextEncoder, "from_pretrained")
    watch(generation, "load_transformer")
    watch(generation.WanCodec, "from_pretrained")
    student = open_student(wan_student)
    ((sample,),) = generation.sample_clips(
        student, [RED], [(1, 1)], (16, 3, 4, 6), device=torch.device("cpu"), dtype=torch.bfloat16
    )
    (clip,) = decode_clips(student, [sample.latents], device=torch.device("cpu"), dtype=torch.bfloat16)
    assert clip.shape == (3, 9, 32, 48)
    assert len(loaded) == 3


def test_a_text_encoder_that_does_not_fit_runs_on_the_cpu(
    wan_student: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    devices = []
    original = generation.WanTextEncoder.from_pretrained

    def from_pretrained(source: str, device: torch.device, dtype: torch.dtype) -> Any:
        devices.append(device.type)
        if device.type == "meta":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(source, device, dtype)

    monkeypatch.setattr(generation.WanTextEncoder, "from_pretrained", from_pretrained)
    (text,) = embed_prompts(str(wan_student), "wan", 16, [RED], device=torch.device("meta"), dtype=torch.float32)
    assert devices == ["meta", "cpu"]
    assert text.shape == (512, 16)
    assert "does not fit meta: prompts are encoded on the CPU" in caplog.text
    with pytest.raises(UserError, match="has width 16, its transformer expects 12"):
        embed_prompts(str(wan_student), "wan", 12, [RED], device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, HALF),
        ({"half_rate": True}, HALF),
        ({"half_rate": False}, FULL),
        ({"half_rate_steps": 0}, FULL),
        ({"half_rate_steps": 1}, (2, 1, 1, 1)),
        ({"rates": [4, 4, 2, 1]}, (4, 4, 2, 1)),
    ],
)
def test_rates(half: Student, options: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert choose_rates(half, **options) == expected
    assert choose_rates(half._replace(interpolator=None)) == FULL
    assert choose_rates(half._replace(timesteps=(1000.0,))) == (2,)


def test_names_of_clips() -> None:
    assert clip_name(7, "Two CATS, on a roof/../ at night and day") == "007-two-cats-on-a-roof-at"
    assert clip_name(12, "...") == "012"
    assert clip_name(0, "猫" * 300) == "000-" + "猫" * 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "--prompt", "a"], "none: there is no such folder. Pass the --output folder of `avd export`"),
        (["run", "--prompt", "a"], "is a run. Export it first: `avd export"),
        (["interpolator", "--prompt", "a"], "is a run of method frame_interpolation, which makes no clips. Export a"),
        (["run/student", "--prompt", "a"], "It holds a transformer alone. Pass a folder that `avd export` wrote"),
        (["half"], "There is nothing to show. Pass --prompt TEXT or --prompts-file FILE."),
        (["half", "--prompts-file", "none.txt"], "none.txt cannot be read"),
        (["half", "--prompts-file", "empty.txt"], "empty.txt holds no prompts"),
        (["half", "--prompt", "a", "--prompt", "b"], "clip.mp4 is one clip, which is for one --prompt alone"),
        (["half", "--prompt", "a", "--output", "a.avi"], "a.avi has an unknown ending: of one prompt it is a file"),
        (["half", "--prompt", "a", "--size", "50x32x17"], "'50x32x17' is no size for latents of the tiny preset's"),
        (["half", "--prompt", "a", "--size", "48x32x16"], "'48x32x16' is no size for latents of the tiny preset's"),
        (["half", "--prompt", "a", "--size", "48x32x1"], "A clip of one frame has no half frame rate"),
        (["half", "--prompt", "a", "--size", "8x32x17"], "latents must be at least 4 high and wide"),
        (["half", "--prompt", "a", "--size", "48x32x1001"], "251 x 4 x 6 tokens (frames, height, width)"),
        (["half", "--prompt", "a", "--half-rate-steps", "5"], "half_rate_steps must be from 0 to 4"),
        (["half", "--prompt", "a", "--rates", "1,2,1,1"], "rates must be powers of two that do not grow"),
        (["half", "--prompt", "a", "--rates", "two"], "--rates two: expected a whole number for each step"),
        (["half", "--prompt", "a", "--rates", "2,2,1,1", "--half-rate-steps", "1"], "exclude each other"),
        (["half", "--prompt", "a", "--rates", "2,2,1,1", "--full-rate"], "--full-rate excludes"),
        (["half", "--prompt", "a", "--side-by-side", "--full-rate"], "--side-by-side shows full and half rate"),
        (["half", "--prompt", "a", "--side-by-side", "--half-rate-steps", "0"], "no step is at half rate"),
        (["half", "--prompt", "a", "--half-rate", "--half-rate-steps", "0"], "--half-rate-steps 0: no step is at half"),
        (["half", "--prompt", "a", "--half-rate", "--rates", "1,1,1,1"], "--rates 1,1,1,1: no step is at half rate"),
        (["half", "--prompt", "a", "--device", "tpu9"], "--device tpu9 cannot be used"),
        (["half", "--prompt", "a", "--device", "meta"], "--device meta cannot be used"),
        (
            ["full", "--prompt", "a", "--half-rate"],
            "Train one with `avd train PRESET --method frame_interpolation` and export",
        ),
        (["full", "--prompt", "a", "--side-by-side"], "`avd export --interpolator`"),
    ],
)
def test_a_mistake_is_answered_before_models_are_loaded(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generation, "sample_clips", None)
    output = [] if "--output" in arguments else ["--output", "clip.mp4"]
    status, printed = run("sample", folders / arguments[0], *arguments[1:], *output)
    assert status == 2
    assert "error:" in printed
    assert message in printed
    assert os.listdir(tmp_path) == ["empty.txt"]


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


Break = Callable[[Path], None]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda at: UniPCMultistepScheduler().save_pretrained(at / "scheduler"),
            "names no few steps",
        ),
        (lambda at: change_json(at / "scheduler" / "scheduler_config.json", _timesteps=[5, 10]), "must fall strictly"),
        (lambda at: change_json(at / "scheduler" / "scheduler_config.json", _timesteps="x"), "no timesteps to sample"),
        (lambda at: (at / "export.json").write_text("{"), "export.json cannot be read"),
        (lambda at: (at / "export.json").write_text("[]"), "export.json holds a list, expected an object"),
        (lambda at: change_json(at / "export.json", clip=[16, 5, 4]), "clip must be four positive integers"),
        (lambda at: change_json(at / "export.json", clip=[16, 5, 4, 0]), "[C, F, H, W], got [16, 5, 4, 0]. Export"),
        (lambda at: change_json(at / "export.json", clip=[16, 5, 4, 6.5]), "clip must be four positive integers"),
        (lambda at: change_json(at / "export.json", clip="large"), "clip must be four positive integers"),
        (lambda at: change_json(at / "export.json", fps=0), "fps must be a positive number, got 0. Export the run"),
        (lambda at: change_json(at / "export.json", fps="12"), "fps must be a positive number, got '12'"),
        (lambda at: change_json(at / "export.json", fps=float("nan")), "fps must be a positive number, got nan"),
        (lambda at: change_json(at / "export.json", latent_space="ltx"), "latent_space must be one of wan and block"),
        (lambda at: (at / "export.json").unlink(), "has no vae and no text_encoder and no tokenizer, which clips need"),
        (lambda at: (at / "transformer" / "config.json").unlink(), "holds neither config.json nor"),
        (
            lambda at: tiny_pipeline.save_interpolator(at / "interpolator", 4),
            "latents of 4 channels, and the student's have 16",
        ),
        (lambda at: (at / "interpolator" / "config.json").unlink(), "holds no interpolator"),
    ],
)
def test_a_damaged_folder_is_named(folders: Path, tmp_path: Path, damage: Break, message: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders / "half", copy)
    damage(copy)
    status, printed = run("sample", copy, "--prompt", "a", "--output", tmp_path / "clip.mp4")
    assert status == 2
    assert message in printed


def test_an_output_that_cannot_be_written_is_refused_before_work(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    for output, message in (("file/clip.mp4", "cannot be written to"), ("folder.mp4", "is a folder. Pass the name of")):
        status, printed = run("sample", folders / "full", "--prompt", "a", "--output", tmp_path / output)
        assert status == 2
        assert message in printed


def test_a_run_that_cannot_be_exported_says_what_it_is(folders: Path, tmp_path: Path) -> None:
    interpolator, output = folders / "interpolator", tmp_path / "out"
    for arguments, message in (
        (
            (interpolator,),
            "is a run of method frame_interpolation, which has no student. Pass a run of one that has, and this one as",
        ),
        ((folders / "run", "--interpolator", interpolator), "that is not finished, so it has no interpolator yet. Run"),
        ((folders / "run", "--interpolator", folders / "run"), "run is a run of method avd. Pass one of frame_interp"),
    ):
        status, printed = run("export", *arguments, "--output", output)
        assert status == 2
        assert message in printed
        assert not output.exists()


def test_only_the_transformer_on_request(folders: Path, tmp_path: Path) -> None:
    status, _ = run("export", folders / "run", "--output", tmp_path / "out", "--transformer-only")
    assert status == 0
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(folders / "run" / "student"))
    status, printed = run(
        "export", folders / "run", "--output", tmp_path / "out", "--transformer-only", "--pipeline", "a/b"
    )
    assert status == 2
    assert "--transformer-only excludes --pipeline and --interpolator" in printed
