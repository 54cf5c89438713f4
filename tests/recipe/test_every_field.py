"""Every recipe field has a test that shows its effect; this lists them and checks that they exist."""

import ast
from pathlib import Path

import pytest

from sft_recipes.recipe.parse import field_names
from sft_recipes.recipe.schema import Recipe

TESTS = Path(__file__).parents[1]
SHOWN_BY = {
    "model.name": "test_bad_input.py::test_model_names",
    "model.revision": "test_hub.py::test_a_revision_of_a_model_on_the_hub",
    "model.dtype": "models/test_model.py::test_weights_have_the_dtype_of_the_recipe",
    "model.attention": "models/test_model.py::test_attention",
    "model.quantization": "models/test_model.py::test_quantized_layers_and_those_skipped",
    "model.new_tokens": "models/test_adapters.py::test_new_token_embeddings_are_trained",
    "model.trust_remote_code": "models/test_model.py::test_remote_code_runs_only_if_the_recipe_allows_it",
    "data.train": "data/test_prepare.py::test_weights_repeat_rows",
    "data.eval": "data/test_prepare.py::test_validation_from_a_file",
    "data.format": "data/test_prepare.py::test_columns_and_format_of_the_recipe",
    "data.columns": "data/test_prepare.py::test_columns_and_format_of_the_recipe",
    "data.template": "models/test_tokenizer.py::test_the_chat_template_gives_the_trained_prompt",
    "data.train_on": "data/test_encoder.py::test_turns_are_trained_on_with_their_end",
    "data.special_tokens": "data/test_special_tokens.py::test_parsed_tokens_are_tokens",
    "data.chat_template_kwargs": "data/test_renderers.py::test_arguments_of_the_template_become_its_defaults",
    "data.date": "data/test_renderers.py::test_one_date_wherever_it_is_rendered",
    "data.train_on_reasoning": "data/test_chat_matrix.py::test_thoughts_out_of_the_loss",
    "data.max_length": "data/test_prepare.py::test_overlong_rows_are_an_error_that_says_what_would_fit",
    "data.overlong": "data/test_prepare.py::test_overlong_rows_dropped_truncated_or_split_are_counted",
    "data.packing": "data/test_prepare.py::test_packed_sequences_hold_every_token_once",
    "data.cross_document_attention": "training/test_training.py::test_with_cross_document_attention_they_attend",
    "data.shuffle": "data/test_prepare.py::test_shuffling_is_seeded",
    "data.input_separator": "data/test_prepare.py::test_instruction_and_input_joined",
    "data.on_bad_row": "data/test_tokenization.py::test_bad_rows_are_dropped_counted_and_named",
    "data.max_train_samples": "data/test_prepare.py::test_at_most_so_many_samples",
    "data.max_eval_samples": "data/test_prepare.py::test_at_most_so_many_samples",
    "lora.rank": "models/test_adapters.py::test_adapters_are_those_of_the_recipe",
    "lora.alpha": "models/test_adapters.py::test_adapters_are_those_of_the_recipe",
    "lora.dropout": "models/test_adapters.py::test_adapters_are_those_of_the_recipe",
    "lora.target_modules": "models/test_adapters.py::test_adapters_are_those_of_the_recipe",
    "lora.target_parameters": "models/test_adapters.py::test_parameters_of_experts_have_adapters",
    "lora.modules_to_save": "models/test_adapters.py::test_layers_trained_in_full_next_to_adapters",
    "lora.use_dora": "models/test_adapters.py::test_adapters_are_those_of_the_recipe",
    "lora.use_rslora": "models/test_adapters.py::test_adapters_are_those_of_the_recipe",
    "train.epochs": "planning/test_steps.py::test_count",
    "train.max_steps": "planning/test_steps.py::test_count",
    "train.micro_batch_size": "training/test_trainer.py::test_a_recipe_key_changes_its_argument",
    "train.global_batch_size": "training/test_training.py::test_accumulation_equals_the_large_batch",
    "train.gradient_accumulation_steps": "training/test_trainer.py::test_accumulation_instead_of_a_global_batch",
    "train.learning_rate": "training/test_training.py::test_the_learning_rate_of_every_step_follows_the_formula",
    "train.lr_scheduler": "training/test_training.py::test_the_learning_rate_of_every_step_follows_the_formula",
    "train.warmup_ratio": "training/test_training.py::test_the_learning_rate_of_every_step_follows_the_formula",
    "train.warmup_steps": "training/test_trainer.py::test_a_recipe_key_changes_its_argument",
    "train.weight_decay": "training/test_trainer.py::test_a_recipe_key_changes_its_argument",
    "train.max_grad_norm": "training/test_trainer.py::test_a_recipe_key_changes_its_argument",
    "train.mixed_precision": "training/test_trainer.py::test_a_recipe_key_changes_its_argument",
    "train.on_nonfinite": "training/test_guards.py::test_a_step_with_a_nonfinite_loss_is_skipped_and_counted",
    "train.optimizer": "training/test_training.py::test_stochastic_rounding_moves_weights_that_rounding_leaves",
    "train.gradient_checkpointing": "training/test_training.py::test_checkpointing_changes_nothing_but_memory",
    "train.kernels": "models/test_kernels.py::test_auto_takes_ligers_for_a_model_that_it_knows",
    "train.deterministic": "training/test_determinism.py::test_deterministic_algorithms_during_a_run",
    "train.compile": "training/test_training.py::test_compiled_layers_train_the_same_and_are_compiled_once",
    "train.preflight": "training/test_preflight.py::test_results_are_in_the_manifest",
    "train.seed": "training/test_training.py::test_the_seed_decides",
    "eval.every": "training/test_training.py::test_validation_before_the_first_step_and_at_the_end",
    "eval.generate": "test_run.py::test_prompts_answered_with_what_is_expected",
    "eval.max_new_tokens": "test_run.py::test_prompts_without_validation_rows",
    "checkpoint.every": "training/test_training.py::test_the_number_of_checkpoints_kept",
    "checkpoint.keep": "training/test_training.py::test_the_number_of_checkpoints_kept",
    "checkpoint.export_best": "training/test_training.py::test_the_best_checkpoint_is_exported",
    "checkpoint.on_failure": "training/test_checkpoint_dirs.py::test_a_full_disk_keeps_the_earlier_checkpoint",
    "log.every": "training/test_metrics.py::test_every_nth_step_and_the_last",
    "log.to": "trackers/test_trackers.py::test_each_step_is_logged_once",
    "log.project": "trackers/test_trackers.py::test_names_and_groups",
    "log.name": "trackers/test_trackers.py::test_names_and_groups",
    "log.group": "trackers/test_trackers.py::test_names_and_groups",
    "export.merge": "test_cli.py::test_run_generate_report_merge",
    "export.dtype": "test_run.py::test_the_model_loads_anywhere_and_is_the_one_that_was_trained",
    "export.max_shard_size": "test_run.py::test_shards",
    "launch.processes": "distributed/test_launch.py::test_one_rank_prints_and_writes",
    "launch.machines": "distributed/test_launch.py::test_two_nodes_train_one_model",
    "launch.strategy": "distributed/test_engines.py::test_two_processes_train_the_same_model_as_one",
    "launch.cpu_offload": "models/test_strategies.py::test_cpu_offload_moves_what_deepspeed_shards",
    "output_dir": "test_run.py::test_a_recipe_that_names_only_what_it_must",
    "trl": "training/test_trainer.py::test_a_recipe_key_changes_its_argument",
}
SECTIONS = {name for name in Recipe.model_fields if any(field.startswith(f"{name}.") for field in field_names())}


def test_every_field_is_shown() -> None:
    assert set(SHOWN_BY) == set(field_names()) - SECTIONS


@pytest.mark.parametrize("test", sorted(set(SHOWN_BY.values())))
def test_the_test_is_there(test: str) -> None:
    file, _, name = test.partition("::")
    tree = ast.parse((TESTS / file).read_text("utf-8"))

    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
