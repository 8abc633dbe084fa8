"""Two real processes against one with the whole batch. Starting them is slow, so one start answers many questions."""

import os
import pickle
import random
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import avd_core
from avd_core import (
    AdaptiveRegressionLoss,
    AVDObjective,
    ClippedTemporalVarianceLoss,
    EMACallback,
    GradientBalance,
    LossMeanCache,
    NonFiniteError,
    NonFiniteGuard,
)
from launches import in_group
from loss_cases import GRID
from references import ReferenceCache
from tensors import assert_same_state, randn, state_of

WORLD = 2
SPLITS = range(12)
STEPS = range(3)

Ask = Callable[[str], list[Any]]  # what each rank answered to the question of that name


def average(gradient: Tensor) -> Tensor:
    """What DDP and FSDP2 do with gradients."""
    gradient = gradient.clone()
    dist.all_reduce(gradient)
    return gradient / WORLD


def share(rank: int, first: int, total: int) -> list[int]:
    """The samples of a rank: the first ``first`` of the batch are rank 0's, the rest rank 1's."""
    return list(range(first)) if rank == 0 else list(range(first, total))


# --- Regression


class Regression:
    """A student of one matrix, trained on batches of 6 samples that depend on a seed alone."""

    def __init__(self, seed: int, **options: Any) -> None:
        self.seed = seed
        self.matrix = randn(seed, 3, 3).requires_grad_()
        self.loss = AdaptiveRegressionLoss(LossMeanCache(GRID, decay=0.6, **options))

    def part(self, step: int, samples: list[int]) -> Tensor:
        """The samples' loss, weighted with their share of the batch."""
        x, target = (randn(1000 * self.seed + 10 * step + i, 6, 3, 4) for i in range(2))
        timesteps = torch.tensor([1000, 522, 522, 522, 1000, 757])
        prediction = torch.einsum("oc,bcf->bof", self.matrix, x)
        return self.loss(prediction[samples], target[samples], timesteps[samples]).loss * len(samples) / 6


def regression_splits(rank: int) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Any split into ranks and micro-batches: loss, gradient, cache after every step."""
    outcomes = []
    for seed in SPLITS:
        draws = random.Random(seed)
        run = Regression(seed, auto_update=False)
        for step in STEPS:
            samples = share(rank, draws.randint(1, 5), 6)
            cuts = sorted(random.Random(f"{seed} {step} {rank}").sample(range(1, 6), 2))
            parts = [samples[a:b] for a, b in zip([0, *cuts], [*cuts, 6], strict=True) if samples[a:b]]
            loss = WORLD * sum(run.part(step, part) for part in parts)
            run.loss.cache.update()
            gradient = torch.autograd.grad(loss, run.matrix)[0]
            outcomes.append((average(loss.detach()), average(gradient), state_of(run.loss)))
    return outcomes


def regression_on_ddp(rank: int) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """One call per step under the real DistributedDataParallel."""
    run = Regression(0)
    model = DistributedDataParallel(linear())
    outcomes = []
    for step in STEPS:
        x, target = (randn(10 * step + i, 4, 3) for i in range(2))
        samples = share(rank, 2, 4)
        model.zero_grad()
        loss = run.loss(model(x[samples]), target[samples], torch.tensor([1000, 900, 1000, 522])[samples]).loss
        loss.backward()
        outcomes.append((average(loss.detach()), model.module.weight.grad, state_of(run.loss)))
    return outcomes


def linear() -> nn.Linear:
    model = nn.Linear(3, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(randn(7, 3, 3))
    return model


# --- Cache


def cache_cases(rank: int) -> dict[str, tuple[list[float], list[float], list[bool]]]:
    """Means and variances after two iterations in which the ranks see different entries, and not all of them finite."""
    own_group = [dist.new_group([r]) for r in range(WORLD)][rank]
    caches = {
        "synchronised": LossMeanCache(GRID, decay=0.5),
        "alone": LossMeanCache(GRID, decay=0.5, sync_ranks=False),
        "own group": LossMeanCache(GRID, decay=0.5, process_group=own_group),
    }
    for iteration in CACHE_ITERATIONS:
        for cache in caches.values():
            timesteps, losses = zip(*iteration[rank], strict=True)
            cache(torch.tensor(timesteps), torch.tensor(losses))
    return {
        name: (cache.means.tolist(), cache.variances.tolist(), cache.seen.tolist()) for name, cache in caches.items()
    }


def close_losses(rank: int) -> list[float]:
    """The spread after each of three iterations of losses that differ by a ten-thousandth, two on one rank."""
    cache, spreads = LossMeanCache(GRID, decay=0.5), []
    for losses in CLOSE_LOSSES:
        own = torch.tensor(losses[:2] if rank == 0 else losses[2:])
        cache(torch.full((len(own),), 900), own)
        spreads.append(cache.spreads[1].item())
    return spreads


CLOSE_LOSSES = [(1000.1, 1000.2, 1000.4), (1000.2, 1000.15, 1000.3), (1000.3, 1000.0, 1000.5)]
NAN = float("nan")
CACHE_ITERATIONS = [
    ([(1000, 1.0), (757, 4.0)], [(1000, 3.0), (1000, 5.0)]),  # 1000 on both: (1 + 3 + 5) / 3, not the mean of means
    ([(900, NAN), (757, NAN)], [(757, 8.0), (522, 2.0)]),  # NaN on one rank only
]


# --- Motion

# Samples of each rank; the last two split around the floor: one rank alone would clip, the other would not.
MOTION_CASES = [
    ((2, 2), (1.0, 1.0)),
    ((1, 3), (1.0, 1.0)),
    ((3, 1), (0.2, 0.4)),
    ((2, 2), (0.1, 3.0)),
    ((1, 3), (3.0, 0.1)),
]


def motion_batch(seed: int, sizes: tuple[int, ...], scales: tuple[float, ...]) -> Tensor:
    """The whole batch before the student, each rank's samples moving by another amount."""
    scale = torch.cat(
        [torch.full((size,), scale, dtype=torch.float64) for size, scale in zip(sizes, scales, strict=True)]
    )
    return randn(seed, sum(sizes), 3, 4, 2, 2) * scale.view(-1, 1, 1, 1, 1)


