import math
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from avd_core import AdaptiveRegressionLoss, LossMeanCache
from loss_cases import GRID
from references import ReferenceCache
from tensors import assert_same_state, cut, randn, state_of
from watchers import NoArithmetic

losses = st.floats(0, 1000, width=32)
samples = st.tuples(st.sampled_from(GRID), losses)
iterations = st.lists(st.lists(samples, min_size=1, max_size=6), min_size=1, max_size=6)


def record(cache: LossMeanCache, batch: list[tuple[float, float]]) -> Tensor:
    """One call with a list of (timestep, loss); returns the means."""
    timesteps, values = zip(*batch, strict=True)
    return cache(torch.tensor(timesteps), torch.tensor(values)).means


def means_of(cache: LossMeanCache) -> dict[float, float]:
    """Timestep -> mean, for the entries that have one."""
    entries = zip(cache.timesteps.tolist(), cache.means.tolist(), cache.seen.tolist(), strict=True)
    return {timestep: mean for timestep, mean, seen in entries if seen}


def assert_means(cache: LossMeanCache, expected: dict[float, float], rtol: float = 1e-5, atol: float = 1e-4) -> None:
    actual = means_of(cache)
    assert actual.keys() == expected.keys()
    for timestep, mean in expected.items():
        assert actual[timestep] == pytest.approx(mean, rel=rtol, abs=atol)


def assert_spreads(cache: LossMeanCache, expected: list[float], atol: float = 1e-3) -> None:
    assert cache.spreads.tolist() == pytest.approx(expected, rel=1e-3, abs=atol)


# --- Eq. 6


@given(iterations, st.sampled_from([0.0, 0.5, 0.95]))
def test_means_and_returned_values_are_the_reference(batches: list[list[tuple[float, float]]], decay: float) -> None:
    cache, reference = LossMeanCache(GRID, decay=decay), ReferenceCache(decay)
    for batch in batches:
        expected = [reference.read(timestep, loss) for timestep, loss in batch]
        torch.testing.assert_close(record(cache, batch), torch.tensor(expected), rtol=1e-5, atol=1e-4)
        reference.iterate(batch)
    assert_means(cache, reference.means)
    assert_spreads(cache, [reference.spread(timestep) for timestep in GRID])


def test_an_entry_starts_with_its_first_loss_not_at_zero() -> None:
    cache = LossMeanCache(GRID, decay=0.95)
    record(cache, [(900, 4.0)])
    assert means_of(cache) == {900: 4.0}
    record(cache, [(900, 8.0)])
    assert means_of(cache)[900] == pytest.approx(0.95 * 4.0 + 0.05 * 8.0)


def test_an_entry_without_a_mean_is_compared_with_the_loss_itself() -> None:
    cache = LossMeanCache(GRID)
    assert record(cache, [(1000, 3.0), (1000, 5.0), (522, 7.0)]).tolist() == [3.0, 5.0, 7.0]


def test_an_iteration_without_an_entry_leaves_its_mean_alone() -> None:
    cache = LossMeanCache(GRID)
    record(cache, [(1000, 1.1), (522, 2.2)])
    before = means_of(cache)
    record(cache, [(522, 9.0)])
    assert means_of(cache)[1000] == before[1000]
    assert means_of(cache)[522] != before[522]


@given(iterations)
def test_a_mean_stays_within_the_range_of_the_losses_seen(batches: list[list[tuple[float, float]]]) -> None:
    cache = LossMeanCache(GRID, decay=0.7)
    for batch in batches:
        record(cache, batch)
    for timestep, mean in means_of(cache).items():
        seen = [loss for batch in batches for t, loss in batch if t == timestep]
        assert min(seen) * (1 - 1e-5) <= mean <= max(seen) * (1 + 1e-5)


@given(iterations, st.randoms(use_true_random=False))
def test_the_order_of_samples_within_an_iteration_does_not_matter(
    batches: list[list[tuple[float, float]]], random: Random
) -> None:
    cache, shuffled = LossMeanCache(GRID), LossMeanCache(GRID)
    for batch in batches:
        record(cache, batch)
        record(shuffled, random.sample(batch, len(batch)))
    assert_means(shuffled, means_of(cache))
    assert_spreads(shuffled, cache.spreads.tolist())


# --- The spread


