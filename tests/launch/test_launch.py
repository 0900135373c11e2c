"""The launchers, with stand-ins for gcloud, nvidia-smi, srun and Python that write down how they were called."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("*.sh"), *(ROOT / "launch").glob("*.sh")])
LAUNCHERS = ["tpu_vm.sh", "tpu_pod.sh", "gpu_node.sh"]
TOOLS = "basename cat dirname env find git gzip head ls mkdir mkfifo mktemp rm sed setsid sh sort tar test touch wc"
STAND_IN = """#!{python} -SE
import json, os, pathlib, shutil, subprocess, sys, time

name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
kept = {{key: os.environ[key] for key in ("JAX_PLATFORMS", "JAX_COORDINATOR_PORT") if key in os.environ}}
with open({log!r}, "a") as log:
    print(json.dumps([name, arguments, kept, os.getcwd()]), file=log)
worker = pathlib.Path({worker!r})

if name == "gcloud" and arguments[0] == "config":
    print(os.environ.get("FAKE_ZONE", ""))
elif name == "gcloud":
    what, rest = arguments[3], arguments[4:]
    if what == "describe":
        print(os.environ.get("FAKE_STATE", "READY"))
    elif what == "scp":
        *sources, target = [argument for argument in rest if not argument.startswith("--")]
        for source in sources:
            shutil.copy(source, worker / target.partition(":")[2])
    elif what == "ssh":
        command = next(argument for argument in rest if argument.startswith("--command="))
        sys.exit(subprocess.run(["sh", "-c", command.partition("=")[2]], cwd=worker).returncode)
elif name == "nvidia-smi":
    print(os.environ["FAKE_DRIVERS"])
elif name == "srun":
    command = next(index for index, argument in enumerate(arguments) if not argument.startswith("--"))
    os.execvp(arguments[command], arguments[command:])
elif name.startswith("python") and arguments[:2] == ["-m", "venv"]:
    folder = pathlib.Path(arguments[2]) / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    for made in ("python", "gemfilter"):
        shutil.copy(__file__, folder / made)
elif name == "python" and arguments[:2] == ["-m", "pip"]:
    sys.exit(int(os.environ.get("FAKE_PIP", 0)))
elif name.startswith("python") and arguments[0] == "-c":
    os.execv({python!r}, [{python!r}, *arguments])
elif name == "gemfilter" and "--wait" in arguments:
    pathlib.Path({pid!r}).write_text(str(os.getpid()))
    time.sleep(600)
elif name == "gemfilter" and arguments[0] != "fetch":
    print("the answer")
    sys.exit(3 if "--fail" in arguments else 0)
