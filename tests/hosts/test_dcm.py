import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from page_lines import assert_in_order, assignments, call, page_lines, with_lines

pytestmark = pytest.mark.hosts

READ = {
    "prediction": "model_pred",
    "x_t": "noisy_model_input",
    "clips": "model_input",
    "noise": "noise",
    "index": "index",
    "end_index": "end_index",
}
WAN_CREATE, TERM, MAIN, UPDATE, HY_CREATE, HY_END, DETAIL_CREATE, DETAIL_TERM = page_lines("dcm.md")
BLOCKS = {
    "wan_semantic": [WAN_CREATE, TERM, MAIN, UPDATE],
    "hy_semantic": [HY_CREATE, HY_END, TERM, MAIN, UPDATE],
    "wan_detail": [DETAIL_CREATE, DETAIL_TERM, MAIN],
    "hy_detail": [DETAIL_CREATE, DETAIL_TERM, MAIN],
}
LOWEST = {"wan_semantic": 35, "hy_semantic": 38, "wan_detail": 0, "hy_detail": 0}


@pytest.fixture
def source(checkout: Callable[[str], Path]) -> Callable[[str], str]:
    return lambda script: (checkout("DCM") / "fastvideo" / f"distill_dcm_{script}_expert.py").read_text()


def function(text: str, name: str) -> ast.FunctionDef:
    return next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == name)


def test_the_step_runs_saves_and_continues(run_in_host: Callable[..., dict[str, Any]]) -> None:
    report = run_in_host("DCM", "dcm.py")
    assert report["added"] > 0
    assert report["entries"] >= 2


@pytest.mark.parametrize("script", BLOCKS)
def test_the_lines_pass_what_the_terms_take_and_fit(source: Callable[[str], str], script: str) -> None:
    blocks = BLOCKS[script]
    compile(with_lines(source(script), blocks), script, "exec")
    code = "".join(code for *_, code in blocks)
    assert call(code, "from_prediction") == ([], READ)
    arguments, options = call(code, "dcm_terms")
    assert arguments == ["solver"]
    assert options.pop("sp_size") == "args.sp_size"
    assert int(options.pop("first_index", 35)) == LOWEST[script]
    assert options == ({"motion": "None"} if script == "hy_semantic" else {})
    # The lowest index that is drawn, be it written on one line or on two.
    step = ast.unparse(function(source(script), "distill_one_step" + "_adv" * ("detail" in script)))
    assert f"index = torch.randint({LOWEST[script]}, " in step


@pytest.mark.parametrize(("script", "first"), [("wan_semantic", 35), ("hy_semantic", 38)])
def test_both_semantic_experts_have_the_names_that_the_lines_read(
    source: Callable[[str], str], script: str, first: int
) -> None:
    text = with_lines(source(script), BLOCKS[script])
    names = assignments(text, "distill_one_step", "loss.backward()")
    assert_in_order(names, ["model_input", "noise", "index", "noisy_model_input", "model_pred", "target", "loss"])
    # Set where the script goes one step, too: by itself, or before by the page's line.
    if script == "wan_semantic":
        assert "end_index = torch.zeros_like(index)+35" in text
    else:
        assert "end_index" in assignments(text, "distill_one_step", "if index[0]==38:")
    # The one Euler step that the whole batch goes from the lowest index.
    assert f"if index[0]=={first}:" in text
    assert "solver.euler_step(noisy_model_input, model_pred, index)" in text
    # Micro-batches: the host's loss is divided, and the step is ended behind the loop over them.
    step = function(text, "distill_one_step")
    (loop,) = (n for n in step.body if isinstance(n, ast.For))
    assert ast.unparse(loop.iter) == "range(gradient_accumulation_steps)"
    assert "loss = loss + avd_loss / gradient_accumulation_steps" in ast.unparse(loop)
    assert "solver.avd.update()" not in ast.unparse(loop)
    assert "solver.avd.update()" in ast.unparse(step)


@pytest.mark.parametrize("script", ["wan_detail", "hy_detail"])
def test_both_detail_experts_have_the_names_that_the_lines_read(source: Callable[[str], str], script: str) -> None:
    text = source(script)
    names = assignments(text, "distill_one_step_adv", "g_loss.backward()")
    assert_in_order(names, ["model_input", "noise", "index", "noisy_model_input", "model_pred", "end_index", "g_loss"])
    assert "if index[0]==" not in text
    assert "gradient_accumulation_steps" not in ast.unparse(function(text, "distill_one_step_adv"))


@pytest.mark.parametrize("script", BLOCKS)
def test_each_save_of_weights_is_at_a_step_at_which_the_lines_save_the_cache(
    source: Callable[[str], str], script: str
) -> None:
    main = function(source(script), "main")
    saves = {"if step >= 800 and step % args.checkpointing_steps == 0:"} if script == "hy_semantic" else {"if False:"}
    branches = [n for n in ast.walk(main) if isinstance(n, ast.If) and "save_checkpoint(" in ast.unparse(n)]
    loop = next(n for n in main.body if isinstance(n, ast.For) and "distill_one_step" in ast.unparse(n))
    outermost = [n for n in loop.body if n in branches]
    assert {ast.unparse(n).splitlines()[0] for n in outermost} == saves
    last = [ast.unparse(n) for n in main.body if n in branches]
    assert len(last) == 1
    assert "args.output_dir, args.max_train_steps)" in last[0]
    text = ast.unparse(main)
    assert "os.makedirs(args.output_dir, exist_ok=True)" in text
    # One row of wandb: the script and the lines give the same step.
    assert text.count("wandb.log(") == text.count("step=step)") == 1
    assert {"rank", "step"} <= set(assignments(source(script), "main", "progress_bar.update(1)"))
    assert call(MAIN[2], "log")[1] == {"step": "step"}


@pytest.mark.parametrize("script", BLOCKS)
def test_the_ranks_of_a_group_have_some_of_the_frames_and_one_index(
    checkout: Callable[[str], Path], source: Callable[[str], str], script: str
) -> None:
    text = source(script)
    main = function(text, "main")
    assert [argument.arg for argument in main.args.args] == ["args"]
    assert "solver.to(device)" in ast.unparse(main)
    assert "initialize_sequence_parallel_state(args.sp_size)" in ast.unparse(main)
    assert "args.train_batch_size, args.sp_size, args.train_sp_batch_size" in ast.unparse(main)
    assert "if sp_size > 1:\n" in text
    assert "broadcast(index)" in text
    shared = (checkout("DCM") / "fastvideo" / "utils" / "communications.py").read_text()
    assert "hidden_states = all_to_all(hidden_states, scatter_dim=2, gather_dim=0)" in shared


def test_wans_detail_expert_does_not_import_what_it_uses(source: Callable[[str], str]) -> None:
    """As the page says."""
    text = source("wan_detail")
    assert "wandb.init(" in text
    assert "argparse.ArgumentParser(" in text
    assert "import wandb" not in text
    assert "import argparse" not in text


def test_method_dcm_has_the_loss_and_the_gradient_of_the_authors_lines(
    run_in_host: Callable[..., dict[str, Any]],
) -> None:
    assert run_in_host("DCM", "agree_dcm.py")
