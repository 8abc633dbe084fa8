"""The recipe of docs/hosts.md is run as it stands there, and what its table and the adapters name as proven is one."""

import math
import os
import re
import subprocess
import sys
import tomllib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from avd_integrations import accelerate, consistency, dmd2, fastgen, fastvideo, rcm, self_forcing
from references import ReferenceCache, mean, reference_motion, reference_sample_losses, reference_weights

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "hosts.md").read_text()
LOOP, COMPARISON, READY, OPPOSITE, KEEPING, KEPT = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
HOSTS: dict[str, dict[str, Any]] = tomllib.loads((ROOT / "tests" / "hosts" / "hosts.toml").read_text())
ADAPTERS = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        accelerate,
        consistency,
        dmd2,
        fastgen,
        fastvideo,
        rcm,
        self_forcing,
    )
}
SHAPE = (2, 5, 3, 4, 4)  # [B, F, C, H, W]


class Student(nn.Module):
    """Its velocity is a multiple of what it sees; notes what it is asked with gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.8))
        self.seen: list[tuple[Tensor, Tensor, Tensor, float]] = []

    def forward(self, x_t: Tensor, times: Tensor, text: str) -> Tensor:
        assert text == "a cat"
        output = self.factor * x_t
        self.seen.append((x_t.detach(), times, output.detach(), self.factor.item()))
        return output


class Host:
    """What the page leaves to the host; generated clips move less than the floor asks for."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.batches = [{"latents": self.randn() * (0.8 + 0.2 * (i % 3)), "text": "a cat"} for i in range(100)]
        self.samples: list[Tensor] = []
        self.logged: list[tuple[int, dict[str, float]]] = []

    def randn(self) -> Tensor:
        return torch.randn(SHAPE, generator=self.generator)

    def sample(self, student: Student, text: str) -> Tensor:
        x_0 = 0.3 * student.factor * self.randn()
        self.samples.append(x_0.detach())
        return x_0

    def matching_loss(self, x_0: Tensor, text: str) -> Tensor:
        return x_0.detach().square().mean()  # without gradient: what moves the student is what the page adds

    def run(self, student: Student) -> dict[str, Any]:
        scope: dict[str, Any] = {
            "student": student,
            "device": "cpu",
            "batches": self.batches,
            "sample": self.sample,
            "matching_loss": self.matching_loss,
            "log": lambda values, step: self.logged.append((step, values)),
        }
        exec(LOOP, scope)
        return scope


def check_by_hand(host: Host, student: Student, cache: ReferenceCache) -> None:
    """Every logged value against Eq. 5-8 in plain arithmetic."""
    for (_, values), x_0, batch, seen in zip(host.logged, host.samples, host.batches, student.seen, strict=True):
        x_t, times, output, _ = seen
        sigma = times.view(-1, 1, 1, 1, 1)
        noise = (x_t - (1 - sigma) * batch["latents"]) / sigma
        losses = reference_sample_losses(output.tolist(), (noise - batch["latents"]).tolist())
        usual = [cache.read(time, loss) for time, loss in zip(times.tolist(), losses, strict=True)]
        weights = reference_weights(losses, usual, sharpness=3.0, weight=2.0)
        cache.iterate(list(zip(times.tolist(), losses, strict=True)))
        regression = mean([weight * loss for weight, loss in zip(weights, losses, strict=True)])
        motion = reference_motion(x_0.transpose(1, 2).tolist())
        assert motion > 0.05 * 0.6 + 1e-3  # not at the floor
        assert math.isclose(values["regression/loss"], regression, rel_tol=1e-4)
        assert math.isclose(values["motion/loss"], motion, rel_tol=1e-4)
        matching = x_0.square().mean().item()
        assert math.isclose(values["loss"], matching + regression + motion, rel_tol=1e-4)


def test_the_loop_trains_saves_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache, student, host = ReferenceCache(), Student(), Host(0)
    host.run(student)
    check_by_hand(host, student, cache)
    assert [step for step, _ in host.logged] == list(range(1, 101))
    first, second = (factor for *_, factor in student.seen[:2])
    # AdamW's first step is as long as its learning rate where there is a gradient; decay alone is a hundredth of it.
    assert 0.5e-3 < abs(second - first) < 1.5e-3

    other, later = Student(), Host(1)
    second = later.run(other)
    assert [step for step, _ in later.logged] == list(range(101, 201))
    assert other.seen[0][-1] == student.factor.item()
    check_by_hand(later, other, cache)  # with the means of the first run
    assert second["optimizer"].state_dict()["state"][0]["step"] == 200
    own = second["terms"].objective.regression.cache
    for time, value in zip(own.timesteps.tolist(), own.means.tolist(), strict=True):
        assert math.isclose(value, cache.means.get(time, 0.0), rel_tol=1e-4)


