import pytest

from sft_recipes.planning import changes, memory, optimizers, sharding, speed
from sft_recipes.planning.memory import GIB, Footprint
from sft_recipes.recipe.schema import Recipe

LEAST = {"model": {"name": "x"}, "data": {"train": "x"}, "output_dir": "x"}
WHOLE = Footprint(
    phases={
        "forward": {"weights": 1000, "activations": 500, "optimizer": 2000},
        "backward, upper layers": {"weights": 1000, "gradients": 1000, "activations": 400, "optimizer": 2000},
        "optimizer": {"weights": 1000, "gradients": 1000, "optimizer": 2000},
    },
    parameters=500, trained=500, layers=8, layer=50, rest=100, trained_layer=50, trained_rest=100,
)  # fmt: skip


def recipe(**sections: object) -> Recipe:
    return Recipe.model_validate(LEAST | sections)


def test_the_peak_is_the_largest_moment() -> None:
    assert WHOLE.peak_bytes == 4400
    assert WHOLE.peak == {
        "weights": 1000, "adapters": 0, "gradients": 1000, "optimizer": 2000, "activations": 400, "head": 0, "buffers": 0,
    }  # fmt: skip


def test_extrapolated_by_phase() -> None:
    """The phase that is largest with few layers is not the one that is largest with many."""

    def of(layers: int) -> Footprint:
        phases = {"loss": {"head": 100.0, "weights": layers}, "forward": {"activations": 10.0 * layers}}
        return Footprint(phases, 7 + 3 * layers, 3 * layers, layers, 3, 7, 3, 0)

    many = memory.extrapolate(of(2), of(4), 100)

    assert (many.peak, many.parameters, many.trained, many.layers) == (of(100).peak, 307, 300, 100)
    assert (of(4).peak["head"], many.peak["activations"]) == (100, 1000)


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


def test_room_for_what_the_allocator_does_not_count() -> None:
    assert memory.fits(WHOLE, 4400, "cpu")
    assert not memory.fits(WHOLE, 4400, "cuda")
    assert memory.fits(WHOLE, 4400 + memory.CONTEXT, "cuda")
    assert memory.on_device(WHOLE, "cuda").peak["buffers"] == memory.WORKSPACES


@pytest.mark.parametrize(
    ("optimizer", "shape", "embedding", "expected"),
    [
        ("adamw_bnb_8bit", (1024, 1024), False, 2 * (2**20 + 2**12 * 4 + 1024)),
        ("adamw_bnb_8bit", (1024, 1024), True, 8 * 2**20),
        ("adamw_bnb_8bit", (1000,), False, 8 * 1000),
        ("adamw_8bit_sr", (1024, 1024), False, 2 * (2**20 + 2**12 * 4 + 1024)),
        ("adamw_8bit_sr", (1000,), False, 4 * 1000),  # in the weights' type
        ("lion_8bit", (1024, 1024), False, 2**20 + 2**12 * 4 + 1024),
        ("paged_adamw_8bit", (1024, 1024), False, 0),
        ("adafactor", (1024, 512), False, 4 * (1024 + 512)),
        ("something_new", (10,), False, 40),
    ],
)
def test_states(optimizer: str, shape: tuple[int, ...], embedding: bool, expected: int) -> None:
    assert optimizers.state_bytes(optimizer, shape, 2, embedding=embedding) == expected


def kinds(of: Recipe, *, masked: bool = True) -> list[str]:
    return [kind for kind, _ in changes.candidates(of, masked=masked)]


def test_changes_cheapest_first() -> None:
    assert kinds(recipe(train={"gradient_checkpointing": False, "micro_batch_size": 4})) == [
        "attention", "checkpointing", "micro-batch", "LoRA", "nf4", "8-bit optimizer", "fsdp2", "CPU offload",
    ]  # fmt: skip
    assert kinds(recipe(lora={}, train={"micro_batch_size": 1, "optimizer": "adamw_8bit_sr"}), masked=False) == [
        "nf4",
        "fsdp2",
        "CPU offload",
    ]


