"""Names of a transformer's weights in each layout, and the architecture that their shapes tell."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from avd_trainer.runtime.errors import UserError

HEAD_DIM = 128
"""Width of an attention head in every released Wan model."""
UNDERSTOOD = (
    "Pass 'bundled:tiny', a folder of diffusers or of Wan2.1 (config.json and safetensors), a .safetensors or .pt "
    "file, or a Hugging Face name such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
)


class StoredTensor(Protocol):
    """A tensor in a file. A memory-mapped tensor is one, too."""

    @property
    def shape(self) -> Iterable[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, slices: Any, /) -> Tensor: ...


def diffusers_names(names: Iterable[str], source: str) -> dict[str, str]:
    """Which stored tensor each of diffusers' names stands for.

    Args:
        names: Names as stored: diffusers' or the original ones, also behind the prefixes that FSDP, DDP,
            ``torch.compile``, activation checkpointing and wrapper modules add.
        source: What they come from, for messages.

    Raises:
        UserError: If they are not those of a Wan transformer.
    """
    bare = {_bare(name): name for name in names}
    if any(".attn1." in name for name in bare):
        return bare
    if not any(".self_attn." in name for name in bare):
        raise UserError(
            f"{source} holds no Wan transformer: expected names such as blocks.0.self_attn.q.weight, got "
            f"{some_of(sorted(bare))}. Pass the transformer's own file or folder."
        )
    # Semi-private in diffusers: should it go one day, the other layouts are still read.
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    # It renames the keys of a state dict and leaves its values alone, so each name travels as its own value.
    return {new: bare[old] for new, old in convert_wan_transformer_to_diffusers({name: name for name in bare}).items()}


def original_names(names: Iterable[str]) -> dict[str, str]:
    """Wan2.1's own name for each of diffusers' names, the inverse of :func:`diffusers_names`.

    Args:
        names: Of weights and biases of a ``WanTransformer3DModel``, such as ``blocks.0.attn1.to_q.weight``.
    """
    return {name: _original_name(name) for name in names}


def infer_config(source: str, original: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The configuration by the tensors' shapes, which Wan2.1's own config.json leaves out in part, and its heads."""
    try:
        dim, channels, *patch = tensors["patch_embedding.weight"].shape
        _, freq_dim = tensors["condition_embedder.time_embedder.linear_1.weight"].shape
        _, text_dim = tensors["condition_embedder.text_embedder.linear_1.weight"].shape
        ffn_dim, _ = tensors["blocks.0.ffn.net.0.proj.weight"].shape
        out, _ = tensors["proj_out.weight"].shape
    except (KeyError, ValueError) as error:
        raise UserError(f"{source} is not a whole Wan transformer: {error} is missing or has another rank.") from error
    heads = original.get("num_heads") or (0 if dim % HEAD_DIM else dim // HEAD_DIM)
    if not heads or dim % heads:
        raise UserError(
            f"{source}: a width of {dim} does not divide into heads of {HEAD_DIM} as Wan's do. Pass the configuration "
            "of the model it was trained from."
        )
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": channels,
        "out_channels": out // math.prod(patch),
        "text_dim": text_dim,
        "freq_dim": freq_dim,
        "ffn_dim": ffn_dim,
        "num_layers": 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
        "cross_attn_norm": "blocks.0.norm2.weight" in tensors,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.attn1.norm_q.weight" in tensors else None,
        "eps": original.get("eps", 1e-6),
        **_image_config(tensors),
    }


# diffusers' name and Wan2.1's, the first that fits at each place; only a block's norm of cross-attention has weights.
_ORIGINAL = (
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    (r"^proj_out\.", "head.head."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"\.scale_shift_table$", ".modulation"),
    (r"\.norm2\.", ".norm3."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.add_([kv])_proj\.", r".\1_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
)


def _original_name(name: str) -> str:
    for pattern, original in _ORIGINAL:
        name = re.sub(pattern, original, name)
    return name


def _image_config(tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """What image-to-video models of Wan2.1 have besides input channels; nothing of others."""
    norm = tensors.get("condition_embedder.image_embedder.norm1.weight")
    keys = tensors.get("blocks.0.attn2.add_k_proj.weight")
    if norm is None or keys is None:
        return {}
    (image_dim,), (_, added_kv_proj_dim) = norm.shape, keys.shape
    return {"image_dim": image_dim, "added_kv_proj_dim": added_kv_proj_dim}


def _bare(name: str) -> str:
    """A parameter's name without what wrappers add to it."""
    name = re.sub(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.", "", name)
    return re.sub(r"^((base_model|model|module|diffusion_model)\.)+", "", name)


def some_of(items: Iterable[str], separator: str = ", ") -> str:
    """The first three, and how many more there are."""
    items = list(items)
    return separator.join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
