"""VBench's own code finds the videos of a list, judges some on a CPU, and writes its results.

Stood in for: torchvision's operators, which nothing here runs, and RAFT's weights by random ones.
"""

import json
import os
import sys
from pathlib import Path

import torch
from easydict import EasyDict

from without_gpu import declare_torchvision_operators

scratch, info, listed, videos, results = map(Path, sys.argv[1:])
os.environ["VBENCH_CACHE_DIR"] = str(scratch / "cache")
declare_torchvision_operators()

import vbench  # noqa: E402
from vbench.third_party.RAFT.core.raft import RAFT  # noqa: E402
from vbench.utils import load_dimension_info  # noqa: E402

RAFT_OPTIONS = {"small": False, "mixed_precision": False, "alternate_corr": False}


def found(suite: vbench.VBench, folder: Path, dimension: str) -> set[str]:
    """Files in which it sees a dimension's videos."""
    judged, _ = load_dimension_info(suite.build_full_info_json(str(folder), "names", [dimension]), dimension, "en")
    return {Path(path).name for path in judged}


# All of its prompts, by its own file: what we call videos is what it looks for, up to the fifth of each prompt.
names, empty = json.loads(listed.read_text()), scratch / "names"
empty.mkdir()
for video in names:
    (empty / Path(video["file"]).name).touch()
whole = vbench.VBench("cpu", str(Path(vbench.__file__).with_name("VBench_full_info.json")), str(scratch / "found"))
dimensions = whole.build_full_dimension_list()
for dimension in dimensions:
    ours = {Path(video["file"]).name for video in names if dimension in video["dimensions"] and video["number"] < 5}
    assert found(whole, empty, dimension) == ours, dimension
    assert len(ours) >= 72 * 5 - 10, dimension  # two of its prompts are there twice

weights = scratch / "cache" / "raft_model" / "models" / "raft-things.pth"
weights.parent.mkdir(parents=True)
torch.manual_seed(0)
raft = RAFT(EasyDict(RAFT_OPTIONS))
torch.save({f"module.{name}": tensor for name, tensor in raft.state_dict().items()}, weights)
judge = vbench.VBench(torch.device("cpu"), str(info), str(results))
judge.evaluate(str(videos), "tiny", dimension_list=["temporal_flickering", "dynamic_degree"])
print(json.dumps({"dimensions": len(dimensions), "videos": len(names)}))
