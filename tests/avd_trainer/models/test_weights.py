"""One small model in every layout, and what goes wrong with files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from avd_trainer.models.weight_names import diffusers_names, original_names
from avd_trainer.models.weights import TransformerWeights, load_into, open_weights
from avd_trainer.runtime.errors import UserError
from launches import in_group
from tensors import assert_same_state, state_of

# Every figure differs from the others, so that none can be taken for another.
SIZE = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_dim": 40,
    "num_layers": 3,
    "freq_dim": 16,
    "text_dim": 10,
    "in_channels": 16,
    "out_channels": 8,
}
SHARD = "diffusion_pytorch_model-0000{}-of-00002.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
WHOLE = "diffusion_pytorch_model.safetensors"
MEBI = 2**20


@pytest.fixture(scope="module")
def model() -> WanTransformer3DModel:
    torch.manual_seed(3)
    return make()


def make(**changes: Any) -> WanTransformer3DModel:
    return WanTransformer3DModel(**(SIZE | changes)).eval()


def original_name(name: str) -> str:
    """Wan2.1's name of a parameter of diffusers, by the modules of either: the inverse of what is tested."""
    first = {
        "patch_embedding": "patch_embedding",
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "proj_out": "head.head",
        "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
        "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
        "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
        "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    }
    module, _, kind = name.rpartition(".")
    if module in first:
        return f"{first[module]}.{kind}"
    if name == "scale_shift_table":
        return "head.modulation"
    _, number, *rest = name.split(".")
    inner = ".".join(rest)
    if inner == "scale_shift_table":
        return f"blocks.{number}.modulation"
    if rest[0].startswith("attn"):
        attention = {"attn1": "self_attn", "attn2": "cross_attn"}[rest[0]]
        layer = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "o"} | {
            "add_k_proj": "k_img", "add_v_proj": "v_img", "norm_added_k": "norm_k_img",
        }  # fmt: skip
        layer = layer.get(rest[1], rest[1])
        return f"blocks.{number}.{attention}.{layer}.{kind}"
    # The norm of cross attention is Wan2.1's third and diffusers' second.
    layer = {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "norm2": "norm3"}[".".join(rest[:-1])]
    return f"blocks.{number}.{layer}.{kind}"


def original_state(model: nn.Module) -> dict[str, Tensor]:
    return {original_name(name): value for name, value in model.state_dict().items()}


def original_config() -> dict[str, Any]:
    """The keys of Wan-AI/Wan2.1-T2V-1.3B's config.json; it says nothing of text_dim and patch_size."""
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": 24,
        "eps": 1e-06,
        "ffn_dim": 40,
        "freq_dim": 16,
        "in_dim": 16,
        "model_type": "t2v",
        "num_heads": 2,
        "num_layers": 3,
        "out_dim": 8,
        "text_len": 512,
    }


