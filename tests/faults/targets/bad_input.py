"""What somebody else may hand in: pictures, archives, recipes, checkpoints."""

from tests.faults.targets.target import Target

TARGETS = (
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
            "tests/faults/test_ranks.py::test_data_without_a_usable_picture_end_in_a_message_on_all_processes_and_on_one",
        ),
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
        ("tests/recipe/test_fuzz.py::test_whatever_a_recipe_file_holds",),
    ),
    Target(
        37,
        "Nothing in a hostile checkpoint, run or file of weights is executed, and what cannot be followed is damaged.",
        (
            "tests/faults/test_hostile.py::test_a_pickle_is_not_executed",
            "tests/faults/test_hostile.py::test_a_hostile_tensor_file_is_an_error_not_a_crash",
            "tests/faults/test_hostile.py::test_a_file_name_that_leads_elsewhere_is_refused",
            "tests/faults/test_hostile.py::test_a_manifest_that_makes_no_sense_is_refused",
            "tests/faults/test_hostile_run.py::test_values_of_another_kind_end_in_no_traceback",
            "tests/faults/test_hostile_run.py::test_what_is_no_file_is_not_waited_for",
            "tests/faults/test_hostile_run.py::test_a_run_writes_through_no_link",
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
)
