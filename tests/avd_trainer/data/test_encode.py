from pathlib import Path

import av
import numpy as np
import pytest
import torch

from avd_trainer.data.decoding import fit
from avd_trainer.data.encode import WAN_NEGATIVE_PROMPT, ClipFormat, HashTextEncoder, encode_prompts
from avd_trainer.data.preparation.encoding import encode_recipe
from avd_trainer.data.shard_reading import ShardDataset
from avd_trainer.data.videos import decode_frames
from avd_trainer.models.text_encoders.hashed import HashTextEmbedding
from avd_trainer.runtime.errors import UserError
from small_videos import numbers_of, write_video

TEXT = HashTextEncoder(8, 4)


FORMAT = ClipFormat(frames=9, height=32, width=48, fps=16)


@pytest.mark.parametrize(
    ("rate", "fps", "numbers"),
    [
        (16, 16, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        (48, 16, [0, 3, 6, 9]),
        (24, 16, [0, 1, 3, 4, 6, 7, 9, 10]),
        (8, 16, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11]),
        (16, None, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_motion_keeps_its_speed_at_another_frame_rate(
    tmp_path: Path, rate: int, fps: float | None, numbers: list[int], suffix: str
) -> None:
    path = write_video(tmp_path / f"clip.{suffix}", 12, rate=rate, step=16)
    assert numbers_of(torch.stack(list(decode_frames(path, 32, 32, fps))), step=16) == numbers


def test_frames_are_covered_and_their_centre_is_cut_out(tmp_path: Path) -> None:
    """Three vertical stripes, 96 x 32: a cut of 32 x 48 shows the middle one and half of each neighbour."""
    with av.open(tmp_path / "stripes.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=16)
        stream.width, stream.height, stream.pix_fmt = 96, 32, "yuv420p"
        pixels = np.zeros((32, 96, 3), dtype=np.uint8)
        pixels[:, :32, 0], pixels[:, 32:64, 1], pixels[:, 64:, 2] = 255, 255, 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    (frame,) = decode_frames(tmp_path / "stripes.mp4", 32, 48)
    assert frame.shape == (3, 32, 48)
    brightest = frame.float().mean(1).argmax(0)
    assert brightest[:6].tolist() == [0] * 6
    assert brightest[10:38].tolist() == [1] * 28
    assert brightest[42:].tolist() == [2] * 6


def test_an_upright_video_that_is_stored_sideways_is_turned_first() -> None:
    class Sideways:
        """A frame of 64 x 32 pixels, to be turned by 90 degrees."""

        width, height, rotation = 64, 32, 90

    class Resized:
        """White on its right, which comes above, and black on its left."""

        def reformat(self, _: Sideways, width: int, height: int, **__: object) -> "Resized":
            assert width / height == pytest.approx(2, abs=0.1)
            self.pixels = np.zeros((height, width, 3), dtype=np.uint8)
            self.pixels[:, width // 2 :] = 255
            return self

        def to_ndarray(self) -> np.ndarray:
            return self.pixels

    frame = fit(Sideways(), 48, 32, Resized())  # type: ignore[arg-type]
    assert frame.shape == (48, 32, 3)
    assert (frame[:24] == 255).all()
    assert (frame[24:] == 0).all()


@pytest.mark.parametrize(
    "wrong",
    [
        FORMAT._replace(frames=8),
        FORMAT._replace(frames=1),
        FORMAT._replace(height=20),
        FORMAT._replace(width=44),
        FORMAT._replace(width=0),
        FORMAT._replace(fps=0.0),
    ],
)
def test_sizes_that_the_model_cannot_take_are_an_error(wrong: ClipFormat) -> None:
    with pytest.raises(UserError, match=r"block DCT need 1 \+ 4 n frames .* ones are 17, 32, 32 and 16"):
        encode_recipe("tiny", wrong)


def test_wan_takes_larger_steps_of_size_than_the_tiny_preset() -> None:
    narrow = FORMAT._replace(width=40)
    narrow.check("block-dct-4")
    with pytest.raises(UserError, match=r"Wan's VAE need .* multiples of 16, .* ones are 81, 480, 832 and 16"):
        narrow.check("wan")


def test_prompts_become_a_data_set_without_latents(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffA dog.\n\n  Ein größerer Hund  \n" + "\n".join(f"prompt {n}" for n in range(10)), "utf-8")
    calls: list[int] = []
    assert encode_prompts(file, tmp_path / "data", TEXT, "blurred", lambda: calls.append(1)) == len(calls) == 12
    dataset = ShardDataset(tmp_path / "data")
    assert not dataset.has_latents
    assert [dataset[row].caption for row in (0, 1, 11)] == ["A dog.", "Ein größerer Hund", "prompt 9"]
    assert dataset[1].source == "prompts.txt, line 3"
    torch.testing.assert_close(dataset[11].text[:2], TEXT(["prompt 9"])[0])
    assert dataset.unconditional_prompt() == "blurred"
    torch.testing.assert_close(dataset.unconditional()[:1], TEXT(["blurred"])[0])


def test_a_file_without_prompts_is_an_error(tmp_path: Path) -> None:
    for content, message in ((b"\n \n", "holds no prompts"), (b"\xff\xfe\x00", "cannot be read")):
        (tmp_path / "prompts.txt").write_bytes(content)
        with pytest.raises(UserError, match=f"prompts.txt {message}"):
            encode_prompts(tmp_path / "prompts.txt", tmp_path / "data", TEXT, "")
    with pytest.raises(UserError, match="cannot be read"):
        encode_prompts(tmp_path / "missing.txt", tmp_path / "data", TEXT, "")


def test_hashed_words_are_those_of_the_tiny_preset_without_padding() -> None:
    captions = ["", "one", "a b c d e f g h i j"]
    tokens = TEXT(captions)
    assert [len(embedding) for embedding in tokens] == [0, 1, 8]
    for embedding, padded in zip(tokens, HashTextEmbedding(8, 4)(captions), strict=True):
        torch.testing.assert_close(embedding, padded[: len(embedding)], rtol=0, atol=0)
        assert not padded[len(embedding) :].any()


def test_the_negative_prompt_is_wans() -> None:
    """Its length and its ends, by which one would notice a lost line."""
    assert len(WAN_NEGATIVE_PROMPT) == 137
    assert WAN_NEGATIVE_PROMPT.startswith("色调艳丽")
    assert WAN_NEGATIVE_PROMPT.endswith("倒着走")
