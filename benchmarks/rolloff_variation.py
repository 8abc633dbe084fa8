"""Does the variation of layer-wise roll-off points go along with a model's quality? The paper's sanity check, repeated.

    avd train tiny --method flow_matching --set max_steps=600 --set batch_size=8 --set data.clips=1000 \\
        --set checkpoint.every=25 --set checkpoint.keep_every=25 --output runs/short-teacher
    .venv/bin/python benchmarks/rolloff_variation.py runs/short-teacher

Shows every kept checkpoint of a teacher's training the same held-out clips, noised alike, and writes to
benchmarks/results/rolloff-variation.json its error on them, how the roll-offs of its block outputs are distributed, and
the rank correlation of the two over checkpoints. In one run everything that rises with time goes along with quality. So
the last weights are damaged by noise too, more and more: there quality falls without any training. What shuffled
checkpoints give says how much of a correlation chance can make. `--again` makes correlations and figure from what is
saved.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import torch
import typer
from torch import Tensor

from avd_trainer.data.examples import condition_of
from avd_trainer.data.in_memory import InMemoryData, encode_shapes
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.sources import HELD_OUT
from avd_trainer.evaluation.palette import COLORS, write_png
from avd_trainer.evaluation.spectrum import LEVELS, block_rolloffs
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.condition import Condition
from avd_trainer.models.roles import Built, build_whole
from avd_trainer.models.samplers import schedule
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.models.transformer import VelocityModel
from avd_trainer.runtime.draws import Draws
from avd_trainer.runtime.environment import environment
from avd_trainer.training.checkpoint import list_checkpoints, read_tensors
from avd_trainer.training.export import open_run
from avd_trainer.training.folder import CHECKPOINTS

# Noise on each weight, as a share of the standard deviation of its tensor.
DAMAGES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
RESULTS = Path(__file__).parent / "results" / "rolloff-variation.json"
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "rolloff-variation.png"
WITH_QUALITY = "rank_correlation_with_quality"
VARIATIONS = {
    "over_clips": "standard deviation of a channel's roll-off over clips, mean over channels, blocks and noise levels",
    "over_channels": "standard deviation over channels of a channel's mean roll-off, mean over blocks and noise levels",
    "between_blocks": "standard deviation over blocks of the mean roll-off, mean over noise levels",
    "level": "no variation, for comparison: the mean roll-off over everything",
}


def main(
    run: Annotated[Path | None, typer.Argument(help="A run of flow_matching with kept checkpoints.")] = None,
    later: Annotated[
        list[Path] | None, typer.Option(help="Other runs, shown beside; correlations leave them out.")
    ] = None,
    clips: Annotated[int, typer.Option(help="Held-out clips.")] = 64,
    results: Annotated[Path, typer.Option(help="File to write.")] = RESULTS,
    figure: Annotated[Path, typer.Option(help="Picture to write.")] = FIGURE,
    again: Annotated[bool, typer.Option("--again", help="From the saved file, in place of a run.")] = False,
) -> None:
    if (run is None) != again:
        raise typer.BadParameter("pass a run, or --again for what is saved.")
    report = json.loads(results.read_text()) if run is None else measure(run, later or [], clips)
    report |= correlations(report["checkpoints"], report["damaged"])
    results.write_text(json.dumps(report, indent=2) + "\n")
    draw(report, figure)
    for row in [*report["checkpoints"], *report["later"], *report["damaged"]]:
        print("  ".join(f"{row[name]:8.4f}" for name in ("step", "damage", "error", *VARIATIONS)))
    for name in (key for key in report if key.startswith("rank_correlation")):
        print(name, {key: round(value, 2) for key, value in report[name].items()})


def measure(run: Path, later: list[Path], clips: int) -> dict[str, Any]:
    """Error and variations of each checkpoint of a run, of damaged weights, and of other runs."""
    rows = [look(run, step, clips) for step in (0, *kept(run))]
    last = rows[-1]["step"]
    return {
        "command": f"python benchmarks/rolloff_variation.py {run.name} --clips {clips}",
        **environment(),
        "variations": VARIATIONS,
        "checkpoints": rows,
        "later": [look(other, step, clips) for other in later for step in kept(other)],
        "damaged": [rows[-1], *(look(run, last, clips, damage) for damage in DAMAGES)],
    }


def correlations(rows: list[dict[str, Any]], damaged: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Rank correlations of each variation with quality, and what 19 of 20 shuffles of as many values stay below."""
    columns = {name: column(rows, name) for name in ("error", *VARIATIONS)}
    falls, changes = -columns["error"], {name: values.diff().abs() for name, values in columns.items()}
    return {
        WITH_QUALITY: {name: spearman(columns[name], falls) for name in VARIATIONS},
        "rank_correlation_of_damaged": {
            name: spearman(column(damaged, name), -column(damaged, "error")) for name in VARIATIONS
        },
        "rank_correlation_of_changes": {name: spearman(changes[name], changes["error"]) for name in VARIATIONS},
        "rank_correlation_of_shuffled": {
            "checkpoints": by_chance(len(rows)),
            "damaged": by_chance(len(damaged)),
            "changes": by_chance(len(rows) - 1),
        },
    }


