import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from avd_core import GradientBalance, LossOutput, gradient_shares
from references import central_differences, flatten
from tensors import assert_same_state, randn, state_of

seeds = st.integers(0, 2**32 - 1)


def call(balance: GradientBalance, regression_gradient: Tensor, matching_gradient: Tensor) -> LossOutput:
    """Two losses with the given gradients at their outputs."""
    outputs = [torch.zeros_like(gradient).requires_grad_() for gradient in (regression_gradient, matching_gradient)]
    losses = [
        5.0 + (output * g).sum() for output, g in zip(outputs, (regression_gradient, matching_gradient), strict=True)
    ]
    return balance(losses[0], outputs[0], losses[1], outputs[1])


def squared_norm(gradient: Tensor) -> float:
    return math.fsum(value**2 for value in flatten(gradient.tolist()))


# --- The ratio


@given(seeds, st.sampled_from([0.0, 0.5, 0.9]), st.integers(1, 5))
def test_the_ratio_is_that_of_running_means_of_squared_norms(seed: int, decay: float, calls: int) -> None:
    balance = GradientBalance(decay=decay)
    means = None
    for i in range(calls):
        gradients = randn(seed + 2 * i, 2, 3), randn(seed + 2 * i + 1, 1, 4)
        squares = [squared_norm(gradient) for gradient in gradients]
        means = squares if means is None else [decay * m + (1 - decay) * s for m, s in zip(means, squares, strict=True)]
        ratio = call(balance, *gradients).metrics["gradient_ratio"].item()
        assert ratio == pytest.approx(math.sqrt(means[0] / means[1]), rel=1e-5)


def test_without_a_target_the_loss_passes_unchanged() -> None:
    loss, metrics = call(GradientBalance(), torch.tensor([3.0, 4.0]), torch.tensor([0.5]))
    assert loss.item() == 5.0
    assert metrics["gradient_ratio"].item() == pytest.approx(10.0)
    assert metrics["scale"].item() == 1.0


@given(seeds, st.floats(0.01, 10))
def test_with_a_target_the_gradients_have_this_ratio(seed: int, target: float) -> None:
    output = randn(seed, 3, dtype=torch.float32).requires_grad_()
    other = randn(seed + 1, 3, dtype=torch.float32).requires_grad_()
    matching_loss = (other**2).sum()
    loss, metrics = GradientBalance(target=target)((output**4).sum(), output, matching_loss, other)
    held, matching = torch.autograd.grad(loss, output)[0], torch.autograd.grad(matching_loss, other)[0]
    assert (held.norm() / matching.norm()).item() == pytest.approx(target, rel=1e-4)
    assert (metrics["scale"] * metrics["gradient_ratio"]).item() == pytest.approx(target, rel=1e-5)


def test_squares_at_several_outputs_add_up() -> None:
    output, first, second = (torch.ones(n, requires_grad=True) for n in (1, 4, 9))
    matching_loss = (3 * first).sum() + (first.detach().sum() * second).sum()
    (_, metrics) = GradientBalance()((12 * output).sum(), output, matching_loss, [first, second])
    # 12 beside the root of 4 times 3^2 and 9 times 4^2.
    assert metrics["gradient_ratio"].item() == pytest.approx(12 / math.sqrt(36 + 144))
    with pytest.raises(ValueError, match="matching_loss has no gradient with respect to matching_output"):
        GradientBalance()(output.sum(), output, matching_loss, [first, torch.ones(1, requires_grad=True)])


def test_the_scale_is_a_constant_of_the_loss() -> None:
    # A scale with a gradient would let the student lower its loss by making its gradient large.
    weight = torch.tensor(3.0, requires_grad=True)
    output, other = weight * torch.ones(2), torch.ones(2, requires_grad=True)
    loss, metrics = GradientBalance(target=0.5)((output**3).sum(), output, other.sum(), other)
    assert not any(value.requires_grad for value in metrics.values())
    expected = metrics["scale"] * 2 * 3 * weight.detach() ** 2
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], expected)


def test_one_extreme_sample_moves_the_ratio_little() -> None:
    balance = GradientBalance(decay=0.9)
    for _ in range(20):
        call(balance, torch.ones(1), torch.ones(1))
    assert call(balance, 10 * torch.ones(1), torch.ones(1)).metrics["gradient_ratio"].item() < 3.4  # not 10


# --- Beside a training loop


def test_both_losses_can_be_passed_to_backward_afterwards() -> None:
    generator = nn.Linear(3, 2)
    regression_output, matching_output = generator(randn(0, 4, 3).float()), generator(randn(1, 4, 3).float())
    losses = regression_output.square().mean(), matching_output.abs().mean()
    loss, _ = GradientBalance(target=1.0)(losses[0], regression_output, losses[1], matching_output)
    (loss + losses[1]).backward()
    assert generator.weight.grad.isfinite().all()


def test_no_pass_through_the_generator_is_added() -> None:
    passes = []
    weight = torch.ones(2, requires_grad=True)
    weight.register_hook(passes.append)
    outputs = [2 * weight, 3 * weight]
    loss, _ = GradientBalance(target=1.0)(outputs[0].sum(), outputs[0], outputs[1].sum(), outputs[1])
    assert not passes
    loss.backward()
    assert len(passes) == 1


