import json
import math
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from avd_core import spectral_rolloff
from avd_trainer.commands.app import app
from avd_trainer.config.loading import save_config
from avd_trainer.config.sections import ArchitectureConfig
from avd_trainer.data.in_memory import encode_shapes
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.shard_writing import ShardWriter
from avd_trainer.data.sources import HELD_OUT
from avd_trainer.evaluation.sampling import Sampling
from avd_trainer.evaluation.spectrum import (
    ClipPair,
    block_rolloffs,
    chance,
    compare,
    measure,
    pair_products,
    separation,
)
from avd_trainer.evaluation.spectrum_analysis import analyze_spectrum, open_source
from avd_trainer.evaluation.spectrum_report import save_violins
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.condition import Condition
from avd_trainer.models.samplers import few_step_rollout, schedule
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.models.transformer import VelocityModel, build_transformer
from avd_trainer.runtime.draws import Draws
from avd_trainer.runtime.errors import UserError
from avd_trainer.training.folder import CONFIG, TRAIN
from figures import assert_labels_are_inside
from runs import tiny_config
from tensors import randn

ARCHITECTURE = ArchitectureConfig(
    num_attention_heads=1, attention_head_dim=12, ffn_dim=16, num_layers=4, freq_dim=8, text_dim=6
)
LEVELS = (700.0, 200.0)


def run(*arguments: object) -> tuple[int, str]:
    """Exit status and everything that was printed."""
    result = CliRunner().invoke(app, ["analyze", "spectrum", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def model() -> VelocityModel:
    torch.manual_seed(0)
    return VelocityModel(build_transformer(ARCHITECTURE).eval())


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, model: VelocityModel) -> Path:
    """A transformer of the tiny preset's latents."""
    folder = tmp_path_factory.mktemp("student")
    model.module.save_pretrained(folder)
    (folder / "export.json").write_text(json.dumps({"latent_space": "block-dct-4"}))
    return folder


# Roll-offs of blocks


def test_a_blocks_tokens_are_put_back_on_their_grid(model: VelocityModel) -> None:
    x_0, noise, text = (randn(seed, *shape).float() for seed, shape in enumerate([(2, 16, 3, 4, 8)] * 2 + [(2, 4, 6)]))
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *call: seen.append(call[2])) for block in model.module.blocks]
    timesteps = torch.full((2,), 700.0)
    with torch.no_grad():
        model(schedule.add_noise(x_0, noise, timesteps), timesteps, Condition(text))
    for hook in hooks:
        hook.remove()
    found = block_rolloffs(model, x_0, noise, 700.0, Condition(text))
    assert found.shape == (4, 2, 12)
    for block, tokens_BLD in enumerate(seen):
        for channel in range(12):
            frames = [
                [[tokens_BLD[:, frame * 8 + row * 4 + column, channel] for column in range(4)] for row in range(2)]
                for frame in range(3)
            ]
            maps_BFHW = torch.stack([torch.stack([torch.stack(row, 1) for row in rows], 1) for rows in frames], 1)
            torch.testing.assert_close(found[block, :, channel], spectral_rolloff(maps_BFHW, pool_dim=1))


# Separation


def test_separation_is_the_distance_in_standard_deviations_of_single_clips() -> None:
    real = randn(0, 4000, 3)
    generated = randn(1, 4000, 3) * 2 + torch.tensor([1.5, 0.0, -2.0])
    expected = math.sqrt((1.5**2 + 2.0**2) / (3 * (1 + 4) / 2))
    assert separation(pair_products(real, generated)) == pytest.approx(expected, rel=0.05)


def test_separation_is_that_of_its_equation() -> None:
    real, generated = randn(0, 5, 2), randn(1, 5, 2) + 1
    d = (real - generated).tolist()
    products = sum(d[i][c] * d[j][c] for i in range(5) for j in range(5) if i != j for c in range(2))
    variance = float(real.var(0).sum() + generated.var(0).sum()) / 2
    assert separation(pair_products(real, generated)) == pytest.approx(math.sqrt(products / 20 / variance))


