"""Nothing that a model, a checkpoint or a template brings is run, no secret is written down, no connection is opened."""

import gzip
import importlib.util
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sft_recipes import atomic_files, cli
from sft_recipes.commands import check
from sft_recipes.data import sandbox
from sft_recipes.data.chat import Chat
from sft_recipes.errors import InputError, RecipeError, RunError
from sft_recipes.recipe import secrets
from sft_recipes.trackers.base import kinds
from tests.conftest import WriteRecipe, run, write_rows

TINY = Path(__file__).parents[1] / "sft_recipes" / "builtin" / "tiny"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`sft-recipe` in this process: exit code, stdout, stderr. Nobody is there to answer a question."""
    monkeypatch.setattr(cli, "quiet_libraries", lambda debug: None)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the terminal"))

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sft-recipe", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return (done.value.code, *capsys.readouterr())  # type: ignore[return-value]

    return call


# --- Pickles ---------------------------------------------------------------------------------------------------------


class Planted:
    """A pickle that, when it is read, makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (str(self.mark), "w")

    def into(self, *files: Path) -> None:
        for file in files:
            if file.suffix in (".pt", ".pth"):
                torch.save({"state": self}, file)
            else:
                file.write_bytes(pickle.dumps(self))


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Planted]:
    """Fails the test where it was read."""
    it = Planted(tmp_path / "planted code ran")
    yield it
    assert not it.mark.exists()


def test_the_pickle_would_run(tmp_path: Path) -> None:
    for name in ("a.bin", "a.pt"):
        it = Planted(tmp_path / f"{name} ran")
        it.into(tmp_path / name)
        with (tmp_path / name).open("rb") as stream:
            torch.load(stream, weights_only=False) if name == "a.pt" else pickle.load(stream)
        assert it.mark.exists()


