import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors import safe_open

import tiny_pipeline
from avd_trainer.data.in_memory import CaptionedLatents
from avd_trainer.data.sources import TrainingData
from avd_trainer.models.text_encoders.hashed import HashTextEmbedding
from avd_trainer.models.transformer import VelocityModel
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.export import export_student
from avd_trainer.training.run import train
from avd_trainer.training.trainer import Trainer
from launches import Launch
from runs import (
    MakeConfig,
    assert_same_tensors,
    both,
    exported,
    files,
    in_memory,
    model_inputs,
    student_velocity,
)

NAMES = ["config.json", "diffusion_pytorch_model.safetensors", "export.json"]


def test_averaged_and_last_weights_of_any_step(
    config: TrainConfig, data: TrainingData, run: Path, tmp_path: Path, ranks: Ranks
) -> None:
    trainer = Trainer(config, data, ranks)
    expected = {}
    for step, _ in enumerate(trainer.run(), start=1):
        for weights in ("ema", "student"):
            tensors = trainer.state_tensors()[weights]
            expected[weights, step] = {name: value.full_tensor().clone() for name, value in tensors.items()}  # type: ignore[attr-defined]
    for (weights, step), tensors in expected.items():
        export_student(run, tmp_path / "out", weights=weights, step=step)  # each over the one before
        assert sorted(os.listdir(tmp_path / "out")) == NAMES
        assert_same_tensors(exported(tmp_path / "out"), tensors)
    distinct = {
        torch.cat([t.flatten() for t in tensors.values()]).double().sum().item() for tensors in expected.values()
    }
    assert len(distinct) == 4
    # What nobody asked for: the average, of the newest; as the run itself leaves it.
    export_student(run, tmp_path / "out")
    assert_same_tensors(exported(tmp_path / "out"), expected["ema", 2])
    assert files(tmp_path / "out") == files(run / "student")


def test_another_type(run: Path, tmp_path: Path) -> None:
    export_student(run, tmp_path / "out", dtype=torch.bfloat16)
    found = WanTransformer3DModel.from_pretrained(tmp_path / "out", torch_dtype="auto").state_dict()
    expected = exported(run / "student")
    assert all(torch.equal(found[name].bfloat16(), value.bfloat16()) for name, value in expected.items())
    half = (tmp_path / "out" / NAMES[1]).stat().st_size / (run / "student" / NAMES[1]).stat().st_size
    assert 0.4 < half < 0.7


def test_what_is_no_export_is_left_alone(run: Path, tmp_path: Path) -> None:
    for number, names in enumerate(
        (["mine.txt"], ["config.json", "diffusion_pytorch_model.safetensors"], ["a/folder"], ["model.safetensors"])
    ):
        output = tmp_path / str(number)
        for name in names:
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_text("mine")
        with pytest.raises(UserError, match=f"{output} holds something that is no earlier export. Move it away"):
            export_student(run, output)
        assert all((output / name).read_text() == "mine" for name in names)
    file = tmp_path / "0" / "mine.txt"
    with pytest.raises(UserError, match="holds something that is no earlier export"):
        export_student(run, file)
    with pytest.raises(UserError, match=r"mine\.txt/student cannot be written: .*choose another --output"):
        export_student(run, file / "student")
    assert file.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "2", "3", "run"]


def test_what_is_not_there_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run has no checkpoint of step 7; there are \[1, 2\]"):
        export_student(run, tmp_path / "out", step=7)
    with pytest.raises(UserError, match=r"holds no checkpoint yet\. Pass the --output folder of an `avd train` run"):
        export_student(tmp_path, tmp_path / "out")
    (next((run / "checkpoints" / "step-00000002").glob("*.safetensors"))).unlink()
    with pytest.raises(UserError, match="step-00000002 cannot be read"):
        export_student(run, tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]


def export_and_die(run: Path, output: Path, operation: int) -> None:
    """Export; killed before the ``operation``-th access to what has the output's name, or one made from it."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            within = event in ("os.remove", "os.rmdir") and arguments[1] != -1
            if within or str(arguments[0]).startswith(str(output)):
                seen += 1
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    export_student(run, output, weights="student")


def test_an_export_that_is_killed_leaves_nothing_that_looks_whole(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "exported" / "out"
    export_student(run, output)
    old = files(output)
    export_student(run, tmp_path / "new", weights="student")
    new = files(tmp_path / "new")
    seen = set()
    for operation in range(1, 40):
        with Launch(1, export_and_die, run, output, operation) as launch:
            (status,) = launch.wait()
        assert status in (0, -signal.SIGKILL), launch.printed()
        found = files(output) if output.exists() else None
        assert found in (old, new, None)
        seen.add("none" if found is None else "old" if found == old else "new")
        if status == 0:
            break
    assert status == 0
    assert operation > 8
    assert {"old", "new"} <= seen
    assert os.listdir(output.parent) == ["out"]


def export_to_a_full_disk(run: Path, output: Path) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        export_student(run, output)
    except UserError as error:
        return str(error)
    return ""


def test_a_full_disk_is_named_and_the_earlier_export_stays(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "exported" / "out"
    export_student(run, output, weights="student")
    before = files(output)
    with Launch(1, export_to_a_full_disk, run, output) as launch:
        (message,) = launch.results()
    assert f"{output} cannot be written: " in message
    assert "File too large" in message
    assert files(output) == before
    assert os.listdir(output.parent) == ["out"]


@pytest.mark.parametrize("weights", ["ema", "student"])
def test_adapters_load_into_the_pipeline_that_they_were_trained_on(
    make_config: MakeConfig, clips: CaptionedLatents, tmp_path: Path, ranks: Ranks, weights: Any
) -> None:
    teacher = tiny_pipeline.build(tmp_path / "teacher")
    config = make_config(
        method={"student": {"lora": {"rank": 2, "alpha": 6.0}}, "online": {"lora": {"rank": 3}}, "online_updates": 1},
        teacher=str(teacher),
        checkpoint={"every": 1},
        logging={"tensorboard": False},
    )
    data = both(in_memory(clips, HashTextEmbedding(4, 16)))
    train(config, tmp_path / "run", ranks, data=data)
    export_student(tmp_path / "run", tmp_path / "out", weights=weights)
    assert sorted(os.listdir(tmp_path / "out")) == ["export.json", "pytorch_lora_weights.safetensors"]
    with safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert told["transformer.rank_pattern"] == told["transformer.alpha_pattern"] == {}  # diffusers 0.36 reads them

    trainer = Trainer(config, data, ranks)
    list(trainer.run())
    inputs = model_inputs(16)
    expected = student_velocity(trainer, weights, inputs)
    pipeline = WanPipeline.from_pretrained(teacher, vae=None, text_encoder=None, tokenizer=None)
    with torch.no_grad():
        model = VelocityModel(pipeline.transformer)
        before = model(*inputs)
        pipeline.load_lora_weights(tmp_path / "out")
        torch.testing.assert_close(model(*inputs), expected, rtol=0, atol=1e-5)
    assert (expected - before).abs().max() > 1e-3
