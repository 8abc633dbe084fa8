import torch

from avd_trainer.runtime.draws import SampleDraws, shared_integer

CPU = torch.device("cpu")
KEY = (3, "generator", 7, 0)


def normal(key: tuple[int | str, ...] = KEY, samples: range = range(4)) -> torch.Tensor:
    return SampleDraws(key, samples, CPU).normal((2, 3))


def test_a_sample_draws_the_same_in_any_batch() -> None:
    whole = SampleDraws(KEY, range(4), CPU)
    parts = [SampleDraws(KEY, samples, CPU) for samples in (range(2), range(2, 3), range(3, 4))]
    for shape in ((2, 3), (5,)):  # also what is drawn second
        assert torch.equal(whole.normal(shape), torch.cat([part.normal(shape) for part in parts]))
        assert torch.equal(whole.uniform(), torch.cat([part.uniform() for part in parts]))


def test_draws_do_not_depend_on_the_process_or_disturb_it() -> None:
    torch.manual_seed(1)
    first, state = normal(), torch.get_rng_state()
    assert torch.equal(normal(), first)
    assert torch.equal(torch.get_rng_state(), state)
    # Of this seed in any release: a run that is resumed after an update goes on with its own noise.
    torch.testing.assert_close(first[0, 0], torch.tensor([-0.701583, 0.574811, 0.322776]), rtol=0, atol=1e-6)


def test_samples_purposes_steps_and_seeds_have_streams_of_their_own() -> None:
    keys = [KEY, (4, "generator", 7, 0), (3, "online", 7, 0), (3, "generator", 8, 0), (3, "generator", 7, 1)]
    # Written side by side these two keys look alike.
    keys += [(31, 1), (3, 11)]
    rows = torch.cat([normal(key).flatten(1) for key in keys])
    assert len(rows.unique(dim=0)) == 4 * len(keys)


def test_a_stream_goes_on() -> None:
    draws = SampleDraws(KEY, range(2), CPU)
    assert not torch.equal(draws.normal((4,)), draws.normal((4,)))
    assert not torch.equal(draws.uniform(), draws.uniform())


def test_numbers_are_distributed_as_promised() -> None:
    draws = SampleDraws(KEY, range(2000), CPU)
    numbers, uniform = draws.normal((2,)), draws.uniform()
    assert numbers.dtype == uniform.dtype == torch.float32
    assert abs(numbers.mean()) < 0.05
    assert abs(numbers.std() - 1) < 0.05
    # Streams of neighbouring samples are not alike.
    assert abs((numbers[1:] * numbers[:-1]).mean()) < 0.05
    assert abs(uniform.mean() - 1 / 2) < 0.03
    assert abs(uniform.var() - 1 / 12) < 0.01
    assert 0 <= uniform.min() <= uniform.max() < 1


def test_ranks_share_an_integer() -> None:
    drawn = [shared_integer((0, "generator", step, "last"), 4) for step in range(400)]
    assert drawn == [shared_integer((0, "generator", step, "last"), 4) for step in range(400)]
    counts = [drawn.count(value) for value in range(4)]
    assert sum(counts) == 400
    assert all(60 < count < 140 for count in counts)
    assert drawn[:8] == [0, 3, 2, 0, 3, 0, 1, 3]
    assert shared_integer(KEY, 1) == 0
