"""Ray Jobs: submit a recipe with its local files to a cluster, follow and stop the job, fetch the run directory."""

from orchestrator.jobs.client import Cluster, Job, connect
from orchestrator.jobs.fetch import fetch
from orchestrator.jobs.submit import submit

__all__ = ["Cluster", "Job", "connect", "fetch", "submit"]
