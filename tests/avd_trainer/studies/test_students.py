"""Students that are there already: measured as a study measures its own, and shown side by side."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from safetensors.torch import save_file
from torch import Tensor

import tiny_pipeline
from avd_trainer.commands.compare import _common_shape, titles_of
from avd_trainer.config.loading import load_config, save_config
from avd_trainer.evaluation.controls import CONTROLS, REPEATED
from avd_trainer.evaluation.measures import MEASURES, OPEN_MEASURES
from avd_trainer.inference.generation import load_student
from avd_trainer.inference.students import open_student_or_run
from avd_trainer.models.adapters import Adapters, merge_adapters, program_tensors
from avd_trainer.models.condition import Condition
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.models.weight_files import ADAPTERS
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import read_json, write_json
from avd_trainer.runtime.ranks import join_ranks
from avd_trainer.studies.definition import Unit, load_study
from avd_trainer.studies.students import captions_of, evaluate_students
from avd_trainer.studies.units import Workplace, few_step_sample
from avd_trainer.training.config import TrainConfig
from command_line import run_command as command
from small_study import write_study

CPU = torch.device("cpu")
RED = "a red circle moves left"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run`` of the tiny preset, its export ``average``, and ``last`` of its last weights."""
    folder = tmp_path_factory.mktemp("students")
    for arguments in (
        ["train", "tiny", "--method", "dmd", "--output", folder / "run", "--max-steps", 2, "--set", "batch_size=2",
         "--set", "data.clips=4", "--set", "samples.every=null", "--set", "method.student.optimizer.lr=1e-3"],
        ["export", folder / "run", "--output", folder / "average"],
        ["export", folder / "run", "--output", folder / "last", "--weights", "student"],
    ):  # fmt: skip
        status, printed = command(*arguments)
        assert status == 0, printed
    return folder


def read_gif(path: Path) -> Tensor:
    """``[F, H, W, 3]`` in [0, 255]."""
    with Image.open(path) as gif:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)]
    return torch.from_numpy(np.stack(frames)).float()


