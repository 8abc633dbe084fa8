"""VBench-2.0's own code finds the videos of a folder, and writes results of them.

Stood in for: what its module of helpers imports and the two functions that run here do not call, its models, and the
function that would download them.
"""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

scratch, folder, results = map(Path, sys.argv[1:])
sys.path.insert(0, "VBench-2.0")
for name in ("cv2", "decord", "gdown", "scenedetect", "scenedetect.detectors", "torchvision", "torchvision.io",
             "torchvision.transforms"):  # fmt: skip
    sys.modules[name] = mock.MagicMock()

import vbench2  # noqa: E402
from vbench2.utils import load_dimension_info  # noqa: E402


def compute_instance_preservation(info: str, *_: Any, **__: Any) -> tuple[float, list[dict[str, Any]]]:
    """As its own, with a model that finds a fault in every third video."""
    videos, _ = load_dimension_info(info, dimension="instance_preservation", lang="en")
    judged = [{"video_path": path, "video_results": float(place % 3 > 0)} for place, path in enumerate(videos)]
    return sum(each["video_results"] for each in judged) / len(judged), judged


module = ModuleType("vbench2.instance_preservation")
module.compute_instance_preservation = compute_instance_preservation
sys.modules[module.__name__] = module
vbench2.init_submodules = lambda dimensions, **_: dict.fromkeys(dimensions)

suite = vbench2.VBench2("cpu", "VBench-2.0/vbench2/VBench2_full_info.json", str(results))
counts = {}
for dimension in suite.build_full_dimension_list():
    # It raises where one is missing; the last of more than one for a prompt are Diversity's.
    info = suite.build_full_info_json(str(folder / dimension), f"names-{dimension}", [dimension])
    found, _ = load_dimension_info(info, dimension=dimension.lower(), lang="en")
    assert {Path(path).name for path in found} == {path.name for path in (folder / dimension).iterdir()}, dimension
    counts[dimension] = len(found)
suite.evaluate(str(folder / "Instance_Preservation"), "tiny", dimension_list=["Instance_Preservation"])

# What we say of its detector, which needs its models to be imported.
source = Path("VBench-2.0/vbench2/third_party/Instance_detector/test.py").read_text()
for words in (
    "model_name = video_paths[0].split('/')[-3]",
    "for idx in range(int(video_length)-1):",
    "_clip_{idx:04d}.mp4",
    'print(f"Error processing video: {clip_path}")',
    "output_text = 'no'",
):
    assert words in source, words
print(json.dumps(counts))
