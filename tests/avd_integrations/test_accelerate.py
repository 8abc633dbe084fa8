"""The accelerate adapter in accelerate itself, with the lines of docs/hosts/accelerate.md."""

import gc
import pickletools
import re
import sys
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from torch import Tensor, nn

from avd_core import AVDConfig, MotionConfig, RegressionConfig
from avd_integrations import rectified_flow
from avd_integrations.accelerate import PROVEN_ON, AcceleratorTerms
from launches import on_ranks
from references import ReferenceCache, central_differences, reference_motion, reference_regression
from references import reference_sample_losses as sample_losses
from tensors import assert_same_state

PAGE = (Path(__file__).parents[2] / "docs" / "hosts" / "accelerate.md").read_text()
SETUP, BODY = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
ROUNDS, STEPS = 2, 4
SCALES = (0.2, 1.0)  # of generated clips in the micro-batches of a step: with and without gradient of the motion term


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """An Accelerator's state is global."""
    forget()
    yield
    forget()


def forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(4, 4, 1)
        self.calls = []

    def forward(self, x_t: Tensor, times: Tensor, text: list[str]) -> Tensor:
        assert text == ["one", "two"]
        output = self.layer(x_t * (1 + times.view(-1, 1, 1, 1, 1) / 1000))
        self.calls.append((x_t.detach(), times.tolist(), output.detach()))
        return output


def trained() -> tuple[Student, torch.optim.Optimizer]:
    student = Student()
    return student, torch.optim.SGD(student.parameters(), lr=0.1)


def clips_of(position: int, rank: int) -> Tensor:
    return torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(10 * position + rank))


def generated(student: nn.Module, noise: Tensor, micro_batch: int) -> Tensor:
    return SCALES[micro_batch % ROUNDS] * (noise - student(noise, torch.full((2,), 1000.0), ["one", "two"]))


class Run:
    """A distiller in a few lines: its loss pulls generated clips to zero."""

    def __init__(self, precision: str = "no") -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ROUNDS, mixed_precision=precision)
        set_seed(3)
        self.raw, optimizer = trained()
        student, self.optimizer = self.accelerator.prepare(self.raw, optimizer)
        set_seed(3, device_specific=True)
        self.scope = {"accelerator": self.accelerator, "student": student}
        exec(SETUP, self.scope)
        self.terms = self.scope["terms"]
        self.cache = self.terms.objective.regression.cache
        self.losses, self.seen, self.noise, self.position = [], [], [], 0

    def step(self) -> None:
        for _ in range(ROUNDS):
            student = self.scope["student"]
            clips = clips_of(self.position, self.accelerator.process_index)
            self.position += 1
            batch = {"latents": clips, "text": ["one", "two"]}
            self.raw.calls.clear()
            with self.accelerator.accumulate(student):
                noise = torch.randn_like(clips)
                x_0 = generated(student, noise, len(self.noise))
                loss = (x_0**2).mean()
                before = loss.item()
                self.scope |= {"batch": batch, "x_0": x_0, "loss": loss}
                exec(BODY, self.scope)
                self.accelerator.backward(self.scope["loss"])
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.losses.append(self.scope["loss"].item() - before)
            self.noise.append(noise)
            self.seen.append((clips, self.raw.calls[-1], x_0.detach()))

    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.terms.state_dict().items()}


def regression_by_hand(
    clips: Tensor, call: tuple[Tensor, list[float], Tensor]
) -> tuple[list[float], list[Any], list[Any]]:
    """``(times, velocities, targets)``, the noise found from what the student saw."""
    x_t, times, output = call
    sigma = torch.tensor(times).view(-1, 1, 1, 1, 1) / 1000
    noise = (x_t - (1 - sigma) * clips) / sigma
    return times, output.float().tolist(), (noise - clips).tolist()


def pairs_by_hand(seen: tuple[Any, ...]) -> list[tuple[float, float]]:
    """``(time, loss)`` of every sample of a micro-batch."""
    times, velocities, targets = regression_by_hand(*seen[:2])
    return list(zip(times, sample_losses(velocities, targets), strict=True))


def motion_gradient(x_0: Tensor) -> Tensor:
    """Of the motion term with respect to the samples."""
    differences = central_differences(
        lambda values: reference_motion(torch.tensor(values, dtype=torch.float64).view_as(x_0).tolist()),
        x_0.flatten().tolist(),
    )
    return torch.tensor(differences).view_as(x_0)


