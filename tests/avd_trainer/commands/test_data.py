import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import av
import lmdb
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tiny_pipeline
from avd_trainer.commands.app import app
from avd_trainer.commands.data import _workers, data_app
from avd_trainer.data.encode import WAN_NEGATIVE_PROMPT, HashTextEncoder
from avd_trainer.data.moving_shapes import MovingShapes, Scene
from avd_trainer.data.preparation import ray_engine
from avd_trainer.data.preparation.ray_engine import Machines
from avd_trainer.data.preparation.recipe import load_recipe
from avd_trainer.data.schema import Encoding
from avd_trainer.data.shard_reading import ShardDataset
from avd_trainer.evaluation.clip_measures import hsv_saturation
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from in_process import prepared_in_this_process
from small_videos import write_video


@pytest.fixture
def in_this_process() -> Iterator[None]:
    with prepared_in_this_process():
        yield


def run(*arguments: object) -> tuple[int, str]:
    """Exit status and everything that was printed."""
    result = CliRunner().invoke(data_app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "red_circle.mp4", 12, width=48, height=32, step=16)
    return folder


SMALL = ("--frames", 5, "--height", 32, "--width", 48)


@pytest.mark.usefixtures("in_this_process")
def test_own_videos_are_encoded_and_inspected(tmp_path: Path, videos: Path) -> None:
    status, said = run("encode", "--videos", videos, "--output", tmp_path / "data", "--model", "tiny", *SMALL)
    assert status == 0
    assert f"2 clips are in {tmp_path / 'data'}" in said
    dataset = ShardDataset(tmp_path / "data")
    assert dataset.latent_shape == (16, 2, 8, 12)
    assert not dataset.unconditional().any()
    status, said = run("inspect", tmp_path / "data")
    assert status == 0
    for part in (
        "2 in 1 file(s)",
        "the tiny preset's block DCT, 16 frames per second",
        "[16, 2, 8, 12] (C, F, H, W), float16",
        "24 tokens x 32",
        "caption: red circle",
    ):
        assert part in said
    assert "temporal loss" in said


@pytest.mark.usefixtures("in_this_process")
def test_a_folder_that_holds_data_is_refused_before_a_model_is_loaded(tmp_path: Path, videos: Path) -> None:
    run("encode", "--videos", videos, "--output", tmp_path / "data", "--model", "tiny", *SMALL)
    again = ("encode", "--videos", videos, "--output", tmp_path / "data", "--model", "not/there", *SMALL)
    status, said = run(*again)
    assert status == 2
    assert "holds shards already" in said


