"""Shell scripts, Kubernetes files and the README of launch/ are what they say."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("launch", "tests/launch")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".sh", ".sbatch")
)
JOBSETS = ["launch/gke_jobset.yaml", "launch/gke_jobset_gpu.yaml"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_scripts(script):
    """They parse, and shellcheck, where it is installed, finds nothing."""
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--shell=bash", ROOT / script], check=True)


def test_a_broken_script_is_found(tmp_path):
    (tmp_path / "x.sh").write_text("if true; then echo")
    assert subprocess.run(["bash", "-n", tmp_path / "x.sh"], capture_output=True).stderr


def check_jobset(jobset: Any) -> None:
    """Raises where it is not a JobSet, unknown fields included."""
    schema = json.loads((HERE / "jobset_schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(jobset)


def load(file: str) -> Any:
    (document,) = yaml.safe_load_all((ROOT / file).read_text())
    return document


@pytest.mark.parametrize("file", JOBSETS)
def test_jobsets(file):
    """They follow the schema, and restart on all statuses but 1."""
    jobset = load(file)
    check_jobset(jobset)
    spec = jobset["spec"]
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] and job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [1])
    (policy,) = spec["failurePolicy"]["rules"]
    assert policy["action"] == "FailJobSet"
    assert policy["onJobFailureReasons"] == ["PodFailurePolicy"]
    (container,) = job["template"]["spec"]["containers"]
    command = container["command"]
    if "--distributed" not in command:
        flags = dict(word.split("=", 1) for word in command if "=" in word)
        assert flags["--num_processes"] == str(job["parallelism"])
        host = f"{jobset['metadata']['name']}-{replicated['name']}-0-0"
        host += f".{jobset['metadata']['name']}"
        assert flags["--coordinator"].split(":")[0] == host
    config = next(word for word in command if word.startswith("--config="))
    assert (ROOT / config.partition("=")[2]).is_file()


@pytest.mark.parametrize(
    "place, old, new",
    [
        ("spec", "successPolicy", "successpolicy"),
        ("spec/replicatedJobs/0/template/spec", "parallelism", "paralelism"),
        (
            "spec/replicatedJobs/0/template/spec/template/spec/containers/0",
            "volumeMounts",
            "volumeMount",
        ),
        (
            "spec/replicatedJobs/0/template/spec/podFailurePolicy/rules/0",
            "onExitCodes",
            "onExitCode",
        ),
    ],
)
@pytest.mark.parametrize("file", JOBSETS)
def test_a_misspelled_field_is_found(file, place, old, new):
    """The control of the schema: Kubernetes, too, would ignore or refuse it."""
    jobset = copy.deepcopy(load(file))
    node = jobset
    for key in place.split("/"):
        node = node[int(key) if key.isdigit() else key]
    node[new] = node.pop(old)
    with pytest.raises(jsonschema.ValidationError, match=f"'{new}' was") as caught:
        check_jobset(jobset)
    where = "/".join(map(str, caught.value.absolute_path))
    assert where == place  # and nothing else is wrong


class Pod:
    """tpu_pod.sh against a stand-in for gcloud, whose hosts are folders."""

    def __init__(self, folder: Path):
        self.cloud = folder / "cloud"
        self.cloud.mkdir()
        (folder / "bin").mkdir()
        shutil.copy(HERE / "fake_gcloud.sh", folder / "bin/gcloud")
        self.env = {
            **os.environ,
            "PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}",
            "CLOUD": str(self.cloud),
            "ZONE": "z",
            "TYPE": "v5litepod-8",
            "INSTALL": "true",
            "POLL": "0.2",
        }

    def start(self, script: str) -> subprocess.Popen:
        words = [ROOT / "launch/tpu_pod.sh", "pod", "bash", "-c", script, "program"]
        return subprocess.Popen(words, env=self.env, stderr=subprocess.PIPE, text=True)

    def calls(self, verb: str) -> list[str]:
        return [c for c in (self.cloud / "calls").read_text().splitlines() if verb in c]


@pytest.fixture
def pod(tmp_path) -> Pod:
    return Pod(tmp_path)


def test_tpu_pod_starts_again_after_a_preemption(pod):
    """Made, preempted, made again, run to the end, each time with --distributed."""
    (pod.cloud / "preempt").touch()
    script = f'echo "$1" "$PWD" >> {pod.cloud}/ran; sleep 1'
    started = pod.start(script)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 0, said
    ran = (pod.cloud / "ran").read_text().splitlines()
    assert len(ran) == 4 and all(line.startswith("--distributed ") for line in ran)
    assert {Path(line.split()[1]).parent.name for line in ran} == {"host0", "host1"}
    assert len(pod.calls("queued-resources create")) == 2
    (call,) = set(pod.calls("queued-resources create"))
    assert "--accelerator-type=v5litepod-8" in call and "--spot" in call
    assert (pod.cloud / "host1/lowrank/train/main.py").is_file()  # what is tracked


@pytest.mark.parametrize(
    "script, status, attempts",
    [
        ("exit 1", 1, 1),
        ("[[ $PWD == *host0* ]] && exit 75; kill -9 $$", 75, 2),
        ("[[ $PWD == *host0* ]] && exit 75; exit 1", 1, 1),
    ],
)
def test_tpu_pod_statuses(pod, script, status, attempts):
    """A mistake ends it, what a restart mends is started again, RESTARTS times."""
    pod.env["RESTARTS"] = "1"
    started = pod.start(script)
    _, said = started.communicate(timeout=60)
    assert started.returncode == status, said
    assert len(pod.calls("tpu-vm scp")) == attempts


def test_tpu_pod_passes_a_stop_on(pod):
    """SIGTERM here asks the command on every host to save."""
    script = f"trap 'echo saved >> {pod.cloud}/saved; exit 75' TERM; "
    script += f"echo up >> {pod.cloud}/up; while true; do sleep 0.05; done"
    started = pod.start(script)
    until = time.monotonic() + 30
    while not (pod.cloud / "up").exists() or len((pod.cloud / "up").read_text()) < 6:
        assert time.monotonic() < until
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 75, said
    assert (pod.cloud / "saved").read_text() == "saved\nsaved\n"


def test_tpu_pod_follows_a_run_that_is_there(pod):
    """The script may be killed and started again: the run is started once."""
    script = f"echo up >> {pod.cloud}/up; sleep 2"
    with pod.start(script) as killed:
        until = time.monotonic() + 30
        while not (pod.cloud / "up").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        killed.kill()
    _, said = (again := pod.start(script)).communicate(timeout=60)
    assert again.returncode == 0 and "it runs already" in said, said
    assert (pod.cloud / "up").read_text() == "up\nup\n"  # two hosts


def test_the_readme_names_every_launcher():
    """And no file, flag or variable that is not there."""
    readme = (ROOT / "launch/README.md").read_text()
    for path in (ROOT / "launch").iterdir():
        if path.suffix in (".sh", ".sbatch", ".yaml", ".py") and path.stem[0] != "_":
            assert path.name in readme or f"launch.{path.stem}" in readme, path.name
    for name in re.findall(r"(?:launch|configs|train|tests)/[\w/]+\.\w+", readme):
        assert (ROOT / name).is_file(), name