def test_of_one_kind_nothing_separates_on_average_and_chance_is_evenly_spread() -> None:
    squares, chances = [], []
    for seed in range(200):
        common = randn(seed, 12, 3)  # pairs share their caption and noise
        products = pair_products(common + randn(1000 + seed, 12, 3), common + randn(2000 + seed, 12, 3))
        squares.append(float(products.sum()) / (12 * 11))
        chances.append(chance(products))
    assert abs(sum(squares) / 200) < 0.03
    assert 0.01 <= sum(value <= 0.05 for value in chances) / 200 <= 0.1
    assert 0.4 <= sum(value <= 0.5 for value in chances) / 200 <= 0.6


def test_what_differs_is_not_explained_by_chance_and_what_is_constant_is_no_difference() -> None:
    assert chance(pair_products(randn(0, 30, 4), randn(1, 30, 4) + 1)) < 0.001
    constant = torch.full((5, 3), 0.3)
    products = pair_products(constant, constant)
    assert (separation(products), chance(products)) == (0, 1)


def test_pairs_see_what_single_clips_hide() -> None:
    """Clips that differ much among themselves, and each a little from its own generated one."""
    real = 10 * randn(0, 40, 2)
    generated = real + 0.3 + 0.2 * randn(1, 40, 2)
    assert chance(pair_products(real, generated)) < 0.001
    assert chance(pair_products(real, generated.roll(1, 0))) > 0.05


def rolloffs(*shifts: float) -> tuple[dict[float, Tensor], dict[float, Tensor]]:
    """Of real and generated clips, each block shifted by so much at the second level."""
    real = {level: randn(int(level), len(shifts), 30, 4) for level in LEVELS}
    shift = torch.tensor(shifts).view(-1, 1, 1)
    generated = {
        level: values + 0.3 * randn(1, *values.shape) + shift * (level == LEVELS[1]) for level, values in real.items()
    }
    return real, generated


def test_the_blocks_that_separate_most_are_recommended() -> None:
    real, generated = rolloffs(0.0, 2.0, 0.5, -3.0, 0.3, 1.0)
    report = compare(real, generated).report
    assert report.recommended == (1, 3, 5)
    assert report.published == (3, 4, 5)
    assert (report.clips, [each.block for each in report.blocks]) == (30, [0, 1, 2, 3, 4, 5])
    for each in report.blocks:
        assert [level.timestep for level in each.levels] == list(LEVELS)
        second = each.levels[1]
        assert second.generated.mean - second.real.mean == pytest.approx([0, 2, 0.5, -3, 0.3, 1][each.block], abs=0.1)
        values = real[LEVELS[1]][each.block].flatten()
        assert second.real.std == pytest.approx(float(values.std(correction=0)))
        assert second.real.quantiles["5%"] < second.real.quantiles["50%"] < second.real.quantiles["95%"]
    strongest = report.blocks[3]
    squares = [level.separation**2 for level in strongest.levels]
    assert strongest.separation == pytest.approx(math.sqrt(sum(squares) / 2), rel=0.01)
    assert strongest.chance < 0.001


def test_nothing_is_recommended_that_chance_explains() -> None:
    assert compare(*rolloffs(0.0, 2.0, 0.0, -3.0)).report.recommended == ()
    assert compare(*rolloffs(0.0, 0.0, 0.0, 0.0)).report.recommended == ()


def test_a_model_is_shown_both_kinds_of_clips_alike(model: VelocityModel) -> None:
    real, condition = randn(0, 6, 16, 3, 8, 8).float(), Condition(randn(1, 6, 4, 6).float())
    noise = {level: randn(int(level), 6, 16, 3, 8, 8).float() for level in LEVELS}
    same = measure(model, [ClipPair(real, real, condition, noise)], LEVELS)
    assert all(each.separation == 0 for each in same.report.blocks)
    wave = 20 * randn(2, 6, 16, 3, 1, 1).float() * (torch.arange(8) * math.pi / 4).cos()
    generated = wave.expand_as(real)
    pairs = [
        ClipPair(real[part], generated[part], condition[part], {level: values[part] for level, values in noise.items()})
        for part in (slice(0, 2), slice(2, 6))
    ]
    other = measure(model, pairs, LEVELS)
    assert other.report.blocks[0].levels[1].generated.mean < other.report.blocks[0].levels[1].real.mean
    for found, x_0 in ((other.real, real), (other.generated, generated)):
        torch.testing.assert_close(found[200.0], block_rolloffs(model, x_0, noise[200.0], 200.0, condition))


