import ast

import pytest

from page_lines import assert_in_order, assignments, page_lines, with_lines

pytestmark = pytest.mark.hosts


def test_the_step_runs_saves_and_continues(run_in_host):
    report = run_in_host("DCM", "dcm.py")
    assert report["added"] > 0
    assert report["entries"] >= 2


@pytest.mark.parametrize(("script", "first"), [("wan", 35), ("hy", 38)])
def test_both_semantic_experts_have_the_names_that_the_lines_read(checkout, script, first):
    source = (checkout("DCM") / "fastvideo" / f"distill_dcm_{script}_semantic_expert.py").read_text()
    blocks = page_lines("dcm.md")
    source = with_lines(source, blocks[:3] if script == "wan" else blocks[:4])
    compile(source, script, "exec")
    names = assignments(source, "distill_one_step", "loss.backward()")
    assert_in_order(names, ["model_input", "noise", "index", "noisy_model_input", "model_pred", "target", "loss"])
    # Set where the script goes one step, too: by itself, or before by the page's line.
    if script == "wan":
        assert "end_index = torch.zeros_like(index)+35" in source
    else:
        assert "end_index" in assignments(source, "distill_one_step", "if index[0]==38:")
    # The lowest index, and the one Euler step that the whole batch goes from it.
    assert f"index = torch.randint({first}," in source
    assert f"if index[0]=={first}:" in source
    assert "solver.euler_step(noisy_model_input, model_pred, index)" in source


@pytest.mark.parametrize("script", ["wan", "hy"])
def test_both_detail_experts_have_the_names_that_the_lines_read(checkout, script):
    source = (checkout("DCM") / "fastvideo" / f"distill_dcm_{script}_detail_expert.py").read_text()
    blocks = page_lines("dcm.md")
    compile(with_lines(source, [*blocks[4:], blocks[2]]), script, "exec")
    names = assignments(source, "distill_one_step_adv", "g_loss.backward()")
    assert_in_order(names, ["model_input", "noise", "index", "noisy_model_input", "model_pred", "end_index", "g_loss"])
    assert "if index[0]==" not in source


@pytest.mark.parametrize("script", ["wan_semantic", "hy_semantic", "wan_detail", "hy_detail"])
def test_the_ranks_of_a_group_have_some_of_the_frames_and_one_index(checkout, script):
    source = (checkout("DCM") / "fastvideo" / f"distill_dcm_{script}_expert.py").read_text()
    main = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "main")
    assert [argument.arg for argument in main.args.args] == ["args"]
    assert "solver.to(device)" in ast.unparse(main)
    assert "initialize_sequence_parallel_state(args.sp_size)" in ast.unparse(main)
    assert "args.train_batch_size, args.sp_size, args.train_sp_batch_size" in ast.unparse(main)
    assert "if sp_size > 1:\n" in source
    assert "broadcast(index)" in source
    shared = (checkout("DCM") / "fastvideo" / "utils" / "communications.py").read_text()
    assert "hidden_states = all_to_all(hidden_states, scatter_dim=2, gather_dim=0)" in shared
