"""Job files, validated with the schedulers' own schemas and run with stand-ins where there is no cluster."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from sft_recipes.distributed import jobs
from sft_recipes.errors import InputError
from sft_recipes.recipe import parse
from tests.commands import sft_recipe

RECIPE = """\
# A recipe, with a: colon and "quotes".
model: {name: meta-llama/Llama-3.1-8B}
data:
  train: data/train.jsonl
lora: {}
train: {learning_rate: 2e-4}
launch: {processes: 4, machines: 2, strategy: fsdp2}
output_dir: runs/mine
"""
# From get_task_schema and get_resources_schema of sky.utils.schemas; the package itself has a hundred dependencies.
SKYPILOT = json.loads((Path(__file__).parent / "skypilot.schema.json").read_text("utf-8"))


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes", "My Recipe_2.yaml").write_text(RECIPE, encoding="utf-8")
    return "recipes/My Recipe_2.yaml"


def load_yaml(file: Path) -> list[Any]:
    return list(YAML(typ="safe", pure=True).load_all(file.read_text("utf-8")))


def write_program(folder: Path, name: str, text: str) -> None:
    file = folder / name
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def shell(file: Path | str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = ["bash", str(file)] if isinstance(file, Path) else ["bash", "-c", file]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


# --- Slurm -----------------------------------------------------------------------------------------------------------

SHELLCHECK = Path(sys.executable).with_name("shellcheck")


@pytest.mark.parametrize("launch", ["launch.machines=1", "launch.machines=2"])
@pytest.mark.parametrize("options", [{}, {"image": "registry.example/sft:1"}, {"gpu": "h100"}, {"cpu": True}])
def test_slurm_script_passes_shellcheck(recipe: str, launch: str, options: Any) -> None:
    file = jobs.job(recipe, "slurm", None, [launch, "eval.generate=['it''s $HOME']"], **options)

    done = subprocess.run([SHELLCHECK, file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def directives(file: Path) -> dict[str, str]:
    lines = [line for line in file.read_text("utf-8").splitlines() if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in (line.removeprefix("#SBATCH --").partition("=") for line in lines)}


def test_slurm_requests_what_the_recipe_needs(recipe: str) -> None:
    requested = directives(jobs.job(recipe, "slurm", gpu="h100"))

    assert requested["nodes"] == "2"
    assert requested["ntasks-per-node"] == "1"  # `run` starts the four itself
    assert requested["gpus-per-node"] == "h100:4"
    assert requested["signal"] == "TERM@300"  # to the run, not to the script (B:), which only waits
    assert {"requeue", "exclusive"} <= requested.keys()
    alone = directives(jobs.job(recipe, "slurm", Path("alone.sh"), ["launch.machines=1"], cpu=True))
    assert alone["nodes"] == "1"
    assert not {"gpus-per-node", "exclusive"} & alone.keys()


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (75, True), (137, False)])
def test_slurm_script_requeues_after_75_alone(recipe: str, code: int, requeued: bool, tmp_path: Path) -> None:
    """Run the script with a stand-in for each of Slurm's programs; srun starts one task per node."""
    bin_ = tmp_path / "bin"
    each = 'for n in 0 1; do SLURM_NODEID=$n "$@" || code=$?; done'
    write_program(bin_, "srun", f"code=0\nwhile [[ $1 == --* ]]; do shift; done\n{each}\nexit $code")
    write_program(
        bin_, "scontrol", f'if [ "$1" = show ]; then printf "n1\\nn2\\n"; else echo "$*" >> {tmp_path}/told; fi'
    )
    write_program(bin_, "sft-recipe", f'echo "$NODE_RANK $MASTER_ADDR $MASTER_PORT $*" >> {tmp_path}/ran; exit {code}')
    file = jobs.job(recipe, "slurm")
    text = file.read_text("utf-8")
    file.write_text(
        "\n".join(line for line in text.splitlines() if not line.startswith("export PATH")), encoding="utf-8"
    )

    slurm = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "32"}
    done = shell(file, PATH=f"{bin_}:{os.environ['PATH']}", **slurm)

    assert (done.returncode, done.stderr) == (code, "")
    assert Path("ran").read_text("utf-8").splitlines() == [
        f"{rank} n1 24567 run recipes/My Recipe_2.yaml --resume" for rank in (0, 1)
    ]
    assert Path("told").exists() == requeued
    if requeued:
        assert Path("told").read_text("utf-8") == "requeue 1234567\n"


