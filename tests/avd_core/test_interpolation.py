import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from avd_core import LatentFrameInterpolator, interpolate_linearly, repeat_frames
from avd_core.interpolation import CONFIG_FILE, WEIGHTS_FILE


@pytest.fixture
def interpolator() -> LatentFrameInterpolator:
    return trained()


def trained(channels: int = 4, widths: tuple[int, ...] = (8, 16, 24), **options: Any) -> LatentFrameInterpolator:
    """One whose output is not zero, as it is before training."""
    torch.manual_seed(0)
    network = LatentFrameInterpolator(channels, widths, **options)
    nn.init.normal_(network.output.weight, std=0.5)
    nn.init.normal_(network.output.bias)
    return network


def clips(batch: int = 2, frames: int = 5, height: int = 8, width: int = 12, channels: int = 4) -> Tensor:
    return torch.randn(batch, channels, frames, height, width, generator=torch.Generator().manual_seed(3))


# --- What it computes


def test_it_starts_at_linear_interpolation() -> None:
    latents = clips()
    torch.testing.assert_close(LatentFrameInterpolator(4)(latents), interpolate_linearly(latents))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 7), st.integers(4, 11), st.integers(4, 11))
def test_any_length_and_size(frames: int, height: int, width: int) -> None:
    latents = clips(1, frames, height, width)
    result = trained()(latents)
    assert result.shape == (1, 4, 2 * frames - 1, height, width)
    assert torch.equal(result[:, :, ::2], latents)
    assert result.isfinite().all()


def test_what_lies_between_depends_on_both_neighbours_and_no_others(interpolator: LatentFrameInterpolator) -> None:
    latents = clips().requires_grad_()
    interpolator(latents)[:, :, 3].sum().backward()
    touched = latents.grad.abs().amax(dim=(0, 1, 3, 4)) > 0
    assert touched.tolist() == [False, True, True, False, False]


def test_the_order_of_the_two_frames_matters(interpolator: LatentFrameInterpolator) -> None:
    latents = clips(frames=2)
    assert not torch.allclose(interpolator(latents)[:, :, 1], interpolator(latents.flip(2))[:, :, 1])


def test_padding_leaves_sizes_that_four_divides_alone(interpolator: LatentFrameInterpolator) -> None:
    """And adds only what is cut again: the network sees the edge repeated."""
    latents = clips(height=6, width=10)
    padded = nn.functional.pad(latents.flatten(0, 1), (0, 2, 0, 2), mode="replicate").unflatten(0, (2, 4))
    torch.testing.assert_close(interpolator(latents), interpolator(padded)[..., :6, :10])


def test_training_and_evaluation_mode_are_the_same(interpolator: LatentFrameInterpolator) -> None:
    latents = clips()
    assert torch.equal(interpolator.train()(latents), interpolator.eval()(latents))


def test_the_batch_does_not_matter(interpolator: LatentFrameInterpolator) -> None:
    latents = clips(batch=5)
    together = interpolator(latents)
    for row in range(5):
        torch.testing.assert_close(interpolator(latents[row : row + 1]), together[row : row + 1])
    swapped = interpolator(torch.cat([latents[:1], 100 * latents[1:]]))
    torch.testing.assert_close(swapped[:1], together[:1])


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_chunks_change_nothing(chunk_size: int) -> None:
    latents = clips()
    torch.testing.assert_close(trained(chunk_size=chunk_size)(latents), trained()(latents))


def test_chunks_bound_what_the_network_takes_at_once() -> None:
    network, seen = trained(chunk_size=3), []
    network.encoder_outer.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    network(clips(batch=2, frames=5))
    assert seen == [3, 3, 2]


def test_all_pairs_go_in_one_batch_without_chunks(interpolator: LatentFrameInterpolator) -> None:
    seen = []
    interpolator.encoder_outer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    interpolator(clips(batch=2, frames=5))
    assert seen == [(8, 8, 8, 12)]


def test_on_the_cpu_chunks_stay_small_by_default(interpolator: LatentFrameInterpolator) -> None:
    """Five pairs of Wan's 60 x 104; a single one where a frame alone is larger than that."""
    seen = []
    interpolator.encoder_outer.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    interpolator(clips(batch=1, frames=8, height=60, width=104))
    interpolator(clips(batch=1, frames=3, height=180, width=184))
    assert seen == [5, 2, 1, 1]


def test_a_network_in_half_precision_leaves_the_mean_alone() -> None:
    """It starts at linear interpolation, in float32 too."""
    latents = clips()
    torch.testing.assert_close(LatentFrameInterpolator(4).bfloat16()(latents), interpolate_linearly(latents))


