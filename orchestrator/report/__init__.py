"""A run or search directory as one HTML page that opens without a network."""

from orchestrator.report.write import write_report

__all__ = ["write_report"]
