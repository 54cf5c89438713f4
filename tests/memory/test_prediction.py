from sft_recipes.memory import prediction
from sft_recipes.memory.prediction import Footprint
from tests.memory.toys import WHOLE


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

    many = prediction.extrapolate(of(2), of(4), 100)

    assert (many.peak, many.parameters, many.trained, many.layers) == (of(100).peak, 307, 300, 100)
    assert (of(4).peak["head"], many.peak["activations"]) == (100, 1000)


def test_room_for_what_the_allocator_does_not_count() -> None:
    assert prediction.fits(WHOLE, 4400, "cpu")
    assert not prediction.fits(WHOLE, 4400, "cuda")
    assert prediction.fits(WHOLE, (4400 + prediction.CONTEXT) / prediction.SHARE + 1, "cuda")
    assert not prediction.fits(WHOLE, 4400 + prediction.CONTEXT, "cuda")
    assert prediction.on_device(WHOLE, "cuda").peak["buffers"] == prediction.WORKSPACES


def test_sizes_in_words() -> None:
    assert [prediction.format_bytes(size) for size in (2**34, 1.5 * 2**20, 512)] == ["16.0 GiB", "1.5 MiB", "0.5 KiB"]