def student(matrix: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("oc,bcfhw->bofhw", matrix, x)


def motion_cases(rank: int) -> list[tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor]]]:
    outcomes = []
    for seed, (sizes, scales) in enumerate(MOTION_CASES):
        matrix = randn(seed + 50, 3, 3).requires_grad_()
        x = motion_batch(seed, sizes, scales)[share(rank, sizes[0], sum(sizes))]
        output = ClippedTemporalVarianceLoss(floor=0.0, weight=1.0)(student(matrix, x))
        own = ClippedTemporalVarianceLoss(floor=0.0, weight=1.0, sync_ranks=False)(student(matrix, x))
        gradient = torch.autograd.grad(output.loss, matrix)[0]
        outcomes.append((output.loss.detach(), output.metrics, average(gradient), own.metrics))
    return outcomes


def motion_on_ddp(rank: int) -> tuple[Tensor, Tensor]:
    model = DistributedDataParallel(linear())
    x = motion_batch(3, (1, 3), (0.2, 0.3))[share(rank, 1, 4)]
    loss = ClippedTemporalVarianceLoss(weight=1.0)(model(x.movedim(1, -1)).movedim(-1, 1)).loss
    loss.backward()
    return loss.detach(), model.module.weight.grad


def motion_not_finite(rank: int) -> bool:
    x = motion_batch(0, (1, 1), (1.0, 1.0))[[rank]]
    if rank == 1:
        x[0, 0, 0, 0, 0] = NAN
    return ClippedTemporalVarianceLoss()(x.requires_grad_()).loss.isfinite().item()


# --- Balance, guard, compiler


def balance_calls(rank: int, sync_ranks: bool = True) -> list[tuple[float, float]]:
    balance = GradientBalance(target=0.5, decay=0.8, sync_ranks=sync_ranks)
    outcomes = []
    for call in range(4):
        gradients = balance_gradients(rank, call)
        outputs = [torch.zeros(3).requires_grad_() for _ in gradients]
        losses = [(output * g).sum() for output, g in zip(outputs, gradients, strict=True)]
        metrics = balance(losses[0], outputs[0], losses[1], outputs[1]).metrics
        outcomes.append((metrics["gradient_ratio"].item(), metrics["scale"].item()))
    return outcomes