"""


class Machine:
    """A checkout, a PATH of stand-ins and of the tools that launchers need, and a folder that is a worker's home."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.checkout, self.worker = folder, folder / "checkout", folder / "worker"
        self.bin, self.log, self.pid, self.temporary = (folder / name for name in ("bin", "log", "pid", "temporary"))
        for made in (self.bin, self.worker, self.temporary, self.checkout):
            made.mkdir()
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        for name in ("find_python.sh", "pyproject.toml"):
            shutil.copy(ROOT / name, self.checkout)
        for tool in TOOLS.split():
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        stand_in = STAND_IN.format(python=sys.executable, log=str(self.log), worker=str(self.worker), pid=str(self.pid))
        for name in ("gcloud", "nvidia-smi", "srun", "python3.12"):
            (self.bin / name).write_text(stand_in)
            (self.bin / name).chmod(0o755)
        self.device = folder / "accel0"
        self.device.touch()
        self.environment = {
            "PATH": str(self.bin),
            "HOME": str(folder),
            "TMPDIR": str(self.temporary),
            "PYTHON": "python3.12",
            "TPU_DEVICES": str(self.device),
            "FAKE_DRIVERS": "580.65.06",
        }

    def commit(self) -> None:
        git = ["git", "-C", str(self.checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
        for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=a"]):
            subprocess.run([*git, *arguments], check=True)

    def start(self, script: str, *arguments: str, **environment: str | None) -> subprocess.Popen:
        given = {name: value for name, value in (self.environment | environment).items() if value is not None}
        return subprocess.Popen(
            [str(self.checkout / "launch" / script), *arguments],
            cwd=self.folder,
            env=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # What runs in the background ignores it, and a shell cannot trap a signal that it was started to ignore.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, script: str, *arguments: str, **environment: str | None) -> tuple[int, str, str]:
        """Status, standard output and standard error of a launcher."""
        process = self.start(script, *arguments, **environment)
        output, errors = process.communicate(timeout=60)
        return process.returncode, output, errors

    def calls(self, name: str) -> list[tuple[list[str], dict[str, str], str]]:
        """Arguments, variables for JAX and folder of each call of a stand-in."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [tuple(rest) for called, *rest in map(json.loads, lines) if called == name]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script):
    subprocess.run(["sh", "-n", script], check=True)


@pytest.mark.parametrize("script", [*LAUNCHERS, "gpu_check.sh"])
def test_help_names_every_variable(machine, script):
    status, output, errors = machine.run(script, "--help")
    assert (status, errors) == (0, "")
    assert output.startswith("usage: ")
    source = (ROOT / "launch" / script).read_text()
    if "common.sh" in source:
        source += (ROOT / "launch" / "common.sh").read_text()
    read = set(re.findall(r"\$\{?([A-Z][A-Z0-9_]*)", source)) - {"PWD", "PYTHONPATH"}
    assert read == set(re.findall(r"^([A-Z][A-Z0-9_]*)  ", output, flags=re.MULTILINE))
    assert machine.calls("gcloud") == machine.calls("python3.12") == []


@pytest.mark.parametrize(
    ("script", "environment", "said"),
    [
        ("tpu_vm.sh", {"TPU_DEVICES": "/dev/no_such_accel*"}, ("no TPU here", "TPU VM")),
        ("tpu_vm.sh", {"PYTHON": None, "missing": "python3.12"}, ("no Python 3.11", "apt-get", "PYTHON")),
        ("tpu_vm.sh", {"PYTHON": "python9"}, ("no Python 3.11", "PYTHON")),
        ("tpu_pod.sh", {"missing": "gcloud"}, ("gcloud is missing", "install")),
        ("tpu_pod.sh", {"TPU_NAME": None}, ("no slice", "TPU_NAME")),
        ("tpu_pod.sh", {"ZONE": None}, ("no zone", "ZONE")),
        ("tpu_pod.sh", {}, ("not a git checkout", "clone")),
        ("gpu_node.sh", {"missing": "nvidia-smi"}, ("nvidia-smi finds no GPU", "driver")),
        ("gpu_node.sh", {"FAKE_DRIVERS": "580.65.06\n570.10.01"}, ("570.10.01", "580")),
        ("gpu_node.sh", {"SLURM_JOB_ID": "7", "missing": "srun"}, ("srun is missing", "SLURM_JOB_ID")),
    ],
)
def test_what_is_missing_is_told_in_a_line(machine, script, environment, said):
    if "missing" in environment:
        (machine.bin / environment.pop("missing")).unlink()
    given = {"TPU_NAME": "slice", "ZONE": "zone"} | environment
    status, output, errors = machine.run(script, "generate", **given)
    assert (status, output) == (2, "")
    assert len(errors.splitlines()) == 1
    assert errors.startswith(f"{script}: ")
    for words in said:
        assert words in errors
    assert not list(machine.temporary.iterdir())


def test_pod_that_is_not_ready(machine):
    machine.commit()
    status, _, errors = machine.run("tpu_pod.sh", "generate", TPU_NAME="slice", FAKE_ZONE="zone", FAKE_STATE="STOPPED")
    assert (status, errors) == (2, "tpu_pod.sh: TPU_NAME=slice is STOPPED, not READY; start it or make another\n")
    assert machine.run("tpu_pod.sh", TPU_NAME="slice")[::2] == (
        2,
        "tpu_pod.sh: no command; give one, such as generate, or --help\n",
    )


@pytest.mark.parametrize(
    ("script", "extra", "platforms"), [("tpu_vm.sh", "tpu", "tpu,cpu"), ("gpu_node.sh", "gpu", "cuda,cpu")]
)
def test_one_machine(machine, script, extra, platforms):
    arguments = ["generate", '--question=Who\'s "there"?', "--prompt_file=a book.txt"]
    assert machine.run(script, *arguments, "--fail")[:2] == (3, "the answer\n")
    status, output, errors = machine.run(script, *arguments)
    assert (status, output, errors) == (0, "the answer\n", "")
    venv = machine.checkout / f".venv-{extra}"
    pip, installed = [call[0] for call in machine.calls("python") if call[0][:2] == ["-m", "pip"]]
    assert "--upgrade" in pip
    assert installed[2:] == ["install", "--editable", f"{machine.checkout}[{extra}]"]
    assert (venv / ".ready").exists()
    fetched, *runs = machine.calls("gemfilter")
    assert fetched[0] == ["fetch", "smollm2"]
    assert runs == [
        ([*arguments, "--fail"], {"JAX_PLATFORMS": platforms}, str(machine.folder)),
        (arguments, {"JAX_PLATFORMS": platforms}, str(machine.folder)),
    ]


def test_without_a_command_the_environment_is_made(machine):
    for script in ("tpu_vm.sh", "gpu_node.sh"):
        assert machine.run(script)[:2] == (0, "")
    assert [call[0] for call in machine.calls("gemfilter")] == [["fetch", "smollm2"]] * 2


def test_an_environment_half_made_is_made_again(machine):
    assert machine.run("tpu_vm.sh", "generate", FAKE_PIP="1")[:2] == (1, "")
    assert machine.run("tpu_vm.sh", "generate")[:2] == (0, "the answer\n")


def test_slurm_job(machine):
    job = {"SLURM_JOB_ID": "4097", "SLURM_JOB_NUM_NODES": "2", "FAKE_DRIVERS": "580.65.06\n" * 15 + "580.65.06"}
    assert machine.run("gpu_node.sh", "generate", "--question=a b", **job)[:2] == (0, "the answer\n")
    *checks, run = [call[0] for call in machine.calls("srun")]
    assert all(check[:3] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1"] for check in checks)
    assert run[:5] == ["--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--gpu-bind=none", "--kill-on-bad-exit=1"]
    assert run[6:] == ["generate", "--question=a b", "--distributed"]
    assert machine.calls("gemfilter")[-1][1] == {"JAX_PLATFORMS": "cuda,cpu", "JAX_COORDINATOR_PORT": "61441"}
    machine.run("gpu_node.sh", "generate", GPUS="1", **job)
    assert "--ntasks=2" in machine.calls("srun")[-1][0]


def test_script_submitted_to_slurm(machine):
    spool = machine.folder / "spool"
    spool.mkdir()
    shutil.copy(machine.checkout / "launch" / "gpu_node.sh", spool / "slurm_script")
    job = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(machine.checkout)}
    assert machine.run(str(spool / "slurm_script"), "generate", **job)[:2] == (0, "the answer\n")


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gpu_node.sh"])
def test_port_in_use(machine, script):
    with socket.create_server(("", 0)) as listener:
        port = str(listener.getsockname()[1])
        status, _, errors = machine.run(script, "generate", PORT=port, SLURM_JOB_ID="1")
    assert (status, errors.splitlines()[-1]) == (2, f"{script}: port {port} is in use; name another in PORT")


POD = {"TPU_NAME": "slice", "ZONE": "zone", "PORT": "18482"}


def test_pod(machine):
    machine.commit()
    (machine.folder / "book.txt").write_text("text")
    arguments = ["generate", '--question=Who\'s "there"?\n$HOME', "--prompt_file=book.txt"]
    status, output, errors = machine.run("tpu_pod.sh", *arguments, PROJECT="project", FILES="book.txt", **POD)
    assert (status, output) == (0, "the answer\n"), errors
    calls = [call[0] for call in machine.calls("gcloud")]
    assert [call[:4] for call in calls] == [
        ["compute", "tpus", "tpu-vm", verb] for verb in ("describe", "scp", "ssh", "scp", "ssh")
    ]
    for call in calls:
        assert {"--zone=zone", "--project=project", "--quiet"} <= set(call)
        assert "--worker=all" in call or call[3] == "describe"
    folder = machine.worker / "gemfilter_jax"
    assert (folder / "book.txt").read_text() == "text"
    assert (folder / ".venv-tpu" / ".ready").exists()
    environment = {"JAX_PLATFORMS": "tpu,cpu", "JAX_COORDINATOR_PORT": "18482"}
    assert machine.calls("gemfilter")[-1] == ([*arguments, "--distributed"], environment, str(folder))
    assert not list(machine.temporary.iterdir())

    status, _, _ = machine.run("tpu_pod.sh", "generate", "--fail", VENV="elsewhere", REPO="other folder", **POD)
    assert status == 3
    assert (machine.worker / "other folder" / "elsewhere" / "bin" / "gemfilter").exists()
    assert not any(argument.startswith("--project") for argument in machine.calls("gcloud")[-1][0])


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_nothing_is_left_running_on_a_pod(machine, sent, status):
    machine.commit()
    process = machine.start("tpu_pod.sh", "generate", "--wait", **POD)
    wait_for(lambda: machine.pid.exists() and machine.pid.read_text(), 60)
    pid = int(machine.pid.read_text())
    os.kill(pid, 0)
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal does
    else:
        process.send_signal(sent)
    assert process.wait(20) == status
    wait_for(lambda: not pathlib.Path(f"/proc/{pid}").exists(), 20)
    process.communicate(timeout=20)
    if sent != signal.SIGKILL:
        assert not list(machine.temporary.iterdir())


def wait_for(condition, seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)