def test_pickles_beside_what_is_read(
    write_recipe: WriteRecipe, tmp_path: Path, planted: Planted, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the directories of a model, its tokenizer and an adapter, and in checkpoints; no command reads them."""
    monkeypatch.setenv("SFT_RECIPES_CACHE", str(tmp_path / "cache"))
    base, folder = tmp_path / "base", tmp_path / "run"
    shutil.copytree(TINY, base)
    names = ("pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "training_args.bin", "vocab.pkl", "tokenizer.pkl")
    planted.into(*(base / name for name in (*names, "optimizer.pt", "added_tokens.pt", "adapter_model.bin")))
    recipe = write_recipe(model={"name": str(base)}, lora={"rank": 2}, checkpoint={"every": 1})
    run(recipe)
    for pickles in (folder / "adapter", folder / "model"):
        planted.into(*(pickles / name for name in (*names, "adapter_model.bin")))

    assert command("check", recipe)[0] == 0
    assert command("preview", recipe)[0] == 0
    assert command("merge", folder, "--out", tmp_path / "merged")[0] == 0
    for model in (base, folder / "model", folder / "adapter"):
        assert command("generate", model, "--prompt", "Hi", "--max-new-tokens", "2")[0] == 0
    assert not [file for file in (folder / "model").iterdir() if file.suffix in (".pt", ".pth")]  # nor are any written

    # Without its outputs and its last checkpoint the run goes on from the second step.
    for done in ("model", "adapter", "checkpoints/checkpoint-3"):
        shutil.rmtree(folder / done)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        planted.into(copy / "checkpoints" / "checkpoint-2" / name)
        seal_again(copy / "checkpoints" / "checkpoint-2")  # as one would who plants something
        with pytest.raises(RunError) as caught:
            run(recipe, f"output_dir={copy}", resume=True)
        [line] = caught.value.lines
        assert "It was not loaded, because it could run code." in line  # torch's own message advises to load it anyway
    planted.into(
        *(folder / "checkpoints" / "checkpoint-2" / name for name in ("adapter_model.bin", "training_args.bin"))
    )
    seal_again(folder / "checkpoints" / "checkpoint-2")
    assert "checkpoint-2" in run(recipe, resume=True)[1]


def seal_again(folder: Path) -> None:
    (folder / atomic_files.CHECKSUMS).unlink()
    atomic_files.write_checksums(folder)


def test_nothing_but_pickles(write_recipe: WriteRecipe, tmp_path: Path, planted: Planted, command: Command) -> None:
    shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    planted.into(tmp_path / "model" / "pytorch_model.bin")
    shutil.copytree(tmp_path / "model", tmp_path / "adapter", ignore=shutil.ignore_patterns("pytorch*", "config.json"))
    planted.into(tmp_path / "adapter" / "adapter_model.bin")
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(TINY), "target_modules": ["q_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    recipe = write_recipe(model={"name": str(tmp_path / "model")})

    for arguments in (
        ("run", recipe),
        ("check", recipe),
        ("generate", tmp_path / "model", "--prompt", "Hi"),
        ("generate", tmp_path / "adapter", "--prompt", "Hi"),
        ("merge", tmp_path / "adapter", "--out", tmp_path / "out"),
    ):
        code, _, said = command(*arguments)
        assert code == 2
        [line] = said.splitlines()
        assert "is a pickle, which can run code" in line or "no file named model.safetensors" in line


def test_an_index_that_names_a_pickle(write_recipe: WriteRecipe, tmp_path: Path, planted: Planted) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "model-00001-of-00002.safetensors")
    planted.into(tmp_path / "model" / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(InputError):
        run(write_recipe(model={"name": str(tmp_path / "model")}))


def test_pickles_in_the_cache(
    write_recipe: WriteRecipe, tmp_path: Path, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry that holds objects is made anew."""
    monkeypatch.setenv("SFT_RECIPES_CACHE", str(tmp_path / "cache"))
    recipe = str(write_recipe())
    before = check.check(recipe).lines
    [entry] = (tmp_path / "cache").rglob("documents.npz")
    with np.load(entry) as columns:
        kept = {name: columns[name] for name in columns.files}
    np.savez(entry, allow_pickle=True, **{**kept, "offsets": np.array([planted], dtype=object)})

    assert check.check(recipe).lines == before
    with np.load(entry) as columns:
        assert columns["offsets"].tolist() == kept["offsets"].tolist()


def test_a_recipe_makes_no_objects(write_recipe: WriteRecipe, tmp_path: Path, command: Command) -> None:
    """YAML has tags that other readers call functions for."""
    recipe, mark = write_recipe(), tmp_path / "made"
    tag = f"!!python/object/apply:os.mkdir [{mark}]"
    assert command("check", recipe, "--set", f"output_dir={tag}")[0] == 2
    recipe.write_text(f"output_dir: {tag}\nmodel: !!python/name:os.system ''\n")
    assert command("check", recipe)[0] == 2

    assert not mark.exists()


# --- Code of a model -------------------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).write_text("")
class Mine(LlamaConfig):
    model_type = "mine"
class MyModel(LlamaForCausalLM):
    config_class = Mine
"""


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model that needs its own code, and the file that this code makes."""
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder, mark = tmp_path / "model", tmp_path / "its code ran"
    shutil.copytree(TINY, folder)
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.MyModel"}}
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "code.py").write_text(CODE.format(mark=str(mark)))
    return folder, mark


def test_code_of_a_model_runs_only_where_the_recipe_says_so(
    write_recipe: WriteRecipe, tmp_path: Path, with_code: tuple[Path, Path], command: Command
) -> None:
    folder, mark = with_code
    recipe = write_recipe(model={"name": str(folder)}, lora={"rank": 2}, export={"merge": False})
    generate, merge = ("generate", "--prompt", "Hi", "--max-new-tokens", "2"), ("merge", "--out", tmp_path / "merged")
    warning = "the model's custom Python code will run. Review it first."

    code, _, said = command("run", recipe)
    assert code == 2
    assert "requires custom Python code. Review the code, then set model.trust_remote_code: true." in said
    assert command("check", recipe)[0] == command("preview", recipe)[0] == 0
    code, _, said = command(*generate, folder)
    assert code == 2
    assert "Review the code, then pass --trust-remote-code." in said
    assert not mark.exists()

    trusted = ("--set", "model.trust_remote_code=true")
    assert f"warning: {recipe}:4: model.trust_remote_code: {warning}" not in said
    assert f"model.trust_remote_code: {warning}" in command("check", recipe, *trusted)[2]
    assert not mark.exists()
    code, said, _ = command("run", recipe, *trusted)
    assert code == 0
    assert f"model.trust_remote_code: {warning}" in said
    assert mark.exists()

    mark.unlink()
    forget(folder)
    for arguments in ((*merge, tmp_path / "run"), (*generate, tmp_path / "run")):
        code, _, said = command(*arguments)
        assert code == 2
        assert "requires custom Python code. Review the code, then pass --trust-remote-code" in said
    assert not mark.exists()
    for arguments in ((*merge, tmp_path / "run"), (*generate, tmp_path / "run"), (*generate, tmp_path / "merged")):
        code, _, said = command(*arguments, "--trust-remote-code")
        assert code == 0, said
        assert f"warning: --trust-remote-code: {warning}" in said
    assert mark.exists()