def balance_gradients(rank: int, call: int) -> list[Tensor]:
    gradients = [(1 + rank) * randn(100 * rank + 10 * call + i, 3).float() for i in range(2)]
    if (rank, call) == (1, 2):
        gradients[0][0] = NAN
    return gradients


# (rank 0, rank 1) at each step
GUARD_LOSSES = [(1.0, 1.0), (1.0, NAN), (1.0, 1.0), (float("inf"), 1.0), (1.0, NAN), (NAN, NAN), (1.0, 1.0)]


def guard_answers(rank: int, sync_ranks: bool = True) -> tuple[list[bool | str], dict[str, int]]:
    guard = NonFiniteGuard(3, sync_ranks=sync_ranks)
    answers = []
    for step, losses in enumerate(GUARD_LOSSES):
        metrics = {"loss": torch.tensor(losses[rank]), "gradient_norm": torch.tensor(1.0)}
        try:
            answers.append(guard.before_step(step, metrics))
        except NonFiniteError as error:
            answers.append(str(error))
            break
    return answers, guard.state_dict()


def compiled_calls(rank: int) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Losses that reduce over ranks, compiled as one graph, beside the same in eager mode."""
    outcomes = []
    for compiled in (False, True):
        modules = [
            AdaptiveRegressionLoss(LossMeanCache(GRID)),
            ClippedTemporalVarianceLoss(floor=-9.0),
        ]
        calls = [torch.compile(m, fullgraph=True, backend="aot_eager") if compiled else m for m in modules]
        for step in range(2):
            x = randn(10 * step + rank, 2, 2, 3, 2, 2).float().requires_grad_()
            losses = calls[0](x, torch.zeros_like(x), torch.tensor([1000, 522])).loss, calls[1](x).loss
            gradient = torch.autograd.grad(sum(losses), x)[0]
        outcomes.append((torch.stack(losses).detach(), gradient, state_of(modules[0])))
    return outcomes


# --- FSDP2


class SmallStudent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 3)

    def forward(self, x_BCFHW: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x_BCFHW.movedim(1, -1)))).movedim(-1, 1).contiguous()


def fsdp_inputs(rank: int, step: int) -> tuple[Tensor, ...]:
    x, clip, target = (randn(100 * rank + 10 * step + i, 2, 3, 4, 2, 2).float() for i in range(3))
    return x, clip, target, torch.tensor([1000, 757] if rank == 0 else [757, 522])


def fsdp_objective() -> AVDObjective:
    return AVDObjective()


def fsdp_steps(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.utils import clip_grad_norm_

    mesh = init_device_mesh("cpu", (WORLD,))
    model, objective = SmallStudent(), fsdp_objective()
    for part in (model.first, model.second, model):
        fully_shard(part, mesh=mesh)
    ema = EMACallback(model.parameters(), 0.5, warmup=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    outcomes = []
    for step in range(2):
        optimizer.zero_grad()
        x, clip, target, timesteps = fsdp_inputs(rank, step)
        loss = objective(model(x), model(clip), target, timesteps).loss
        loss.backward()
        gradients = [p.grad.full_tensor() for p in model.parameters()]
        outcomes.append((average(loss.detach()), gradients, state_of(objective)))
        gradient_norm = clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        ema.after_step(step, {})
    with ema.average_parameters():
        averaged = [p.full_tensor().detach() for p in model.parameters()]
    guard = attempt(lambda: NonFiniteGuard().before_step(1, {"loss": loss.detach(), "gradient_norm": gradient_norm}))
    return {"steps": outcomes, "averaged": averaged, "guard": guard}


# --- One start for all of it


class Failed(str):
    """The traceback of a question that raised; it fails that question's tests and no others."""


def attempt(question: Callable[[], Any]) -> Any:
    try:
        return question()
    except Exception:
        return Failed(traceback.format_exc())


