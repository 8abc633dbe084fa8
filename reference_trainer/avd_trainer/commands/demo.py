"""``avd demo``: two students side by side."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from avd_trainer.commands.options import MaxSteps, Overrides, Videos, clips_of, overrides_of
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.terminal import readable_errors, say
from avd_trainer.runtime.threads import describe_threads


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything that the demo writes.")],
    videos: Videos = None,
    max_steps: MaxSteps = None,
    set_: Overrides = None,
    blind: Annotated[
        bool, typer.Option("--blind", help="Of a finished demo: write pairs of clips without names, to judge by eye.")
    ] = False,
    blind_seed: Annotated[
        int | None, typer.Option(min=0, help="With --blind: which clips are shown, and which model at which side.")
    ] = None,
) -> None:
    """Distil two tiny students, by DMD alone and with AVD, and compare them in pictures and numbers.

    One that was stopped goes on by the same command.
    """
    with readable_errors():
        if blind:
            if videos is not None or max_steps is not None or set_:
                raise UserError("--blind shows the clips of a finished demo, so it goes with --output alone.")
            from avd_trainer.studies.demo import write_blind_pairs

            page = write_blind_pairs(output, blind_seed or 0)
            say(f"Open {page} in a browser. The same pairs as pictures: {output}/blind, with the key beside them.")
            return
        if blind_seed is not None:
            raise UserError("--blind-seed is about the pairs of --blind. Pass both, or --set seed=... for training.")
        import torch

        from avd_trainer.config.loading import load_config
        from avd_trainer.runtime.ranks import join_ranks
        from avd_trainer.studies.demo import ANIMATION, METRICS, REPORT, VERDICT, DemoConfig, run_demo
        from avd_trainer.studies.findings import STUDENTS
        from avd_trainer.studies.verdict import render_verdict

        own = {} if videos is None else {**clips_of(videos, None), "calibrate": _to_calibrate(set_ or [])}
        config = load_config(DemoConfig, "tiny", overrides_of(set_, max_steps), own)
        with join_ranks() as ranks:
            jobs = 1
            if ranks.device.type == "cpu":
                say(describe_threads())
                jobs = min(torch.get_num_threads(), len(STUDENTS))  # so small a model gains little by a second thread
            command = _command(videos, max_steps, set_ or [])
            findings = run_demo(config, output, ranks, jobs=jobs, command=command)
        if findings is None:
            say(f"Stopped on request, saved in {output}. Run the same command again to go on.")
            return
        say(render_verdict(findings))
        say(f"Look at {output / ANIMATION} first, then {output / REPORT}. Numbers: {output / VERDICT} and {METRICS}.")
        say(f"To judge by eye without knowing which is which: avd demo --blind --output {output}")


def _command(videos: Path | None, max_steps: int | None, overrides: list[str]) -> str:
    """What would do it again, in the shell's words."""
    words = ["avd", "demo", "--output", "DIR"]
    words += [] if videos is None else ["--videos", str(videos)]
    words += [] if max_steps is None else ["--max-steps", str(max_steps)]
    return shlex.join([*words, *(word for override in overrides for word in ("--set", override))])


def _to_calibrate(overrides: list[str]) -> list[str]:
    """What the user's clips decide: values that were chosen for others, unless the user has set them."""
    values = {
        "floor": ("method.motion.floor",),
        "sharpness": ("method.regression.deviation", "method.regression.sharpness"),
    }
    given = tuple(override.partition("=")[0] for override in overrides)
    # Whoever sets a whole section has set what is in it.
    return [
        part
        for part, keys in values.items()
        if not any(key == own or key.startswith(f"{own}.") for key in keys for own in given)
    ]
