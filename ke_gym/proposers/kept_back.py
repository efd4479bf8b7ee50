"""What a task file says of some names, found in its syntax tree, so that the rest can be told without it."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Sequence

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def changes(tree: ast.Module, names: Collection[str]) -> list[tuple[ast.stmt, str]]:
    """The top-level statements that give ``names`` a value or change it, in order, each with what is left of it
    ("": nothing). Assignments that only these read are among them."""
    names, left = set(names), dict[ast.stmt, str]()
    while True:
        for node in tree.body:
            rest = _rest(node, names)
            if rest is not node:
                left[node] = ast.unparse(rest) if rest else ""
        needed = _read(node if node not in left else ast.parse(left[node]) for node in tree.body)
        more = _read(left) - needed - names
        if not more & {name for node in tree.body for name in _bound(node)}:
            return [(node, left[node]) for node in tree.body if node in left]
        names |= more


def _rest(node: ast.stmt, names: set[str]) -> ast.stmt | None:
    """The statement without what it does to ``names``: itself if that is nothing, None if that is all."""
    if isinstance(node, ast.Assign):
        return _assignment(node, names)
    if isinstance(node, _FUNCTIONS):
        own = {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)}
        shared = {n for part in ast.walk(node) if isinstance(part, ast.Global) for n in part.names}
        own |= {
            n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        } - shared
        return None if any(_changed(part, names - own) for part in node.body) else node
    if isinstance(node, ast.ClassDef):
        return node
    bodies = [field for field in ("body", "orelse", "finalbody", "handlers") if getattr(node, field, None)]
    if not bodies or not _changed(node, names):
        return None if _changed(node, names) else node
    kept: dict[str, list[ast.stmt]] = {}
    for field in bodies:
        if field == "handlers":
            continue
        parts = [_rest(part, names) for part in getattr(node, field)]
        kept[field] = [part for part in parts if part is not None]
    if not any(kept.values()):
        return None
    fields = {name: kept.get(name, value) for name, value in ast.iter_fields(node)}
    fields["body"] = fields["body"] or [ast.Pass()]
    made = type(node)(**fields)
    return None if _changed(made, names) else ast.copy_location(made, node)


def _assignment(node: ast.Assign, names: set[str]) -> ast.stmt | None:
    if not _changed(node, names):
        return node
    if _changed(node.value, names):
        return None
    target, value = node.targets[0], node.value
    sequences = (ast.Tuple, ast.List)
    if len(node.targets) == 1 and isinstance(target, sequences) and isinstance(value, sequences):
        starred = any(isinstance(part, ast.Starred) for part in (*target.elts, *value.elts))
        if len(target.elts) != len(value.elts) or starred:
            return None
        pairs = [(t, v) for t, v in zip(target.elts, value.elts) if not _changed(t, names)]
        if len(pairs) <= 1:
            return ast.copy_location(ast.Assign([pairs[0][0]], pairs[0][1]), node) if pairs else None
        into = ast.Tuple([t for t, _ in pairs], ast.Store())
        return ast.copy_location(ast.Assign([into], ast.Tuple([v for _, v in pairs], ast.Load())), node)
    targets = [t for t in node.targets if not _changed(t, names)]
    return ast.copy_location(ast.Assign(targets, value), node) if targets else None


def _changed(node: ast.AST, names: set[str]) -> bool:
    """Whether a statement or a target binds one of the names, changes what it holds, or hands it to a call whose
    result it does not keep."""
    for part in _walk(node):
        if isinstance(part, ast.Name) and part.id in names and not isinstance(part.ctx, ast.Load):
            return True
        if isinstance(part, ast.Subscript | ast.Attribute):
            found = not isinstance(part.ctx, ast.Load) and _root(part) in names
        elif isinstance(part, ast.Call):
            found = isinstance(part.func, ast.Attribute) and _root(part.func) in names
        else:
            found = isinstance(part, ast.Expr) and bool(_read([part]) & names)
        if found:
            return True
    return False


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """The node and what is below it in the same scope."""
    left = [node]
    while left:
        part = left.pop()
        yield part
        left += [child for child in ast.iter_child_nodes(part) if not isinstance(child, _SCOPES)]


def _root(node: ast.AST) -> str:
    """The name at the start of ``a.b["c"].d``."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _read(nodes: Iterator[ast.AST] | Sequence[ast.AST] | dict[ast.stmt, str]) -> set[str]:
    return {
        part.id
        for node in nodes
        for part in ast.walk(node)
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)
    }


def _bound(node: ast.stmt) -> set[str]:
    """The names that a plain assignment gives a value."""
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return set()
    return {p.id for p in _walk(node) if isinstance(p, ast.Name) and isinstance(p.ctx, ast.Store)}
