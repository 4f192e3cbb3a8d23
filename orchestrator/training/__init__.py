"""One worker's part of a run: the engine, the loop and its hooks, evaluation, export."""
