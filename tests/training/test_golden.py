"""Which test holds which invariant of the trainer, by the number it has in the reference that the trainer is written
from (its section 6); Gram anchoring (part of 6.2) has no code yet. Numbers in the ids of tests are these."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

HELD = {
    "6.1 golden 2x2 and 2x3, limit": "training/test_losses.py::"
    "test_sinkhorn_golden_2x2 test_sinkhorn_golden_limit_and_2x3",
    "6.1 sample sums, prototype mass, vector form": "training/test_losses.py::"
    "test_sinkhorn_vector_form_is_the_matrix_form",
    "6.1 equal logits, one sample, identity": "training/test_losses.py::test_sinkhorn_degenerate_inputs",
    "6.1 permutations, shifts": "training/test_losses.py::test_sinkhorn_symmetries",
    "6.1 overflow": "training/test_losses.py::test_sinkhorn_is_finite_where_exp_is_not",
    "6.1 entropy bound": "training/test_losses.py::test_sinkhorn_entropy_bound_when_prototypes_outnumber_samples",
    "6.1 offset form": "training/test_prototype_loss.py::test_sinkhorn_offset_gives_the_targets_of_sinkhorn_knopp",
    "6.1 distributed": "training/test_world.py::test_sums_of_two_processes_are_those_of_one",
    "6.2 ln K": "training/test_losses.py::test_a_uniform_student_loses_ln_k_for_any_target",
    "6.2 total": "training/test_losses.py::test_the_total_of_a_uniform_student_with_half_of_its_crops_masked "
    "test_every_share_of_the_loss_of_a_uniform_student",
    "6.2 lower bound, gradient, DINO": "training/test_losses.py::"
    "test_the_loss_is_at_least_the_entropy_of_the_targets_and_its_gradient_the_difference",
    "6.2 lower bound, gradient, iBOT": "training/test_losses.py::"
    "test_ibot_loss_is_at_least_the_entropy_and_its_gradient_the_difference",
    "6.2 swap": "training/test_losses.py::test_swapping_the_global_crops_changes_nothing",
    "6.2 no local crops": "training/test_losses.py::test_dino_loss_is_the_mean_over_pairs_of_crops",
    "6.2 iBOT weights": "training/test_masks.py::test_each_masked_crop_weighs_one",
    "6.2 centering": "training/test_losses.py::test_the_centre_follows_a_constant_and_leaves_the_old_one_alone",
    "6.2 KoLeo values": "training/test_losses.py::test_koleo_golden",
    "6.2 KoLeo invariances": "training/test_losses.py::test_koleo_knows_no_scale_rotation_or_order",
    "6.2 KoLeo copies, one image": "training/test_losses.py::"
    "test_koleo_of_copies_and_of_one_row_or_none_is_zero_with_a_zero_gradient",
    "6.2 RankMe": "training/test_losses.py::test_effective_rank_of_gaussians "
    "test_effective_rank_of_one_direction_of_none_and_of_what_is_not_finite",
    "6.2 RankMe, numpy": "training/test_probes.py::test_rankme_golden",
    "6.3 EMA, half-lives": "training/test_schedules.py::test_ema_closed_form_and_ends test_ema_half_lives",
    "6.3 schedules": "training/test_schedules.py::test_old_style_golden test_v2_style_golden",
    "6.3 layer decay": "training/test_schedules.py::test_layer_decay_golden",
    "6.3 sqrt scale": "training/test_schedules.py::test_published_rates",
    "6.3 frozen last layer": "training/test_train_step.py::test_the_last_layer_stands_still_while_frozen",
    "6.3 skip": "training/test_train_step.py::test_a_step_that_is_not_finite_leaves_every_bit",
    "6.3 skip, two processes": "training/test_world.py::test_what_is_not_finite_in_one_process_skips_the_step_in_both",
    "6.3 clip": "training/test_train_step.py::test_gradients_are_clipped_module_by_module",
    "6.3 DDP": "training/test_world.py::test_a_step_of_two_processes_is_one_of_one",
    "6.3 stochastic depth": "embedding/test_vit.py::test_stochastic_depth_keeps_a_fixed_number_of_images "
    "test_stochastic_depth_is_off_in_eval_and_unbiased",
    "6.4 masks": "training/test_masks.py::test_published_totals "
    "test_every_masked_crop_has_its_exact_number_of_patches test_every_patch_and_every_crop_has_its_turn",
    "6.4 crops": "training/test_augment.py::test_boxes_keep_to_the_ranges_of_area_and_aspect "
    "test_same_key_same_crops_other_key_others test_normalise_is_undone_by_its_formula",
    "6.4 any number of workers": "training/test_trainer.py::test_workers_and_restarts_change_no_bit",
    "6.5 rotation": "embedding/test_vit.py::test_rotation_keeps_norms_and_depends_on_the_difference_alone "
    "test_rotation_of_centre_prefix_and_mirror test_rotary_periods_and_extent",
    "6.5 ViT": "embedding/test_vit.py::test_without_positions_patches_are_a_set "
    "test_masked_patches_are_the_mask_token test_images_do_not_see_each_other "
    "test_views_in_one_pass_are_views_one_by_one test_without_branches_the_output_is_the_norm_of_the_embeddings "
    "test_positions_at_the_native_grid_are_exact_and_constants_stay",
    "6.6 backbones": "embedding/test_vit.py::test_published_parameter_counts",
    "6.6 heads": "training/test_heads.py::test_published_parameter_counts",
    "6.7 Hugging Face": "embedding/test_hf_weights.py::test_a_saved_vit_comes_back_and_is_what_transformers_reads",
}


@pytest.mark.parametrize("number", HELD)
def test_what_is_said_to_be_tested_has_its_test(number):
    file, names = HELD[number].split("::")
    found = set(re.findall(r"^def (test_\w+)", (TESTS / file).read_text(), re.MULTILINE))
    assert set(names.split()) <= found
