import json
import math
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import tiny_pipeline
from avd_core import shift_timesteps
from avd_trainer.commands.app import app
from avd_trainer.config.sections import ArchitectureConfig
from avd_trainer.data.encode import WAN_NEGATIVE_PROMPT, HashTextEncoder
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.shard_writing import ShardWriter
from avd_trainer.data.sources import HELD_OUT
from avd_trainer.evaluation.sampling import Prediction, Sampling, find_sampling, shape_captions
from avd_trainer.evaluation.similarity import adjacent_similarity, measure, reinsert_linearly
from avd_trainer.evaluation.similarity_analysis import analyze_similarity
from avd_trainer.evaluation.similarity_report import save_violins
from avd_trainer.models.condition import Condition
from avd_trainer.models.samplers import few_step_rollout, sample_teacher, schedule
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.models.text_encoders.umt5 import WanTextEncoder
from avd_trainer.models.transformer import VelocityModel, build_transformer, load_transformer
from avd_trainer.runtime.draws import Draws
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import read_json, write_json
from figures import assert_labels_are_inside

GRID = (1000.0, 900.0, 757.0, 522.0)
SHAPE = (4, 9, 3, 5)


def run(*arguments: object) -> tuple[int, str]:
    """Exit status and everything that was printed."""
    result = CliRunner().invoke(app, ["analyze", "similarity", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def trajectory(*predictions: Tensor) -> list[Prediction]:
    return [Prediction(timestep, x_0) for timestep, x_0 in zip(GRID, predictions, strict=False)]


def still(clips: int = 6) -> Tensor:
    return torch.randn(clips, 4, 1, 3, 5).expand(-1, -1, 9, -1, -1)


# Similarity


def test_similarity_of_a_clip_that_stands_still_alternates_or_turns() -> None:
    frame = torch.randn(2, 4, 1, 3, 5)
    signs = torch.tensor([1.0, -1.0, 1.0]).view(1, 1, 3, 1, 1)
    torch.testing.assert_close(adjacent_similarity(still()), torch.ones(6, 8, dtype=torch.float64))
    torch.testing.assert_close(adjacent_similarity(3 * frame * signs), -torch.ones(2, 2, dtype=torch.float64))
    # In a plane of two pixels, by 60 degrees a frame.
    angles = torch.arange(4) * math.pi / 3
    turning = torch.stack([angles.cos(), angles.sin()]).view(1, 1, 2, 4).transpose(2, 3).reshape(1, 1, 4, 1, 2)
    torch.testing.assert_close(
        adjacent_similarity(turning), torch.full((1, 3), 0.5, dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_a_frame_is_all_of_its_channels_and_pixels() -> None:
    x_0 = torch.randn(2, *SHAPE)
    similarity = adjacent_similarity(x_0)
    assert similarity.shape == (2, 8)
    for clip in range(2):
        for first in range(8):
            a, b = x_0[clip, :, first].flatten().tolist(), x_0[clip, :, first + 1].flatten().tolist()
            dot = sum(p * q for p, q in zip(a, b, strict=True))
            norms = math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))
            assert float(similarity[clip, first]) == pytest.approx(dot / norms, abs=1e-6)


def test_numbers_of_a_step_are_those_of_all_clips_however_they_are_batched() -> None:
    clips = [torch.randn(7, *SHAPE) for _ in range(3)]
    whole = measure([trajectory(*clips)])
    parts = measure([trajectory(*(x_0[a:b] for x_0 in clips)) for a, b in ((0, 1), (1, 5), (5, 7))])
    assert whole.report.clips == parts.report.clips == 7
    for index, (one, other) in enumerate(zip(whole.report.steps, parts.report.steps, strict=True)):
        assert one.reinsertion_error == pytest.approx(other.reinsertion_error)
        assert one.remaining_change == pytest.approx(other.remaining_change)
        pairs = adjacent_similarity(clips[index])
        torch.testing.assert_close(parts.values[index], pairs.flatten())
        for step in (one, other):
            assert (step.timestep, step.count) == (GRID[index], 7 * 8)
            assert step.mean == pytest.approx(float(pairs.mean()))
            assert step.median == pytest.approx(float(pairs.quantile(0.5)))
            assert step.quantiles["5%"] == pytest.approx(float(pairs.quantile(0.05)))
            assert list(step.quantiles.values()) == sorted(step.quantiles.values())


# The criterion


def test_error_and_change_are_those_of_the_frames_left_out() -> None:
    x_0, final = torch.randn(5, *SHAPE), torch.randn(5, *SHAPE)
    step = measure([trajectory(x_0, final)]).report.steps[0]
    between = (x_0[:, :, 0:-2:2] + x_0[:, :, 2::2]) / 2
    assert step.reinsertion_error == pytest.approx(float((between - x_0[:, :, 1::2]).square().mean()), rel=1e-5)
    assert step.remaining_change == pytest.approx(float((final - x_0)[:, :, 1::2].square().mean()), rel=1e-5)


def test_of_an_even_number_of_frames_the_last_two_are_kept() -> None:
    x_0 = torch.randn(2, 4, 8, 3, 5)
    inserted = reinsert_linearly(x_0)
    kept = [0, 2, 4, 6, 7]
    assert torch.equal(inserted[:, :, kept], x_0[:, :, kept])
    torch.testing.assert_close(inserted[:, :, 5], (x_0[:, :, 4] + x_0[:, :, 6]) / 2)


def test_a_model_whose_clips_stand_still_supports_half_rate_at_every_step() -> None:
    report = measure([trajectory(still(), still(), still())]).report
    assert report.half_rate_steps == 3
    # Exactly so too if it changes nothing any more.
    settled = still()
    assert measure([trajectory(settled, settled)]).report.half_rate_steps == 2


def test_steady_motion_costs_nothing_and_white_noise_that_stays_everything() -> None:
    places = torch.arange(9.0).view(1, 1, 9, 1, 1)
    moving = torch.randn(6, 4, 1, 3, 5) + places * torch.randn(6, 4, 1, 3, 5)
    # At the last step nothing is left to repair even a rounding error.
    assert measure([trajectory(moving, moving + 0.1, moving + 0.2)]).report.half_rate_steps == 2
    noise = torch.randn(6, *SHAPE)
    assert measure([trajectory(noise, noise, noise)]).report.half_rate_steps == 0


def test_only_leading_steps_count() -> None:
    """A step at full rate is not followed by one at half rate."""
    noise, end = torch.randn(6, *SHAPE), still()
    report = measure([trajectory(end, end + noise, end + 2, end)]).report
    assert [step.supports_half_rate for step in report.steps] == [True, False, True, True]
    assert report.half_rate_steps == 1


@pytest.mark.parametrize(("error", "supported"), [(0.9, 1), (1.1, 0)])
def test_the_limit_is_where_error_and_change_are_equal(error: float, supported: int) -> None:
    """Frames 1, 3, ... err by ``error`` if put in linearly, and change by 1."""
    odd = (torch.arange(9) % 2).view(1, 1, 9, 1, 1).float()
    x_0 = (error * odd).expand(3, *SHAPE)
    assert measure([trajectory(x_0, x_0 + 1)]).report.half_rate_steps == supported


@pytest.mark.parametrize(
    ("clips", "said"),
    [
        ([], "no clips"),
        ([torch.randn(1, 4, 2, 3, 5)], "at least 3 frames"),
        ([torch.full((1, *SHAPE), float("nan"))], "not finite"),
    ],
)
def test_what_cannot_be_measured_is_an_error(clips: Sequence[Tensor], said: str) -> None:
    with pytest.raises(UserError, match=said):
        measure([trajectory(*clips)] if clips else [])


# Sampling


class FrameModel:
    """Gives a velocity that depends on all of its arguments."""

    def __call__(self, x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        offsets = timesteps / 1000 + condition.text.mean(dim=(1, 2))
        return 0.3 * x_t + offsets.view(-1, 1, 1, 1, 1)


def test_the_rollout_hands_out_the_predictions_of_the_plain_few_step_sampler() -> None:
    model, text, noise = FrameModel(), torch.randn(2, 3, 4), torch.randn(4, 2, *SHAPE)
    told: list[Prediction] = []
    draws = iter(noise)
    last = few_step_rollout(
        model,
        Condition(text),
        SHAPE,
        GRID,
        lambda shape: next(draws),
        on_prediction=lambda t, x_0: told.append(Prediction(t, x_0)),
    )
    assert [timestep for timestep, _ in told] == list(GRID)
    assert torch.equal(told[-1].x_0, last.x_0)
    x_t = noise[0]
    for index, (timestep, x_0) in enumerate(told):
        timesteps = torch.full((2,), timestep)
        velocity = model(x_t, timesteps, Condition(text))
        torch.testing.assert_close(x_0, schedule.velocity_to_x_0(velocity, x_t, timesteps))
        if index + 1 < len(GRID):
            x_t = schedule.add_noise(x_0, noise[index + 1], torch.full((2,), GRID[index + 1]))


def test_the_teacher_sampler_hands_out_its_predictions_and_ends_on_the_last() -> None:
    told: list[Prediction] = []
    text, noise = torch.randn(2, 3, 4), torch.randn(2, *SHAPE)
    sample = sample_teacher(
        FrameModel(),
        Condition(text),
        torch.zeros(3, 4),
        SHAPE,
        lambda shape: noise,
        steps=5,
        guidance_scale=2.0,
        shift=3.0,
        on_prediction=lambda t, x_0: told.append(Prediction(t, x_0)),
    )
    grid = shift_timesteps(torch.linspace(1000, 0, 6), 3.0)[:-1]
    torch.testing.assert_close(torch.tensor([timestep for timestep, _ in told]), grid)
    torch.testing.assert_close(told[-1].x_0, sample)
    guided = 0.3 * noise + 1 + 2 * text.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(told[0].x_0, noise - guided)


# The command


def test_the_bundled_model_is_measured_and_the_numbers_can_be_recomputed(tmp_path: Path) -> None:
    status, said = run("bundled:tiny", "-o", tmp_path / "out", "--count", 3, "--seed", 5)
    assert status == 0
    written = json.loads((tmp_path / "out" / "similarity.json").read_text())
    assert f"the first {written['half_rate_steps']} of 4 steps" in said
    assert written["criterion"].startswith("Half rate is supported at a step if")
    assert (tmp_path / "out" / "similarity.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["similarity.json", "similarity.png"]
    assert (written["clips"], written["latent_shape"], written["seed"]) == (3, [16, 5, 8, 8], 5)

    module = load_transformer("bundled:tiny")
    model = VelocityModel(module)
    text = HashTextEmbedding(TEXT_LENGTH, module.config.text_dim)(captions(3))
    draw = Draws((5, "similarity"), range(3), torch.device("cpu")).named("trajectory")
    predictions: list[Prediction] = []
    for timestep in GRID:
        noise, timesteps = draw((16, 5, 8, 8)), torch.full((3,), timestep)
        x_t = schedule.add_noise(predictions[-1].x_0, noise, timesteps) if predictions else noise
        x_0 = schedule.velocity_to_x_0(model(x_t, timesteps, Condition(text)), x_t, timesteps)
        predictions.append(Prediction(timestep, x_0))
    report = measure([predictions]).report
    assert len(written["steps"]) == 4
    for step, again in zip(written["steps"], report.steps, strict=True):
        numbers = {**step, **step.pop("quantiles")}
        expected = again.model_dump()
        expected |= expected.pop("quantiles")
        del numbers["quantiles"]
        assert all(math.isfinite(value) for value in numbers.values())
        assert numbers == pytest.approx(expected, rel=1e-4)
        assert f"{step['timestep']:.0f} │ {step['median']:.3f}" in said


def captions(count: int) -> list[str]:
    return [MovingShapes(count, HELD_OUT, held_out=True)[index].caption for index in range(count)]


def test_captions_say_as_much_as_those_that_the_model_knows(tmp_path: Path) -> None:
    shapes = MovingShapes(2, HELD_OUT, held_out=True, captions="subjects")
    (tmp_path / "open.txt").write_text("\n".join(shapes[index].caption for index in range(2)))
    options = ("--count", 2, "--size", "32x32x9", "--timesteps", "1000,500")
    for name, more in (("own", ()), ("told", ("--prompts-file", tmp_path / "open.txt"))):
        status, said = run("bundled:tiny-open", "-o", tmp_path / name, *options, *more)
        assert status == 0, said
    assert read_json(tmp_path / "own" / "similarity.json") == read_json(tmp_path / "told" / "similarity.json")
    # What was trained says so itself.
    assert shape_captions(str(tmp_path)) == "full"
    write_json(tmp_path / "export.json", {"captions": "subjects"})
    assert shape_captions(str(tmp_path)) == "subjects"
    write_json(tmp_path / "export.json", {"captions": "some"})
    with pytest.raises(UserError, match="captions must be one of full and subjects, or null, got 'some'"):
        shape_captions(str(tmp_path))


def test_clips_do_not_depend_on_how_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(timesteps=(1000.0, 500.0))
    whole = analyze_similarity("bundled:tiny", tmp_path, sampling=sampling, size="32x32x9", count=3)
    monkeypatch.setattr("avd_trainer.evaluation.sampling.BATCH_VALUES", 1)
    single = analyze_similarity("bundled:tiny", tmp_path, sampling=sampling, size="32x32x9", count=3)
    assert [step.mean for step in whole.steps] == pytest.approx([step.mean for step in single.steps], rel=1e-4)


def test_a_teacher_is_sampled_in_many_steps_with_guidance(tmp_path: Path) -> None:
    options = ("--steps", 3, "--guidance-scale", 2, "--count", 2, "--size", "32x32x9")
    status, _ = run("bundled:tiny", "-o", tmp_path, *options)
    assert status == 0
    written = json.loads((tmp_path / "similarity.json").read_text())
    assert [round(step["timestep"]) for step in written["steps"]] == [1000, 909, 714]
    assert written["sampling"] == {
        "timesteps": None,
        "steps": 3,
        "guidance_scale": 2.0,
        "shift": 5.0,
        "sampler": "re-noise",
    }
    # Guidance has an effect.
    run("bundled:tiny", "-o", tmp_path, "--steps", 3, "--guidance-scale", 1, "--count", 2, "--size", "32x32x9")
    assert json.loads((tmp_path / "similarity.json").read_text())["steps"] != written["steps"]
    # So has the shift.
    assert run("bundled:tiny", "-o", tmp_path, *options, "--shift", 3)[0] == 0
    shifted = json.loads((tmp_path / "similarity.json").read_text())
    assert [round(step["timestep"]) for step in shifted["steps"]] == [1000, 857, 600]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline.build(tmp_path_factory.mktemp("pipeline"))


def test_a_pipeline_has_its_own_text_encoder_and_grid(tmp_path: Path, pipeline: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline, folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"timesteps": [1000.0, 600.0]}))
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    options = ("--prompts-file", tmp_path / "prompts.txt", "--size", "32x32x9", "--count", 3)
    status, _ = run(folder, "-o", tmp_path / "out", *options)
    assert status == 0
    written = json.loads((tmp_path / "out" / "similarity.json").read_text())
    assert [step["timestep"] for step in written["steps"]] == [1000.0, 600.0]
    assert written["steps"][0]["count"] == 3 * 2
    assert "needs prompts" in run(folder, "-o", tmp_path / "out", "--size", "32x32x9")[1]


def test_prompts_may_come_from_a_data_set_and_are_repeated(tmp_path: Path) -> None:
    encode = HashTextEncoder(TEXT_LENGTH, 32)
    with ShardWriter(tmp_path / "data", text_length=TEXT_LENGTH, text_dim=32) as writer:
        for caption in ("a red circle", "a blue square"):
            writer.add(torch.randn(16, 4, 2, 4), encode([caption])[0], caption, "")
    sampling = Sampling(timesteps=(1000.0, 500.0))
    report = analyze_similarity("bundled:tiny", tmp_path / "a", sampling=sampling, data=tmp_path / "data", count=4)
    assert json.loads((tmp_path / "a" / "similarity.json").read_text())["latent_shape"] == [16, 4, 2, 4]
    (tmp_path / "prompts.txt").write_text(2 * "a red circle\na blue square\n")
    same = analyze_similarity(
        "bundled:tiny",
        tmp_path / "b",
        sampling=sampling,
        prompts_file=tmp_path / "prompts.txt",
        count=4,
        size="16x8x13",
    )
    assert report.steps == same.steps


def export(folder: Path, architecture: ArchitectureConfig, **about: object) -> Path:
    """What ``avd analyze`` reads of an exported student, with random weights."""
    torch.manual_seed(3)
    build_transformer(architecture).save_pretrained(folder / "transformer")
    (folder / "export.json").write_text(json.dumps(about))
    return folder


def test_an_export_says_its_latent_space_and_the_size_of_its_clips(tmp_path: Path, pipeline: Path) -> None:
    """The width of the text embedding says neither."""
    small = {"num_attention_heads": 1, "attention_head_dim": 12, "ffn_dim": 16, "num_layers": 1, "freq_dim": 8}
    student = export(
        tmp_path / "tiny", ArchitectureConfig(**small, text_dim=6), latent_space="block-dct-4", clip=[16, 4, 2, 6]
    )
    status, said = run(student, "-o", tmp_path / "out", "--count", 2)
    assert status == 0, said
    assert json.loads((tmp_path / "out" / "similarity.json").read_text())["latent_shape"] == [16, 4, 2, 6]
    run(student, "-o", tmp_path / "out", "--count", 2, "--size", "16x16x9")
    assert json.loads((tmp_path / "out" / "similarity.json").read_text())["latent_shape"] == [16, 3, 4, 4]
    wan = export(tmp_path / "wan", ArchitectureConfig(**small, text_dim=32), latent_space="wan", clip=[16, 3, 4, 4])
    status, said = run(wan, "-o", tmp_path / "out", "--count", 2)
    assert status == 2
    assert "wan needs prompts" in said
    (student / "export.json").write_text(json.dumps({"clip": [8, 3, 4, 4]}))
    assert "export.json: clips have 8 latent channels, the model 16" in run(student, "-o", tmp_path / "out")[1]
    (student / "export.json").write_text(json.dumps({"clip": "large"}))
    assert "clip must be four positive integers" in run(student, "-o", tmp_path / "out")[1]


def test_guidance_of_a_pipeline_is_away_from_wans_negative_prompt(tmp_path: Path, pipeline: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    status, said = run(
        pipeline, "-o", tmp_path / "out", "--prompts-file", tmp_path / "prompts.txt", "--size", "32x32x9", "--count", 2,
        "--steps", 2, "--guidance-scale", 4, "--device", "cpu",
    )  # fmt: skip
    assert status == 0, said
    written = json.loads((tmp_path / "out" / "similarity.json").read_text())
    encode = WanTextEncoder.from_pretrained(str(pipeline), dtype=torch.float32)
    text = torch.zeros(3, 512, 16)
    for row, tokens in zip(text, encode(["a red circle", "a blue square", WAN_NEGATIVE_PROMPT]), strict=True):
        row[: len(tokens)] = tokens
    predictions: list[Prediction] = []
    sample_teacher(
        VelocityModel(load_transformer(str(pipeline))), Condition(text[:2]), text[2], (16, 3, 4, 4),
        Draws((0, "similarity"), range(2), torch.device("cpu")).named("trajectory"), steps=2, guidance_scale=4.0,
        shift=5.0, on_prediction=lambda timestep, x_0: predictions.append(Prediction(timestep, x_0)),
    )  # fmt: skip
    expected = [step.mean for step in measure([predictions]).report.steps]
    assert [step["mean"] for step in written["steps"]] == pytest.approx(expected, rel=1e-6)


def test_device_and_type_are_those_of_avd_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    load = load_transformer

    def watch(source: str, device: torch.device, dtype: torch.dtype) -> object:
        asked.append((device.type, dtype))
        return load(source, device, dtype)

    monkeypatch.setattr("avd_trainer.evaluation.similarity_analysis.load_transformer", watch)
    options = ("bundled:tiny", "-o", tmp_path, "--count", 1, "--size", "32x32x9", "--timesteps", "1000")
    assert run(*options, "--device", "cpu")[0] == 0
    assert run(*options, "--device", "cpu", "--dtype", "bfloat16")[0] == 0
    assert asked == [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    status, said = run(*options, "--device", "meta")
    assert status == 2
    assert "--device meta cannot be used" in said


@pytest.mark.parametrize("steps", [4, 1, 25])
def test_all_of_the_plot_is_in_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr("avd_trainer.evaluation.similarity_report.plt.close", figures.append)
    similarities = measure([[Prediction(1000.0 - step, torch.randn(1, *SHAPE)) for step in range(steps)]])
    save_violins(tmp_path / "plot.png", similarities, "/a/folder" * 9 + ", few steps 1000, 900, 757, 522")
    (figure,) = figures
    for axis in figure.axes:
        assert axis.get_ylabel()
    assert_labels_are_inside(figure)


# Mistakes


def test_mistakes_are_told_before_a_model_is_loaded(
    tmp_path: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("avd_trainer.evaluation.similarity_analysis.load_transformer", no_model)
    with ShardWriter(tmp_path / "narrow", text_length=4, text_dim=6) as writer:
        writer.add(None, torch.ones(2, 6), "a circle", "")
    with ShardWriter(tmp_path / "few", text_length=4, text_dim=32) as writer:
        writer.add(torch.zeros(8, 9, 4, 4), torch.ones(2, 32), "a circle", "")
    tiny = ("bundled:tiny", "-o", tmp_path / "out")
    for options, said in (
        (("missing", "-o", tmp_path / "out"), "no such file or folder"),
        ((*tiny, "--steps", 5, "--timesteps", "1000"), "exclude each other"),
        ((*tiny, "--guidance-scale", 3), "Pass --steps as well"),
        ((*tiny, "--shift", 3), "Pass --steps as well"),
        ((*tiny, "--timesteps", "1000,many"), "numbers with commas"),
        ((*tiny, "--timesteps", "500,900"), "fall strictly"),
        ((*tiny, "--timesteps", "1500,900"), "fall strictly"),
        ((*tiny, "--size", "32x32x5"), "of which half rate leaves none out"),
        ((*tiny, "--size", "60x64x9"), "no size for latents of the tiny preset's block DCT"),
        ((*tiny, "--prompts-file", tmp_path / "none.txt"), "cannot be read"),
        ((*tiny, "--data", tmp_path / "none"), "none"),
        ((*tiny, "--data", tmp_path / "narrow"), "width 6, the model expects 32"),
        ((*tiny, "--data", tmp_path / "few"), "8 latent channels, the model 16"),
        ((*tiny, "--data", tmp_path / "few", "--prompts-file", "p.txt"), "exclude each other"),
        ((pipeline, "-o", tmp_path / "out"), "names no few steps"),
    ):
        status, output = run(*options)
        assert status == 2, options
        assert said in output, options


def test_a_damaged_grid_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    for content, said in (
        ("{", "cannot be read"),
        ("[]", "holds a list, expected an object"),
        ('{"timesteps": ["a"]}', "has no timesteps to sample with"),
        ('{"timesteps": 5}', "has no timesteps to sample with"),
        ('{"timesteps": [500, 1000]}', "has no timesteps to sample with"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=rf"scheduler_config.json {said}.*Or pass --timesteps\."):
            find_sampling(str(tmp_path), None, None, None)
    file.write_text('{"timesteps": [1000, 500]}')
    assert find_sampling(str(tmp_path), None, None, None).timesteps == (1000.0, 500.0)
    assert find_sampling(str(tmp_path), (900.0,), None, None).timesteps == (900.0,)
    assert find_sampling("bundled:tiny", None, None, None).timesteps == GRID


def test_weights_that_are_not_finite_are_told(tmp_path: Path) -> None:
    source = resources.files("avd_trainer") / "assets" / "tiny-teacher"
    shutil.copytree(str(source), tmp_path / "model")
    file = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.bias"][0] = float("nan")
    save_file(tensors, file)
    status, said = run(tmp_path / "model", "-o", tmp_path / "out", "--count", 1, "--size", "32x32x9")
    assert status == 2
    assert "not finite" in said
    assert not (tmp_path / "out" / "similarity.json").exists()
