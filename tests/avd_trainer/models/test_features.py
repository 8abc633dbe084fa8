"""Features of tapped blocks: the same numbers and gradients as the whole forward's, and nothing computed behind."""

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from avd_trainer.config.sections import ArchitectureConfig
from avd_trainer.models.condition import Condition
from avd_trainer.models.features import block_outputs, tapped_by_default
from avd_trainer.models.roles import load_models
from avd_trainer.models.transformer import VelocityModel, build_transformer, load_transformer
from avd_trainer.runtime.ranks import join_ranks
from launches import on_ranks
from runs import LATENT_SHAPE, LORA, model_inputs, tiny_config

LAYERS = 4
BLOCKS = (0, 2)


@pytest.fixture(scope="module")
def deep_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep-teacher")
    torch.manual_seed(0)
    architecture = ArchitectureConfig(
        num_attention_heads=1, attention_head_dim=12, ffn_dim=16, num_layers=LAYERS, freq_dim=8, text_dim=6
    )
    build_transformer(architecture).save_pretrained(folder)
    return folder


def run_roles(teacher: Path, lora: bool, checkpointing: bool) -> tuple[list[Tensor], list[int]]:
    """Student, then the teacher as a critic of its velocity, then the student's forward once more; ranks share a batch.

    Returns the critic's features, their gradient at the velocity, and the gradient that reached the student's weights;
    and how often each block of the teacher ran, a backward pass included.
    """
    adapters = {"lora": LORA} if lora else {}
    config = tiny_config(
        teacher, parallel={"activation_checkpointing": checkpointing}, method={"student": adapters, "online": adapters}
    )
    with join_ranks() as ranks:
        models = load_models(
            config.method.roles(),
            ranks,
            teacher=str(teacher),
            latent_shape=LATENT_SHAPE,
            precision="float32",
            parallel=config.parallel,
            seed=0,
        )
        student, critic = models["student"], models["teacher"]
        assert isinstance(student, VelocityModel)
        assert isinstance(critic, VelocityModel)
        with torch.no_grad():
            for name, parameter in student.named_parameters().items():
                if ".lora_B." in name:
                    parameter.add_(0.1)
        share = slice(ranks.rank * 2 // ranks.size, (ranks.rank + 1) * 2 // ranks.size)
        x_t, timesteps, told = (value[share] for value in model_inputs(text_dim=6))
        counts = [0] * LAYERS
        for number, block in enumerate(critic.module.blocks):
            block.attn1.to_q.register_forward_hook(
                lambda *_, number=number: counts.__setitem__(number, counts[number] + 1)
            )
        results = []
        for _ in range(2):  # the second time, whatever the first has left behind would show
            velocity = student(x_t, timesteps, told)
            seen = counts.copy()
            seen_by_critic = velocity.detach().requires_grad_()
            features = block_outputs(critic, seen_by_critic, timesteps, told, BLOCKS)
            value = torch.stack([feature.square().mean() for feature in features]).sum()
            (gradient,) = torch.autograd.grad(value, seen_by_critic)
            ran = [now - before for now, before in zip(counts, seen, strict=True)]
            velocity.backward(gradient)
            student(x_t, timesteps, told).square().mean().backward()
            parameters = list(student.named_parameters().values())
            reached = torch.cat([p.grad.full_tensor().flatten() for p in parameters if p.grad is not None])
            for parameter in parameters:
                parameter.grad = None
            results.append([*(f.detach() for f in features), gradient, reached])
        assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
        assert all(p.grad is None for p in critic.module.parameters())
    return results[0], ran


def test_features_are_the_outputs_of_the_blocks_in_a_whole_forward(deep_teacher: Path) -> None:
    model = VelocityModel(load_transformer(str(deep_teacher)))
    expected: list[Tensor] = []
    for block in BLOCKS:
        model.module.blocks[block].register_forward_hook(lambda *hook: expected.append(hook[-1]))
    inputs = model_inputs(text_dim=6)
    with torch.no_grad():
        model(*inputs)
        found = block_outputs(model, *inputs, BLOCKS)
    assert [f.shape for f in found] == [(2, 3 * 2 * 2, 12)] * 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected[:2], strict=True))