def test_the_tiny_text_embedding_fits_the_bundled_teacher(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    run("encode-prompts", tmp_path / "prompts.txt", "--output", tmp_path / "data", "--model", "tiny")
    teacher = resources.files("avd_trainer") / "assets" / "tiny-teacher" / "config.json"
    assert ShardDataset(tmp_path / "data").text_dim == json.loads(teacher.read_text())["text_dim"]


def test_prompts_are_embedded_with_the_negative_prompt_given(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    options = ("--output", tmp_path / "data", "--model", "tiny", "--negative-prompt", "grey")
    status, said = run("encode-prompts", tmp_path / "prompts.txt", *options)
    assert status == 0
    assert "2 prompts are in" in said
    dataset = ShardDataset(tmp_path / "data")
    assert dataset.unconditional_prompt() == "grey"
    torch.testing.assert_close(dataset.unconditional(), dataset_text(dataset, "grey"))
    assert "none: prompts only" in run("inspect", tmp_path / "data")[1]


def test_data_sets_are_joined(tmp_path: Path) -> None:
    for name, prompts in (("one", "a red circle\na blue square\n"), ("two", "a blue square\na green star\n")):
        (tmp_path / f"{name}.txt").write_text(prompts)
        run("encode-prompts", tmp_path / f"{name}.txt", "--output", tmp_path / name, "--model", "tiny")
    status, said = run("merge", tmp_path / "one", tmp_path / "two", "--output", tmp_path / "both")
    assert status == 0, said
    assert "1 rows are there more than once, and were kept once: two.txt, line 1" in said
    assert "1 shards were linked, 1 copied. 3 rows are in" in said
    assert list(ShardDataset(tmp_path / "both").column("caption")) == ["a red circle", "a blue square", "a green star"]
    status, said = run("merge", tmp_path / "one", "--output", tmp_path / "again")
    assert status == 2
    assert "two data sets or more" in said


def dataset_text(dataset: ShardDataset, caption: str) -> torch.Tensor:
    text = torch.zeros(dataset.text_length, dataset.text_dim)
    tokens = HashTextEncoder(dataset.text_length, dataset.text_dim)([caption])[0]
    text[: len(tokens)] = tokens
    return text


@pytest.mark.usefixtures("in_this_process")
def test_a_wan_pipeline_encodes(tmp_path: Path, videos: Path) -> None:
    pipeline = tiny_pipeline.build(tmp_path / "pipeline")
    status, _ = run("encode", "--videos", videos, "--output", tmp_path / "data", "--model", pipeline, *SMALL)
    assert status == 0
    dataset = ShardDataset(tmp_path / "data")
    assert (dataset.latent_shape, dataset.text_length, dataset.text_dim) == ((16, 2, 4, 6), 512, 16)
    assert dataset[0].text.any()
    assert set(dataset.column("text_dtype")) == {"bfloat16"}
    assert dataset.unconditional_prompt() == WAN_NEGATIVE_PROMPT
    assert dataset.encoding == Encoding("wan", str(pipeline), 16.0)


def test_an_lmdb_is_imported(tmp_path: Path) -> None:
    source = tmp_path / "lmdb"
    with lmdb.open(str(source), map_size=2**20) as environment, environment.begin(write=True) as transaction:
        for row in range(3):
            transaction.put(f"latents_{row}_data".encode(), np.full((2, 16, 4, 5), row, dtype=np.float16).tobytes())
            transaction.put(f"prompts_{row}_data".encode(), f"prompt {row}".encode())
        transaction.put(b"latents_shape", b"3 2 16 4 5")
    status, said = run("import-lmdb", source, "--output", tmp_path / "data", "--model", "tiny", "--width", 4)
    assert status == 0
    assert "3 clips are in" in said
    dataset = ShardDataset(tmp_path / "data")
    assert dataset.latent_shape == (16, 2, 4, 4)
    assert dataset.encoding == Encoding("wan")
    latent = dataset[2].latent
    assert latent is not None
    assert (latent == 2).all()


def test_warnings_are_printed(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(" ".join(["word"] * 30))
    run("encode-prompts", tmp_path / "prompts.txt", "--output", tmp_path / "data", "--model", "tiny")
    assert "warning: Some captions fill all 24 tokens" in run("inspect", tmp_path / "data")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "{}/missing"), "is not a folder"),
        (("import-lmdb", "{}", "-o", "{}/data", "--model", "tiny"), "is no LMDB"),
        (("encode", "--videos", "{}", "-o", "{}/data", "--model", "tiny"), "holds no video files"),
        (("encode-prompts", "{}/missing.txt", "-o", "{}/data", "--model", "tiny"), "cannot be read"),
        (("encode-prompts", "{}/prompts.txt", "-o", "{}/prompts.txt/data", "--model", "tiny"), "cannot be written"),
        (("encode-prompts", "{}/prompts.txt", "-o", "{}/data", "--model", "{}/missing"), "is no folder and no hub id"),
        (("encode-prompts", "{}/prompts.txt", "-o", "{}/data", "--model", "{}"), "cannot be loaded"),
        (("encode-prompts", "{}/prompts.txt", "-o", "{}/data", "--model", "tinny"), "--model tinny is no folder"),
        (("encode", "--videos", "{}", "-o", "{}", "--model", "tiny", "--frames", "6"), "got 6 frames of height 32"),
        (
            ("encode", "--videos", "{}", "-o", "{}", "--model", "{}", "--fps", "0"),
            "81 frames of height 480",
        ),
    ],
)
def test_mistakes_are_told_without_a_traceback(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\n")
    status, said = run(*(argument.format(tmp_path) for argument in arguments))
    assert status == 2
    assert said.count("error:") == 1
    assert message in said
    assert "Traceback" not in said


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Three seconds of a square that moves in front of stripes, the same again in another file, and no video."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for name, height, width in (("square_moves", 48, 64), ("tall", 64, 36)):
        with av.open(folder / f"{name}.mp4", "w") as container:
            stream = container.add_stream("mpeg4", rate=24, options={"qscale": "3"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for number in range(72):
                pixels = np.zeros((height, width, 3), dtype=np.uint8)
                pixels[:, ::8] = (200, 60, 20)
                pixels[:, 4::8] = (20, 160, 220)
                left = abs(number % 40 - 20)
                pixels[10:26, left : left + 16] = (40, 240, 60)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
    (folder / "square_moves.txt").write_text("A green square moves.")
    (folder / "square_moves.json").write_text(json.dumps({"license": "CC-BY-4.0"}))
    (folder / "text.mp4").write_text("no video")
    return folder


def test_raw_videos_are_prepared_selected_again_and_inspected(tmp_path: Path, raw: Path) -> None:
    prepared = tmp_path / "prepared"
    arguments = ("prepare", "--videos", raw, "--output", prepared, "--recipe", "tiny", "--workers", 1)
    values = ("duplicates=off", "cut.threshold=null", "framing.sizes=[[32,48],[64,32]]")
    overrides = [part for value in values for part in ("--set", value)]
    status, said = run(*arguments, *overrides)
    assert status == 0, said
    assert "3 files gave 4 clips; 1 files gave none. 1 x probe: Invalid data found when processing input" in said
    assert f"2 clips are in {prepared / 'data' / '32x48'}" in said
    assert f"2 clips are in {prepared / 'data' / '64x32'}" in said
    status, said = run(*arguments, *overrides)
    assert status == 0, said
    assert f"2 clips were already in {prepared / 'data' / '32x48'}" in said
    status, said = run("report", prepared, "--set", "hue.min=7")  # more than any clip has
    assert status == 0, said
    assert f"0 of 4 clips in 3 files are kept. Look at why in {prepared / 'report.html'}" in said
    status, said = run("select", prepared, "--output", tmp_path / "data", "--set", "framing.sizes=[[32,48]]")
    assert status == 0, said
    assert f"4 clips are in {tmp_path / 'data'}" in said
    dataset = ShardDataset(tmp_path / "data")
    assert dataset.latent_shape == (16, 5, 8, 12)
    assert set(dataset.column("caption")) == {"A green square moves.", "tall"}
    status, said = run("inspect", tmp_path / "data")
    assert status == 0
    for part in ("prepared from 2 file(s)", "CC-BY-4.0 (2), not given (2)", 'stage latents version 1 model="tiny"'):
        assert part in said
    sha256 = hashlib.sha256((raw / "square_moves.mp4").read_bytes()).hexdigest()
    assert f"SHA-256 {sha256} " in run("inspect", tmp_path / "data", "--clip", "square_moves.mp4")[1]


def test_another_style_as_the_page_on_data_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fig. 6 in small: the page's own code and commands, with a few clips and one step."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    _, found, section = page.partition("## Another style\n")
    assert found
    code, commands = re.findall(r"^```\w*\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[:2]
    assert "1000" in code
    exec(code.replace("1000", "12"), {})
    small = {"prepare": ["--workers", "1"], "train": ["--max-steps", "1", "--set", "batch_size=2"]}
    for line in commands.splitlines():
        words = shlex.split(line)
        result = CliRunner().invoke(app, [*words[1:], *small.get(words[2] if words[1] == "data" else words[1], [])])
        assert result.exit_code == 0, result.output
    dataset = ShardDataset(tmp_path / "data" / "pale")
    assert 4 <= len(dataset) < 12  # some were left out
    assert all(Scene.from_caption(caption) for caption in dataset.column("caption"))
    latents = torch.stack([latent for each in dataset if (latent := each.latent) is not None])
    style = hsv_saturation(BlockDCTCodec().decode(latents).clamp(0, 1)).mean()
    usual = hsv_saturation(torch.stack([clip.video for clip in MovingShapes(12, seed=0)])).mean()
    assert style < 0.7 * usual
    (run_folder,) = (tmp_path / "runs").iterdir()
    assert (run_folder / "student").is_dir()


def test_a_part_says_what_joins_it(tmp_path: Path, raw: Path) -> None:
    arguments = ("prepare", "--videos", raw, "--output", tmp_path / "p", "--recipe", "tiny", "--shard", "0/1")
    status, said = run(*arguments, "--sample", "50%")
    assert status == 2
    assert "--sample and --shard exclude each other" in said
    status, said = run(*arguments, "--workers", 1)
    assert status == 0, said
    assert "Part 0/1 is scored. When all parts are, the same command without --shard joins them" in said
    for command in (("report",), ("select", "--output", tmp_path / "data")):
        status, said = run(*command, tmp_path / "p")
        assert status == 2
        assert "holds parts alone. Run `avd data prepare` without --shard to join them." in said


@pytest.mark.parametrize(("machines", "processes"), [(Machines(64, 0), 1), (Machines(64, 2), 64)])
def test_models_without_a_gpu_run_in_one_process_of_a_cluster(
    monkeypatch: pytest.MonkeyPatch, machines: Machines, processes: int
) -> None:
    monkeypatch.setattr(ray_engine, "connect", lambda: machines)
    assert _workers("ray", None, load_recipe("paper")).processes == processes
    assert _workers("ray", 3, load_recipe("paper")).processes == 3
    assert _workers("ray", None, load_recipe("tiny")).processes == 64


def test_the_help_names_the_extra_of_ray() -> None:
    status, said = run("prepare", "--help")
    assert status == 0
    assert "[ray]" in said


def test_a_sample_says_what_all_videos_would_take(tmp_path: Path, raw: Path) -> None:
    status, said = run(
        "prepare", "--videos", raw, "--output", tmp_path / "p", "--recipe", "tiny", "--sample", "34%", "--workers", 1
    )
    assert status == 0, said
    assert "The sample is 1 of 3 files" in said
    assert not (tmp_path / "p" / "data").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--sample", "0%", "--sample 0%: expected a share of the files, such as 1% or 0.01."),
        ("--sample", "some", "--sample some: expected a share"),
        ("--shard", "2/2", "--shard 2/2: expected I/N with I from 0 to N - 1"),
        ("--recipe", "best", "best is neither a recipe (encode, paper, tiny) nor a YAML file"),
        ("--set", "hue.mean=3", "hue.mean: there is no such field"),
        ("--set", "text.model=Wan-AI/None", "text needs the weights Wan-AI/None"),
    ],
)
def test_wrong_options_of_preparing_are_told(tmp_path: Path, raw: Path, option: str, value: str, message: str) -> None:
    arguments = {"--videos": raw, "--output": tmp_path / "p", "--recipe": "tiny", option: value}
    status, said = run("prepare", *(part for pair in arguments.items() for part in pair))
    assert status == 2
    assert message in said
    assert not (tmp_path / "p").exists()
