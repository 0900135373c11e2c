"""Imports inside the package run downwards, and no module's name can be taken for another's."""

import ast
import collections
import pathlib
import sys

import pytest

import gemfilter_jax

LAYERS = (
    ("errors", "compile_cache", "files", "buckets", "calls", "timing", "config", "precision", "settings"),
    ("parallel",),
    ("pallas_kernels",),
    ("ops",),
    ("models",),
    ("text",),
    ("generate",),
    ("checkpoints",),
    ("methods",),
    ("pipeline", "results"),
    ("evals", "planning"),
    ("serving",),
    ("reporting",),
    ("cli",),
)
"""Modules and folders of the package, lowest first. A module imports its own layer and those below."""

COMMANDS = "cli"  # modules here are named by what the user types

ROOT = pathlib.Path(gemfilter_jax.__file__).parent
PATHS = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
MODULES = sorted(PATHS.keys() - {"gemfilter_jax"})  # the package's own file only names what others hold


def layer_of(name: str) -> int | None:
    """The layer of a dotted name inside the package, by its longest prefix in LAYERS; None if it has none."""
    numbers = {f"gemfilter_jax.{part}": number for number, parts in enumerate(LAYERS) for part in parts}
    while name and name not in numbers:
        name = name.rpartition(".")[0]
    return numbers.get(name)


def imported(node: ast.AST, package: str) -> set[str]:
    """The dotted names that a module of `package` imports at run time; `from a import b` gives a.b."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
        start = ".".join([*above, node.module] if node.module else above)
        return {f"{start}.{alias.name}" for alias in node.names}
    children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        children = node.orelse
    return {name for child in children for name in imported(child, package)}


def upward_imports(module: str, source: str) -> list[str]:
    """The package's names that a module's source imports from a layer above its own, or from none."""
    package = module if PATHS[module].name == "__init__.py" else module.rpartition(".")[0]
    own = [name for name in imported(ast.parse(source), package) if name.split(".")[0] == "gemfilter_jax"]
    home = layer_of(module)
    return sorted(name for name in own if (layer := layer_of(name)) is None or home is None or layer > home)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module: str):
    assert upward_imports(module, PATHS[module].read_text()) == []


def test_every_module_has_a_layer_and_every_layer_modules():
    assert [module for module in MODULES if layer_of(module) is None] == []
    assert [part for parts in LAYERS for part in parts if f"gemfilter_jax.{part}" not in PATHS] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from gemfilter_jax import pipeline", ["gemfilter_jax.pipeline"]),
        ("from gemfilter_jax.models.cache import KVCache", ["gemfilter_jax.models.cache.KVCache"]),
        ("import gemfilter_jax.cli.main as main", ["gemfilter_jax.cli.main"]),
        ("from ..generate import sampling", ["gemfilter_jax.generate.sampling"]),
        ("def late():\n    from gemfilter_jax.text import prompt", ["gemfilter_jax.text.prompt"]),
        ("try:\n    import gemfilter_jax.evals\nexcept ImportError:\n    pass", ["gemfilter_jax.evals"]),
        ("from gemfilter_jax import load", ["gemfilter_jax.load"]),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from gemfilter_jax import pipeline", []),
        ("from gemfilter_jax.parallel import sharding\nfrom . import dispatch\nimport jax", []),
    ],
)
def test_an_upward_import_is_found(source: str, found: list[str]):
    assert upward_imports("gemfilter_jax.ops.key_scores", source) == found


def test_no_module_is_named_as_a_library():
    libraries = set(sys.stdlib_module_names) | {"requests"}  # the latter comes with other libraries
    for module in MODULES:
        package = module.rpartition(".")[0]
        libraries |= {name.split(".")[0] for name in imported(ast.parse(PATHS[module].read_text()), package)}
    libraries.remove("gemfilter_jax")
    named_so = [module for module in MODULES if module.rpartition(".")[2] in libraries]
    assert [module for module in named_so if module.split(".")[1] != COMMANDS] == []


def test_no_names_of_modules_differ_by_an_underscore_only():
    spellings = collections.defaultdict(set)
    for module in MODULES:
        name = module.rpartition(".")[2]
        spellings[name.replace("_", "")].add(name)
    assert [names for names in spellings.values() if len(names) > 1] == []