def forget(folder: Path) -> None:
    """Modules that transformers has imported from a model's directory."""
    for name in [name for name in sys.modules if name.startswith("transformers_modules.")]:
        del sys.modules[name]


def test_code_that_a_known_model_brings_is_left_alone(write_recipe: WriteRecipe, with_code: tuple[Path, Path]) -> None:
    """transformers has a class of its own for it."""
    folder, mark = with_code
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    run(write_recipe(model={"name": str(folder)}, train={"max_steps": 1}))

    assert not mark.exists()


def test_attention_kernels_of_the_hub_are_code_too(
    write_recipe: WriteRecipe, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    named = {"attn_implementation": "someone/kernel", "_attn_implementation": "someone/kernel"}
    (folder / "config.json").write_text(json.dumps(config | named))

    for arguments in (("run", write_recipe(model={"name": str(folder)})), ("generate", folder, "--prompt", "Hi")):
        code, _, said = command(*arguments)
        assert code == 2
        assert "config.json selects attention code from the Hub (someone/kernel)" in said


# --- Templates -------------------------------------------------------------------------------------------------------

SAY = "{% for m in messages %}{{ m.content }}{% endfor %}"
UNSAFE = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "an attribute that is not even used": "{% if ''.__class__ %}{% endif %}",
    "a filter": "{{ '' | attr('__class__') }}",
    "a format": "{{ '{0.__class__}'.format('') }}",
    "globals of Python": "{{ cycler.__init__.__globals__.os.mkdir('x') }}",
    "a changed row": "{{ messages.append(messages[0]) }}",
    "a range": "{% for i in range(10**9) %}{% endfor %}",
    "ranges within a range": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops over text": "{% set x = 'x' * 999 %}" + "{% for a in x %}" * 4 + "{% endfor %}" * 4,
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a long text": "{{ 'x' * 10**10 }}",
    "a large number": "{{ 9 ** (9 ** 9) }}",
    "larger and larger numbers": "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "a C function that computes for hours": "{{ 1 | round(400000000, 'ceil') }}",
    "a filter that never ends": "{{ 'x' | slice(2000000000) | list | length }}",
    "only at inference": "{% if add_generation_prompt %}{{ 9 ** (9 ** 9) }}{% endif %}",
    "only for some rows": "{% if 'row 7' in messages[0].content %}{{ 9 ** (9 ** 9) }}{% endif %}",
}
HARMLESS = ("an attribute that is not even used", "a filter", "a format")  # transformers renders nothing for these


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_SECONDS", 1)


@pytest.mark.parametrize("case", [case for case in UNSAFE if case not in HARMLESS])
def test_a_template_that_does_what_none_may(
    case: str, write_recipe: WriteRecipe, tmp_path: Path, impatient: None
) -> None:
    """One line for all rows, which names the file."""
    template = tmp_path / "mine.jinja"
    template.write_text(SAY + UNSAFE[case])
    with pytest.raises(RecipeError) as caught:
        check.check(str(write_recipe(data={"template": str(template)})))

    [line] = caught.value.lines
    assert f"data.template: {template}: the template violates the sandbox: " in line


@pytest.mark.parametrize("case", HARMLESS)
def test_what_the_sandbox_of_jinja_hides(case: str) -> None:
    chat = Chat("[" + UNSAFE[case] + "]", "all", {}, ())

    assert chat.prompt([{"role": "user", "content": "Hi"}], "") == "[]"


