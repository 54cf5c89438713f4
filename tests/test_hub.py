"""The hub, without a network: models as its cache holds them, data sets from a server that speaks its protocol."""

import importlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import datasets
import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from tests import commands
from tests.conftest import WriteRecipe

TINY = Path(__file__).parents[1] / "sft_recipes" / "builtin" / "tiny"


@pytest.fixture
def hub(tmp_path: Path) -> dict[str, str]:
    """An environment whose hub cache holds me/tiny: `main` is the embedded model, `v2` has its weights halved."""
    repository = tmp_path / "hub" / "models--me--tiny"
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        snapshot = repository / "snapshots" / commit
        shutil.copytree(TINY, snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        if revision == "v2":
            weights = load_file(snapshot / "model.safetensors")
            save_file({n: w / 2 for n, w in weights.items()}, snapshot / "model.safetensors", {"format": "pt"})
    return os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}


def read_again() -> None:
    """The libraries look at the environment once, when they are loaded."""
    for module in (huggingface_hub.constants, datasets.config):
        importlib.reload(module)


def sft_recipe(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return commands.sft_recipe(*arguments, environment=environment, first=read_again)


def test_a_revision_of_a_model_on_the_hub(write_recipe: WriteRecipe, tmp_path: Path, hub: dict[str, str]) -> None:
    """Loss before training, and what an adapter is merged into, are those of the revision."""
    recipe = str(write_recipe(model={"name": "me/tiny"}, lora={"rank": 1}, export={"dtype": "bfloat16"}))
    losses, norms = {}, {}
    for revision in ("null", "v2"):
        out = tmp_path / revision
        done = sft_recipe(hub, "run", recipe, "--set", f"model.revision={revision}", "--set", f"output_dir={out}")
        assert done.returncode == 0, done.stderr
        losses[revision] = json.loads((out / "metrics.jsonl").read_text("utf-8").splitlines()[0])["eval_loss"]
        norms[revision] = load_file(out / "model" / "model.safetensors")["model.norm.weight"].float()

    assert losses["null"] != losses["v2"]
    assert (norms["v2"] * 2).allclose(norms["null"])


def test_check_counts_with_the_tokenizer_of_the_hub(write_recipe: WriteRecipe, hub: dict[str, str]) -> None:
    done = sft_recipe(hub, "check", str(write_recipe(model={"name": "me/tiny"})))

    assert done.returncode == 0, done.stderr
    assert "schedule: 3 steps, 1 of warmup; 4 sequences per step" in done.stdout


class DataHub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that `datasets` speaks to read me/rows: three splits of jsonl."""

    files = {
        f"{split}.jsonl": b"".join(
            json.dumps({"instruction": f"{split} {n}", "output": "b"}).encode() + b"\n" for n in range(size)
        )
        for split, size in {"train": 8, "validation": 3, "test": 2}.items()
    }
    commit = "c" * 40

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        if name in self.files and "/resolve/" in path:
            self.answer(self.files[name], "application/octet-stream")
        elif "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": name}
                for name, content in self.files.items()
            ]
            self.answer(json.dumps(tree).encode())
        elif path.startswith("/api/datasets/me/rows"):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer(json.dumps({"id": "me/rows", "sha": self.commit, "siblings": siblings, "tags": []}).encode())
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET

    def answer(self, content: bytes, kind: str = "application/json") -> None:
        self.send_response(200)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "X-Repo-Commit": self.commit,
            "ETag": f'"{self.path}"',
        }
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def data_hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment whose hub holds the data set me/rows."""
    with ThreadingHTTPServer(("127.0.0.1", 0), DataHub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        here = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        }
        yield os.environ | here
        server.shutdown()


def test_data_from_the_hub(write_recipe: WriteRecipe, tmp_path: Path, data_hub: dict[str, str]) -> None:
    """Training takes the split train, validation the split made for it; another can be named."""
    recipe = str(write_recipe(data={"train": "me/rows", "eval": "me/rows"}, train={"max_steps": 1}))
    done = sft_recipe(data_hub, "run", recipe)
    assert done.returncode == 0, done.stderr
    counted = json.loads((tmp_path / "run" / "data.json").read_text("utf-8"))
    assert [counted[name]["sources"][0]["rows"] for name in ("train", "eval")] == [8, 3]

    out = tmp_path / "named"
    done = sft_recipe(
        data_hub, "run", recipe, "--set", "data.eval={path: me/rows, split: test}", "--set", f"output_dir={out}"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "data.json").read_text("utf-8"))["eval"]["sources"][0]["rows"] == 2


def test_a_split_that_is_not_there(write_recipe: WriteRecipe, data_hub: dict[str, str]) -> None:
    recipe = str(write_recipe(data={"train": "me/rows", "eval": {"path": "me/rows", "split": "dev"}}))
    done = sft_recipe(data_hub, "run", recipe)

    assert done.returncode == 2
    assert (
        "me/rows: the Hub dataset has no split 'dev' (available: 'train', 'validation', 'test')"
        in done.stderr.replace("'test', 'validation'", "'validation', 'test'")
    )