def test_clips_of_one_noise_side_by_side(folders: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.gif"
    status, printed = command(
        "compare", *(folders / name for name in ("run", "average", "last")), "--prompt", RED, "--output", clip
    )
    assert status == 0, printed
    assert "sample: 12/12" in printed
    run, average, last = (part[:, -96:] for part in read_gif(clip).chunk(3, dim=2))  # below the names
    assert (run - average).abs().mean() < 1  # the run's student is its average
    assert (run - last).abs().mean() > 3


def test_several_prompts_go_to_a_folder(folders: Path, tmp_path: Path) -> None:
    status, printed = command(
        "compare", folders / "average", folders / "last", "--prompt", RED, "--prompt", "a blue square", "--seed", 3,
        "--output", tmp_path / "clips", "--size", "16x16x5",
    )  # fmt: skip
    assert status == 0, printed
    names = ["000-a-red-circle-moves-left.mp4", "001-a-blue-square.mp4"]
    assert sorted(os.listdir(tmp_path / "clips")) == [*names, "prompts.json"]
    assert [row["seed"] for row in read_json(tmp_path / "clips" / "prompts.json")] == [3, 4]


def test_students_without_a_common_noise_are_refused(folders: Path, tmp_path: Path) -> None:
    student = open_student_or_run(folders / "average")
    with pytest.raises(UserError, match=r"Wan's VAE: no noise is for both\. Compare students of one latent space"):
        _common_shape([student, student._replace(latent_space="wan")], None)
    output = ["--prompt", "a", "--output", tmp_path / "clip.mp4"]
    for arguments, message in (
        ([folders / "average"], "alone cannot be compared. Pass two students or more"),
        ([folders / "average", tmp_path], "is no pipeline. Pass a folder that `avd export` wrote"),
    ):
        status, printed = command("compare", *arguments, *output)
        assert status == 2
        assert message in printed
    (folders / "run" / "student").rename(folders / "run" / "away")
    try:
        with pytest.raises(UserError, match=r"run is a run without a student: it is not finished.*Export it"):
            open_student_or_run(folders / "run")
    finally:
        (folders / "run" / "away").rename(folders / "run" / "student")


def test_titles_tell_folders_apart() -> None:
    assert titles_of([Path("a/x"), Path("b/y")]) == ["x", "y"]
    assert titles_of([Path("a/x"), Path("b/x")]) == ["a/x", "b/x"]


def test_students_real_clips_and_controls_in_one_table_and_picture(folders: Path, tmp_path: Path) -> None:
    status, printed = command(
        "evaluate", folders / "run", folders / "average", folders / "last", "--output", tmp_path / "out",
        "--captions", 2, "--noises", 2,
    )  # fmt: skip
    assert status == 0, printed
    assert f"Table, figure and values are in {tmp_path}/out." in printed
    assert sorted(os.listdir(tmp_path / "out")) == ["measures.json", "measures.md", "measures.png"]
    found = read_json(tmp_path / "out" / "measures.json")
    run, average, last = (found["variants"][name] for name in ("run", "average", "last"))
    assert run["measures"] == average["measures"]
    assert run["measures"] != last["measures"]
    assert run["measures"].keys() == found["reference"]["spreads"].keys() == MEASURES.keys()
    assert found["controls"]["controls"].keys() == CONTROLS.keys() - {REPEATED}
    one, other = (run["seeds"][noise]["values"] for noise in ("0", "1"))
    assert one != other
    assert run["measures"]["kind"]["mean"] == pytest.approx((one["kind"] + other["kind"]) / 2)
    table = (tmp_path / "out" / "measures.md").read_text()
    assert table.startswith("# run and average and last on 2 held-out captions\n")
    assert "| *white noise* |" in table
    assert "real: mean ± standard deviation of 20 sets of 2 real clips." in table
    with Image.open(tmp_path / "out" / "measures.png") as figure:
        assert figure.width > 1000
    # Of other students or settings they are not replaced.
    for arguments, differs in (
        ([folders / "run", "--captions", 3, "--seed", 1], ", not ../../{run}; captions 2, not 3; seed 0, not 1."),
        ([folders / name for name in ("run", "average", "last")], "settings: captions 2, not 64."),
    ):
        status, printed = command("evaluate", *arguments, "--noises", 2, "--output", tmp_path / "out")
        relative = folders.relative_to(tmp_path.parent) / "run"
        assert (status, differs.replace("{run}", str(relative)) in printed) == (2, True), printed


def test_captions_that_leave_the_scene_open_have_a_measure_and_a_control_more(folders: Path, tmp_path: Path) -> None:
    trained = ("--max-steps", 1, "--set", "batch_size=2", "--set", "data.clips=4", "--set", "samples.every=null")
    status, printed = command("train", "tiny-open", "--method", "regression", "--output", tmp_path / "open", *trained)
    assert status == 0, printed
    arguments = ("--captions", 4, "--noises", 1, "--output", tmp_path / "out")
    status, printed = command("evaluate", tmp_path / "open", *arguments)
    assert status == 0, printed
    found = read_json(tmp_path / "out" / "measures.json")
    assert found["captions"] == "subjects"
    assert found["variants"]["open"]["measures"].keys() == MEASURES.keys() | OPEN_MEASURES.keys()
    assert found["controls"]["controls"].keys() == CONTROLS.keys()
    assert found["controls"]["controls"][REPEATED]["variety"] == 0
    # Beside a student of full captions neither's would be fair.
    both = (tmp_path / "open", folders / "average", "--captions", 4, "--output", tmp_path / "both")
    status, printed = command("evaluate", *both)
    assert (status, "data.captions was subjects of open, full of average. Evaluate" in printed) == (2, True), printed
    assert not (tmp_path / "both").exists()


def test_measures_of_the_same_student_twice_or_in_a_students_folder_are_refused(folders: Path, tmp_path: Path) -> None:
    average = folders / "average"
    for arguments, message in (
        ([average, folders / "run" / ".." / "average", "--output", tmp_path / "out"], "is given twice. Pass each"),
        ([average, "--output", average], "holds an export or a run"),
        ([average, "--output", folders / "run"], "holds an export or a run"),
    ):
        status, printed = command("evaluate", *arguments, "--captions", 2, "--noises", 1)
        assert status == 2
        assert message in printed.replace("│ ", "")
    assert os.listdir(tmp_path) == []


def test_a_student_has_the_values_that_its_study_gives_it(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path / "small"))
    unit = Unit("dmd", 1)
    with join_ranks() as ranks:
        place = Workplace(study, tmp_path / "work", ranks)
        expected = place.do(unit)["noises"]
        student = open_student_or_run(place.run_folder(unit))  # its checkpoints are gone
        evaluated = evaluate_students({"dmd": student}, study.config.evaluation, captions="full", seed=1, device=CPU)
    found = evaluated.results["variants"]["dmd"]["seeds"]
    for noise, values in enumerate(expected):
        assert found[str(noise)]["values"] == pytest.approx(values, rel=1e-4, abs=1e-5)


