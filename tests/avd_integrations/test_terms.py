import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import avd_integrations.terms
from avd_core import (
    AVDConfig,
    AVDObjective,
    FlowMatchingSchedule,
    LossMeanCache,
    LossOutput,
    MotionConfig,
    RegressionConfig,
)
from avd_integrations import HostTerms, Parametrisation, rectified_flow, trigflow, variance_preserving
from loss_cases import GRID
from watchers import NoHostWait

CLIPS = torch.randn(3, 4, 5, 2, 2, generator=torch.Generator().manual_seed(0))


class Student(nn.Module):
    """Predicts what it is asked for, wrong by a factor that depends on time."""

    def __init__(self, bias: float = 0.1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(bias))
        self.seen = []

    def forward(self, x_t: Tensor, times: Tensor, batch: dict[str, Tensor] | None = None) -> Tensor:
        self.seen.append((x_t.detach(), times))
        return self.scale * x_t


def ready(path: Parametrisation, times: tuple[float, ...], clips: Tensor = CLIPS) -> dict[str, Tensor]:
    """What a host passes that has noised its clips and run its student itself; the prediction is wrong by noise."""
    times, noise = torch.tensor(times), torch.randn_like(clips)
    prediction = path.exact_prediction(clips, noise, times) + 0.1 * torch.randn_like(clips)
    x_t = path.add_noise(clips, noise, times)
    return {"prediction": prediction.requires_grad_(), "x_t": x_t, "clips": clips, "noise": noise, "times": times}


def host(
    config: AVDConfig | dict[str, Any] | None = None, parametrisation: Any = None, student: Any = None, **options: Any
) -> tuple[Any, HostTerms]:
    student = student or Student()
    return student, HostTerms(
        config or AVDConfig(), parametrisation or rectified_flow(), student, lambda batch: batch["clips"], **options
    )


def objective_by_hand(prediction: Tensor, target: Tensor, times: Tensor, config: AVDConfig | None = None) -> LossOutput:
    return AVDObjective(config or AVDConfig(motion=None)).on_clips(prediction, target, times)


def test_the_regression_is_that_of_the_core_on_velocities() -> None:
    config = AVDConfig(motion=None)
    student, terms = host(config)
    torch.manual_seed(0)
    loss, metrics = terms({"clips": CLIPS})
    ((x_t, times),) = student.seen
    schedule = FlowMatchingSchedule()
    noise = (x_t - (1 - schedule.sigma(times, x_t)) * CLIPS) / schedule.sigma(times, x_t)
    by_hand = objective_by_hand((0.1 * x_t).requires_grad_(), noise - CLIPS, times)
    torch.testing.assert_close(loss, by_hand.loss, rtol=1e-4, atol=1e-5)
    assert set(metrics) == set(by_hand.metrics)
    assert set(times.tolist()) <= set(GRID)


def test_what_the_weight_judges_is_that_of_the_core() -> None:
    config = AVDConfig(motion=None, regression=RegressionConfig(judged="relative", deviation="standardized"))
    terms, objective = host(config)[1], AVDObjective(config)
    path = rectified_flow()
    for _ in range(3):
        given = ready(path, (1000.0, 900.0, 900.0))
        loss, metrics = terms.on_prediction(**given)
        by_hand = objective.on_clips(given["prediction"], given["noise"] - CLIPS, given["times"], clips=CLIPS)
        torch.testing.assert_close(loss, by_hand.loss)
        torch.testing.assert_close(metrics, by_hand.metrics)
    assert metrics["regression/weights"].std() > 0
    with pytest.raises(ValueError, match=r"an adapter runs no teacher\. Set \"loss\" or \"relative\""):
        host(AVDConfig(regression=RegressionConfig(judged="excess")))


