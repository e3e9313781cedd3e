"""Where weights may be: models spread by `device_map` train sparse, engines that split weights are refused."""

import types

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, disk_offload, dispatch_model
from helpers import (
    ATTENTION,
    MLP,
    SPARSE,
    add_lora,
    assert_same,
    assert_untouched,
    lora_model,
    snapshot,
    sparse_result,
    tiny_model,
)
from torch import nn

from sparselora_hf import TokenPlan, distributed, placement, sparsify
from sparselora_hf.state import ActiveBatch

SPARSE = SPARSE.replace(criterion="oracle")


def spread(model: nn.Module) -> nn.Module:
    """With accelerate's hooks on every module, as a model over two devices has them."""
    parts = {"model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"}
    device_map = dict.fromkeys([*parts, *(f"model.layers.{i}" for i in range(3))], "cpu")
    return dispatch_model(model, device_map, main_device="cpu", force_hooks=True)


@pytest.mark.parametrize("targets", [ATTENTION, ATTENTION + MLP], ids=["qkvo", "all linears"])
def test_a_model_spread_by_device_map_is_sparse(batch, targets):
    want = sparse_result(lora_model(targets=targets).double(), batch, SPARSE)
    model = add_lora(spread(tiny_model()), targets).train().double()
    assert "forward" in vars(model.get_base_model().model.layers[0].mlp)
    before = snapshot(model)
    assert_same(sparse_result(model, batch, SPARSE), want, 1e-6)
    assert_untouched(model, before)


def test_a_forward_of_the_instance_serves_the_dense_rows(batch):
    """Liger and the hub's kernels put their forward on the instance."""
    model = lora_model()
    want = sparse_result(model, batch, SPARSE)
    mlp, seen = model.get_base_model().model.layers[0].mlp, []

    def forward(self, x):
        seen.append(x.shape[0] if x.dim() == 2 else x.shape[:2].numel())
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    mlp.forward = types.MethodType(forward, mlp)
    before = snapshot(model)
    assert_same(sparse_result(model, batch, SPARSE), want, 1e-6)
    at_attach = [4, 0]  # the check against the dense self: all rows dense, then none
    assert seen == [*at_attach, len(TokenPlan.from_batch(batch["labels"], batch["attention_mask"]).output)]
    assert_untouched(model, before)


def test_rows_follow_the_module_to_its_device(batch):
    plan = TokenPlan.from_batch(batch["labels"], batch["attention_mask"])
    active = ActiveBatch(plan, True, frozenset({"padding", "last_layer"}))
    for sparse, loss_only in ((True, False), (False, True), (False, False)):
        rows = active.rows(torch.device("meta"), sparse=sparse, loss_only=loss_only)
        assert rows.dense.is_meta and rows.sparse.is_meta
        assert not active.rows(torch.device("cpu"), sparse=sparse, loss_only=loss_only).dense.is_meta


def empty(model, folder):
    model.model.layers[1].mlp.up_proj.weight.data = torch.empty(0)
    return model


def split(model, folder):
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    linear = model.model.layers[1].mlp.up_proj
    whole = linear.weight.data
    linear.weight = nn.Parameter(distribute_tensor(whole, DeviceMesh("cpu", [0]), [Shard(0)]), requires_grad=False)
    return model


REFUSED = {
    "offloaded to the cpu": (
        lambda model, folder: cpu_offload(model),
        r"layers\.0: .* meta device.* without cpu and disk",
    ),
    "offloaded to disk": (disk_offload, r"layers\.0: .* meta device.* without cpu and disk"),
    "empty, as under ZeRO-3": (empty, r"layers\.1: the weight of up is empty: DeepSpeed ZeRO-3 .*ZeRO-2"),
    "split by tensor parallelism": (split, r"layers\.1: the weight of up is split .*tensor parallelism \(tp_plan"),
    "split by FSDP2": (split, r"split over devices already\. By FSDP2: call sparsify before accelerator\.prepare"),
    "wrapped": (lambda model, folder: nn.DataParallel(model), r"wrapped in DataParallel\. .* pass model\.module"),
}


