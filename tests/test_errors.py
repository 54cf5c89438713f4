from pickle import UnpicklingError

from sft_recipes.errors import reason_of


def test_a_library_error_is_one_short_line() -> None:
    assert reason_of(ValueError("no\n  such   file.")) == "no such file"
    assert reason_of(KeyError()) == "KeyError"
    assert len(reason_of(ValueError("x" * 10_000))) == 400


def test_a_refused_pickle_is_never_advised_to_be_loaded_anyway() -> None:
    assert "It was not loaded, because it could run code." in reason_of(
        UnpicklingError("weights_only=False would help")
    )