def test_a_student_in_trigflow_has_the_loss_of_the_same_student_in_rectified_flow() -> None:
    """One student, written in two conventions: same clips, noise and noise levels."""
    sigmas = torch.tensor([0.9, 0.757, 0.522], dtype=torch.float64)
    angles = torch.atan2(sigmas, 1 - sigmas)
    velocity_of = nn.Conv3d(4, 4, 1)
    noise = torch.randn_like(CLIPS)
    results = []
    for parametrisation, times in ((rectified_flow(1), sigmas), (trigflow(), angles)):
        terms = host(AVDConfig(timesteps=tuple(times.tolist()), motion=None), parametrisation)[1]
        x_t = parametrisation.add_noise(CLIPS, noise, times)
        alpha, sigma = (c.float().view(-1, 1, 1, 1, 1) for c in parametrisation.coefficients(times))
        flow_x_t = x_t / (alpha + sigma)
        velocity = velocity_of(flow_x_t)
        x_0 = (x_t - sigma * velocity) / (alpha + sigma)
        output = parametrisation.exact_prediction(x_0, x_0 + velocity, times)
        results.append(terms.on_prediction(prediction=output, x_t=x_t, clips=CLIPS, noise=noise, times=times).loss)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["BCFHW", "BFCHW"])
def test_both_layouts_give_the_same_motion_term(layout: str) -> None:
    # Above the floor, where the term has a gradient and depends on which dimension is that of frames.
    config = AVDConfig(motion=MotionConfig(floor=-9.0))
    samples = torch.randn(2, 4, 6, 3, 3, requires_grad=True)
    expected = AVDObjective(config).on_samples(samples)
    (gradient,) = torch.autograd.grad(expected.loss, samples)
    given = samples.transpose(1, 2) if layout == "BFCHW" else samples
    terms = host(config, layout=layout)[1]
    found = terms.on_samples(given)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(torch.autograd.grad(found.loss, samples)[0], gradient)
    assert gradient.abs().sum() > 0
    clips = CLIPS.transpose(1, 2) if layout == "BFCHW" else CLIPS
    assert terms({"clips": clips}, given).metrics["motion/loss"] == expected.metrics["motion/loss"]


@pytest.mark.parametrize("path", [rectified_flow(), rectified_flow(prediction="x_0")], ids=["velocity", "x_0"])
def test_a_ready_prediction_in_half_precision_is_worked_on_in_float32(path: Parametrisation) -> None:
    config = AVDConfig(motion=MotionConfig(floor=-9.0))
    noise, times = torch.randn_like(CLIPS), torch.tensor([900.0, 757.0, 522.0])
    x_t = path.add_noise(CLIPS, noise, times).bfloat16()
    output = (path.exact_prediction(CLIPS, noise, times) + 0.01 * torch.randn_like(CLIPS)).bfloat16().requires_grad_()
    found = host(config, path)[1].from_prediction(prediction=output, x_t=x_t, clips=CLIPS, noise=noise, times=times)
    expected = host(config, path)[1].from_prediction(
        prediction=output.float(), x_t=x_t.float(), clips=CLIPS, noise=noise, times=times
    )
    assert expected.metrics["regression/sample_losses"].min() > 0
    for name, value in expected.metrics.items():
        torch.testing.assert_close(found.metrics[name], value, rtol=0, atol=0)
    alone = host(config, path)[1].on_prediction(prediction=output, x_t=x_t, clips=CLIPS, noise=noise, times=times)
    torch.testing.assert_close(alone.metrics["regression/loss"], expected.metrics["regression/loss"], rtol=0, atol=0)


def test_images_have_no_motion() -> None:
    with pytest.raises(ValueError, match="images have none"):
        host(layout="BCHW")
    terms = host(AVDConfig(motion=None), layout="BCHW")[1]
    assert terms({"clips": torch.randn(2, 4, 8, 8)}).loss.isfinite()