@given(
    st.lists(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=6), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.5, 0.95]),
    st.sampled_from([0.0, 1.0, 1000.0, -50.0]),
    st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_a_spread_far_below_its_mean_is_not_lost_in_rounding(
    deviations: list[list[float]], decay: float, mean: float, cuts: list[bool]
) -> None:
    cache, reference = LossMeanCache(GRID, decay=decay, auto_update=False), ReferenceCache(decay)
    for iteration in deviations:
        rounded = torch.tensor([mean + d for d in iteration]).tolist()
        reference.iterate((900, loss) for loss in rounded)
        for part in cut([(900, loss) for loss in rounded], cuts[: len(rounded) - 1]):
            record(cache, part)
        cache.update()
    # Within a few units of float32's last place of the mean: a mean square less a squared mean would miss by a third.
    assert cache.spreads[1].item() == pytest.approx(reference.spread(900), rel=1e-3, abs=3e-6 * max(1, abs(mean)))


@pytest.mark.parametrize("order", ["weight_first", "update_first"])
def test_losses_are_given_the_spread_of_their_timestep_and_order(order: str) -> None:
    cache = LossMeanCache(GRID, decay=0.5, order=order)
    timesteps = torch.tensor([1000, 900])
    first = cache(timesteps, torch.tensor([1.0, 1.0])).spreads
    second = cache(timesteps, torch.tensor([3.0, 5.0])).spreads
    third = cache(timesteps, torch.tensor([2.0, 3.0])).spreads
    assert first.tolist() == [0, 0]
    # Of 1 and 3 with half the weight each: 1, without bias 1 / (1 - 1/2). The third loss is their mean, and 1/2, 1/4
    # and 1/4 the weights: (1/4 + 1/4) / (1 - 3/8).
    assert second.tolist() == pytest.approx([0, 0] if order == "weight_first" else [math.sqrt(2), math.sqrt(8)])
    after = [math.sqrt(2), math.sqrt(8)] if order == "weight_first" else [math.sqrt(0.8), math.sqrt(3.2)]
    assert third.tolist() == pytest.approx(after)


def test_there_is_no_spread_before_two_losses_were_seen() -> None:
    cache = LossMeanCache(GRID)
    assert cache.spreads.tolist() == [0, 0, 0, 0]
    record(cache, [(1000, 3.0), (522, 5.0)])
    assert cache.spreads.tolist() == [0, 0, 0, 0]
    record(cache, [(522, 6.0)])
    assert [spread > 0 for spread in cache.spreads.tolist()] == [False, False, False, True]


@given(st.floats(1e-3, 1e3), st.lists(st.integers(1, 7), min_size=1, max_size=20))
def test_equal_losses_have_no_spread_whatever_is_rounded(loss: float, sizes: list[int]) -> None:
    cache = LossMeanCache(GRID)
    for size in sizes:
        record(cache, [(900, loss)] * size)
    assert cache.spreads.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 1, 1, 1, 1, 1), (3,), (2, 1, 4), 20 * (1,)], ids=str)
def test_a_variance_is_right_on_average_after_any_iteration(sizes: tuple[int, ...], decay: float) -> None:
    """Each of 300 entries sees losses of its own."""
    entries = 300
    cache, timesteps = LossMeanCache(range(entries), decay=decay), torch.arange(entries)
    for iteration, size in enumerate(sizes):
        losses = 5 + 0.3 * randn(iteration, size * entries)
        cache(timesteps.repeat(size), losses)
    if decay == 0 and sizes[-1] == 1:
        assert not cache.spreads.any()  # one loss has all the weight
    else:
        squares = cache.spreads.square() / 0.09
        assert squares.mean().item() == pytest.approx(1, abs=4 * squares.std().item() / math.sqrt(entries))


@given(st.integers(0, 100), st.sampled_from([0.5, 0.95]))
def test_the_spread_of_many_losses_is_theirs(seed: int, decay: float) -> None:
    cache = LossMeanCache(GRID, decay=decay)
    for step in range(100):
        record(cache, [(900, loss) for loss in (5 + 0.3 * randn(1000 * seed + step, 16)).tolist()])
    assert cache.spreads[1].item() == pytest.approx(0.3, rel=0.25)


