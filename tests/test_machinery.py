"""The Trainer's machinery around a sparse model: precision, compilation, offloading, evaluation, other kernels."""

from statistics import fmean

import pytest
import torch
from helpers import (
    SPARSE,
    assert_same,
    differs,
    lora_model,
    loss_and_gradients,
    make_batch,
    relative_error,
    snapshot,
    sparse_result,
)
from torch._dynamo.utils import counters
from training import assert_same_run, examples, make_trainer, metrics, trained
from transformers import TrainerCallback

from sparselora_hf import SparseLoraConfig, sparsify

SPARSE = SPARSE.replace(start_step=1)

SETTINGS = {
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "fp16, which a CPU leaves aside": {"fp16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_exact_savings_change_no_run(tmp_path, settings):
    configs = (None, SparseLoraConfig(), SPARSE.replace(exact=False), SPARSE)
    dense, exact, plain, saving = (trained(tmp_path, config, max_steps=3, **settings) for config in configs)
    assert_same_run(exact, dense)
    assert_same_run(saving, plain)
    assert max(metrics(saving, "sparselora/channel_sparsity")) > 0.5


@pytest.mark.parametrize(
    ("plain", "saving"),
    [(None, SparseLoraConfig()), (SPARSE.replace(exact=False), SPARSE)],
    ids=["exact", "sparse"],
)
def test_exact_savings_under_autocast_are_as_near_to_float32(tmp_path, plain, saving, choose_again):
    """Products in bf16 round in another order, so each run is held against its own in float32."""
    errors = []
    for config in (plain, saving):
        full = trained(tmp_path, config, max_steps=3)
        choose_again()
        half = trained(tmp_path, config, max_steps=3, bf16=True)
        assert half.losses == pytest.approx(full.losses, rel=5e-3)
        pairs = zip(half.recorder.gradients, full.recorder.gradients, strict=True)
        errors.append([fmean(float(relative_error(got[name], want[name])) for name in want) for got, want in pairs])
    assert all(0 < after < 1.5 * before for before, after in zip(*errors, strict=True)), errors


# compilation


class GraphCounter(TrainerCallback):
    """How many graphs had been compiled by the end of each step."""

    def __init__(self):
        self.graphs = []

    def on_step_end(self, args, state, control, **kwargs):
        self.graphs.append(counters["stats"]["unique_graphs"])


def test_compiled_run_needs_a_bounded_number_of_graphs(tmp_path):
    """Batches of ever new lengths, dense, then sparse: after the first two steps nothing is compiled any more."""
    torch._dynamo.reset()
    counters.clear()
    counter, data = GraphCounter(), examples(32, prompt=(3, 20))
    eager = trained(tmp_path, SPARSE, model=lora_model(layers=2), data=data, max_steps=6)
    compiled = trained(tmp_path, SPARSE, model=lora_model(layers=2), data=data, max_steps=6, torch_compile=True,
                       torch_compile_backend="eager", callbacks=[counter])  # fmt: skip
    assert_same_run(compiled, eager)
    assert 0 < counter.graphs[0] < 40
    assert counter.graphs[2:] == counter.graphs[1:2] * 4


# memory


class OnDisk(torch.autograd.graph.saved_tensors_hooks):
    """Saved activations leave memory as other tensors than came, as offloading has it; it counts them."""

    def __init__(self):
        self.packed = 0
        super().__init__(self.pack, lambda tensor: tensor.clone())

    def pack(self, tensor):
        self.packed += 1
        return tensor.detach().clone()


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_offloaded_activations_give_the_same_run(tmp_path, settings):
    """TRL's offloading wants an accelerator: its place in the trainer is taken by hooks that do the same on a CPU."""
    kept = trained(tmp_path, SPARSE, max_steps=3, **settings)
    trainer = make_trainer(tmp_path, SPARSE, max_steps=3, **settings)
    trainer.maybe_activation_offload_context = OnDisk()
    trainer.train()
    assert trainer.maybe_activation_offload_context.packed > 0
    assert_same_run(trainer, kept, 1e-6)


# evaluation


def accuracy(prediction):
    """A metric of the logits of every position."""
    return {"mean_logit": float(prediction.predictions.mean()), "rows": len(prediction.label_ids)}


def test_evaluation_with_metrics_and_predict(tmp_path):
    held_out = examples(6, seed=9)
    settings = {"eval_dataset": held_out, "eval_strategy": "steps", "eval_steps": 1, "compute_metrics": accuracy}
    trainer = trained(tmp_path, SPARSE, max_steps=3, **settings)
    assert len(metrics(trainer, "eval_mean_logit")) == 3
    predicted = trainer.predict(held_out)
    assert predicted.predictions.shape == (6, max(map(len, held_out["input_ids"])), 61)
    trainer.sparse_handle.restore()
    dense = make_trainer(tmp_path, model=trainer.model, eval_dataset=held_out, compute_metrics=accuracy)
    want = dense.evaluate()
    assert metrics(trainer, "eval_mean_logit")[-1] == pytest.approx(want["eval_mean_logit"], rel=1e-6)
    assert metrics(trainer, "eval_loss")[-1] == pytest.approx(want["eval_loss"], rel=1e-6)
    torch.testing.assert_close(predicted.predictions, dense.predict(held_out).predictions, rtol=1e-6, atol=1e-6)


class Speaker(TrainerCallback):
    """Generates while training goes on, at each place where a callback can."""

    def __init__(self):
        self.said = []

    def speak(self, args, state, control, model=None, **kwargs):
        training = model.training
        self.said.append(model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=4, do_sample=False).tolist())
        model.train(training)

    on_step_begin = on_substep_end = on_step_end = speak


def test_generation_in_a_callback(tmp_path):
    """It is dense, and the run goes on as if nobody had spoken."""
    settings = {"gradient_accumulation_steps": 2, "max_steps": 3, "learning_rate": 0.0}
    speaker = Speaker()
    silent, spoken = (trained(tmp_path, SPARSE, callbacks=each, **settings) for each in ([], [speaker]))
    assert_same_run(spoken, silent, 1e-6)
    want = lora_model(train=False).generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=4, do_sample=False).tolist()
    assert len(speaker.said) == 9
    assert all(said == want for said in speaker.said)


