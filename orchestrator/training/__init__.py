"""Training: the engine, the loop and its hooks, checkpoints, evaluation, the Ray Train worker, use of the result."""

import os

# An OpenMP thread that waits for another one spins, by default without end, which on a machine with other work keeps
# off the core the very thread it waits for: steps were seen to take 20 times as long. So it sleeps after a short while.
# Must be set before torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
