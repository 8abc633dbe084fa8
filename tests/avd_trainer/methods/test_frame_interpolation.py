"""The interpolator's training: the paper's recipe, held-out clips, and runs that resume as a student's do."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from typer.testing import CliRunner

from avd_core import LatentFrameInterpolator, interpolate_linearly, repeat_frames
from avd_trainer.commands.app import app
from avd_trainer.config.loading import ConfigError, load_config, presets
from avd_trainer.config.sections import ShapesData
from avd_trainer.data import sources as sources_module
from avd_trainer.data.batches import Batch
from avd_trainer.data.examples import Example
from avd_trainer.data.in_memory import CaptionedLatents, InMemoryData, encode_shapes
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.shard_writing import ShardWriter
from avd_trainer.data.sources import HELD_OUT, Clips, TrainingData
from avd_trainer.methods import frame_interpolation as interpolation_module
from avd_trainer.methods.base import Setting, Turn
from avd_trainer.methods.frame_interpolation import FrameInterpolation, split_frames
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.condition import Condition
from avd_trainer.runtime.draws import Draws
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import Ranks, join_ranks
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.run import train
from avd_trainer.training.trainer import Trainer
from launches import on_ranks
from references import flatten, mean
from runs import EMBED, curve, files, in_memory, load_data_of, order_of, outcome, saved_steps, tiny_config, weights
from tensors import randn

ROLE = "interpolator"
CPU = torch.device("cpu")


def section(path: Path) -> dict[str, Any]:
    """The ``data`` of clips in shards."""
    return {"kind": "shards", "path": str(path), "workers": 0}


def make_config(method: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    values = {"max_steps": 6, "batch_size": 4, "checkpoint": {"every": 2}, "logging": {"tensorboard": False}}
    return tiny_config("", "frame_interpolation", method, max_gradient_norm=None, **values | changes)


def make_data(latents: Tensor | None = None, held_out: int = 3) -> TrainingData:
    """Ten clips to train on and three others."""
    if latents is None:
        latents = randn(1, 13, 4, 5, 4, 4, dtype=torch.float32)
    train, rest = in_memory(latents[:-held_out]), in_memory(latents[-held_out:])
    return TrainingData(train, train, held_out=rest)


def method_of(module: nn.Module, channels: int = 4) -> FrameInterpolation:
    """The method by itself, around a module."""
    config = make_config().method
    return FrameInterpolation(config, {ROLE: module}, Setting((channels, 5, 4, 4), torch.empty(0), CPU))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", make_data().clips)


def write_shards(folder: Path, clips: Any, *, latents: bool = True) -> Path:
    with ShardWriter(folder, text_length=4, text_dim=6, rows_per_shard=4) as writer:
        for index in range(len(clips)):
            writer.add(clips[index].latent if latents else None, torch.ones(2, 6), "", source=f"{index}.mp4")
    return folder


# --- The recipe


def test_the_wan_preset_has_the_papers_values() -> None:
    """Sec. 8 of You et al. 2026."""
    data = {"data": {"kind": "shards", "path": "clips"}}
    config = load_config(TrainConfig, "wan2.1", replace=data, method="frame_interpolation")
    assert (config.max_steps, config.batch_size, config.max_gradient_norm) == (10_000, 32, None)
    method: Any = config.method
    assert (method.optimizer.lr, method.optimizer.betas, method.optimizer.schedule) == (1e-5, (0.9, 0.999), "constant")
    assert (method.optimizer.weight_decay, method.held_out) == (0.01, 64)
    assert method.widths == LatentFrameInterpolator().widths


def test_defaults_are_the_papers() -> None:
    method = FrameInterpolation.Config()
    assert (method.optimizer.lr, method.optimizer.betas, method.optimizer.schedule) == (1e-5, (0.9, 0.999), "constant")
    assert method.held_out_clips == 64


def test_the_tiny_preset_needs_no_files() -> None:
    assert [name for name, methods in presets().items() if "frame_interpolation" in methods] == ["tiny", "wan2.1"]
    assert isinstance(load_config(TrainConfig, "tiny", method="frame_interpolation").data, ShapesData)


@pytest.mark.parametrize(("frames", "used"), [(3, 3), (4, 3), (5, 5), (20, 19), (21, 21)])
def test_frames_left_out_lie_between_frames_two_apart(frames: int, used: int) -> None:
    clips = torch.arange(frames).view(1, 1, frames, 1, 1)
    kept, missing = split_frames(clips)
    assert kept.flatten().tolist() == list(range(0, used, 2))
    assert missing.flatten().tolist() == list(range(1, used, 2))


class Doubling(nn.Module):
    """Inserts twice the frame before."""

    def forward(self, kept: Tensor) -> Tensor:
        clips = repeat_frames(kept)
        clips[:, :, 1::2] *= 2
        return clips


@pytest.mark.parametrize("frames", [5, 6])
def test_the_loss_is_the_mean_squared_error_of_inserted_frames_alone(frames: int) -> None:
    clips = randn(0, 2, 3, frames, 4, 4)
    by_hand = [
        (2 * before - missing) ** 2
        for clip in clips.tolist()
        for channel in clip
        for place in (1, 3)
        for before, missing in zip(flatten(channel[place - 1]), flatten(channel[place]), strict=True)
    ]
    batch = {"clips": Batch(clips, Condition(torch.empty(0)))}
    (loss,) = method_of(Doubling()).losses(Turn(ROLE, ("clips",)), batch, Draws((0, ROLE), range(2), CPU))
    assert loss.value.item() == pytest.approx(mean(by_hand), rel=1e-12)


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_steps_are_those_of_the_plain_algorithm(ranks: Ranks, micro_batch_size: int | None) -> None:
    rules = {"lr": 1e-2, "betas": [0.8, 0.9], "weight_decay": 0.1, "schedule": "cosine"}
    config = make_config({"optimizer": rules}, max_steps=4, micro_batch_size=micro_batch_size, seed=3)
    data = make_data()
    trainer = Trainer(config, data, ranks)
    losses = [metrics["loss"].item() for metrics in trainer.run()]

    torch.manual_seed(3)
    network = LatentFrameInterpolator(4, (8, 8, 8))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    order = order_of("clips", seed=3)
    for step, loss in enumerate(losses, start=1):
        clips = torch.stack([data.clips[i].latent for i in order.batch(4 * (step - 1), 4)])  # type: ignore[misc]
        expected = F.mse_loss(network(clips[:, :, ::2])[:, :, 1::2], clips[:, :, 1::2])
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    # Not the weights: a bias before a normalisation has no gradient but rounding, which Adam makes large.
    clips = data.held_out.clips.latents  # type: ignore[union-attr]
    with torch.no_grad():
        torch.testing.assert_close(trainer.models[ROLE](clips), network(clips), rtol=0, atol=1e-5)


def test_a_clip_that_is_not_finite_costs_its_step_only(ranks: Ranks) -> None:
    data = make_data()
    trainer = Trainer(make_config(max_steps=3), data, ranks)
    order = order_of("clips")
    bad = set(order.batch(4, 4)) - set(order.batch(8, 4))  # read in the second step, and not in the third
    data.clips.clips.latents[bad.pop()] = torch.nan  # type: ignore[attr-defined]
    seen = [(metrics["skipped"].item(), weights(trainer.models[ROLE])) for metrics in trainer.run()]
    assert [skipped for skipped, _ in seen] == [0, 1, 0]
    assert torch.equal(seen[0][1], seen[1][1])
    assert seen[2][1].isfinite().all()
    assert not torch.equal(seen[1][1], seen[2][1])


def test_a_short_run_beats_linear_interpolation_and_both_beat_repeating(ranks: Ranks) -> None:
    codec = BlockDCTCodec()
    train, held_out = (encode_shapes(MovingShapes(count, seed), codec) for count, seed in ((96, 1), (32, 2)))
    data = make_data(torch.cat([train.latents, held_out.latents]), held_out=32)
    config = make_config({"widths": [16, 16, 16], "optimizer": {"lr": 5e-3}}, max_steps=40, batch_size=16)
    trainer = Trainer(config, data, ranks)
    list(trainer.run())
    errors: Any = trainer.method.evaluate(trainer.models[ROLE], data.held_out)  # type: ignore[arg-type]
    assert errors.network < 0.95 * errors.linear < 0.95 * errors.repeat


def test_errors_are_those_of_all_inserted_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """In uneven batches: three clips, two at once."""
    monkeypatch.setattr(interpolation_module, "EVALUATION_BATCH", 2)
    latents = randn(5, 3, 4, 6, 4, 4)
    torch.manual_seed(1)
    network = LatentFrameInterpolator(4, (8, 8, 8)).double()
    nn.init.normal_(network.output.weight)
    errors = method_of(network).evaluate(network, in_memory(latents))
    assert (errors.clips, errors.frames) == (3, 6)
    for name, method in (("network", network), ("linear", interpolate_linearly), ("repeat", repeat_frames)):
        expected = (method(latents[:, :, 0:5:2]) - latents[:, :, :5]).square()[:, :, 1::2].mean()
        assert getattr(errors, name) == pytest.approx(expected.item(), rel=1e-6)


# --- The data


def test_shapes_held_out_have_captions_that_are_never_trained_on() -> None:
    config = make_config(data={"kind": "shapes", "clips": 3, "held_out": 2, "seed": 5})
    data = load_data_of(config)
    assert data.held_out is not None
    held_out = MovingShapes(2, HELD_OUT + 5, held_out=True)
    for part, shapes in ((data.clips, MovingShapes(3, 5)), (data.held_out, held_out)):
        expected = encode_shapes(shapes, BlockDCTCodec()).latents
        assert torch.equal(torch.stack([part[i].latent for i in range(len(part))]), expected)  # type: ignore[misc]


def test_of_videos_the_part_that_loading_holds_out_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Clips(*(CaptionedLatents(randn(i, 2, 4, 3, 4, 4), ["", ""]) for i in range(2)))
    monkeypatch.setattr(sources_module, "load_clips", lambda config, codec, held_out: parts)
    data = load_data_of(make_config(data={"kind": "videos", "path": "anywhere"}))
    for part, expected in ((data.clips, parts.train), (data.held_out, parts.held_out)):
        assert part is not None
        assert torch.equal(torch.stack([part[i].latent for i in range(2)]), expected.latents)  # type: ignore[misc]


def test_the_last_samples_of_a_data_set_are_never_trained_on(tmp_path: Path, ranks: Ranks) -> None:
    latents = randn(1, 10, 4, 5, 4, 4, dtype=torch.float32)
    shards = write_shards(tmp_path / "shards", in_memory(latents))
    config = make_config({"held_out": 3}, data=section(shards), batch_size=7, max_steps=2)
    data = load_data_of(config)
    trainer = Trainer(config, data, ranks)
    read = []
    forward = trainer.models[ROLE].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))  # type: ignore[attr-defined]
    list(trainer.run())
    forward.remove()
    for epoch in read:  # each of the first seven once
        found = [(latents[:, :, ::2] == clip).flatten(1).all(dim=1).nonzero().item() for clip in epoch]
        assert sorted(found) == list(range(7))
    held_out = [data.held_out[i].latent for i in range(3)]  # type: ignore[index]
    assert torch.equal(torch.stack(held_out), latents[7:])  # type: ignore[arg-type]
    # Text is as large as a clip; it must not be collated and handed over by the processes that read.
    assert data.clips[0].text.numel() == 0


def refuse(config: TrainConfig, tmp_path: Path, ranks: Ranks, match: str) -> None:
    with pytest.raises(UserError, match=match):
        train(config, tmp_path / "run", ranks)
    assert set(os.listdir(tmp_path / "run")) <= {"config.yaml", ".lock"}


def test_prompts_are_no_clips(tmp_path: Path, ranks: Ranks) -> None:
    write_shards(tmp_path / "prompts", make_data().clips, latents=False)
    config = make_config(data=section(tmp_path / "prompts"))
    refuse(config, tmp_path, ranks, rf"data\.path {tmp_path}/prompts holds prompts only.*`avd data encode`")


@pytest.mark.parametrize("count", [10, 11])
def test_a_data_set_that_would_be_held_out_whole_is_refused(
    shards: Path, tmp_path: Path, ranks: Ranks, count: int
) -> None:
    config = make_config({"held_out": count}, data=section(shards))
    refuse(config, tmp_path, ranks, rf"shards holds 10 clips, of which the last {count} would be held out")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 2, 4, 4), r"clips of 2 latent frame\(s\); an interpolator learns from at least 3.*Encode longer clips"),
        ((4, 1, 4, 4), r"clips of 1 latent frame\(s\)"),
        ((4, 3, 2, 8), r"latents 2 high and 8 wide.*at least 4 of each"),
    ],
)
def test_clips_that_are_too_short_or_too_small_are_refused(
    tmp_path: Path, ranks: Ranks, shape: tuple[int, ...], message: str
) -> None:
    shards = write_shards(tmp_path / "shards", in_memory(randn(0, 3, *shape, dtype=torch.float32)))
    config = make_config({"held_out": 1}, data=section(shards))
    refuse(config, tmp_path, ranks, message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.widths=[32,64]", r"method\.widths: .*at least 3 items"),
        ("method.widths=[32,64,12]", r"method\.widths\.2: .*multiple of 8"),
        ("method.optimizer.schedule=linear", r"optimizer\.schedule: .*'constant', 'cosine' or .*, got 'linear'"),
        ("method.held_out=0", r"method\.held_out: .*greater than or equal to 1"),
        ("method.ema_decay=0.9", r"method\.ema_decay: there is no such field"),
        ("teacher=bundled:tiny", r"method frame_interpolation starts from random weights: leave teacher and"),
    ],
)
def test_a_wrong_value_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(TrainConfig, "tiny", [override], method="frame_interpolation")


# --- Runs


def test_a_longer_run_continues_a_shorter_one_to_the_bit(tmp_path: Path, ranks: Ranks) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(make_config(), whole, ranks, data=make_data())
    for steps in (1, 3, 6):
        torch.manual_seed(steps)
        assert train(make_config(max_steps=steps), parts, ranks, data=make_data())
        assert saved_steps(parts)[-1] == steps
    assert outcome(parts, ROLE) == outcome(whole, ROLE)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path, ranks: Ranks, schedule: str) -> None:
    config = make_config({"optimizer": {"schedule": schedule}})
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert train(config, whole, ranks, data=make_data())
    shutil.copytree(whole, killed)
    # As if killed in the fifth step: what came later is not there, or torn.
    shutil.rmtree(killed / "checkpoints" / "step-00000006")
    shutil.rmtree(killed / "interpolator")
    (killed / "evaluation.json").unlink()
    (killed / "metrics.jsonl").write_text((killed / "metrics.jsonl").read_text()[:-10])
    assert train(config, killed, ranks, data=make_data())
    assert outcome(killed, ROLE) == outcome(whole, ROLE)


class Signalling(InMemoryData):
    """The process that reads the ``count``-th sample gets a signal."""

    def __init__(self, clips: CaptionedLatents, count: int) -> None:
        super().__init__(clips, EMBED)
        self.count = count

    def __getitem__(self, index: int) -> Example:
        self.count -= 1
        if self.count == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


def stop_and_go_on(config: TrainConfig, folder: Path) -> tuple[bool, list[int], bool]:
    data = make_data()
    # The trainer looks at one clip for its shape; the third step reads the ninth to the twelfth.
    signalling = Signalling(data.clips.clips, 1 + 2 * 4 + 2)  # type: ignore[attr-defined]
    with join_ranks() as ranks:
        first = train(config, folder / "stopped", ranks, data=data._replace(clips=signalling))
        saved = saved_steps(folder / "stopped")
        assert train(config, folder / "whole", ranks, data=data)
        return first, saved, train(config, folder / "stopped", ranks, data=data)


def test_a_signal_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    config = make_config({"optimizer": {"schedule": "cosine"}}, checkpoint={"every": 100})
    ((first, saved, second),) = on_ranks(1, stop_and_go_on, config, tmp_path)
    assert (first, saved, second) == (False, [3], True)
    assert outcome(tmp_path / "stopped", ROLE) == outcome(tmp_path / "whole", ROLE)


def run(config: TrainConfig, folder: Path) -> bool:
    with join_ranks() as ranks:
        return train(config, folder, ranks, data=make_data())


def test_two_ranks_follow_the_curve_of_one_and_take_up_its_run(tmp_path: Path) -> None:
    one, two, changing = (tmp_path / name for name in ("one", "two", "changing"))
    config = make_config()
    run(config, one)
    assert on_ranks(2, run, config, two) == [True, True]
    run(config.model_copy(update={"max_steps": 3}), changing)
    assert on_ranks(2, run, config.model_copy(update={"micro_batch_size": 1}), changing) == [True, True]
    clips = make_data().held_out.clips.latents  # type: ignore[union-attr]
    for folder in (two, changing):
        for step, expected in zip(curve(folder), curve(one), strict=True):
            assert step == pytest.approx(expected, rel=1e-4)
        networks = [LatentFrameInterpolator.from_pretrained(path / "interpolator") for path in (folder, one)]
        with torch.no_grad():
            torch.testing.assert_close(networks[0](clips), networks[1](clips), rtol=0, atol=1e-4)
        errors, expected_errors = (json.loads((path / "evaluation.json").read_text()) for path in (folder, one))
        assert errors == pytest.approx(expected_errors, rel=1e-4)


def test_a_data_set_may_move_and_not_change(shards: Path, tmp_path: Path, ranks: Ranks) -> None:
    def go(path: Path, steps: int) -> None:
        train(make_config({"held_out": 2}, data=section(path), max_steps=steps), tmp_path / "run", ranks)

    go(shards, 1)
    go(shards.rename(tmp_path / "moved"), 2)
    shutil.rmtree(tmp_path / "moved")
    write_shards(tmp_path / "moved", in_memory(randn(2, 11, 4, 5, 4, 4, dtype=torch.float32)))
    with pytest.raises(
        UserError, match=r"data-0000\d-of-00003\.parquet is not the file that the run to be resumed read"
    ):
        go(tmp_path / "moved", 3)


# --- The command


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(
        app, [str(argument) for argument in ("train", *arguments, "--method", "frame_interpolation")]
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def test_the_command_leaves_a_network_for_the_datas_channels(shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = [
        "wan2.1", "--data", shards, "--output", output, "--max-steps", 2, "--set", "method.held_out=2",
        "--set", "data.workers=0", "--set", "batch_size=2", "--set", "logging.tensorboard=false",
    ]  # fmt: skip
    results = []
    for _ in range(2):
        status, printed = command(*arguments)
        assert status == 0
        evaluation = json.loads((output / "evaluation.json").read_text())
        assert (evaluation["clips"], evaluation["frames"]) == (2, 4)
        assert f"linear {evaluation['linear']:.4g}" in printed.replace("│", "").replace("  ", " ")
        assert f"The interpolator is in {output / 'interpolator'}." in printed
        results.append(files(output))
    assert results[0] == results[1]  # a finished run stays as it is
    interpolator = LatentFrameInterpolator.from_pretrained(output / "interpolator")
    assert (interpolator.channels, interpolator.widths) == (4, (32, 64, 128))
    # The weights of the last step, which is what was measured.
    with safe_open(next((output / "checkpoints" / "step-00000002").glob("*.safetensors")), framework="pt") as file:
        assert torch.equal(interpolator.output.weight, file.get_tensor("interpolator/output.weight"))
    held_out = load_data_of(load_config(TrainConfig, str(output / "config.yaml"))).held_out
    assert held_out is not None
    assert method_of(interpolator).evaluate(interpolator, held_out).model_dump() == evaluation


def test_the_command_trains_on_shapes_without_any_data(tmp_path: Path) -> None:
    small = ("--set", "data.clips=8", "--set", "data.held_out=2", "--set", "batch_size=4", "--set", "max_steps=2")
    status, _ = command("tiny", "--output", tmp_path / "run", *small)
    assert status == 0
    assert len(curve(tmp_path / "run")) == 2
    assert LatentFrameInterpolator.from_pretrained(tmp_path / "run" / "interpolator").channels == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wan2.1"], "data: Field required. Pass --data DIR"),
        (
            ["wan2.1-14b"],
            "Preset wan2.1-14b has no values for method 'frame_interpolation'. It has avd, data_forcing, ",
        ),
        (["tiny", "--videos", "a", "--data", "b"], "--videos and --data exclude each other"),
        (["tiny", "--videos", "/nowhere"], "/nowhere is not a folder"),
    ],
)
def test_a_mistake_is_answered_with_a_message(tmp_path: Path, arguments: list[str], message: str) -> None:
    status, printed = command(*arguments, "--output", tmp_path / "run")
    assert status == 2
    assert message in printed
    assert "Traceback" not in printed