def test_the_template_of_a_model_is_in_the_same_sandbox(
    write_recipe: WriteRecipe, tmp_path: Path, command: Command, impatient: None
) -> None:
    """Where it is trained with, and where it is only talked to."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    (folder / "chat_template.jinja").write_text(SAY + UNSAFE["ranges within a range"])
    recipe = write_recipe(model={"name": str(folder)}, data={"template": "chat"})

    for arguments in (("run", recipe), ("check", recipe), ("generate", folder, "--prompt", "Hi")):
        code, _, said = command(*arguments)
        assert code == 2
        assert "the template violates the sandbox: it takes more than 1 seconds of CPU time" in said.splitlines()[-1]


# --- Secrets ---------------------------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": "hf_PlantedAAAA1111",
    "HUGGING_FACE_HUB_TOKEN": "hf_PlantedBBBB2222",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "PlantedCCCC3333",
    "AWS_ACCESS_KEY_ID": "PlantedDDDD4444",
    "OPENAI_API_KEY": "sk-PlantedEEEE5555",
    "MLFLOW_TRACKING_PASSWORD": "PlantedFFFF6666",
    "GITHUB_PAT": "PlantedGGGG7777",
    "MY_CREDENTIALS": "PlantedHHHH8888",
}


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return SECRETS


def test_which_variables_are_secret(secret: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {
        "TOKENIZERS_PARALLELISM": "falsefalse",
        "MY_KEY": "short",
        "MY_KEY_FILE": str(tmp_path),  # where it is, not what it is
        "KEYBOARD": "de-nodeadkeys",
    }.items():
        monkeypatch.setenv(name, value)
    own = secrets.from_environment()

    assert own.items() >= secret.items()
    assert not {"TOKENIZERS_PARALLELISM", "MY_KEY", "MY_KEY_FILE", "KEYBOARD"} & own.keys()
    assert secrets.redacted(f"--x={secret['HF_TOKEN']}!") == "--x=$HF_TOKEN!"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trl.hub_token={}", "trl.hub_token: set by the recipe. Use the environment variable HF_TOKEN instead."),
        ("trl.hub_model_id=mine-{}", "trl.hub_model_id: contains the value of the environment variable HF_TOKEN"),
        (
            "eval.generate=[{{prompt: '{}'}}]",
            "eval.generate.prompt: contains the value of the environment variable HF_TOKEN",
        ),
        ("model.dtype={}", "model.dtype: expected one of bfloat16, float16, float32 (got '$HF_TOKEN')"),
        ("{}=1", "unknown key '$HF_TOKEN'"),
    ],
)
def test_secrets_on_the_command_line(
    override: str, said: str, write_recipe: WriteRecipe, tmp_path: Path, command: Command, secret: dict[str, str]
) -> None:
    """The shell puts them there, in place of $HF_TOKEN. They are refused, and not said again."""
    for debug in ([], ["--debug"]):
        code, out, err = command("run", write_recipe(), "--set", override.format(secret["HF_TOKEN"]), *debug)
        assert code == 2
        assert said in err
        assert secret["HF_TOKEN"] not in out + err
        assert not (tmp_path / "run").exists()


# --- The network -----------------------------------------------------------------------------------------------------

# Loaded by every Python process that is started: notes down each attempt to reach something over a network.
WATCH = """
import os, socket, sys
def watch(event, arguments):
    if event.startswith("socket.") and event.split(".")[1] in {events!r}:
        if not (isinstance(arguments[0], socket.socket) and arguments[0].family == socket.AF_UNIX):
            with open({file!r}, "a") as notes:
                print(event, arguments[-1] if isinstance(arguments[0], socket.socket) else arguments, file=notes)
sys.addaudithook(watch)
"""
PROBE = "socket.bind ('::1', 0)\n"  # urllib3 looks, when it is imported, whether this machine knows IPv6
EVENTS = ("connect", "sendto", "sendmsg", "getaddrinfo", "gethostbyname", "bind")
_watching: list[list[str]] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or not event.startswith("socket.") or event.split(".")[1] not in EVENTS:
        return
    if not (isinstance(arguments[0], socket.socket) and arguments[0].family == socket.AF_UNIX):
        _watching[-1].append(f"{event} {arguments}")


@contextmanager
def attempts() -> Iterator[list[str]]:
    """Attempts of this process to reach something over a network."""
    importlib.import_module("urllib3")  # which binds a socket when it is imported first (PROBE), by whichever library
    if not getattr(sys, "_sft_recipes_watched", False):
        sys.addaudithook(_watch)  # for the life of the process
        sys._sft_recipes_watched = True  # type: ignore[attr-defined]
    _watching.append([])
    try:
        yield _watching[-1]
    finally:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and thread.daemon:
                thread.join(0.2)  # telemetry is sent by one
        _watching.pop()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries as they are where nobody has told them to be silent."""
    import huggingface_hub.constants

    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(huggingface_hub.constants, name, False)
    monkeypatch.delenv("CI", raising=False)  # where TRL does not report its use


