"""Arrow types of columns: the one that stands for all alike, and their names in plain words."""

from __future__ import annotations

import pyarrow as pa


def is_list(type_: pa.DataType) -> bool:
    """Whether each value of a column is a list."""
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def plain_type(type_: pa.DataType) -> pa.DataType | None:
    """Return the one type that stands for all alike, so that formats give the same table; None where there is none."""
    types = pa.types
    if types.is_dictionary(type_):
        return plain_type(type_.value_type)
    if types.is_integer(type_):
        return pa.int64()
    if types.is_floating(type_) or types.is_decimal(type_):
        return pa.float64()
    text_like = types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_)
    if text_like or types.is_boolean(type_) or types.is_null(type_):
        return pa.string()
    if is_list(type_):
        inner = plain_type(type_.value_type)
        return None if inner is None or types.is_list(inner) else pa.list_(inner)
    return None


def describe_type(type_: pa.DataType) -> str:
    """Return a column's type in plain words."""
    types = pa.types
    if types.is_dictionary(type_):
        return describe_type(type_.value_type)
    if is_list(type_):
        return f"lists of {describe_type(type_.value_type)}"
    words = {
        "whole numbers": types.is_integer(type_),
        "numbers": types.is_floating(type_) or types.is_decimal(type_),
        "true and false": types.is_boolean(type_),
        "nested objects": types.is_struct(type_) or types.is_map(type_),
        "bytes": types.is_binary(type_) or types.is_large_binary(type_),
        "text": plain_type(type_) == pa.string(),
    }
    return next((word for word, fits in words.items() if fits), f"values of the type {type_}")
