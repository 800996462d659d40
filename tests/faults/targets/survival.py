"""What a run survives: kills, full disks, signals, hung processes, numbers that are not finite."""

from tests.faults.targets.target import Target

TARGETS = (
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
            "tests/faults/test_ranks.py::test_under_nohup_a_run_outlives_its_terminal_and_a_signal_to_all_saves",
            "tests/cli/test_launch.py::test_ctrl_c_and_death_of_a_real_launcher",
            "tests/cli/test_launch.py::test_a_process_of_a_run_leaves_ignored_signals_alone_but_for_sigterm",
        ),
    ),
    Target(
        19,
        ("A signal at any other time, as at the start or in a save, ends with 75 and leaves no half checkpoint."),
        (
            "tests/cli/test_launch.py::test_interrupted_before_training_is_75",
            "tests/cli/test_launch.py::test_a_signal_at_the_start_waits_until_workers_can_hear_it",
            "tests/engine/test_watch.py::test_a_signal_is_heard_while_processes_wait_for_each_other",
            "tests/test_train_resume.py::test_a_signal_during_anything_is_heard_and_costs_nothing",
            "tests/test_train_resume.py::test_a_signal_while_inductor_compiles_is_heard_and_costs_nothing",
            "tests/faults/test_writing.py::test_an_interrupt_in_a_save_leaves_nothing_behind",
        ),
    ),
    Target(
        20,
        ("A process that is killed is started anew with the others, and the run ends as if nothing had happened."),
        (
            "tests/faults/test_ranks.py::test_a_run_that_is_started_anew_ends_as_if_nothing_had_happened",
            "tests/faults/test_ranks.py::test_torchrun_restarts_from_the_newest_checkpoint_too",
            "tests/faults/test_chaos.py::test_two_processes_their_launcher_and_checkpoints_in_the_background_lose_nothing",
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
            "tests/test_train_guarded.py::test_the_loss_scale_of_a_run_in_fp16_comes_down_and_recovers",
        ),
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
)
