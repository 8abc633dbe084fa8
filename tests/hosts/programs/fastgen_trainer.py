"""FastGen's trainer takes student steps with the callback, is stopped, and continues from its own checkpoint."""

import inspect
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from avd_integrations.fastgen import AVDHooks
from fastgen_tiny import (
    T_LIST,
    Callback,
    Checkpointer,
    DictConfig,
    FSDPCheckpointer,
    L,
    lines_of_the_page,
    train,
    video_config,
)

RECORDS = []


class Before(Callback):
    """Stands before the adapter: notes what it is given, and every call of the student during it."""

    def on_backward_begin(
        self,
        model: Any,
        data_batch: dict[str, Tensor],
        output_batch: dict[str, Any],
        loss_dict: dict[str, Tensor],
        iteration: int = 0,
        accum_iter: int = 0,
    ) -> None:
        self.record = {"iteration": iteration, "accum_iter": accum_iter, "total": loss_dict["total_loss"], "calls": []}
        RECORDS.append(self.record)
        self.hook = model.net.register_forward_hook(self.note, with_kwargs=True)

    def note(self, net: Any, arguments: tuple[Tensor, ...], options: dict[str, Any], output: Tensor) -> None:
        self.record["calls"].append((*arguments, options, torch.is_autocast_enabled("cpu")))


class After(Callback):
    """Stands after it: holds the sum against a calculation of its own."""

    def on_train_begin(self, model: Any, iteration: int = 0) -> None:
        self.start = [p.detach().clone() for p in model.net.parameters()]
        self.means = expected_means = dict(getattr(self.config, "expected_means", {}))
        cache = self.adapter().terms.objective.regression.cache
        for time, mean, seen in zip(T_LIST, cache.means.tolist(), cache.seen.tolist(), strict=False):
            assert seen == (time in expected_means), (time, expected_means)
            assert math.isclose(mean, expected_means.get(time, 0.0), rel_tol=1e-4), (mean, expected_means)
        self.losses = {}

    def adapter(self) -> AVDHooks:
        return self.trainer.callbacks._callbacks["avd"]

    def on_backward_begin(
        self,
        model: Any,
        data_batch: dict[str, Tensor],
        output_batch: dict[str, Any],
        loss_dict: dict[str, Tensor],
        iteration: int = 0,
        accum_iter: int = 0,
    ) -> None:
        before = self.trainer.callbacks._callbacks["before"]
        before.hook.remove()
        record = RECORDS[-1]
        added = loss_dict["total_loss"] - record.pop("total")
        if iteration % 2:
            assert added == 0, "added to the loss of the online model"
            assert not record["calls"]
            assert not any(name.startswith("avd/") for name in loss_dict)
            return
        by_hand, losses, weights, motion = self.by_hand(model, data_batch, output_batch, record["calls"])
        torch.testing.assert_close(added, by_hand, rtol=2e-4, atol=2e-5)
        parameters = list(model.net.parameters())
        for ours, theirs in zip(gradients(added, parameters), gradients(by_hand, parameters), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3 if record["amp"] else 1e-4)
        assert any(gradient.abs().sum() > 0 for gradient in gradients(added, parameters))
        torch.testing.assert_close(loss_dict["avd/motion/loss"], motion.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loss_dict["avd/regression/weights"], weights.mean(), rtol=1e-3, atol=1e-4)
        assert all(loss_dict[name].ndim == 0 for name in loss_dict if name.startswith("avd/"))
        record.update(added=added.item(), weights=weights.tolist(), times=losses)

    def by_hand(
        self, model: Any, data: dict[str, Tensor], outputs: dict[str, Any], calls: list[tuple[Any, ...]]
    ) -> tuple[Tensor, dict[float, float], Tensor, Tensor]:
        """Eq. 5-8 from the student's input: the noise in it, and the student called once more on it."""
        ((x_t, t, options, amp),) = calls
        RECORDS[-1]["amp"] = amp
        assert amp == (model.precision_amp is not None)
        assert t.dtype == torch.float64
        assert set(t.tolist()) <= set(T_LIST[:-1]), t
        assert torch.equal(options["condition"], data["condition"])
        sigma = t.view(-1, 1, 1, 1, 1)
        noise = (x_t.double() - (1 - sigma) * data["real"].double()) / sigma
        assert 0.8 < noise.std() < 1.2
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            velocity = functional_call(
                model.net, dict(model.net.named_parameters()), (x_t, t),
                {"condition": data["condition"], "fwd_pred_type": "flow"},
            )  # fmt: skip
        errors = ((velocity.double() - (noise - data["real"].double())) ** 2).mean(dim=(1, 2, 3, 4))
        means = torch.tensor(
            [self.means.get(time, error.item()) for time, error in zip(t.tolist(), errors, strict=True)]
        )
        weights = 2.0 / (1 + torch.exp(3.0 * (errors.detach() - means)))
        for time, error in zip(t.tolist(), errors.tolist(), strict=True):
            self.losses.setdefault(time, []).append(error)
        x_0 = outputs["gen_rand_train"].double()
        variance = ((x_0 - x_0.mean(dim=2, keepdim=True)) ** 2).mean()
        motion = 0.05 * torch.clamp(-torch.log(variance + 1e-6), min=-4.0)
        times = dict(zip(t.tolist(), errors.tolist(), strict=True))
        return (weights * errors).mean().float() + motion.float(), times, weights.float(), motion.float()

    def on_training_step_end(
        self,
        model: Any,
        data_batch: dict[str, Tensor],
        output_batch: dict[str, Any],
        loss_dict: dict[str, Tensor],
        iteration: int = 0,
    ) -> None:
        """The running means go on once per optimizer step, whatever the accumulation."""
        for time, losses in self.losses.items():
            current = sum(losses) / len(losses)
            self.means[time] = 0.95 * self.means[time] + 0.05 * current if time in self.means else current
        self.losses = {}
        cache = self.adapter().terms.objective.regression.cache
        for time, mean in zip(T_LIST, cache.means.tolist(), strict=False):
            assert math.isclose(mean, self.means.get(time, 0.0), rel_tol=1e-3), (time, mean, self.means)

    def on_train_end(self, model: Any, iteration: int = 0) -> None:
        assert all(not torch.equal(a, b) for a, b in zip(self.start, model.net.parameters(), strict=True))