def means_by_hand(cache: ReferenceCache) -> list[float]:
    return [cache.means.get(float(t), 0.0) for t in (1000, 750, 500, 250)]


def test_the_lines_are_few() -> None:
    lines = [line for line in (SETUP + BODY).splitlines() if line]
    assert len(lines) <= 10


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_lines_of_the_page_add_both_terms(precision: str) -> None:
    run = Run(precision)
    start = [p.detach().clone() for p in run.raw.parameters()]
    for _ in range(STEPS):
        run.step()
    cache, expected = ReferenceCache(), []
    for step in range(STEPS):
        micro_batches = run.seen[step * ROUNDS : (step + 1) * ROUNDS]
        losses = []
        for clips, call, x_0 in micro_batches:
            _, velocities, targets = regression_by_hand(clips, call)
            pairs = pairs_by_hand((clips, call))
            means = [cache.read(time, loss) for time, loss in pairs]
            expected.append(reference_regression(velocities, targets, means) + reference_motion(x_0.tolist()))
            losses += pairs
        cache.iterate(losses)  # once per optimizer step
        assert [reference_motion(x_0.tolist()) > 0.05 * 0.6 for _, _, x_0 in micro_batches] == [True, False]
    assert run.losses == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert run.cache.means.tolist() == pytest.approx(means_by_hand(cache), rel=1e-4)
    assert not run.cache.pending.any()
    assert all(not torch.equal(p, q) for p, q in zip(run.raw.parameters(), start, strict=True))
    assert run.raw.calls[-1][2].dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


