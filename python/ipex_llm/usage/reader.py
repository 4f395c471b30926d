"""Reads what the functions of one class do with its parameters.

Every expression that comes from a parameter is followed to where it is consumed: through
assignments, views, calls of functions whose source is there, and methods of self and of children.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import types

from .functions import autograd_reason, is_autograd_function, is_torchs, method_of, parse
from .names import (
    ADDRESSES,
    CONVOLUTIONS,
    ELEMENTWISE_METHODS,
    METADATA,
    METHOD_PRODUCTS,
    PRODUCTS,
    SAME,
)

# What a model runs besides forward when it is called.
_ENTRY_POINTS = ("forward", "__call__")
_MAX_DEPTH = 4  # of calls followed from forward


@dataclasses.dataclass(frozen=True)
class Use:
    """One consumption of a parameter."""

    kind: str  # matrix, lookup, value, unknown; write and address are unsafe
    reason: str
    transposed: bool = False
    called: str = ""  # the attribute of self whose value the parameter is handed to

    @property
    def is_matrix(self) -> bool:
        return self.kind == "matrix"


Found = tuple[tuple[tuple[str, ...], Use], ...]  # (path from self, use)


@functools.lru_cache(maxsize=4096)
def uses_in_class(cls: type, children: tuple[tuple[str, type], ...]) -> Found:
    """What calls of a module do, of class `cls` and with children of these classes."""
    reader = _Reader(cls, dict(children))
    for name in _ENTRY_POINTS:
        function = method_of(cls, name)
        if function is not None and not is_torchs(function):
            (first, *_) = [*inspect.signature(function).parameters, "self"]
            reader.read(function, {first: _Ref(())}, depth=0)
    return tuple(dict.fromkeys(reader.found))


def uses_in_function(
    cls: type, children: tuple[tuple[str, type], ...], function, argument: str
) -> Found:
    """What `function` does with a module of class `cls`, its argument of that name."""
    reader = _Reader(cls, dict(children))
    reader.read(function, {argument: _Ref(())}, depth=0)
    return tuple(reader.found)


@dataclasses.dataclass(frozen=True)
class _Ref:
    """An expression that is self, one of its attributes, or a view of one."""

    path: tuple[str, ...]
    flipped: bool = False  # transposed an odd number of times
    scaled: bool = False  # multiplied by another attribute on the way


class _Reader:
    def __init__(self, cls: type, children: dict[str, type]):
        self.cls = cls
        self.children = children
        self.found: list[tuple[tuple[str, ...], Use]] = []
        self._read: set = set()

    def read(self, function, bound: dict[str, _Ref], depth: int) -> tuple[_Ref, ...]:
        """Reads one function with some arguments bound; returns what its result may be."""
        key = (getattr(function, "__code__", function), tuple(sorted(bound.items(), key=str)))
        if key in self._read or depth > _MAX_DEPTH:
            return ()
        self._read.add(key)
        tree = parse(function)
        if tree is None:
            for ref in bound.values():
                self.record(
                    ref, "unknown", f"used by {function.__qualname__}, whose source is missing"
                )
            return ()
        body = _Body(self, function, dict(bound), depth)
        body.visit_all(tree.body)
        return tuple(dict.fromkeys(body.returned))

    def record(self, ref: _Ref, kind: str, reason: str, transposed=False, called="") -> None:
        if ref.path:
            self.found.append((ref.path, Use(kind, reason, transposed, called)))


class _Body(ast.NodeVisitor):
    """Walks the statements of one function in order; branches are all taken."""

    def __init__(self, reader: _Reader, function, env: dict, depth: int):
        self.reader = reader
        self.function = function
        self.env: dict[str, tuple[_Ref, ...]] = {name: (ref,) for name, ref in env.items()}
        self.depth = depth
        self.returned: list[_Ref] = []

    def visit_all(self, statements) -> None:
        for statement in statements:
            self.visit(statement)

    # ---- statements

    def visit_Assign(self, node):
        refs = self.value(node.value)
        for target in node.targets:
            self.bind(target, refs)

    def visit_AnnAssign(self, node):
        if node.value is not None:
            self.bind(node.target, self.value(node.value))

    def visit_AugAssign(self, node):
        target = self.value(node.target)
        if isinstance(node.target, ast.Attribute | ast.Subscript):
            for ref in target:
                self.write(ref, "changes it in place")
        self.consume(node.value)
        if isinstance(node.target, ast.Name) and isinstance(node.op, ast.Add | ast.Sub):
            for ref in target:
                if ref.path:
                    self.write(ref, "changes it in place")

    def visit_For(self, node):
        self.bind(node.target, _items(self.value(node.iter)))
        self.visit_all(node.body)
        self.visit_all(node.orelse)

    def visit_Return(self, node):
        if node.value is None:
            return
        values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        for value in values:
            self.returned += self.value(value)

    def visit_Expr(self, node):
        self.value(node.value)

    def visit_Delete(self, node):
        pass

    def visit_FunctionDef(self, node):
        self.visit_all(node.body)  # closures see our names

    def visit_With(self, node):
        for item in node.items:
            self.value(item.context_expr)
        self.visit_all(node.body)

    def visit_If(self, node):
        self.consume(node.test, kind=None)
        self.visit_all(node.body)
        self.visit_all(node.orelse)

    def visit_While(self, node):
        self.visit_If(node)

    def visit_Assert(self, node):
        self.value(node.test)

    def visit_Raise(self, node):
        pass

    def bind(self, target, refs) -> None:
        if isinstance(target, ast.Name):
            self.env[target.id] = refs
        elif isinstance(target, ast.Tuple | ast.List):
            for element in target.elts:
                self.bind(element, refs)
        elif isinstance(target, ast.Starred):
            self.bind(target.value, refs)
        elif isinstance(target, ast.Attribute):
            for ref in self.value(target.value):
                if target.attr == "data":
                    self.write(ref, "assigns its data")
                else:
                    self.write(
                        dataclasses.replace(ref, path=(*ref.path, target.attr)), "assigns it"
                    )
        elif isinstance(target, ast.Subscript):
            for ref in self.value(target.value):
                self.write(ref, "assigns to its elements")

    def write(self, ref: _Ref, how: str) -> None:
        self.reader.record(
            ref, "write", f"{self.reader.cls.__name__}.{self.function.__name__} {how}"
        )

    # ---- expressions

    def consume(self, node, kind: str | None = "value", reason: str = "") -> None:
        """The value of `node` goes somewhere that is no matrix product."""
        for ref in self.value(node):
            if kind is not None:
                self.reader.record(ref, kind, reason or _VALUE_REASON)

    def product(self, node, transposed: bool) -> None:
        for ref in self.value(node):
            self.reader.record(ref, "matrix", _MATRIX_REASON, transposed=transposed != ref.flipped)

    def value(self, node) -> tuple[_Ref, ...]:
        """What `node` may refer to; consumptions inside it are recorded on the way."""
        if node is None:
            return ()
        method = getattr(self, f"value_{type(node).__name__}", None)
        if method is not None:
            return method(node)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.consume(child)
            elif isinstance(child, ast.comprehension):
                self.bind(child.target, _items(self.value(child.iter)))
        return ()

    def value_Name(self, node):
        return self.env.get(node.id, ())

    def value_Constant(self, node):
        return ()

    def value_Attribute(self, node):
        refs = self.value(node.value)
        if node.attr in METADATA:
            return ()
        if node.attr in ("T", "mT", "H", "mH"):
            return tuple(dataclasses.replace(r, flipped=not r.flipped) for r in refs)
        if node.attr == "data":
            return refs
        getter = inspect.getattr_static(self.reader.cls, node.attr, None)
        if isinstance(getter, property) and any(not ref.path for ref in refs):
            function = inspect.unwrap(getter.fget)
            if is_torchs(function):
                return ()
            (first, *_) = inspect.signature(function).parameters
            return self.reader.read(function, {first: _Ref(())}, self.depth + 1)
        if node.attr in ADDRESSES:
            for ref in refs:
                self.reader.record(ref, "address", self._reads_address())
            return ()
        return tuple(dataclasses.replace(r, path=(*r.path, node.attr)) for r in refs)

    def value_Subscript(self, node):
        self.consume(node.slice)
        return _items(self.value(node.value))

    def value_Slice(self, node):
        for part in (node.lower, node.upper, node.step):
            self.consume(part)
        return ()

    def value_IfExp(self, node):
        self.consume(node.test, kind=None)
        return self.value(node.body) + self.value(node.orelse)

    def value_NamedExpr(self, node):
        refs = self.value(node.value)
        self.bind(node.target, refs)
        return refs

    def value_BoolOp(self, node):
        return tuple(ref for value in node.values for ref in self.value(value))

    def value_Compare(self, node):
        # `self.w is None` asks for existence; other comparisons look at values.
        identity = all(isinstance(op, ast.Is | ast.IsNot | ast.In | ast.NotIn) for op in node.ops)
        for operand in (node.left, *node.comparators):
            self.consume(operand, kind=None if identity else "value")
        return ()

    def value_BinOp(self, node):
        if isinstance(node.op, ast.MatMult):
            self.product(node.left, transposed=False)
            self.product(node.right, transposed=True)
            return ()
        left, right = self.value(node.left), self.value(node.right)
        constant = isinstance(node.left, ast.Constant) or isinstance(node.right, ast.Constant)
        if isinstance(node.op, ast.Mult | ast.Div) and (constant or (left and right)):
            # A weight rescaled by a constant or another parameter is still a weight: what decides
            # is where the result goes. Multiplied with an activation it is a gate.
            return tuple(dataclasses.replace(r, scaled=True) for r in left + right)
        for ref in left + right:
            self.reader.record(ref, "value", _VALUE_REASON)
        return ()

    def value_Tuple(self, node):
        return tuple(ref for element in node.elts for ref in self.value(element))

    value_List = value_Tuple

    def value_Starred(self, node):
        return self.value(node.value)

    def value_Lambda(self, node):
        self.consume(node.body)
        return ()

    def value_Call(self, node):
        if isinstance(node.func, ast.Attribute):
            refs = self.value(node.func.value)
            if any(ref.path for ref in refs):
                return self._method_of_parameter(node, refs)
            if refs:
                return self._method_of_self(node)
        return self._function(node)

    def _method_of_parameter(self, node, refs):
        """self.w.method(...), or self.child(...) and self.child.method(...)."""
        name = node.func.attr
        if name in METADATA:
            return ()
        if name in METHOD_PRODUCTS:
            for ref in refs:
                self.reader.record(ref, "matrix", _MATRIX_REASON, transposed=ref.flipped)
            for argument in node.args:
                self.product(argument, transposed=True)
            return ()
        if name in ADDRESSES:
            for ref in refs:
                self.reader.record(ref, "address", self._reads_address())
            return ()
        if name in SAME or name == "dequantize":
            for argument in node.args:
                self.consume(argument)
            return refs
        if name in ("t", "transpose", "permute", "swapaxes", "adjoint"):
            return tuple(dataclasses.replace(r, flipped=not r.flipped) for r in refs)
        if name.endswith("_") and not name.startswith("_") and name != "requires_grad_":
            for ref in refs:
                self.write(ref, f"changes it in place ({name})")
            return ()
        # A method of a child module or of a container: its arguments are followed no further.
        for argument in (*node.args, *(k.value for k in node.keywords)):
            self.consume(argument)
        for ref in refs:
            if name in ELEMENTWISE_METHODS:
                self.reader.record(ref, "value", _VALUE_REASON)
            elif name in ("items", "values", "get", "parameters"):
                return _items(refs)
        return tuple(dataclasses.replace(r, path=(*r.path, name)) for r in refs if name == "weight")

    def _method_of_self(self, node):
        """self.method(...), or self.child(...)."""
        function, first = method_of(self.reader.cls, node.func.attr), _Ref(())
        if function is None and node.func.attr in self.reader.children:
            function = method_of(self.reader.children[node.func.attr], "forward")
            first = _Ref((node.func.attr,))
        if function is None or is_torchs(function):
            called = node.func.attr
            for argument in (*node.args, *(k.value for k in node.keywords)):
                for ref in self.value(argument):
                    self.reader.record(ref, "unknown", f"passed to self.{called}()", called=called)
            return ()
        return self._follow(function, node, first=first)

    def _function(self, node):
        """torch functions by name; others are read."""
        target, name = self._resolve(node.func)
        arguments = [*enumerate(node.args), *((k.arg, k.value) for k in node.keywords)]
        if name == "einsum":
            self._einsum(node)
            return ()
        if name in PRODUCTS and not isinstance(target, types.FunctionType):
            return self._call_products(name, arguments)
        if name in PRODUCTS and is_torchs(target):
            return self._call_products(name, arguments)
        if name in CONVOLUTIONS:
            for place, argument in arguments:
                for ref in self.value(argument):
                    kind = "unknown" if place in (1, "weight") else "value"
                    self.reader.record(ref, kind, "the kernel of a functional convolution")
            return ()
        if name in ("transpose", "permute", "t", "swapaxes"):
            refs = self.value(node.args[0]) if node.args else ()
            return tuple(dataclasses.replace(r, flipped=not r.flipped) for r in refs)
        if name in SAME:
            return tuple(ref for _, argument in arguments for ref in self.value(argument))
        if name in ("isinstance", "hasattr", "type", "len", "id", "print", "getattr", "range"):
            return ()
        if name in ("zip", "enumerate", "reversed", "list", "tuple", "cast"):
            return tuple(ref for _, argument in arguments for ref in self.value(argument))
        if name == "embedding":
            for place, argument in arguments:
                self.consume(
                    argument, "lookup" if place in (1, "weight") else "value", "a look-up table"
                )
            return ()
        if name == "apply" and is_autograd_function(target):
            for _, argument in arguments:
                self.consume(argument, "address", autograd_reason(target))
            return ()
        if isinstance(target, types.FunctionType) and not is_torchs(target):
            return self._follow(target, node)
        for _, argument in arguments:
            if target is None:
                called = ast.unparse(node.func)
                self.consume(argument, "unknown", f"passed to {called}(), which was not followed")
            else:
                self.consume(argument)
        return ()

    def _call_products(self, name, arguments):
        places = PRODUCTS[name]
        for place, argument in arguments:
            if place in places:
                self.product(argument, transposed=places[place])
            else:
                self.consume(argument)
        return ()

    def _follow(self, function, node, first: _Ref | None = None):
        """Reads a called function with our references bound to its parameters."""
        function = inspect.unwrap(function)
        try:
            names = list(inspect.signature(function).parameters)
        except (TypeError, ValueError):
            names = []
        values = ([(first,)] if first is not None else []) + [self.value(a) for a in node.args]
        pairs = list(zip(names, values, strict=False))
        pairs += [(k.arg, self.value(k.value)) for k in node.keywords if k.arg is not None]
        bound: dict[str, _Ref] = {}
        for name, refs in pairs:
            for ref in refs:
                bound.setdefault(name, ref)
        if not bound:
            return ()
        return self.reader.read(function, bound, self.depth + 1)

    def _einsum(self, node) -> None:
        equation = (
            node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
        )
        operands = node.args[1:]
        if not isinstance(equation, str):
            for operand in operands:
                self.product(operand, transposed=False)
            return
        inputs, arrow, output = equation.replace(" ", "").partition("->")
        if not arrow:  # by convention: the labels that occur once
            output = "".join(label for label in inputs if inputs.count(label) == 1)
        for labels, operand in zip(inputs.split(","), operands, strict=False):
            last_is_summed = bool(labels) and labels[-1] not in output
            before_is_summed = len(labels) > 1 and labels[-2] not in output
            self.product(operand, transposed=before_is_summed and not last_is_summed)

    def _resolve(self, func) -> tuple[object, str]:
        """(the object that an expression names, its last name); the object is None if unknown."""
        name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
        try:
            return eval(  # of dotted names alone, in the globals they were written in
                compile(ast.Expression(_dotted(func)), "<name>", "eval"),
                {**self.function.__globals__, **_closure(self.function)},
            ), name
        except Exception:
            return None, name

    def _reads_address(self) -> str:
        return f"{self.reader.cls.__name__}.{self.function.__name__} reads its memory by address"


def _items(refs: tuple[_Ref, ...]) -> tuple[_Ref, ...]:
    """Elements of what `refs` may be."""
    return tuple(dataclasses.replace(ref, path=(*ref.path, "*")) for ref in refs)


_MATRIX_REASON = "multiplied as a matrix"
_VALUE_REASON = "added, multiplied or looked up by element, not used as a matrix"


def _dotted(node):
    if isinstance(node, ast.Attribute):
        _dotted(node.value)
        return node
    if isinstance(node, ast.Name):
        return node
    raise ValueError("not a dotted name")


def _closure(function) -> dict:
    try:
        return dict(inspect.getclosurevars(function).nonlocals)
    except (TypeError, ValueError):
        return {}
