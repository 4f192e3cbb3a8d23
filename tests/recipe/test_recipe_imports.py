"""Reading a recipe stays light, so that commands answer at once."""

import json
import subprocess
import sys

SCRIPT = """
import json, sys
import orchestrator.recipe
heavy = ["torch", "ray", "transformers", "datasets", "numpy", "pyarrow", "sklearn", "deepspeed", "peft", "accelerate"]
print(json.dumps([name for name in heavy if name in sys.modules]))
"""


def test_recipes_load_without_torch_ray_or_other_heavy_packages() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True, text=True)
    assert json.loads(done.stdout) == []
