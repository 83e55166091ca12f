"""The recipes by name. A recipe is a module with a subclass of `Settings` or `SupervisedSettings`, named like it."""

import difflib
import importlib
import pkgutil

import whorl.recipes
from whorl.settings import AnySettings


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
