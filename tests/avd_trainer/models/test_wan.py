"""The codec and the text encoder against diffusers' own pipeline."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanPipeline
from diffusers.utils.logging import disable_progress_bar
from safetensors.torch import load_file
from torch import Tensor

import tiny_pipeline
from avd_trainer.models.codecs.wan import WanCodec
from avd_trainer.models.text_encoders.umt5 import WanTextEncoder
from avd_trainer.models.weights import load_into, open_weights
from avd_trainer.runtime.errors import UserError

CAPTIONS = ["a red circle moves right", "", " the  blue\n&quot;square&amp;quot; \u201cgoes\u201d up ", "green " * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    disable_progress_bar()
    return tiny_pipeline.build(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> WanPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def codec(folder: Path) -> WanCodec:
    return WanCodec.from_pretrained(str(folder), dtype=torch.float32)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> WanTextEncoder:
    return WanTextEncoder.from_pretrained(str(folder), dtype=torch.float32)


def sample(pipeline: WanPipeline, output: str = "pt", **arguments: Any) -> Tensor:
    return pipeline(
        height=32,
        width=16,
        num_frames=5,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(1),
        output_type=output,
        max_sequence_length=64,
        **arguments,
    ).frames


# --- The tiny pipeline itself


def test_the_tiny_pipeline_is_whole_and_samples(pipeline: WanPipeline) -> None:
    assert type(pipeline) is WanPipeline
    video = sample(pipeline, prompt="a red circle")
    assert video.shape == (1, 5, 3, 32, 16)
    assert video.std() > 0


def test_the_tiny_pipeline_depends_on_its_seed_alone(folder: Path, tmp_path: Path) -> None:
    torch.rand(3)
    state = torch.get_rng_state()
    again = tiny_pipeline.build(tmp_path / "again")
    other = tiny_pipeline.build(tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        assert (again / file).read_bytes() == (folder / file).read_bytes()
        assert any(not torch.equal(v, load_file(folder / file)[k]) for k, v in load_file(other / file).items())


def test_its_transformer_opens_as_weights(folder: Path, pipeline: WanPipeline) -> None:
    with open_weights(str(folder)) as weights:
        other = type(pipeline.transformer).from_config(weights.config)
        load_into(other, weights)
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


# --- The codec


def test_decoding_is_what_the_pipeline_does(codec: WanCodec, pipeline: WanPipeline) -> None:
    latents = sample(pipeline, "latent", prompt="a red circle")
    video = codec.decode(latents)
    torch.testing.assert_close(video.transpose(1, 2), sample(pipeline, prompt="a red circle"))
    assert video.shape == (1, 3, 5, 32, 16)
    assert video.dtype == torch.float32


def test_decoded_values_stay_between_0_and_1(codec: WanCodec) -> None:
    loud = copy.deepcopy(codec)
    loud.vae.decoder.conv_out.weight.data.mul_(100)
    video = loud.decode(torch.randn(1, 16, 2, 2, 2))
    assert video.min() == 0
    assert video.max() == 1


def test_encoding_normalises_the_mode_of_the_posterior(codec: WanCodec, pipeline: WanPipeline) -> None:
    video = torch.rand(2, 3, 9, 32, 16)
    vae = pipeline.vae
    with torch.no_grad():
        modes = torch.cat([vae.encode(2 * clip[None] - 1).latent_dist.mode() for clip in video])
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    latents = codec.encode(video)
    torch.testing.assert_close(latents, (modes - mean) / std)
    assert latents.shape == (2, 16, 3, 4, 2)
    assert latents.dtype == torch.float32


def test_encoding_is_undone_before_the_vae_decodes(codec: WanCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the VAE is handed to decode is what it gave when it encoded."""
    given: list[Tensor] = []
    decode = codec.vae.decode
    monkeypatch.setattr(codec.vae, "decode", lambda z: given.append(z) or decode(z))
    video = torch.rand(1, 3, 5, 16, 16)
    codec.decode(codec.encode(video))
    torch.testing.assert_close(given[0], codec.vae.encode(2 * video - 1).latent_dist.mode())