def test_evaluation_mode_reads_only() -> None:
    balance = GradientBalance(target=2.0)
    assert call(balance.eval(), torch.ones(2), torch.ones(2)).metrics["scale"].item() == 1.0  # nothing measured yet
    call(balance.train(), 2 * torch.ones(2), torch.ones(2))
    before = state_of(balance)
    metrics = call(balance.eval(), 7 * torch.ones(2), torch.ones(2)).metrics
    assert metrics["gradient_ratio"].item() == pytest.approx(2.0)
    assert_same_state(state_of(balance), before)


def test_a_restart_changes_nothing() -> None:
    balance, restarted = GradientBalance(target=1.0), GradientBalance(target=1.0)
    for i in range(3):
        call(balance, randn(i, 3), randn(i + 10, 3))
    restarted.load_state_dict(state_of(balance))
    assert set(state_of(balance)) == {"means", "calls"}
    outcomes = [call(each, randn(7, 3), randn(8, 3)) for each in (balance, restarted)]
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=0, atol=0)
    assert_same_state(state_of(restarted), state_of(balance))


# --- Gradients that are zero or not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("measured", [False, True])
def test_gradients_that_are_not_finite_never_enter_a_mean(bad: float, side: int, measured: bool) -> None:
    balance = GradientBalance(target=1.0)
    if measured:
        call(balance, 2 * torch.ones(2), torch.ones(2))
    before = state_of(balance)
    gradients = [torch.ones(2), torch.ones(2)]
    gradients[side][1] = bad
    metrics = call(balance, *gradients).metrics
    assert_same_state(state_of(balance), before)
    assert metrics["scale"].item() == pytest.approx(0.5 if measured else 1.0)
    # The next finite call goes on as if this one had not been.
    assert call(balance, 2 * torch.ones(2), torch.ones(2)).metrics["gradient_ratio"].item() == pytest.approx(2.0)


def test_a_loss_that_is_not_finite_stays_visible() -> None:
    output, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    assert GradientBalance(target=1.0)(output.sum() * math.nan, output, other.sum(), other).loss.isnan()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("side", ["regression", "matching"])
def test_a_term_without_gradient_leaves_the_loss_alone(size: float, side: str) -> None:
    # A matching term at weight zero, say: there is nothing to be in a ratio to.
    some, none = size * torch.ones(3), torch.zeros(3)
    loss, metrics = call(GradientBalance(target=1.0), *((none, some) if side == "regression" else (some, none)))
    assert metrics["scale"].item() == 1.0
    assert loss.item() == 5.0


# --- Wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.0}, "target must be a finite number above 0"),
        ({"target": math.nan}, "target must be a finite number above 0"),
        ({"target": math.inf}, "target must be a finite number above 0"),
        ({"decay": 1.0}, "decay must be a finite number at least 0 and below 1"),
        ({"decay": -0.1}, "decay must be a finite number at least 0 and below 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientBalance(**options)


def arguments() -> dict[str, Tensor]:
    outputs = [torch.ones(2, requires_grad=True) for _ in range(2)]
    return {
        "regression_loss": outputs[0].sum(),
        "regression_output": outputs[0],
        "matching_loss": outputs[1].sum(),
        "matching_output": outputs[1],
    }


@pytest.mark.parametrize("name", ["regression", "matching"])
def test_integer_outputs_are_refused(name: str) -> None:
    balance = GradientBalance()
    with pytest.raises(TypeError, match=f"{name}_output must be a floating"):
        balance(**arguments() | {f"{name}_output": torch.ones(2, dtype=torch.int)})
    assert balance.calls == 0


@pytest.mark.parametrize("name", ["regression", "matching"])
@pytest.mark.parametrize("wrong", ["output detached", "loss detached", "another output"])
def test_a_loss_that_was_not_computed_from_its_output_is_refused(name: str, wrong: str) -> None:
    balance, given = GradientBalance(), arguments()
    if wrong == "another output":
        given[f"{name}_output"] = torch.ones(2, requires_grad=True)
    else:
        tensor = f"{name}_{wrong.split()[0]}"
        given[tensor] = given[tensor].detach()
    with pytest.raises(ValueError, match=f"{name}_loss has no gradient with respect to {name}_output"):
        balance(**given)
    assert balance.calls == 0


def test_before_the_first_call_the_ratio_is_unknown() -> None:
    metrics = GradientBalance(target=0.5).eval()(**arguments()).metrics
    assert metrics["gradient_ratio"].isnan()
    assert metrics["scale"] == 1


def test_evaluation_mode_needs_no_gradients() -> None:
    balance = GradientBalance(target=0.5)
    call(balance, torch.ones(2), torch.ones(2))
    with torch.no_grad():
        loss, metrics = balance.eval()(**arguments())
    assert metrics["scale"] == 0.5
    assert loss == 1.0


# --- Shares of several losses at one output


def three_losses(x: Any) -> dict[str, Any]:
    """Losses of a list of numbers or a tensor, whose gradients overlap and disagree."""
    return {
        "linear": 3.0 * x[0] - x[1],
        "squares": sum((value - 1.0) ** 2 for value in x),
        "product": x[0] * x[1] * x[-1],
    }


@given(seeds, st.integers(2, 5))
def test_shares_and_gradient_are_those_of_central_differences(seed: int, size: int) -> None:
    output = randn(seed, size).requires_grad_()
    loss, shares = gradient_shares(output, three_losses(output))
    loss.backward()
    gradients = {
        name: central_differences(lambda x, name=name: three_losses(x)[name], output.tolist()) for name in shares
    }
    norms = {name: math.sqrt(squared_norm(torch.tensor(gradient))) for name, gradient in gradients.items()}
    for name, share in shares.items():
        assert share.item() == pytest.approx(norms[name] / sum(norms.values()), rel=1e-4, abs=1e-6)
    assert loss.item() == pytest.approx(sum(three_losses(output.tolist()).values()), rel=1e-9)
    expected = [math.fsum(parts) for parts in zip(*gradients.values(), strict=True)]
    assert output.grad.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)


