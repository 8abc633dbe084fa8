"""Image to video from clips and pictures to clips, held against diffusers' own pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from torch import Tensor

import tiny_pipeline
from avd_integrations.diffusers import FewStepScheduler
from avd_trainer.config.sections import ArchitectureConfig, ShapesData, ShardsData
from avd_trainer.data.examples import condition_of
from avd_trainer.data.in_memory import CaptionedLatents, InMemoryData, encode_shapes
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.shard_reading import ShardDataset
from avd_trainer.data.sources import HELD_OUT, TrainingData, load_data
from avd_trainer.data.videos import read_picture
from avd_trainer.evaluation.controls import Encoded
from avd_trainer.evaluation.first_frame import first_frame_error
from avd_trainer.evaluation.measures import measure
from avd_trainer.models.architecture import ImageInput, image_input, latent_channels
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.codecs.first_frame import encode_first_frame, with_mask
from avd_trainer.models.codecs.wan import WanCodec
from avd_trainer.models.condition import Condition
from avd_trainer.models.image_encoder import WanImageEncoder
from avd_trainer.models.samplers import few_step_rollout, sample_teacher
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.models.text_encoders.umt5 import WanTextEncoder
from avd_trainer.models.transformer import VelocityModel, build_transformer, load_transformer, start_from
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import Ranks, join_ranks
from avd_trainer.studies.definition import Unit, load_study
from avd_trainer.studies.units import Workplace
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.pipeline_export import export_pipeline
from avd_trainer.training.run import train
from avd_trainer.training.trainer import Trainer
from command_line import run_command as run
from in_process import prepared_in_this_process
from launches import on_ranks
from runs import ARCHITECTURE, LORA, both, in_memory, load_data_of, tiny_config, weights
from small_study import write_study
from small_videos import write_video

IMAGE_DIM = 12
IMAGE_ARCHITECTURE = ARCHITECTURE.model_copy(update={"image_to_video": True})
PROMPT = "a red circle"


@pytest.fixture(autouse=True, scope="module")
def _in_this_process() -> Iterator[None]:
    with prepared_in_this_process():
        yield


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of image to video in the layout of Wan2.1, with an image encoder."""
    return tiny_pipeline.build(tmp_path_factory.mktemp("wan") / "pipeline", image_dim=IMAGE_DIM)


@pytest.fixture(scope="module")
def pipeline(wan: Path) -> WanImageToVideoPipeline:
    found = DiffusionPipeline.from_pretrained(wan)
    assert type(found) is WanImageToVideoPipeline
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 x 32 pixels of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("picture") / "first.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def image_teacher(tmp_path: Path) -> Path:
    """A tiny one without image encoder, as Wan2.2's; weights that read the image, random."""
    torch.manual_seed(2)
    build_transformer(IMAGE_ARCHITECTURE).save_pretrained(tmp_path / "image-teacher")
    return tmp_path / "image-teacher"


# The condition


def test_a_picture_becomes_what_diffusers_makes_of_it(
    pipeline: WanImageToVideoPipeline, wan: Path, picture: Path
) -> None:
    image, seen = Image.open(picture), read_picture(picture, 32, 48)
    preprocessed = pipeline.video_processor.preprocess(image, height=32, width=48)
    with torch.no_grad():
        _, expected = pipeline.prepare_latents(preprocessed, 1, 16, 32, 48, 9, torch.float32, torch.device("cpu"))
        expected_embedding = pipeline.encode_image(image)
    codec = WanCodec.from_pretrained(str(wan), dtype=torch.float32)
    found = encode_first_frame(codec.encode, seen.unsqueeze(0), 9)
    assert found.shape == (1, 20, 3, 4, 6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    encoder = WanImageEncoder.from_pretrained(str(wan))
    embedding = encoder(seen)
    assert embedding.shape == (encoder.tokens, encoder.dim) == (5, IMAGE_DIM)
    torch.testing.assert_close(embedding.unsqueeze(0), expected_embedding, rtol=0, atol=1e-6)


def test_of_the_tiny_codec_a_clips_latents_hold_its_first_frame() -> None:
    codec, video = BlockDCTCodec(), torch.rand(2, 3, 9, 16, 24)
    expected = encode_first_frame(codec.encode, video[:, :, 0], 9)
    torch.testing.assert_close(with_mask(codec.keep_first_frame(codec.encode(video))), expected, rtol=0, atol=1e-5)
    grey = codec.decode(expected[:, 4:])[:, :, 1:]
    torch.testing.assert_close(grey, torch.full_like(grey, 0.5), rtol=0, atol=1e-5)


def test_a_frame_of_another_size_covers_the_clip_and_its_centre_is_cut_out(tmp_path: Path) -> None:
    pixels = np.zeros((16, 64, 3), dtype=np.uint8)
    pixels[:, 24:40] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert read_picture(tmp_path / "wide.png", 16, 16).min() == 1
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UserError, match=r"notes.txt cannot be read: .* Pass a picture, PNG or JPEG"):
        read_picture(tmp_path / "notes.txt", 16, 16)


