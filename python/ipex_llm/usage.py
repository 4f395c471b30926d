"""How the code of a model uses its parameters, read from the source of its classes.

`nn.Linear` says what its weight is for; a bare `nn.Parameter` does not. It may be a matrix
(`x @ w`, `F.linear(x, w[expert])`, an einsum), a table of positions that is added, a gate that
multiplies, or memory that a custom autograd function reads by address. The first may be packed, the
second and third should not, the last must not. So the forward methods are read, with the functions
they call, and every expression that comes from a parameter is followed to where it is consumed.

This is a reading of the source, not a proof. It errs towards float: what it cannot follow stays
float, with the reason. A parameter it packs wrongly would still compute correctly, from dequantized
values.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import types

import torch
from torch import nn

from ipex_llm.owners import _swap_of

# Where a call's argument is a matrix: function name -> {argument position: transposed}. transposed
# means that the product runs over dimension -2 of the argument (x @ w), not over -1 (F.linear).
_PRODUCTS = {
    "linear": {1: False, "weight": False},
    "matmul": {0: False, 1: True, "other": True},
    "mm": {0: False, 1: True, "mat2": True},
    "bmm": {0: False, 1: True, "mat2": True},
    "addmm": {1: False, 2: True},
    "baddbmm": {1: False, 2: True},
    "grouped_mm": {0: False, 1: True},
    "_grouped_mm": {0: False, 1: True},
    "mv": {0: False},
    "tensordot": {0: False, 1: True},
    "bilinear": {2: False},
    "multi_head_attention_forward": {5: False, 11: False},
}
_METHOD_PRODUCTS = {"matmul", "mm", "bmm", "mv", "__matmul__"}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
# The result is the same matrix to us.
_SAME = {
    "to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach",
    "cuda", "cpu", "unsqueeze", "squeeze", "view", "reshape", "expand", "unbind", "chunk", "split",
    "flatten", "unflatten", "select", "narrow", "index_select", "repeat",
}  # fmt: skip
_METADATA = {
    "shape", "dtype", "device", "ndim", "size", "dim", "numel", "is_floating_point", "is_cuda",
    "requires_grad", "layout", "stride", "is_contiguous", "element_size", "grad", "is_meta",
    "nelement", "is_leaf", "ndimension",
}  # fmt: skip
_ADDRESSES = {"data_ptr", "untyped_storage", "storage", "__cuda_array_interface__"}
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


class Uses:
    """The uses of all parameters of one model, each class read once."""

    def __init__(self, model: nn.Module):
        self._found: dict[int, list[Use]] = {}
        # ids of modules that PEFT trains beside a base layer.
        self.adapters: set[int] = set()
        for module in model.modules():
            # PEFT's layers change the base weight when they merge, which has a way of its own here
            # (convert.merge_adapters), not when they compute.
            for path, use in _uses_in_hooks(module):
                for parameter in _resolve(module, path):
                    self._found.setdefault(id(parameter), []).append(use)
            if self._note_adapters(module) or _is_torchs(type(module)):
                continue
            for path, use in uses_in_module(module):
                use = _of_instance(module, use)
                for parameter in _resolve(module, path):
                    self._found.setdefault(id(parameter), []).append(use)

    def unsafe(self, parameter: torch.Tensor) -> str | None:
        """Why the parameter must stay a plain float tensor, or None."""
        for use in self._found.get(id(parameter), ()):
            if use.kind in ("write", "address"):
                return use.reason
        return None

    def of(self, parameter: torch.Tensor) -> Use | None:
        """The use that decides: a product if there is one, else what stands against it."""
        found = self._found.get(id(parameter), ())
        for kind in ("write", "address", "unknown", "matrix", "lookup", "value"):
            for use in found:
                if use.kind == kind:
                    return use
        return None

    def _note_adapters(self, module: nn.Module) -> bool:
        """Whether `module` is a layer of PEFT; its adapters are noted."""
        names = getattr(type(module), "adapter_layer_names", None)
        if not names or "base_layer" not in module._modules:
            return False
        for name in (*names, *getattr(type(module), "other_param_names", ())):
            child = module._modules.get(name)
            if child is not None and name != "base_layer":
                self.adapters.update(id(m) for m in child.modules())
        return True


def _source_class(cls: type) -> type:
    """The class as its author wrote it: a swapped one has no source of its own."""
    return _swap_of.get(cls, (cls, ()))[0]


def _resolve(module: nn.Module, path: tuple[str, ...]) -> list[torch.Tensor]:
    """The parameters that self.a.b.w means in `module`; '*' stands for any index."""
    places: list = [module]
    for step in path:
        following = []
        for place in places:
            if not isinstance(place, nn.Module):
                if step == "*":  # an index into the parameter itself
                    following.append(place)
                continue
            if step == "*":
                following += [p for p in place._parameters.values() if p is not None]
                following += [m for m in place._modules.values() if m is not None]
                continue
            value = place._parameters.get(step)
            if value is None:
                value = place._modules.get(step)
            if value is not None:
                following.append(value)
        places = following
    return [place for place in places if isinstance(place, torch.Tensor)]


def _of_instance(module: nn.Module, use: Use) -> Use:
    """`use`, seen on one module: `self.product = Product.apply` is an autograd function."""
    target = module.__dict__.get(use.called) if use.called else None
    if not _is_autograd_function(target):
        return use
    return dataclasses.replace(use, kind="address", reason=_autograd_reason(target))


def why_unused(module: nn.Module) -> str:
    """Why nothing is known of how `module` uses a parameter of its own."""
    cls = _source_class(type(module))
    if _is_torchs(cls):
        hooked = module._forward_pre_hooks
        if hooked:
            hook = next(iter(hooked.values()))
            name = getattr(hook, "__qualname__", type(hook).__name__)
            return f"a hook ({name}) computes with it before every call"
        return f"no use found in the code of {cls.__name__}"
    forward = _method(cls, "forward")
    if forward is not None and _parse(forward) is None:
        return f"the source of {cls.__name__}.forward is not available"
    return f"no use found in the code of {cls.__name__}"


def _uses_in_hooks(module: nn.Module) -> list[tuple[tuple[str, ...], Use]]:
    """(path, use) of what hooks on `module` do with its parameters; torch's own are skipped."""
    found = []
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        function = inspect.unwrap(getattr(hook, "__func__", hook))
        if not isinstance(function, types.FunctionType) or _is_torchs(function):
            continue
        names = list(inspect.signature(hook).parameters)
        if names:
            children = {n: _source_class(type(m)) for n, m in module._modules.items() if m}
            reader = _Reader(_source_class(type(module)), children)
            reader.read(function, {names[0]: _Ref(())}, depth=0)
            # Products in a hook are beside the module's own: only what forbids packing counts.
            found += [(path, use) for path, use in reader.found if use.kind in ("write", "address")]
    return found