def save_sharded(state: dict[str, Tensor], folder: Path) -> None:
    names = sorted(state)
    halves = {SHARD.format(1): names[::2], SHARD.format(2): names[1::2]}
    for file, part in halves.items():
        save_file({name: state[name].contiguous() for name in part}, folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# --- One writer for each layout: saves a model in a folder and says what to open.


def diffusers_folder(model: WanTransformer3DModel, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def pipeline_folder(model: WanTransformer3DModel, folder: Path) -> str:
    model.save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text("{}")
    return str(folder)


def sharded_diffusers_folder(model: WanTransformer3DModel, folder: Path) -> str:
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / INDEX).is_file()
    return str(folder)


def original_folder(model: WanTransformer3DModel, folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps(original_config()))
    save_file(original_state(model), folder / WHOLE)
    return str(folder)


def sharded_original_folder(model: WanTransformer3DModel, folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps(original_config()))
    save_sharded(original_state(model), folder)
    return str(folder)


def diffusers_file(model: WanTransformer3DModel, folder: Path) -> str:
    save_file(model.state_dict(), folder / "student.safetensors")
    return str(folder / "student.safetensors")


def original_file(model: WanTransformer3DModel, folder: Path) -> str:
    save_file(
        {f"model.diffusion_model.{name}": v for name, v in original_state(model).items()}, folder / "a.safetensors"
    )
    return str(folder / "a.safetensors")


def student_file(model: WanTransformer3DModel, folder: Path) -> str:
    """As the released AVD code and CausVid save it."""
    state = {f"model.{name}": value for name, value in original_state(model).items()}
    torch.save({"generator": state, "critic": {name: v + 1 for name, v in state.items()}}, folder / "model.pt")
    return str(folder / "model.pt")


def wrapped_student_file(model: WanTransformer3DModel, folder: Path) -> str:
    """FSDP, activation checkpointing and torch.compile all left their prefixes."""
    state = {
        "module._fsdp_wrapped_module.model."
        + name.replace("ffn.", "_orig_mod._fsdp_wrapped_module._checkpoint_wrapped_module.ffn."): value
        for name, value in original_state(model).items()
    }
    torch.save({"generator": state}, folder / "model.pth")
    return str(folder / "model.pth")


def bare_student_file(model: WanTransformer3DModel, folder: Path) -> str:
    torch.save(original_state(model), folder / "model.pt")
    return str(folder / "model.pt")


FOLDERS = [diffusers_folder, pipeline_folder, sharded_diffusers_folder, original_folder, sharded_original_folder]
FILES = [diffusers_file, original_file, student_file, wrapped_student_file, bare_student_file]


@pytest.mark.parametrize("changes", [{}, {"in_channels": 36, "image_dim": 14, "added_kv_proj_dim": 24}])
def test_wans_own_names_and_back(changes: dict[str, Any]) -> None:
    names = [name for name, _ in make(**changes).named_parameters()]
    found = original_names(names)
    assert found == {name: original_name(name) for name in names}
    assert diffusers_names(found.values(), "a model") == {name: found[name] for name in names}


@pytest.mark.parametrize("write", FOLDERS + FILES)
def test_every_layout_gives_the_same_model(
    write: Callable[[WanTransformer3DModel, Path], str], model: WanTransformer3DModel, tmp_path: Path
) -> None:
    given = dict(model.config) if write in FILES else None
    with open_weights(write(model, tmp_path), config=given) as weights:
        assert weights.names() == sorted(model.state_dict())
        for name, value in model.state_dict().items():
            assert weights.shape(name) == tuple(value.shape)
            assert weights.dtype(name) == value.dtype
        assert not [key for key in weights.config if key.startswith("_")]
        loaded = WanTransformer3DModel(**weights.config).eval()
        load_into(loaded, weights)
    assert_same_state(loaded.state_dict(), model.state_dict())
    inputs = torch.randn(1, 16, 2, 4, 6), torch.tensor([500]), torch.randn(1, 5, 10)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs).sample, model(*inputs).sample)


def test_the_bundled_teacher_opens() -> None:
    with open_weights("bundled:tiny") as weights:
        loaded = WanTransformer3DModel.from_config(weights.config)
        load_into(loaded, weights)
        assert torch.equal(loaded.proj_out.weight, weights.read("proj_out.weight"))


def test_the_original_names_are_those_of_the_release() -> None:
    """Names seen in Wan-AI/Wan2.1-T2V-1.3B, so that the tests' own inverse is held to something."""
    released = {
        "patch_embedding.weight": "patch_embedding.weight",
        "text_embedding.2.bias": "condition_embedder.text_embedder.linear_2.bias",
        "time_projection.1.weight": "condition_embedder.time_proj.weight",
        "blocks.29.self_attn.norm_q.weight": "blocks.29.attn1.norm_q.weight",
        "blocks.29.cross_attn.o.bias": "blocks.29.attn2.to_out.0.bias",
        "blocks.29.norm3.weight": "blocks.29.norm2.weight",
        "blocks.29.ffn.0.weight": "blocks.29.ffn.net.0.proj.weight",
        "blocks.29.modulation": "blocks.29.scale_shift_table",
        "head.modulation": "scale_shift_table",
        "head.head.weight": "proj_out.weight",
        # Of Wan-AI/Wan2.1-I2V-14B-480P.
        "img_emb.proj.0.weight": "condition_embedder.image_embedder.norm1.weight",
        "img_emb.proj.1.bias": "condition_embedder.image_embedder.ff.net.0.proj.bias",
        "img_emb.proj.3.weight": "condition_embedder.image_embedder.ff.net.2.weight",
        "img_emb.proj.4.bias": "condition_embedder.image_embedder.norm2.bias",
        "blocks.39.cross_attn.k_img.weight": "blocks.39.attn2.add_k_proj.weight",
        "blocks.39.cross_attn.v_img.bias": "blocks.39.attn2.add_v_proj.bias",
        "blocks.39.cross_attn.norm_k_img.weight": "blocks.39.attn2.norm_added_k.weight",
    }
    assert diffusers_names(released, "here") == {new: old for old, new in released.items()}


