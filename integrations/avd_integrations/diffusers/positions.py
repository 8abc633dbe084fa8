"""Where a clip's frames are, to Wan's transformer: its rotary embedding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from diffusers import WanTransformer3DModel


@contextmanager
def frame_positions(transformer: WanTransformer3DModel, positions: Sequence[int]) -> Iterator[None]:
    """Give the frames of a clip other places in a transformer's rotary embedding.

    Inside, the transformer takes the frame ``i`` of a clip to be at ``positions[i]``. So a clip at half rate can keep
    the places that its frames have in the whole one.

    Args:
        transformer: Of Wan, with one latent frame per token.
        positions: As many as the clips will have frames; each in ``[0, rope_max_seq_len)``.

    Raises:
        ValueError: If the transformer has no such place, or its tokens have several frames.

    Example:
        ::

            with frame_positions(transformer, kept_frames(21, rate=2)):
                velocity = transformer(latents[:, :, ::2], timesteps, captions).sample
    """
    check_positions(transformer, positions)
    rope, rows = transformer.rope, len(positions)
    temporal = rope.attention_head_dim - 4 * (rope.attention_head_dim // 6)  # the rest is of height and width
    before = {name: getattr(rope, name)[:rows, :temporal].clone() for name in ("freqs_cos", "freqs_sin")}
    try:
        for name in before:
            # In place, since compiled graphs and offloading hold on to the tensors themselves.
            table = getattr(rope, name)
            table[:rows, :temporal] = table[list(positions), :temporal]
        yield
    finally:
        for name, values in before.items():
            getattr(rope, name)[:rows, :temporal] = values


def check_positions(transformer: WanTransformer3DModel, positions: Sequence[int]) -> None:
    """Raise what :func:`frame_positions` would."""
    frames_per_token = transformer.config.patch_size[0]
    if frames_per_token != 1:
        raise ValueError(
            f"This transformer has {frames_per_token} frames in a token, which have one place between them. Use "
            "consecutive positions."
        )
    places = transformer.rope.max_seq_len
    if min(positions) < 0 or max(positions) >= places:
        raise ValueError(
            f"positions must be from 0 to {places - 1}, the last place of this transformer's rotary embedding, got "
            f"{min(positions)} to {max(positions)}. Use consecutive positions, or generate fewer frames."
        )