@pytest.mark.parametrize("size", [1, 2])
def test_a_variance_that_overflows_is_left_out_while_the_mean_goes_on(size: int) -> None:
    cache = LossMeanCache(GRID, decay=0.5)
    record(cache, [(900, 1.0), (900, 3.0)])
    for _ in range(3):
        record(cache, [(900, 1e25), (900, 3e25)][:size])
    assert cache.spreads.isfinite().all()
    assert means_of(cache)[900] > 5e24
    for loss in 130 * [1.0, 3.0]:
        record(cache, [(900, loss)])
    assert 0.8 < cache.spreads[1].item() < 1.2


# --- Iterations of several calls


@given(iterations, st.data())
def test_any_split_into_micro_batches_is_one_iteration(
    batches: list[list[tuple[float, float]]], data: st.DataObject
) -> None:
    whole, split = LossMeanCache(GRID), LossMeanCache(GRID, auto_update=False)
    for batch in batches:
        expected = record(whole, batch)
        cuts = data.draw(st.lists(st.booleans(), min_size=len(batch) - 1, max_size=len(batch) - 1))
        actual = torch.cat([record(split, part) for part in cut(batch, cuts)])
        split.update()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    assert_means(split, means_of(whole))
    assert_spreads(split, whole.spreads.tolist())


def test_micro_batches_of_a_step_read_the_means_from_before_it() -> None:
    cache = LossMeanCache(GRID, auto_update=False)
    record(cache, [(900, 1.0)])
    cache.update()
    for _ in range(3):
        assert record(cache, [(900, 50.0)]).item() == 1.0
    cache.update()
    assert means_of(cache)[900] == pytest.approx(0.95 * 1.0 + 0.05 * 50.0)


def test_an_update_without_losses_changes_nothing() -> None:
    cache = LossMeanCache(GRID, auto_update=False)
    record(cache, [(900, 3.0)])
    cache.update()
    before = state_of(cache)
    cache.update()
    assert_same_state(state_of(cache), before)


def forgotten(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "since its last update()" in record.message]


def test_a_forgotten_update_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    cache = LossMeanCache(GRID, auto_update=False)
    for _ in range(999):
        record(cache, [(900, 1.0)])
    assert not forgotten(caplog)
    for _ in range(1500):
        record(cache, [(900, 1.0)])
    assert len(forgotten(caplog)) == 1
    assert "Call it once per optimizer step" in forgotten(caplog)[0]
    cache.update()
    for _ in range(1500):
        record(cache, [(900, 1.0)])
    assert len(forgotten(caplog)) == 1


@pytest.mark.parametrize("kind", ["updated", "automatic", "evaluated"])
def test_nothing_is_told_where_updates_come_or_are_not_needed(caplog: pytest.LogCaptureFixture, kind: str) -> None:
    cache = LossMeanCache(GRID, auto_update=kind == "automatic").train(kind != "evaluated")
    for call in range(2100):
        record(cache, [(900, 1.0)])
        if kind == "updated" and call % 900 == 0:
            cache.update()
    assert not forgotten(caplog)


def test_evaluation_mode_reads_only() -> None:
    cache = LossMeanCache(GRID)
    record(cache, [(900, 2.0)])
    before = state_of(cache)
    cache.eval()
    assert record(cache, [(900, 7.0), (522, 5.0)]).tolist() == [2.0, 5.0]
    assert_same_state(state_of(cache), before)
    cache.train()
    record(cache, [(522, 5.0)])
    assert 522 in means_of(cache)


def test_update_first_shrinks_the_deviation_by_the_decay() -> None:
    # The released code's order: with k = 3 and a decay of 0.95 its sharpness is effectively 2.85.
    paper, released = LossMeanCache(GRID, decay=0.95), LossMeanCache(GRID, decay=0.95, order="update_first")
    for loss in (4.0, 5.5, 2.0, 9.0):
        deviation = loss - record(paper, [(757, loss)]).item()
        assert loss - record(released, [(757, loss)]).item() == pytest.approx(0.95 * deviation, abs=1e-5)
    assert means_of(released) == pytest.approx(means_of(paper))


def test_update_first_leaves_evaluation_alone() -> None:
    cache = LossMeanCache(GRID, order="update_first")
    record(cache, [(757, 4.0)])
    cache.eval()
    assert record(cache, [(757, 40.0)]).item() == 4.0
    assert means_of(cache) == {757: 4.0}


