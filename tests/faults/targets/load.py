"""What holds for long and for many: memory, disk, time."""

from tests.faults.targets.target import Target

TARGETS = (
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
)
