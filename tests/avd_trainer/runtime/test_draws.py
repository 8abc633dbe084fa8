import pytest
import torch

from avd_trainer.runtime.draws import Draws

CPU = torch.device("cpu")
KEY = (3, "student", 7, 0)


def normal(key: tuple[int | str, ...] = KEY, name: str = "trajectory", samples: range = range(4)) -> torch.Tensor:
    return Draws(key, samples, CPU).normal(name, (2, 3))


def test_a_sample_draws_the_same_in_any_batch() -> None:
    whole = Draws(KEY, range(4), CPU)
    parts = [Draws(KEY, samples, CPU) for samples in (range(2), range(2, 3), range(3, 4))]
    for shape in ((2, 3), (5,)):  # also what is drawn second
        assert torch.equal(whole.normal("a", shape), torch.cat([part.normal("a", shape) for part in parts]))
        assert torch.equal(whole.uniform("b"), torch.cat([part.uniform("b") for part in parts]))


def test_draws_do_not_depend_on_the_process_or_disturb_it() -> None:
    torch.manual_seed(1)
    first, state = normal(), torch.get_rng_state()
    assert torch.equal(normal(), first)
    assert torch.equal(torch.get_rng_state(), state)
    # Of this seed in any release: a run that is resumed after an update goes on with its own noise.
    torch.testing.assert_close(first[0, 0], torch.tensor([0.821161, -1.298723, -1.648250]), rtol=0, atol=1e-6)


def test_samples_roles_steps_turns_and_seeds_have_streams_of_their_own() -> None:
    keys = [KEY, (4, "student", 7, 0), (3, "online", 7, 0), (3, "student", 8, 0), (3, "student", 7, 1)]
    rows = torch.cat([normal(key).flatten(1) for key in keys])
    assert len(rows.unique(dim=0)) == 4 * len(keys)


def test_names_have_streams_of_their_own_whichever_is_drawn_from_first() -> None:
    """So one more draw shifts no other."""
    one, two = Draws(KEY, range(2), CPU), Draws(KEY, range(2), CPU)
    first = one.normal("a", (3,)), one.normal("b", (3,))
    second = two.normal("b", (3,)), two.uniform("c"), two.normal("a", (3,))
    assert torch.equal(first[0], second[2])
    assert torch.equal(first[1], second[0])
    assert not torch.equal(*first)


def test_keys_that_look_alike_when_written_side_by_side_differ() -> None:
    assert not torch.equal(normal((3, "a", 1, 11)), normal((3, "a", 11, 1)))


def test_a_stream_goes_on() -> None:
    draws = Draws(KEY, range(2), CPU)
    assert not torch.equal(draws.normal("a", (4,)), draws.normal("a", (4,)))
    assert not torch.equal(draws.uniform("a"), draws.uniform("a"))


def test_what_draws_as_often_as_it_likes_draws_from_its_name() -> None:
    once, often = Draws(KEY, range(2), CPU), Draws(KEY, range(2), CPU)
    draw = often.named("trajectory")
    for shape in ((2, 3), (4,)):
        assert torch.equal(draw(shape), once.normal("trajectory", shape))


def test_numbers_are_distributed_as_promised() -> None:
    draws = Draws(KEY, range(2000), CPU)
    numbers, uniform = draws.normal("a", (2,)), draws.uniform("b")
    assert numbers.dtype == uniform.dtype == torch.float32
    assert abs(numbers.mean()) < 0.05
    assert abs(numbers.std() - 1) < 0.05
    # Streams of neighbouring samples are not alike.
    assert abs((numbers[1:] * numbers[:-1]).mean()) < 0.05
    assert abs(uniform.mean() - 1 / 2) < 0.03
    assert abs(uniform.var() - 1 / 12) < 0.01
    assert 0 <= uniform.min() <= uniform.max() < 1


@pytest.mark.parametrize("samples", [range(2), range(2, 5)])
def test_ranks_share_an_integer(samples: range) -> None:
    def draw(step: int, samples: range = samples) -> int:
        return Draws((0, "student", step, 0), samples, CPU).shared_integer("exit_step", 4)

    drawn = [draw(step) for step in range(400)]
    assert drawn == [draw(step, range(1)) for step in range(400)]
    counts = [drawn.count(value) for value in range(4)]
    assert sum(counts) == 400
    assert all(60 < count < 140 for count in counts)
    assert drawn[:8] == [3, 2, 0, 1, 0, 0, 0, 0]  # in any release
    assert Draws(KEY, samples, CPU).shared_integer("exit_step", 1) == 0
