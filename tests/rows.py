"""What a user may do with a Trainer, row by row, and the tests that stand for each.

`test_rows_table.py` holds that every test exists; the table is printed at the end of a whole test run.
"""

import pytest

__all__ = ["COLLECTED", "ROWS"]

COLLECTED = pytest.StashKey[set]()  # ids of the tests that a run has collected

_BATCHING = "test_batching.py::test_exact_savings_leave_a_sparse_run_as_it_is[{}]"
_PARITY = "test_batching.py::test_sparsity_0_gives_the_run_of_sft[{}]"
_LAYOUT = "test_trainer.py::test_layout_changes_neither_loss_nor_gradient[sparse-exact on-{}]"
_MACHINERY = "test_machinery.py::test_exact_savings_change_no_run[{}]"
_AUTOCAST = "test_machinery.py::test_exact_savings_under_autocast_are_as_near_to_float32[{}]"
_FAULTS = "test_faults.py::test_{}"
_SEVERAL = "test_distributed.py::test_{}"


def _batching(name: str, *more: str) -> tuple[str, ...]:
    return (_PARITY.format(name), _BATCHING.format(name), *more)


ROWS: dict[str, dict[str, tuple[str, ...]]] = {
    "batching": {
        "padded right": _batching("padded right", "test_trainer.py::test_padding_side_of_the_collator[right]"),
        "padded left": _batching("padded left", _LAYOUT.format("padded left")),
        "padded to a multiple": _batching("padded to a multiple"),
        "padding-free": _batching("padding-free", _LAYOUT.format("padding-free")),
        "padding-free to a multiple": _batching(
            "padding-free to a multiple", _LAYOUT.format("padding-free to a multiple")
        ),
        "packing bfd": _batching("packing bfd", _LAYOUT.format("packed")),
        "packing bfd_split": _batching("packing bfd_split"),
        "packing wrapped": _batching("packing wrapped"),
        "completion-only": _batching("completion-only"),
        "assistant-only": _batching("assistant-only", *_batching("assistant-only, packed")),
        "conversational": _batching("conversational", *_batching("conversational completions")),
        "plain text": _batching("plain text", *_batching("whole sequences")),
        "IterableDataset": _batching("IterableDataset", *_batching("IterableDataset, packed")),
        "gradient accumulation": _batching("accumulation", *_batching("accumulation of uneven batches")),
        "auto_find_batch_size": _batching(
            "auto_find_batch_size", _FAULTS.format("out_of_memory_with_a_batch_size_to_be_found")
        ),
        "group_by_length": _batching("group_by_length"),
        "label smoothing": _batching("label smoothing"),
        'loss_type="dft"': _batching("loss_type dft"),
        "compute_loss_func": _batching("compute_loss_func"),
        "custom collator": _batching("custom collator"),
        "truncation": _batching("truncation"),
        "dataloader workers": _batching("worker processes"),
    },
    "machinery": {
        "gradient checkpointing": (_MACHINERY.format("checkpointing"),),
        "gradient checkpointing, reentrant": (_MACHINERY.format("checkpointing, reentrant"),),
        "bf16 autocast": tuple(_AUTOCAST.format(settings) for settings in ("exact", "sparse")),
        "fp16 autocast": (_MACHINERY.format("fp16, which a CPU leaves aside"),),
        "CUDA graphs": tuple(
            f"test_graphs.py::test_replayed_steps_train_as_launched_ones[2-{autocast}-the paper's]"
            for autocast in (False, True)
        ),
        "torch_compile": ("test_machinery.py::test_compiled_run_needs_a_bounded_number_of_graphs",),
        "activation offloading": ("test_machinery.py::test_offloaded_activations_give_the_same_run[plain]",),
        "evaluation with compute_metrics": ("test_machinery.py::test_evaluation_with_metrics_and_predict",),
        "predict": ("test_machinery.py::test_evaluation_with_metrics_and_predict",),
        "generate in a callback": ("test_machinery.py::test_generation_in_a_callback",),
        "load_best_model_at_end": ("test_machinery.py::test_best_model_at_the_end",),
        "NEFTune": (_MACHINERY.format("NEFTune"),),
        "Liger": ("test_machinery.py::test_liger_leaves_the_mlp_to_us",),
        "hub kernels": (
            "test_machinery.py::test_a_forward_replaced_before_serves_the_dense_rows",
            "test_machinery.py::test_a_forward_replaced_afterwards_is_refused",
        ),
        "several trainers in one process": ("test_machinery.py::test_two_trainers_in_one_process_do_not_meet",),
        "callback in transformers.Trainer": (
            "test_callback.py::test_without_sparsity_nothing_changes",
            "test_callback.py::test_schedule_goes_on_after_resuming[3]",
        ),
        "callback in DPOTrainer": ("test_callback.py::test_preference_training",),
        "Accelerate loop": ("test_callback.py::test_loop_of_ones_own",),
    },
    "checkpoints": {
        "resumed before and after sparsity starts": tuple(
            f"test_saving.py::test_resumed_run_gives_the_losses_of_the_uninterrupted_one[{step}-{criterion}]"
            for step in ("before sparsity", "after")
            for criterion in (
                "svd",
                "random",
                "sampled",
                "static",
                "output",
                "svd_whitened",
                "low rank",
                "small sample",
            )
        ),
        "resumed from any step": tuple(
            f"test_saving.py::test_any_step_can_be_resumed_from[{step}]" for step in range(1, 6)
        ),
        "resumed by the callback alone": ("test_callback.py::test_statistics_go_on_after_resuming[3]",),
        "settings travel with the checkpoint": (
            "test_saving.py::test_configuration_comes_back_with_the_checkpoint[after]",
        ),
        "opens without this package": (
            "test_saving.py::test_checkpoint_opens_where_the_package_is_unknown",
            "test_saving.py::test_sparse_checkpoint_can_be_resumed_by_sft",
        ),
    },
    "faults": {
        "killed during SVD": (_FAULTS.format("killed_while_the_cache_is_built[SVD]"),),
        "killed during the cache write": (_FAULTS.format("killed_while_the_cache_is_built[write]"),),
        "killed during a checkpoint": (
            _FAULTS.format("killed_while_a_checkpoint_is_written[statistics]"),
            _FAULTS.format("killed_while_a_checkpoint_is_written[trainer state]"),
        ),
        "full disk": (
            _FAULTS.format("cache_that_takes_nothing[full disk]"),
            _FAULTS.format("disk_full_at_a_checkpoint"),
        ),
        "read-only cache": (_FAULTS.format("cache_that_takes_nothing[read-only]"),),
        "two processes, one cache": ("test_svd_cache.py::test_two_processes_never_meet_half_a_file",),
        "corrupt cache": ("test_svd_cache.py::test_damaged_file_is_rebuilt[flipped_bit]",),
        "corrupt statistics": (_FAULTS.format("damaged_statistics_are_refused"),),
        "NaN or inf": (
            _FAULTS.format("broken_hidden_states_in_a_sparse_step[svd-NaN]"),
            _FAULTS.format("broken_hidden_states_in_a_dense_step_teach_nothing[static]"),
            _FAULTS.format("nothing_but_broken_hidden_states"),
        ),
        "exception in a sparse forward": (_FAULTS.format("a_run_that_ends_in_an_error[error-forward]"),),
        "Ctrl-C in train()": (
            _FAULTS.format("a_run_that_ends_in_an_error[Ctrl-C-forward]"),
            _FAULTS.format("a_run_that_ends_in_an_error[Ctrl-C-evaluation]"),
        ),
        "CUDA out of memory": (_FAULTS.format("a_run_that_ends_in_an_error[CUDA out of memory-backward]"),),
        "interrupted quickstart": (_FAULTS.format("interrupted_command_is_one_line"),),
        "500 steps": ("test_memory.py::test_500_steps_leave_nothing_behind[static]",),
        "any batch and schedule": ("test_properties.py::test_sparse_model_equals_the_masked_dense_one",),
    },
    "safety": {
        "no pickle, safe YAML, no remote code": ("test_safety.py::test_no_unsafe_call[sparselora_hf/handle.py]",),
        "trust_remote_code off unless asked": ("test_safety.py::test_code_of_a_model_is_trusted_when_asked_alone",),
        "settings cannot run code": ("test_safety.py::test_settings_cannot_run_code",),
        "files hold no code": ("test_safety.py::test_saved_files_hold_no_code",),
        "file names from hub names": (
            "test_safety.py::test_a_command_writes_into_its_output_and_cache_folders_alone",
        ),
        "output and cache folders alone": (
            "test_safety.py::test_a_run_writes_into_its_output_and_cache_folders_alone",
        ),
    },
    "several devices": {
        "DDP": (
            _SEVERAL.format("losses_are_those_of_one_process_that_accumulates[ddp-svd]"),
            _SEVERAL.format("losses_are_those_of_one_process_with_the_global_batch[fixed sets-ddp]"),
        ),
        "FSDP2": (_SEVERAL.format("losses_are_those_of_one_process_with_the_global_batch[fixed sets-fsdp2]"),),
        "ZeRO-2": (
            "test_zero2.py::test_exact_savings_change_no_loss",
            "test_zero2.py::test_dense_until_start_step_and_sparse_from_there",
            _SEVERAL.format("configurations_are_accelerates[zero2.yaml]"),
        ),
        "a rank without context or without labels": (
            _SEVERAL.format("losses_are_those_of_one_process_that_accumulates[ddp-uneven]"),
        ),
        "killed and resumed": (_SEVERAL.format("a_run_that_was_stopped_or_killed_goes_on[ddp-killed-3]"),),
        "one cache, two processes": (_SEVERAL.format("a_cache_that_both_processes_built_is_whole"),),
        "device_map": ("test_placement.py::test_a_model_spread_by_device_map_is_sparse[qkvo]",),
        "ZeRO-3 refused": ("test_placement.py::test_zero_3_is_refused_before_its_weights_are_split",),
        "tensor parallelism refused": (
            "test_placement.py::test_weights_that_are_not_whole_are_refused[split by tensor parallelism]",
        ),
    },
    "other programs": {
        "axolotl": ("test_integrations.py::test_axolotl_plugin_adds_the_callback_by_the_runs_settings",),
        "LLaMA-Factory": ("test_integrations.py::test_llamafactory_recipe_hands_the_callback_over",),
        "any callback": (
            "test_callback.py::test_callback_with_a_configuration_sparsifies_the_model[given to the trainer]",
        ),
        "unsupported versions refused": (
            "test_versions.py::test_another_version_is_refused_before_the_model_is_touched[transformers-4.57.6]",
        ),
    },
}