# --- Which part, which configuration


def test_averaged_weights_come_first_and_any_part_can_be_chosen(model: WanTransformer3DModel, tmp_path: Path) -> None:
    state = {f"model.{name}": value for name, value in original_state(model).items()}
    parts = {"generator": 1, "critic": 2, "generator_ema": 3}
    path = tmp_path / "model.pt"
    torch.save({part: {name: v + add for name, v in state.items()} for part, add in parts.items()}, path)
    expected = model.proj_out.weight.detach()
    for source, add in {"": 3, "#generator": 1, "#generator_ema": 3, "#critic": 2}.items():
        with open_weights(f"{path}{source}", config=model.config) as weights:
            assert torch.equal(weights.read("proj_out.weight"), expected + add)
    with pytest.raises(UserError, match=r"model\.pt has no part 'ema'; it has generator, critic, generator_ema"):
        open_weights(f"{path}#ema")


def test_a_file_alone_gives_its_configuration_by_shapes(tmp_path: Path) -> None:
    """Heads are 128 wide, as in every released Wan model."""
    shapes = {"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 1}
    wide = make(**shapes)
    with open_weights(student_file(wide, tmp_path)) as weights:
        assert weights.config == {key: wide.config[key] for key in weights.config}
        assert set(SIZE) <= set(weights.config)
        load_into(WanTransformer3DModel(**weights.config), weights)


@pytest.mark.parametrize("width", [24, 160])
def test_a_width_that_is_no_multiple_of_128_asks_for_the_configuration(width: int, tmp_path: Path) -> None:
    student = make(attention_head_dim=width // 2, num_layers=1)
    with pytest.raises(UserError, match=rf"a width of {width} does not divide into heads of 128.* Pass the configurat"):
        open_weights(student_file(student, tmp_path))


# --- Reading


@pytest.fixture(params=[diffusers_folder, student_file])
def opened(request: Any, model: WanTransformer3DModel, tmp_path: Path) -> Iterator[TransformerWeights]:
    with open_weights(request.param(model, tmp_path), config=model.config) as weights:
        yield weights


def test_a_part_is_a_copy_of_that_part(opened: TransformerWeights, model: WanTransformer3DModel) -> None:
    name = "blocks.1.ffn.net.0.proj.weight"
    whole = model.get_parameter(name).detach()
    for slices in [(slice(10, 20),), (slice(0, 40), slice(3, 5)), (slice(7, 7),), ()]:
        part = opened.read(name, slices)
        assert torch.equal(part, whole[slices])
        assert part.is_contiguous()
        assert part.untyped_storage().nbytes() == part.nbytes
        part.fill_(7)  # the file and the next reader do not see it
    assert torch.equal(opened.read(name), whole)


def test_a_digest_is_of_names_values_and_configuration(model: WanTransformer3DModel, tmp_path: Path) -> None:
    def digest(name: str, **changes: int) -> str:
        model.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | changes))
        with open_weights(str(tmp_path / name)) as weights:
            return weights.digest()

    one = digest("one")
    assert digest("copy") == one
    assert digest("configuration", freq_dim=2 * model.config.freq_dim) != one
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1.0
    assert digest("weight") != one


