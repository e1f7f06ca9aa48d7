"""Whether a function assigns its names before it uses them, on every path: compilers of whole functions do not ask."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

__all__ = ["find_unassigned"]

Names = set[str] | None
"""The names that are assigned, or None where no path leads."""

_LATER = (ast.FunctionDef, ast.Lambda)
"""What runs at another time."""
_INNER = (*_LATER, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
"""What has names of its own."""


def find_unassigned(
    arguments: list[str], body: list[ast.stmt], turns: Callable[[ast.expr], bool]
) -> ast.Name | ast.stmt | None:
    """Return the first use of a name that some path leaves unassigned, or None.

    Parameters
    ----------
    arguments : list of str
    body : list of ast.stmt
    turns : callable
        Whether a loop over an expression turns at least once.
    """
    stored = {node.id for part in body for node in _own(part) if isinstance(node, ast.Name) and _is_store(node)}
    paths = _Paths(stored, turns)
    paths.block(body, set(arguments))
    return paths.fault


class _Paths:
    def __init__(self, stored: set[str], turns: Callable[[ast.expr], bool]) -> None:
        self.stored, self.turns = stored, turns
        self.fault: ast.Name | ast.stmt | None = None
        self.breaks: list[list[Names]] = []
        self.continues: list[list[Names]] = []

    def block(self, body: list[ast.stmt], names: Names) -> Names:
        """Follow statements from `names`; return what is assigned after them."""
        for statement in body:
            if names is None:
                break
            names = self.follow(statement, set(names))
        return names

    def follow(self, node: ast.stmt, names: set[str]) -> Names:
        match node:
            case ast.If(test=test, body=body, orelse=orelse):
                self.use(test, names)
                return _join(self.block(body, names), self.block(orelse, names))
            case ast.While(test=test, body=body, orelse=orelse):
                self.use(test, names)
                endless = isinstance(test, ast.Constant) and bool(test.value)
                left, _ = self.loop(body, names)
                return _join(self.block(orelse, None if endless else names), *left)
            case ast.For(target=target, iter=iterable, body=body, orelse=orelse):
                self.use(iterable, names)
                left, turned = self.loop(body, names | _stored(target))
                return _join(self.block(orelse, turned if self.turns(iterable) else names), *left)
            case ast.Return(value=value):
                self.use(value, names)
                return None
            case ast.Break():
                self.breaks[-1].append(names)
                return None
            case ast.Continue():
                self.continues[-1].append(names)
                return None
            case ast.AugAssign(target=ast.Name(id=name)) if name not in names:
                self.fault = self.fault or node
        self.use(node, names)
        return names if isinstance(node, ast.AnnAssign) and node.value is None else names | _stored(node)

    def loop(self, body: list[ast.stmt], names: set[str]) -> tuple[list[Names], Names]:
        """Follow a loop's body; return what is assigned at each break, and at the end of a turn."""
        self.breaks.append([])
        self.continues.append([])
        turned = self.block(body, names)
        return self.breaks.pop(), _join(turned, *self.continues.pop())

    def use(self, node: ast.AST | None, names: set[str]) -> None:
        """Look at the names that an expression reads."""
        parts = [] if node is None or isinstance(node, ast.FunctionDef) else list(_own(node, _LATER))
        inner = {name for part in parts if isinstance(part, ast.comprehension) for name in _stored(part.target)}
        for part in parts:
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load) and part.id in self.stored - names - inner:
                self.fault = self.fault or part


def _join(*paths: Names) -> Names:
    found = [names for names in paths if names is not None]
    return set.intersection(*found) if found else None


def _own(node: ast.AST, without: tuple[type, ...] = _INNER) -> Iterator[ast.AST]:
    """Yield a node and what is in it, but not what is in nodes of some kinds."""
    yield node
    if not isinstance(node, without):
        for child in ast.iter_child_nodes(node):
            yield from _own(child, without)


def _is_store(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


def _stored(node: ast.AST) -> set[str]:
    if isinstance(node, ast.FunctionDef):
        return {node.name}
    return {part.id for part in _own(node) if isinstance(part, ast.Name) and _is_store(part)}
