from dataclasses import replace

import pytest

from sft_recipes.memory import per_rank_memory
from sft_recipes.memory.prediction import Footprint, Part, Phase
from sft_recipes.planning.model_size import ModelSize
from tests.memory.toys import WHOLE, recipe

TRAINED = (Part.WEIGHTS, Part.GRADIENTS, Part.OPTIMIZER)


def test_one_process_has_all() -> None:
    assert per_rank_memory.per_rank(WHOLE, recipe()) == WHOLE


def test_ddp_has_all_and_buckets_of_gradients() -> None:
    rank = per_rank_memory.per_rank(WHOLE, recipe(launch={"processes": 4}))

    assert rank.peak_bytes == 4400 + 2 * 500


def test_fsdp2_shards_everything() -> None:
    """In the weights' own type (no mixed precision), of float32 weights: a quarter, and what is whole for the moment."""
    four = recipe(
        model={"name": "x", "dtype": "float32"},
        train={"mixed_precision": "no", "gradient_accumulation_steps": 1},
        launch={"processes": 4, "strategy": "fsdp2"},
    )

    rank = per_rank_memory.per_rank(WHOLE, four)

    sharded = {Part.WEIGHTS: 250, Part.GRADIENTS: 250, Part.OPTIMIZER: 500}
    assert rank.phases[Phase.OPTIMIZER] == dict.fromkeys(Part, 0) | sharded
    assert rank.phases[Phase.FORWARD][Part.BUFFERS] == 4 * 2 * 50  # two layers
    assert rank.phases[Phase.BACKWARD_UPPER][Part.GRADIENTS] == 250 + (4 + 4) * 50  # and what is reduced of them
    assert rank.phases[Phase.FORWARD][Part.ACTIVATIONS] == 500


def test_fsdp2_trains_in_float32_where_there_is_mixed_precision() -> None:
    """Whatever the optimizer's states are in."""
    four = {"launch": {"processes": 4, "strategy": "fsdp2"}}

    ours, eight = (
        per_rank_memory.per_rank(WHOLE, recipe(train={"optimizer": name, "gradient_accumulation_steps": 1}, **four))
        for name in ("adamw_torch", "adamw_8bit_sr")
    )

    assert [ours.phases[Phase.OPTIMIZER][part] for part in TRAINED] == [500, 500, 1000]
    assert [eight.phases[Phase.OPTIMIZER][part] for part in TRAINED] == [500, 500, 500]
    assert ours.phases[Phase.FORWARD][Part.BUFFERS] == 2 * 2 * 50  # computed with in bfloat16


def test_fsdp2_gathers_what_is_in_no_layer_when_it_is_due() -> None:
    phases = {Phase.LOSS_BACKWARD: {Part.WEIGHTS: 1000.0}, Phase.BACKWARD_LOWER: {Part.WEIGHTS: 1000.0}}
    whole = Footprint(phases, replace(WHOLE.size, rest=300, trained_rest=300))
    rank = per_rank_memory.per_rank(whole, recipe(launch={"processes": 4, "strategy": "fsdp2"}))

    assert rank.phases[Phase.LOSS_BACKWARD][Part.BUFFERS] == 2 * (50 + 300)
    assert rank.phases[Phase.LOSS_BACKWARD][Part.GRADIENTS] == (2 + 4) * 300 / 2  # of the head, and in float32
    assert rank.phases[Phase.BACKWARD_LOWER][Part.BUFFERS] == 2 * 2 * 50
    assert rank.phases[Phase.BACKWARD_LOWER][Part.GRADIENTS] == (2 + 4) * 50