def test_slurm_script_of_one_machine_runs_the_command_itself(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real sft-recipe: a recipe that has become invalid exits with 2 and is not requeued."""
    write_program(tmp_path / "bin", "srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    write_program(tmp_path / "bin", "scontrol", f"touch {tmp_path}/told")
    file = jobs.job(recipe, "slurm", None, ["launch.machines=1"], cpu=True)
    Path(recipe).write_text(RECIPE + "outputdir: x\n", encoding="utf-8")

    done = shell(file, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="8")

    assert done.returncode == 2
    assert "unknown key 'outputdir'" in done.stderr
    assert not Path("told").exists()


# --- SkyPilot --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launch", ["launch.machines=1", "launch.machines=2"])
@pytest.mark.parametrize("options", [{}, {"image": "registry.example/sft:1"}, {"gpu": "H100"}, {"cpu": True}])
def test_skypilot_task_matches_its_schema(recipe: str, launch: str, options: Any) -> None:
    [task] = load_yaml(jobs.job(recipe, "skypilot", None, [launch], **options))

    jsonschema.validate(task, SKYPILOT["task"])
    jsonschema.validate(task["resources"], SKYPILOT["resources"])
    for part in ("setup", "run"):
        assert shell(f"bash -n <<'EOF'\n{task.get(part, '')}\nEOF").stderr == ""
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(task["resources"] | {"accelerator": "H100"}, SKYPILOT["resources"])


def test_skypilot_job_resumes_from_its_bucket(recipe: str, tmp_path: Path) -> None:
    overrides = ["output_dir=elsewhere/theirs", "train.optimizer=adamw_8bit_sr", "launch.strategy=zero3"]
    [task] = load_yaml(jobs.job(recipe, "skypilot", None, overrides))

    assert task["num_nodes"] == 2
    assert task["resources"]["accelerators"] == "80GB+:4"
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}
    assert list(task["file_mounts"]) == ["/runs"]
    assert f"'sft-recipes[torchao,deepspeed]=={jobs.__version__}'" in task["setup"]
    write_program(tmp_path / "home/venv/bin", "activate", "")
    write_program(tmp_path / "bin", "sft-recipe", 'echo "$NODE_RANK $MASTER_ADDR $MASTER_PORT $*"; exit 75')
    ips = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NODE_RANK": "1"}
    done = shell(task["run"], HOME=str(tmp_path / "home"), PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", **ips)
    assert done.returncode == 75
    assert done.stdout == (
        "1 10.0.0.7 29500 run recipes/My Recipe_2.yaml --resume --set train.optimizer=adamw_8bit_sr "
        "--set launch.strategy=zero3 --set output_dir=/runs/theirs\n"
    )


def test_extras_of_what_the_recipe_reads(recipe: str) -> None:
    data = "data.train=[s3://bucket/a.jsonl, gs://bucket/b.xlsx, s3://bucket/c.xlsx.gz, d.xlsx]"
    [task] = load_yaml(jobs.job(recipe, "skypilot", None, [data, "train.kernels=liger"]))

    assert f"'sft-recipes[liger,s3,gcs,excel]=={jobs.__version__}'" in task["setup"]


# --- Kubernetes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.31", "1.37"])  # the first with a stable podFailurePolicy, and the newest
@pytest.mark.parametrize("launch", ["launch.machines=1", "launch.machines=2"])
@pytest.mark.parametrize("options", [{}, {"cpu": True}])
def test_kubernetes_accepts_every_object(recipe: str, version: str, launch: str, options: Any) -> None:
    objects = load_yaml(jobs.job(recipe, "kubernetes", None, [launch], image="registry.example/sft:1", **options))

    assert [each["kind"] for each in objects] == (
        ["ConfigMap", "Service", "Job"] if launch.endswith("2") else ["ConfigMap", "Job"]
    )
    for each in objects:
        kubernetes_validate.validate(each, version, strict=True)
    objects[-1]["spec"]["template"]["spec"]["containers"][0]["comand"] = ["x"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(objects[-1], version, strict=True)


def test_kubernetes_contains_the_recipe_and_handles_exit_codes(recipe: str, tmp_path: Path) -> None:
    file = jobs.job(recipe, "kubernetes", None, ["train.epochs=2"], image="registry.example/sft:1")
    config, service, job = load_yaml(file)

    assert config["data"]["recipe.yaml"] == RECIPE
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (2, 2, "Indexed")
    by_code = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert by_code == {2: "FailJob", 75: "Ignore"}
    [container] = pod["containers"]
    assert {rule["onExitCodes"]["containerName"] for rule in spec["podFailurePolicy"]["rules"][:2]} == {
        container["name"]
    }
    assert container["command"] == ["sft-recipe", "run", "/recipe/recipe.yaml", "--resume", "--set", "train.epochs=2"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    environment = {each["name"]: each.get("value") for each in container["env"]}
    # a pod of an indexed job is named JOB-INDEX and resolves under its subdomain, the service's name
    assert environment["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert list(service["spec"]["selector"].values()) == [job["metadata"]["name"]]
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    assert set(mounts.values()) == {each["name"] for each in pod["volumes"]}
    assert "/recipe" in mounts


# --- All of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["slurm", "skypilot", "kubernetes"])
def test_on_the_command_line(recipe: str, system: str, tmp_path: Path) -> None:
    command = ("job", recipe, "--on", system, "--image", "registry.example/sft:1")
    done = sft_recipe(*command, cwd=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    file = Path(done.stdout.strip())
    assert file.name.startswith(f"my-recipe-2.{system}.")
    assert f"Made by: sft-recipe job 'recipes/My Recipe_2.yaml' --on {system} " in file.read_text("utf-8")
    again = sft_recipe(*command, cwd=tmp_path)
    assert (again.returncode, again.stderr) == (2, f"{file}: already exists. Choose another name with --out.\n")


@pytest.mark.parametrize(
    ("system", "overrides", "options", "message"),
    [
        ("slurm", ["train.learning_ratee=1"], {}, "Did you mean 'train.learning_rate'"),
        ("slurm", ["train.global_batch_size=3"], {}, "3 is not divisible by"),
        ("slurm", [], {"gpu": "H100", "cpu": True}, "--gpu, --cpu: cannot be combined"),
        ("slurm", [], {"gpu": "H100\n"}, "not a GPU name"),
        ("slurm", [], {"image": "an image"}, "not an image name"),
        ("kubernetes", [], {}, "--image: required with --on kubernetes"),
    ],
)
def test_an_error_is_one_line_and_nothing_is_written(
    recipe: str, system: jobs.System, overrides: list[str], options: Any, message: str
) -> None:
    before = sorted(Path().rglob("*"))
    with pytest.raises(InputError) as caught:
        jobs.job(recipe, system, None, overrides, **options)

    [line] = caught.value.lines
    assert message in line
    assert sorted(Path().rglob("*")) == before


def test_skypilot_uploads_the_working_directory(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    absolute = str(Path(recipe).resolve())
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")

    with pytest.raises(InputError, match="the recipe is outside the working directory"):
        jobs.job(absolute, "skypilot")


@pytest.mark.parametrize(
    ("stem", "name"), [("Llama-3.1_8B", "llama-3-1-8b"), ("70b", "sft-70b"), ("ä", "sft"), ("x" * 80, "x" * 50)]
)
def test_names_are_valid_in_all_three(stem: str, name: str) -> None:
    assert jobs._name(Path(f"{stem}.yaml")) == name


def test_what_this_machine_lacks_is_no_error(recipe: str) -> None:
    """GPUs, packages and disks may be missing here: the job runs elsewhere."""
    assert parse.load(recipe).recipe.launch.processes == 4
    assert jobs.job(recipe, "slurm", None, ["model.attention=flash_attention_3", "output_dir=/proc/1/x"]).is_file()