def identity(rank: int) -> tuple[int, int, int]:
    return rank, dist.get_world_size(), os.getpid()


QUESTIONS = {
    "identity": identity,
    "regression splits": regression_splits,
    "regression on DDP": regression_on_ddp,
    "cache": cache_cases,
    "close losses": close_losses,
    "motion": motion_cases,
    "motion on DDP": motion_on_ddp,
    "motion not finite": motion_not_finite,
    "balance": balance_calls,
    "balance alone": lambda rank: balance_calls(rank, sync_ranks=False),
    "guard": guard_answers,
    "guard alone": lambda rank: guard_answers(rank, sync_ranks=False),
    "compiled": compiled_calls,
    "FSDP2": fsdp_steps,
}


def answer_all(rank: int) -> dict[str, Any]:
    return {name: attempt(lambda question=question: question(rank)) for name, question in QUESTIONS.items()}


@pytest.fixture(scope="module")
def ask() -> Ask:
    results = in_group(WORLD, answer_all)

    def answers(name: str) -> list[Any]:
        """What each rank answered."""
        for rank, result in enumerate(results):
            if isinstance(result[name], Failed):
                pytest.fail(f"rank {rank}:\n{result[name]}")
        return [result[name] for result in results]

    return answers


# --- Regression and cache: two ranks are one batch


def test_any_split_into_ranks_and_micro_batches_is_one_batch(ask: Ask) -> None:
    ranks = ask("regression splits")
    assert_same_state(ranks[1], ranks[0])
    outcomes = iter(ranks[0])
    for seed in SPLITS:
        whole = Regression(seed)
        for step in STEPS:
            loss = whole.part(step, list(range(6)))
            expected = loss.detach(), torch.autograd.grad(loss, whole.matrix)[0], state_of(whole.loss)
            torch.testing.assert_close(next(outcomes), expected, rtol=1e-5, atol=1e-6)


def test_regression_under_ddp_is_one_process_with_the_whole_batch(ask: Ask) -> None:
    ranks = ask("regression on DDP")
    assert_same_state(ranks[1], ranks[0])
    loss_module, model = AdaptiveRegressionLoss(LossMeanCache(GRID, decay=0.6)), linear()
    for step in STEPS:
        x, target = (randn(10 * step + i, 4, 3) for i in range(2))
        loss = loss_module(model(x), target, torch.tensor([1000, 900, 1000, 522])).loss
        expected = loss.detach(), torch.autograd.grad(loss, model.weight)[0], state_of(loss_module)
        torch.testing.assert_close(ranks[0][step], expected, rtol=1e-5, atol=1e-6)


def test_the_cache_adds_sums_and_counts_of_all_ranks(ask: Ask) -> None:
    # 1000: of 1, 3 and 5 at once; 757: of 4 and 8, one after the other, with half the weight each.
    expected = [3.0, 0.0, 6.0, 2.0], [pytest.approx(8 / 3), 0.0, 4.0, 0.0], [True, False, True, True]
    assert [answer["synchronised"] for answer in ask("cache")] == [expected, expected]


@pytest.mark.parametrize("name", ["alone", "own group"])
def test_a_cache_can_stay_with_its_process(ask: Ask, name: str) -> None:
    first, second = (answer[name] for answer in ask("cache"))
    assert first == ([1.0, 0.0, 4.0, 0.0], [0.0] * 4, [True, False, True, False])
    assert second == ([4.0, 0.0, 8.0, 2.0], [1.0, 0.0, 0.0, 0.0], [True, False, True, True])


def test_the_spread_of_all_ranks_survives_a_mean_far_above_it(ask: Ask) -> None:
    reference = ReferenceCache(decay=0.5)
    expected = []
    for losses in CLOSE_LOSSES:
        reference.iterate((900, loss) for loss in torch.tensor(losses).tolist())
        expected.append(pytest.approx(reference.spread(900), rel=1e-2))
    assert ask("close losses") == [expected, expected]


# --- Motion