# The command


def test_a_students_blocks_are_measured_and_the_numbers_can_be_recomputed(
    tmp_path: Path, student: Path, model: VelocityModel
) -> None:
    status, said = run(student, "-o", tmp_path / "out", "--count", 3, "--levels", "700,200", "--timesteps", "1000,500")
    assert status == 0, said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["spectrum.json", "spectrum.png"]
    assert (tmp_path / "out" / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "out" / "spectrum.json").read_text())
    assert (written["clips"], written["latent_shape"]) == (3, [16, 5, 8, 8])
    assert written["sampling"]["timesteps"] == [1000, 500]
    assert written["published"] == [2, 3]
    assert "published choices" in said
    # Moving shapes that nothing was trained on, the student's own clips of their captions, and the same noise for both.
    clips = encode_shapes(MovingShapes(3, HELD_OUT, held_out=True), BlockDCTCodec())
    condition = Condition(HashTextEmbedding(TEXT_LENGTH, 6)(clips.captions))
    draws = Draws((0, "spectrum"), range(3), torch.device("cpu"))
    with torch.no_grad():
        own = few_step_rollout(model, condition, (16, 5, 8, 8), (1000.0, 500.0), draws.named("trajectory")).x_0
    for place, level in enumerate(LEVELS):
        noise = draws.normal(f"noise_{level:g}", (16, 5, 8, 8))
        for name, x_0 in (("real", clips.latents), ("generated", own)):
            values = block_rolloffs(model, x_0, noise, level, condition)
            means = [each["levels"][place][name]["mean"] for each in written["blocks"]]
            assert means == pytest.approx(values.mean((1, 2)).tolist(), abs=1e-4)


