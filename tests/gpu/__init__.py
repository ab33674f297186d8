"""What must hold on a GPU, and the test of each case.

`python -m pytest tests/gpu -n 4 --dist loadfile` runs them where CUDA is, made for 150 s on one Hopper with
16 cores; those of a file share a process (tests/helpers/verbs.py). Without CUDA they are skipped; with
MEGATRON_DLM_REHEARSE=1 all but the GPU's own run on the CPU, which is how they are tried before they meet a
GPU. `-m sanitizer` runs the kernels under NVIDIA's compute-sanitizer. test_cases.py fails where a row names a
test that is not there, or a test has no row.
"""

CASES = {
    "each family trains as on the CPU": "test_training.py::test_losses_are_those_on_the_cpu",
    "kernels, compiled": "../unit/kernels/test_kernels.py",
    "Transformer Engine's bf16 against local layers": "test_precision.py::test_bf16_trains_as_local_layers",
    "every FP8 recipe of the chip against local layers": "test_precision.py::test_fp8_trains_as_local_layers",
    "FP8 of every family": "test_precision.py::test_every_family_trains_in_fp8",
    "FP8 goes on where it stopped, bit for bit": "test_precision.py::test_fp8_goes_on_where_it_stopped",
    "save synchronous": "test_saving.py::test_a_save_goes_on_bit_for_bit",
    "save asynchronous": "test_saving.py::test_a_save_goes_on_bit_for_bit",
    "SIGKILL, then resume bit for bit": "test_saving.py::test_a_killed_run_goes_on_bit_for_bit",
    "SIGTERM saves, exit code 3": "test_saving.py::test_sigterm_saves_and_ends_with_3",
    "CUDA graphs train as layers that run": "test_graphs.py::test_recorded_layers_train_as_layers_that_run",
    "CUDA graphs sum gradients of 3 microbatches": "test_graphs.py::test_gradients_of_three_microbatches",
    "loader: pinned memory": "test_training.py::test_every_loader_brings_the_same",
    "loader: workers": "test_training.py::test_every_loader_brings_the_same",
    "loader: DALI": "test_training.py::test_dali_brings_the_same",
    "texts during training": "test_training.py::test_texts_written_meanwhile_change_nothing",
    "energy": "test_training.py::test_power_is_that_of_a_gpu",
    "sample, every family, in time": "test_use.py::test_every_family_samples_in_time",
    "evaluate nll, in time": "test_use.py::test_nll_in_time",
    "export and its check, in time": "test_use.py::test_export_proves_itself_in_time",
    "FlexAttention forward and backward": "test_flex_attention.py::test_gradients_are_those_of_dense_masks",
    "FlexAttention's speed": "test_flex_attention.py::test_speed_against_dense_masks",
    "compute-sanitizer": "test_sanitizer.py::test_kernels_under_the_sanitizer",
    "bench/gpu.py --quick": "test_bench.py::test_the_quick_benchmark_begins",
    "several: TP 2 with sequence parallelism": "test_several.py::test_two_processes_train_as_one",
    "several: PP 2": "test_several.py::test_two_processes_train_as_one",
    "several: CP 2": "test_several.py::test_two_processes_train_as_one",
    "several: DP 2": "test_several.py::test_two_processes_train_as_one",
    "several: distributed optimizer": "test_several.py::test_two_processes_train_as_one",
    "several: fully sharded": "test_several.py::test_two_processes_train_as_one",
    "several: user buffers": "test_several.py::test_user_buffers_train_as_plain_exchange",
    "several: asynchronous save": "test_several.py::test_an_asynchronous_save_is_read_by_one_process",
    "several: reshard": "test_several.py::test_two_processes_save_and_one_goes_on",
    "one card: what gloo carries": "test_several.py::test_what_gloo_carries_between_processes_on_one_card",
}
"""Case, and its test below this folder."""
