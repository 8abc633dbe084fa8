"""What a run says of its training: means of its metrics, and what its monitors found that no clip shows."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from avd_trainer.runtime.files import read_json
from avd_trainer.studies.monitoring import SIGNS
from avd_trainer.training.metrics_log import METRICS_FILE
from avd_trainer.training.run import FINDINGS

LAST = 20
"""Steps whose mean stands for the end of a run."""


def read_training(run: Path) -> dict[str, Any]:
    """Read the metrics and the findings of a run.

    Args:
        run: Its folder.

    Returns:
        ``means``: of each metric that is one number a step, the mean over ``all`` steps that have it and over the
        ``last`` 20 of these; steps where it is not finite are left out. ``findings``: kinds of what the monitors found
        besides what :func:`avd_trainer.studies.monitoring.read_findings` gives, for example of the discriminator, each
        once, the first one first; None where nobody looked.
    """
    series: dict[str, list[float]] = defaultdict(list)
    with (run / METRICS_FILE).open() as lines:
        for line in lines:
            for name, value in json.loads(line).items():
                if isinstance(value, int | float) and math.isfinite(value) and name != "step":
                    series[name].append(value)
    means = {name: {"all": fmean(values), "last": fmean(values[-LAST:])} for name, values in series.items()}
    said = read_json(run / FINDINGS)["findings"] if (run / FINDINGS).exists() else None
    kinds = None if said is None else [kind for each in said if (kind := each["kind"]) not in SIGNS]
    return {"means": means, "findings": None if kinds is None else list(dict.fromkeys(kinds))}
