import math
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from avd_core import EMACallback
from avd_trainer.config.sections import ArchitectureConfig, LoRAConfig, OptimizerConfig
from avd_trainer.models.condition import Condition
from avd_trainer.models.roles import Average, Frozen, Trained, averaged_weights, load_models, trained_parameters
from avd_trainer.models.transformer import VelocityModel, build_transformer, load_transformer
from avd_trainer.models.weights import TransformerWeights
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import Ranks, join_ranks
from avd_trainer.training.config import TrainConfig
from launches import on_ranks
from runs import LORA, MakeConfig, MakeTrainer, load_models_of, tiny_config

ROLES = ("student", "teacher", "online")
# Whose adapters there are; what is not adapted is trained whole.
ADAPTED = [(), ("student",), ("online",), ("student", "online")]
BOTH = ("student", "online")


def lora(roles: tuple[str, ...]) -> dict[str, Any]:
    return {role: {"lora": LORA} for role in roles}


def load(config: TrainConfig, ranks: Ranks) -> dict[str, VelocityModel]:
    return {name: model for name, model in load_models_of(config, ranks).items() if isinstance(model, VelocityModel)}


def modules(models: dict[str, VelocityModel]) -> set[nn.Module]:
    return {model.module for model in models.values()}


def inputs(timestep: float = 757.0) -> tuple[Tensor, Tensor, Condition]:
    draws = torch.Generator().manual_seed(5)
    x_t = torch.randn(2, 16, 3, 4, 4, generator=draws)
    return x_t, torch.full((2,), timestep), Condition(torch.randn(2, 4, 6, generator=draws))


@torch.no_grad()
def velocity(model: VelocityModel, timestep: float = 757.0) -> Tensor:
    return model(*inputs(timestep))


@torch.no_grad()
def move_adapters(module: nn.Module) -> None:
    """Away from the start, at which all roles give the same."""
    for number, (name, parameter) in enumerate(module.named_parameters()):
        if ".lora_B." in name:
            parameter.to_local().copy_(
                0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            )


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.full_tensor() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("roles", ADAPTED)
def test_adapters_share_the_teacher_and_all_roles_start_from_it(
    make_config: MakeConfig, ranks: Ranks, roles: tuple[str, ...]
) -> None:
    config = make_config(method=lora(roles))
    models = load(config, ranks)
    for role in ("student", "online"):
        model = models[role]
        assert (model.module is models["teacher"].module) == (role in roles)
        # Bit for bit: an adapter starts as no change at all.
        assert torch.equal(velocity(model), velocity(models["teacher"]))
        assert len(model.parameters()) > 0
        assert all((".lora_" in name) == (role in roles) for name in model.named_parameters())
    assert models["student"].module is not models["online"].module or len(roles) == 2
    assert not set(models["student"].parameters()) & set(models["online"].parameters())
    assert models["teacher"].named_parameters() == {} or roles
    torch.testing.assert_close(
        velocity(models["teacher"]), velocity(VelocityModel(load_transformer(str(config.teacher))))
    )


def test_adapters_start_as_in_peft_and_each_on_its_own(make_config: MakeConfig, ranks: Ranks) -> None:
    models = load(make_config(method=lora(BOTH)), ranks)
    starts = {name: p.full_tensor() for model in models.values() for name, p in model.named_parameters().items()}
    for name, value in starts.items():
        if ".lora_A." in name:
            assert 0.5 / math.sqrt(value.shape[1]) < value.abs().max() <= 1 / math.sqrt(value.shape[1])
        else:
            assert not value.any()
    name = "blocks.0.attn1.to_q.lora_A.{}.weight"
    assert not torch.equal(starts[name.format("student")], starts[name.format("online")])
    other = load(make_config(method=lora(BOTH), seed=1), ranks)["student"].named_parameters()[name.format("student")]
    assert not torch.equal(starts[name.format("student")], other.full_tensor())


