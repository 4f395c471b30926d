"""The activation precision of a thread: what low-bit linears may round."""

import threading
from collections.abc import Callable
from functools import wraps

PRECISIONS = ("auto", "fp32", "bf16", "int8")  # lowbit::Precision


class _Current(threading.local):
    def __init__(self) -> None:
        # On the instance: torch.compile guards it there, per thread, and would not on the class.
        self.precision = 0


current = _Current()


def get_activation_precision() -> str:
    """The activation precision of this thread: "auto", "fp32", "bf16" or "int8"."""
    return PRECISIONS[current.precision]


class set_activation_precision:  # noqa: N801 (a verb, as torch.set_grad_enabled is)
    """Sets what low-bit linears may round, for this thread and from now on.

    "fp32" computes with exact weights and at least 15 bits of each activation, "bf16" rounds
    both to bfloat16, "int8" rounds activations to 8 bits per group (fp8 types on Hopper GPUs: to
    e4m3 per token); "auto" takes the fastest whose error bound (docs/numerics.md) holds. As
    `torch.set_grad_enabled`, it takes effect at once, and a `with` block or a decorated function
    restores what was there before.
    """

    def __init__(self, precision: str) -> None:
        if precision not in PRECISIONS:
            raise ValueError(
                f"activation precision must be one of {', '.join(PRECISIONS)}, got {precision!r}"
            )
        self.precision = precision
        self.previous = current.precision
        current.precision = PRECISIONS.index(precision)

    def __enter__(self) -> "set_activation_precision":
        current.precision = PRECISIONS.index(self.precision)
        return self

    def __exit__(self, *exc_info: object) -> None:
        current.precision = self.previous

    def __call__(self, function: Callable) -> Callable:
        current.precision = self.previous  # as a decorator it acts inside the function only

        @wraps(function)
        def decorated(*args, **kwargs):
            with type(self)(self.precision):
                return function(*args, **kwargs)

        return decorated
