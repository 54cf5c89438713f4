import shutil
from pathlib import Path
from typing import Any

import pytest

from sft_recipes import atomic_files
from sft_recipes.recipe.schema import Recipe
from sft_recipes.report import run_data
from tests.report import runs


def read(
    folder: Path, lines: list[dict[str, Any]], asked: list[dict[str, Any]] | None = None, **known: Any
) -> run_data.Run:
    return run_data.load_run(runs.write(folder, lines, asked, **known), folder.name)


def resolved(**sections: Any) -> dict[str, Any]:
    """Return a recipe as `run` resolves it."""
    least = {"model": {"name": "m"}, "data": {"train": "t.jsonl"}, "output_dir": "o"}
    return Recipe.model_validate({**least, **sections}).resolved()


# --- State and figures -----------------------------------------------------------------------------------------------


def test_finished(tmp_path: Path) -> None:
    run = read(tmp_path, runs.metrics(3), manifest={"finished": "2026-01-02T04:05:06+00:00"})

    assert run_data.state(run) == "finished 2026-01-02 04:05:06 UTC"


def test_running_and_killed(tmp_path: Path) -> None:
    run = read(tmp_path, runs.metrics(3), data={"steps": 10}, proof=None)
    with atomic_files.locked(tmp_path):
        assert run_data.state(run) == "running: step 3 of 10"

    assert run_data.state(run) == "not finished: ended after step 3 of 10 (last logged step); --resume continues it"


def test_trained_and_its_merge_refused(tmp_path: Path) -> None:
    run = read(tmp_path, runs.metrics(3))
    for name in ("model", "adapter"):
        (tmp_path / name).mkdir(exist_ok=True)
    run.recipe["lora"] = {"rank": 2}
    assert run_data.state(run) == "trained and exported"
    shutil.rmtree(tmp_path / "model")
    assert run_data.state(run).startswith("not finished: ended after step 3 of 3")


def test_exported_while_the_run_still_writes_its_report(tmp_path: Path) -> None:
    run = read(tmp_path, runs.metrics(3))
    with atomic_files.locked(tmp_path):
        assert run_data.state(run) == "trained and exported"


def test_figures(tmp_path: Path) -> None:
    found = run_data.key_metrics(read(tmp_path, runs.metrics(4), recipe=resolved(lora={"rank": 8})))

    assert found == {
        "Model": "m",
        "Method": "LoRA, rank 8",
        "Trainable parameters": "100 of 1,000",
        "Steps": "4",
        "Tokens": "4,000",
        "Training loss": "1.5000",
        "Eval loss": "3.0000 → 2.0000",
        "Time in training steps": "0:00:02",
        "Tokens/s": "2,000",
        "Peak memory": "0.70 GiB",
    }


@pytest.mark.parametrize(
    ("sections", "method"),
    [
        ({}, "full fine-tuning"),
        ({"lora": {"use_dora": True}}, "DoRA, rank 16"),
        ({"lora": {}, "model": {"name": "m", "quantization": "nf4"}}, "QLoRA, rank 16, base in nf4"),
    ],
)
def test_methods(tmp_path: Path, sections: dict[str, Any], method: str) -> None:
    assert run_data.key_metrics(read(tmp_path, [], recipe=resolved(**sections)))["Method"] == method


def test_the_best_evaluation_is_named_where_it_is_not_the_last(tmp_path: Path) -> None:
    lines = [{"step": step, "eval_loss": loss} for step, loss in ((0, 3.0), (50, 1.0), (100, 2.0))]
    run = read(tmp_path, lines)

    assert run_data.key_metrics(run)["Eval loss"] == "3.0000 → 2.0000; best 1.0000 at step 50"


def test_figures_of_several_runs(tmp_path: Path) -> None:
    pair = [read(tmp_path / name, runs.metrics(steps)) for name, steps in (("a", 3), ("b", 6))]

    assert ("Steps", ["3", "6"]) in run_data.comparison(pair)
    assert ("State", ["trained and exported"] * 2) in run_data.comparison(pair)


def test_nothing_but_a_log(tmp_path: Path) -> None:
    run = read(tmp_path, [], recipe=None, data=None, manifest=None, proof=None)

    assert run_data.key_metrics(run) == {"Method": "full fine-tuning"}
    assert run_data.state(run).startswith("not finished: ended after step 0 ")


# --- Recipes ---------------------------------------------------------------------------------------------------------


def test_what_is_other_than_the_defaults(tmp_path: Path) -> None:
    recipe = resolved(lora={"rank": 4}, train={"learning_rate": 1e-4, "epochs": 1.0}, trl={"logging_steps": 5})
    rows = run_data.from_defaults(read(tmp_path, [], recipe=recipe))

    assert [(row.name, *row.values) for row in rows] == [
        ("model.name", "m", "–"),
        ("data.train", "t.jsonl", "–"),
        ("lora.rank", "4", "16"),
        ("train.learning_rate", "0.0001", "2e-05"),
        ("output_dir", "o", "–"),
        ("trl.logging_steps", "5", "–"),
    ]