def test_clips_do_not_depend_on_how_they_are_batched(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(timesteps=(1000.0, 500.0))
    whole = analyze_spectrum(str(student), tmp_path, sampling=sampling, count=3, levels=LEVELS)
    monkeypatch.setattr("avd_trainer.evaluation.sampling.BATCH_VALUES", 1)
    single = analyze_spectrum(str(student), tmp_path, sampling=sampling, count=3, levels=LEVELS)
    for one, other in zip(whole.blocks, single.blocks, strict=True):
        assert one.levels[0].real.mean == pytest.approx(other.levels[0].real.mean, abs=1e-4)
        assert one.levels[1].generated.mean == pytest.approx(other.levels[1].generated.mean, abs=1e-4)


def test_real_clips_may_come_from_a_data_set(tmp_path: Path, student: Path) -> None:
    with ShardWriter(tmp_path / "data", text_length=4, text_dim=6) as writer:
        for row in range(2):
            writer.add(randn(row, 16, 3, 4, 4).float(), randn(row, 2, 6).float(), "a circle", "")
    status, said = run(student, "-o", tmp_path / "out", "--data", tmp_path / "data", "--levels", "500")
    assert status == 0, said
    written = json.loads((tmp_path / "out" / "spectrum.json").read_text())
    assert (written["clips"], written["latent_shape"]) == (2, [16, 3, 4, 4])


def test_a_runs_student_is_sampled_in_its_own_few_steps(tmp_path: Path, student: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(tiny_config("bundled:tiny", method={"few_steps": [1000.0, 640.0]}), folder / CONFIG, TRAIN)
    assert run(folder, "-o", tmp_path / "out")[0] == 2
    assert "is a run of method avd without a whole student" in run(folder, "-o", tmp_path / "out")[1]
    student.rename(folder / "student")
    try:
        source = open_source(str(folder))
        assert source.sampling(None, None, None, None) == Sampling(timesteps=(1000.0, 640.0))
        assert source.sampling((900.0,), None, None, None) == Sampling(timesteps=(900.0,))
        assert source.sampling(None, 5, 2.0, 3.0) == Sampling(steps=5, guidance_scale=2.0, shift=3.0)
        status, said = run(folder, "-o", tmp_path / "out", "--count", 2, "--levels", "500")
        assert status == 0, said
        written = json.loads((tmp_path / "out" / "spectrum.json").read_text())
        assert written["sampling"]["timesteps"] == [1000, 640]
        assert written["source"] == str(folder / "student")
    finally:
        (folder / "student").rename(student)


def test_all_of_the_plot_is_in_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr("avd_trainer.evaluation.spectrum_report.write_png", lambda figure, path: figures.append(figure))
    for blocks in (2, 40):
        save_violins(tmp_path / "plot.png", compare(*rolloffs(*([1.0] * blocks))), "/a/folder" * 9 + ", few steps")
    for figure in figures:
        assert [axis.get_ylabel() for axis in figure.axes] == ["t = 700", "t = 200"]
        assert_labels_are_inside(figure)


# Mistakes


def test_mistakes_are_told_before_a_model_is_loaded(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("avd_trainer.evaluation.spectrum_analysis.load_transformer", no_model)
    for name, channels, width in (("narrow", 16, 5), ("few", 8, 6), ("prompts", None, 6)):
        with ShardWriter(tmp_path / name, text_length=4, text_dim=width) as writer:
            latent = None if channels is None else torch.zeros(channels, 3, 4, 4)
            writer.add(latent, torch.ones(2, width), "a circle", "")
    wan = tmp_path / "wan"
    build_transformer(ARCHITECTURE).save_pretrained(wan)
    (wan / "export.json").write_text(json.dumps({"latent_space": "wan"}))
    out = ("-o", tmp_path / "out")
    for options, said in (
        (("missing", *out), "no such file or folder"),
        ((wan, *out), "needs real clips to compare with. Pass --data"),
        ((student, *out, "--levels", "500,many"), "--levels must be numbers with commas"),
        ((student, *out, "--levels", "1000"), "above 0 and below 1000, each once, got [1000.0]"),
        ((student, *out, "--levels", "500,500"), "each once, got [500.0, 500.0]"),
        ((student, *out, "--timesteps", "500,900"), "fall strictly"),
        ((student, *out, "--steps", 5, "--timesteps", "1000"), "exclude each other"),
        ((student, *out, "--data", tmp_path / "narrow"), "text embeddings of width 5, the model expects 6"),
        ((student, *out, "--data", tmp_path / "few"), "latent channels 8, the model expects 16"),
        ((student, *out, "--data", tmp_path / "prompts"), "holds prompts alone"),
    ):
        status, output = run(*options)
        assert status == 2, options
        assert said in output, options


def test_what_cannot_be_compared_is_an_error(tmp_path: Path, student: Path) -> None:
    with pytest.raises(UserError, match="Got 1 clip: what chance does can be told from two on"):
        compare({500.0: randn(0, 2, 1, 3)}, {500.0: randn(1, 2, 1, 3)})
    with pytest.raises(UserError, match="not finite"):
        compare({500.0: randn(0, 2, 4, 3)}, {500.0: randn(1, 2, 4, 3) / 0})
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "export.json"):
        (broken / name).write_text((student / name).read_text())
    tensors = load_file(student / "diffusion_pytorch_model.safetensors")
    tensors["patch_embedding.bias"][0] = math.nan
    save_file(tensors, broken / "diffusion_pytorch_model.safetensors")
    status, said = run(broken, "-o", tmp_path / "out", "--count", 2, "--levels", "500")
    assert status == 2
    assert "not finite" in said
    assert not (tmp_path / "out" / "spectrum.json").exists()
