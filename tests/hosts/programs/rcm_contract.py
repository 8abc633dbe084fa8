"""What of rCM cannot run on one CPU, read from its source: a change there fails here."""

import ast
import json
from pathlib import Path

MODEL = "rcm/models/t2v_model_distill_rcm.py"


def methods(path: str, name: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(Path(path).read_text())
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}


def calls(node: ast.AST) -> list[str]:
    return [ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)]


model = methods(MODEL, "T2VDistillModel_rCM")
trainer = methods("rcm/trainers/trainer_distillation.py", "ImaginaireTrainer_Distill")

# With context parallelism ranks share a sample: clips come in step from here, and sync brings tensors in step.
assert "self.sync" in calls(model["_make_training_ctx"])
assert {"self.get_context_parallel_group", "broadcast"} <= set(calls(model["sync"]))
assert ast.unparse(model["_make_training_ctx"].body[-1]) == "return (x0_B_C_T_H_W, condition, uncondition)"

# The trainer sums a closure's losses, accumulates batches by dividing, and says so after each optimizer step.
step = ast.unparse(trainer["training_step"])
assert "loss_i.sum() / self.config.trainer.grad_accum_iter" in step
assert "for name, closure, is_last_closure in closures_iter" in step
assert "model.on_before_zero_grad" in calls(trainer["training_step"])

# Sharded training shards the networks, not the model around them: the cache stays whole on each rank.
assert "fully_shard" in calls(model["build_net"])
assert not any("fully_shard" in calls(node) for name, node in model.items() if name != "build_net")

# Weights are drawn from a checkpoint by the prefix net_ema., so its avd.* is left behind.
assert "startswith('net_ema.')" in ast.unparse(ast.parse(Path("scripts/dcp_to_pth.py").read_text()))
print(json.dumps({}))