# Which kind a model is


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ({"in_channels": 16}, None),
        ({"in_channels": 16, "out_channels": 16, "image_dim": None}, None),
        ({"in_channels": 36, "out_channels": 16, "image_dim": 1280}, ImageInput(20, 1280)),
        ({"in_channels": 36, "out_channels": 16}, ImageInput(20, None)),
    ],
)
def test_channels_say_which_kind_a_model_is(architecture: dict[str, Any], expected: ImageInput | None) -> None:
    assert image_input(architecture) == expected
    assert latent_channels(architecture) == 16


@pytest.mark.parametrize(
    "architecture", [{"in_channels": 48, "out_channels": 16}, {"in_channels": 16, "image_dim": 1280}]
)
def test_another_kind_of_model_is_refused(architecture: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"is neither text to video .16 in, no image_dim. nor image to video .36 in."):
        image_input(architecture)


def test_a_model_of_image_to_video_starts_as_one_of_text_to_video(teacher_folder: Path) -> None:
    model = VelocityModel(start_from(build_transformer(IMAGE_ARCHITECTURE), str(teacher_folder)))
    text, x_t, timesteps = torch.randn(2, 4, 6), torch.randn(2, 16, 3, 4, 4), torch.tensor([757.0, 300.0])
    images = torch.randn(2, 2, 20, 3, 4, 4)
    with torch.no_grad():
        expected = VelocityModel(load_transformer(str(teacher_folder)))(x_t, timesteps, Condition(text))
        for image in images:
            assert torch.equal(model(x_t, timesteps, Condition(text, image)), expected)
    with pytest.raises(UserError, match="does not fit the model"):
        start_from(build_transformer(ArchitectureConfig(image_to_video=True)), str(teacher_folder))


# Data


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "red_circle.mp4", 19, width=48, height=32, step=12)
    return folder


def encode(videos: Path, output: Path, model: object, *options: object) -> Path:
    sizes = ("--frames", 9, "--height", 32, "--width", 48)
    status, said = run("data", "encode", "--videos", videos, "--output", output, "--model", model, *sizes, *options)
    assert status == 0, said
    return output


