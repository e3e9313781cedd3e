"""Shapes, types and tolerances of the kernel tests."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# float32 is multiplied exactly; the others differ by roundings of the result and, in the interpreter, truncation
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Draw:
    """Random tensors, the same in every run."""

    def __init__(self, dtype=torch.float32, seed=0):
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape, scale=1.0):
        return (torch.randn(*shape, generator=self.generator) * scale).to(DEVICE, self.dtype)

    def subset(self, total, count):
        """Some of ``total`` numbers, sorted."""
        return torch.randperm(total, generator=self.generator)[:count].sort().values.to(DEVICE)


def poisoned(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def assert_near(got, want, dtype):
    """Relative to the size of the whole: NaN never passes."""
    assert got.shape == want.shape
    assert got.dtype == dtype
    if want.numel():
        error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
        assert error < TOLERANCE[dtype], float(error)
