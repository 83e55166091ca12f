"""The recipes by name. A recipe is a module with a subclass of `Settings` or `SupervisedSettings`, named like it."""

import ast
import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

import whorl.recipes
from whorl.experiments.plan import Experiment, changed, named
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


def settings_of(place: str, overrides: Sequence[str] = ()) -> AnySettings:
    """Settings of a recipe, of one of its arms (`recipe:arm`, `recipe:experiment:arm`), with overrides `name=value`.

    ValueError that names the nearest for what there is not.
    """
    name, *rest = place.split(":")
    if len(rest) > 2:
        raise ValueError(f"expected recipe, recipe:arm or recipe:experiment:arm; got {place!r}")
    recipe = recipe_named(name)
    # What a recipe has no default for, the user's data, is shown by its name.
    open_fields = (f.name for f in fields(recipe) if f.default is f.default_factory is MISSING)
    given: dict[str, Any] = {field: field.upper() for field in open_fields}
    settings: AnySettings = recipe(**given)
    if rest:
        experiments = experiments_of(name)
        if len(rest) == 2:
            experiments = (named(rest[0], experiments, f"experiment of {name}"),)
        having = [one for one in experiments if rest[-1] in {arm.name for arm in one.arms}]
        arms = {arm.name: arm for one in experiments for arm in one.arms}
        arm = named(rest[-1], arms.values(), f"arm of {name}")
        settings = changed(next(iter(having[0].budgets.values())), arm.changes)
    changes = {}
    for override in overrides:
        setting, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"expected name=value, such as optimizer.eps=1e-8; got {override!r}")
        try:
            changes[setting.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            changes[setting.strip()] = text.strip()
    return changed(settings, changes)
