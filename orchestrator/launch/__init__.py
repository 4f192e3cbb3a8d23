"""Run a training on Ray Train workers: clusters, retries, dead workers."""