def by_chance(count: int) -> float:
    """The size of the rank correlation of two shuffled columns that 95% of 10,000 shuffles stay below."""
    generator = torch.Generator().manual_seed(0)
    order = torch.arange(count)
    sizes = [abs(spearman(order, torch.randperm(count, generator=generator))) for _ in range(10_000)]
    return float(torch.tensor(sizes).quantile(0.95))


def draw(report: dict[str, Any], path: Path) -> None:
    """Each variation against the error: checkpoints of the training, and its last weights damaged."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    figure.suptitle("Variation of layer-wise roll-offs of a teacher while it trains, cycles per token")
    for axis, name in zip(axes, VARIATIONS, strict=False):
        for rows, color, marker, label in (
            ("checkpoints", "avd", "o", "training, 600 steps"),
            ("later", "teacher", "s", "bundled teacher, later"),
            ("damaged", "dmd", "x", "step 600, weights damaged"),
        ):
            errors, values = (column(report[rows], key) for key in ("error", name))
            axis.plot(errors, values, marker, color=COLORS[color], label=label, markersize=4)
        axis.set_title(f"{name.replace('_', ' ')} (rank correlation {report[WITH_QUALITY][name]:.2f})", fontsize=10)
        axis.set_xlabel("error of the velocity", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8)
    write_png(figure, path)


def kept(run: Path) -> list[int]:
    """Steps of a run's checkpoints."""
    return [step for step, _ in list_checkpoints(run / CHECKPOINTS)]


def column(rows: list[dict[str, Any]], name: str) -> Tensor:
    return torch.tensor([row[name] for row in rows])


def look(run: Path, step: int, count: int, damage: float = 0.0) -> dict[str, Any]:
    """Error and variations of the weights, not averaged, at a step; 0 is before the first one."""
    saved = open_run(run, step or None)
    role = saved.config.method.roles()["teacher"]
    assert isinstance(role, Built)
    module = build_whole(role, saved.state["latent_shape"], saved.architecture, saved.config.seed).eval()
    if step:
        parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
        read_tensors(saved.folder, {"teacher": parameters}, distributed=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if damage and parameter.numel() > 1:
                parameter.add_(damage * parameter.std() * torch.randn(parameter.shape, generator=generator))
    model = VelocityModel(module)
    x_0, condition = held_out(count, model)
    draws = Draws((0, "variation"), range(count), torch.device("cpu"))
    noise = {level: draws.normal(f"noise_{level:g}", x_0.shape[1:]) for level in LEVELS}
    errors = [velocity_error(model, x_0, noise[level], level, condition) for level in LEVELS]
    values_TKND = torch.stack([block_rolloffs(model, x_0, noise[level], level, condition) for level in LEVELS])
    return {
        "run": run.name,
        "step": step,
        "damage": damage,
        "error": sum(errors) / len(errors),
        "over_clips": float(values_TKND.std(2).mean()),
        "over_channels": float(values_TKND.mean(2).std(2).mean()),
        "between_blocks": float(values_TKND.mean((2, 3)).std(1).mean()),
        "level": float(values_TKND.mean()),
        "over_clips_by_block": values_TKND.std(2).mean((0, 2)).tolist(),
        "level_by_block": values_TKND.mean((0, 2, 3)).tolist(),
    }


@torch.no_grad()
def velocity_error(model: VelocityModel, x_0: Tensor, noise: Tensor, level: float, condition: Condition) -> float:
    """Mean squared error of the predicted velocity."""
    timesteps = x_0.new_full((len(x_0),), level)
    predicted = model(schedule.add_noise(x_0, noise, timesteps), timesteps, condition)
    return float((predicted - schedule.velocity(x_0, noise)).square().mean())


def held_out(count: int, model: VelocityModel) -> tuple[Tensor, Condition]:
    """Clips of moving shapes that nothing was trained on, and their captions."""
    clips = encode_shapes(MovingShapes(count, HELD_OUT, held_out=True), BlockDCTCodec())
    data = InMemoryData(clips, HashTextEmbedding(TEXT_LENGTH, model.module.config.text_dim))
    return clips.latents, condition_of([data[row] for row in range(count)])


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation, in [-1, 1]."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


if __name__ == "__main__":
    typer.run(main)
