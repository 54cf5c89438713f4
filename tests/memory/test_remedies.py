from dataclasses import replace

from sft_recipes.errors import ModelError
from sft_recipes.memory import remedies
from sft_recipes.memory.prediction import Footprint, Part, Phase
from sft_recipes.recipe.schema import Recipe
from tests.memory.toys import WHOLE, recipe


def kinds(of: Recipe, attention: str | None = "flash_attention_2") -> list[str]:
    return [kind for kind, _ in remedies.candidates(of, attention)]


def test_changes_cheapest_first() -> None:
    assert kinds(recipe(train={"gradient_checkpointing": False, "micro_batch_size": 4})) == [
        "attention", "checkpointing", "micro-batch", "LoRA", "nf4", "8-bit optimizer", "fsdp2", "CPU offload",
    ]  # fmt: skip
    assert kinds(recipe(lora={}, train={"micro_batch_size": 1, "optimizer": "adamw_8bit_sr"}), None) == [
        "nf4",
        "fsdp2",
        "CPU offload",
    ]


def test_changes_are_mildest_first_and_keep_the_global_batch() -> None:
    options = dict(remedies.candidates(recipe(train={"gradient_checkpointing": 3, "micro_batch_size": 8}), None))

    assert options["checkpointing"] == [{"train.gradient_checkpointing": 2}, {"train.gradient_checkpointing": True}]
    assert options["micro-batch"] == [{"train.micro_batch_size": size} for size in (4, 2, 1)]
    assert [each["launch.processes"] for each in options["fsdp2"]] == [2, 4]  # 8 sequences on 8 would be 64
    for each in options["fsdp2"] + options["micro-batch"]:
        assert remedies.applied(recipe(train={"micro_batch_size": 8}), each).sequences_per_step == 32


def test_a_smaller_micro_batch_is_accumulated_longer() -> None:
    given = recipe(train={"micro_batch_size": 12, "global_batch_size": None, "gradient_accumulation_steps": 2})

    options = dict(remedies.candidates(given, None))["micro-batch"]

    assert [remedies.applied(given, each).train.micro_batch_size for each in options] == [6, 3]
    assert {remedies.applied(given, each).sequences_per_step for each in options} == {24}


def test_what_an_engine_cannot_do_is_not_recommended() -> None:
    given = recipe(lora={}, train={"optimizer": "paged_adamw_8bit"})

    found = remedies.find_remedies(given, lambda _: WHOLE, 1.0, "cpu", None)

    assert "fsdp2" in kinds(given)
    assert {each.kind for each in found}.isdisjoint({"fsdp2", "CPU offload"})
    assert "fsdp2" in {each.kind for each in remedies.find_remedies(recipe(lora={}), lambda _: WHOLE, 1.0, "cpu", None)}


def test_sizes_for_auto() -> None:
    auto = {"micro_batch_size": "auto", "global_batch_size": 48}

    assert remedies.micro_batch_sizes(recipe(train=auto)) == [1, 2, 4, 8, 16]
    assert remedies.micro_batch_sizes(recipe(train=auto, launch={"processes": 3})) == [1, 2, 4, 8, 16]
    assert remedies.micro_batch_sizes(recipe(train=auto, launch={"processes": 5})) == []


def predicted(of: Recipe) -> Footprint:
    """4,000 bytes a sequence of the micro-batch, half with checkpoints, and 100 less for each layer that is skipped."""
    assert isinstance(of.train.micro_batch_size, int)
    if of.model.quantization:
        raise ModelError("model.name: x: no such layers")
    layers = of.train.gradient_checkpointing
    share = 0.5 + 0.1 * (layers - 1) if layers else 1.0
    return replace(WHOLE, phases={Phase.FORWARD: {Part.ACTIVATIONS: 4000 * of.train.micro_batch_size * share}})


def test_remedies_are_the_mildest_that_fit() -> None:
    asked: list[Recipe] = []

    def predict(of: Recipe) -> Footprint:
        asked.append(of)
        return predicted(of)

    eight = recipe(train={"micro_batch_size": 8, "gradient_checkpointing": False})

    found = {each.kind: each for each in remedies.find_remedies(eight, predict, 20_000, "cpu", None)}

    assert found["micro-batch"].change == {"train.micro_batch_size": 4}
    assert (found["micro-batch"].peak, found["micro-batch"].fits) == (16_000, True)
    assert found["checkpointing"].change == {"train.gradient_checkpointing": 2}  # 19,200 bytes; 3 would be 22,400
    assert not found["8-bit optimizer"].fits
    assert "nf4" not in found  # it cannot be predicted
    assert found["LoRA"].__str__() == "--set lora='{}': 31.2 KiB"
    assert len([of for of in asked if of.train.micro_batch_size == 8 and of.train.gradient_checkpointing]) <= 3


def test_the_strongest_is_named_where_none_fits() -> None:
    eight = recipe(train={"micro_batch_size": 8, "gradient_checkpointing": False})

    found = {each.kind: each for each in remedies.find_remedies(eight, predicted, 1000, "cpu", "sdpa")}

    assert found["attention"].change == {"model.attention": "sdpa"}
    assert found["micro-batch"].change == {"train.micro_batch_size": 1}
    assert found["checkpointing"].change == {"train.gradient_checkpointing": True}
    assert not any(each.fits for each in found.values())


def test_weights_in_4_bits_can_be_shared_and_those_in_8_cannot() -> None:
    four, eight = (
        recipe(model={"name": "x", "quantization": kind}, lora={}, launch={"processes": 1}) for kind in ("nf4", "int8")
    )

    assert "fsdp2" in kinds(four)
    assert "fsdp2" not in kinds(eight)
