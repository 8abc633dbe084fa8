"""How often SpectralRolloffMonitor is wrong: on real clips, on good students, and on clips that were spoiled.

    .venv/bin/python benchmarks/rolloff_alarms.py runs/table2/units/*/run

Writes benchmarks/results/rolloff-alarms.json: the monitor's two signals, in standard deviations of single real clips,
and the findings at its default margins. Each finished run that is named has its student sampled in its own few steps.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from avd_core import SpectralRolloffMonitor, SpectralStatistics
from avd_trainer.data.examples import condition_of
from avd_trainer.data.in_memory import InMemoryData, encode_shapes
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.sources import HELD_OUT
from avd_trainer.evaluation.controls import controls_of_shapes
from avd_trainer.evaluation.sampling import Sampling, sample_predictions
from avd_trainer.evaluation.spectrum_analysis import open_source
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.runtime.environment import environment
from avd_trainer.training.trainer import REFERENCE_CLIPS

RESULTS = Path(__file__).parent / "results" / "rolloff-alarms.json"
WINDOW = 64
TEACHER = Sampling(steps=25, guidance_scale=1.5, shift=3.0)


def main(
    runs: Annotated[list[Path] | None, typer.Argument(help="Finished runs of tiny students.")] = None,
    draws: Annotated[int, typer.Option(help="Pairs of sets of real clips.")] = 500,
    results: Annotated[Path, typer.Option(help="File to write.")] = RESULTS,
) -> None:
    codec = BlockDCTCodec()
    train = encode_shapes(MovingShapes(1024, 4), codec).latents
    reference = SpectralStatistics.measure(train[:REFERENCE_CLIPS])
    held_out = MovingShapes(WINDOW, HELD_OUT, held_out=True)
    real = encode_shapes(held_out, codec)
    spoiled = {name: control.latents for name, control in controls_of_shapes(held_out, codec).items()}
    spoiled |= {f"latent noise {level:g}": real.latents + level * noise(real.latents) for level in (0.1, 0.2, 0.3)}
    spoiled |= {
        "flicker of whole frames 0.3": real.latents + 0.3 * noise(real.latents[..., :1, :1]),
        "every second latent frame repeated": real.latents[:, :, [0, 0, 2, 2, 4]],
        "mean with the next latent frame": (real.latents + real.latents[:, :, [1, 2, 3, 4, 4]]) / 2,
        "saturation of latents 1.5": 1.5 * real.latents,
    }
    generated = {
        "held-out real clips": real.latents,
        "bundled teacher, 25 steps": sampled("bundled:tiny", TEACHER, real),
    }
    for run in runs or []:
        source = open_source(str(run))
        name = f"{run.parent.name}/{run.name}"
        generated[name] = sampled(source.weights, source.sampling(None, None, None, None), real)
    report: dict[str, Any] = {
        "command": f"python benchmarks/rolloff_alarms.py RUNS --draws {draws}",
        **environment(),
        "reference": {"clips": REFERENCE_CLIPS, "spatial": reference.spatial, "temporal": reference.temporal},
        "window": WINDOW,
        "real_against_real": false_alarms(train, draws),
        "generated": {name: judge(latents, reference) for name, latents in generated.items()},
        "spoiled": {name: judge(latents, reference) for name, latents in spoiled.items()},
    }
    results.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["real_against_real"], indent=2))
    for kind in ("generated", "spoiled"):
        for name, row in report[kind].items():
            print(f"{name:40s} {row['spatial']:+6.2f} {row['temporal']:+6.2f}  {', '.join(row['findings'])}")


def judge(latents: Tensor, reference: SpectralStatistics) -> dict[str, Any]:
    """The monitor's signals and findings for one set of clips."""
    monitor = SpectralRolloffMonitor(reference, every=1, grace=0, window=len(latents))
    monitor.after_step(1, {"x_0": latents})
    return {**monitor.signals(), "findings": [finding.kind for finding in monitor.findings]}


def false_alarms(latents: Tensor, draws: int) -> dict[str, Any]:
    """Two random sets of real clips, one as the reference, one in the window; no clip is in both."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(draws):
        order = torch.randperm(len(latents), generator=generator)[: REFERENCE_CLIPS + WINDOW]
        reference = SpectralStatistics.measure(latents[order[:REFERENCE_CLIPS]])
        rows.append(judge(latents[order[REFERENCE_CLIPS:]], reference))
    signals = torch.tensor([[row["spatial"], row["temporal"]] for row in rows])
    return {
        "draws": draws,
        "alarms": sum(bool(row["findings"]) for row in rows),
        "largest_signal": dict(zip(("spatial", "temporal"), signals.abs().amax(0).tolist(), strict=True)),
        "standard_deviation": dict(zip(("spatial", "temporal"), signals.std(0).tolist(), strict=True)),
    }


def sampled(weights: str, sampling: Sampling, real: Any) -> Tensor:
    """Clips ``[N, C, F, H, W]`` of the same captions as the real ones."""
    model = VelocityModel(load_transformer(weights))
    data = InMemoryData(real, HashTextEmbedding(TEXT_LENGTH, model.module.config.text_dim))
    batches = sample_predictions(
        model,
        condition_of([data[row] for row in range(len(data))]),
        data.unconditional(),
        real.latents.shape[1:],
        sampling,
        (0, "alarms"),
        count=len(data),
        device=torch.device("cpu"),
    )
    return torch.cat([predictions[-1].x_0 for predictions in batches])


def noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1))


if __name__ == "__main__":
    typer.run(main)