@pytest.mark.parametrize("case", range(len(MOTION_CASES)))
def test_synchronised_motion_is_one_process_with_the_whole_batch(ask: Ask, case: int) -> None:
    sizes, scales = MOTION_CASES[case]
    matrix = randn(case + 50, 3, 3).requires_grad_()
    whole = ClippedTemporalVarianceLoss(floor=0.0, weight=1.0)(student(matrix, motion_batch(case, sizes, scales)))
    gradient = torch.autograd.grad(whole.loss, matrix)[0]
    for answers in ask("motion"):
        loss, metrics, averaged, own = answers[case]
        torch.testing.assert_close((loss, metrics, averaged), (whole.loss.detach(), whole.metrics, gradient))
        # Without sync_ranks it would have been another value.
        assert (own["temporal_loss"] - whole.metrics["temporal_loss"]).abs() > 1e-3


def test_the_motion_cases_lie_on_both_sides_of_the_floor(ask: Ask) -> None:
    clipped = [answer[0].item() == 0 for answer in ask("motion")[0]]
    assert True in clipped
    assert False in clipped
    alone = [
        (a[3]["temporal_loss"] <= 0).item() != (b[3]["temporal_loss"] <= 0).item()
        for a, b in zip(*ask("motion"), strict=True)
    ]
    assert alone[-2:] == [True, True]


def test_synchronised_motion_under_ddp_is_one_process_with_the_whole_batch(ask: Ask) -> None:
    model = linear()
    x = motion_batch(3, (1, 3), (0.2, 0.3))
    loss = ClippedTemporalVarianceLoss(weight=1.0)(model(x.movedim(1, -1)).movedim(-1, 1)).loss
    gradient = torch.autograd.grad(loss, model.weight)[0]
    assert gradient.any()
    for answer in ask("motion on DDP"):
        torch.testing.assert_close(answer, (loss.detach(), gradient))


def test_nan_on_one_rank_shows_on_both(ask: Ask) -> None:
    assert ask("motion not finite") == [False, False]


# --- Balance and guard


def test_the_balance_is_equal_on_all_ranks(ask: Ask) -> None:
    first, second = ask("balance")
    assert first == second
    means = None
    for call, (ratio, scale) in enumerate(first):
        squares = [
            sum(balance_gradients(rank, call)[i].double().square().sum().item() for rank in range(WORLD)) / WORLD
            for i in range(2)
        ]
        if call != 2:  # NaN on one rank: left out on both
            means = squares if means is None else [0.8 * m + 0.2 * s for m, s in zip(means, squares, strict=True)]
        assert ratio == pytest.approx((means[0] / means[1]) ** 0.5, rel=1e-5)
        assert scale == pytest.approx(0.5 / ratio, rel=1e-5)


def test_a_balance_can_stay_with_its_process(ask: Ask) -> None:
    first, second = ask("balance alone")
    assert first != second
    gradients = balance_gradients(0, 0)
    assert first[0][0] == pytest.approx((gradients[0].norm() / gradients[1].norm()).item(), rel=1e-5)


def test_all_ranks_skip_and_stop_together_when_one_is_not_finite(ask: Ask) -> None:
    first, second = ask("guard")
    assert first == second
    answers, state = first
    assert answers[:5] == [True, False, True, False, False]
    assert len(answers) == 6
    assert answers[5].startswith("Step 5 of the model is not finite: loss on 2 rank(s); 3 in a row")
    assert state == {"skipped": 4, "consecutive": 3}


def test_a_guard_can_decide_alone(ask: Ask) -> None:
    (first, _), (second, _) = ask("guard alone")
    assert first == [True, True, True, False, True, False, True]
    assert second == [True, False, True, True, False, False, True]


def test_every_reduction_is_within_its_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two ranks cannot tell a group of both from the default one, so here the calls are looked at.
    group, asked, summed = object(), [], []

    def world_size(of: object) -> int:
        asked.append(of)
        return 2

    def sum_over_ranks(values: Tensor, within: object) -> Tensor:
        summed.append(within)
        return 2 * values

    for module in (avd_core.cache, avd_core.motion, avd_core.balance, avd_core.callbacks.non_finite):
        monkeypatch.setattr(module, "world_size", world_size)
        monkeypatch.setattr(module, "sum_over_ranks", sum_over_ranks)
    x = randn(0, 1, 2, 3, 1, 1).requires_grad_()
    LossMeanCache(GRID, process_group=group)(torch.tensor([900]), torch.ones(1))
    ClippedTemporalVarianceLoss(process_group=group)(x)
    GradientBalance(process_group=group)(x.sum(), x, x.sum(), x)
    NonFiniteGuard(process_group=group).before_step(0, {"loss": torch.ones(())})
    assert len(summed) == 5  # the cache's sums, and then its squares about their common mean
    assert {*asked, *summed} == {group}