def architecture_of(wan: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((wan / "transformer" / "config.json").read_text())
    return content


def test_first_frames_are_encoded_with_the_clips(videos: Path, tmp_path: Path, wan: Path) -> None:
    folder = encode(videos, tmp_path / "data", wan, "--image-condition")
    loaded = load_data(ShardsData(path=(folder,), workers=0), None, teacher=str(wan), architecture=architecture_of(wan))
    assert len(loaded.clips) == 2
    example = loaded.clips[1]
    assert example.image_latents is not None
    assert example.image_embedding is not None
    assert example.image_latents.shape == (20, 3, 4, 6)
    codec, encoder = WanCodec.from_pretrained(str(wan), dtype=torch.float32), WanImageEncoder.from_pretrained(str(wan))
    with av.open(videos / "red_circle.mp4") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    first = torch.from_numpy(frames[9]).permute(2, 0, 1) / 255
    expected = encode_first_frame(codec.encode, first.unsqueeze(0), 9)[0]
    torch.testing.assert_close(example.image_latents, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(example.image_embedding, encoder(first), rtol=1e-3, atol=1e-3)
    # Text to video reads the same shards, and leaves first frames alone.
    plain = ShardDataset(folder)[1]
    assert plain.image_latents is plain.image_embedding is None
    status, said = run("data", "inspect", folder)
    assert status == 0
    assert "first frames latents and embeddings of 5 tokens x 12" in said


def test_the_tiny_codecs_first_frames_are_those_in_memory(videos: Path, tmp_path: Path, image_teacher: Path) -> None:
    folder = encode(videos, tmp_path / "data", "tiny", "--image-condition")
    example = ShardDataset(folder, image=ImageInput(20, None))[0]
    assert example.latent is not None
    assert example.image_latents is not None
    assert example.image_embedding is None
    memory = in_memory(example.latent.unsqueeze(0), image=True)[0]
    torch.testing.assert_close(example.image_latents, memory.image_latents, rtol=0, atol=0.02)  # float16


def test_data_without_first_frames_is_refused_with_what_to_do(videos: Path, tmp_path: Path, wan: Path) -> None:
    def load(architecture: dict[str, Any], prompts: Path | None = None, folder: Path | None = None) -> None:
        sections = [ShardsData(path=(path,)) for path in (folder or tmp_path / "image", prompts) if path is not None]
        load_data(sections[0], sections[1] if prompts else None, teacher=None, architecture=architecture)

    architecture = architecture_of(wan)
    encode(videos, tmp_path / "image", wan, "--image-condition")
    encode(videos, tmp_path / "text", wan)
    load(architecture)
    load(architecture | {"in_channels": 16, "image_dim": None})
    with pytest.raises(UserError, match=r"holds nothing of first frames, .* `avd data encode --image-condition"):
        load(architecture, folder=tmp_path / "text")
    with pytest.raises(UserError, match="image embeddings of width 12, the teacher expects 1280"):
        load(architecture | {"image_dim": 1280})
    with pytest.raises(UserError, match=r"text embeddings of 24 tokens, .* that reads an image embedding takes 512"):
        load_data(ShapesData(clips=2), None, teacher=None, architecture=architecture | {"text_dim": 32})
    (tmp_path / "prompts.txt").write_text(PROMPT)
    run("data", "encode-prompts", tmp_path / "prompts.txt", "--output", tmp_path / "prompts", "--model", wan)
    with pytest.raises(UserError, match="holds prompts only, and the teacher makes videos of an image and a prompt"):
        load(architecture, prompts=tmp_path / "prompts")


# Training


@pytest.mark.parametrize("kind", ["dmd", "avd", "vpae"])
def test_a_student_of_image_to_video_is_trained_resumed_and_looks_at_the_image(
    kind: str, image_teacher: Path, clips: CaptionedLatents, ranks: Ranks, tmp_path: Path
) -> None:
    data = both(in_memory(clips, image=True))
    phases = {"priming_steps": 1} if kind == "vpae" else {}
    config = tiny_config(image_teacher, kind, phases, checkpoint={"every": 1}, logging={"tensorboard": False})
    whole = Trainer(config, data, ranks)
    before = {name: weights(model) for name, model in whole.models.items()}
    curve = [float(metrics["loss"]) for metrics in whole.run()]
    after = {name: weights(model) for name, model in whole.models.items()}
    assert torch.equal(before["teacher"], after["teacher"])
    assert not torch.equal(before["student"], after["student"])
    # Resumed after the second step, the third is the same.
    train(config.model_copy(update={"max_steps": 2}), tmp_path / "run", ranks, data=data)
    train(config, tmp_path / "run", ranks, data=data)
    resumed = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert resumed == pytest.approx(curve, rel=1e-6)
    # Other first frames give other samples of the same prompts and noise.
    condition = condition_of([data.prompts[0], data.prompts[1]])
    assert condition.image_latents is not None
    others = Condition(condition.text, condition.image_latents.flip(0))
    assert (whole.sample(condition, "a") - whole.sample(others, "a")).abs().max() > 1e-3


def curve(config: TrainConfig, data: TrainingData, name: str) -> list[float]:
    with join_ranks() as ranks:
        return [float(metrics[name]) for metrics in Trainer(config, data, ranks).run() if name in metrics]


@pytest.mark.parametrize(("kind", "lora"), [("avd", None), ("avd", LORA), ("vpae", None), ("vpae", LORA)])
def test_two_ranks_train_what_one_does(
    kind: str, lora: dict[str, Any] | None, wan: Path, videos: Path, tmp_path: Path
) -> None:
    """With the image embedder and the attention to it sharded; of V-PAE also the head that sees the image."""
    section = ShardsData(path=(encode(videos, tmp_path / "data", wan, "--image-condition"),), workers=0)
    data = load_data(section, None, teacher=str(wan), architecture=architecture_of(wan))
    method: dict[str, Any] = {role: {"optimizer": {"lr": 1e-3}, "lora": lora} for role in ("student", "online")}
    watched, tolerance = "loss", 2e-3
    if kind == "vpae":
        method |= {"priming_steps": 1, "head": {"optimizer": {"lr": 1e-3}}}
        watched, tolerance = "discriminator/clip_logit", 1e-4  # of the loss the image is a small part
    config = tiny_config(wan, kind, method, max_steps=3, data=section.model_dump())
    alone = curve(config, data, watched)
    assert len(alone) >= 2
    for found in on_ranks(2, curve, config, data, watched):
        assert found == pytest.approx(alone, rel=tolerance)


def test_a_teacher_is_trained_from_a_text_to_video_one(teacher_folder: Path, ranks: Ranks) -> None:
    method = {"architecture": IMAGE_ARCHITECTURE.model_dump(), "start": str(teacher_folder)}
    config = tiny_config("", "flow_matching", method, data={"kind": "shapes", "clips": 4})
    trainer = Trainer(config, load_data_of(config), ranks)
    module: Any = trainer.models["teacher"]
    embedding = module.module.patch_embedding.weight.full_tensor
    assert not embedding()[:, 16:].any()
    assert torch.equal(embedding()[:, :16], load_transformer(str(teacher_folder)).patch_embedding.weight)
    list(trainer.run())
    assert embedding()[:, 16:].any()


# Export and use


@pytest.fixture(scope="module")
def student(wan: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on encoded clips, and its export."""
    folder = tmp_path_factory.mktemp("student")
    encode(videos, folder / "data", wan, "--image-condition")
    status, said = run(
        "train", "wan2.1-i2v-14b-480p", "--data", folder / "data", "--output", folder / "run", "--max-steps", 2,
        "--set", f"teacher={wan}", "--set", "batch_size=1", "--set", "method.online_updates=1", "--set",
        "samples.every=1", "--set", "method.student.optimizer.lr=0.01",
    )  # fmt: skip
    assert status == 0, said
    export_pipeline(folder / "run", folder / "out")
    return folder


def test_an_export_is_diffusers_own_pipeline_and_samples_the_same(student: Path, wan: Path, picture: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(student / "out")
    assert type(pipeline) is WanImageToVideoPipeline
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = FewStepScheduler.from_config(pipeline.scheduler.config)
    noise = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(4)
    found = pipeline(
        Image.open(picture), PROMPT, height=32, width=48, num_frames=9, num_inference_steps=4, guidance_scale=1.0,
        latents=noise, output_type="latent",
    ).frames  # fmt: skip

    (tokens,) = WanTextEncoder.from_pretrained(str(wan), dtype=torch.float32)([PROMPT])
    text = torch.nn.functional.pad(tokens, (0, 0, 0, 512 - len(tokens))).unsqueeze(0)
    codec, seen = WanCodec.from_pretrained(str(wan), dtype=torch.float32), read_picture(picture, 32, 48)
    condition = Condition(
        text,
        encode_first_frame(codec.encode, seen.unsqueeze(0), 9),
        WanImageEncoder.from_pretrained(str(wan))(seen).unsqueeze(0),
    )
    model = VelocityModel(load_transformer(str(student / "run" / "student")))
    torch.manual_seed(4)
    draws = [noise]

    def draw(shape: Any) -> Tensor:
        return draws.pop() if draws else torch.randn(1, *shape)

    with torch.no_grad():
        expected = few_step_rollout(model, condition, noise.shape[1:], (1000.0, 900.0, 757.0, 522.0), draw).x_0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    index = json.loads((student / "out" / "model_index.json").read_text())
    assert index["image_encoder"] == ["transformers", "CLIPVisionModel"]
    names = WanTransformer3DModel.from_pretrained(student / "out" / "transformer").state_dict()
    assert "condition_embedder.image_embedder.ff.net.0.proj.weight" in names
    assert "blocks.0.attn2.add_k_proj.weight" in names


@pytest.fixture(scope="module")
def sampled(student: Path) -> Callable[..., tuple[int, str]]:
    def sample(*options: object) -> tuple[int, str]:
        return run("sample", student / "out", "--prompt", PROMPT, "--output", student / "clip.mp4", *options)

    return sample


def test_clips_go_on_from_a_picture(
    student: Path, picture: Path, sampled: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    contents = []
    Image.fromarray(np.zeros((32, 48, 3), dtype=np.uint8)).save(tmp_path / "black.png")
    for image in (picture, picture, tmp_path / "black.png"):
        status, said = sampled("--image", image)
        assert status == 0, said
        contents.append((student / "clip.mp4").read_bytes())
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_a_student_without_image_and_an_image_without_use_are_errors(
    sampled: Callable[..., tuple[int, str]], picture: Path, tmp_path: Path
) -> None:
    status, said = sampled()
    assert status == 2
    assert "makes videos of an image and a prompt. Pass the image by --image FILE." in said
    status, said = sampled("--image", tmp_path / "gone.png")
    assert status == 2
    assert "gone.png cannot be read" in said
    options = ("--set", "batch_size=2", "--set", "data.clips=4", "--set", "samples.every=null")
    assert run("train", "tiny", "--output", tmp_path / "run", "--max-steps", 1, *options)[0] == 0
    run("export", tmp_path / "run", "--output", tmp_path / "text")
    status, said = run(
        "sample", tmp_path / "text", "--prompt", PROMPT, "--output", tmp_path / "clip.mp4", "--image", picture
    )
    assert status == 2
    assert "makes videos of a prompt alone. Leave --image out." in said


def test_one_step_by_vpae_goes_from_training_to_a_clip_of_a_picture(tmp_path: Path) -> None:
    """On the bundled teacher, whose students see the image beside the noise and its latents in the semantic head."""
    options = (
        "batch_size=2",
        "data.clips=4",
        "samples.every=null",
        "method.priming_steps=1",
        "method.online_updates=1",
    )
    sets = [word for option in options for word in ("--set", option)]
    status, said = run("train", "tiny-i2v", "--method", "vpae", "--output", tmp_path / "run", "--max-steps", 2, *sets)
    assert status == 0, said
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "discriminator/logit_gap" not in logged[0]
    assert {"discriminator/logit_gap", "csds/share", "adversarial/share"} <= logged[1].keys()
    run("export", tmp_path / "run", "--output", tmp_path / "out")
    clips = MovingShapes(2, HELD_OUT, held_out=True)
    pictures, frames = [], []
    for place in range(2):  # each from its first frame, and no caption that would say as much
        first = (clips[place].video[:, 0].movedim(0, -1) * 255).round().byte().numpy()
        Image.fromarray(first).save(tmp_path / "first.png")
        status, said = run(
            "sample", tmp_path / "out", "--prompt", "clip", "--output", tmp_path / "clip.mp4", "--image",
            tmp_path / "first.png",
        )  # fmt: skip
        assert status == 0, said
        with av.open(str(tmp_path / "clip.mp4")) as container:
            frames.append(next(container.decode(video=0)).to_ndarray(format="rgb24").astype(float))
        pictures.append(first)
    near = [abs(frames[place] - pictures[place]).mean() for place in range(2)]  # of 255
    far = [abs(frames[place] - pictures[1 - place]).mean() for place in range(2)]
    assert max(near) < 16, near
    assert max(near) < 0.5 * min(far), (near, far)
    status, said = run(
        "sample", tmp_path / "out", "--prompt", PROMPT, "--output", tmp_path / "clip.mp4", "--image",
        tmp_path / "first.png", "--half-rate",
    )  # fmt: skip
    assert status == 2
    assert "half" in said


@pytest.mark.parametrize("lora", [False, True])
def test_the_plan_of_the_14b_model_counts_the_image(lora: bool) -> None:
    options = ["--set", "method.student.lora.rank=64", "--set", "method.online.lora.rank=64"] if lora else []
    needed: dict[str, float] = {}
    encoding: dict[str, float] = {}
    for preset in ("wan2.1-14b", "wan2.1-i2v-14b-480p"):
        status, said = run("plan", preset, "--gpus", 8, *options)
        assert status in (0, 1), said
        needed[preset] = float(said.partition(" GB of ")[0].rpartition(" ")[2])
        encoding[preset] = float(said.partition(" TFLOP a clip by the VAE")[0].rpartition(" ")[2])
        # Latents of 16 x 21 x 60 x 104 and 257 tokens x 1280 in float16.
        assert ("4.9 MB its first frame" in said) == ("i2v" in preset)
    # 16.4 against 14.3 billion parameters.
    assert encoding["wan2.1-i2v-14b-480p"] == pytest.approx(2 * encoding["wan2.1-14b"], rel=0.02)
    assert 1.02 < needed["wan2.1-i2v-14b-480p"] / needed["wan2.1-14b"] < 1.25


# The bundled teacher


def test_the_bundled_teacher_goes_on_from_the_image() -> None:
    codec, count = BlockDCTCodec(), 12
    shapes = encode_shapes(MovingShapes(count, HELD_OUT, held_out=True), codec)
    teacher = VelocityModel(load_transformer("bundled:tiny-i2v"))
    examples = InMemoryData(shapes, HashTextEmbedding(TEXT_LENGTH, 32), image=True)
    condition = condition_of([examples[place] for place in range(count)])

    def sampled(told: Condition) -> Tensor:
        draws = torch.Generator().manual_seed(0)
        return sample_teacher(
            teacher, told, examples.unconditional(), shapes.latents.shape[1:],
            lambda shape: torch.randn(count, *shape, generator=draws), steps=10, guidance_scale=1.5, shift=3.0,
        )  # fmt: skip

    latents = sampled(condition)
    real = Encoded(shapes.latents, codec.decode(shapes.latents))
    video, images = codec.decode(latents), real.video[:, :, 0]
    assert first_frame_error(video, images) < 0.03
    assert first_frame_error(video, images.roll(1, dims=0)) > 0.1
    # Captions say nearly everything about a clip: without them it has to look at the image.
    assert first_frame_error(codec.decode(sampled(condition.with_text(examples.unconditional()))), images) < 0.04
    found = measure(latents, video, shapes.captions, real)
    assert min(found[name] for name in ("visible", "kind", "direction")) > 0.95
    # What comes after the first frame is no still picture: it goes on as the caption says, from there.
    assert float((video - real.video).square().mean().sqrt()) < 0.04


def test_its_predictions_are_analyzed_on_clips_with_first_frames(videos: Path, tmp_path: Path) -> None:
    folder = encode(videos, tmp_path / "data", "tiny", "--image-condition")
    command = ("analyze", "similarity", "bundled:tiny-i2v", "-o", tmp_path / "out", "--count", 2, "--timesteps", "1000")
    status, said = run(*command, "--data", folder)
    assert status == 0, said
    assert json.loads((tmp_path / "out" / "similarity.json").read_text())["clips"] == 2
    status, said = run(*command)
    assert status == 2
    assert "is an image-to-video model, which needs first frames. Pass --data with clips" in said


def test_a_study_of_image_to_video_measures_how_far_first_frames_are_off(ranks: Ranks, tmp_path: Path) -> None:
    dmd = """
        # Matching alone.
        extends: tiny-i2v/dmd
        data: {clips: 8}
        max_steps: 1
        batch_size: 2
        method: {few_steps: [1000, 500], online_updates: 1}"""
    small = """
        # The teacher and one student.
        baseline: dmd
        variants: [teacher, dmd, half-rate]
        evaluation: {captions: 4, noises: 1, batch_size: 4, renderings: 3}"""
    half_rate = """
        # Its first step on every second frame.
        of: dmd
        half_rate_steps: 1"""
    files = {"study": small, "dmd": dmd, "half-rate": half_rate, "avd": None, "interpolator": None}
    study = load_study(write_study(tmp_path / "study", **files))
    place = Workplace(study, tmp_path / "units", ranks)
    for variant in study.variants:
        (values,) = place.do(Unit(variant, 1))["noises"]
        assert 0 < values["first_frame_error"] < 0.1
        assert {"subject_consistency", "start_error"} <= values.keys()
    real = place.do(Unit("reference", 4))["spreads"]
    assert real["first_frame_error"]["mean"] == 0
    assert real["subject_consistency"]["mean"] > 0.9
    controls = place.do(Unit("controls", 4))["controls"]
    # Of their own images: a still keeps its first frame.
    assert controls["frozen"]["first_frame_error"] == pytest.approx(0, abs=1e-3)
    assert controls["erased"]["subject_consistency"] <= 0.5
