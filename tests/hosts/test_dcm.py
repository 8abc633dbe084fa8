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
    compile(with_lines(source, page_lines("dcm.md")), script, "exec")
    names = assignments(source, "distill_one_step", "loss.backward()")
    assert_in_order(
        names, ["model_input", "noise", "index", "noisy_model_input", "model_pred", "end_index", "target", "loss"]
    )
    # The lowest index, and the one Euler step that the whole batch goes from it.
    assert f"index = torch.randint({first}," in source
    assert f"if index[0]=={first}:" in source
    assert "solver.euler_step(noisy_model_input, model_pred, index)" in source


def test_the_detail_experts_have_the_names_that_their_line_reads(checkout):
    for script in ("wan", "hy"):
        source = (checkout("DCM") / "fastvideo" / f"distill_dcm_{script}_detail_expert.py").read_text()
        function = "distill_one_step_adv" if "def distill_one_step_adv" in source else "distill_one_step"
        names = assignments(source, function, "g_loss.backward()")
        assert {"model_input", "noise", "index", "noisy_model_input", "model_pred", "end_index", "g_loss"} <= set(names)
        assert "if index[0]==" not in source