def test_best_model_at_the_end(tmp_path):
    """The best checkpoint's adapter is loaded into the sparse model, and it is dense."""
    settings = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    settings |= {"metric_for_best_model": "eval_num_tokens", "greater_is_better": False}  # the first is the best
    trainer = trained(
        tmp_path, SPARSE, eval_dataset=examples(6, seed=9), load_best_model_at_end=True, learning_rate=0.3, **settings
    )
    first, *_, last = metrics(trainer, "eval_loss")
    assert first != pytest.approx(last, rel=1e-3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(first, rel=1e-6)
    assert not trainer.sparse_handle.enabled


# hooks


def calls_of_hooks(model, kind):
    """How often a hook on each module, alone on its model, is called in a step."""
    counts, calls = {}, []
    for name, module in model.named_modules():
        hook = getattr(module, kind)(lambda *_: calls.append(1))
        loss_and_gradients(model, make_batch())
        hook.remove()
        counts[name] = len(calls)
        calls.clear()
    return counts


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
@pytest.mark.filterwarnings("ignore:.*backward hook:UserWarning")
def test_exact_savings_call_all_hooks(kind):
    model = lora_model(layers=1)
    want = calls_of_hooks(model, f"register_{kind}")
    with sparsify(model, SparseLoraConfig()):
        assert calls_of_hooks(model, f"register_{kind}") == want


# other kernels


LIGER = {"use_liger_kernel": True, "liger_kernel_config": {"rms_norm": False, "rope": False}}


def test_liger_leaves_the_mlp_to_us(tmp_path):
    """Its Triton kernels need a GPU: norm and RoPE are left out, the MLP must be by the trainer's own doing."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    assert_same_run(trained(tmp_path, SPARSE, max_steps=3, **LIGER), trained(tmp_path, SPARSE, max_steps=3), 1e-7)


def own_forward(module):
    """Give a module a forward of its own, as Liger and hub kernels do to instances."""
    module.__dict__["forward"] = type(module).forward.__get__(module)


def test_a_forward_replaced_before_serves_the_dense_rows():
    model, batch = lora_model().double(), make_batch()
    config = SPARSE.replace(mlp_sparsity={"0": 0.9}, attention_sparsity={"0": 0.5})
    want = sparse_result(model, batch, config)
    layer = model.base_model.model.model.layers[0]
    own_forward(layer.mlp)
    own_forward(layer.self_attn.q_proj.base_layer)
    before = snapshot(model)
    assert differs(want, loss_and_gradients(model, batch))
    assert_same(sparse_result(model, batch, config), want, 1e-12)
    assert snapshot(model)["modules"] == before["modules"]


def test_a_forward_replaced_afterwards_is_refused(tmp_path):
    """It would run dense and nobody would know."""
    trainer = make_trainer(tmp_path, SPARSE)
    own_forward(trainer.model.base_model.model.model.layers[1].mlp)
    with pytest.raises(ValueError, match=r"replaced the forward of 1 sparse modules .*liger_kernel_config"):
        trainer.train()


def test_two_trainers_in_one_process_do_not_meet(tmp_path):
    alone = trained(tmp_path, SPARSE, max_steps=3)
    first, second = (make_trainer(tmp_path, config, max_steps=3) for config in (SPARSE, None))
    first.train()
    second.train()
    assert_same_run(first, alone, 1e-7)
    assert_same_run(second, trained(tmp_path, max_steps=3), 1e-7)
