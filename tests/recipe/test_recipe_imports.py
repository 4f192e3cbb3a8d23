"""Reading a recipe stays light, so that commands answer at once."""

import json
import subprocess
import sys

SCRIPT = """
import json, sys, time
start = time.perf_counter()
import orchestrator.recipe
seconds = time.perf_counter() - start
heavy = ["torch", "ray", "transformers", "datasets", "numpy", "pyarrow", "sklearn", "deepspeed", "peft", "accelerate"]
print(json.dumps({"loaded": [name for name in heavy if name in sys.modules], "seconds": seconds}))
"""


def test_recipes_load_without_torch_or_ray_in_under_a_second() -> None:
    found = json.loads(
        subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True, text=True).stdout
    )
    assert found["loaded"] == []
    assert found["seconds"] < 1