@pytest.mark.parametrize("scale", [2.5, math.prod])
def test_the_loss_comes_in_the_scale_of_the_host(scale: float | Callable[..., float]) -> None:
    factor = 2.5 if scale == 2.5 else 4 * 5 * 2 * 2
    samples = (0.1 * torch.randn(3, 4, 5, 2, 2)).requires_grad_()
    results = []
    for options in ({}, {"loss_scale": scale}):
        student, terms = host(**options)
        torch.manual_seed(0)
        results.append((*terms({"clips": CLIPS}, samples), student))
        results[-1][0].backward()
    (loss, metrics, student), (scaled, scaled_metrics, scaled_student) = results
    torch.testing.assert_close(scaled, factor * loss)
    torch.testing.assert_close(scaled_student.scale.grad, factor * student.scale.grad)
    torch.testing.assert_close(scaled_metrics["motion/loss"], metrics["motion/loss"])


def test_gradients_reach_the_student_and_the_samples() -> None:
    student, terms = host()
    samples = (0.5 * torch.randn(2, 4, 5, 2, 2)).requires_grad_()
    clips = CLIPS.clone().requires_grad_()
    terms({"clips": clips}, samples).loss.backward()
    assert student.scale.grad.abs() > 0
    assert samples.grad.abs().sum() > 0
    assert clips.grad is None


def test_parts_that_are_left_out_need_nothing() -> None:
    student, terms = host(AVDConfig(regression=None))
    terms({}, torch.randn(2, 4, 5, 2, 2, requires_grad=True))
    assert not student.seen
    host(AVDConfig(motion=None))[1]({"clips": CLIPS})
    with pytest.raises(ValueError, match="nothing to compute"):
        host(AVDConfig(motion=None, regression=None))
    # Without the regression the few steps are not looked at.
    host(AVDConfig(regression=None), rectified_flow(1))
    with pytest.raises(ValueError, match="nothing to draw"):
        host(AVDConfig(regression=None))[1].draw_times(1, torch.device("cpu"))


def test_the_state_is_the_cache() -> None:
    terms = host(AVDConfig(timesteps=(0.9, 0.5), motion=None), rectified_flow(1))[1]
    for _ in range(8):
        terms({"clips": CLIPS})
    other = host(AVDConfig(timesteps=(0.9, 0.5), motion=None), rectified_flow(1))[1]
    other.load_state_dict(terms.state_dict())
    torch.testing.assert_close(other.objective.regression.cache.means, terms.objective.regression.cache.means)
    assert terms.objective.regression.cache.means.abs().sum() > 0


def test_a_student_that_is_a_module_is_no_part_of_the_terms() -> None:
    student, terms = host(AVDConfig(motion=None))
    assert all(name.startswith("objective.") for name in terms.state_dict())
    assert not list(terms.parameters())
    terms.eval()
    assert student.training


def test_half_precision_students_are_compared_in_float32() -> None:
    student, terms = host(AVDConfig(motion=None))
    loss, _ = terms({"clips": CLIPS.bfloat16()})
    assert loss.dtype == torch.float32
    assert student.seen[0][0].dtype == torch.bfloat16


def test_a_ready_prediction_gives_both_terms_and_runs_nothing() -> None:
    """The sample of the motion term is the x_0 in the prediction, with its gradient."""
    noise, times = torch.randn_like(CLIPS), torch.tensor([1000.0, 757.0, 522.0])
    path = rectified_flow()
    x_t = path.add_noise(CLIPS, noise, times)
    terms = HostTerms(AVDConfig(motion=MotionConfig(floor=-9)), path)
    output = (0.1 * torch.randn_like(CLIPS)).requires_grad_()
    state = torch.get_rng_state()
    loss, metrics = terms.from_prediction(prediction=output, x_t=x_t, clips=CLIPS, noise=noise, times=times)
    assert torch.equal(state, torch.get_rng_state())
    x_0 = x_t - times.view(-1, 1, 1, 1, 1) / 1000 * output
    parts = [
        objective_by_hand(output, noise - CLIPS, times),
        AVDObjective(AVDConfig(motion=MotionConfig(floor=-9))).on_samples(x_0),
    ]
    torch.testing.assert_close(loss, parts[0].loss + parts[1].loss)
    assert set(metrics) == {name for part in parts for name in part.metrics}
    ours, by_hand = (
        torch.autograd.grad(value, output, retain_graph=True) for value in (loss, sum(p.loss for p in parts))
    )
    torch.testing.assert_close(ours, by_hand)
    for left_out in ({"motion": None}, {"regression": None}):
        part = HostTerms(AVDConfig(**left_out), path).from_prediction(
            prediction=output, x_t=x_t, clips=CLIPS, noise=noise, times=times
        )
        assert not any(name.startswith(next(iter(left_out))) for name in part.metrics)