def test_what_differs_between_runs(tmp_path: Path) -> None:
    pair = [
        read(
            tmp_path / str(seed), [], recipe=resolved(train={"seed": seed}),
            manifest={"data_sha256": {"t.jsonl": f"{seed}" * 64}, "versions": {"trl": "1.16.0", "torch": f"2.{seed}"}},
        )
        for seed in (1, 2)
    ]  # fmt: skip

    assert [(row.name, *row.values) for row in run_data.differing(pair)] == [
        ("train.seed", "1", "2"),
        ("SHA-256 of t.jsonl", "1" * 12, "2" * 12),
        ("versions.torch", "2.1", "2.2"),
    ]


def test_a_key_that_one_run_does_not_have(tmp_path: Path) -> None:
    pair = [read(tmp_path / str(n), [], recipe=each) for n, each in enumerate((resolved(), resolved(lora={"rank": 4})))]

    assert ("lora.rank", ["–", "4"]) in run_data.differing(pair)


def test_the_commands_that_make_it_again(tmp_path: Path) -> None:
    given, again = run_data.commands(read(tmp_path, []))

    assert given == "sft-recipe run 'a b.yaml' --set train.seed=1"
    assert again == f"sft-recipe run {tmp_path}/recipe.resolved.json --set output_dir={tmp_path}-again"
    assert run_data.commands(read(tmp_path, [], manifest={"command": ["my_script.py", "-q"]})) == [again]


# --- Data and proofs -------------------------------------------------------------------------------------------------


def test_every_row_and_token_is_accounted_for(tmp_path: Path) -> None:
    [rows] = run_data.data(read(tmp_path, [], recipe=resolved(data={"train": "t.jsonl", "max_length": 512})))

    assert rows.name == "Training"
    assert rows.line == (
        "100 sequences of at most 512 tokens, 50,000 tokens, 10,000 trained (20.0%); packing bfd, 97.7% full"
    )
    assert rows.sources == ["train.jsonl (alpaca, alpaca)"]
    assert [(row.name, *row.values) for row in rows.table] == [
        ("rows read", "1,010"),
        ("rows held out for evaluation", "10"),
        ("rows kept", "980"),
        ("rows dropped", "20 (overlong)"),
        ("rows truncated", "0"),
        ("tokens dropped from kept rows", "0"),
        ("duplicate rows", "3"),
        ("tokens in sequences", "50,000"),
        ("trained tokens", "10,000"),
        ("tokens per row, min", "12"),
        ("tokens per row, p50", "40"),
        ("tokens per row, max", "700"),
    ]


def test_proofs(tmp_path: Path) -> None:
    run = read(tmp_path, [])

    assert run_data.preflight(run) == {"base: loss": "3.25", "isolation: gradient leak": "0"}
    assert run_data.verification(run) == {"merged into": "original", "original: max logit diff": "0.03125"}


def test_no_proofs(tmp_path: Path) -> None:
    run = read(tmp_path, [], manifest={"preflight": "skipped"}, proof=None)

    assert run_data.preflight(run) == run_data.verification(run) == {}


def test_made_with(tmp_path: Path) -> None:
    resumed = {"resumed": [{"from": "checkpoint-5", "started": "2026-01-03T00:00:00+00:00"}]}
    run = read(tmp_path, [], manifest=runs.MANIFEST | resumed)

    assert run_data.environment(run) == {
        "started": "2026-01-02T03:04:05+00:00", "device: name": "cpu", "device: threads": "2",
        "resumed": "from checkpoint-5, 2026-01-03T00:00:00+00:00",
    }  # fmt: skip
    assert run_data.versions(run) == {"python": "3.11.7", "trl": "1.16.0"}


# --- Answers ---------------------------------------------------------------------------------------------------------


def test_answers_over_a_run_the_same_ones_together(tmp_path: Path) -> None:
    [asked] = run_data.answers([read(tmp_path, [], runs.samples("no", "yes", " yes ", "yes", expected="yes"))])

    assert asked.answers == [
        ("step 0", "no", False), ("step 1", "yes", True), ("step 2", " yes ", True), ("step 3", "yes", True),
    ]  # fmt: skip
    [asked] = run_data.answers([read(tmp_path, [], runs.samples("no", "yes", "yes"))])
    assert asked.answers == [("step 0", "no", None), ("steps 1 to 2", "yes", None)]


def test_last_answers_of_several_runs(tmp_path: Path) -> None:
    other = {"role": "user", "content": "Other?", "input": ""}
    pair = [
        read(tmp_path / "a", [], runs.samples("early", "late")),
        read(tmp_path / "b", [], [*runs.samples("good"), *runs.samples("else", message=other)]),
    ]
    both, alone = run_data.answers(pair)

    assert both.answers == [("a", "late", None), ("b", "good", None)]
    assert alone.answers == [("b", "else", None)]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "user", "content": "Add.", "input": "1 2"}, "Add.\n1 2"),
        ({"role": "user", "content": "Add.", "input": ""}, "Add."),
        ({"role": "user", "content": [{"type": "text"}]}, '[{"type": "text"}]'),
        ({"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, '[{"name": "f"}]'),
    ],
)
def test_messages_as_text(message: dict[str, Any], text: str) -> None:
    assert run_data.message_text(message) == text