def test_fsdp2_shards_4_bits_but_not_their_scales() -> None:
    frozen, adapters = 64 * 256 * 8, 1000  # in eight layers; 200 values in none
    scales = frozen / 64 + 4 * frozen / (64 * 256)
    weights = frozen / 2 + scales + 2 * 200
    parts = {Part.WEIGHTS: weights, Part.ADAPTERS: 4.0 * adapters, Part.BUFFERS: 7.0}
    size = ModelSize(
        frozen + adapters + 200, adapters, layers=8, layer=(frozen + adapters) // 8, rest=200, trained_layer=adapters // 8,
    )  # fmt: skip
    whole = Footprint({Phase.FORWARD: parts, Phase.OPTIMIZER: parts}, size)
    two = recipe(model={"name": "x", "quantization": "nf4"}, lora={}, launch={"processes": 2, "strategy": "fsdp2"})

    rank = per_rank_memory.per_rank(whole, two)

    assert rank.phases[Phase.OPTIMIZER][Part.WEIGHTS] == (weights - scales) / 2 + scales
    assert rank.phases[Phase.OPTIMIZER][Part.ADAPTERS] == 4 * adapters / 2
    layer = frozen / 8 / 2 + 2 * adapters / 8  # gathered as they are stored, the adapters in bfloat16
    assert rank.phases[Phase.FORWARD][Part.BUFFERS] == 2 * layer + 7


def test_zero3_shards_everything_and_gathers_a_billion_values() -> None:
    rank = per_rank_memory.per_rank(WHOLE, recipe(launch={"processes": 2, "strategy": "zero3"}))

    found, step = rank.phases[Phase.FORWARD], rank.phases[Phase.OPTIMIZER]
    assert found[Part.WEIGHTS] == 500
    assert found[Part.OPTIMIZER] == 2 * 2000 / 2 + 4 * 500 / 2  # moments in float32, and the copy
    assert found[Part.BUFFERS] == 2 * per_rank_memory._BUCKET + 2 * 500  # all there are: fewer than a billion
    assert step[Part.GRADIENTS] == 1000 / 2 + 4 * 500 / 2  # and in float32, for the step
    assert step[Part.BUFFERS] == 2 * per_rank_memory._BUCKET


def test_zero2_keeps_weights_whole_and_a_copy_in_float32() -> None:
    rank = per_rank_memory.per_rank(WHOLE, recipe(launch={"processes": 2, "strategy": "zero2"}))

    assert rank.phases[Phase.OPTIMIZER][Part.WEIGHTS] == 1000
    assert rank.phases[Phase.BACKWARD_UPPER][Part.GRADIENTS] == 500
    assert rank.phases[Phase.OPTIMIZER][Part.OPTIMIZER] == 2 * 2000 / 2 + 4 * 500 / 2


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_zero_computes_in_half_of_float32_weights(strategy: str) -> None:
    two = recipe(model={"name": "x", "dtype": "float32"}, launch={"processes": 2, "strategy": strategy})

    rank = per_rank_memory.per_rank(WHOLE, two)

    shares = 2 if strategy == "zero3" else 1
    assert rank.phases[Phase.FORWARD][Part.WEIGHTS] == 1000 / 2 / shares
    assert rank.phases[Phase.FORWARD][Part.OPTIMIZER] == 2000 / 2 + 4 * 500 / 2


def test_offloaded_is_not_on_the_device() -> None:
    rank = per_rank_memory.per_rank(WHOLE, recipe(launch={"strategy": "fsdp2", "cpu_offload": True}))

    assert rank.phases[Phase.OPTIMIZER] == dict.fromkeys(Part, 0)
    assert rank.phases[Phase.FORWARD][Part.ACTIVATIONS] == 500


def test_states_that_are_float32_already_grow_no_wider() -> None:
    four = {"launch": {"processes": 4, "strategy": "zero3"}}

    wide, same = (
        per_rank_memory.per_rank(WHOLE, recipe(train={"optimizer": name}, **four))
        for name in ("adamw_torch", "lion_32bit")
    )

    assert wide.phases[Phase.OPTIMIZER][Part.OPTIMIZER] - same.phases[Phase.OPTIMIZER][Part.OPTIMIZER] == 2000 / 4
