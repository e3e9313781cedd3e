import pytest
import torch
from helpers import SPARSE, lora_model

from sparselora_hf import sparsify
from sparselora_hf.ops.seeded import seeded

CPU = torch.device("cpu")


def test_same_numbers_whatever_went_before_and_what_comes_after_is_left_alone():
    torch.manual_seed(5)
    undisturbed = torch.randn(6)
    torch.manual_seed(5)
    draws, after = [], []
    for _ in range(2):
        with seeded(CPU, 3):
            draws.append(torch.randn(4))
        after.append(torch.randn(3))
    assert torch.equal(*draws)
    assert torch.equal(torch.cat(after), undisturbed)
    torch.manual_seed(3)
    assert torch.equal(torch.randn(4), draws[0])


def test_an_error_inside_leaves_the_numbers_alone():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(CPU, 3):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_attaching_on_the_cpu_seeds_no_gpu(monkeypatch):
    """Not even one that is first used later: PyTorch would keep the seed for it."""
    model = lora_model()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail(f"seeds every GPU with {seed}"))
    with sparsify(model, SPARSE, progress=False):
        pass