def test_a_batch_is_taken_one_by_one(codec: WanCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is that of one video."""
    sizes: list[int] = []
    for part in (codec.vae.encoder, codec.vae.decoder):
        forward = part.forward

        def watched(x: Tensor, *args: Any, forward: Any = forward, **kwargs: Any) -> Tensor:
            sizes.append(len(x))
            return forward(x, *args, **kwargs)

        monkeypatch.setattr(part, "forward", watched)
    codec.decode(codec.encode(torch.rand(3, 3, 5, 16, 16)))
    assert sizes == [1] * 12  # three videos of two latent frames, there and back


def test_attributes_are_those_of_wan(codec: WanCodec) -> None:
    assert (codec.temporal_stride, codec.spatial_stride, codec.channels) == (4, 8, 16)


def test_nothing_of_the_codec_trains(codec: WanCodec) -> None:
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    latents = torch.randn(1, 16, 1, 2, 2, requires_grad=True)
    assert not codec.decode(latents).requires_grad
    assert not codec.vae.training


def test_the_codec_computes_in_bfloat16_unless_told(folder: Path, codec: WanCodec) -> None:
    half = WanCodec.from_pretrained(str(folder))
    assert half.vae.dtype == torch.bfloat16
    video = torch.rand(1, 3, 5, 16, 16)
    latents, exact = half.encode(video), codec.encode(video)
    assert latents.dtype == torch.float32
    assert half.decode(latents).dtype == torch.float32
    assert 0 < (latents - exact).abs().max() < 0.05


def test_tiles_are_cut_on_request_only(folder: Path, codec: WanCodec) -> None:
    tiled = WanCodec.from_pretrained(str(folder), dtype=torch.float32, tiling=True)
    small, large = torch.rand(1, 3, 1, 32, 32), torch.rand(1, 3, 1, 272, 16)
    assert torch.equal(tiled.encode(small), codec.encode(small))
    assert not torch.equal(tiled.encode(large), codec.encode(large))
    untiled: AutoencoderKLWan = codec.vae
    assert not untiled.use_tiling


@pytest.mark.parametrize(
    "shape", [(1, 3, 4, 16, 16), (1, 3, 5, 24, 16), (1, 3, 5, 16, 8), (1, 1, 5, 16, 16), (3, 5, 16, 16)]
)
def test_video_of_another_form_is_refused(codec: WanCodec, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="encode needs"):
        codec.encode(torch.zeros(shape))


def test_latents_of_another_form_are_refused(codec: WanCodec) -> None:
    with pytest.raises(ValueError, match=r"shape \[B, 16, F, h, w\], got \[1, 4, 2, 2, 2\]"):
        codec.decode(torch.zeros(1, 4, 2, 2, 2))


# --- The text encoder


def padded(embeddings: Sequence[Tensor], length: int) -> Tensor:
    return torch.stack([torch.cat([e, e.new_zeros(length - len(e), e.shape[1])]) for e in embeddings])


def test_embeddings_are_those_of_the_pipeline(encoder: WanTextEncoder, pipeline: WanPipeline) -> None:
    embeddings = encoder(CAPTIONS)
    with torch.no_grad():
        expected, unconditional = pipeline.encode_prompt(CAPTIONS, max_sequence_length=512)
    torch.testing.assert_close(padded(embeddings, 512), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded(encoder([""]), 512), unconditional[:1], rtol=1e-5, atol=1e-6)


def test_embeddings_hold_the_tokens_in_use(encoder: WanTextEncoder) -> None:
    embeddings = encoder(CAPTIONS)
    assert [len(embedding) for embedding in embeddings][:2] == [6, 1]  # with the end of the text
    for embedding in embeddings:
        assert embedding.dtype == torch.float32
        assert embedding.shape[1] == encoder.dim == 16
        assert embedding.untyped_storage().nbytes() == embedding.nbytes  # not a view that keeps the batch alive
    assert encoder([]) == []


def test_long_captions_are_cut(encoder: WanTextEncoder, pipeline: WanPipeline, folder: Path) -> None:
    assert encoder.length == 512
    (embedding,) = encoder(["red " * 600])
    assert len(embedding) == 512
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt("red " * 600, max_sequence_length=512)
    torch.testing.assert_close(embedding, expected[0], rtol=1e-5, atol=1e-6)


def test_a_caption_means_the_same_in_any_batch(encoder: WanTextEncoder) -> None:
    for caption, embedding in zip(CAPTIONS, encoder(CAPTIONS), strict=True):
        torch.testing.assert_close(encoder([caption])[0], embedding, rtol=1e-5, atol=1e-6)


def test_padding_costs_no_more_than_the_longest_caption(encoder: WanTextEncoder) -> None:
    shapes: list[tuple[int, ...]] = []
    with encoder._encoder.register_forward_pre_hook(lambda _, arguments: shapes.append(tuple(arguments[0].shape))):
        encoder(CAPTIONS[:2])
    assert shapes == [(2, 6)]


def test_the_text_encoder_computes_in_bfloat16_unless_told(folder: Path, encoder: WanTextEncoder) -> None:
    (half,), (exact,) = WanTextEncoder.from_pretrained(str(folder))(CAPTIONS[:1]), encoder(CAPTIONS[:1])
    assert half.dtype == torch.float32
    assert torch.equal(half, half.bfloat16().float())
    assert 0 < (half - exact).abs().max() < 0.1


# --- What goes wrong


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_a_missing_part_is_named(folder: Path, tmp_path: Path, part: str) -> None:
    other = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns(part))
    kind = WanCodec if part == "vae" else WanTextEncoder
    with pytest.raises(UserError, match=rf"the {part} of .*copy cannot be loaded .*holds {part}/"):
        kind.from_pretrained(str(other))


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        (WanCodec, "vae/diffusion_pytorch_model.safetensors"),
        (WanTextEncoder, "text_encoder/model.safetensors"),
        (WanTextEncoder, "tokenizer/tokenizer.json"),
    ],
)
def test_a_damaged_part_is_named(folder: Path, tmp_path: Path, kind: Any, file: str) -> None:
    other = shutil.copytree(folder, tmp_path / "copy")
    (other / file).write_bytes((other / file).read_bytes()[:200])
    with pytest.raises(UserError, match=f"the {file.partition('/')[0]} of .*copy cannot be loaded"):
        kind.from_pretrained(str(other))


def test_pickled_weights_are_not_loaded(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "copy")
    for part, stem in [("vae", "diffusion_pytorch_model"), ("text_encoder", "model")]:
        weights = other / part / f"{stem}.safetensors"
        pickled = {"text_encoder": "pytorch_model.bin", "vae": "diffusion_pytorch_model.bin"}[part]
        torch.save(load_file(weights), other / part / pickled)
        weights.unlink()
    for kind in (WanCodec, WanTextEncoder):
        with pytest.raises(UserError, match="safetensors"):
            kind.from_pretrained(str(other))


def test_without_transformers_the_remedy_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r'pip install "avd-core\[wan\]"'):
        WanTextEncoder.from_pretrained(str(folder))
