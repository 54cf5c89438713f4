from sft_recipes.memory import prediction
from sft_recipes.memory.prediction import Footprint, Part, Phase
from sft_recipes.planning.model_size import ModelSize
from tests.memory.toys import WHOLE


def test_the_peak_is_the_largest_moment() -> None:
    assert WHOLE.peak_bytes == 4400
    assert WHOLE.peak == dict.fromkeys(Part, 0) | WHOLE.phases[Phase.BACKWARD_UPPER]


def test_extrapolated_by_phase() -> None:
    """The phase that is largest with few layers is not the one that is largest with many."""

    def of(layers: int) -> Footprint:
        phases = {
            Phase.LOSS_FORWARD: {Part.HEAD: 100.0, Part.WEIGHTS: layers},
            Phase.FORWARD: {Part.ACTIVATIONS: 10.0 * layers},
        }
        return Footprint(phases, ModelSize(7 + 3 * layers, 3 * layers, layers, layer=3, rest=7, trained_layer=3))

    many = prediction.extrapolate(of(2), of(4), 100)

    assert (many.peak, many.size) == (of(100).peak, of(100).size)
    assert (of(4).peak[Part.HEAD], many.peak[Part.ACTIVATIONS]) == (100, 1000)


def test_room_for_what_the_allocator_does_not_count() -> None:
    assert prediction.fits(WHOLE, 4400, "cpu")
    assert not prediction.fits(WHOLE, 4400, "cuda")
    assert prediction.fits(WHOLE, (4400 + prediction.CONTEXT) / prediction.SHARE + 1, "cuda")
    assert not prediction.fits(WHOLE, 4400 + prediction.CONTEXT, "cuda")
    assert prediction.on_device(WHOLE, "cuda").peak[Part.BUFFERS] == prediction.WORKSPACES


def test_sizes_in_words() -> None:
    assert [prediction.format_bytes(size) for size in (2**34, 1.5 * 2**20, 512)] == ["16.0 GiB", "1.5 MiB", "0.5 KiB"]