def test_a_study_samples_students_of_earlier_versions_whole_or_as_adapters(tmp_path: Path) -> None:
    """Their ``export.json`` does not say how to make clips, which the study does."""
    study = load_study(write_study(tmp_path / "small"))
    torch.manual_seed(0)
    matrices = {f"blocks.0.attn1.to_{part}": (torch.randn(2, 96), torch.randn(96, 2)) for part in "qk"}
    merged = load_transformer("bundled:tiny")
    merge_adapters(merged, Adapters(matrices, 1.0))
    noise = torch.randn(1, 16, 3, 6, 10)
    condition, streams = Condition(torch.randn(1, 4, 32)), [torch.Generator()]
    with join_ranks() as ranks:
        place = Workplace(study, tmp_path / "work", ranks)
        whole, adapters = (place.run_folder(Unit("dmd", seed)) / "student" for seed in (1, 2))
        merged.save_pretrained(whole)
        adapters.mkdir(parents=True)
        save_file(program_tensors(Adapters(matrices, 1.0), torch.float32), adapters / ADAPTERS)
        samples = []
        for seed, folder in ((1, whole), (2, adapters)):
            write_json(folder / "export.json", {"weights": "ema"})
            samples.append(place._student(Unit("dmd", seed))(noise, [s.manual_seed(0) for s in streams], condition))
    expected = few_step_sample(VelocityModel(merged), (1000, 500))(noise, [streams[0].manual_seed(0)], condition)
    for sample in samples:
        torch.testing.assert_close(sample, expected, rtol=1e-5, atol=1e-5)


def test_a_run_without_checkpoints_is_opened_by_its_student_and_not_called_unfinished(
    folders: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folders / "run", run)
    expected = open_student_or_run(run)
    shutil.rmtree(run / "checkpoints")
    found = open_student_or_run(run)
    assert found.architecture.items() >= {"num_layers": expected.architecture["num_layers"]}.items()
    assert found._replace(architecture={}) == expected._replace(architecture={})
    status, printed = command("export", run, "--output", tmp_path / "out")
    assert status == 2
    assert "is finished and has no checkpoint any more" in printed.replace("│ ", "")
    about = run / "student" / "export.json"
    write_json(about, {key: value for key, value in read_json(about).items() if key != "timesteps"})
    with pytest.raises(UserError, match="it is of a run by an earlier version"):
        open_student_or_run(run)


def test_a_run_with_adapters_is_opened_by_its_teacher_and_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, printed = command(
        "train", "tiny", "--method", "regression", "--output", run, "--max-steps", 2, "--set", "batch_size=2",
        "--set", "data.clips=4", "--set", "samples.every=null", "--set", "method.student.optimizer.lr=1e-2",
        "--set", "method.student.lora.rank=4", "--set", "method.student.lora.alpha=8",
    )  # fmt: skip
    assert status == 0, printed
    status, printed = command("export", run, "--output", tmp_path / "merged")
    assert status == 0, printed
    whole = load_student(open_student_or_run(tmp_path / "merged"), CPU, torch.float32).state_dict()
    for checkpoints in ("there", "deleted"):
        if checkpoints == "deleted":
            shutil.rmtree(run / "checkpoints")
        found = load_student(open_student_or_run(run), CPU, torch.float32).state_dict()
        assert found.keys() == whole.keys()
        for name, weight in whole.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-7)
    teacher = load_transformer("bundled:tiny", CPU).state_dict()
    assert any(not torch.equal(teacher[name], weight) for name, weight in whole.items())


def test_a_kept_student_of_wan_needs_its_vae(tmp_path: Path) -> None:
    pipeline = tiny_pipeline.build(tmp_path / "pipeline")
    run = tmp_path / "run"
    shutil.copytree(pipeline / "transformer", run / "student")
    about = {"latent_space": "wan", "clip": [16, 3, 4, 6], "fps": 16, "timesteps": [1000, 500], "sampler": "re-noise"}
    write_json(run / "student" / "export.json", about)
    config = load_config(TrainConfig, "tiny", [f"teacher={pipeline}"], method="dmd")
    save_config(config, run / "config.yaml", "avd train")
    student = open_student_or_run(run)
    assert (student.latent_space, student.pipeline, student.adapters) == ("wan", str(pipeline), None)
    shutil.rmtree(pipeline / "vae")
    with pytest.raises(UserError, match="does not know of a pipeline with text encoder and VAE: none of"):
        open_student_or_run(run)


def test_students_of_wan_have_no_ground_truth(folders: Path) -> None:
    student = open_student_or_run(folders / "average")._replace(latent_space="wan")
    with pytest.raises(UserError, match=r"Wan's VAE, of which there are no captioned clips whose every shape is known"):
        captions_of({"wan": student})