def test_the_gradient_is_that_of_the_mean_over_micro_batches() -> None:
    """accelerate divides a loss by the number of micro-batches: nothing here may do so again."""
    run = Run()
    run.step()
    set_seed(3)
    student = Student()  # as the run began
    losses = []
    for micro_batch, (noise, (clips, (x_t, times, output), _)) in enumerate(zip(run.noise, run.seen, strict=True)):
        x_0 = generated(student, noise, micro_batch)
        motion = motion_gradient(x_0.detach())
        assert bool(motion.any()) == (micro_batch == 0)  # the other one is at the floor
        target = torch.tensor(regression_by_hand(clips, (x_t, times, output))[2])
        # The cache is empty, so that every weight is 1.
        regression = ((student(x_t, torch.tensor(times), ["one", "two"]) - target) ** 2).mean()
        losses.append((x_0**2).mean() + regression + (motion * x_0).sum())
    (torch.stack(losses).sum() / ROUNDS).backward()
    for moved, start in zip(run.raw.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(moved, start - 0.1 * start.grad, rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_from_save_state(tmp_path: Path) -> None:
    run = Run()
    for step in range(STEPS):
        if step == STEPS // 2:
            run.accelerator.save_state(str(tmp_path))
        run.step()
    forget()
    resumed = Run()
    resumed.step()  # another history, to be overwritten
    resumed.accelerator.load_state(str(tmp_path))
    resumed.losses.clear()
    resumed.position = STEPS // 2 * ROUNDS
    for _ in range(STEPS // 2, STEPS):
        resumed.step()
    assert resumed.losses == run.losses[STEPS // 2 * ROUNDS :]
    assert_same_state(resumed.state(), run.state())
    assert run.cache.seen.any()


def test_the_checkpoint_has_tensors_and_no_class_of_ours(tmp_path: Path) -> None:
    run = Run()
    run.step()
    run.accelerator.save_state(str(tmp_path))
    path = tmp_path / "custom_checkpoint_0.pkl"
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        strings = {str(argument) for _, argument, _ in pickletools.genops(archive.read(name))}
    assert any("_rebuild_tensor" in string for string in strings)
    assert not [string for string in strings if "avd" in string]
    assert_same_state(dict(torch.load(path, weights_only=True)), run.state())


def test_a_cache_of_other_steps_is_refused(tmp_path: Path) -> None:
    run = Run()
    run.accelerator.save_state(str(tmp_path))
    forget()
    accelerator = Accelerator(cpu=True)
    terms_of(accelerator, AVDConfig(timesteps=(1000, 500)))
    accelerator.prepare(*trained())
    with pytest.raises(RuntimeError, match="the saved cache is for the grid"):
        accelerator.load_state(str(tmp_path))


def test_a_checkpoint_from_before_the_terms_is_loaded_first(tmp_path: Path) -> None:
    Accelerator(cpu=True).save_state(str(tmp_path))
    forget()
    accelerator = Accelerator(cpu=True)
    accelerator.load_state(str(tmp_path))
    terms_of(accelerator)
    with pytest.raises(RuntimeError, match="does not match the number of registered objects"):
        accelerator.load_state(str(tmp_path))


def run_on_rank(folder: str) -> tuple[list[list[tuple[float, float]]], dict[str, Tensor], dict[str, Tensor], list[Any]]:
    run = Run()
    assert run.accelerator.num_processes == 2
    assert isinstance(run.scope["student"], nn.parallel.DistributedDataParallel)
    for step in range(STEPS):
        if step == STEPS // 2:
            run.accelerator.save_state(folder)
        run.step()
    losses, state = [pairs_by_hand(seen) for seen in run.seen], run.state()
    run.accelerator.load_state(folder)
    run.position = STEPS // 2 * ROUNDS
    for _ in range(STEPS // 2, STEPS):
        run.step()
    weights = [p.tolist() for p in run.raw.parameters()]
    # The last to hold the process group must not be a reducer: its end waits, with the interpreter's lock, for a thread
    # of gloo that may be waiting for that lock.
    student = weakref.ref(run.scope.pop("student"))
    run.accelerator.free_memory()
    gc.collect()
    assert student() is None
    run.accelerator.end_training()
    return losses, state, run.state(), weights


def test_two_processes_have_one_cache(tmp_path: Path) -> None:
    ranks = on_ranks(2, run_on_rank, str(tmp_path))
    (first, state, resumed, weights), (second, other_state, other_resumed, other_weights) = ranks
    for other in (other_state, resumed, other_resumed):
        assert_same_state(other, state)
    assert weights == other_weights
    assert [t for pairs in first for t, _ in pairs] != [t for pairs in second for t, _ in pairs]
    cache = ReferenceCache()
    for step in range(STEPS):
        micro_batches = slice(step * ROUNDS, (step + 1) * ROUNDS)
        cache.iterate([pair for pairs in first[micro_batches] + second[micro_batches] for pair in pairs])
    assert state["objective.regression.cache.means"].tolist() == pytest.approx(means_by_hand(cache), rel=1e-4)


# --- Errors


def terms_of(accelerator: Any, config: AVDConfig | None = None, **options: Any) -> AcceleratorTerms:
    return AcceleratorTerms(
        accelerator, config or AVDConfig(), rectified_flow(), lambda x, t, b: x, lambda b: b, **options
    )


def test_without_accumulation_every_call_is_an_iteration() -> None:
    accelerator = Accelerator(cpu=True)
    terms = terms_of(accelerator, AVDConfig(regression=RegressionConfig(order="update_first"), motion=None))
    assert terms.objective.regression.cache.auto_update
    with torch.no_grad():  # its student has no parameters
        terms(torch.randn(2, 4, 3, 2, 2))
    assert terms.objective.regression.cache.seen.any()
    assert terms_of(accelerator, AVDConfig(regression=None)).objective.regression is None


def test_continuous_times_have_bins_that_wait_for_the_optimizer_step() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    cache = terms_of(accelerator, time_range=(0, 1000), bins=5).objective.regression.cache
    assert cache.timesteps.tolist() == [100, 300, 500, 700, 900]
    assert not cache.auto_update


def test_wrong_options_are_refused() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="auto_update is not to be set"):
        terms_of(accelerator, AVDConfig(regression=RegressionConfig(auto_update=False)))
    with pytest.raises(ValueError, match="needs auto_update=True"):
        terms_of(accelerator, AVDConfig(regression=RegressionConfig(order="update_first")))
    with pytest.raises(ValueError, match="images have none"):
        terms_of(accelerator, AVDConfig(motion=MotionConfig()), layout="BCHW")
    with pytest.raises(TypeError, match=r"must be an accelerate\.Accelerator, got AVDConfig"):
        terms_of(AVDConfig())
    assert not accelerator._custom_objects


def test_a_missing_or_moved_accelerate_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    with monkeypatch.context() as patch:
        patch.delattr(Accelerator, "sync_gradients")
        with pytest.raises(
            RuntimeError, match=rf"Accelerator has no sync_gradients: not the accelerate {accelerate.__version__}"
        ):
            terms_of(accelerator)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=rf"accelerate is needed here.*proven on {PROVEN_ON}"):
        terms_of(accelerator)
