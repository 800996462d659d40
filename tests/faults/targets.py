"""What fastdeit promises of its reliability, and the tests that hold it: the table of docs/reliability.md.

`python -m tests.faults.targets --write` writes the table anew; without `--write` it is printed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "docs" / "reliability.md"
HEADING = "## The targets\n"
"""What stands above it on the page is written by hand, what stands below it is made from `TARGETS`."""


@dataclass(frozen=True)
class Target:
    """One promise. With tests and without `why_not` it is held, with both in part, with `why_not` alone not at all."""

    number: int
    what: str
    tests: tuple[str, ...]
    """Node ids of pytest, without parameters."""
    why_not: str = ""
    """What no test shows, or why there is none."""

    @property
    def held(self) -> str:
        """The state in a word or two."""
        if not self.tests:
            return "no"
        return "in part" if self.why_not else "yes"


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
            "tests/data/test_loader.py::test_restart_at_any_step",
        ),
        why_not=(
            "with several processes the means of a line of the log that a resume falls into may differ in their last "
            "digits"
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
        ),
        why_not="results of whole runs are compared, so the bounds are wider than the rounding of one step",
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
    Target(
        13,
        "A kill at a random moment of a save costs nothing that was saved before.",
        (
            "tests/faults/test_writing.py::test_sigkill_at_random_times_costs_nothing_that_was_saved",
            "tests/faults/test_chaos.py::test_twenty_kills_and_what_comes_with_them_lose_nothing",
            "tests/faults/test_sweep.py::test_sweep_removes_what_the_dead_left_and_nothing_else",
        ),
        why_not="100 kills of small checkpoints, not 200 of 64 MiB (`fastdeit chaos RECIPE --kills 200`)",
    ),
    Target(
        14,
        "A kill between any two steps of a save or of a removal leaves a run that can be resumed.",
        ("tests/faults/test_writing.py::test_sigkill_at_every_point_leaves_a_resumable_run",),
    ),
    Target(
        15,
        "A disk that is full, read-only or broken costs no checkpoint, and the run says what to do.",
        (
            "tests/faults/test_disk.py::test_a_disk_that_refuses_a_file",
            "tests/faults/test_disk.py::test_a_run_that_is_to_go_on_says_so_and_does",
            "tests/faults/test_disk.py::test_the_last_checkpoint_is_never_given_up",
            "tests/faults/test_writing.py::test_a_disk_error_at_every_point_of_a_save_is_one_clear_error",
            "tests/faults/test_writing.py::test_a_disk_error_in_prune_is_clear_and_costs_no_kept_checkpoint",
            "tests/faults/test_writing.py::test_a_file_that_cannot_grow_is_an_error",
        ),
    ),
    Target(
        16,
        ("A file of a checkpoint that was cut, changed or exchanged is found, and the checkpoint before it is used."),
        (
            "tests/faults/test_damage.py::test_damage_is_detected_named_and_skipped",
            "tests/faults/test_damage.py::test_every_byte_of_the_manifest_counts",
            "tests/faults/test_damage.py::test_swapped_files_are_detected",
            "tests/test_train.py::test_a_damaged_newest_checkpoint_costs_one_interval",
        ),
    ),
    Target(
        17,
        "SIGTERM to the launcher saves, ends with exit code 75, and loses nothing.",
        (
            "tests/cli/test_launch.py::test_sigterm_to_the_launcher_is_75",
            "tests/faults/test_ranks.py::test_two_launchers_meet_as_two_machines_do_and_one_signal_stops_both",
            "tests/faults/test_ranks.py::test_a_signal_to_torchrun_saves",
        ),
    ),
    Target(
        18,
        "A signal to the launcher and all its workers at once does the same.",
        (
            "tests/cli/test_launch.py::test_ctrl_c_and_death_of_a_real_launcher",
            "tests/cli/test_launch.py::test_a_process_of_a_run_leaves_ignored_signals_alone_but_for_sigterm",
        ),
        why_not="the group gets SIGINT, and stand-ins for the workers of a run",
    ),
    Target(
        19,
        ("A signal at any other time, as at the start or in a save, ends with 75 and leaves no half checkpoint."),
        (
            "tests/cli/test_launch.py::test_interrupted_before_training_is_75",
            "tests/cli/test_launch.py::test_a_signal_at_the_start_waits_until_workers_can_hear_it",
            "tests/engine/test_watch.py::test_a_signal_is_heard_while_processes_wait_for_each_other",
            "tests/test_train_resume.py::test_a_signal_during_anything_is_heard_and_costs_nothing",
            "tests/faults/test_writing.py::test_an_interrupt_in_a_save_leaves_nothing_behind",
        ),
        why_not="no test sends a signal during a compilation by Inductor",
    ),
    Target(
        20,
        ("A process that is killed is started anew with the others, and the run ends as if nothing had happened."),
        (
            "tests/faults/test_ranks.py::test_a_run_that_is_started_anew_ends_as_if_nothing_had_happened",
            "tests/faults/test_ranks.py::test_torchrun_restarts_from_the_newest_checkpoint_too",
            "tests/faults/test_chaos.py::test_two_processes_and_their_launcher_lose_nothing",
        ),
        why_not="two processes, not four",
    ),
    Target(
        21,
        "A run that is killed again and again still moves on, and ends as if nothing had happened.",
        (
            "tests/faults/test_chaos.py::test_twenty_kills_and_what_comes_with_them_lose_nothing",
            "tests/faults/test_ranks.py::test_a_run_that_is_started_anew_ends_as_if_nothing_had_happened",
        ),
    ),
    Target(
        22,
        "When the launcher is killed, no worker is left.",
        (
            "tests/cli/test_launch.py::test_ctrl_c_and_death_of_a_real_launcher",
            "tests/cli/test_launch.py::test_die_with_parent_notices_that_the_parent_is_gone",
        ),
    ),
    Target(
        23,
        "A process that hangs is named with its stacks, and all end with exit code 1.",
        (
            "tests/faults/test_ranks.py::test_a_rank_that_hangs_is_named_and_the_run_fails",
            "tests/engine/test_watch.py::test_a_rank_that_does_not_move_is_named_with_its_stacks_and_all_leave",
            "tests/faults/test_ranks.py::test_under_srun_a_rank_that_cannot_speak_is_named",
            "tests/engine/test_watch.py::test_a_store_that_does_not_answer_names_who_keeps_it",
            "tests/engine/test_watch.py::test_time_in_which_this_process_was_stopped_is_no_hang",
        ),
    ),
    Target(
        24,
        "When one process fails, all end, and the first to fail is named once.",
        (
            "tests/cli/test_launch.py::test_failure_of_a_worker_is_the_runs",
            "tests/engine/test_watch.py::test_the_rank_that_died_is_named_without_a_launcher",
            "tests/faults/test_ranks.py::test_under_srun_one_process_speaks_and_the_dead_one_is_named",
            "tests/run/test_agreement.py::test_what_fails_on_one_process_fails_on_all",
        ),
    ),
    Target(
        25,
        (
            "A gradient that is not finite, on any process, changes nothing: not the weights, the averages or the "
            "optimizer state."
        ),
        (
            "tests/engine/test_step.py::test_a_non_finite_gradient_changes_nothing",
            "tests/engine/test_step.py::test_one_bad_process_makes_all_skip",
            "tests/kernels/test_optimizer.py::test_skipped_step_changes_no_bit",
            "tests/kernels/test_optimizer_triton.py::test_skipped_step_changes_no_bit",
            "tests/test_train_guarded.py::test_what_is_not_finite_is_never_saved_and_the_run_goes_on_from_before",
        ),
    ),
    Target(
        26,
        "Gradients that stay not finite stop the run, and its newest checkpoint is from before.",
        (
            "tests/test_train.py::test_persistent_nan_stops_with_its_own_exit_code",
            "tests/test_train_resume.py::test_a_run_that_the_guard_stopped_goes_on_from_before",
            "tests/test_train_resume.py::test_a_checkpoint_is_not_made_in_a_row_of_bad_steps_but_after_it",
        ),
        why_not="not built: the message names the steps, and not their samples",
    ),
    Target(
        27,
        "The loss scale of fp16 comes down where gradients overflow, and recovers.",
        (
            "tests/engine/test_step.py::test_fp16_scale_halves_on_overflow_and_doubles_after_2000_good_steps",
            "tests/engine/test_guard.py::test_the_loss_scale_has_a_floor_and_recovers",
            "tests/engine/test_guard.py::test_the_loss_scale_has_a_ceiling",
        ),
        why_not="a run in fp16 that overflows needs a GPU",
    ),
    Target(
        28,
        "A gradient far above the usual ones is said, left out or taken back, as the recipe wants.",
        (
            "tests/test_train_guarded.py::test_a_spike_is_said_and_kept_skipped_or_taken_back",
            "tests/test_train_guarded.py::test_a_run_with_a_spike_resumes_exactly",
            "tests/engine/test_guard.py::test_a_spike_is_counted_and_skipped_where_that_is_asked",
            "tests/engine/test_guard.py::test_what_is_no_spike_is_none",
        ),
    ),
    Target(
        29,
        ("A worker of the input that fails or is killed ends in an error or is stood in for, and never in a hang."),
        (
            "tests/data/test_loader.py::test_errors_of_the_source_reach_the_consumer",
            "tests/data/test_check.py::test_a_killed_process_is_an_error_and_no_hang",
            "tests/data/test_scan.py::test_what_a_killed_process_was_to_do_is_done_here",
        ),
    ),
    Target(
        30,
        "A sink or a picture that fails costs the run nothing.",
        (
            "tests/engine/test_metrics.py::test_a_failing_sink_is_reported_once_and_left_alone",
            "tests/engine/test_metrics.py::test_a_sink_failing_to_close_is_reported",
            "tests/faults/test_disk.py::test_a_picture_that_cannot_be_drawn_costs_nothing",
        ),
    ),
    Target(
        31,
        ("Of two commands that train in one directory, the second one is refused with the name of the first."),
        (
            "tests/run/test_lock.py::test_a_second_process_is_refused_with_the_name_of_the_first",
            "tests/run/test_lock.py::test_the_place_of_a_killed_process_is_taken_and_it_is_said",
            "tests/run/test_lock.py::test_the_clock_decides_nothing",
            "tests/run/test_directory.py::test_of_several_in_one_directory_one_trains",
        ),
        why_not="locks across machines need NFS or another shared file system",
    ),
    Target(
        32,
        "Odd, damaged and hostile pictures are decoded as Pillow does, or replaced, counted and named.",
        (
            "tests/data/test_sources_bad.py::test_sound_files_pass_and_broken_ones_have_a_reason",
            "tests/data/test_sources_bad.py::test_loader_decodes_as_pil_and_names_the_broken_ones",
            "tests/data/test_decode.py::test_what_is_no_picture_is_refused_with_a_reason",
            "tests/data/test_bad.py::test_training_takes_substitutes_and_nothing_else_changes",
            "tests/data/test_bad.py::test_too_many_bad_files_are_an_error_that_lists_them",
            "tests/test_train.py::test_bad_images_are_replaced_counted_and_named",
            "tests/faults/test_bombs.py::test_an_image_of_gigabytes_is_not_read",
            "tests/faults/test_bombs.py::test_a_picture_of_a_few_bytes_and_most_pixels_takes_less_than_a_gibibyte",
            "tests/faults/test_bombs.py::test_decoding_a_picture_takes_no_more_memory_than_its_limit_counts",
            "tests/faults/test_bombs.py::test_the_page_says_how_large_a_picture_may_be",
        ),
    ),
    Target(
        33,
        "A data set without any usable picture, on all processes or on one, ends in a message.",
        (
            "tests/data/test_bad.py::test_a_data_set_of_bad_files_only_ends",
            "tests/data/test_bad_list.py::test_the_limit_is_that_of_all_processes",
        ),
        why_not="the processes are loaders of one process, one after another",
    ),
    Target(
        34,
        (
            "A hostile or damaged tar file, table, list, archive or pack of data writes nothing and takes no memory "
            "without end, and what is wrong with it is said."
        ),
        (
            "tests/data/test_tar.py::test_names_that_lead_out_of_the_data_set",
            "tests/data/test_tar.py::test_links_devices_and_sparse_files",
            "tests/data/test_tar.py::test_a_name_with_a_nul",
            "tests/data/test_tar.py::test_the_first_of_two_members_with_one_name_is_used",
            "tests/data/test_tar.py::test_a_cut_tail_costs_the_samples_in_it",
            "tests/data/test_tar.py::test_headers_that_lie_about_the_size",
            "tests/data/test_tar.py::test_headers_nested_without_end",
            "tests/data/test_tar.py::test_nothing_usable_is_an_error_with_the_reasons",
            "tests/faults/test_bombs.py::test_a_tar_header_of_gigabytes_is_not_read",
            "tests/faults/test_bombs.py::test_rows_without_end_are_not_listed",
            "tests/faults/test_bombs.py::test_an_image_that_a_row_group_has_once_is_in_memory_once",
            "tests/faults/test_bombs.py::test_a_row_group_that_is_too_large_is_refused_by_its_metadata",
            "tests/faults/test_bombs.py::test_a_row_group_that_is_as_large_as_its_file_is_read",
            "tests/faults/test_bombs.py::test_a_row_group_that_is_too_large_is_refused_while_it_is_read",
            "tests/faults/test_bombs.py::test_labels_that_are_too_long_are_refused",
            "tests/faults/test_bombs.py::test_a_list_of_gigabytes_is_not_read",
            "tests/faults/test_bombs.py::test_a_kit_that_unpacks_to_gigabytes_is_not_unpacked",
            "tests/faults/test_bombs.py::test_a_pack_with_a_right_seal_and_half_an_index_is_refused",
            "tests/faults/test_bombs.py::test_an_index_with_a_right_seal_and_a_wrong_inside_is_refused",
        ),
    ),
    Target(
        35,
        ("A mistake in a recipe or an override is refused with its file and line, exit code 2, and no traceback."),
        (
            "tests/recipe/test_recipe.py::test_a_mistake_is_refused_where_it_stands",
            "tests/recipe/test_recipe.py::test_a_mistake_of_structure_is_refused_where_it_stands",
            "tests/recipe/test_recipe.py::test_a_file_that_is_no_recipe_is_refused",
            "tests/recipe/test_recipe.py::test_large_files_are_refused_unread",
            "tests/recipe/test_recipe.py::test_no_traceback_and_exit_code_2",
            "tests/recipe/test_meaning.py::test_bad_bases",
            "tests/recipe/test_meaning.py::test_bad_overrides",
            "tests/cli/test_matrix.py::test_no_traceback",
        ),
    ),
    Target(
        36,
        "Whatever a recipe file holds, reading it ends in a recipe or in a recipe error.",
        (
            "tests/recipe/test_fuzz.py::test_fuzz_edited_recipes",
            "tests/recipe/test_fuzz.py::test_fuzz_values_of_fields",
            "tests/recipe/test_fuzz.py::test_fuzz_files",
            "tests/recipe/test_fuzz.py::test_fuzz_overrides",
        ),
        why_not="400 examples, the same ones each time, not 2,000",
    ),
    Target(
        37,
        "Nothing in a hostile checkpoint, run or file of weights is executed, and what cannot be followed is damaged.",
        (
            "tests/faults/test_hostile.py::test_a_pickle_is_not_executed",
            "tests/faults/test_hostile.py::test_a_hostile_tensor_file_is_an_error_not_a_crash",
            "tests/faults/test_hostile.py::test_a_file_name_that_leads_elsewhere_is_refused",
            "tests/faults/test_hostile.py::test_a_manifest_that_makes_no_sense_is_refused",
            "tests/faults/test_bombs.py::test_json_that_cannot_be_followed_is_what_is_damaged",
            "tests/faults/test_bombs.py::test_lines_of_json_that_cannot_be_followed_are_damaged_lines",
            "tests/faults/test_bombs.py::test_a_recipe_of_a_run_that_cannot_be_followed_is_left_empty",
            "tests/models/test_pickled.py::test_nothing_in_a_file_is_executed",
            "tests/models/test_pickled.py::test_the_canaries_sing",
            "tests/cli/test_trust.py::test_code_that_a_run_names_is_not_executed",
        ),
    ),
    Target(
        38,
        (
            "Weights in the form of the published DeiT, DeiT III, CaiT, LeViT and timm files give the logits of "
            "their own code."
        ),
        (
            "tests/models/test_timm_parity.py::test_state_dict_and_logits_are_timms",
            "tests/models/test_convert.py::test_deit_3_adds_its_class_token_behind_the_positions",
            "tests/models/test_convert.py::test_cait_has_a_class_token_and_no_position_for_it",
            "tests/models/test_convert.py::test_levit_has_other_names_for_the_same_network",
        ),
        why_not="the published files themselves need a network; the tests make files of the same form",
    ),
    Target(
        39,
        ("A run is not gone on with under another recipe or other data; the field and both values are named."),
        (
            "tests/test_train.py::test_wrong_resume_names_field_and_values",
            "tests/test_train.py::test_resume_on_other_data_is_refused",
            "tests/run/test_state.py::test_tensors_that_do_not_fit_are_named_and_nothing_is_broadcast",
        ),
    ),
    Target(
        40,
        "A long run takes no more memory than a short one.",
        (
            "tests/data/test_loader.py::test_many_batches_leave_nothing_behind",
            "tests/data/test_ops.py::test_memory_does_not_grow",
        ),
        why_not="the input alone, and no file handles; a whole run on a card needs a GPU",
    ),
    Target(
        41,
        "An index of as many images as ImageNet's is small, and any step is found at once.",
        (
            "tests/data/test_packed.py::test_a_long_index_is_small_and_needs_no_replay",
            "tests/data/test_order.py::test_imagenet_epoch_with_three_repeats_has_427008_images_three_times",
        ),
        why_not="a tenth of the names; times are not bounded",
    ),
    Target(
        42,
        "Many shards are shared out evenly, and nothing comes twice.",
        (
            "tests/data/test_order.py::test_shards_are_disjoint_complete_and_even",
            "tests/data/test_tar.py::test_samples_are_those_of_the_shards",
            "tests/data/test_shards.py::test_of_several_processes_one_lists_and_the_others_take_its_list",
        ),
        why_not="a few shards, not 100 of 10,000 samples",
    ),
    Target(
        43,
        ("However often a run saves, the disk holds no more checkpoints than the recipe keeps, and one more."),
        (
            "tests/engine/test_checkpoint.py::test_many_saves_with_pruning_hold_three_checkpoints_at_most",
            "tests/test_train.py::test_retention_keeps_two_and_the_best",
        ),
    ),
    Target(
        44,
        "Guard, heartbeat and log make the GPU wait for nothing, and cost at most a hundredth of a step.",
        (
            "tests/engine/test_dry.py::test_a_step_waits_for_nothing_and_launches_its_kernels",
            "tests/engine/test_gpu.py::test_a_step_waits_for_nothing",
            "tests/bench/test_step.py::test_each_part_of_watching_is_timed",
        ),
        why_not="the share of the time on a GPU needs one; on a CPU `fastdeit bench step` prints it",
    ),
    Target(
        45,
        "`fastdeit --help` and `import fastdeit` load no torch.",
        (
            "tests/cli/test_main.py::test_help_and_version_load_nothing_that_takes_long",
            "tests/test_layers.py::test_importing_the_package_and_the_command_line_imports_no_torch",
        ),
    ),
    Target(
        46,
        "The time from the command to the first step is recorded, and a slower start fails.",
        (),
        why_not="not built: times of a shared machine say too little",
    ),
    Target(
        47,
        "Every op agrees with PyTorch, forward and backward, in every type, layout and mode.",
        (
            "tests/kernels/test_ops.py::test_opcheck",
            "tests/kernels/test_ops.py::test_gradients_are_those_of_the_formula",
            "tests/kernels/test_ops.py::test_arguments_of_any_layout",
            "tests/kernels/test_ops.py::test_compiled_is_eager",
            "tests/kernels/test_attention.py::test_as_good_as_pytorch",
            "tests/kernels/test_layer_norm.py::test_as_good_as_pytorch",
            "tests/kernels/test_mlp.py::test_mlp_as_good_as_pytorch",
            "tests/kernels/test_losses_triton.py::test_as_good_as_pytorch",
            "tests/kernels/test_optimizer_triton.py::test_as_good_as_pytorch",
            "tests/kernels/test_gpu.py::test_compiled_by_inductor_is_eager_mode",
        ),
        why_not="on real kernels it needs a GPU: without one Triton's interpreter runs them",
    ),
    Target(
        48,
        "Where a kernel cannot run, the reason is said once, and the result is the reference's.",
        (
            "tests/kernels/test_selection.py::test_info_has_a_reason_for_every_op",
            "tests/kernels/test_selection.py::test_what_a_backend_does_not_take_goes_to_the_next_with_one_warning",
            "tests/kernels/test_attention.py::test_what_triton_does_not_take_is_the_references",
            "tests/kernels/test_native.py::test_what_the_card_does_not_take_falls_back_once",
        ),
    ),
    Target(
        49,
        "Infinities, NaN, huge, tiny and empty inputs give what PyTorch gives.",
        (
            "tests/kernels/test_attention.py::test_huge_and_tiny_logits",
            "tests/kernels/test_attention.py::test_not_finite_where_pytorch_is_not",
            "tests/kernels/test_layer_norm.py::test_huge_and_tiny_values",
            "tests/kernels/test_layer_norm.py::test_not_finite_where_pytorch_is_not",
            "tests/kernels/test_layer_norm.py::test_no_rows",
            "tests/kernels/test_mlp.py::test_not_finite_where_pytorch_is_not",
            "tests/kernels/test_losses_triton.py::test_huge_and_tiny_logits",
            "tests/kernels/test_losses_triton.py::test_not_finite_where_pytorch_is_not",
            "tests/kernels/test_optimizer_triton.py::test_extreme_numbers",
        ),
        why_not="on real kernels it needs a GPU",
    ),
    Target(
        50,
        "Ops of random shapes agree with PyTorch.",
        (
            "tests/kernels/test_attention.py::test_any_shape",
            "tests/kernels/test_attention.py::test_masks_of_any_size",
            "tests/kernels/test_attention_fused.py::test_any_shape",
        ),
        why_not="a few examples a test, not 200 an op every night",
    ),
)


def table() -> str:
    """What stands below the heading: the number of targets in each state, and a row for each."""
    states = [target.held for target in TARGETS]
    lines = [
        "",
        f"Of {len(TARGETS)} targets {states.count('yes')} are held, {states.count('in part')} in part, and "
        f"{states.count('no')} not. `python -m tests.faults.targets --write` writes this table from",
        "`tests/faults/targets.py`, and a test holds that the tests exist. Whether they pass is what `pytest` and "
        "`pytest -m slow` say.",
        "",
        "| | target | held | what is missing | tests |",
        "|---|---|---|---|---|",
    ]
    for target in TARGETS:
        tests = "<br>".join(f"`{name}`" for name in target.tests)
        lines.append(f"| {target.number} | {target.what} | {target.held} | {target.why_not} | {tests} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page `text` with the table as it should be. Raises ValueError where the page has no heading for it."""
    above, heading, _ = text.partition(HEADING)
    if not heading:
        raise ValueError(f"{PAGE} has no heading {HEADING.strip()!r}; put it where the table shall begin")
    return above + heading + table()


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(PAGE.read_text()))
    else:
        print(table(), end="")
