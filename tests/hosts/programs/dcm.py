"""DCM's own distillation step for Wan, with the lines of its page, on its own transformer of toy size under FSDP."""

import functools
import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from avd_core import LossOutput, RegressionConfig
from avd_integrations.consistency import PhasedConsistencyTerms, dcm_terms
from by_hand import Calls, RegressionByHand, check_losses, close, columns, shifted
from page_lines import code_blocks, load_script, page_lines, with_lines
from without_gpu import declare_torchvision_operators

SCRIPT = Path("fastvideo/distill_dcm_wan_semantic_expert.py")
POINTS, FIRST, SHIFT = 50, 35, 17.0
FLOOR, MOTION_WEIGHT = 0.6, 0.05
SIDES = set()  # of the floor, on which the calls were


def stand_in_for_absent_packages() -> None:
    """CUDA kernels, wandb and a private storage client: the script imports them, Wan's step on a CPU calls none."""
    declare_torchvision_operators()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a stand-in for a package that is not installed was called")

    names = {
        "flash_attn": ["flash_attn_varlen_qkvpacked_func"],
        "flash_attn.bert_padding": ["pad_input", "unpad_input"],
        "liger_kernel": [],
        "liger_kernel.ops": [],
        "liger_kernel.ops.swiglu": ["LigerSiLUMulFunction"],
        "petrel_client": [],
        "petrel_client.client": ["Client"],
        "decord": ["VideoReader"],
        "wandb": [],
    }
    for name, members in names.items():
        if importlib.util.find_spec(name.split(".")[0]) is None or name.split(".")[0] in sys.modules:
            module = types.ModuleType(name)
            module.__path__ = []
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            for member in members:
                setattr(module, member, refuse)
            sys.modules[name] = module


def attend_without_cuda() -> None:
    """flash_attn's place is taken by PyTorch's attention: ``[B, S, 3, H, D]`` to ``[B, S, H, D]``."""
    import fastvideo.models.wan_hf.modeling_wan as wan

    def attention(qkv: Tensor, mask: Tensor, **_: Any) -> Tensor:
        assert mask.all()
        q, k, v = qkv.transpose(1, 3).unbind(2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    wan.flash_attn_no_pad = attention


def average_on_one_rank() -> None:
    """gloo cannot average; with one rank there is nothing to do."""
    all_reduce = dist.all_reduce

    def reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, **options: Any) -> Any:
        return None if op == dist.ReduceOp.AVG else all_reduce(tensor, op=op, **options)

    dist.all_reduce = reduce


def new_solver(script: types.ModuleType) -> tuple[Any, Any]:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    solver = script.EulerSolver(
        scheduler.sigmas.numpy()[::-1], scheduler.config.num_train_timesteps, euler_timesteps=POINTS
    )
    return scheduler, solver.to("cpu")


def new_transformer(script: types.ModuleType) -> nn.Module:
    torch.manual_seed(0)
    return script.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=8, ffn_dim=16, num_layers=1
    )


def sharded(model: nn.Module) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(
        model, sharding_strategy=ShardingStrategy.NO_SHARD, device_id=torch.device("cpu"), use_orig_params=True
    )


def batches(size: int, frames: int) -> Iterator[tuple[Tensor, Tensor, None, None]]:
    generator = torch.Generator().manual_seed(3)
    while True:
        clips = torch.randn(size, 16, frames, 4, 4, generator=generator)
        yield clips, torch.randn(size, 5, 8, generator=generator), None, None


