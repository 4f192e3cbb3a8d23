"""Recipes: read, check and find them. Imports neither torch nor ray."""

from orchestrator.recipe.catalog import ShippedRecipe, find_recipe, shipped_recipes
from orchestrator.recipe.freeze_depth import FreezeDepth, FrozenRange
from orchestrator.recipe.load import dump_recipe, load_recipe, make_paths_absolute, map_paths, parse_recipe
from orchestrator.recipe.origin import Origin
from orchestrator.recipe.paths import resolve_path, show_path
from orchestrator.recipe.reference import json_schema
from orchestrator.recipe.schema import (
    Case,
    Data,
    EarlyStopping,
    Limit,
    Recipe,
    Scale,
    Search,
    Source,
    Split,
    Target,
    Train,
)
from orchestrator.recipe.transfer_schema import Adapter, Head, Phase, Transfer

__all__ = [
    "Adapter",
    "Case",
    "Data",
    "EarlyStopping",
    "FreezeDepth",
    "FrozenRange",
    "Head",
    "Limit",
    "Origin",
    "Phase",
    "Recipe",
    "Scale",
    "Search",
    "ShippedRecipe",
    "Source",
    "Split",
    "Target",
    "Train",
    "Transfer",
    "dump_recipe",
    "find_recipe",
    "json_schema",
    "load_recipe",
    "make_paths_absolute",
    "map_paths",
    "parse_recipe",
    "resolve_path",
    "shipped_recipes",
    "show_path",
]