def test_nothing_is_read_after_closing(opened: TransformerWeights) -> None:
    opened.close()
    with pytest.raises(KeyError):
        opened.read("proj_out.weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_keep_their_type_and_identity(
    opened: TransformerWeights, model: WanTransformer3DModel, dtype: torch.dtype
) -> None:
    other = make().to(dtype)
    before = dict(other.named_parameters())
    load_into(other, opened)
    for name, parameter in other.named_parameters():
        assert parameter is before[name]
        assert parameter.requires_grad
        assert torch.equal(parameter, model.get_parameter(name).to(dtype))


def test_adapters_are_left_alone_and_their_base_is_filled(
    opened: TransformerWeights, model: WanTransformer3DModel
) -> None:
    peft = pytest.importorskip("peft")
    other = make()
    other.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "proj_out"], init_lora_weights=False))
    before = {name: value for name, value in state_of(other).items() if "lora_" in name}
    assert len(before) == 2 * (6 + 1)
    load_into(other, opened)
    after = other.state_dict()
    assert_same_state({name: after[name] for name in before}, before)
    assert torch.equal(after["blocks.2.attn1.to_q.base_layer.weight"], model.blocks[2].attn1.to_q.weight)
    assert torch.equal(after["blocks.0.norm2.weight"], model.blocks[0].norm2.weight)


def test_parameters_without_memory_are_refused(opened: TransformerWeights) -> None:
    with torch.device("meta"):
        other = make()
    with pytest.raises(ValueError, match="to_empty"):
        load_into(other, opened)


# --- Ranks


def sharded_load(rank: int, source: str, big: list[str]) -> dict[str, Any]:
    """Load onto FSDP2 shards; report the whole model, what this rank read, and the memory that two large files took."""
    peaks = {}
    for path in big:
        before = peak_memory()
        with open_weights(path, config=SIZE) as weights:
            piece = weights.read("blocks.0.attn1.to_q.weight", (slice(rank, rank + 256),))
        peaks[path] = peak_memory() - before
        assert piece.shape == (256, 8192)

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with torch.device("meta"):
        model = make()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    numbers: dict[str, int] = {}
    with open_weights(source) as weights:
        read = weights.read

        def counted(name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
            part = read(name, slices)
            numbers[name] = numbers.get(name, 0) + part.numel()
            return part

        weights.read = counted
        load_into(model, weights)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    own = {name: parameter.to_local().numel() for name, parameter in model.named_parameters()}
    assert {name: count for name, count in own.items() if count} == numbers
    state = {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}
    return {"state": state, "read": sum(numbers.values()), "peaks": peaks}


def peak_memory() -> int:
    """Bytes of this process in memory at most so far, mapped files included; 0 where the system does not say.

    Not ``getrusage``: its peak begins with that of the parent process.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def test_each_rank_reads_its_shard_and_together_they_have_the_model(
    model: WanTransformer3DModel, tmp_path: Path
) -> None:
    tensor = torch.zeros(4096, 8192)  # 128 MiB
    torch.save({"generator": {"model.blocks.0.self_attn.q.weight": tensor}}, tmp_path / "big.pt")
    save_file({"blocks.0.attn1.to_q.weight": tensor}, tmp_path / "big.safetensors")
    (tmp_path / "small").mkdir()
    source = original_folder(model, tmp_path / "small")
    big = [str(tmp_path / "big.pt"), str(tmp_path / "big.safetensors")]

    results = in_group(2, sharded_load, source, big)

    expected = dict(model.named_parameters())
    total = sum(parameter.numel() for parameter in expected.values())
    assert sum(result["read"] for result in results) == total
    for result in results:
        assert_same_state(result["state"], {name: p.detach() for name, p in expected.items()})
        # Dimensions of one leave a rank without a part: (1, 6, 24) and (1, 2, 24) are rank 0's whole.
        assert result["read"] < 0.6 * total
        # A piece of 8 MiB of 128 MiB.
        assert max(result["peaks"].values()) < 48 * MEBI, result["peaks"]


# --- What goes wrong


def test_a_model_of_another_size_is_named_as_such(opened: TransformerWeights) -> None:
    for changes in ({"ffn_dim": 44}, {"num_layers": 2}, {"num_layers": 5}):
        other = make(**changes)
        before = state_of(other)
        with pytest.raises(UserError, match=r"does not fit the model: blocks.* model of another size"):
            load_into(other, opened)
        assert_same_state(state_of(other), before)
    with pytest.raises(
        UserError, match=r"ffn\.net\.0\.proj\.weight is \[40, 24\], the model's \[44, 24\].* and 6 more"
    ):
        load_into(make(ffn_dim=44), opened)


def test_another_kind_of_model_is_named_as_such(model: WanTransformer3DModel, tmp_path: Path) -> None:
    state = model.state_dict() | {"vace_blocks.0.proj_out.weight": torch.zeros(2)}
    save_file(state, tmp_path / "vace.safetensors")
    with (
        open_weights(str(tmp_path / "vace.safetensors"), config=model.config) as weights,
        pytest.raises(UserError, match=r"vace_blocks\.0\.proj_out\.weight is not in the model\. It is another kind"),
    ):
        load_into(make(), weights)


@pytest.mark.parametrize("write", [diffusers_folder, original_folder, student_file])
def test_every_layout_gives_the_same_model_of_image_to_video(
    write: Callable[[WanTransformer3DModel, Path], str], tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model = make(in_channels=20, image_dim=14, added_kv_proj_dim=24)
    with open_weights(write(model, tmp_path), config=dict(model.config)) as weights:
        assert {key: weights.config[key] for key in ("in_channels", "image_dim", "added_kv_proj_dim")} == {
            "in_channels": 20, "image_dim": 14, "added_kv_proj_dim": 24,
        }  # fmt: skip
        loaded = WanTransformer3DModel(**weights.config).eval()
        load_into(loaded, weights)
    assert_same_state(loaded.state_dict(), model.state_dict())


class Code:
    """What a pickle can hold beside tensors."""


def truncate(path: Path) -> str:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return str(path)


def truncated_student(model: WanTransformer3DModel, folder: Path) -> tuple[str, str]:
    return truncate(Path(student_file(model, folder))), r"model\.pt cannot be read.*damaged"


def truncated_safetensors(model: WanTransformer3DModel, folder: Path) -> tuple[str, str]:
    diffusers_folder(model, folder)
    truncate(folder / WHOLE)
    return str(folder), rf"{WHOLE} cannot be read.*only a part of one"


def truncated_shard(model: WanTransformer3DModel, folder: Path) -> tuple[str, str]:
    sharded_original_folder(model, folder)
    truncate(folder / SHARD.format(2))
    return str(folder), SHARD.format(2) + " cannot be read"


def missing_shard(model: WanTransformer3DModel, folder: Path) -> tuple[str, str]:
    sharded_original_folder(model, folder)
    (folder / SHARD.format(2)).unlink()
    return str(folder), rf"lists 2 files, of which {SHARD.format(2)} is missing"


def missing_weights(model: WanTransformer3DModel, folder: Path) -> tuple[str, str]:
    diffusers_folder(model, folder)
    (folder / WHOLE).unlink()
    return str(folder), rf"holds neither {WHOLE} nor {INDEX}"


def damaged_config(model: WanTransformer3DModel, folder: Path) -> tuple[str, str]:
    diffusers_folder(model, folder)
    truncate(folder / "config.json")
    return str(folder), r"config\.json cannot be read"


def damaged_index(model: WanTransformer3DModel, folder: Path) -> tuple[str, str]:
    sharded_original_folder(model, folder)
    (folder / INDEX).write_text("[]")
    return str(folder), rf"{INDEX} holds a list, expected an object"


def another_class(model: WanTransformer3DModel, folder: Path) -> tuple[str, str]:
    (folder / "config.json").write_text('{"_class_name": "CogVideoXTransformer3DModel"}')
    return str(folder), r"describes 'CogVideoXTransformer3DModel', expected"


def empty_folder(model: WanTransformer3DModel, folder: Path) -> tuple[str, str]:
    return str(folder), r"holds neither config\.json nor transformer/config\.json"


def code_in_a_pickle(model: WanTransformer3DModel, folder: Path) -> tuple[str, str]:
    torch.save({"generator": original_state(model), "trainer": Code()}, folder / "model.pt")
    return str(folder / "model.pt"), "holds more than tensors, so loading it could run code"


def pointer_of_git_lfs(model: WanTransformer3DModel, folder: Path) -> tuple[str, str]:
    (folder / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    return str(folder / "a.safetensors"), "It is no safetensors file"


def no_generator(model: WanTransformer3DModel, folder: Path) -> tuple[str, str]:
    torch.save({"step": 3, "optimizer": {}}, folder / "model.pt")
    return str(folder / "model.pt"), "expected a dictionary of tensors.* got step, optimizer"


def another_model(model: WanTransformer3DModel, folder: Path) -> tuple[str, str]:
    torch.save({"generator": {"conv.weight": torch.zeros(2)}}, folder / "model.pt")
    return str(folder / "model.pt"), r"holds no Wan transformer: .* got conv\.weight"


def half_a_model(model: WanTransformer3DModel, folder: Path) -> tuple[str, str]:
    state = {name: value for name, value in original_state(model).items() if name.startswith("blocks.")}
    torch.save({"generator": state}, folder / "model.pt")
    return str(folder / "model.pt"), r"is not a whole Wan transformer: 'patch_embedding\.weight' is missing"


def missing_file(model: WanTransformer3DModel, folder: Path) -> tuple[str, str]:
    return str(folder / "none.pt"), r"none\.pt: there is no such file or folder\. Pass"


def missing_bundle(model: WanTransformer3DModel, folder: Path) -> tuple[str, str]:
    return "bundled:huge", "huge-teacher: there is no such file or folder"


BROKEN = [
    truncated_student,
    truncated_safetensors,
    truncated_shard,
    missing_shard,
    missing_weights,
    damaged_config,
    damaged_index,
    another_class,
    empty_folder,
    code_in_a_pickle,
    pointer_of_git_lfs,
    no_generator,
    another_model,
    half_a_model,
    missing_file,
    missing_bundle,
]


@pytest.mark.parametrize("write", BROKEN)
def test_what_cannot_be_opened_is_named_with_its_file(
    write: Callable[[WanTransformer3DModel, Path], tuple[str, str]], model: WanTransformer3DModel, tmp_path: Path
) -> None:
    source, message = write(model, tmp_path)
    with pytest.raises(UserError, match=message):
        open_weights(source)


# --- The hub


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub's downloads, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_name_on_the_hub_is_read_from_its_cache(model: WanTransformer3DModel, offline_cache: Path) -> None:
    commit = "0123456789012345678901234567890123456789"
    repository = offline_cache / "models--someone--Wan-1.3B"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    pipeline_folder(model, repository / "snapshots" / commit)
    with open_weights("someone/Wan-1.3B") as weights:
        assert torch.equal(weights.read("proj_out.weight"), model.proj_out.weight)


def test_a_name_that_cannot_be_downloaded_comes_with_the_remedy(offline_cache: Path) -> None:
    with pytest.raises(UserError, match=r"someone/Wan-1\.3B.*run 'hf download someone/Wan-1\.3B --local-dir FOLDER'"):
        open_weights("someone/Wan-1.3B")


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["config.json", INDEX, SHARD.format(1), WHOLE, "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"], 4),
        (
            [f"transformer/{name}" for name in ("config.json", INDEX, SHARD.format(1))]
            + ["text_encoder/config.json", "text_encoder/model-00001-of-00005.safetensors", f"vae/{WHOLE}"],
            3,
        ),
    ],
)
def test_only_the_transformer_is_downloaded(
    files: list[str], wanted: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.extend(filter_repo_objects(files, allow_patterns=allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError):
        open_weights("someone/model")
    assert asked == files[:wanted]
