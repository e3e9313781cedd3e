"""What several kernels share: activations with their derivatives, and the product of two tiles."""

import triton
import triton.language as tl

__all__ = ["ACTIVATIONS", "activate", "activate_grad", "multiply"]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """``acc + a · b`` in float32; `UPCAST` is for the interpreter, whose bf16 product is wrong without a word."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def activate(x, KIND: tl.constexpr):
    """Activation of a float32 tile."""
    if KIND == "silu":
        y = x * tl.sigmoid(x)
    elif KIND == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        y = 0.5 * x * (1 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(KIND == "relu")
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def activate_grad(x, KIND: tl.constexpr):
    """Derivative of `activate`."""
    if KIND == "silu":
        s = tl.sigmoid(x)
        d = s * (1 + x * (1 - s))
    elif KIND == "gelu":
        d = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == "gelu_tanh":
        t = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        d = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
    else:
        tl.static_assert(KIND == "relu")
        d = tl.where(x > 0, 1.0, 0.0)
    return d