@pytest.mark.parametrize("roles", ADAPTED)
def test_training_changes_a_role_and_never_the_teacher(make_trainer: MakeTrainer, roles: tuple[str, ...]) -> None:
    trainer = make_trainer(max_steps=2, method=lora(roles))
    before = velocity(trainer.models["teacher"])
    list(trainer.run())
    assert torch.equal(velocity(trainer.models["teacher"]), before)
    after = [velocity(trainer.models["student"]), velocity(trainer.models["online"]), before]
    assert not any(torch.equal(after[i], after[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("role", ["student", "online"])
@pytest.mark.parametrize("roles", ADAPTED)
def test_gradients_reach_the_weights_of_their_role_alone(
    make_config: MakeConfig, ranks: Ranks, roles: tuple[str, ...], role: str
) -> None:
    models = load(make_config(method=lora(roles)), ranks)
    for module in modules(models):
        move_adapters(module)
    model = models[role]
    model(*inputs()).square().mean().backward()
    assert list(gradients(model.module)) == list(model.named_parameters())
    assert all(value.any() for value in gradients(model.module).values())
    others = modules(models) - {model.module}
    assert all(gradients(module) == {} for module in others)


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2, alpha=2.0)], ids=["full", "lora"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_average_that_is_asked_is_a_frozen_model_of_its_own(
    make_config: MakeConfig, ranks: Ranks, lora: LoRAConfig | None, precision: str
) -> None:
    config = make_config(precision=precision)
    roles = {
        "teacher": Frozen(),
        "student": Trained(OptimizerConfig(lr=1e-3), lora),
        "ema": Average("student", 0.5, asked=True),
    }
    models = {
        name: model
        for name, model in load_models(
            roles,
            ranks,
            teacher=config.teacher,
            latent_shape=(16, 3, 4, 4),
            precision=precision,
            parallel=config.parallel,
            seed=0,
        ).items()
        if isinstance(model, VelocityModel)
    }
    student, ema = models["student"], models["ema"]
    # Adapters share one base: there is no second copy of it.
    assert (ema.module is student.module) == (ema.module is models["teacher"].module) == (lora is not None)
    assert trained_parameters(ema) == {}
    weights = averaged_weights(ema)
    assert {weight.dtype for weight in weights} == {torch.float32}
    parameters = list(trained_parameters(student).values())
    average = EMACallback(parameters, 0.5, warmup=False, held_in=weights)
    assert torch.equal(velocity(ema), velocity(student))
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.2)
    moved = velocity(student)
    assert not torch.equal(velocity(ema), moved)
    average.after_step(1, {})
    with average.average_parameters():
        assert torch.equal(velocity(ema), velocity(student))
    assert not torch.equal(velocity(ema), moved)
    x_t, *others = inputs()
    models["ema"](x_t.requires_grad_(), *others).square().mean().backward()
    assert all(gradients(module) == {} for module in modules(models))


def test_a_call_leaves_no_role_behind(make_config: MakeConfig, ranks: Ranks) -> None:
    models = load(make_config(method=lora(BOTH)), ranks)
    module = models["teacher"].module
    move_adapters(module)

    def switches() -> list[tuple[bool, list[str]]]:
        layers = [layer for layer in module.modules() if hasattr(layer, "lora_A")]
        return [(layer.disable_adapters, layer.active_adapters) for layer in layers]

    before, results = switches(), [velocity(model) for model in models.values()]
    assert len({result.sum().item() for result in results}) == 3
    with pytest.raises(RuntimeError):
        models["student"](*inputs()[:2], Condition(torch.zeros(2, 4, 7)))  # text of another width
    assert switches() == before
    assert all(torch.equal(velocity(model), result) for model, result in zip(models.values(), results, strict=True))


@pytest.mark.parametrize("roles", [(), ("student", "online")])
def test_checkpointed_blocks_are_run_again_in_the_role_of_their_forward(
    make_config: MakeConfig, ranks: Ranks, roles: tuple[str, ...]
) -> None:
    """Forwards and backwards of all roles mixed, as in a step of the trainer."""
    found, forwards = [], []
    for checkpointing in (False, True):
        config = make_config(parallel={"activation_checkpointing": checkpointing}, method=lora(roles))
        models = load(config, ranks)
        count = [0]
        for module in modules(models):
            move_adapters(module)
            module.blocks[0].attn1.to_q.register_forward_hook(lambda *_, count=count: count.append(1))
        generated = models["student"](*inputs())
        velocity(models["teacher"])
        velocity(models["online"])
        online = models["online"](*inputs(300.0))
        generated.square().mean().backward()
        regressed = models["student"](*inputs(522.0))
        online.square().mean().backward()
        velocity(models["student"])
        regressed.square().mean().backward()
        found.append([gradients(models["student"].module), gradients(models["online"].module)])
        forwards.append(len(count) - 1)
    assert forwards == [6, 6 + 3]
    for expected, actual in zip(*found, strict=True):
        assert expected.keys() == actual.keys()
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-6, atol=1e-9)


