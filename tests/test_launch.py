"""The launchers against programs that stand in for gcloud, srun and training."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from dgr_jax.process_group import EXIT_LOST
from dgr_jax.training.loop import EXIT_PREEMPTED

SCRIPTS = Path(__file__).parent.parent / "scripts"
TPU, SLURM = SCRIPTS / "launch_tpu_pod.sh", SCRIPTS / "launch_slurm.sh"
SLICE = ("--name=pod", "--zone=us-a", "--type=v5p-16", "--wait=0")
TRAIN = ("--", "--gin_file=msmarco.gin", "--model_dir=/shared/two words")
RUN = ["--distributed", *TRAIN[1:]]  # ... of dgr_jax.train

# Every program writes its name and arguments to $FAKE/calls; `next` takes the first line of a file.
COMMON = """#!/usr/bin/env bash
printf '%s\\n' "${0##*/} $(printf '%q ' "$@")" >> "$FAKE/calls"
next() { head -n 1 "$FAKE/$1" 2>/dev/null; sed -i 1d "$FAKE/$1" 2>/dev/null; }
"""

# One slice, of one worker whose home is $FAKE/vm; $FAKE/state is its state.
GCLOUD = """
case $4 in
  describe)
    error=$(next describe_errors)
    [[ -z $error ]] || { echo "$error" >&2; exit 1; }
    cat "$FAKE/state" 2>/dev/null || { echo 'ERROR: (gcloud) NOT_FOUND: no node' >&2; exit 1; } ;;
  create)
    error=$(next create_errors)
    [[ -z $error ]] || { echo "$error" >&2; exit 1; }
    mkdir -p "$FAKE/vm"; echo READY > "$FAKE/state" ;;
  start) echo READY > "$FAKE/state" ;;
  delete) rm -rf "$FAKE/vm" "$FAKE/state" ;;
  scp) cp "$5" "$FAKE/vm/" ;;
  ssh)
    for flag in "$@"; do [[ $flag != --command=* ]] || command=${flag#--command=}; done
    cd "$FAKE/vm" && HOME="$FAKE/vm" bash -c "$command"
    code=$?
    [[ $(cat "$FAKE/state") == READY ]] || exit 255
    exit "$code" ;;
esac
"""
GIT = 'for f in "$@"; do [[ $f != --output=* ]] || tar -czf "${f#--output=}" -T /dev/null; done\n'
# python3 -m venv; -m pip; and -m dgr_jax.train, which ends as the next line of `plan` says.
PYTHON = """
[[ $1 != -c ]] || { [[ ! -e $FAKE/old_${0##*/} ]]; exit; }
case $2 in
  venv) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  dgr_jax.train)
    plan=$(next plan)
    echo "step of $plan"
    [[ $plan != slow ]] || { sleep 1; plan=0; }
    [[ $plan != lost ]] || { echo PREEMPTED > "$FAKE/state"; exit 1; }
    exit "$plan" ;;
esac
"""
# Brings a Python as `uv venv --seed ... .venv` does.
UV = 'mkdir -p "${!#}/bin"; cp "$FAKE/bin/python3" "${!#}/bin/python"\n'
SRUN = """
trap 'echo saved; exit 75' TERM
plan=$(next plan)
[[ $plan != wait ]] || { touch "$FAKE/here"; sleep 20 & wait $!; }
exit "$plan"
"""


@pytest.fixture
def fake(tmp_path):
    """fake(script, *arguments, plan=...) -> the finished process, with `.calls`, its programs'."""
    programs = {"gcloud": GCLOUD, "git": GIT, "python3": PYTHON, "srun": SRUN, "mount": ""}
    programs |= {"sbatch": "", "scontrol": next_status("scontrol_status"), "uv": UV}
    programs |= {f"python3.{minor}": PYTHON for minor in (11, 12, 13)}
    (tmp_path / "bin").mkdir()
    for name, body in programs.items():
        path = tmp_path / "bin" / name
        path.write_text(COMMON + body)
        path.chmod(0o755)

    def start(script, *arguments, plan=(), env=None, **files):
        for name, lines in {"plan": plan, **files}.items():
            (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        settings = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "FAKE": str(tmp_path)}
        return subprocess.Popen(
            ["bash", str(script), *arguments],
            env=inherited | settings | (env or {}),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(*arguments, **settings):
        process = start(*arguments, **settings)
        process.out, process.err = process.communicate(timeout=60)
        process.calls = calls()
        return process

    def calls():
        path = tmp_path / "calls"
        return (
            [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []
        )

    run.start, run.calls, run.folder = start, calls, tmp_path
    return run


def next_status(name):
    return f'status=$(next {name}); exit "${{status:-0}}"\n'


def verbs(calls):
    return [call[4] for call in calls if call[0] == "gcloud"]


def trained(calls):
    return [call[3:] for call in calls if call[1:3] == ["-m", "dgr_jax.train"]]


# A TPU slice.


def test_a_slice_is_made_and_training_followed(fake):
    done = fake(TPU, *SLICE, "--spot", "--setup=mount share /shared", *TRAIN, plan=["0"])
    assert done.returncode == 0, done.err
    look = ["describe", "ssh"]  # ... and whether a run is under way
    assert verbs(done.calls) == ["describe", "create", *look, "ssh", "scp", "ssh", "ssh", "ssh"]
    (create,) = [call for call in done.calls if "create" in call]
    assert {"pod", "--zone=us-a", "--accelerator-type=v5p-16", "--spot"} <= set(create)
    assert ["mount", "share", "/shared"] in done.calls
    assert ["python", "-m", "pip", "install", "--quiet", "--upgrade", "-e", ".[tpu]"] in done.calls
    assert trained(done.calls) == [RUN]
    assert done.out == "step of 0\n"


@pytest.mark.parametrize(
    ("chip", "version"),
    [
        *((f"v{generation}-32", "tpu-ubuntu2204-base") for generation in (2, 3, 4)),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_a_runtime_for_every_chip(fake, chip, version):
    flags = ("--name=pod", "--zone=us-a", f"--type={chip}", "--dry_run")
    assert f"--version={version} " in fake(TPU, *flags, *TRAIN).out
    assert "--version=other " in fake(TPU, *flags, "--version=other", *TRAIN).out


def environments(calls):
    """What made the environments of the workers, by whom."""
    made = [call for call in calls if call[1:3] == ["-m", "venv"] or call[:2] == ["uv", "venv"]]
    return [[call[0], *call[2:]] for call in made]


@pytest.mark.parametrize(
    ("old", "expected"),
    [
        ((), ["python3", "venv", ".venv"]),
        (("python3", "python3.13"), ["python3.12", "venv", ".venv"]),
        (
            ("python3", "python3.13", "python3.12", "python3.11"),
            ["uv", "--quiet", "--seed", "--python", "3.12", ".venv"],
        ),
    ],
)
def test_a_python_that_is_new_enough(fake, old, expected):
    for program in old:
        (fake.folder / f"old_{program}").touch()
    done = fake(TPU, *SLICE, *TRAIN, plan=["0"])
    assert done.returncode == 0, done.err
    assert environments(done.calls) == [expected]
    assert trained(done.calls) == [RUN]


def test_the_python_that_is_given(fake):
    done = fake(TPU, *SLICE, "--python=python3.11", *TRAIN, plan=["0"])
    assert done.returncode == 0, done.err
    assert environments(done.calls) == [["python3.11", "venv", ".venv"]]


@pytest.mark.parametrize("program", ["python3.11", "/none"])
def test_a_given_python_that_is_too_old_or_not_there(fake, program):
    (fake.folder / "old_python3.11").touch()
    done = fake(TPU, *SLICE, f"--python={program}", *TRAIN, plan=["0"])
    assert done.returncode == 2
    message = f"--python: got {program}, expected a Python 3.11 or newer with venv on every worker"
    assert message in done.err
    assert not trained(done.calls) and not environments(done.calls)
    assert not any("pip" in call for call in done.calls)


def test_an_environment_of_an_older_python_is_made_anew(fake):
    fake(TPU, *SLICE, *TRAIN, plan=["0"])
    place = fake.folder / "vm" / "dgr_jax" / ".venv"
    (place / "old").touch()
    (fake.folder / "old_python").touch()  # .venv/bin/python
    done = fake(TPU, *SLICE, *TRAIN, plan=["0"])
    assert done.returncode == 0, done.err
    assert len(environments(done.calls)) == 2 and not (place / "old").exists()


@pytest.mark.slow
def test_preempted_and_gone_on(fake):
    """The slice is lost, training is asked to stop, a worker dies, then it ends."""
    plan = ["lost", str(EXIT_PREEMPTED), str(EXIT_LOST), "0"]
    done = fake(TPU, *SLICE, "--delete", *TRAIN, plan=plan)
    assert done.returncode == 0, done.err
    assert trained(done.calls) == [RUN] * 4
    assert [v for v in verbs(done.calls) if v in ("create", "delete")] == [
        *["create", "delete"],  # in place of the one that was lost
        *["create", "delete"],  # at the end
    ]
    assert "slice pod: PREEMPTED, exit status 255" in done.err
    assert "slice pod: READY, exit status 75" in done.err
    assert not (fake.folder / "state").exists()


def test_a_failure_is_not_tried_again(fake):
    done = fake(TPU, *SLICE, *TRAIN, plan=["3", "0"])
    assert done.returncode == 3
    assert "slice pod: failed with exit status 3" in done.err
    assert len(trained(done.calls)) == 1 and "delete" not in verbs(done.calls)


@pytest.mark.slow
def test_too_many_preemptions(fake):
    done = fake(TPU, *SLICE, "--max_restarts=1", *TRAIN, plan=["75", "75", "0"])
    assert done.returncode == 75
    assert "slice pod: preempted more often than --max_restarts=1" in done.err
    assert len(trained(done.calls)) == 2


def test_the_same_command_attaches_to_a_run(fake):
    first = fake.start(TPU, *SLICE, *TRAIN, plan=["slow"])
    deadline = time.monotonic() + 30
    log = fake.folder / "vm" / "dgr_jax" / "train.log"
    while not log.exists() or "step" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)  # the laptop is closed
    first.communicate()
    second = fake(TPU, *SLICE, *TRAIN, plan=["1"])
    assert second.returncode == 0, second.err
    assert "slice pod: a run is under way, its log follows" in second.err
    assert second.out == "step of slow\n"
    assert len(trained(second.calls)) == 1
    assert verbs(second.calls).count("create") == 1


@pytest.mark.slow
def test_states_of_a_slice(fake):
    (fake.folder / "vm").mkdir()
    (fake.folder / "state").write_text("STOPPED\n")
    capacity = "ERROR: There is no more capacity in the zone us-a"
    done = fake(TPU, *SLICE, *TRAIN, plan=["lost", "0"], create_errors=[capacity, capacity])
    assert done.returncode == 0, done.err
    order = [v for v in verbs(done.calls) if v in ("start", "create", "delete")]
    assert order == ["start", "delete", "create", "create", "create"]
    assert done.err.count("slice pod: no capacity in us-a, asking again") == 2


@pytest.mark.parametrize("where", ["create_errors", "describe_errors"])
def test_what_no_waiting_mends(fake, where):
    message = "ERROR: PERMISSION_DENIED on project x"
    done = fake(TPU, *SLICE, *TRAIN, **{where: [message] * 2})
    assert done.returncode == 2
    assert f"launch_tpu_pod.sh: {message}" in done.err
    assert len(verbs(done.calls)) <= 2 and not trained(done.calls)


def test_dry_run_of_a_slice(fake):
    done = fake(TPU, *SLICE, "--dry_run", "--delete", "--setup=mount a /b", "--project=p", *TRAIN)
    assert (done.returncode, done.err, done.calls) == (0, "", [])
    printed = [shlex.split(line) for line in shell_lines(done.out)]
    assert [c[4] if c[0] == "gcloud" else c[0] for c in printed] == [
        *["describe", "create", "ssh", "git", "scp", "ssh", "ssh", "ssh", "delete"]
    ]
    assert all("--project=p" in c and "--zone=us-a" in c for c in printed if c[0] == "gcloud")
    assert "--gin_file=msmarco.gin" in printed[6][-1]


def shell_lines(text):
    """The commands of what was printed: one a line, a quoted line break inside."""
    return [line.replace("$'", "'").replace("\\n", " ") for line in text.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--name=a", "--zone=b", *TRAIN), "--type is missing, see --help"),
        ((*SLICE, "--topology=4x4", *TRAIN), "got --topology=4x4, expected a flag of those in"),
        ((*SLICE, "--gin_file=a.gin"), "flags of training stand after --"),
        ((*SLICE, "--name=", *TRAIN), "got --name=, expected a flag"),
        ((*SLICE, "--max_restarts=many", *TRAIN), "--max_restarts: got many, expected a number"),
        ((*SLICE, "--wait=1m", *TRAIN), "--wait: got 1m, expected a number of seconds"),
        (
            (*SLICE[:2], "--type=v9-8", *TRAIN),
            "--type: got v9-8, whose runtime is not known here; expected --version=VERSION too",
        ),
        (SLICE, "no flags of training; expected -- --gin_file=..."),
    ],
)
def test_wrong_flags_for_a_slice(fake, arguments, message):
    done = fake(TPU, *arguments)
    assert done.returncode == 2 and done.calls == [] and done.out == ""
    assert done.err.startswith("launch_tpu_pod.sh: ") and message in done.err


# SLURM.


def test_a_job_is_submitted_with_itself(fake):
    flags = ("--nodes=2", "--gpus_per_node=4", "--time=1:00:00", "--grace=60")
    done = fake(SLURM, *flags, "--sbatch=--partition=gpu", "--sbatch=--qos=low", *TRAIN)
    assert done.returncode == 0, done.err
    (call,) = done.calls
    at = call.index(str(SLURM))
    assert call[1:at] == [
        *["--job-name=dgr_jax", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4"],
        *["--time=1:00:00", "--signal=TERM@60", "--requeue", "--open-mode=append"],
        *["--partition=gpu", "--qos=low"],
    ]
    python = f"--python={SLURM.parent.parent}/.venv/bin/python"
    assert call[at + 1 : at + 4] == [python, "--nodes=2", "--gpus_per_node=4"]
    # What it was submitted with is what the job runs.
    job = fake(SLURM, *call[at + 1 :], plan=["0"], env={"SLURM_JOB_ID": "7"})
    assert job.returncode == 0, job.err
    assert job.calls[1:] == [
        [
            *["srun", "--nodes=2", "--ntasks-per-node=4", "--kill-on-bad-exit=0", "--label"],
            *[f"{SLURM.parent.parent}/.venv/bin/python", "-m", "dgr_jax.train", *RUN],
        ]
    ]


@pytest.mark.parametrize("code", [EXIT_PREEMPTED, EXIT_LOST])
def test_a_preempted_job_is_queued_again(fake, code):
    job = {"SLURM_JOB_ID": "7"}
    done = fake(SLURM, *TRAIN, plan=[code], env=job)
    assert done.returncode == code
    assert done.calls[1:] == [["scontrol", "requeue", "7"]]
    again = fake(SLURM, *TRAIN, plan=["0"], env=job | {"SLURM_RESTART_COUNT": "1"})
    assert again.returncode == 0
    assert [call[0] for call in again.calls] == ["srun", "scontrol", "srun"]


def test_sigterm_reaches_training_and_the_job_waits(fake):
    job = fake.start(SLURM, *TRAIN, plan=["wait"], env={"SLURM_JOB_ID": "8"})
    deadline = time.monotonic() + 30
    while not (fake.folder / "here").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGTERM)
    out, err = job.communicate(timeout=30)
    assert (job.returncode, out) == (EXIT_PREEMPTED, "saved\n")
    assert "exit status 75: the job is queued again (1 of 100)" in err
    assert fake.calls()[1:] == [["scontrol", "requeue", "8"]]


def test_jobs_that_are_not_queued_again(fake):
    job = {"SLURM_JOB_ID": "7"}
    done = fake(SLURM, *TRAIN, plan=["1"], env=job)
    assert done.returncode == 1 and [call[0] for call in done.calls] == ["srun"]
    often = job | {"SLURM_RESTART_COUNT": "2"}
    done = fake(SLURM, "--max_restarts=2", *TRAIN, plan=["75"], env=often)
    assert done.returncode == 2 and [call[0] for call in done.calls] == ["srun", "srun"]
    assert "launch_slurm.sh: preempted more often than --max_restarts=2" in done.err
    done = fake(SLURM, *TRAIN, plan=["75"], env=job, scontrol_status=["1"])
    assert done.returncode == 75
    assert "submit it again: it goes on where it was" in done.err


def test_dry_run_of_a_job(fake):
    done = fake(SLURM, "--nodes=2", "--dry_run", *TRAIN)
    assert (done.returncode, done.err, done.calls) == (0, "", [])
    submit, train = (shlex.split(line) for line in done.out.splitlines())
    assert submit[0] == "sbatch" and "--dry_run" not in submit
    assert train[0] == "srun" and train[-5:] == ["-m", "dgr_jax.train", *RUN]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nodes=two", *TRAIN), "--nodes: got two, expected a number"),
        (("--partition=gpu", *TRAIN), "got --partition=gpu, expected a flag of those in --help"),
        (("--nodes=2",), "no flags of training; expected -- --gin_file=..."),
    ],
)
def test_wrong_flags_for_a_job(fake, arguments, message):
    done = fake(SLURM, *arguments)
    assert done.returncode == 2 and done.calls == [] and done.out == ""
    assert done.err.startswith("launch_slurm.sh: ") and message in done.err


@pytest.mark.parametrize("script", [TPU, SLURM], ids=lambda p: p.name)
def test_help(fake, script):
    done = fake(script, "--help")
    assert done.returncode == 0 and done.out.startswith(f"usage: {script.name}")
    assert "--dry_run" in done.out and done.calls == []


# Kubernetes.


def test_the_job_set(tmp_path):
    described = yaml.safe_load((SCRIPTS / "launch_gke.yaml").read_text())
    assert (described["apiVersion"], described["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = described["spec"]
    assert spec["failurePolicy"]["maxRestarts"] > 0
    (jobs,) = spec["replicatedJobs"]
    job = jobs["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    a_pod = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == chips // a_pod
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": "train", "operator": "In", "values": [2]}
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert container["command"][:3] == ["python", "-m", "dgr_jax.train"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert container["command"][-1].startswith(f"--model_dir={mounted['shared']}/")


def test_the_image():
    """What it copies is all that the package is made of; its Python is one that setup.py admits."""
    lines = (SCRIPTS / "Dockerfile").read_text().splitlines()
    pythons = {line.split()[1].split(":")[1] for line in lines if line.startswith("FROM python:")}
    (python,) = pythons
    assert (3, 11) <= tuple(map(int, python.removesuffix("-slim").split("."))) <= (3, 13)
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    assert all((SCRIPTS.parent / name).exists() for name in copied)
    assert copied >= {"setup.py", "pyproject.toml", "README.md", "dgr_jax", "gin_configs", "tasks"}
    assert "docker build --file scripts/Dockerfile" in (SCRIPTS / "launch_gke.yaml").read_text()


@pytest.mark.parametrize("program", ["shellcheck", "yamllint"])
def test_they_are_clean(program):
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")
    files = {"shellcheck": [TPU, SLURM], "yamllint": [SCRIPTS / "launch_gke.yaml"]}[program]
    done = subprocess.run([program, *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
