"""The run directory: records, metrics, checkpoints and progress, on a disk or in an object store."""
