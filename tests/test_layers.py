import pytest

from sparselora_hf.layers import check_sparsity, expand_layers, kept_channels, per_layer_sparsity


@pytest.mark.parametrize(
    ("key", "layers"),
    [(7, [7]), ("7", [7]), ("3-5", [3, 4, 5]), ("3-5, 8", [3, 4, 5, 8]), (" 2 - 3 ,0", [2, 3, 0]), ("4-4", [4])],
)
def test_expand_layers(key, layers):
    assert expand_layers("field", key) == layers


@pytest.mark.parametrize("key", ["", "a", "1-", "-2", "1-2-3", "1.5", "1,,2", None, 1.5, "0-10000"])
def test_unreadable_layers(key):
    with pytest.raises(ValueError, match=r"field: .* is no layer range"):
        expand_layers("field", key)


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (0.5, [0.5] * 4),
        (0, [0.0] * 4),
        ({"1-2": 0.9}, [0, 0.9, 0.9, 0]),
        ({0: 0.1, "3": 0.2}, [0.1, 0, 0, 0.2]),
        ({}, [0] * 4),
    ],
    ids=["number", "zero", "range", "single", "empty"],
)
def test_per_layer(value, want):
    assert per_layer_sparsity("field", value, 4) == want


@pytest.mark.parametrize("key", ["4", "2-4", "100"])
def test_layer_beyond_the_last(key):
    check_sparsity("field", {key: 0.5})  # nothing wrong until the model is known
    with pytest.raises(ValueError, match=r"field: layer (4|100) does not exist, the model has layers 0 to 3"):
        per_layer_sparsity("field", {key: 0.5}, 4)


@pytest.mark.parametrize(
    ("width", "sparsity", "keep"),
    [
        (14336, 0.99, 144),
        (14336, 0.9, 1440),
        (14336, 0.0, 14336),
        (1024, 0.75, 256),
        (1024, 0.999, 16),
        (512, 0.01, 512),
        (96, 0.99, 1),
        (96, 0.5, 48),
        (96, 0.999, 1),
        (511, 0.5, 256),
        (540, 0.001, 540),
    ],
)
def test_kept_channels(width, sparsity, keep):
    assert kept_channels(width, sparsity) == keep


@pytest.mark.parametrize("width", [1, 7, 128, 512, 520, 11008, 14336])
@pytest.mark.parametrize("sparsity", [1e-9, 0.1, 0.5, 0.9, 0.99, 0.999999])
def test_kept_count_is_possible(width, sparsity):
    keep = kept_channels(width, sparsity)
    assert 1 <= keep <= width
    assert keep % 16 == 0 or width < 512 or keep == width
    assert abs(keep - width * (1 - sparsity)) <= 16