def test_changes_are_mildest_first_and_keep_the_global_batch() -> None:
    options = dict(changes.candidates(recipe(train={"gradient_checkpointing": 3, "micro_batch_size": 8}), masked=False))

    assert options["checkpointing"] == [{"train.gradient_checkpointing": 2}, {"train.gradient_checkpointing": True}]
    assert options["micro-batch"] == [{"train.micro_batch_size": size} for size in (4, 2, 1)]
    assert [each["launch.processes"] for each in options["fsdp2"]] == [2, 4]  # 8 sequences on 8 would be 64
    for each in options["fsdp2"] + options["micro-batch"]:
        assert changes.applied(recipe(train={"micro_batch_size": 8}), each).sequences_per_step == 32


def test_sizes_for_auto() -> None:
    auto = {"micro_batch_size": "auto", "global_batch_size": 48}

    assert changes.micro_batch_sizes(recipe(train=auto)) == [1, 2, 4, 8, 16]
    assert changes.micro_batch_sizes(recipe(train=auto, launch={"processes": 3})) == [1, 2, 4, 8, 16]
    assert changes.micro_batch_sizes(recipe(train=auto, launch={"processes": 5})) == []


class Llama8B:
    hidden_size, num_attention_heads, head_dim, vocab_size = 4096, 32, 128, 128256


HEAD = 4096 * 128256
LAYERS = 6_979_321_856
EIGHT = Footprint({"x": {}}, LAYERS + 2 * HEAD, LAYERS + 2 * HEAD, 32, LAYERS // 32, 2 * HEAD, LAYERS // 32, 2 * HEAD)


@pytest.mark.parametrize(
    ("checkpointing", "length", "expected"),
    [
        # 6 (P + H) + 6 L h s, and the head's logits a second time
        (False, 2048, 6 * (LAYERS + HEAD) + 2 * HEAD + 6 * 32 * 4096 * 2048),
        (True, 2048, 8 * LAYERS + 8 * HEAD + 8 * 32 * 4096 * 2048),
    ],
)
def test_operations(checkpointing: bool, length: int, expected: float) -> None:
    full = recipe(train={"gradient_checkpointing": checkpointing})

    assert speed.flops_per_token(full, EIGHT, Llama8B, length, dense=False) == pytest.approx(expected, rel=1e-9)


def test_operations_of_adapters() -> None:
    adapters = 41_943_040
    with_lora = Footprint({"x": {}}, EIGHT.parameters + adapters, adapters, 32, 0, 2 * HEAD, 0, 0)

    found = speed.flops_per_token(
        recipe(lora={}, train={"gradient_checkpointing": False}), with_lora, Llama8B, 0, dense=False
    )

    assert found == pytest.approx(4 * (LAYERS + HEAD) + 2 * HEAD + 6 * adapters, rel=1e-9)


def test_a_mask_is_not_skipped() -> None:
    """All pairs of the micro-batch's tokens are computed, whichever documents they are of."""
    masked, skipped = (speed.flops_per_token(recipe(), EIGHT, Llama8B, 100, dense=dense) for dense in (True, False))

    assert masked - skipped == pytest.approx(8 * 32 * 4096 * (2 * 2 * 512 - 100))


def test_time_is_between_the_shares_of_the_peak_rate() -> None:
    h100 = speed.gpu_named("h100")
    assert h100 is not None

    fast, slow = speed.hours(989e12 * 3600, h100, 2)

    assert (fast, slow) == (pytest.approx(1 / 2 / max(speed.REACHED)), pytest.approx(1 / 2 / min(speed.REACHED)))
    assert {gpu.name for gpu in speed.gpus_of(24)} >= {"L4", "RTX-4090"}
    assert speed.gpu_named("rtx 4090") is not None
    assert speed.gpu_named("nothing") is None
    assert GIB == 2**30
