"""Fingerprints of the code that a function runs: its module and everything that this imports inside its project.

    code_of("hrs.training.loop:train")

A helper three imports away counts. What does not change what runs does not: comments, docstrings, layout, the order of
functions in a file, the names of files, imports for type checkers, and modules that nothing here imports. Modules of
installed packages are not read: their versions belong in a key of their own.
"""

import ast
import functools
import hashlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hrs.errors import HRSError

# Some releases of CPython (3.11.7 is one) count the depth of all threads' ast.parse in one number: a garbage collection
# that switches threads inside one ends it with a SystemError (python/cpython#106905).
_one_parse_at_a_time = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Module:
    """One file, as far as a fingerprint depends on it."""

    content: str
    """Hash of its syntax tree with placeholders for the modules of the project."""
    imports: tuple[str, ...]
    """Those modules, in the order of the placeholders."""


def code_of(function: str) -> str:
    """Return the fingerprint, 64 hex digits, of the code that ``package.module:name`` runs.

    Raises:
        HRSError: if the module is not a file that can be found.
    """
    module = function.partition(":")[0]
    if _file_of(module) is None:
        raise HRSError(f"the code of {function} cannot be found: is {module.split('.')[0]} a package on the path?")
    return _fingerprint(module)


@functools.cache
def _fingerprint(module: str) -> str:
    known = closure(module)
    # Every round lets a module know of modules one import further away, also around a circle of imports.
    colours = {name: one.content for name, one in known.items()}
    for _ in range(_depth(known, module)):
        colours = {name: _hash(one.content, *(colours[i] for i in one.imports)) for name, one in known.items()}
    return colours[module]


def closure(module: str) -> dict[str, _Module]:
    """Return a module and all that it imports inside its project, directly or not, by name."""
    known: dict[str, _Module] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        if name not in known:
            path = _file_of(name)
            assert path is not None
            known[name] = _read(name, path)
            pending += known[name].imports
    return known


def _depth(known: dict[str, _Module], module: str) -> int:
    """Return the most imports between a module and one of its closure."""
    seen, frontier, depth = {module}, [module], 0
    while frontier := [i for name in frontier for i in known[name].imports if i not in seen]:
        seen.update(frontier)
        depth += 1
    return depth


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@functools.cache
def _read(name: str, path: Path) -> _Module:
    tree = parse_code(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    imports: list[str] = []
    tree.body = list(_without_checks_for_types(tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            _replace_from(node, package, name.split(".")[0], imports)
        elif isinstance(node, ast.Import):
            _replace_import(node, name.split(".")[0], imports)
    _sort_functions(tree)
    return _Module(_hash(ast.unparse(tree)), tuple(imports))


def _without_checks_for_types(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        if not (isinstance(statement, ast.If) and ast.unparse(statement.test).endswith("TYPE_CHECKING")):
            yield statement


def _replace_from(node: ast.ImportFrom, package: str, project: str, imports: list[str]) -> None:
    """Replace the names of the project's modules by placeholders, and note them."""
    base = node.module or ""
    if node.level:
        parents = package.split(".")
        parents = parents[: len(parents) - node.level + 1]
        base = ".".join([*parents, *([node.module] if node.module else [])])
        node.level = 0
    if base.split(".")[0] != project:
        return
    targets = []
    for alias in node.names:
        submodule = f"{base}.{alias.name}"
        targets.append(submodule if _file_of(submodule) is not None else base)
    placeholders = []
    for target in targets:
        if _file_of(target) is not None:
            imports.append(target)
            placeholders.append(str(len(imports)))
    node.module = "_" + "_".join(placeholders)


def _replace_import(node: ast.Import, project: str, imports: list[str]) -> None:
    for alias in node.names:
        if alias.name.split(".")[0] == project and _file_of(alias.name) is not None:
            imports.append(alias.name)
            if alias.asname:
                alias.name = f"_{len(imports)}"


def _sort_functions(tree: ast.Module) -> None:
    """Order neighbouring functions without decorators by name: which of them comes first changes nothing."""

    def key(indexed: tuple[int, ast.stmt]) -> tuple[int, str]:
        return runs[indexed[0]], getattr(indexed[1], "name", "")

    runs, run = [], 0
    for statement in tree.body:
        plain = isinstance(statement, ast.FunctionDef) and not statement.decorator_list
        plain = plain and not statement.args.defaults and not any(statement.args.kw_defaults)  # type: ignore[attr-defined]
        run += not plain
        runs.append(2 * run + (1 if plain else 0))
        run += not plain
    tree.body = [statement for _, statement in sorted(enumerate(tree.body), key=key)]


@functools.cache
def _file_of(module: str) -> Path | None:
    """Return the file of a module that is found as source; None if there is none."""
    parts = module.split(".")
    top = parts[0]
    loaded = sys.modules.get(top)
    roots = [str(Path(p).parent) for p in getattr(loaded, "__path__", [])] or sys.path
    for root in roots:
        base = Path(root or ".", *parts)
        for path in (base / "__init__.py", base.with_suffix(".py")):
            if path.is_file():
                return path
    return None


def parse_code(path: Path) -> ast.Module:
    """Return the syntax tree of a Python file without docstrings."""
    with _one_parse_at_a_time:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [s for s in body if not _is_docstring(s)]  # type: ignore[attr-defined]
    return tree


def _is_docstring(statement: ast.AST) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
