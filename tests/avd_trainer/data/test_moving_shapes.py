import pytest
import torch

from avd_trainer.data.moving_shapes import BACKGROUND_COLORS, DIRECTIONS, SHAPE_COLORS, MovingShapes


def test_a_clip_depends_on_seed_and_index_alone() -> None:
    first, again = MovingShapes(5, seed=3), MovingShapes(9, seed=3)
    assert torch.equal(first[4].video, again[4].video)
    assert first[4].caption == again[4].caption


def test_no_two_clips_are_the_same_within_or_across_seeds() -> None:
    videos = [MovingShapes(20, seed=seed)[index].video for seed in (0, 1, 2) for index in range(20)]
    different = {tuple(video[:, ::8, ::8, ::8].flatten().tolist()) for video in videos}
    assert len(different) == len(videos)


@pytest.mark.parametrize("index", range(12))
def test_the_ground_truth_says_what_is_in_the_picture(index: int) -> None:
    clip = MovingShapes(12, seed=0)[index]
    front = clip.tracks[-1]
    color = torch.tensor(SHAPE_COLORS[front.color])
    for frame in (0, 16, 32):
        x, y = front.positions[frame]
        assert torch.allclose(clip.video[:, frame, int(y), int(x)], color, atol=1e-6)
    corner_is_background = torch.tensor(BACKGROUND_COLORS[clip.background])
    covered = (clip.video[:, 0] - corner_is_background.view(3, 1, 1)).abs().amax(0) > 1e-6
    assert 0.01 < covered.float().mean() < 0.4


def test_the_caption_names_shapes_colours_directions_and_background() -> None:
    clip = MovingShapes(1, seed=5)[0]
    for track in clip.tracks:
        assert f"{track.color} {track.kind} moving {track.direction}" in clip.caption
    assert clip.caption.endswith(f"on a {clip.background} background")


@pytest.mark.parametrize("index", range(12))
def test_shapes_set_out_in_their_direction_and_stay_inside(index: int) -> None:
    clip = MovingShapes(12, seed=7)[index]
    for track in clip.tracks:
        assert track.positions.min() >= track.radius - 1e-3
        assert track.positions.max() <= 64 - track.radius + 1e-3
        step = track.positions[1] - track.positions[0]
        wanted = torch.tensor(DIRECTIONS[track.direction])
        touches_wall = (track.positions[:2] - track.radius < 2).any() or (
            64 - track.radius - track.positions[:2] < 2
        ).any()
        assert touches_wall or torch.dot(step, wanted) > 0.5
        assert torch.equal(step[wanted == 0], torch.zeros(1))


def test_video_has_the_documented_form() -> None:
    video = MovingShapes(1, seed=0, frames=9, size=32)[0].video
    assert video.shape == (3, 9, 32, 32)
    assert video.dtype == torch.float32
    assert video.min() >= 0
    assert video.max() <= 1


def test_wrong_sizes_and_indices_are_refused() -> None:
    with pytest.raises(ValueError, match="size >= 16, got 1, 33 and 8"):
        MovingShapes(1, seed=0, size=8)
    with pytest.raises(IndexError, match="clip 2 of a data set of 2"):
        MovingShapes(2, seed=0)[2]
