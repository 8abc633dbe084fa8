"""What a demo measured: its rows, the real reference and the controls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from avd_trainer.evaluation.controls import CONTROLS, Encoded
from avd_trainer.evaluation.measure_table import Row, markdown_table
from avd_trainer.evaluation.measures import headlines, measure
from avd_trainer.evaluation.reference import Reference, Spread, score
from avd_trainer.runtime.files import write_json

TITLES = {"real": "Real", "teacher": "Teacher", "dmd": "DMD alone", "avd": "AVD"}
"""The rows of a demo, and what they are called."""
STUDENTS = ("dmd", "avd")
GROUPS = 8
"""Parts of the captions, at most, that students are measured on one by one, so that it is known how much captions
scatter. Each has at least two captions of its own, so there are fewer parts of few captions."""


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

    def save(self, path: Path, origin: Mapping[str, Any]) -> None:
        """Write a JSON file, which begins with ``origin``: how the numbers came about, as plain values."""
        reference = {
            "sets": self.reference.sets,
            "clips": self.reference.clips,
            "spreads": {name: asdict(spread) for name, spread in self.reference.spreads.items()},
        }
        numbers = {"rows": self.rows, "reference": reference, "controls": self.controls, "groups": self.groups}
        write_json(path, {**origin, **numbers})

    @classmethod
    def load(cls, path: Path, real: Encoded) -> Findings:
        """Read what :meth:`save` wrote; ``real`` are the reference's clips, which the file has not."""
        saved = json.loads(path.read_text(encoding="utf-8"))
        spreads = {name: Spread(**values) for name, values in saved["reference"].pop("spreads").items()}
        return cls(
            rows=saved["rows"],
            groups=saved["groups"],
            reference=Reference(spreads, real=real, **saved["reference"]),
            controls=saved["controls"],
        )


def measure_rows(
    rows: Mapping[str, Encoded],
    captions: Sequence[str],
    real_captions: Sequence[str],
    reference: Reference,
    controls: Mapping[str, Encoded],
    *,
    of_shapes: bool,
) -> Findings:
    """Measure what models made, and the controls.

    Args:
        rows: Of teacher, dmd and avd: N clips each.
        captions: Of the N clips.
        real_captions: Of the reference's real clips.
        reference: What real clips have.
        controls: Spoiled clips of the same captions.
        of_shapes: Whether captions say all of their clips.
    """

    own = captions if of_shapes else None
    measured = {name: score(clips, own, reference) for name, clips in {**rows, **controls}.items()}

    def of_group(clips: Encoded, group: set[str]) -> dict[str, float]:
        places = [place for place, caption in enumerate(captions) if caption in group]
        real_places = [place for place, caption in enumerate(real_captions) if caption in group]
        return measure(
            clips.latents[places],
            clips.video[places],
            [captions[place] for place in places] if of_shapes else None,
            Encoded(reference.real.latents[real_places], reference.real.video[real_places]),
        )

    groups = _groups(captions)
    return Findings(
        rows={name: measured[name] for name in rows},
        groups={name: [of_group(rows[name], group) for group in groups] for name in STUDENTS},
        reference=reference,
        controls={name: measured[name] for name in controls},
    )


def _groups(captions: Sequence[str]) -> list[set[str]]:
    """Parts of the different captions, as equal as can be; none where there are too few for two.

    Clips of one caption are in one group: they are not independent of each other.
    """
    different = list(dict.fromkeys(captions))
    count = min(GROUPS, len(different) // 2)
    return [set(different[number::count]) for number in range(count)] if count > 1 else []