@pytest.fixture
def scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a reader has after a step of the loop."""
    monkeypatch.chdir(tmp_path)
    host = Host(0)
    del host.batches[1:]
    return host.run(Student())


@pytest.mark.parametrize("sign", [1, -1])
def test_the_comparison_tells_a_sign(scope: dict[str, Any], sign: int) -> None:
    scope["host_x_0"] = lambda prediction, x_t, times: x_t - sign * times.view(-1, 1, 1, 1, 1) * prediction
    with nullcontext() if sign == 1 else pytest.raises(AssertionError, match="not close"):
        exec(COMPARISON, scope)


def test_a_prediction_that_is_there_already_has_both_terms(scope: dict[str, Any]) -> None:
    clips, noise = Host(1).randn(), Host(2).randn()
    times = torch.tensor([0.9, 0.522])
    sigma = times.view(-1, 1, 1, 1, 1)
    x_t = (1 - sigma) * clips + sigma * noise
    prediction = 0.8 * noise - 0.2 * clips
    scope |= {"prediction": prediction.requires_grad_(), "x_t": x_t, "clips": clips, "noise": noise, "times": times}
    exec(READY, scope)
    # The first losses of their times are what is usual there, so each has half of the weight of 2.
    regression = mean(reference_sample_losses(prediction.tolist(), (noise - clips).tolist()))
    x_0 = (x_t - sigma * prediction).transpose(1, 2)
    assert math.isclose(scope["added"].loss.item(), regression + reference_motion(x_0.tolist()), rel_tol=1e-4)
    with pytest.raises(ValueError, match="x_t is not made of clips and noise at times"):
        exec(READY, scope | {"x_t": Host(3).randn()})  # as from backward simulation


def test_the_opposite_sign_is_turned(scope: dict[str, Any]) -> None:
    """A student that knows its clip makes no error."""
    batch = scope["batches"][0]
    one = torch.ones((), requires_grad=True)

    def student(x_t: Tensor, t: Tensor, text: str) -> Tensor:
        alpha = t.view(-1, 1, 1, 1, 1)
        noise = (x_t - alpha * batch["latents"]) / (1 - alpha)
        return one * (batch["latents"] - noise)

    scope["student"] = student
    exec(OPPOSITE, scope)
    assert scope["terms"].on_clips(batch).metrics["regression/sample_losses"].max() < 1e-9


def test_a_sample_that_is_kept_has_its_gradient_and_is_let_go(scope: dict[str, Any]) -> None:
    student, batch = scope["student"], scope["batches"][0]
    made: list[Tensor] = []

    class Distiller:
        def generate(self, text: str) -> Tensor:
            made.append(0.3 * student.factor * Host(1).randn())
            return made[-1]

        def loss(self, batch: dict[str, Any]) -> Tensor:
            return 0 * self.generate(batch["text"]).square().mean()

    scope |= {"distiller": Distiller(), "batch": batch}
    exec(KEEPING, scope)
    student.zero_grad()
    exec(KEPT, scope)
    assert scope["distiller"].generate.sample is None
    motion = reference_motion(made[0].transpose(1, 2).tolist())
    assert math.isclose(scope["added"].metrics["motion/loss"].item(), motion, rel_tol=1e-4)
    assert student.factor.grad.abs() > 0


def rows() -> list[list[str]]:
    """Cells of the table: page, module, how, proven on, ran, did not."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| [")]
    return [[cell.strip(" `") for cell in line.strip("| ").split(" | ")] for line in lines]


@pytest.mark.parametrize(("page", "module", "how", "proven", "ran", "not_run"), rows())
def test_a_row_its_page_and_its_adapter_name_what_was_proven(
    page: str, module: str, how: str, proven: str, ran: str, not_run: str
) -> None:
    (path,) = re.findall(r"\((hosts/\w+\.md)\)", page)
    assert proven in (ROOT / "docs" / path).read_text()
    assert re.search(rf"\b{re.escape(proven)}\b", ADAPTERS[module].PROVEN_ON)


def test_the_table_has_every_host_that_is_tested() -> None:
    expected = [
        host["commit"][:7] if "commit" in host else host["release"].partition("==")[2]
        for host in HOSTS.values()
        if not host.keys() & {"program", "judge"}
    ]
    constraints = (ROOT / "constraints.txt").read_text()
    (accelerates,) = re.findall(r"^accelerate==(.*)$", constraints, re.MULTILINE)
    assert sorted(row[3] for row in rows()) == sorted([*expected, accelerates])


def test_the_page_of_exports_names_the_programs_that_are_tested() -> None:
    expected = {(name, host["commit"][:7]) for name, host in HOSTS.items() if "program" in host}
    page = (ROOT / "docs" / "export.md").read_text()
    assert set(re.findall(r"^\| (\S+) \| `(\w{7})`", page, re.MULTILINE)) == expected


def test_the_page_of_vbench_names_the_suites_that_are_tested() -> None:
    page = (ROOT / "docs" / "vbench.md").read_text()
    for name, host in HOSTS.items():
        if "judge" in host:
            proven = host["commit"][:7] if "commit" in host else host["release"].partition("==")[2]
            assert re.search(rf"^\| {re.escape(name)} \| `{re.escape(proven)}` \|", page, re.MULTILINE), name


def test_nothing_of_a_host_is_imported_with_its_adapter() -> None:
    hosts = ("accelerate", "causvid", "diffusers", "fastgen", "fastvideo", "imaginaire", "main", "rcm", "transformers")
    adapters = ", ".join(module.__name__ for module in ADAPTERS.values())
    program = f"import sys, {adapters}; print(*(sys.modules.keys() & {set(hosts)!r}))"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "integrations")))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == []
