"""A student in the files of other programs, as far as they are not asked: tests/hosts/test_programs.py asks them."""

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import tiny_pipeline
from avd_trainer.commands.app import app
from avd_trainer.data.in_memory import CaptionedLatents
from avd_trainer.data.video_sets import look_at, read_clip
from avd_trainer.inference.generation import sample_clips
from avd_trainer.inference.students import open_student, open_student_or_run, open_students
from avd_trainer.methods.dmd import DMDMethodConfig
from avd_trainer.models.adapters import Adapters, merge_adapters, read_adapters
from avd_trainer.models.text_encoders.hashed import HashTextEmbedding
from avd_trainer.models.transformer import VelocityModel
from avd_trainer.models.weights import open_weights
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import join_ranks
from avd_trainer.training import model_card
from avd_trainer.training.export import open_run
from avd_trainer.training.pipeline_export import export_pipeline
from avd_trainer.training.program_export import ProgramName, export_for_program
from avd_trainer.training.program_usage import Written, comfyui_usage, diffusers_usage
from avd_trainer.training.run import train
from prepare import HOSTS
from runs import LATENT_SHAPE, both, exported, in_memory, model_inputs, tiny_config

TEXT_DIM = 4096
SIZE = {"text_dim": TEXT_DIM, "layers": 1, "heads": 1, "head_dim": 128, "freq_dim": 256}
LORA = {"rank": 2, "alpha": 6.0, "target_modules": ["to_q", "to_out.0", "ffn.net.2"]}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan pipeline with those of Wan2.1's sizes that programs do not read."""
    return tiny_pipeline.build(tmp_path_factory.mktemp("wan") / "Tiny-Wan", **SIZE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, wan: Path) -> Path:
    """``full`` and ``lora``, of one step each, in Wan's latents."""
    folder = tmp_path_factory.mktemp("runs")
    latents = torch.randn(2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(1))
    data = both(in_memory(CaptionedLatents(latents, ["one", "two"]), HashTextEmbedding(4, TEXT_DIM)))
    for name, lora in (("full", None), ("lora", LORA)):
        trained = {"optimizer": {"lr": 0.05}, **({} if lora is None else {"lora": lora})}
        config = tiny_config(
            wan,
            method={"student": trained, "online": trained, "online_updates": 1},
            data={"kind": "shards", "path": str(folder / "my-clips")},
            max_steps=2,
            logging={"tensorboard": False},
        )
        with join_ranks() as ranks:
            train(config, folder / name, ranks, data=data)
    return folder


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def command(*arguments: object) -> tuple[int, str]:
    """Exit status and everything that was printed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


@torch.no_grad()
def velocity(model: VelocityModel) -> Tensor:
    found: Tensor = model(*model_inputs(TEXT_DIM))
    return found


FILES = {
    "comfyui": ["README.md", "export.json", "out.safetensors"],
    "lightx2v": ["README.md", "export.json", "lightx2v.json", "out.safetensors"],
    "wan": ["README.md", "config.json", "diffusion_pytorch_model.safetensors", "export.json"],
}


@pytest.mark.parametrize("program", FILES)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_whole_model_has_the_students_weights_in_wans_names(
    runs: Path, tmp_path: Path, program: ProgramName, kind: str
) -> None:
    export_for_program(runs / kind, tmp_path / "out", program, merge=True)
    assert sorted(os.listdir(tmp_path / "out")) == FILES[program]
    (file,) = (tmp_path / "out").rglob("*.safetensors")
    tensors = load_file(file)
    before = "model." if program == "lightx2v" else ""  # its code of Self-Forcing takes six characters off each name
    names = ("blocks.0.self_attn.q.weight", "blocks.0.norm3.weight", "blocks.0.modulation", "head.head.bias")
    assert {f"{before}{name}" for name in names} <= tensors.keys()
    assert all(name.startswith(before) for name in tensors)
    export_pipeline(runs / kind, tmp_path / "pipeline")
    expected = exported(tmp_path / "pipeline" / "transformer")
    with open_weights(str(file)) as weights:
        assert weights.names() == sorted(expected)
        assert all(torch.equal(weights.read(name), value) for name, value in expected.items())


def test_types_weights_and_steps_are_chosen_as_for_a_pipeline(runs: Path, tmp_path: Path) -> None:
    for name in ("ema", "student"):
        status, printed = command(
            "export", runs / "full", "--output", tmp_path / name, "--format", "comfyui", "--weights", name, "--dtype",
            "bfloat16",
        )  # fmt: skip
        assert status == 0, printed
    ema, student = (load_file(tmp_path / name / f"{name}.safetensors") for name in ("ema", "student"))
    assert {tensor.dtype for tensor in ema.values()} == {torch.bfloat16}
    assert not torch.equal(ema["blocks.0.ffn.0.weight"], student["blocks.0.ffn.0.weight"])
    with pytest.raises(UserError, match=r"has no checkpoint of step 7; there are \[2\]"):
        export_for_program(runs / "full", tmp_path / "out", "wan", step=7)


@pytest.mark.parametrize("program", ["comfyui", "lightx2v"])
def test_adapters_have_their_scale_in_them_and_load_in_diffusers_too(
    runs: Path, wan: Path, tmp_path: Path, program: ProgramName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DMDMethodConfig, "sampled_by", "ode")  # as LightX2V wants it of adapters
    export_for_program(runs / "lora", tmp_path / "out", program)
    file = tmp_path / "out" / "out-lora.safetensors"
    tensors = load_file(file)
    assert len(tensors) == 2 * 5
    assert {name.removeprefix("diffusion_model.blocks.0.") for name in tensors} >= {
        "self_attn.q.lora_A.weight", "cross_attn.o.lora_B.weight", "ffn.2.lora_A.weight"
    }  # fmt: skip
    export_pipeline(runs / "lora", tmp_path / "pipeline")
    expected = velocity(VelocityModel(WanTransformer3DModel.from_pretrained(tmp_path / "pipeline" / "transformer")))
    pipeline = WanPipeline.from_pretrained(wan, vae=None, text_encoder=None, tokenizer=None)
    base = VelocityModel(pipeline.transformer)
    before = velocity(base)
    merged = WanTransformer3DModel.from_pretrained(wan / "transformer")
    merge_adapters(merged, read_adapters(file))
    torch.testing.assert_close(velocity(VelocityModel(merged)), expected, rtol=0, atol=1e-5)
    pipeline.load_lora_weights(tmp_path / "out", weight_name=file.name)
    torch.testing.assert_close(velocity(base), expected, rtol=0, atol=1e-5)
    assert (expected - before).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("kind", "program"), [("full", "comfyui"), ("full", "lightx2v"), ("full", "wan"), ("lora", "comfyui")]
)
def test_clips_of_any_format_are_those_of_the_pipeline(
    runs: Path, tmp_path: Path, kind: str, program: ProgramName
) -> None:
    export_pipeline(runs / kind, tmp_path / "pipeline")
    export_for_program(runs / kind, tmp_path / "out", program)

    def sample(folder: Path) -> tuple[Any, Tensor]:
        student = open_student(folder)
        ((made,),) = sample_clips(student, ["a red circle"], [(1,) * 4], LATENT_SHAPE, device=CPU, dtype=torch.float32)
        return student, made.latents

    (student, found), (other, expected) = sample(tmp_path / "out"), sample(tmp_path / "pipeline")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (student.adapters is not None) is (kind == "lora")
    assert student[4:8] == other[4:8]  # timesteps, latent space, size and frame rate
    assert student.interpolator is None


def test_avd_sample_takes_what_is_missing_from_another_pipeline(runs: Path, wan: Path, tmp_path: Path) -> None:
    export_for_program(runs / "lora", tmp_path / "out", "comfyui")
    about = read_json(tmp_path / "out" / "export.json")
    assert (about["base"], about["pipelines"]) == (str(wan), [str(wan)])
    about["base"] = about["pipelines"] = [str(tmp_path / "gone")]
    (tmp_path / "out" / "export.json").write_text(json.dumps({**about, "base": str(tmp_path / "gone")}))
    clip = tmp_path / "clip.mp4"
    sample = ["sample", tmp_path / "out", "--prompt", "a", "--output", clip, "--size", "32x32x5"]
    status, printed = command(*sample)
    assert status == 2
    assert "gone: there is no such file or folder" in printed
    status, printed = command(*sample, "--pipeline", wan)
    assert status == 0, printed
    assert clip.exists()
    transformer = wan / "transformer"
    status, printed = command(*sample, "--pipeline", transformer)
    assert status == 2
    assert f"vae, text_encoder, tokenizer are not all in {transformer}. Pass --pipeline SOURCE" in printed
    status, printed = command("sample", wan, "--prompt", "a", "--output", clip, "--pipeline", wan)
    assert status == 2
    export_pipeline(runs / "lora", tmp_path / "pipeline")
    status, printed = command("sample", tmp_path / "pipeline", *sample[2:], "--pipeline", wan)
    assert status == 2
    assert "is a whole pipeline. Leave --pipeline out" in printed


def test_students_of_another_program_are_compared_and_evaluated_where_their_pipeline_has_moved(
    runs: Path, wan: Path, tmp_path: Path
) -> None:
    moved, whole = tmp_path / "moved", tmp_path / "whole"
    export_for_program(runs / "lora", moved, "comfyui")
    export_pipeline(runs / "lora", whole)
    (about,) = moved.rglob("export.json")
    gone = str(tmp_path / "gone")
    about.write_text(json.dumps({**read_json(about), "base": gone, "pipelines": [gone]}))
    clip, small = tmp_path / "clip.mp4", ["--prompt", "a", "--size", "32x32x5"]
    asked = ["compare", moved, whole, *small, "--output", clip]
    status, printed = command(*asked)
    assert (status, "gone: there is no such file or folder" in printed) == (2, True), printed
    status, printed = command(*asked, "--pipeline", wan)
    assert status == 0, printed
    one, other = (part[:, :, -256:] for part in read_clip(look_at(clip), look_at(clip).form).chunk(2, dim=3))
    assert (one - other).abs().mean() < 0.02  # one noise, one student
    # Of one frame nothing is measured, which is said once the students are opened.
    evaluate = ["evaluate", moved, whole, "--prompt", "a", "--size", "32x32x1", "--output", tmp_path / "out"]
    assert "gone: there is no such file or folder" in command(*evaluate)[1]
    pytest.importorskip("cv2", reason="videos are measured with the extra prepare")
    assert "All clips can be brought to 32x32x1" in command(*evaluate, "--pipeline", wan)[1]
    # Those that have their own need none.
    with pytest.raises(UserError, match=r"for students in another program's files, and here are none\. Leave"):
        open_students([whole, runs / "full"], "a/b")
    with pytest.raises(UserError, match=r"is a run, which names its own\. Leave --pipeline out, or export"):
        open_student_or_run(runs / "full", "a/b")


def card(folder: Path) -> tuple[dict[str, Any], str]:
    """Metadata and text."""
    _, metadata, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_a_model_card_says_what_a_person_and_the_hub_have_to_know(runs: Path, wan: Path, tmp_path: Path) -> None:
    export_for_program(runs / "full", tmp_path / "my-student", "comfyui")
    metadata, text = card(tmp_path / "my-student")
    assert metadata == {
        "license": "other", "license_name": "to-be-stated", "pipeline_tag": "text-to-video",
        "tags": ["distillation", "few-step", "avd"],
    }  # fmt: skip
    for expected in (
        "\n# my-student\n",
        "A student of `Tiny-Wan` that makes a clip in 4 steps, distilled by `avd` (You et al., CVPR 2026)",
        "| few steps | 4, at timesteps 1000, 900, 757, 522 of 1000 |",
        "| guidance | none: scale 1",
        "| clips | 32 x 32 pixels, 9 frames, 16 frames per second |",
        "| weights | averaged weights after step 2 of 2 |",
        "Copy `my-student.safetensors` to `ComfyUI/models/diffusion_models/`",
        "`ManualSigmas`\n   `1, 0.9, 0.757, 0.522, 0`",
        "`shift` 3.2 behind the model, then `steps` 4",
        "off by up to 6 of 1000",
        "*Empty HunyuanVideo 1.0 Latent* (`EmptyHunyuanLatentVideo`) of 32 x 32, length 9",
        "*CLIP Text Encode (Prompt)* (`CLIPTextEncode`)",
        "5. *VAE Decode* (`VAEDecode`)",
        "few_steps:\n  - 1000.0",
        "the teacher, `Tiny-Wan`, and the data, `my-clips`.",
    ):
        assert expected in text
    assert str(runs) not in text
    assert str(wan.parent) not in text
    assert "noise of full strength" not in text


def test_cards_of_the_other_formats(runs: Path, tmp_path: Path) -> None:
    export_for_program(runs / "full", tmp_path / "out", "wan")
    assert "timesteps = [1000, 900, 757, 522, 0]" in card(tmp_path / "out")[1]
    export_pipeline(runs / "full", tmp_path / "out")
    metadata, text = card(tmp_path / "out")
    assert metadata["library_name"] == "diffusers"
    assert "height=32, width=32, num_frames=9, num_inference_steps=4, guidance_scale=1.0" in text


def test_lightx2v_follows_the_velocity_with_its_code_of_distilled_models(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DMDMethodConfig, "sampled_by", "ode")
    export_for_program(runs / "lora", tmp_path / "out", "lightx2v", weights="student")
    metadata, text = card(tmp_path / "out")
    assert metadata["tags"][-1] == "lora"
    assert "| LoRA | rank 2, alpha 6 |" in text
    assert "| weights | last weights after step 2 of 2 |" in text
    assert "Run the command inside this folder" in text
    assert "in PYTHONPATH: `lightx2v.json` names `out-lora.safetensors` without a path" in text
    assert "--model_cls wan2.1_distill --task t2v" in text
    assert "--save_result_path clip.mp4" in text
    assert f"LightX2V's commit `{HOSTS['LightX2V']['commit'][:7]}`" in text
    assert "one chunk" not in text
    assert 'pipeline.load_lora_weights(FOLDER, weight_name="out-lora.safetensors")' in text
    config = read_json(tmp_path / "out" / "lightx2v.json")
    assert config["denoising_step_list"] == [1000, 900, 757, 522]
    assert (config["sample_shift"], config["enable_cfg"], config["infer_steps"]) == (1, False, 4)
    assert (config["target_width"], config["target_height"], config["target_video_length"]) == (32, 32, 9)
    assert config["fps"] == 16
    assert config["lora_configs"] == [{"path": "out-lora.safetensors", "strength": 1.0}]
    assert not {"ar_config", "dit_original_ckpt"} & config.keys()
    export_for_program(runs / "full", tmp_path / "out", "lightx2v")
    config = read_json(tmp_path / "out" / "lightx2v.json")
    assert config["dit_original_ckpt"] == "out.safetensors"
    assert "lora_configs" not in config
    assert "whose `config.json`, text encoder and VAE are read" in card(tmp_path / "out")[1]


def test_lightx2v_noises_anew_with_its_code_of_self_forcing(runs: Path, tmp_path: Path) -> None:
    export_for_program(runs / "lora", tmp_path / "out", "lightx2v")
    metadata, text = card(tmp_path / "out")
    assert "lora" not in metadata["tags"]
    assert "| LoRA | rank 2, alpha 6, merged into these weights |" in text
    assert "--model_cls wan2.1_sf --task t2v" in text
    assert "make `num_frame_per_chunk` (length - 1) / 4 + 1" in text
    config = read_json(tmp_path / "out" / "lightx2v.json")
    assert config["dit_original_ckpt"] == "out.safetensors"
    assert config["ar_config"] == {"num_frame_per_chunk": 3, "denoising_step_list": [1000, 900, 757, 522]}
    assert config["causal_rope_type"] == "wan_causal_rope"
    assert not {"denoising_step_list", "lora_configs"} & config.keys()


def test_the_card_has_the_measures_that_it_is_given(runs: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "measures.md"
    file.write_text(
        "# a: videos\n\n| | flow |\n|---|---|\n| a | 1.5 |\n\n## Distance to real clips\n\nC# is no heading.\n"
    )
    for arguments in (["--format", "comfyui"], []):
        export = ["export", runs / "full", "--output", out, *arguments]
        status, printed = command(*export, "--measures", file)
        assert status == 0, printed
        _, _, measures = card(out)[1].partition("\n## Measures\n\n")
        assert measures.startswith("### a: videos\n\n| | flow |")
        assert "\n#### Distance to real clips\n\nC# is no heading.\n\n## Licence\n" in measures
        assert command(*export)[0] == 0
        assert "\n## Measures\n\nNone are stated. `avd evaluate` measures clips" in card(out)[1]
    for wrong, message in (
        (["--measures", tmp_path / "none.md"], "none.md cannot be read"),
        (["--measures", file, "--transformer-only"], "--transformer-only writes no model card for --measures"),
    ):
        status, printed = command("export", runs / "full", "--output", tmp_path / "new", *wrong)
        assert (status, message in printed) == (2, True), printed
    assert not (tmp_path / "new").exists()


def test_merged_adapters_are_a_whole_model_to_the_hub(
    runs: Path, wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_card, "is_on_hub", lambda source: source == str(wan))
    for merge, relation in ((True, "finetune"), (False, "adapter")):
        export_for_program(runs / "lora", tmp_path / "out", "comfyui", merge=merge)
        metadata, text = card(tmp_path / "out")
        assert metadata["base_model_relation"] == relation
        assert ("lora" in metadata["tags"]) is not merge
        assert ("| LoRA | rank 2, alpha 6, merged into these weights |" in text) is merge


def test_the_card_claims_guidance_only_where_there_was_some_and_names_the_first_weights(runs: Path) -> None:
    saved = open_run(runs / "full")
    text = model_card.model_card(saved, "ema", "out", "", adapters=False, library=None)
    assert "The student has learned the teacher's guided prediction" in text
    assert "student_weights" not in text
    others = tiny_config("bundled:tiny", "regression", student_weights="/home/me/first/student")
    text = model_card.model_card(saved._replace(config=others), "ema", "out", "", adapters=False, library=None)
    assert "| guidance | none: scale 1, no negative prompt |" in text
    assert "student_weights: student\n" in text


def test_a_grid_that_begins_below_1000_is_mentioned_for_comfyui(runs: Path) -> None:
    saved = open_run(runs / "full")
    method = saved.config.method.model_copy(update={"few_steps": (950.0, 500.0)})
    saved = saved._replace(config=saved.config.model_copy(update={"method": method}))
    usage = comfyui_usage(saved, Written("out", "out.safetensors", False))
    assert "first step is at 950 and takes noise of full strength. ComfyUI multiplies the noise by\n0.95 there" in usage


@pytest.mark.parametrize(
    ("space", "missing", "expected"),
    [
        ("block-dct-4", (), "--output clip.mp4`. Its text encoder and codec are in `avd-core[trainer]`"),
        ("wan", ("vae",), "This folder lacks vae, which clips need"),
    ],
)
def test_a_pipeline_that_diffusers_cannot_run_is_not_said_to(
    runs: Path, space: str, missing: tuple[str, ...], expected: str
) -> None:
    saved = open_run(runs / "full")
    saved.state["encoding"] = {**saved.state["encoding"], "latent_space": space}
    usage = diffusers_usage(saved, missing)
    assert expected in usage
    assert 'avd sample FOLDER --prompt "..." --output clip.mp4' in usage
    assert "from_pretrained" not in usage


def test_the_snippet_of_image_to_video_defines_its_image(runs: Path) -> None:
    saved = open_run(runs / "full")
    assert "load_image" not in diffusers_usage(saved, ())
    saved.state["architecture"] = {**saved.architecture, "in_channels": 36}
    usage = diffusers_usage(saved, ())
    (code,) = re.findall(r"```python\n(.*?)```", usage, re.DOTALL)
    assert code.index("import load_image") < code.index('image = load_image("FILE")') < code.index("(image=image")
    compile(code, "card", "exec")
    assert "torch_dtype=torch.bfloat16" in code


def test_a_local_teacher_is_no_name_on_the_hub_from_another_folder(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(wan.parents[1])
    teacher = str(wan.relative_to(wan.parents[1]))  # in the form of a name on the hub
    latents = torch.randn(2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(1))
    config = tiny_config(
        teacher, "regression", data={"kind": "shards", "path": "my-clips"}, max_steps=1, logging={"tensorboard": False}
    )
    data = both(in_memory(CaptionedLatents(latents, ["one", "two"]), HashTextEmbedding(4, TEXT_DIM)))
    with join_ranks() as ranks:
        train(config, tmp_path / "run", ranks, data=data)
    monkeypatch.chdir(tmp_path)
    export_for_program(tmp_path / "run", tmp_path / "out", "comfyui")
    metadata, text = card(tmp_path / "out")
    assert "base_model" not in metadata
    assert "A student of `Tiny-Wan`" in text
    assert read_json(tmp_path / "out" / "export.json")["pipelines"] == [str(wan)]


def test_the_loop_for_wans_code_keeps_no_graph_and_computes_in_bfloat16(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_for_program(runs / "full", tmp_path / "student", "wan")
    (loop,) = re.findall(r"```python\n(.*?)```", card(tmp_path / "student")[1], re.DOTALL)
    asked: list[tuple[object, ...]] = []

    class WanModel(torch.nn.Linear):
        @classmethod
        def from_pretrained(cls, _: str) -> "WanModel":
            return cls(4, 4)

        def forward(self, x: list[Tensor], t: Tensor, context: list[Tensor], seq_len: int) -> list[Tensor]:
            asked.append((t.item(), seq_len))
            return [super().forward(x[0])]

    def autocast(*arguments: object) -> nullcontext[None]:
        asked.append(arguments)
        return nullcontext()

    monkeypatch.setitem(sys.modules, "wan", ModuleType("wan"))
    monkeypatch.setitem(sys.modules, "wan.modules", ModuleType("wan.modules"))
    monkeypatch.setitem(sys.modules, "wan.modules.model", model := ModuleType("wan.modules.model"))
    model.WanModel = WanModel  # type: ignore[attr-defined]
    monkeypatch.setattr(torch, "autocast", autocast)
    names: dict[str, Any] = {"context": []}
    exec(loop.replace(', device="cuda"', "").replace('.to("cuda")', ""), names)
    assert asked == [("cuda", torch.bfloat16), *((timestep, 12) for timestep in (1000, 900, 757, 522))]
    assert not names["x"].requires_grad


def test_a_student_that_follows_its_velocity_is_sampled_so_everywhere(
    runs: Path, wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DMDMethodConfig, "sampled_by", "ode")  # as of pcm and dcm
    for program, said in (("comfyui", "`KSamplerSelect` `euler`"), ("wan", "x = x + (following - now)")):
        export_for_program(runs / "full", tmp_path / program, program)
        text = card(tmp_path / program)[1]
        assert said in text
        assert "lcm" not in text
        assert "follow the predicted velocity" in text
        assert open_student(tmp_path / program, str(wan)).sampler == "ode"


def change_state(run: Path, change: Any) -> Iterator[None]:
    """What a checkpoint says of its run, changed for a while."""
    (state,) = run.glob("checkpoints/*/state.json")
    before = state.read_text()
    content = json.loads(before)
    change(content)
    state.write_text(json.dumps(content))
    yield
    state.write_text(before)


@pytest.mark.parametrize(
    ("program", "change", "message"),
    [
        ("comfyui", {"encoding": {"latent_space": "block-dct-4"}}, "ComfyUI decodes latents of Wan's VAE and has no"),
        ("lightx2v", {"encoding": {"latent_space": "block-dct-4"}}, "no counterpart of the tiny preset's block DCT"),
        ("comfyui", {"architecture": {"text_dim": 16}}, "ComfyUI cannot run this student: .* text_dim 16 and not 4096"),
        ("comfyui", {"architecture": {"freq_dim": 16, "eps": 1e-5}}, "eps 1e-05 and not 1e-06, freq_dim 16 and not"),
        ("wan", {"architecture": {"attention_head_dim": 64}}, "attention_head_dim 64 and not 128"),
        ("wan", {"architecture": {"in_channels": 36}}, "image to video without an image embedding. Leave --format"),
        ("lightx2v", {"architecture": {"in_channels": 36}}, "anew at each step in text to video alone, and"),
        ("comfyui", {"architecture": {"in_channels": 36, "image_dim": 12}}, "image_dim 12 and not 1280"),
    ],
)
def test_a_student_that_a_program_cannot_run_is_refused(
    runs: Path, tmp_path: Path, program: ProgramName, change: dict[str, dict[str, Any]], message: str
) -> None:
    def apply(state: dict[str, Any]) -> None:
        for key, values in change.items():
            state[key] = {**state[key], **values}

    changed = change_state(runs / "full", apply)
    next(changed)
    try:
        with pytest.raises(UserError, match=message):
            export_for_program(runs / "full", tmp_path / "out", program)
    finally:
        next(changed, None)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "gguf"], "'gguf' is not one of 'diffusers', 'comfyui', 'lightx2v', 'wan'"),
        (["--format", "wan", "--transformer-only"], "--format wan is the transformer alone: leave --pipeline"),
        (["--format", "comfyui", "--pipeline", "a/b"], "--format comfyui is the transformer alone"),
        (["--merge"], "--merge is for --format comfyui or lightx2v"),
    ],
)
def test_options_that_do_not_go_together(runs: Path, tmp_path: Path, options: list[str], message: str) -> None:
    status, printed = command("export", runs / "lora", "--output", tmp_path / "out", *options)
    assert status == 2
    assert message in printed
    assert os.listdir(tmp_path) == []


def test_a_run_without_a_checkpoint_is_said_to_have_none(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text((runs / "full" / "config.yaml").read_text())
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        export_for_program(tmp_path / "run", tmp_path / "out", "comfyui")


def test_adapters_that_fit_nothing_are_named(tmp_path: Path) -> None:
    model = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, ffn_dim=16, num_layers=1, freq_dim=8, text_dim=6
    )
    for layer in ("blocks.1.attn1.to_q", "blocks.0.ffn.net.2"):
        with pytest.raises(UserError, match=f"The adapters do not fit the model: it has no {layer} of their size"):
            merge_adapters(model, Adapters({layer: (torch.ones(2, 12), torch.ones(12, 2))}, 1.0))
    save_file({"lora_unet_blocks_0_self_attn_q.lora_down.weight": torch.ones(2, 12)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors has adapters in other names than `avd export` writes"):
        read_adapters(tmp_path / "a.safetensors")
    pair = {f"diffusion_model.blocks.0.self_attn.q.lora_{end}.weight": torch.ones(2, 2) for end in "AB"}
    del pair["diffusion_model.blocks.0.self_attn.q.lora_B.weight"]
    save_file(pair, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"missing: diffusion_model\.blocks\.0\.self_attn\.q\.lora_B\.weight\."):
        read_adapters(tmp_path / "a.safetensors")
