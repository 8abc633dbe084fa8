"""What a demo measured: its rows, the real reference and the controls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from avd_trainer.evaluation.controls import CONTROLS, Encoded
from avd_trainer.evaluation.measure_table import Row, markdown_table
from avd_trainer.evaluation.measures import headlines, measure
from avd_trainer.evaluation.reference import Reference, Spread
from avd_trainer.runtime.files import write_json

TITLES = {"real": "Real", "teacher": "Teacher", "dmd": "DMD alone", "avd": "AVD"}
"""The rows of a demo, and what they are called."""
STUDENTS = ("dmd", "avd")
GROUPS = 8
"""Parts of the captions that students are measured on one by one, so that it is known how much captions scatter."""


@dataclass(frozen=True)
class Findings:
    """The numbers of a demo.

    Attributes:
        rows: Of teacher, dmd and avd, then by measure.
        groups: Of dmd and avd, then by group of captions, then by measure.
        reference: What real clips have.
        controls: By name of the control, then by measure.
    """

    rows: Mapping[str, Mapping[str, float]]
    groups: Mapping[str, Sequence[Mapping[str, float]]]
    reference: Reference
    controls: Mapping[str, Mapping[str, float]]

    @property
    def headlines(self) -> list[str]:
        """The measures that the demo is judged by."""
        return headlines(self.reference.spreads)

    @property
    def table(self) -> str:
        """All rows and controls, in Markdown."""
        return markdown_table(
            [Row(TITLES[name], values) for name, values in self.rows.items()],
            self.reference,
            [Row(CONTROLS[name].title, values) for name, values in self.controls.items()],
        )

    def save(self, path: Path) -> None:
        """Write a JSON file."""
        reference = {
            "sets": self.reference.sets,
            "clips": self.reference.clips,
            "spreads": {name: asdict(spread) for name, spread in self.reference.spreads.items()},
        }
        write_json(path, {"rows": self.rows, "reference": reference, "controls": self.controls, "groups": self.groups})

    @classmethod
    def load(cls, path: Path, real: Tensor) -> Findings:
        """Read what :meth:`save` wrote; ``real`` are the reference's clips, which the file has not."""
        saved = json.loads(path.read_text(encoding="utf-8"))
        spreads = {name: Spread(**values) for name, values in saved["reference"].pop("spreads").items()}
        return cls(**saved | {"reference": Reference(spreads, real=real, **saved["reference"])})


def measure_rows(
    rows: Mapping[str, Encoded],
    captions: Sequence[str] | None,
    reference: Reference,
    controls: Mapping[str, Encoded],
) -> Findings:
    """Measure what models made, and the controls.

    Args:
        rows: Of teacher, dmd and avd: N clips each.
        captions: Of the N clips, where they are of moving shapes.
        reference: What real clips have.
        controls: Spoiled clips of the same captions.
    """

    def values(clips: Encoded, part: slice = slice(None)) -> dict[str, float]:
        own = None if captions is None else captions[part]
        return measure(clips.latents[part], clips.video[part], own, reference.real)

    measured = {name: values(clips) for name, clips in {**rows, **controls}.items()}
    count = len(rows["avd"].latents)
    size = max(2, count // GROUPS)
    parts = [slice(first, first + size) for first in range(0, count - size + 1, size)]
    return Findings(
        rows={name: measured[name] for name in rows},
        groups={name: [values(rows[name], part) for part in parts] for name in STUDENTS},
        reference=reference,
        controls={name: measured[name] for name in controls},
    )