@given(seeds, st.floats(0.01, 100), st.integers(2, 4))
def test_shares_add_up_and_follow_weights_but_not_their_common_scale(seed: int, scale: float, count: int) -> None:
    output = randn(seed, 6).requires_grad_()
    terms = {str(i): (output * randn(seed + i, 6)).sum() for i in range(count)}
    shares = gradient_shares(output, terms).metrics
    assert math.fsum(share.item() for share in shares.values()) == pytest.approx(1, rel=1e-5)
    scaled = gradient_shares(output, {name: scale * term for name, term in terms.items()}).metrics
    torch.testing.assert_close(scaled, shares)
    doubled = gradient_shares(output, terms | {"0": 2 * terms["0"]}).metrics
    odds = shares["0"] / shares["1"]
    torch.testing.assert_close(doubled["0"] / doubled["1"], 2 * odds, rtol=1e-4, atol=0)


def test_a_critic_is_passed_once_and_parameters_get_the_gradient_of_the_sum() -> None:
    generator, critic = nn.Linear(3, 3), nn.Linear(3, 1)
    noise, passes = randn(0, 4, 3).float(), []
    critic.weight.requires_grad_(False)

    def terms(x_0: Tensor) -> dict[str, Tensor]:
        features = critic(x_0)
        features.register_hook(passes.append)
        return {"adversarial": -features.mean(), "distillation": (x_0 - 1).square().mean()}

    sum(terms(generator(noise)).values()).backward()
    expected = generator.weight.grad.clone()
    generator.zero_grad()
    passes.clear()
    x_0 = generator(noise)
    loss, shares = gradient_shares(x_0, terms(x_0))
    (2 * loss).backward()
    torch.testing.assert_close(generator.weight.grad, 2 * expected)
    assert len(passes) == 1
    assert list(shares) == ["adversarial", "distillation"]
    assert not any(share.requires_grad for share in shares.values())


def test_losses_may_share_a_part_of_their_graph() -> None:
    output = randn(0, 3).requires_grad_()
    common = output.square()
    loss, shares = gradient_shares(output, {"a": common.sum(), "b": common.sum()})
    loss.backward()
    torch.testing.assert_close(output.grad, 4 * output.detach())
    assert shares["a"] == shares["b"] == 0.5


def test_the_share_of_a_term_at_weight_zero_is_zero_and_of_nothing_unknown() -> None:
    output = torch.ones(2, requires_grad=True)
    assert gradient_shares(output, {"on": output.sum(), "off": 0 * output.sum()}).metrics == {"on": 1.0, "off": 0.0}
    loss, shares = gradient_shares(output, {"off": 0 * output.sum()})
    assert loss == 0
    assert shares["off"].isnan()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible_in_loss_or_gradient(bad: float) -> None:
    output = torch.ones(2, requires_grad=True)
    loss, shares = gradient_shares(output, {"good": output.sum(), "bad": bad * output.sum()})
    assert not loss.isfinite()
    assert all(share.isnan() or share == 0 for share in shares.values())


@pytest.mark.parametrize("wrong", ["output detached", "loss detached", "another output"])
def test_shares_of_a_loss_that_was_not_computed_from_the_output_are_refused(wrong: str) -> None:
    output = torch.ones(2, requires_grad=True)
    losses = {"one": output.sum(), "two": output.square().sum()}
    if wrong == "loss detached":
        losses["two"] = losses["two"].detach()
    given = {"output detached": output.detach(), "another output": torch.ones(2, requires_grad=True)}.get(wrong, output)
    with pytest.raises(ValueError, match=r"losses\['(one|two)'\] has no gradient with respect to output"):
        gradient_shares(given, losses)


def test_shares_of_nothing_and_integer_outputs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one loss, got none"):
        gradient_shares(torch.ones(2, requires_grad=True), {})
    with pytest.raises(TypeError, match="output must be a floating"):
        gradient_shares(torch.ones(2, dtype=torch.int), {"one": torch.ones(())})
