"""Where examples come from: files, folders and the Hub; their fields, splits, checks and cache. No torch."""

from orchestrator.data.cache import cache_folder, cached_table, content_key
from orchestrator.data.checks import check_class_labels, check_regression_targets, check_sizes
from orchestrator.data.examples import Examples
from orchestrator.data.fields.columns import Column
from orchestrator.data.fields.images import without_bytes
from orchestrator.data.fields.labels import encode_labels, encode_targets, find_label_names
from orchestrator.data.messages import show_value
from orchestrator.data.overlap import check_conflicting_labels, check_overlap
from orchestrator.data.sources import open_file, open_files, open_splits, open_values, rename_columns
from orchestrator.data.splits import cut_missing_splits, limit_examples

__all__ = [
    "Column",
    "Examples",
    "cache_folder",
    "cached_table",
    "check_class_labels",
    "check_conflicting_labels",
    "check_overlap",
    "check_regression_targets",
    "check_sizes",
    "content_key",
    "cut_missing_splits",
    "encode_labels",
    "encode_targets",
    "find_label_names",
    "limit_examples",
    "open_file",
    "open_files",
    "open_splits",
    "open_values",
    "rename_columns",
    "show_value",
    "without_bytes",
]