@pytest.mark.parametrize("given", [{}, {"predict": Student()}, {"clips": lambda batch: batch}])
def test_a_missing_student_or_clips_is_said(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"made without predict and clips.*on_prediction or from_prediction"):
        HostTerms(AVDConfig(motion=None), rectified_flow(), **given)(CLIPS)


def test_times_can_be_drawn_by_the_hosts_generator() -> None:
    terms, state = host()[1], torch.get_rng_state()
    draws = [terms.draw_times(50, CLIPS.device, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert set(draws[0].tolist()) == set(GRID)
    assert torch.equal(state, torch.get_rng_state())


def test_update_ends_an_iteration_of_several_calls() -> None:
    terms = host(AVDConfig(timesteps=(500,), regression=RegressionConfig(auto_update=False), motion=None))[1]
    cache = terms.objective.regression.cache
    for _ in range(2):
        terms({"clips": CLIPS})
        assert not cache.seen.any()
    terms.update()
    assert cache.seen.all()
    assert not cache.pending.any()
    host(AVDConfig(regression=None))[1].update()


BATCH = {"clips": CLIPS}
MOVING = torch.randn_like(CLIPS, requires_grad=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: host()[1](BATCH), ValueError, "needs x_0"),
        (lambda: host()[1](BATCH, MOVING.detach()), ValueError, "x_0 has no gradient"),
        (
            lambda: host()[1](BATCH, MOVING[:, :, :, 0]),
            ValueError,
            r"x_0 must be \['B', 'C', 'F', 'H', 'W'\], as layout",
        ),
        (lambda: host()[1](BATCH, MOVING[:, :, :1]), ValueError, r"at least 2 frames, and x_0 .* in layout BCFHW"),
        (lambda: host(layout="BFCHW")[1](BATCH, MOVING[:, :1]), ValueError, "2 frames, and x_0 .* layout BFCHW"),
        (lambda: host()[1](BATCH, MOVING.long()), TypeError, "x_0 must be a floating-point .* got torch.int64"),
        (lambda: host()[1]({"clips": CLIPS.byte()}, MOVING), TypeError, "what clips returned must be a floating-point"),
        (lambda: host()[1]({"clips": [CLIPS]}, MOVING), TypeError, "what clips returned .* got list"),
        (lambda: host()[1]({"clips": CLIPS[:, 0]}, MOVING), ValueError, "what clips returned must be"),
        (
            lambda: host(student=lambda x_t, t, batch: (x_t, x_t))[1](BATCH, MOVING),
            TypeError,
            "predict must return the prediction, a torch.Tensor, got tuple",
        ),
        (
            lambda: host(student=lambda x_t, t, batch: x_t)[1](BATCH, MOVING),
            ValueError,
            "prediction has no gradient",
        ),
        (
            lambda: host(student=lambda x_t, t, batch: x_t[:, :, :1].requires_grad_())[1](BATCH, MOVING),
            ValueError,
            r"prediction must have the shape of the clips, \[3, 4, 5, 2, 2\], got \[3, 4, 1, 2, 2\]",
        ),
    ],
)
def test_wrong_input_is_refused_before_anything_is_recorded(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    caches = []
    register = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: caches.append(module) if isinstance(module, LossMeanCache) else None
    )
    with register, pytest.raises(error, match=message):
        call()
    assert not caches