def sigmas_by_hand() -> np.ndarray:
    return shifted(np.arange(1, 1001) / 1000, SHIFT)[1000 // POINTS - 1 :: 1000 // POINTS]


def read_by_hand(arguments: list[Tensor]) -> tuple[np.ndarray, ...]:
    """What a call's arguments say: ``(velocity, its target, x_0, sigma, sigma_end)``.

    One phase: from wherever a clip was noised down to the point below the first.
    """
    x_end, x_t, clips, noise, index, _ = (a.double().numpy() for a in arguments)
    index = index.astype(int)
    sigmas = sigmas_by_hand()
    # A batch whose first clip is at the first point goes one step, each clip from its own point.
    ends = sigmas[index - 1] if index[0] == FIRST else np.full(len(index), sigmas[FIRST - 1])
    sigma, end = columns(sigmas[index], ends, x_t)
    np.testing.assert_allclose(x_t, sigma * noise + (1 - sigma) * clips, atol=1e-4)
    velocity = (x_end - x_t) / (end - sigma)
    return velocity, noise - clips, x_t - sigma * velocity, sigma, end


def motion_by_hand(x_0: np.ndarray) -> float:
    return -np.log(x_0.var(axis=2).mean() + 1e-6)


def loss_by_hand(regression: Callable[..., float], arguments: list[Tensor]) -> float:
    velocity, target, x_0, *_ = read_by_hand(arguments)
    motion = motion_by_hand(x_0)
    SIDES.add(bool(motion > FLOOR))
    return regression(velocity, target, arguments[4].tolist()) + MOTION_WEIGHT * max(motion, FLOOR)


def first_gradient_by_hand(arguments: list[Tensor]) -> np.ndarray:
    """Of both terms with respect to ``x_end``, while the cache is empty and so each clip's weight 1."""
    velocity, target, x_0, sigma, end = read_by_hand(arguments)
    assert motion_by_hand(x_0) > FLOOR
    deviation = x_0 - x_0.mean(axis=2, keepdims=True)
    of_velocity = 2 * (velocity - target) / velocity.size
    of_x_0 = -MOTION_WEIGHT * 2 * deviation / x_0.size / ((deviation**2).mean() + 1e-6)
    return (of_velocity - sigma * of_x_0) / (end - sigma)


def main(folder: Path) -> dict[str, float]:
    stand_in_for_absent_packages()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    average_on_one_rank()
    blocks = page_lines("dcm.md")[:4]  # the others are for the other experts
    script = load_script(folder / "script_with_lines.py", with_lines(SCRIPT.read_text(), blocks))
    attend_without_cuda()
    create, _, log_and_save, _ = (code for _, _, code in blocks)
    (load,) = (code for code in code_blocks("dcm.md", "python") if "load_state_dict" in code)
    calls = Calls(PhasedConsistencyTerms)
    scheduler, solver = new_solver(script)
    logged = []
    wandb = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)))
    names = {"solver": solver, "device": "cpu", "torch": torch, "os": os, "rank": 0, "wandb": wandb}
    names["args"] = types.SimpleNamespace(output_dir=str(folder), max_train_steps=5, checkpointing_steps=2, sp_size=1)
    exec(create, names)

    transformer = new_transformer(script)
    start = deepcopy(transformer.state_dict())
    teacher = sharded(deepcopy(transformer).requires_grad_(False))
    transformer = sharded(transformer)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)

    def step(size: int, number: int, frames: int = 2, micro_batches: int = 1) -> float:
        options = {
            "transformer": transformer,
            "model_type": "wan",
            "teacher_transformer": teacher,
            "ema_transformer": None,
            "optimizer": optimizer,
            "lr_scheduler": schedule,
            "loader": batches(size, frames),
            "noise_scheduler": scheduler,
            "solver": names["solver"],
            "noise_random_generator": None,
            "gradient_accumulation_steps": micro_batches,
            "sp_size": 1,
            "max_grad_norm": 1.0,
            "uncond_prompt_embed": torch.zeros(5, 8),
            "uncond_prompt_mask": None,
            "num_euler_timesteps": POINTS,
            "multiphase": 1,
            "not_apply_cfg_solver": True,
            "distill_cfg": 0.0,
            "ema_decay": 0.95,
            "pred_decay_weight": 0.0,
            "pred_decay_type": "l1",
            "hunyuan_teacher_disable_cfg": False,
            "cur_step": number,
        }
        return script.distill_one_step(**options)[0]

    regression = RegressionByHand()
    by_hand = functools.partial(loss_by_hand, regression)

    def added_to_the_loss(**options: int) -> tuple[float, dict[str, Tensor]]:
        """Without the terms first, from the same weights and random numbers: the difference is the terms."""
        before, terms = deepcopy(transformer.state_dict()), solver.avd
        solver.avd = types.SimpleNamespace(from_prediction=lambda **_: (torch.zeros(()), {}), update=lambda: None)
        torch.manual_seed(5)
        alone = step(2, 1, **options)
        elsewhere = deepcopy(transformer.state_dict())
        transformer.load_state_dict(before)
        optimizer.state.clear()
        solver.avd = terms
        torch.manual_seed(5)
        return step(2, 1, **options) - alone, elsewhere

    added, elsewhere = added_to_the_loss()
    close(added, calls.losses[0], 1e-3)
    moved = transformer.state_dict()
    assert any(not torch.equal(elsewhere[k], moved[k]) for k in start)
    step(3, 2, frames=4)
    # The special case: the first clip of the batch is at the first point.
    while calls.arguments[-1][4][0] != FIRST:
        step(2, 3)
    check_losses(calls, by_hand, 1e-3)
    assert len(SIDES) == 2
    end = transformer.state_dict()
    assert any(not torch.equal(start[k], end[k]) for k in start)
    saved = calls.after[-1]
    for index, mean in regression.means.items():
        close(saved["terms.objective.regression.cache.means"][index - FIRST], mean, 1e-3)

    # The host's checkpoint has the weights; the page's lines put the cache beside it, and the terms into the logs.
    script.save_checkpoint(transformer, 0, str(folder), 5)
    assert set(load_file(folder / "checkpoint-5" / "diffusion_pytorch_model.safetensors")) == set(start)
    for number in (1, 2, 3, 4, 5):
        exec(log_and_save, names | {"step": number})
    exec(log_and_save, names | {"step": 6, "rank": 1})
    assert {path.name for path in folder.glob("avd-*")} == {"avd-2.pt", "avd-4.pt", "avd-5.pt"}
    assert [number for number, _ in logged] == [1, 2, 3, 4, 5]
    close(logged[0][1]["regression/loss"] + logged[0][1]["motion/loss"], calls.losses[-1])

    # Two micro-batches a step: each has half of its loss, and is weighted by the means from before the step.
    single, calls_of_one = solver.avd, len(calls.losses)
    solver.avd = dcm_terms(solver, RegressionConfig(auto_update=False), sp_size=1)
    accumulated = RegressionByHand()
    added, _ = added_to_the_loss(micro_batches=2)
    step(4, 2, micro_batches=2)
    micro_batches = calls.losses[calls_of_one:]
    assert len(micro_batches) == 4
    close(added, sum(micro_batches[:2]) / 2, 1e-3)
    for i, loss in enumerate(micro_batches):
        close(loss_by_hand(accumulated.accumulate, calls.arguments[calls_of_one + i]), loss, 1e-3)
        if i % 2:
            accumulated.end_step()
    means = solver.avd.terms.objective.regression.cache.means
    for index, mean in accumulated.means.items():
        close(means[index - FIRST].item(), mean, 1e-3)
    solver.avd = single

    names["solver"] = new_solver(script)[1]
    exec(create, names)
    terms, gradients = names["solver"].avd, []

    def with_gradient(**given: Tensor) -> LossOutput:
        output = terms.from_prediction(**given)
        gradients.append(torch.autograd.grad(output.loss, given["prediction"], retain_graph=True)[0].numpy())
        return output

    # With another cache first, as the transformer's samples move little enough by now for the motion term to act.
    names["solver"].avd = types.SimpleNamespace(from_prediction=with_gradient, update=terms.update)
    calls.clear()
    step(2, 3)
    expected = first_gradient_by_hand(calls.arguments[0])
    np.testing.assert_allclose(gradients[0], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())

    names["solver"].avd = terms
    exec(load.replace("avd-1000.pt", "avd-5.pt"), names)
    calls.clear()
    step(1, 3)
    assert calls.before[0] == saved
    check_losses(calls, by_hand, 1e-3)
    added = calls.losses[0]
    dist.destroy_process_group()
    return {"added": added, "entries": len(regression.means)}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