def gradients(value: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, parameters, retain_graph=True)


def configure(folder: Path, max_iter: int, amp: bool, rounds: int, expected_means: dict[float, float]) -> Any:
    config = video_config(folder, max_iter)
    config.model.precision_amp = "bfloat16" if amp else None
    config.trainer.grad_accum_rounds = rounds
    config.expected_means = expected_means
    config.trainer.callbacks = DictConfig({"before": L(Before)()}, flags={"allow_objects": True})
    exec(lines_of_the_page(), {"config": config})
    config.trainer.callbacks["avd"]["motion"]["floor"] = -4.0  # so that the term has a gradient on these clips
    config.trainer.callbacks["after"] = L(After)()
    return config


def main(folder: Path, amp: bool, rounds: int, checkpointer: type[Checkpointer]) -> None:
    trainer, _ = train(configure(folder, 9, amp, rounds, {}), checkpointer)
    after = trainer.callbacks._callbacks["after"]
    saved = torch.load(folder / "0000009.pth", weights_only=False)["callbacks"]["avd"]
    assert set(saved) >= {"regression.cache.means", "regression.cache.seen"}, list(saved)
    first = len(RECORDS)
    # The same configuration again: FastGen finds its checkpoint and goes on.
    resumed, _ = train(configure(folder, 15, amp, rounds, dict(after.means)), checkpointer)
    assert RECORDS[first]["iteration"] == 10
    student_steps = [record for record in RECORDS if "added" in record]
    weights = [weight for record in student_steps for weight in record["weights"]]
    assert max(abs(weight - 1) for weight in weights) > 0.02, "no sample was weighted otherwise than the average"
    adapter = resumed.callbacks._callbacks["avd"]
    assert isinstance(adapter, AVDHooks)
    assert isinstance(adapter, Callback)
    for name, method in inspect.getmembers(AVDHooks, inspect.isfunction):
        if name.startswith("on_"):
            assert (
                inspect.signature(method).parameters.keys()
                == inspect.signature(getattr(Callback, name)).parameters.keys()
            )
    report = {
        "steps": len(RECORDS),
        "student_steps": len(student_steps),
        "added": [record["added"] for record in student_steps],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    options = sys.argv[2:]
    main(
        Path(sys.argv[1]),
        amp="autocast" in options,
        rounds=2 if "accumulate" in options else 1,
        checkpointer=FSDPCheckpointer if "sharded" in options else Checkpointer,
    )