def test_reset_forgets_everything() -> None:
    cache = LossMeanCache(GRID, auto_update=False)
    record(cache, [(900, 3.0), (900, 4.0)])
    cache.update()
    record(cache, [(757, 3.0), (757, 4.0)])
    cache.reset()
    assert_same_state(state_of(cache), state_of(LossMeanCache(GRID)))


def test_no_gradient_passes_through_the_means() -> None:
    cache = LossMeanCache(GRID)
    values = torch.tensor([2.0, 3.0], requires_grad=True)
    statistics = cache(torch.tensor([900, 522]), values)
    assert not any(tensor.requires_grad for tensor in (*statistics, cache.means, cache.variances))


# --- Losses that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@given(batch=st.lists(samples, min_size=1, max_size=6), data=st.data())
def test_losses_that_are_not_finite_never_enter_a_mean(
    bad: float, batch: list[tuple[float, float]], data: st.DataObject
) -> None:
    where = data.draw(st.integers(0, len(batch)))
    timestep = data.draw(st.sampled_from(GRID))
    cache, clean = LossMeanCache(GRID), LossMeanCache(GRID)
    record(cache, [*batch[:where], (timestep, bad), *batch[where:]])
    record(clean, batch)
    assert_means(cache, means_of(clean))
    assert_spreads(cache, clean.spreads.tolist())


def test_an_entry_that_saw_only_nan_has_no_mean_yet() -> None:
    cache = LossMeanCache(GRID)
    assert math.isnan(record(cache, [(900, math.nan)]).item())
    assert means_of(cache) == {}
    assert record(cache, [(900, 6.0)]).item() == 6.0


def test_a_sum_that_overflows_never_enters_a_mean() -> None:
    cache = LossMeanCache(GRID)
    record(cache, [(900, 2.0)])
    record(cache, [(900, 3e38), (900, 3e38)])
    assert means_of(cache) == {900: 2.0}
    record(cache, [(900, 2.0)])
    assert means_of(cache) == {900: 2.0}


# --- The grid


@given(st.floats(405, 1100))
def test_a_sample_counts_for_the_nearest_entry(timestep: float) -> None:
    cache = LossMeanCache(GRID)
    timestep = torch.tensor(timestep, dtype=torch.float32).item()
    record(cache, [(timestep, 1.0)])
    nearest = min(GRID, key=lambda entry: abs(entry - timestep))
    assert list(means_of(cache)) == [nearest]


