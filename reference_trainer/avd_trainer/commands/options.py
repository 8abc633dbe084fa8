"""Options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avd_trainer.config.loading import presets
from avd_trainer.runtime.errors import UserError

if TYPE_CHECKING:
    from avd_trainer.training.config import TrainConfig

PRESET_HELP = f"A preset ({', '.join(presets())}; avd presets says more) or a YAML file."
Preset = Annotated[str, typer.Argument(help=PRESET_HELP)]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for everything that the run writes.")]
Videos = Annotated[Path | None, typer.Option(help="Folder of your own videos, used as the real clips.")]
Method = Annotated[
    str | None, typer.Option(help="Which method's values of the preset: one of those that avd methods lists.")
]
MaxSteps = Annotated[int | None, typer.Option(help="Number of updates, in place of the preset's.")]
Data = Annotated[
    list[Path] | None,
    typer.Option(help="Folder of encoded clips (see avd data), used as the real clips. Repeatable: all are joined."),
]
Prompts = Annotated[
    list[Path] | None,
    typer.Option(
        help="Folder of encoded prompts, in place of the captions of the real clips. Repeatable: all are joined."
    ),
]
Run = Annotated[Path, typer.Argument(help="The --output folder of an avd train run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override one value, e.g. method.regression.weight=0.5. Repeatable."
    ),
]


def train_config(
    preset: str,
    method: str | None,
    videos: Path | None,
    data: list[Path] | None,
    prompts: list[Path] | None,
    max_steps: int | None,
    set_: list[str] | None,
) -> TrainConfig:
    """The configuration of a preset with what options replace in it."""
    overrides = clips_of(videos, data)
    if prompts:
        overrides["prompts"] = {"path": [str(path) for path in prompts]}
    from avd_trainer.config.loading import load_config
    from avd_trainer.training.config import TrainConfig

    return load_config(TrainConfig, preset, overrides_of(set_, max_steps), overrides, method=method)


def clips_of(videos: Path | None, data: list[Path] | None) -> dict[str, Any]:
    """The ``data`` section that ``--videos`` or ``--data`` asks for, if any."""
    if videos is not None and data:
        raise UserError("--videos and --data exclude each other: the real clips are either encoded already or not.")
    if videos is not None:
        return {"data": {"kind": "videos", "path": str(videos)}}
    return shards_of(data) if data else {}


def shards_of(data: list[Path]) -> dict[str, Any]:
    """The ``data`` section of encoded clips."""
    if len({path.resolve() for path in data}) < len(data):
        raise UserError("--data names a folder twice, whose clips would count twice. Pass each folder once.")
    return {"data": {"kind": "shards", "path": [str(path) for path in data]}}


def overrides_of(set_: list[str] | None, max_steps: int | None) -> list[str]:
    """What ``--set`` and ``--max-steps`` override."""
    return [*(set_ or []), *([] if max_steps is None else [f"max_steps={max_steps}"])]


def read_part(text: str) -> tuple[int, int]:
    """``I/N`` of ``--shard`` as numbers.

    Raises:
        UserError: If it is not that.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise UserError(f"--shard {text}: expected I/N with I from 0 to N - 1, such as 0/8 for the first of 8 parts.")
    return int(found[1]), int(found[2])
