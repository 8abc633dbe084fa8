"""Eq. 5-7 once more, in plain float64 numpy, and a record of what an adapter was called with."""

import numpy as np
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class RegressionByHand:
    """Keeps its own means."""

    def __init__(self, weight=2.0, sharpness=3.0, decay=0.95):
        self.weight, self.sharpness, self.decay = weight, sharpness, decay
        self.means = {}

    def __call__(self, prediction, target, times):
        errors = (np.asarray(prediction, np.float64) - np.asarray(target, np.float64)) ** 2
        losses = errors.reshape(len(errors), -1).mean(axis=1)
        total = 0.0
        for time, loss in zip(times, losses, strict=True):
            deviation = loss - self.means.get(time, loss)
            total += self.weight * (1 - 1 / (1 + np.exp(-self.sharpness * deviation))) * loss
        for time in set(times):
            current = losses[[t == time for t in times]].mean()
            before = self.means.get(time, current)
            self.means[time] = self.decay * before + (1 - self.decay) * current
        return total / len(losses)


class Calls:
    """Arguments, loss and cache of every call of a class of modules, whoever makes it."""

    def __init__(self, kind):
        self.kind = kind
        self.arguments, self.losses, self.before, self.after = [], [], [], []
        register_module_forward_pre_hook(self._enter)
        register_module_forward_hook(self._leave)

    def clear(self):
        for log in (self.arguments, self.losses, self.before, self.after):
            log.clear()

    def _enter(self, module, arguments):
        if isinstance(module, self.kind):
            self.arguments.append([a.detach().clone() for a in arguments])
            self.before.append(state_of(module))

    def _leave(self, module, arguments, output):
        if isinstance(module, self.kind):
            self.losses.append(output.loss.item())
            self.after.append(state_of(module))


def state_of(module):
    return {name: value.tolist() for name, value in module.state_dict().items()}


def close(a, b, tolerance=1e-4, slack=0.0):
    assert abs(a - b) <= tolerance * max(abs(a), abs(b)) + slack, f"{a} is not {b}"


def columns(*arrays):
    """``[B]`` arrays as ``[B, 1, 1, ...]``, float64, to go with the last one."""
    *vectors, like = (np.asarray(a, np.float64) for a in arrays)
    return [v.reshape(-1, *[1] * (like.ndim - 1)) for v in vectors]
