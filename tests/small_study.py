"""A study that takes seconds: two runs of two steps, the teacher, and half rate."""

from pathlib import Path

FILES = {
    "study": """
        # Two steps of everything.
        baseline: dmd
        variants: [teacher, dmd, avd, half-rate, interpolator]
        evaluation: {captions: 4, noises: 2, batch_size: 3, renderings: 3}""",
    "teacher": """
        # The teacher in two steps.
        teacher_of: dmd
        steps: 2""",
    "dmd": """
        # Matching alone. A second sentence is of no concern.
        extends: tiny/dmd
        data: {clips: 8}
        max_steps: 2
        batch_size: 2
        method: {few_steps: [1000, 500], online_updates: 1}
        checkpoint: {every: 1}""",
    "avd": """
        # With both terms.
        extends: dmd
        method:
          kind: avd
          motion: {weight: 0.5}""",
    "half-rate": """
        # Students of avd, the first step on every second frame.
        of: avd
        half_rate_steps: 1
        interpolator: interpolator""",
    "interpolator": """
        # Inserts frames.
        extends: tiny/frame_interpolation
        data: {clips: 8}
        max_steps: 2
        batch_size: 2
        method: {widths: [8, 8, 8]}""",
}


def write_study(folder: Path, **changes: str | None) -> str:
    """Write the files of a study, some of them replaced, added or (None) left out; returns its path as a name."""
    folder.mkdir(exist_ok=True)
    for name, text in {**FILES, **changes}.items():
        if text is not None:
            lines = text.strip("\n").splitlines()
            indent = len(lines[0]) - len(lines[0].lstrip())
            (folder / f"{name}.yaml").write_text("\n".join(line[indent:] for line in lines) + "\n")
    return str(folder)
