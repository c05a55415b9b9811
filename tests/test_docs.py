"""What the pages in docs/ tell people to run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nh2st_pipe.store.read import open_store
from tests.conftest import Study
from tests.store.same import same

DOCS = Path(__file__).parents[1] / "docs"

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = requeue ]; then echo "$2" > requeued; else printf 'one\\ntwo\\n'; fi
"""
HOSTNAME = """#!/bin/bash
[ "$1" = -I ] && echo 127.0.0.1 || echo localhost
"""


RAY = f"""#!/bin/bash
for word in "$@"; do
    case $word in --port=*) exec {sys.executable} -m http.server "${{word#*=}}" --bind 127.0.0.1;; esac
done
sleep 60
"""
EMBED = """#!/bin/bash
trap 'echo kept; exit 130' TERM
touch at-work
while true; do sleep 0.1; done
"""


def environment_of(folder: Path, stubs: dict[str, str]) -> dict[str, str]:
    """Return the environment of a Slurm job of two nodes, which are this machine."""
    bin_of = folder / "bin"
    bin_of.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "hostname": HOSTNAME, **stubs}.items():
        (bin_of / name).write_text(text)
        (bin_of / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "[one-two]",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_GPUS_ON_NODE": "0",
    }
    return {**os.environ, **slurm, "PATH": f"{bin_of}:{Path(sys.executable).parent}:{os.environ['PATH']}"}


WAIT = """#!/bin/bash
[ "$1" = - ] || exec echo token
touch at-work
while [ ! -e told ]; do sleep 0.1; done
"""


@pytest.mark.parametrize("while_it", ["embeds", "waits for the nodes"])
def test_a_slurm_job_out_of_time_keeps_what_it_has_and_is_queued_again(tmp_path: Path, while_it: str) -> None:
    python = "#!/bin/bash\necho x" if while_it == "embeds" else WAIT
    environment = environment_of(tmp_path, {"ray": RAY, "python": python, "nh2st-pipe": EMBED})
    job = subprocess.Popen(
        ["bash", str(DOCS / "slurm-ray.sh")], stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "at-work").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    (tmp_path / "told").touch()
    said = job.communicate(timeout=60)[0]
    assert said == ("x\nkept\n" if while_it == "embeds" else "")
    assert job.returncode == (130 if while_it == "embeds" else 143)
    assert (tmp_path / "requeued").read_text().strip() == str(os.getpid())


@pytest.mark.timeout(1200)
@pytest.mark.xdist_group("ray")
def test_the_slurm_script_embeds_over_two_nodes(make_study: Callable[..., Study], tmp_path: Path) -> None:
    study = make_study(4)
    study.embed(store=study.folder / "alone.zarr")
    command = ["bash", str(DOCS / "slurm-ray.sh"), "--slides", str(study.manifest), "--encoder", "fake"]
    command += ["--tile-px", "48", "--store", str(study.folder / "store.zarr"), "--json"]
    environment = environment_of(tmp_path, {})
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=1100)
    assert done.returncode == 0, done.stderr + "".join(log.read_text() for log in tmp_path.glob("ray-*.log"))
    assert '"engine": "ray"' in done.stdout
    assert '"processes": 2' in done.stdout
    assert len(open_store(study.folder / "store.zarr").slides()) == 4
    assert same(study.folder / "alone.zarr", study.folder / "store.zarr")
    assert not (tmp_path / "requeued").exists()
