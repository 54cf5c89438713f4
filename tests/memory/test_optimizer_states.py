import pytest

from sft_recipes.memory import optimizer_states


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
        ("ademamix_8bit", (1024, 1024), False, 3 * (2**20 + 2**12 * 4 + 1024)),
        ("rmsprop_bnb_8bit", (1024, 1024), False, 2**20 + 2**12 * 4 + 1024),
        ("lion_32bit", (1024, 1024), False, 4 * 2**20),
        ("adafactor", (1024, 512), False, 4 * (1024 + 512)),
        ("something_new", (10,), False, 40),
    ],
)
def test_states(optimizer: str, shape: tuple[int, ...], embedding: bool, expected: int) -> None:
    assert optimizer_states.state_bytes(optimizer, shape, 2, "cuda", embedding=embedding) == expected


def test_pages_are_where_the_cpu_works() -> None:
    assert optimizer_states.state_bytes("paged_adamw_8bit", (2**20,), 2, "cpu") == optimizer_states.state_bytes(
        "adamw_8bit", (2**20,), 2, "cpu"
    )


def test_what_a_step_takes_for_itself() -> None:
    assert optimizer_states.temporary_bytes("adamw_8bit_sr", 1000, "cuda") == 8000
    assert optimizer_states.temporary_bytes("adamw_torch_fused", 1000, "cuda") == 0