def test_a_student_starts_from_weights_of_its_own(make_config: MakeConfig, ranks: Ranks, tmp_path: Path) -> None:
    own = load_transformer(str(make_config().teacher))
    with torch.no_grad():
        own.proj_out.weight.mul_(1.5)
    own.save_pretrained(tmp_path)
    models = load(make_config(method=lora(("online",)), student_weights=str(tmp_path)), ranks)
    torch.testing.assert_close(velocity(models["student"]), velocity(VelocityModel(own)))
    assert torch.equal(velocity(models["online"]), velocity(models["teacher"]))
    assert not torch.allclose(velocity(models["student"]), velocity(models["teacher"]))


def test_weights_of_another_architecture_are_refused(make_config: MakeConfig, ranks: Ranks, tmp_path: Path) -> None:
    build_transformer(
        ArchitectureConfig(
            num_attention_heads=1, attention_head_dim=12, ffn_dim=8, num_layers=1, freq_dim=8, text_dim=6
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"ffn\.net\.0\.proj"):
        load(make_config(student_weights=str(tmp_path)), ranks)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["to_q", "to_z"],
            r"\.lora\.target_modules: .* no layers whose names end in to_z\. Choose among to_q, to_k",
        ),
        (["norm2"], r"method\.student\.lora\.target_modules \['norm2'\] do not fit the model: .* not supported"),
    ],
)
def test_targets_that_cannot_be_adapted_are_named(
    make_config: MakeConfig, ranks: Ranks, targets: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load(make_config(method={"student": {"lora": {"target_modules": targets}}}), ranks)


@pytest.mark.parametrize("roles", ADAPTED)
def test_in_bfloat16_only_what_is_trained_stays_float32(
    make_config: MakeConfig, ranks: Ranks, roles: tuple[str, ...]
) -> None:
    models = load(make_config(precision="bfloat16", method=lora(roles)), ranks)
    for module in modules(models):
        frozen = {name: p.dtype for name, p in module.named_parameters() if not p.requires_grad}
        exact = {name for name, dtype in frozen.items() if dtype == torch.float32}
        assert all(".time_embedder." in name for name in exact)
        assert all(dtype == torch.bfloat16 for name, dtype in frozen.items() if name not in exact)
    for model in (models["student"], models["online"]):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        model(*inputs()).square().mean().backward()
        assert {g.dtype for g in gradients(model.module).values()} == {torch.float32}
    # The same numbers whether weights are cast when they are loaded or when they are used.
    assert torch.equal(velocity(models["student"]), velocity(models["teacher"]))
    assert torch.equal(velocity(models["online"]), velocity(models["teacher"]))


@pytest.mark.parametrize("roles", [(), ("student",)])
def test_bfloat16_computes_what_an_unsharded_model_does(
    make_config: MakeConfig, ranks: Ranks, roles: tuple[str, ...]
) -> None:
    config = make_config(precision="bfloat16", method=lora(roles))
    student = load(config, ranks)["student"]
    seen: list[torch.dtype] = []
    for name in ("condition_embedder.time_embedder.linear_2", "blocks.0.attn1.to_q", "condition_embedder.time_proj"):
        student.module.get_submodule(name).register_forward_hook(lambda *hook: seen.append(hook[-1].dtype))
    expected = load_transformer(str(config.teacher))
    for name, parameter in expected.named_parameters():
        parameter.data = parameter.data if ".time_embedder." in name else parameter.data.bfloat16()
    result = velocity(student)
    assert result.dtype == torch.float32
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert torch.equal(result, velocity(VelocityModel(expected, dtype=torch.bfloat16)))
    exact = velocity(VelocityModel(load_transformer(str(config.teacher))))
    assert 0 < (result - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_timesteps_are_not_rounded(make_config: MakeConfig, ranks: Ranks, precision: str) -> None:
    models = load(make_config(precision=precision), ranks)
    # In bfloat16 both are 756.
    assert not torch.equal(velocity(models["student"], 757.0), velocity(models["student"], 756.0))
    assert not torch.equal(velocity(models["teacher"], 757.0), velocity(models["teacher"], 756.0))


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made within this context took at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        local = result.to_local() if isinstance(result, DTensor) else result
        if isinstance(local, Tensor) and not local.is_meta:
            self._made = [made for made in self._made if made() is not None] + [weakref.ref(local)]
            storages = [made.untyped_storage() for ref in self._made if (made := ref()) is not None]
            self.nbytes = max(self.nbytes, sum({s.data_ptr(): s.nbytes() for s in storages}.values()))
        return result


class Loaded(NamedTuple):
    held: list[dict[str, int]]  # weights on this rank, by module and name
    read: dict[str, int]  # the most weights read at once, by name
    peak: int  # bytes


def load_and_watch(config: TrainConfig) -> Loaded:
    most: dict[str, int] = {}
    read = TransformerWeights.read

    def watched(weights: TransformerWeights, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        result = read(weights, name, slices)
        most[name] = max(most.get(name, 0), result.numel())
        return result

    TransformerWeights.read = watched  # type: ignore[method-assign]
    peak = PeakMemory()
    with join_ranks() as ranks, peak:
        models = load(config, ranks)
        held = [{name: p.to_local().numel() for name, p in module.named_parameters()} for module in modules(models)]
    return Loaded(held, most, peak.nbytes)


@pytest.mark.parametrize("roles", [(), BOTH], ids=["full", "lora"])
def test_no_rank_ever_holds_a_whole_model(tmp_path: Path, roles: tuple[str, ...]) -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 512, "num_layers": 2}
    build_transformer(ArchitectureConfig(**sizes, freq_dim=32, text_dim=8)).save_pretrained(tmp_path)
    whole = {name: p.numel() for name, p in load_transformer(str(tmp_path)).named_parameters()}
    for rank in on_ranks(2, load_and_watch, tiny_config(tmp_path, method=lora(roles))):
        assert len(rank.held) == (1 if roles else 3)
        for held in rank.held:
            base = {name.replace(".base_layer", ""): n for name, n in held.items() if ".lora_" not in name}
            assert base.keys() == whole.keys()
            assert sum(base.values()) < 0.52 * sum(whole.values())
        # Tables of a single row cannot be halved.
        assert sum(rank.read.values()) < 0.52 * sum(whole.values())
        # The parts of all modules, and a parameter or two while they are made.
        parts = sum(sum(held.values()) for held in rank.held)
        assert 4 * parts <= rank.peak < 4 * (parts + 2 * max(whole.values())) < 4 * (parts + sum(whole.values()))
