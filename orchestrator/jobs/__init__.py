"""Ray Jobs: send a recipe with its local files to a cluster, follow it, stop it, bring the run directory back."""

from orchestrator.jobs.client import Cluster, Job, connect
from orchestrator.jobs.fetch import fetch
from orchestrator.jobs.submit import submit

__all__ = ["Cluster", "Job", "connect", "fetch", "submit"]
