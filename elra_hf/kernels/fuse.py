"""A function of a few numbers as one launch: what torch would do in hundreds of them is written out as one Triton program.

The function is traced once. Every entry of its small tensors then is a variable of the program, so that views cost nothing
and a rule needs no code of its own for accelerators. The program runs in one warp, which has read all before it writes.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import hashlib
import importlib.util
import math
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from .native import cached

FLOAT_MAX = torch.finfo(torch.float32).max
MOST_LINES = 10_000  # of a program, some 60 groups; beyond, its compilation takes longer than its launches save
HEAD = '"""Written by elra_hf.kernels.fuse."""\n\nimport triton\nimport triton.language as tl\n\n\n@triton.jit\n'
# what only moves entries is done by torch itself, with the entries' places among the variables
MOVES = {
    *("select", "slice", "expand", "view", "_unsafe_view", "reshape", "unbind", "stack", "cat", "unsqueeze", "squeeze", "t"),
    *("transpose", "permute", "alias", "detach", "clone", "lift_fresh_copy", "split", "split_with_sizes"),
}
BINARY = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
COMPARE = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}
LOGIC = {"bitwise_and": "&", "bitwise_or": "|", "logical_and": "&", "logical_or": "|"}
# shape and value of what is created
CREATE: dict[str, Callable[..., tuple[Any, float]]] = {
    "scalar_tensor": lambda value: ((), value),
    "zeros": lambda shape: (shape, 0.0),
    "full": lambda shape, value: (shape, value),
    "new_zeros": lambda like, shape: (shape, 0.0),
    "new_ones": lambda like, shape: (shape, 1.0),
    "new_full": lambda like, shape, value: (shape, value),
    "zeros_like": lambda like: (like.shape, 0.0),
    "ones_like": lambda like: (like.shape, 1.0),
    "full_like": lambda like, value: (like.shape, value),
}
FOLDS = {"sum": "add", "amax": "maximum", "amin": "minimum", "any": "bitwise_or", "all": "bitwise_and"}


class Fused:
    """A program, compiled when it first runs.

    Args:
        function: of 0-dim or small tensors in float32 to a tuple of such; a pure function, traced with `examples`.
        examples: arguments of the shapes that it will get.

    Raises:
        NotImplementedError: the function does what is not known here, or is too long.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], examples: Sequence[Tensor]) -> None:
        inputs = [torch.ones(example.shape, dtype=torch.float32, device="cpu") for example in examples]
        program = _Writer(make_fx(function)(*inputs))
        self.source = program.write([example.shape for example in inputs])
        self._kernel = _load(self.source)

    def __call__(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Write the results to ``outputs``, which may be among ``inputs``. All are contiguous, in float32, on one device."""
        self._kernel[(1,)](*inputs, *outputs, num_warps=1)


def _load(source: str) -> Any:
    """The program as a Triton function, which wants to see its source in a file."""
    name = f"fused_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        path = cached(f"{name}.py", lambda path: path.write_text(source, "utf-8"))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name].program


class _Writer(fx.Interpreter):
    """Runs a graph on places: tensors of int64 that say which variable each entry is."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.lines: list[str] = []
        self.variables: list[str | float | bool] = []  # the name of a variable, or a number that is known
        self.places: dict[Any, int] = {}
        self.flags: set[int] = set()  # places of what is true or false

    def write(self, shapes: Sequence[torch.Size]) -> str:
        """The source of the program."""
        inputs = []
        for k, shape in enumerate(shapes):
            places = [self._line(f"tl.load(i{k} + {j})", False) for j in range(math.prod(shape))]
            inputs.append(torch.tensor(places, dtype=torch.int64, device="cpu").view(shape))
        results = self.run(*inputs)
        names = [f"i{k}" for k in range(len(inputs))] + [f"o{k}" for k in range(len(results))]
        for k, result in enumerate(results):
            for j, place in enumerate(result.flatten().tolist()):
                self.lines.append(f"tl.store(o{k} + {j}, {self._float(place)})")
        if len(self.lines) > MOST_LINES:
            raise NotImplementedError(f"{len(self.lines)} lines are more than {MOST_LINES}")
        return f"{HEAD}def program({', '.join(names)}):\n    " + "\n    ".join(self.lines) + "\n"

    def _line(self, expression: str, flag: bool) -> int:
        """The place of a new variable, or of the old one with the same expression."""
        if expression not in self.places:
            name = f"v{len(self.variables)}"
            self.lines.append(f"{name} = {expression}")
            self._place(expression, name, flag)
        return self.places[expression]

    def _place(self, key: Any, value: str | float | bool, flag: bool) -> int:
        if key not in self.places:
            self.places[key] = len(self.variables)
            self.variables.append(value)
            if flag:
                self.flags.add(self.places[key])
        return self.places[key]

    def _number(self, value: float | bool) -> int:
        """The place of a number that is known."""
        if isinstance(value, bool):
            return self._place(("flag", value), value, True)
        return self._place(("number", repr(float(value))), float(value), False)

    def _text(self, place: int) -> str:
        """A variable or number as it is written."""
        value = self.variables[place]
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        return f"({value!r})" if isinstance(value, float) else str(value)

    def _float(self, place: int) -> str:
        if place not in self.flags:
            return self._text(place)
        value = self.variables[place]
        return str(float(value)) if isinstance(value, bool) else f"tl.where({value}, 1.0, 0.0)"

    # ---- operations -------------------------------------------------------------------------------------------------------

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._filled(value.shape, [x if value.dtype == torch.bool else float(x) for x in value.flatten().tolist()])

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is operator.getitem:
            return super().call_function(target, args, kwargs)
        name = target._schema.name.removeprefix("aten::").removesuffix("_")
        if name in MOVES:
            return target(*args, **kwargs)
        if name in FOLDS:
            return self._fold(FOLDS[name], *args, **kwargs)
        if name in CREATE:
            shape, value = CREATE[name](*args)
            return self._filled(shape, [value] * math.prod(shape))
        if name == "copy":
            return args[0].copy_(args[1].expand_as(args[0]))
        result = self._each(name, args, kwargs)
        return args[0].copy_(result) if target._schema.name.endswith("_") else result

    def _filled(self, shape: Any, values: list[float | bool]) -> Tensor:
        return torch.tensor([self._number(value) for value in values], dtype=torch.int64, device="cpu").view(tuple(shape))

    def _fold(self, name: str, x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Tensor:
        """A reduction, entry after entry in their order."""
        if not x.ndim:
            return x
        every = range(x.ndim)
        given = [*every] if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
        dims = [d % x.ndim for d in given]
        flat = x.permute(*dims, *(d for d in every if d not in dims)).flatten(0, len(dims) - 1)
        total = flat[0].clone()
        for row in flat[1:]:
            total = self._each(name, (total, row), {})
        return total.view([1 if d in dims else n for d, n in enumerate(x.shape)]) if keepdim else total

    def _each(self, name: str, args: Any, kwargs: Any) -> Tensor:
        """An operation entry by entry."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
        columns = [arg.expand(shape).flatten().tolist() if isinstance(arg, Tensor) else None for arg in args]
        entries = []
        for j in range(math.prod(shape)):
            row: list[int | None] = []
            for arg, column in zip(args, columns, strict=True):  # None for a bound that is not given
                row.append(None if arg is None else self._number(arg) if column is None else column[j])
            entries.append(self._entry(name, row, kwargs))
        return torch.tensor(entries, dtype=torch.int64, device="cpu").view(shape)

    def _entry(self, name: str, row: list[Any], kwargs: Any) -> int:
        """One entry of an operation."""
        x, y = row[0], row[1] if len(row) > 1 else -1
        f = self._float
        if name == "mul" and {x, y} <= self.flags:
            name = "bitwise_and"
        if name in BINARY:
            return self._binary(name, x, y)
        if name in ("rsub", "reciprocal", "square", "neg"):
            one, zero = self._number(1.0), self._number(0.0)
            swapped = {"rsub": ("sub", y, x), "reciprocal": ("div", one, x), "square": ("mul", x, x), "neg": ("sub", zero, x)}
            return self._binary(*swapped[name])
        if name in COMPARE:
            return self._line(f"{f(x)} {COMPARE[name]} {f(y)}", True)
        if name in LOGIC:
            known = next((p for p in (x, y) if isinstance(self.variables[p], bool)), None)
            if known is not None:  # Triton does not mix what is known with what is not
                other, both = (y if known == x else x), "and" in name
                return (other if both else known) if self.variables[known] else (known if both else other)
            return self._line(f"{self._text(x)} {LOGIC[name]} {self._text(y)}", True)
        if name in ("bitwise_not", "logical_not"):
            value = self.variables[x]
            return self._number(not value) if isinstance(value, bool) else self._line(f"{self._text(x)} == 0", True)
        if name == "where":
            _, y, z = row
            if isinstance(self.variables[x], bool):
                return int(y if self.variables[x] else z)
            return y if y == z else self._line(f"tl.where({self._text(x)}, {f(y)}, {f(z)})", False)
        if name in ("maximum", "minimum"):  # with what is no number, if there is one, as torch does
            sign = ">" if name == "maximum" else "<"
            return self._line(f"tl.where(({f(x)} {sign} {f(y)}) | ({f(x)} != {f(x)}), {f(x)}, {f(y)})", False)
        if name == "clamp":
            low, high = [*row[1:], None][:2]
            low, high = (kwargs.get(key, place) for key, place in (("min", low), ("max", high)))
            low, high = (self._number(b) if isinstance(b, float) else b for b in (low, high))
            for bound, sign in ((low, "<"), (high, ">")):
                if bound is not None:
                    x = self._line(f"tl.where({f(x)} {sign} {f(bound)}, {f(bound)}, {f(x)})", False)
            return int(x)
        if name == "nan_to_num":
            x = self._line(f"tl.where({f(x)} != {f(x)}, {f(y)}, {f(x)})", False)
            return self._entry("clamp", [x, self._number(-FLOAT_MAX), self._number(FLOAT_MAX)], {})
        if name == "pow":
            return self._power(x, y)
        if name == "expm1":  # near 0 by its series, since exp(x) - 1 has no digits there
            u = f(x)
            series = f"{u} * (1.0 + {u} * (0.5 + {u} * (0.16666667 + {u} * 0.041666668)))"
            return self._line(f"tl.where(tl.abs({u}) < 0.02, {series}, tl.exp({u}) - 1.0)", False)
        if name in ("sqrt", "exp", "log", "abs"):
            return self._line(f"tl.{name}({f(x)})", False)
        if name == "_to_copy":
            return int(x)
        raise NotImplementedError(f"aten::{name}")

    def _binary(self, name: str, x: int, y: int) -> int:
        a, b = self.variables[x], self.variables[y]
        if not isinstance(a, str) and not isinstance(b, str):
            known = getattr(torch, name)(torch.tensor(float(a)), torch.tensor(float(b)))
            return self._number(float(known))
        return self._line(f"{self._float(x)} {BINARY[name]} {self._float(y)}", False)

    def _power(self, x: int, y: int) -> int:
        base, exponent = self.variables[x], self.variables[y]
        if exponent in (1.0, 2.0):
            return x if exponent == 1.0 else self._binary("mul", x, x)
        if isinstance(base, float) and base > 0.0:
            return self._line(f"tl.exp2({self._float(y)} * {math.log2(base)!r})", False)
        return self._line(f"tl.exp2({self._float(y)} * tl.log2({self._float(x)}))", False)