# ---- reading one class ---------------------------------------------------------------------------


def uses_in_module(module: nn.Module) -> tuple[tuple[tuple[str, ...], Use], ...]:
    """(path from self, use) of everything that the forward of `module` reaches.

    The source of a class is read once per set of classes that its children have.
    """
    children = tuple(
        (n, _source_class(type(m))) for n, m in module._modules.items() if m is not None
    )
    return _uses_in_class(_source_class(type(module)), children)


@functools.lru_cache(maxsize=4096)
def _uses_in_class(cls: type, children: tuple) -> tuple[tuple[tuple[str, ...], Use], ...]:
    reader = _Reader(cls, dict(children))
    for name in _ENTRY_POINTS:
        function = _method(cls, name)
        if function is not None and not _is_torchs(function):
            (first, *_) = [*inspect.signature(function).parameters, "self"]
            reader.read(function, {first: _Ref(())}, depth=0)
    return tuple(dict.fromkeys(reader.found))


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
        tree = _parse(function)
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
        if node.attr in _METADATA:
            return ()
        if node.attr in ("T", "mT", "H", "mH"):
            return tuple(dataclasses.replace(r, flipped=not r.flipped) for r in refs)
        if node.attr == "data":
            return refs
        getter = inspect.getattr_static(self.reader.cls, node.attr, None)
        if isinstance(getter, property) and any(not ref.path for ref in refs):
            function = inspect.unwrap(getter.fget)
            if _is_torchs(function):
                return ()
            (first, *_) = inspect.signature(function).parameters
            return self.reader.read(function, {first: _Ref(())}, self.depth + 1)
        if node.attr in _ADDRESSES:
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
        if name in _METADATA:
            return ()
        if name in _METHOD_PRODUCTS:
            for ref in refs:
                self.reader.record(ref, "matrix", _MATRIX_REASON, transposed=ref.flipped)
            for argument in node.args:
                self.product(argument, transposed=True)
            return ()
        if name in _ADDRESSES:
            for ref in refs:
                self.reader.record(ref, "address", self._reads_address())
            return ()
        if name in _SAME or name == "dequantize":
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
            if name in _ELEMENTWISE_METHODS:
                self.reader.record(ref, "value", _VALUE_REASON)
            elif name in ("items", "values", "get", "parameters"):
                return _items(refs)
        return tuple(dataclasses.replace(r, path=(*r.path, name)) for r in refs if name == "weight")

    def _method_of_self(self, node):
        """self.method(...), or self.child(...)."""
        function, first = _method(self.reader.cls, node.func.attr), _Ref(())
        if function is None and node.func.attr in self.reader.children:
            function = _method(self.reader.children[node.func.attr], "forward")
            first = _Ref((node.func.attr,))
        if function is None or _is_torchs(function):
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
        if name in _PRODUCTS and not isinstance(target, types.FunctionType):
            return self._call_products(name, arguments)
        if name in _PRODUCTS and _is_torchs(target):
            return self._call_products(name, arguments)
        if name in _CONVOLUTIONS:
            for place, argument in arguments:
                for ref in self.value(argument):
                    kind = "unknown" if place in (1, "weight") else "value"
                    self.reader.record(ref, kind, "the kernel of a functional convolution")
            return ()
        if name in ("transpose", "permute", "t", "swapaxes"):
            refs = self.value(node.args[0]) if node.args else ()
            return tuple(dataclasses.replace(r, flipped=not r.flipped) for r in refs)
        if name in _SAME:
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
        if name == "apply" and _is_autograd_function(target):
            for _, argument in arguments:
                self.consume(argument, "address", _autograd_reason(target))
            return ()
        if isinstance(target, types.FunctionType) and not _is_torchs(target):
            return self._follow(target, node)
        for _, argument in arguments:
            if target is None:
                called = ast.unparse(node.func)
                self.consume(argument, "unknown", f"passed to {called}(), which was not followed")
            else:
                self.consume(argument)
        return ()

    def _call_products(self, name, arguments):
        places = _PRODUCTS[name]
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
_ELEMENTWISE_METHODS = {
    "exp", "sigmoid", "softmax", "norm", "sum", "mean", "abs", "sqrt", "pow", "tanh", "mul", "add",
    "sub", "div", "neg", "softplus", "log", "clamp", "masked_fill", "gather", "max", "min",
}  # fmt: skip


def _is_torchs(function) -> bool:
    """Written by torch: its source is not the model's, and its name says enough."""
    return (function.__module__ or "").startswith("torch.")


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


def _autograd_reason(target) -> str:
    name = target.__self__.__name__
    return f"passed to the autograd function {name}, which may read its memory"


def _is_autograd_function(target) -> bool:
    owner = getattr(target, "__self__", None)
    return isinstance(owner, type) and issubclass(owner, torch.autograd.Function)


def _method(cls: type, name: str):
    """The function that self.name() runs, without decorators that keep the original."""
    for base in cls.__mro__:
        value = base.__dict__.get(name)
        if value is None:
            continue
        if isinstance(value, staticmethod | classmethod):
            return None
        value = inspect.unwrap(value) if callable(value) else None
        return value if isinstance(value, types.FunctionType) else None
    return None


@functools.cache
def _parse(function):
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return None
    node = tree.body[0] if tree.body else None
    return node if isinstance(node, ast.FunctionDef) else None
