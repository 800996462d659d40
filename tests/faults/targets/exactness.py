"""Exactness: the same bits again, on any number of processes."""

from tests.faults.targets.target import Target

TARGETS = (
    Target(
        1,
        "A run that is repeated with the same seed has the same losses, bit for bit, with every method.",
        ("tests/golden/test_golden.py::test_losses",),
    ),
    Target(
        2,
        (
            "A run that was interrupted and resumed ends with the weights, the averages, the optimizer state and "
            "the log of one that was not."
        ),
        (
            "tests/test_train.py::test_interrupted_and_resumed_run_ends_with_the_same_weights",
            "tests/test_train_resume.py::test_a_run_that_is_stopped_after_any_step_ends_as_if_it_had_not_been",
            "tests/test_train.py::test_another_optimizer_resumes_exactly",
            "tests/test_train.py::test_ctrl_c_then_resume_on_the_command_line",
            "tests/faults/test_chaos.py::test_twenty_kills_and_what_comes_with_them_lose_nothing",
            "tests/faults/test_chaos.py::test_two_processes_their_launcher_and_checkpoints_in_the_background_lose_nothing",
            "tests/engine/test_step.py::test_each_process_goes_on_from_its_own_sums",
            "tests/data/test_loader.py::test_restart_at_any_step",
        ),
    ),
    Target(
        3,
        "The pixels of a sample do not depend on the number of threads or on the batches.",
        (
            "tests/data/test_ops.py::test_pixels_do_not_depend_on_batches_threads_or_start",
            "tests/data/test_loader.py::test_stream_is_the_same_for_any_division",
        ),
    ),
    Target(
        4,
        "In each epoch every sample comes as often as the recipe says, on any number of processes.",
        (
            "tests/data/test_order.py::test_every_sample_once_without_repeats_and_the_rest_dropped",
            "tests/data/test_order.py::test_imagenet_epoch_with_three_repeats_has_427008_images_three_times",
            "tests/data/test_order.py::test_shares_cover_the_groups_once_and_in_order",
            "tests/data/test_loader.py::test_stream_is_the_same_for_any_division",
            "tests/data/test_loader.py::test_restart_at_any_step",
        ),
    ),
    Target(
        5,
        "Training with FSDP2 gives the result of training with DDP.",
        (
            "tests/engine/test_parallel.py::test_two_processes_that_share_in_parts_train_as_two_that_each_have_all",
            "tests/engine/test_parallel.py::test_four_processes_are_near",
            "tests/test_train_fsdp.py::test_a_run_in_parts_has_the_bits_of_one_with_whole_networks_also_from_the_middle_on",
            "tests/test_train_fsdp.py::test_every_method_trains_in_parts_as_with_whole_networks",
        ),
    ),
    Target(
        6,
        "A checkpoint is gone on with by another number of processes, and by DDP or FSDP2.",
        (
            "tests/test_train_fsdp.py::test_every_checkpoint_loads_into_every_number_of_processes_bit_for_bit",
            "tests/test_train_fsdp.py::test_a_run_may_change_its_processes_as_often_as_it_likes",
            "tests/test_train_fsdp.py::test_a_run_in_parts_has_the_bits_of_one_with_whole_networks_also_from_the_middle_on",
            "tests/run/test_state.py::test_other_versions_and_another_number_of_processes_are_said",
        ),
    ),
    Target(
        7,
        "Gradient accumulation gives the result of the whole batch, but for rounding.",
        (
            "tests/test_train.py::test_micro_batches_change_nothing_but_rounding",
            "tests/test_train_skipping.py::test_micro_batches_and_processes_reach_the_result_of_one",
            "tests/test_train_skipping.py::test_one_step_of_micro_batches_has_the_gradient_of_the_whole_batch",
        ),
    ),
    Target(
        8,
        "The losses of every method and optimizer are those that are recorded in the repository.",
        (
            "tests/golden/test_golden.py::test_losses",
            "tests/engine/test_gpu.py::test_losses_are_those_of_the_cpu",
        ),
        why_not="losses of a GPU are not recorded: it needs one, and there they are compared with the CPU's",
    ),
    Target(
        9,
        "A checkpoint of every older version can be gone on with.",
        (
            "tests/run/test_state.py::test_one_checkpoint_of_every_schema_is_kept",
            "tests/run/test_state.py::test_a_checkpoint_of_every_schema_is_gone_on_with",
            "tests/run/test_state.py::test_a_schema_of_the_future_names_its_version",
        ),
    ),
    Target(
        10,
        "On a GPU each op and each run has the same bits every time.",
        (
            "tests/kernels/test_attention.py::test_every_run_has_the_same_bits",
            "tests/kernels/test_layer_norm.py::test_every_run_has_the_same_bits",
            "tests/kernels/test_mlp.py::test_every_run_has_the_same_bits",
            "tests/kernels/test_losses_triton.py::test_every_run_has_the_same_bits",
            "tests/kernels/test_optimizer_triton.py::test_every_run_has_the_same_bits",
            "tests/kernels/test_input_triton.py::test_every_run_has_the_same_bits",
            "tests/engine/test_gpu.py::test_two_runs_have_the_same_losses",
        ),
        why_not="needs a GPU: without one Triton's interpreter runs the kernels",
    ),
    Target(
        11,
        "An evaluation counts every image once, on any number of processes.",
        (
            "tests/run/test_evaluate.py::test_every_image_counts_once_on_several_processes",
            "tests/data/test_loader.py::test_evaluation_counts_101_images_exactly_once",
        ),
    ),
    Target(
        12,
        "A run with the fused kernels learns what plain PyTorch learns.",
        (
            "tests/bench/test_parity.py::test_fifty_steps_are_timm_s",
            "tests/engine/test_gpu.py::test_losses_are_those_of_the_cpu",
            "tests/engine/test_step.py::test_sixteen_bit_follows_fp32",
        ),
        why_not="the comparison of a run on Triton's kernels with the CPU needs a GPU",
    ),
)
