import pytest
import torch

from avd_trainer.evaluation.first_frame import first_frame_error


def test_it_is_the_root_mean_square_of_first_frames_alone() -> None:
    video, images = torch.full((2, 3, 5, 4, 4), 0.5), torch.full((2, 3, 4, 4), 0.5)
    video[:, :, 1:] = 0.0
    assert first_frame_error(video, images) == 0
    images[0] = 0.9
    assert first_frame_error(video, images) == pytest.approx((0.4**2 / 2) ** 0.5)
    video[:, :, 0], images[:] = 1.7, 1.0  # no screen shows more than white
    assert first_frame_error(video, images) == 0


@pytest.mark.parametrize(("video", "images"), [((2, 3, 5, 4, 4), (3, 3, 4, 4)), ((0, 3, 5, 4, 4), (0, 3, 4, 4))])
def test_images_of_other_clips_are_refused(video: tuple[int, ...], images: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"an image .* for each clip are expected"):
        first_frame_error(torch.zeros(video), torch.zeros(images))
