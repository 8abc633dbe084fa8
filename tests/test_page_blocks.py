"""Every block of every page is run or checked; those that no test of their own subject runs, here, as they stand."""

import ast
import re
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from avd_core import ConditionalScoreDistillationLoss, HingeLoss, SpatioTemporalR1Loss
from avd_trainer.config.loading import load_config, to_yaml
from avd_trainer.data.preparation.recipe import load_recipe
from avd_trainer.studies.definition import load_study
from avd_trainer.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DATA = {"data": {"kind": "shards", "path": "data/clips"}}


def block(page: str, words: str) -> str:
    """The one block of a page that has these words."""
    blocks = re.findall(r"^```\w+\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (code,) = (block for block in blocks if words in block)
    return code


RUN_BY = {
    "README.md": "tests/test_readme.py",
    "docs/architecture.md": "tests/test_architecture.py",
    "docs/callbacks.md": "tests/avd_core/test_callbacks_page.py",
    "docs/data.md": "tests/test_page_blocks.py",
    "docs/diffusers.md": "tests/avd_integrations/test_diffusers.py",
    "docs/hosts.md": "tests/avd_integrations/test_docs.py",
    "docs/hosts/accelerate.md": "tests/avd_integrations/test_accelerate.py",
    "docs/hosts/causvid.md": "tests/hosts/programs/causvid_trainer.py",
    "docs/hosts/dcm.md": "tests/hosts/test_dcm.py",
    "docs/hosts/dmd2.md": "tests/hosts/programs/dmd2.py",
    "docs/hosts/fastgen.md": "tests/hosts/programs/fastgen_tiny.py",
    "docs/hosts/fastvideo.md": "tests/hosts/programs/fastvideo_dmd2.py",
    "docs/hosts/lcm.md": "tests/hosts/test_lcm.py",
    "docs/hosts/pcm.md": "tests/hosts/test_pcm.py",
    "docs/hosts/rcm.md": "tests/hosts/programs/rcm_trainer.py",
    "docs/hosts/self_forcing.md": "tests/hosts/programs/self_forcing_trainer.py",
    "docs/measures.md": "tests/avd_trainer/evaluation/test_measures_page.py",
    "docs/method.md": "tests/test_page_blocks.py",
    "docs/monitoring.md": "tests/test_page_blocks.py",
    "docs/spectrum.md": "tests/test_page_blocks.py",
    "docs/studies.md": "tests/test_page_blocks.py",
    "docs/training.md": "tests/test_page_blocks.py",
    "docs/vbench.md": "tests/avd_trainer/evaluation/test_vbench.py",
}
"""Who runs the code and the configuration of a page. The hosts' pages run inside their hosts, with ``AVD_HOSTS``."""
SHOWN = {
    "docs/architecture.md": ["for each turn of method.turns(step):"],
    "docs/data.md": ["8 files gave 5 clips;", "examples            31 in 1 file(s)"],
    "docs/method.md": ["w_b  = weight", "absolute      d_b", "variance = decay variance"],
    "docs/sampling.md": ["half rate (2 steps on every 2nd frame"],
    "docs/training.md": ["#SBATCH --nodes=3"],
}
"""Beginnings of blocks that are no commands: equations, what is printed, and a job for SLURM, whose last lines are."""
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")])


def fenced(page: str) -> Iterator[tuple[str, str]]:
    """Language and content of each block of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for language, content in re.findall(r"^ *```([\w{}]*)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        yield language, textwrap.dedent(content)


@pytest.mark.parametrize("page", PAGES)
def test_code_and_configuration_are_run_by_a_test(page: str) -> None:
    languages = {language for language, _ in fenced(page)} - {"", "{toctree}"}
    assert languages <= {"python", "yaml", "bash"}
    assert (page in RUN_BY) == bool(languages), "write a test that runs the page's blocks, and name it in RUN_BY"
    if languages:
        assert Path(page).name in (ROOT / RUN_BY[page]).read_text(encoding="utf-8")
    for language, content in fenced(page):
        if language == "python":
            ast.parse(content)


@pytest.mark.parametrize("page", PAGES)
def test_other_blocks_are_commands_that_exist(page: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    shown = SHOWN.get(page, [])
    for content in (content for language, content in fenced(page) if not language):
        if any(content.startswith(words) for words in shown):
            continue
        for line in content.replace("\\\n", " ").splitlines():
            command = re.sub(r"\s+#.*", "", line.strip())
            command = re.sub(r"^([A-Z_]+=\S+ +)+", "", command)
            if not command or command.startswith("#") or re.match(r"(\.venv/bin/)?avd ", command):
                continue  # tests/test_pages.py parses commands of avd
            if make := re.fullmatch(r"make ([a-z-]+)", command):
                assert make[1] in targets, line
            elif install := re.fullmatch(r'pip install "?avd-core(?:\[([\w,]+)\])?"?( [\w -]+)?', command):
                assert set((install[1] or "trainer").split(",")) <= extras.keys(), line
            elif script := re.match(r"\.venv/bin/python (?:-m pytest -m hosts )?([\w/.-]+)", command):
                assert (ROOT / script[1]).exists(), line
            else:
                assert re.match(
                    r"hf download [\w-]+/|(?:avd )?torchrun .*(?:-m avd_trainer|\.\.\.)|tensorboard --logdir "
                    r"|vbench evaluate ",
                    command,
                ), f"{line}: run or check it, or name the block in SHOWN"


def test_make_pages_has_every_test_of_a_page() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    assert re.search(r"^pages: .*\n.* -m pytest \$\(PAGE_TESTS\)$", makefile, re.MULTILINE)
    (names,) = re.findall(r"^PAGE_TESTS := (.*)$", makefile, re.MULTILINE)
    listed = dict(name.partition("::")[::2] for name in names.split())
    texts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    expected = {*RUN_BY.values(), *(name for name, text in texts.items() if '/ "docs"' in text)}
    assert {name for name in expected if not name.startswith("tests/hosts/")} <= listed.keys()
    for name, test in listed.items():
        assert f"def {test}" in texts[name], name


def test_roll_off_points_have_the_shapes_beside_them() -> None:
    code = block("spectrum.md", "spectral_rolloff")
    scope: dict[str, Any] = {}
    exec(code, scope)
    calls = re.findall(r"^(\w+_rolloff\(.*?\))  # (\[[\d, ]+\])", code, re.MULTILINE)
    assert len(calls) == 3
    for call, shape in calls:
        assert str(list(eval(call, scope).shape)) == shape


def test_the_adversarial_losses_are_called_like_this() -> None:
    code = block("method.md", "hinge.discriminator")
    weight = torch.ones((), requires_grad=True)
    clips_t = torch.randn(2, 4, 3, 8, 8)
    scope: dict[str, Any] = {
        "hinge": HingeLoss(),
        "r1": SpatioTemporalR1Loss(),
        "distillation": ConditionalScoreDistillationLoss(),
        "discriminator": lambda x_t: weight * x_t.mean(dim=(1, 2, 3, 4)),
        "clips_t": clips_t,
        "clip_logits": weight * clips_t.mean(dim=(1, 2, 3, 4)),
        "sample_logits": weight * torch.randn(2),
        "samples": weight * torch.randn(2, 4, 3, 8, 8),
        "teachers_x_0": torch.randn(2, 4, 3, 8, 8),
    }
    exec(code, scope)
    for name in ("loss", "penalty", "distance"):
        assert scope[name].requires_grad


def test_shards_are_written_and_read(tmp_path: Path) -> None:
    code = block("data.md", "ShardWriter")
    latent, embedding = torch.randn(16, 5, 8, 8), torch.randn(7, 4096)
    scope: dict[str, Any] = {
        "folder": tmp_path,
        "clips": [(latent, embedding, "a cat", "cat.mp4")],
        "negative_embedding": torch.randn(3, 4096),
        "negative_prompt": "blurred",
    }
    exec(code, scope)
    torch.testing.assert_close(scope["latent"], latent, rtol=1e-3, atol=1e-3)
    assert scope["text"].shape == (512, 4096)
    assert (scope["caption"], scope["source"]) == ("a cat", "cat.mp4")


def test_a_file_of_values_extends_a_preset(tmp_path: Path) -> None:
    code = block("training.md", "extends: wan2.1-1.3b/avd")
    (tmp_path / "mine.yaml").write_text(code)
    mine = load_config(TrainConfig, str(tmp_path / "mine.yaml"), replace=DATA)
    assert (mine.method.kind, mine.max_steps) == ("avd", 2000)
    assert mine.method.regression.weight == 1.0


def test_logging_is_configured_like_this(tmp_path: Path) -> None:
    code = block("monitoring.md", "wandb: {")
    (tmp_path / "mine.yaml").write_text(to_yaml({"extends": "tiny/avd"}) + code)
    mine = load_config(TrainConfig, str(tmp_path / "mine.yaml"))
    assert mine.logging.tensorboard
    assert mine.logging.wandb is not None
    assert mine.logging.wandb.project == "my-students"
    assert (mine.samples.every, mine.samples.count) == (200, 4)


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    code = block("data.md", "# mine.yaml")
    (tmp_path / "mine.yaml").write_text(code)
    stages = load_recipe(tmp_path / "mine.yaml").stages
    chosen: dict[str, Any] = {name: stage.settings for name, stage in stages.items()}
    assert (chosen["flow"].min, chosen["duplicates"].distance, chosen["detail"].min) == (0.5, 6, 0.1)


def test_a_study_is_two_files_and_their_relatives(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(block("studies.md", "# study.yaml"))
    (tmp_path / "with.yaml").write_text(block("studies.md", "# with.yaml"))
    (tmp_path / "without.yaml").write_text("# Without it.\nextends: tiny/avd\nmethod: {motion: {weight: 0.0}}\n")
    (tmp_path / "teacher.yaml").write_text("# The teacher.\nteacher_of: without\nsteps: 2\n")
    (tmp_path / "interpolator.yaml").write_text("# The network.\nextends: tiny/frame_interpolation\n")
    (tmp_path / "half-rate.yaml").write_text("# At half rate.\nof: with\ninterpolator: interpolator\n")
    loaded = load_study(str(tmp_path))
    assert loaded.run("with").method.motion.weight == 0.3
    assert loaded.run("without").method.motion.weight == 0.0
    assert loaded.compared_with("half-rate", loaded.order) == "with"
    assert loaded.titles["with"] == "with.yaml: With the temporal term."