@pytest.mark.parametrize(("place", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_weights_that_are_not_whole_are_refused(tmp_path, place, message):
    try:
        model = place(add_lora(tiny_model()).get_base_model(), str(tmp_path))
        classes = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=message):
            sparsify(model, SPARSE)
        assert [type(module) for module in model.modules()] == classes
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_model_that_fsdp2_gathers_as_a_whole_is_fitted_as_one_that_is_not_split(batch):
    from torch.distributed.fsdp import fully_shard

    config = SPARSE.replace(criterion="static", compensation="low_rank", compensation_rank=4)
    losses = []
    try:
        for is_split in (False, True):
            model = lora_model()
            handle = sparsify(model, config)
            if is_split:
                dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
                fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
            model(**batch).loss.backward()
            handle.set_enabled(True)
            losses.append(model(**batch).loss.item())
    finally:
        dist.destroy_process_group()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_weights_are_gathered_for_a_part_and_split_again():
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def split():
        return [isinstance(layer.weight, DTensor) for layer in model]

    try:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        mesh = dist.init_device_mesh("cpu", (1,))
        fully_shard(fully_shard(model[0], mesh=mesh) and model, mesh=mesh)  # the second layer is the whole's own
        with distributed.whole_weights(model[1], model):
            assert split() == [True, False]
        assert split() == [True, True]
        with distributed.whole_weights(model):
            assert split() == [False, False]
    finally:
        dist.destroy_process_group()


def test_what_rank_0_has_holds(monkeypatch):
    sent = []

    def broadcast(tensor, src):
        assert tensor.is_contiguous()
        sent.append(src)
        tensor.fill_(5)

    monkeypatch.setattr(distributed, "_is_distributed", lambda: True)
    monkeypatch.setattr(dist, "broadcast", broadcast)
    tensors = [torch.zeros(2, 3).t(), torch.zeros(2)]
    distributed.agree(tensors)
    assert sent == [0, 0] and all((tensor == 5).all() for tensor in tensors)


def test_fsdp_1_is_refused_in_a_loop_of_ones_own():
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model = lora_model()
    layers = ModuleWrapPolicy({type(model.get_base_model().model.layers[0])})
    handle = sparsify(model, SPARSE)
    try:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        FullyShardedDataParallel(model, auto_wrap_policy=layers, use_orig_params=True, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match=r"FSDP version 1\. DDP, FSDP2 and ZeRO-2 are the ways"):
            handle.begin_run(4)
    finally:
        dist.destroy_process_group()


def test_zero_3_is_refused_before_its_weights_are_split(monkeypatch):
    monkeypatch.setattr(placement, "is_deepspeed_zero3_enabled", lambda: True)
    model = lora_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"ZeRO-3 splits frozen weights.*ZeRO-2 are the ways"):
        sparsify(model, SPARSE)
    assert_untouched(model, before)


def parallel(*dims):
    return {"parallelism_config": types.SimpleNamespace(active_mesh_dims=["dp_shard", *dims])}


ENGINES = {
    "DataParallel": {"n_gpu": 2},
    "FSDP version 1": {"distributed_type": "FSDP", "fsdp_plugin": types.SimpleNamespace(fsdp_version=1)},
    "ZeRO-3": {"distributed_type": "DEEPSPEED", "deepspeed_plugin": types.SimpleNamespace(zero_stage=3)},
    "Megatron-LM": {"distributed_type": "MEGATRON_LM"},
    "tensor parallelism": parallel("tp"),
    "context parallelism": parallel("cp"),
    "sequence parallelism": parallel("sp"),
    None: {"distributed_type": "FSDP", "fsdp_plugin": types.SimpleNamespace(fsdp_version=2), **parallel()},
}


ZERO_2 = {"distributed_type": "DEEPSPEED", "deepspeed_plugin": types.SimpleNamespace(zero_stage=2)}


@pytest.mark.parametrize(("engine", "state"), [*ENGINES.items(), (None, ZERO_2)], ids=str)
def test_engines(monkeypatch, engine, state):
    state = {"distributed_type": "NO", "parallelism_config": None} | state
    n_gpu = state.pop("n_gpu", 1)
    monkeypatch.setattr("accelerate.state.AcceleratorState", lambda: types.SimpleNamespace(**state))
    if engine is None:
        placement.check_engine(n_gpu)
        return
    with pytest.raises(ValueError, match=f"does not run in .*{engine}.*ZeRO-2 are the ways"):
        placement.check_engine(n_gpu)


def test_a_sum_above_what_float16_holds_is_no_damage():
    assert placement._is_finite(torch.ones(70000, dtype=torch.float16))


def test_trainer_reads_the_weights_once(tmp_path, monkeypatch):
    """Whether they hold NaN: before TRL wraps the model, and not again afterwards."""
    from training import make_trainer

    from sparselora_hf import placement

    read = []
    monkeypatch.setattr(placement, "_is_finite", lambda weight: read.append(weight.data_ptr()) or True)
    make_trainer(tmp_path, SPARSE)
    assert len(read) == len(set(read)) == 3 * 7