@pytest.mark.usefixtures("online")
def test_a_library_of_ours_reaches_out_where_it_is_let() -> None:
    """What the next tests find nothing of is there to be found."""
    from huggingface_hub.utils import send_telemetry

    with attempts() as found:
        send_telemetry(topic="test")
        threading.Event().wait(0.2)

    assert any("getaddrinfo" in line or "connect" in line for line in found)


@pytest.mark.usefixtures("online")
def test_no_connection_is_opened(write_recipe: WriteRecipe, tmp_path: Path, command: Command) -> None:
    """By a full run as a library, and by every other command."""
    recipe = write_recipe(data={"eval": str(write_rows(tmp_path / "eval.jsonl"))})
    with attempts() as found:
        folder, _ = run(recipe)
        assert command("check", recipe)[0] == 0
        assert command("preview", recipe)[0] == 0
        assert command("generate", folder, "--prompt", "Hi", "--max-new-tokens", "2")[0] == 0
        assert command("report", folder)[0] == 0

    assert found == []
    report = (folder / "report.html").read_text("utf-8")
    assert "href=" in report
    assert not any(f"{attribute}={quote}http" in report for attribute in ("src", "href") for quote in ("", "'", '"'))


def without_network() -> list[str]:
    """What to put before a command so that it has no network; [] where the kernel does not permit that."""
    words = ["unshare", "--user", "--map-root-user", "--net"]
    try:
        return words if subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0 else []
    except OSError:
        return []


def test_a_run_with_trackers_keeps_secrets_and_stays_here(
    write_recipe: WriteRecipe, tmp_path: Path, secret: dict[str, str]
) -> None:
    """LoRA, merge and its proof in another process, with every tracker, in a git repository whose remote has a password;
    the network taken away."""
    names = [name for name, kind in kinds().items() if importlib.util.find_spec(kind.package)]
    recipe = write_recipe(lora={"rank": 2}, log={"to": names}, eval={"generate": ["Say it."]})
    for words in (["init", "-q"], ["remote", "add", "origin", "https://me:PlantedIIII9999@example.invalid/x.git"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / "site").mkdir()
    watch = WATCH.format(events=EVENTS, file=str(tmp_path / "attempts"))
    (tmp_path / "site" / "sitecustomize.py").write_text(watch)
    silent = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "CI")
    paths = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    environment = {name: value for name, value in os.environ.items() if name not in silent} | {
        "PYTHONPATH": paths,
        "HF_HOME": str(tmp_path / "home"),
        "WANDB_MODE": "offline",
    }
    done = subprocess.run(
        [*without_network(), sys.executable, "-m", "sft_recipes.cli", "run", str(recipe), "--debug"],
        cwd=tmp_path, env=environment, capture_output=True, check=False, timeout=300,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr.decode()
    tried = tmp_path / "attempts"
    assert not tried.exists() or tried.read_text("utf-8").replace(PROBE, "") == ""
    folder = tmp_path / "run"
    assert [(folder / name).is_dir() for name in (*names, "model")] == [True] * (len(names) + 1)
    written = {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert any(file.endswith(".wandb") for file in written) or "wandb" not in names
    for name, content in {**written, "stdout": done.stdout, "stderr": done.stderr}.items():
        content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
        for value in (*secret.values(), "PlantedIIII9999"):
            assert value.encode() not in content, f"{value} in {name}"


def test_the_manifest_has_the_command_line_without_secrets(
    write_recipe: WriteRecipe, secret: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a program that uses the library, too."""
    monkeypatch.setattr(
        sys, "argv", ["mine.py", "--key", secret["OPENAI_API_KEY"], f"--url=a:{secret['GITHUB_PAT']}@b"]
    )
    folder, _ = run(write_recipe(train={"max_steps": 1}))

    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert manifest["command"] == ["mine.py", "--key", "$OPENAI_API_KEY", "--url=a:$GITHUB_PAT@b"]
    assert not any(
        secret["OPENAI_API_KEY"].encode() in file.read_bytes() for file in folder.rglob("*") if file.is_file()
    )
