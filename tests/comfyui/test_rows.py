"""The bad inputs that the pack answers for, by number: what comes in, what is owed, which tests hold it. Needs no ComfyUI."""

import ast
from pathlib import Path

FOLDER = Path(__file__).parent
ROWS = {
    1: (
        "frames that are not 4n+1",
        "trimmed, padded or refused, and said",
        ["test_preflight_trims_and_pads", "test_sizes_that_do_not_fit_are_refused_with_those_that_do"],
    ),
    2: (
        "sides that are not multiples of 16",
        "the same, with the sizes that fit",
        ["test_preflight_takes_size_and_length", "test_sizes_that_do_not_fit_are_refused_with_those_that_do"],
    ),
    3: ("no frames", "an error", ["test_bad_pictures", "test_preflight_takes_size_and_length"]),
    4: ("one frame", "works", ["test_one_frame_works"]),
    5: ("source and latent of different length", "both counts", ["test_bad_settings_of_the_sampler", "test_short_clips_are_refused_with_both_counts"]),
    6: ("a batch", "equals single runs", ["test_batch_of_two_equals_two_runs"]),
    7: ("RGBA", "composited, with a warning", ["test_mended_pictures_are_told_of"]),
    8: ("grayscale", "expanded", ["test_mended_pictures_are_told_of"]),
    9: ("NaN pixels", "the frame's number", ["test_bad_pictures"]),
    10: ("pixels outside 0..1", "clamped, with a warning", ["test_mended_pictures_are_told_of"]),
    11: ("a reference of 1 or of 20000 pixels", "the limits", ["test_bad_pictures"]),
    12: ("no reference, or several", "an error", ["test_a_missing_reference_is_refused_when_the_prompt_is_checked", "test_bad_pictures"]),
    13: ("cfg or shift that is no number", "an error", ["test_bad_settings_of_the_sampler"]),
    14: ("0 steps; denoise 0", "refused; nothing changes", ["test_bad_values_are_refused_when_the_prompt_is_checked", "test_denoise_0_changes_nothing"]),
    15: ("an empty instruction", "works", ["test_instruction_may_be_anything"]),
    16: ("a very long instruction", "cut, with a warning", ["test_instruction_may_be_anything", "test_budgets_are_those_of_the_vlm"]),
    17: ("emoji, other scripts; a lone surrogate", "works; its place", ["test_instruction_may_be_anything"]),
    18: (
        "a missing model file",
        "refused with the folder",
        ["test_missing_files_are_refused_with_the_folder", "test_bad_values_are_refused_when_the_prompt_is_checked"],
    ),
    19: (
        "one kind of model for another",
        "named",
        ["test_wrong_files_are_named", "test_another_vae_is_refused", "test_foreign_wires_are_named", "test_what_is_no_wan_is_refused"],
    ),
    20: ("a Wan file for a MiVE one", "family, keys and the node that converts it", ["test_wan_is_named"]),
    21: ("a truncated file", "path and bytes", ["test_wrong_files_are_named", "test_damaged_vlm_folders", "test_bad_files_are_named"]),
    22: ("a page or an archive by a model's name", "named", ["test_wrong_files_are_named"]),
    23: ("a shard that is missing or truncated", "its name", ["test_damaged_vlm_folders"]),
    24: ("a pickle", "never opened", ["test_pickles_are_not_offered"]),
    25: (
        "paths that leave the folder, NUL, backslash",
        "refused",
        [
            "test_missing_files_are_refused_with_the_folder",
            "test_a_name_that_leaves_the_folder_is_refused_when_the_prompt_is_checked",
            "test_what_is_not_there_is_refused_when_the_prompt_is_checked",
        ],
    ),
    26: (
        "a LoRA of which nothing fits; some",
        "an error; the counts",
        ["test_a_lora_that_does_not_fit_is_an_error", "test_every_spelling_lands_on_the_same_weights", "test_one_matrix_of_another_shape_is_left_out"],
    ),
    27: ("a bad layer spec", "refused with the column", ["test_bad_specs_are_refused_when_the_prompt_is_checked", "test_layers_that_the_vlm_lacks"]),
    28: ("another number of layers", "both", ["test_another_number_of_layers_or_width"]),
    29: ("another VLM", "both, and the one that fits", ["test_another_number_of_layers_or_width"]),
    30: ("transformers absent or too old", "the version, from the node", ["test_transformers_that_cannot_read_qwen3_vl", "test_import_is_fast_and_light"]),
    31: ("a workflow of an earlier pack", "runs: ids, order and types stay", ["test_schemas_are_what_they_were", "test_runs_to_its_end"]),
}
FAULTS = {
    "out of memory": ["test_out_of_memory_reaches_comfyui_and_the_rerun_is_clean", "test_the_vae_goes_on_in_tiles_where_memory_is_short"],
    "a training that ends badly": [
        "test_a_failed_training_leaves_the_server_well",
        "test_nothing_stays_and_nothing_else_is_disturbed",
        "test_a_loss_that_is_no_number_ends_the_training",
    ],
    "interrupt": [
        "test_interrupt_ends_at_once_and_leaves_nothing_behind",
        "test_cancel_is_heard_in_the_middle_and_the_rerun_is_clean",
        "test_an_interrupted_conversion_leaves_no_file",
        "test_cancel_saves_and_the_next_run_goes_on",
        "test_cancel_while_pairs_are_read",
    ],
    "no network": ["test_without_a_network_a_server_runs_the_whole_graph"],
    "non-finite latents": ["test_numbers_that_are_none_never_become_a_black_video"],
    "the next prompt": ["test_after_an_error_the_next_prompt_succeeds"],
    "many prompts": ["test_fifty_prompts_leave_no_trend"],
}


def test_every_row_has_its_tests():
    tests = {node.name for path in FOLDER.glob("test_*.py") for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}
    assert list(ROWS) == list(range(1, 32))
    for names in (*(names for _, _, names in ROWS.values()), *FAULTS.values()):
        assert names and not set(names) - tests, set(names) - tests