@pytest.mark.parametrize(("timestep", "entry"), [(999, 1000), (1000, 1000), (901, 900), (640, 757), (639, 522)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
def test_timesteps_may_be_integer_or_floating(timestep: float, entry: int, dtype: torch.dtype) -> None:
    cache = LossMeanCache(GRID)
    cache(torch.tensor([timestep], dtype=dtype), torch.tensor([1.0]))
    assert list(means_of(cache)) == [entry]


def test_a_rising_grid_and_one_of_a_single_entry_work_too() -> None:
    rising = LossMeanCache((0.25, 0.5, 1.0))
    record(rising, [(0.3, 2.0)])
    assert means_of(rising) == {0.25: 2.0}
    single = LossMeanCache((1000,))
    record(single, [(999, 2.0)])
    assert means_of(single) == {1000: 2.0}


@given(st.floats(-5, 5), st.floats(0.1, 1000), st.integers(1, 30), st.data())
def test_uniform_puts_a_time_into_its_part_of_the_range(
    low: float, width: float, bins: int, data: st.DataObject
) -> None:
    cache = LossMeanCache.uniform(low, low + width, bins)
    part = data.draw(st.integers(0, bins - 1))
    # Away from the borders, where rounding may decide either way.
    time = low + width * (part + data.draw(st.floats(0.05, 0.95))) / bins
    record(cache, [(time, 1.0)])
    assert cache.seen.nonzero().flatten().tolist() == [part]


def test_uniform_passes_options_on_and_covers_both_ends() -> None:
    cache = LossMeanCache.uniform(0, 1, 4, decay=0.5, auto_update=False)
    assert cache.timesteps.tolist() == [0.125, 0.375, 0.625, 0.875]
    assert (cache.decay, cache.auto_update) == (0.5, False)
    record(cache, [(0.0, 1.0), (1.0, 2.0)])
    cache.update()
    assert means_of(cache) == {0.125: 1.0, 0.875: 2.0}


# --- Device, dtype, state


@pytest.mark.parametrize(
    "convert",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.double(),
        lambda module: module.type(torch.float16),
    ],
    ids=["to", "half", "bfloat16", "double", "type"],
)
def test_buffers_keep_their_dtype_and_values_when_the_model_is_converted(
    convert: Callable[[nn.Module], nn.Module],
) -> None:
    cache = LossMeanCache((1000, 757.3), decay=0.95)
    record(cache, [(1000, 1.001)])  # Neither number is a bfloat16.
    before = state_of(cache)
    model = nn.Sequential(nn.Linear(2, 2), AdaptiveRegressionLoss(cache))
    convert(model)
    assert model[0].weight.dtype != torch.float32
    assert_same_state(state_of(cache), before)


def test_the_cache_moves_with_its_module() -> None:
    model = nn.Sequential(nn.Linear(2, 2), AdaptiveRegressionLoss(LossMeanCache(GRID)))
    model.to("meta", torch.bfloat16)
    cache = model[1].cache
    assert {buffer.device.type for buffer in cache.buffers()} == {"meta"}
    assert {buffer.dtype for buffer in cache.buffers()} == {torch.float32, torch.bool}


@pytest.mark.parametrize(
    "names",
    [
        ("timesteps", "means", "pending"),
        ("means",),
        ("variances",),
        ("variance_shares",),
        ("pending",),
        ("pending_squares",),
    ],
)
def test_buffers_that_were_cast_in_place_are_refused(names: tuple[str, ...]) -> None:
    """As FSDP casts the buffers of what it wraps."""
    cache = LossMeanCache(GRID)
    for name in names:
        buffer = cache.get_buffer(name)
        buffer.data = buffer.to(torch.bfloat16)
    with pytest.raises(TypeError, match=r"something has cast them .*buffer_dtype"):
        record(cache, [(1000, 1.0)])


def test_buffers_are_float32_whatever_the_default_is() -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        cache = LossMeanCache(GRID)
    finally:
        torch.set_default_dtype(before)
    assert {buffer.dtype for buffer in cache.buffers()} == {torch.float32, torch.bool}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_losses_of_any_floating_dtype_are_compared_in_float32_at_least(dtype: torch.dtype) -> None:
    cache = LossMeanCache(GRID)
    loss = torch.tensor([1.1], dtype=dtype)
    for _ in range(2):
        means = cache(torch.tensor([900]), loss).means
        assert means.dtype == torch.promote_types(dtype, torch.float32)
        assert means.item() == pytest.approx(loss.item(), rel=1e-7)
    assert cache.means.dtype == torch.float32


def test_the_first_deviation_is_exactly_zero_in_float64_too() -> None:
    first = torch.tensor([0.1, 1 / 3], dtype=torch.float64)
    assert torch.equal(LossMeanCache(GRID)(torch.tensor([900, 522]), first).means, first)


@given(iterations, st.lists(samples, max_size=4))
def test_a_restart_in_the_middle_of_an_iteration_changes_nothing(
    batches: list[list[tuple[float, float]]], rest: list[tuple[float, float]]
) -> None:
    cache = LossMeanCache(GRID, auto_update=False)
    for batch in batches[:-1]:
        record(cache, batch)
        cache.update()
    record(cache, batches[-1])
    restarted = LossMeanCache(GRID, auto_update=False)
    restarted.load_state_dict(state_of(cache))
    for each in (cache, restarted):
        if rest:
            record(each, rest)
        each.update()
    assert_same_state(state_of(restarted), state_of(cache))


def test_the_state_is_these_seven_buffers() -> None:
    # Checkpoints depend on the names.
    assert set(LossMeanCache(GRID).state_dict()) == {
        "timesteps",
        "means",
        "variances",
        "variance_shares",
        "seen",
        "pending",
        "pending_squares",
    }


def test_a_state_from_before_spreads_were_kept_loads_and_its_spread_starts_anew() -> None:
    cache = LossMeanCache(GRID, auto_update=False)
    record(cache, [(900, 2.0), (900, 6.0), (522, 1.0)])
    cache.update()
    record(cache, [(900, 8.0), (757, 1.0), (757, 3.0)])
    old = {name: value for name, value in state_of(cache).items() if name in ("timesteps", "means", "seen", "pending")}
    loaded = LossMeanCache(GRID, auto_update=False)
    record(loaded, [(900, 50.0), (900, 60.0)])
    loaded.update()
    nn.Sequential(loaded).load_state_dict({f"0.{name}": value for name, value in old.items()}, strict=True)
    assert set(old) == {"timesteps", "means", "seen", "pending"}
    assert loaded.spreads.tolist() == [0, 0, 0, 0]
    # Unknown, so a standardised weight is one half.
    regression = AdaptiveRegressionLoss(loaded, deviation="standardized").eval()
    assert regression(randn(0, 1, 3), randn(1, 1, 3), torch.tensor([900])).metrics["weights"].tolist() == [1.0]
    for each in (cache, loaded):
        each.update()
    assert means_of(loaded) == means_of(cache)
    # As if the mean of 4 were the one loss seen at 900 before the 8; those at 757 count as equal.
    assert loaded.spreads.tolist() == pytest.approx([0, math.sqrt(8), 0, 0])
    assert cache.spreads[2].item() == pytest.approx(math.sqrt(2))


def test_a_variance_from_before_its_share_was_kept_starts_anew() -> None:
    cache = LossMeanCache(GRID)
    record(cache, [(900, 2.0), (900, 6.0)])
    state = state_of(cache)
    del state["variance_shares"]
    cache.load_state_dict(state)
    assert (cache.spreads.tolist(), means_of(cache)) == ([0, 0, 0, 0], {900: 4.0})


def test_what_starts_anew_is_told_for_caches_only() -> None:
    balance = {"balance.means", "balance.calls"}
    assert LossMeanCache.starting_anew(balance | {"x/cache.means", "x/cache.pending"}) == {
        "x/cache.variances",
        "x/cache.variance_shares",
        "x/cache.pending_squares",
    }
    assert (
        LossMeanCache.starting_anew(balance | {f"cache.{name}" for name in LossMeanCache(GRID).state_dict()}) == set()
    )


@pytest.mark.parametrize("grid", [(1000, 900, 757, 520), (1, 0.9, 0.757, 0.522), (1000, 900)])
def test_the_state_of_another_grid_is_refused(grid: tuple[float, ...]) -> None:
    saved = LossMeanCache(GRID)
    record(saved, [(1000, 2.0)])
    cache = LossMeanCache(grid)
    before = state_of(cache)
    with pytest.raises(RuntimeError, match="timesteps"):
        cache.load_state_dict(saved.state_dict())
    assert_same_state(state_of(cache), before)


def test_the_refusal_names_both_grids_and_the_place() -> None:
    saved, model = nn.Sequential(LossMeanCache((4, 3))), nn.Sequential(LossMeanCache((4, 2)))
    with pytest.raises(RuntimeError, match=r"0\.timesteps: .*\[4\.0, 3\.0\].*\[4\.0, 2\.0\].*Build the cache"):
        model.load_state_dict(saved.state_dict())


# --- Wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": ()}, "at least one entry"),
        ({"timesteps": (1000, 522, 757)}, "strictly rising or strictly falling"),
        ({"timesteps": (1000, 1000)}, "strictly rising or strictly falling"),
        ({"timesteps": (1000, math.nan)}, "finite"),
        ({"timesteps": (math.inf, 1000)}, "finite"),
        ({"timesteps": GRID, "decay": 1.0}, r"below 1, got 1"),
        ({"timesteps": GRID, "decay": -0.1}, "at least 0 and below 1"),
        ({"timesteps": GRID, "decay": math.nan}, "at least 0 and below 1"),
        ({"timesteps": GRID, "order": "last"}, "'weight_first' or 'update_first'"),
        ({"timesteps": GRID, "order": "update_first", "auto_update": False}, "needs auto_update=True"),
    ],
)
def test_wrong_options_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossMeanCache(**arguments)