def test_an_image_is_seen_as_in_a_whole_forward() -> None:
    """Wan2.1's image-to-video layout: further input channels, and an embedding with a cross attention of its own."""
    torch.manual_seed(0)
    module = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, in_channels=36, out_channels=16, text_dim=6, freq_dim=8,
        ffn_dim=16, num_layers=2, image_dim=10, added_kv_proj_dim=12, rope_max_seq_len=64,
    )  # fmt: skip
    x_t, timesteps, condition = model_inputs(text_dim=6)
    condition = Condition(condition.text, torch.randn(2, 20, *LATENT_SHAPE[1:]), torch.randn(2, 257, 10))
    expected: list[Tensor] = []
    module.blocks[1].register_forward_hook(lambda *hook: expected.append(hook[-1]))
    with torch.no_grad():
        VelocityModel(module)(x_t, timesteps, condition)
        (found,) = block_outputs(VelocityModel(module), x_t, timesteps, condition, [1])
    assert torch.equal(found, expected[0])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_gradients_cross_a_frozen_critic_and_blocks_behind_the_last_never_run(deep_teacher: Path, lora: bool) -> None:
    plain, ran = run_roles(deep_teacher, lora, checkpointing=False)
    assert ran == [1, 1, 1, 0]
    again, ran = run_roles(deep_teacher, lora, checkpointing=True)
    assert ran == [2, 2, 2, 0]
    for expected, actual in zip(plain, again, strict=True):
        assert expected.any()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_two_ranks_see_what_one_does(deep_teacher: Path, lora: bool) -> None:
    *alone, reached_alone = run_roles(deep_teacher, lora, True)[0]
    found = [values for values, _ in on_ranks(2, run_roles, deep_teacher, lora, True)]
    for place, expected in enumerate(alone):
        # The mean over a rank's own samples, so that gradients are those of half as many.
        scale = 2 if place == len(BLOCKS) else 1
        actual = torch.cat([values[place] for values in found])
        torch.testing.assert_close(actual, scale * expected, rtol=1e-4, atol=1e-6)
    for values in found:
        torch.testing.assert_close(values[-1], reached_alone, rtol=1e-4, atol=1e-6)


def test_a_feature_does_not_depend_on_how_many_are_tapped(deep_teacher: Path) -> None:
    model = VelocityModel(load_transformer(str(deep_teacher)))
    inputs = model_inputs(text_dim=6)
    with torch.no_grad():
        (alone,) = block_outputs(model, *inputs, [1])
        _, among, _ = block_outputs(model, *inputs, [0, 1, 3])
    assert torch.equal(alone, among)


def test_the_time_is_not_rounded_where_a_model_in_bfloat16_is_asked_in_float32(deep_teacher: Path) -> None:
    """diffusers casts it to its embedder's weights' type, whatever is asked for."""
    model = VelocityModel(load_transformer(str(deep_teacher), dtype=torch.bfloat16), dtype=torch.bfloat16)
    seen: list[torch.dtype] = []
    embedder = model.module.condition_embedder.time_embedder
    embedder.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0].dtype, output.dtype)))
    block_outputs(model, *model_inputs(text_dim=6), [0], dtype=torch.float32)
    assert seen == [torch.float32] * 2


def test_blocks_that_are_not_there_are_refused(deep_teacher: Path) -> None:
    model = VelocityModel(load_transformer(str(deep_teacher)))
    for blocks in ([], [2, 1], [1, 1], [-1], [4]):
        with pytest.raises(ValueError, match="blocks must rise within 0 to 3, the blocks of this transformer, got"):
            block_outputs(model, *model_inputs(text_dim=6), blocks)


def test_the_default_is_half_way_three_quarters_and_the_last() -> None:
    assert tapped_by_default(30) == (15, 22, 29)
    assert tapped_by_default(6) == (3, 4, 5)
    assert tapped_by_default(1) == (0,)