def test_three_levels(interpolator: LatentFrameInterpolator) -> None:
    sizes = []
    for name in ("encoder_outer", "encoder_middle", "encoder_inner", "decoder_middle", "decoder_outer"):
        getattr(interpolator, name).register_forward_hook(lambda m, a, out: sizes.append(tuple(out.shape[1:])))
    interpolator(clips())
    assert sizes == [(8, 8, 12), (16, 4, 6), (24, 2, 3), (16, 4, 6), (8, 8, 12)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kept_frames_are_bit_identical_in_any_dtype(interpolator: LatentFrameInterpolator, dtype: torch.dtype) -> None:
    """Also where the network computes in another."""
    latents = clips().to(dtype)
    for weights in (torch.float32, torch.bfloat16):
        result = interpolator.to(weights)(latents)
        assert result.dtype == dtype
        assert torch.equal(result[:, :, ::2], latents)


def test_it_learns_what_is_not_linear() -> None:
    """A frame between two that is their product: no linear interpolation knows it."""
    torch.manual_seed(0)
    network = LatentFrameInterpolator(2, (8, 16, 24))
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        ends = torch.rand(16, 2, 2, 8, 8) + 0.5
        middle = network(ends)[:, :, 1]
        loss = nn.functional.mse_loss(middle, ends[:, :, 0] * ends[:, :, 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- Files


def test_saved_and_loaded_it_is_the_same(interpolator: LatentFrameInterpolator, tmp_path: Path) -> None:
    interpolator.save_pretrained(tmp_path / "new" / "interpolator")
    loaded = LatentFrameInterpolator.from_pretrained(tmp_path / "new" / "interpolator", chunk_size=2)
    assert (loaded.channels, loaded.widths, loaded.chunk_size) == (4, (8, 16, 24), 2)
    assert not loaded.training
    for name, value in interpolator.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    torch.testing.assert_close(loaded(clips()), interpolator(clips()))


def test_files_are_laid_out_as_diffusers_does(interpolator: LatentFrameInterpolator, tmp_path: Path) -> None:
    interpolator.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config == {"_class_name": "LatentFrameInterpolator", "channels": 4, "widths": [8, 16, 24]}
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        assert set(file.keys()) == set(interpolator.state_dict())


def _remove_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()


def _remove_config(folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()


@pytest.mark.parametrize("damage", [_remove_weights, _remove_config, shutil.rmtree])
def test_missing_files_are_named(
    interpolator: LatentFrameInterpolator, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    interpolator.save_pretrained(tmp_path / "it")
    damage(tmp_path / "it")
    with pytest.raises(FileNotFoundError, match=r"config.json|safetensors"):
        LatentFrameInterpolator.from_pretrained(tmp_path / "it")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (CONFIG_FILE, b"{"),
        (CONFIG_FILE, b"[]"),
        (CONFIG_FILE, b'{"channels": 4}'),
        (CONFIG_FILE, b'{"channels": 8, "widths": [8, 16, 24]}'),
        (CONFIG_FILE, b'{"channels": 4, "widths": 8}'),
        (WEIGHTS_FILE, b"torn"),
    ],
)
def test_damaged_files_are_refused(
    interpolator: LatentFrameInterpolator, tmp_path: Path, file: str, content: bytes
) -> None:
    interpolator.save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match="holds no LatentFrameInterpolator"):
        LatentFrameInterpolator.from_pretrained(tmp_path)


# --- The simple ones


def test_linear_interpolation_and_repetition_by_hand() -> None:
    latents = torch.tensor([1.0, 3.0, -2.0]).view(1, 1, 3, 1, 1)
    assert interpolate_linearly(latents).flatten().tolist() == [1.0, 2.0, 3.0, 0.5, -2.0]
    assert repeat_frames(latents).flatten().tolist() == [1.0, 1.0, 3.0, 3.0, -2.0]


# --- Wrong input


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 5, 8, 8), "4 channels"),
        ((4, 5, 8, 8), "B, 4, F, H, W"),
        ((1, 4, 1, 8, 8), "one frame"),
        ((1, 4, 5, 3, 8), "at least 4"),
        ((1, 4, 5, 8, 2), "at least 4"),
        ((0, 4, 5, 8, 8), "not be empty"),
    ],
)
def test_latents_that_do_not_fit_are_refused(
    interpolator: LatentFrameInterpolator, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        interpolator(torch.zeros(shape))


def test_integers_are_refused(interpolator: LatentFrameInterpolator) -> None:
    with pytest.raises(TypeError, match="floating"):
        interpolator(clips().long())


@pytest.mark.parametrize(
    "options",
    [{"channels": 0}, {"widths": (32, 64)}, {"widths": (32, 64, 100)}, {"widths": (0, 8, 8)}, {"chunk_size": 0}],
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LatentFrameInterpolator(**options)