# --- Compiler and FSDP2

needs_fsdp2_on_a_cpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason=f"FSDP2 of PyTorch {torch.__version__} does not run on a CPU"
)


def test_reductions_over_ranks_compile_into_the_graph(ask: Ask) -> None:
    for eager, compiled in ask("compiled"):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)
    (first, _), (second, _) = ask("compiled")
    assert_same_state(first[2], second[2])
    assert first[0][1] == second[0][1]


@needs_fsdp2_on_a_cpu
def test_the_objective_on_a_sharded_student_is_one_process_with_both_batches(ask: Ask) -> None:
    ranks = [answer["steps"] for answer in ask("FSDP2")]
    assert_same_state(ranks[1], ranks[0])
    model, objective = SmallStudent(), fsdp_objective()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step, outcome in enumerate(ranks[0]):
        optimizer.zero_grad()
        x, clip, target, timesteps = (
            torch.cat(pair) for pair in zip(*(fsdp_inputs(r, step) for r in range(WORLD)), strict=True)
        )
        loss = objective(model(x), model(clip), target, timesteps).loss
        loss.backward()
        gradients = [p.grad for p in model.parameters()]
        assert all(gradient.isfinite().all() for gradient in gradients)
        torch.testing.assert_close(outcome, (loss.detach(), gradients, state_of(objective)), rtol=1e-4, atol=1e-6)
        optimizer.step()


@needs_fsdp2_on_a_cpu
def test_a_sharded_student_has_an_average(ask: Ask) -> None:
    first, second = (answer["averaged"] for answer in ask("FSDP2"))
    assert_same_state(first, second)
    assert all(
        a.shape == p.shape and not torch.equal(a, p) for a, p in zip(first, SmallStudent().parameters(), strict=True)
    )


@needs_fsdp2_on_a_cpu
def test_the_guard_reads_the_gradient_norm_of_a_sharded_student(ask: Ask) -> None:
    # As in the example of Callback: clip_grad_norm_ returns a DTensor there.
    for answer in ask("FSDP2"):
        assert answer["guard"] is True, answer["guard"]


# --- Processes that fail


def raise_on_the_second(rank: int) -> None:
    if rank == 1:
        raise ValueError("the data ended")
    dist.barrier()  # waits for the other until it is stopped


def die_without_a_word(rank: int) -> None:
    os._exit(3)


def test_ranks_are_processes_of_one_group_and_answer_in_order(ask: Ask) -> None:
    (first, first_size, first_process), (second, second_size, second_process) = ask("identity")
    assert (first, first_size, second, second_size) == (0, 2, 1, 2)
    assert len({os.getpid(), first_process, second_process}) == 3


def test_a_rank_that_raises_fails_the_run_at_once() -> None:
    start = time.monotonic()
    # The other one, whose peer is gone, may have ended first; what the one that raised printed is told either way.
    with pytest.raises(RuntimeError, match=r"(?s)ended with exit code 1.*ValueError: the data ended"):
        in_group(WORLD, raise_on_the_second, timeout=100)
    assert time.monotonic() - start < 60


def test_a_rank_that_dies_fails_the_run() -> None:
    with pytest.raises(RuntimeError, match="ended with exit code 3"):
        in_group(WORLD, die_without_a_word)


def test_ranks_that_cannot_start_fail_the_run() -> None:
    with pytest.raises((pickle.PicklingError, AttributeError), match=r"pickle|local object"):
        in_group(WORLD, lambda rank: rank)


def test_ranks_that_take_too_long_fail_the_run() -> None:
    with pytest.raises(RuntimeError, match="had not finished"):
        in_group(WORLD, identity, timeout=0.01)
