"""The recipes by name. A recipe is a module with a subclass of `Settings` or `SupervisedSettings`, named like it."""

import difflib
import importlib
import pkgutil
from dataclasses import MISSING, fields
from typing import Any

import whorl.recipes
from whorl.experiments.plan import Experiment
from whorl.settings import AnySettings, Settings


def recipe_names() -> tuple[str, ...]:
    """Modules of this folder, sorted."""
    names = (module.name for module in pkgutil.iter_modules(whorl.recipes.__path__))
    return tuple(sorted(name for name in names if name != "catalog"))


def recipe_named(name: str) -> type[AnySettings]:
    """The settings class of a recipe; ValueError that names the nearest if there is none."""
    if name not in recipe_names():
        near = difflib.get_close_matches(name, recipe_names(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown recipe {name!r}; {hint}The recipes are {', '.join(recipe_names())}")
    module = importlib.import_module(f"whorl.recipes.{name}")
    return getattr(module, "".join(word.capitalize() for word in name.split("_")))


def one_line(name: str) -> str:
    """The first line of the recipe's module."""
    recipe_named(name)
    return (importlib.import_module(f"whorl.recipes.{name}").__doc__ or "").partition("\n")[0]


def experiments_of(name: str) -> tuple[Experiment, ...]:
    """What the recipe compares; nothing if it lists no `EXPERIMENTS`. ValueError if there is no such recipe."""
    recipe_named(name)
    return getattr(importlib.import_module(f"whorl.recipes.{name}"), "EXPERIMENTS", ())


def recipes_with_experiments() -> dict[str, tuple[type[Settings], tuple[Experiment, ...]]]:
    """The recipes that compare something, by name: settings and experiments."""
    found = {}
    for name in recipe_names():
        settings, experiments = recipe_named(name), experiments_of(name)
        if experiments and issubclass(settings, Settings):
            found[name] = (settings, experiments)
    return found


def default_settings(name: str) -> AnySettings:
    """The settings of a recipe as it stands; ValueError if there is no such recipe."""
    recipe = recipe_named(name)
    # What a recipe has no default for, the user's data, is shown by its name.
    open_fields = (f.name for f in fields(recipe) if f.default is f.default_factory is MISSING)
    given: dict[str, Any] = {field: field.upper() for field in open_fields}
    return recipe(**given)