@pytest.mark.parametrize("arguments", [(0, 1, 0), (1, 0, 4), (1, 1, 4), (0, math.inf, 4), (math.nan, 1, 4)])
def test_uniform_refuses_an_empty_range(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="low < high and bins >= 1"):
        LossMeanCache.uniform(*arguments)


@pytest.mark.parametrize(
    ("timesteps", "values", "error", "message"),
    [
        (torch.tensor([900]), torch.tensor([1]), TypeError, r"floating.*losses\.float\(\)"),
        (torch.tensor([900]), [1.0], TypeError, "torch.Tensor"),
        ([900], torch.ones(1), TypeError, "timesteps must be a torch.Tensor"),
        (torch.tensor([900]), torch.tensor(1.0), ValueError, r"shape \[B\]"),
        (torch.tensor([[900]]), torch.ones(1, 1), ValueError, r"shape \[B\]"),
        (torch.tensor(900), torch.ones(1), ValueError, r"shape \[1\].*expand\(1\)"),
        (torch.full((1, 3), 900), torch.ones(1), ValueError, r"got \[1, 3\]\. Times of single frames are not taken"),
        (torch.tensor([900]), torch.ones(2), ValueError, r"shape \[2\].*got \[1\]"),
        (torch.tensor([[900], [900]]), torch.ones(2), ValueError, r"shape \[2\]"),
        (torch.tensor([900], device="meta"), torch.ones(1), ValueError, r"meta.*cpu.*\.to\(device\)"),
        (torch.ones(1, device="meta"), torch.ones(1, device="meta"), ValueError, r"cpu.*meta.*\.to\(device\)"),
    ],
)
def test_wrong_input_is_refused_before_anything_changes(
    timesteps: Any, values: Any, error: type[Exception], message: str
) -> None:
    cache = LossMeanCache(GRID)
    before = state_of(cache)
    with pytest.raises(error, match=message), NoArithmetic():
        cache(timesteps, values)
    assert_same_state(state_of(cache), before)


