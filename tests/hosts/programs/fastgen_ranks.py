"""Two ranks of FastGen's trainer, wrapped by DDP and sharded: one cache, one set of weights, one checkpoint."""

import json
import sys
from pathlib import Path
from typing import Any

import fastgen_tiny as tiny  # first: torchvision can be imported after it

# isort: split
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fastgen.utils.distributed import ddp, fsdp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from avd_integrations.fastgen import avd_callback

RANKS = 2


class Data(tiny.Callback):
    def on_train_end(self, model: Any, iteration: int = 0) -> None:
        seen = gathered(getattr(self, "seen", dist.get_rank()))  # a run that is over at once sees none
        assert len(set(seen)) == RANKS, "both ranks were given the same clips"

    def on_backward_begin(
        self,
        model: Any,
        data_batch: dict[str, Tensor],
        output_batch: dict[str, Any],
        loss_dict: dict[str, Tensor],
        iteration: int = 0,
        accum_iter: int = 0,
    ) -> None:
        self.seen = data_batch["real"].sum().item()


def train(folder: Path, max_iter: int, wrapper: str) -> tuple[list[float], list[Tensor]]:
    config = tiny.video_config(folder, max_iter)
    setattr(config.trainer, wrapper, True)
    config.trainer.callbacks = tiny.DictConfig(
        {"avd": tiny.L(avd_callback)(motion={"floor": -4.0}), "data": tiny.L(Data)()}, flags={"allow_objects": True}
    )
    torch.manual_seed(0)  # the same weights on both ranks, however they are wrapped
    trainer, model = tiny.train(config)
    cache = trainer.callbacks._callbacks["avd"].terms.objective.regression.cache
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.net.parameters()]
    means = gathered(cache.means.tolist())
    assert means[0] == means[1], means
    return means[0], weights


def gathered(value: Any) -> list[Any]:
    everyone = [None] * RANKS
    dist.all_gather_object(everyone, value)
    return everyone


def shard(model: Any, **options: Any) -> Any:
    """FSDP2 as FastGen applies it, on the CPU, which it does not: layer by layer, the network itself being abstract."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for network in model.fsdp_dict.values():
        for layer in network.children():
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
    return model


def run(rank: int, folder: Path, init: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=RANKS)
    # FastGen asks for CUDA before it wraps a model; the wrappers themselves do not need it.
    ddp.model_to_ddp = lambda model: ddp.DDPWrapper(model, find_unused_parameters=True)
    fsdp.model_to_fsdp = shard
    results = {}
    for wrapper in ("ddp", "fsdp"):
        means, weights = train(folder / wrapper, 7, wrapper)
        assert sum(mean > 0 for mean in means) >= 2, means
        sums = gathered([weight.sum().item() for weight in weights])
        assert sums[0] == sums[1], "the added loss's gradients were not averaged"
        resumed, _ = train(folder / wrapper, 8, wrapper)  # no iteration is left
        assert resumed == means, (resumed, means)
        results[wrapper] = means, weights
    torch.testing.assert_close(results["fsdp"], results["ddp"], rtol=1e-4, atol=1e-5)
    # The second rank looks for the checkpoint where there is none.
    try:
        train(folder / ("ddp" if rank == 0 else "elsewhere"), 9, "ddp")
    except RuntimeError as error:
        message = str(error)
    else:
        message = "nothing was said"
    assert "have not loaded the same checkpoint" in message, message
    if rank == 0:
        (folder / "report.json").write_text(json.dumps({"means": means, "message": message}))
    dist.destroy_process_group()


if __name__ == "__main__":
    scratch = Path(sys.argv[1])
    torch.set_num_threads(1)
    mp.spawn(run, (scratch, scratch / "init"), nprocs=RANKS)
    print((scratch / "report.json").read_text())