@pytest.mark.parametrize("config", [AVDConfig(), AVDConfig(regression=None)], ids=["both", "motion"])
@pytest.mark.parametrize("which", ["prediction", "x_t", "clips", "noise"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t[:, :1], ValueError, "nothing is broadcast here"),
        (lambda t: (t, t), TypeError, "must be a floating-point torch.Tensor of latents, got tuple"),
        (lambda t: t.long(), TypeError, "got torch.int64"),
    ],
    ids=["shape", "tuple", "integer"],
)
def test_a_ready_prediction_is_looked_at_first(
    config: AVDConfig, which: str, change: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    given = {name: torch.randn_like(CLIPS, requires_grad=True) for name in ("prediction", "x_t", "clips", "noise")}
    given[which] = change(given[which])
    terms = HostTerms(config, rectified_flow())
    calls = (terms.on_prediction, terms.from_prediction) if config.regression is not None else (terms.from_prediction,)
    for call in calls:
        with pytest.raises(error, match=message):
            call(**given, times=torch.tensor([900.0, 757.0, 522.0]))


FEW_STEPS = (900.0, 757.0, 522.0)


def moved(**changes: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """A change of some arguments, made of all of them."""
    return lambda given: given | {name: change(given) for name, change in changes.items()}


NOT_NOISED_SO = {
    "backward simulation": moved(x_t=lambda g: torch.randn_like(CLIPS)),
    "clips and noise swapped": moved(clips=lambda g: g["noise"], noise=lambda g: g["clips"]),
    "x_t and clips swapped": moved(clips=lambda g: g["x_t"], x_t=lambda g: g["clips"]),
    "other noise": moved(noise=lambda g: torch.randn_like(CLIPS)),
    "times in [0, 1]": moved(times=lambda g: g["times"] / 1000),
    "times of the other end": moved(times=lambda g: 1000 - g["times"]),
    "another path": moved(x_t=lambda g: trigflow().add_noise(CLIPS, g["noise"], g["times"] * math.pi / 2000)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", [AVDConfig(), AVDConfig(regression=None)], ids=["both", "motion"])
@pytest.mark.parametrize("change", NOT_NOISED_SO.values(), ids=NOT_NOISED_SO)
def test_x_t_that_is_not_made_of_what_is_given_is_refused_in_the_first_call(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], config: AVDConfig, training: bool
) -> None:
    terms = HostTerms(config, rectified_flow()).train(training)
    given = change(ready(rectified_flow(), FEW_STEPS))
    for call in (terms.from_prediction, *([terms.on_prediction] if config.regression else [])):
        with pytest.raises(ValueError, match=r"x_t is not made of clips and noise at times: .*backward simulation"):
            call(**given)
    assert terms.objective.regression is None or not terms.objective.regression.cache.seen.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_other_x_t(dtype: torch.dtype) -> None:
    given = {name: tensor.to(dtype) for name, tensor in ready(rectified_flow(), FEW_STEPS).items()}
    assert HostTerms(AVDConfig(), rectified_flow()).from_prediction(**given).loss.isfinite()


@pytest.mark.parametrize("method", ["on_prediction", "from_prediction"])
def test_pure_noise_tells_nothing_so_later_calls_are_looked_at_but_not_for_ever(method: str) -> None:
    """At t = 1000 any clips are in x_t as well as the right ones."""
    call = getattr(HostTerms(AVDConfig(), rectified_flow()), method)
    pure, other = ready(rectified_flow(), (1000.0,) * 3), NOT_NOISED_SO["other noise"]
    call(**pure | {"clips": CLIPS + 1})
    for _ in range(6):
        call(**pure)
    with pytest.raises(ValueError, match="x_t is not made of"):
        call(**other(ready(rectified_flow(), FEW_STEPS)))
    call(**pure)
    call(**other(ready(rectified_flow(), FEW_STEPS)))


def test_values_that_are_not_finite_are_left_to_who_guards_against_them() -> None:
    given = ready(rectified_flow(), FEW_STEPS)
    given |= {"clips": given["clips"] * math.nan}
    assert HostTerms(AVDConfig(motion=None), rectified_flow()).on_prediction(**given).loss.isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_ends_no_look(value: float) -> None:
    """In every sample of a wrong x_t it leaves the question to the next call; in one of them it hides no other."""
    terms = HostTerms(AVDConfig(motion=None), rectified_flow())
    other = NOT_NOISED_SO["other noise"](ready(rectified_flow(), FEW_STEPS))
    in_all, in_one = other["x_t"].clone(), other["x_t"].clone()
    in_all[:, 0, 0, 0, 0] = value
    in_one[0, 0, 0, 0, 0] = value
    terms.on_prediction(**other | {"x_t": in_all})
    with pytest.raises(ValueError, match="x_t is not made of"):
        terms.on_prediction(**other | {"x_t": in_one})


def test_as_much_noise_as_clip_does_not_tell_one_from_the_other() -> None:
    terms = HostTerms(AVDConfig(timesteps=(1000, 750, 500, 250), motion=None), rectified_flow())
    swapped = NOT_NOISED_SO["clips and noise swapped"]
    terms.on_prediction(**swapped(ready(rectified_flow(), (500.0,), CLIPS[:1])))
    with pytest.raises(ValueError, match="x_t is not made of"):
        terms.on_prediction(**swapped(ready(rectified_flow(), (750.0,), CLIPS[:1])))


def test_no_call_after_the_first_waits_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a value of a tensor on the meta device is an error."""
    terms = HostTerms(AVDConfig(), rectified_flow())
    given = ready(rectified_flow(), FEW_STEPS)
    terms.from_prediction(**given)
    monkeypatch.setattr(avd_integrations.terms, "check_noising", None)  # which reads values: no more calls
    terms.from_prediction(**given)
    terms.to("meta")
    with NoHostWait():
        terms.from_prediction(**{name: tensor.to("meta") for name, tensor in given.items()})


@pytest.mark.parametrize("config", [AVDConfig(), AVDConfig(regression=None)], ids=["both", "motion"])
@pytest.mark.parametrize(
    "times", [torch.full((1, 5), 900.0), torch.full((3, 5), 900.0), torch.tensor(900.0), torch.full((2,), 900.0)]
)
def test_times_are_one_per_sample_in_every_call(config: AVDConfig, times: Tensor) -> None:
    terms = HostTerms(config, rectified_flow())
    given = ready(rectified_flow(), FEW_STEPS)
    terms.from_prediction(**given)
    with pytest.raises(ValueError, match=r"\[3\], one per sample, got"):
        terms.from_prediction(**given | {"times": times})
    with pytest.raises(TypeError, match=r"must be a torch.Tensor of shape \[B\], got float"):
        terms.from_prediction(**given | {"times": 900.0})


@pytest.mark.parametrize(
    ("path", "times", "message"),
    [
        (rectified_flow(1), 900.0, r"times .* have alpha \[-899.0, .* in the unit that coefficients takes"),
        (rectified_flow(1), math.nan, "times .* must be at least 0"),
        (rectified_flow(prediction="noise"), 1000.0, r"at pure noise \(alpha 0\) a prediction of the noise"),
        (rectified_flow(prediction="v"), 900.0, r"times .* call their velocity \"v\". Say prediction=\"velocity\""),
        (rectified_flow(prediction="x_0"), 0.0, r"at clean clips \(sigma 0; .* a prediction of x_0"),
        (
            variance_preserving(torch.linspace(0.99, 0.01, 1000)),
            1000.0,
            "cannot be looked up at times .* from 0 to 999",
        ),
    ],
)
def test_with_the_motion_term_alone_times_are_looked_at_in_the_first_call(
    path: Parametrisation, times: float, message: str
) -> None:
    given = ready(rectified_flow(), FEW_STEPS) | {"times": torch.full((3,), times)}
    with pytest.raises(ValueError, match=message):
        HostTerms(AVDConfig(regression=None), path).from_prediction(**given)


def test_with_the_motion_term_alone_amplified_noise_predictions_are_said_in_the_first_call() -> None:
    path = rectified_flow(prediction="noise")
    terms = HostTerms(AVDConfig(regression=None), path)
    with pytest.warns(UserWarning, match=r"at timestep 999 alpha is 0.001: its errors are 1000 times as large"):
        terms.from_prediction(**ready(path, (500.0, 999.0, 757.0)))


def test_v_at_the_ends_of_its_own_path_is_taken() -> None:
    """There alpha + sigma is 1 as on the path of flow models."""
    for time in (math.pi / 2, 0.0005):
        terms = HostTerms(AVDConfig(regression=None), trigflow())
        assert terms.from_prediction(**ready(trigflow(), (time,) * 3)).loss.isfinite()


def test_v_is_refused_at_the_first_step_that_tells_where_the_grid_is_pure_noise() -> None:
    path = rectified_flow(prediction="v")
    terms = HostTerms(AVDConfig(timesteps=(1000,), motion=None), path)
    terms.on_prediction(**ready(path, (1000.0,) * 3))
    with pytest.raises(ValueError, match=r'Say prediction="velocity"'):
        terms.on_prediction(**ready(path, (1000.0, 900.0, 1000.0)))


def test_continuous_times_are_drawn_from_the_range_and_cached_by_bins() -> None:
    _, terms = host(AVDConfig(motion=None), rectified_flow(1), time_range=(0.2, 1.0), bins=4)
    cache = terms.objective.regression.cache
    assert torch.equal(cache.timesteps, LossMeanCache.uniform(0.2, 1.0, 4).timesteps)
    times = terms.draw_times(1000, CLIPS.device, generator=torch.Generator().manual_seed(0))
    assert torch.histc(times, 4, 0.2, 1.0).min() > 200
    assert len(times.unique()) > 990
    for _ in range(20):
        assert terms({"clips": CLIPS}).loss.isfinite()
    assert cache.seen.all()
    ends = ready(rectified_flow(1), (0.2, 0.6, 1.0))
    assert terms.on_prediction(**ends).metrics["regression/means"].isfinite().all()
    other = host(AVDConfig(motion=None), rectified_flow(1), time_range=(0.0, 1.0), bins=4)[1]
    with pytest.raises(RuntimeError, match="the saved cache is for the grid"):
        other.load_state_dict(terms.state_dict())


@pytest.mark.parametrize(("layout", "other"), [("BCFHW", "BFCHW"), ("BFCHW", "BCFHW")])
def test_channels_tell_another_layout_by_the_name_that_the_host_gives(layout: str, other: str) -> None:
    config = AVDConfig(motion=MotionConfig(channels=4))
    shape = {"BCFHW": [2, 4, 6, 3, 3], "BFCHW": [2, 6, 4, 3, 3]}
    terms = host(config, layout=layout)[1]
    terms.on_samples(torch.randn(shape[layout], requires_grad=True))
    swapped = torch.randn(shape[other], requires_grad=True)
    message = re.escape(f"shape {shape[other]} in layout {layout}, 6 channels. ") + f'.*swapped: say layout="{other}"'
    with pytest.raises(ValueError, match=f"x_0 has {message}"):
        terms.on_samples(swapped)
    with pytest.raises(ValueError, match=f"clips has {message}"):
        terms.from_prediction(**ready(rectified_flow(), (900.0, 500.0), swapped.detach()))
    assert not terms.objective.regression.cache.seen.any()
    with pytest.raises(ValueError, match=r"16, .* Is it in another layout or latent space"):
        host(AVDConfig(motion=MotionConfig(channels=16)), layout=layout)[1].on_samples(swapped)


def test_one_frame_is_refused_before_the_regression_is_recorded() -> None:
    terms = HostTerms(AVDConfig(), rectified_flow())
    with pytest.raises(ValueError, match="at least 2 frames, and clips"):
        terms.from_prediction(**ready(rectified_flow(), (900.0, 757.0, 522.0), CLIPS[:, :, :1]))
    assert not terms.objective.regression.cache.seen.any()


@pytest.mark.parametrize("path", [rectified_flow(), trigflow(), variance_preserving(torch.linspace(0.99, 0.01, 1000))])
def test_the_terms_compile_in_one_graph(path: Parametrisation) -> None:
    steps = (1.5, 1.0) if path.prediction == "v" else (900, 500)
    terms = HostTerms(AVDConfig(timesteps=steps), path)
    given = ready(path, (steps[0], steps[1], steps[1]))
    compiled = torch.compile(terms.from_prediction, fullgraph=True, backend="aot_eager")
    found = compiled(**given).loss
    terms.objective.regression.cache.reset()
    torch.testing.assert_close(found, terms.from_prediction(**given).loss)


def test_metrics_can_be_looked_at_without_gradient() -> None:
    with torch.no_grad():
        assert host()[1](BATCH, MOVING.detach()).loss.isfinite()
    assert host()[1].eval()(BATCH, MOVING.detach()).loss.isfinite()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layout": "BTCHW"}, ValueError, "layout must be one of BCFHW, BFCHW, BCHW, got 'BTCHW'"),
        ({"loss_scale": -1}, ValueError, "loss_scale must be a finite number above 0"),
        ({"loss_scale": "sum"}, TypeError, "loss_scale must be a number, got 'sum'"),
        ({"parametrisation": rectified_flow}, TypeError, r"such as rectified_flow\(\) returns, got function"),
        ({"config": {"motion": None}}, TypeError, "config must be an AVDConfig, got dict"),
        ({"parametrisation": rectified_flow(1)}, ValueError, r"alpha \[-999.0, .* Give them in the unit"),
        ({"parametrisation": rectified_flow(prediction="v")}, ValueError, r'Say prediction="velocity"'),
        ({"parametrisation": rectified_flow(1), "time_range": (0, 1000)}, ValueError, "Give them in the unit"),
        ({"time_range": (0, 1000), "bins": 1}, ValueError, "bins must be at least 2, got 1"),
        ({"time_range": (900, 100)}, ValueError, "uniform needs low < high"),
        ({"config": AVDConfig(timesteps=GRID), "time_range": (0, 1000)}, ValueError, "both say which times"),
        ({"config": {"motion": None}, "time_range": (0, 1000)}, TypeError, "config must be an AVDConfig, got dict"),
    ],
)
def test_wrong_options_are_refused_by_what_they_should_be(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        host(**options)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gradient_ratio=.*an adapter does not see"):
        host(AVDConfig(gradient_ratio=0.5))
    with pytest.raises(ValueError, match="frame_dim must be 2"):
        host(AVDConfig(motion=MotionConfig(frame_dim=1)))


def test_a_plain_loop_learns_with_it() -> None:
    """The recipe of docs/hosts.md, on a host that is nothing but a loop."""
    torch.manual_seed(0)
    student = nn.Conv3d(4, 4, 1)
    terms = HostTerms(
        AVDConfig(timesteps=(1.0, 0.5), regression=RegressionConfig(weight=1.0), motion=None),
        Parametrisation(lambda t: (1 - t, t), "velocity"),
        predict=lambda x_t, t, batch: student(x_t),
        clips=lambda batch: batch,
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        loss = terms(CLIPS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
