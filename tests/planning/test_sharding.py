import pytest

from sft_recipes.planning import memory, sharding
from tests.planning.toys import WHOLE, recipe


def test_one_process_has_all() -> None:
    assert sharding.per_rank(WHOLE, recipe()) == WHOLE


def test_ddp_has_all_and_buckets_of_gradients() -> None:
    rank = sharding.per_rank(WHOLE, recipe(launch={"processes": 4}))

    assert rank.peak_bytes == 4400 + 2 * 500


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_shares_of_everything(strategy: str) -> None:
    """In the weights' own type (no mixed precision), of float32 weights: a quarter, and what is whole for the moment."""
    four = recipe(
        model={"name": "x", "dtype": "float32"},
        train={"mixed_precision": "no"},
        launch={"processes": 4, "strategy": strategy},
    )

    rank = sharding.per_rank(WHOLE, four)

    gathered = 4 * (2 * 50 + 100)  # two layers, and what is in none
    assert rank.phases["optimizer"] == {
        "weights": 250, "adapters": 0, "gradients": 250, "optimizer": 500, "activations": 0, "head": 0, "buffers": 0,
    }  # fmt: skip
    assert rank.phases["forward"]["buffers"] == gathered
    assert rank.phases["backward, upper layers"]["gradients"] == 250 + gathered
    assert rank.phases["forward"]["activations"] == 500


def test_zero2_keeps_weights_whole_and_a_copy_in_float32() -> None:
    rank = sharding.per_rank(WHOLE, recipe(launch={"processes": 2, "strategy": "zero2"}))

    assert rank.phases["optimizer"]["weights"] == 1000
    assert rank.phases["optimizer"]["gradients"] == 500
    assert rank.phases["optimizer"]["optimizer"] == 2 * 2000 / 2 + 4 * 500 / 2  # moments in float32, and the copy


def test_offloaded_is_not_on_the_device() -> None:
    rank = sharding.per_rank(WHOLE, recipe(launch={"strategy": "fsdp2", "cpu_offload": True}))

    assert rank.phases["optimizer"] == dict.fromkeys(memory.PARTS, 0)
    assert rank.phases["forward"]["activations"] == 500


def test_states_that_are_float32_already_grow_no_wider() -> None:
    four = {"launch": {"processes": 4, "strategy": "zero3"}}

    wide, same = (
        sharding.per_rank(WHOLE, recipe(train={"optimizer": name}, **four)) for name in ("adamw_torch", "lion_32bit")
    )

    assert wide.phases["optimizer"]["optimizer"] - same.phases["optimizer"]["optimizer"] == 2000 / 4