ANOTHER_UNIT = {
    "sigma for t": (GRID, 0.757, "Multiply times in"),
    "t for sigma": ((1.0, 0.9, 0.757, 0.522), 757, "Divide them by"),
    "t for a range of sigma": ([0.1, 0.2, 0.9], 500, "Divide them by"),
    "t for TrigFlow": ((1.57, 1.0, 0.5), 500, "Pass them in the grid's unit"),
    "negative": (GRID, -1000, "Pass them in the grid's unit"),
    "infinite": (GRID, math.inf, "They must be finite"),
    "infinite for sigma": ((1.0, 0.5), math.inf, "They must be finite"),
    "not a number": (GRID, math.nan, "They must be finite"),
}


@pytest.mark.parametrize("case", ANOTHER_UNIT)
@pytest.mark.parametrize("order", ["first", "last"])
def test_timesteps_in_another_unit_are_refused(case: str, order: str) -> None:
    grid, timestep, hint = ANOTHER_UNIT[case]
    cache = LossMeanCache(grid)
    good = cache.timesteps[0].item()
    timesteps = torch.tensor([timestep, good] if order == "first" else [good, timestep])
    before = state_of(cache)
    with pytest.raises(ValueError, match=rf"outside the cache's grid.*\]\. {hint}"):
        cache(timesteps, torch.ones(2))
    assert_same_state(state_of(cache), before)


def test_a_grid_of_equal_steps_refuses_its_own_sigmas() -> None:
    """The first entry of times in [0, 1] is nearly one step away from the last of the grid."""
    cache = LossMeanCache((1000, 750, 500, 250))
    with pytest.raises(ValueError, match="outside the cache's grid"):
        cache(torch.tensor([0.75]), torch.ones(1))
    assert not cache.seen.any()


@pytest.mark.parametrize("bins", [1, 3, 20])
def test_the_ends_belong_to_a_range(bins: int) -> None:
    cache = LossMeanCache.uniform(0, 0.7, bins)
    cache(torch.tensor([0.0, 0.7]), torch.ones(2))
    assert cache.seen[0]
    assert cache.seen[-1]


def test_a_range_refuses_times_in_another_unit_too() -> None:
    with pytest.raises(ValueError, match="outside the cache's grid"):
        LossMeanCache.uniform(0, 1, 20)(torch.tensor([500.0]), torch.ones(1))


def test_repr_names_the_options() -> None:
    assert "4 entries in [522, 1000], decay=0.95, order='weight_first'" in repr(LossMeanCache(GRID))


def test_a_mistaken_unit_is_refused_on_a_grid_of_one_step() -> None:
    cache = LossMeanCache((1000,))
    cache(torch.tensor([999]), torch.ones(1))
    with pytest.raises(ValueError, match="outside the cache's grid"):
        cache(torch.tensor([0.999]), torch.ones(1))
