"""The clips of a demo: one file with the latents of all rows, and their captions."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CAPTIONS = "captions"
ROWS = "rows"


@dataclass(frozen=True)
class DemoClips:
    """Real and generated clips of the same captions.

    Attributes:
        captions: N of them.
        latents: Per row ``[N, C, F, h, w]``, in the order of the captions.
    """

    captions: Sequence[str]
    latents: Mapping[str, Tensor]

    def save(self, path: Path) -> None:
        """Write a safetensors file that is either whole or not there."""
        part = path.with_name(path.name + ".part")
        tensors = {name: latents.contiguous() for name, latents in self.latents.items()}
        metadata = {CAPTIONS: json.dumps(list(self.captions)), ROWS: json.dumps(list(tensors))}
        save_file(tensors, part, metadata=metadata)
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path) -> DemoClips:
        """Read what :meth:`save` wrote."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            # The file has its tensors in another order.
            latents = {name: file.get_tensor(name) for name in json.loads(metadata[ROWS])}
        return cls(json.loads(metadata[CAPTIONS]), latents)
