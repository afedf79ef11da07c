"""Several processes: the script of the notebook under torchrun, on the CPU."""

import os
import re
import subprocess
import sys

import pytest
import torch
from test_notebook import CODE, OBJECTIVES, ROOT

import objectives

SCRIPT = CODE["script"].split("\n", 1)[1]  # without %%writefile


def torchrun(folder, *command):
    """What two processes on this machine print, each with one thread and no GPU."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*start, *map(str, command)],
        cwd=folder,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The script, all ranks given whole batches, and images whose class is their brightness."""
    folder = tmp_path_factory.mktemp("devices")
    assert "batch[rank::n_ranks]" in SCRIPT
    whole = SCRIPT.replace("batch[rank::n_ranks]", "batch")  # so that only draws can differ
    (folder / "several_devices.py").write_text(whole)
    torch.manual_seed(0)
    labels = torch.arange(1000) % 5
    images = torch.randint(20, (1000, 3, 32, 32)) + 50 * labels[:, None, None, None]
    torch.save([images.byte(), labels], folder / "images.pt")
    return folder


@pytest.mark.parametrize("objective", ["sampled_softmax", "policy_gradient"])
def test_all_ranks_have_the_same_weights_and_draws_of_their_own(folder, objective):
    out = torchrun(folder, "several_devices.py", "images.pt", objective)
    pattern = r"epoch (\d+), rank (\d): loss (-?\d+\.\d+), sum of weights (-?\d+\.\d{4})"
    lines = re.findall(pattern, out)
    by_rank = {rank: [line for line in lines if line[1] == rank] for rank in "01"}
    ours, theirs = (sorted(by_rank[rank]) for rank in "01")
    assert len(ours) == len(theirs) >= 2
    assert [line[3] for line in ours] == [line[3] for line in theirs]
    assert [line[2] for line in ours] != [line[2] for line in theirs]
    assert len({line[3] for line in ours}) == len(ours)  # they learn


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_script_has_a_loss_for_every_objective_that_moves_every_weight(objective, monkeypatch):
    names, used, function = {"__name__": "script"}, [], getattr(objectives, objective)
    exec(SCRIPT.split("gpu = ")[0], names)
    monkeypatch.setattr(objectives, objective, lambda *a: used.append(objective) or function(*a))
    told = names["Told"](names["LOSSES"][objective], n_classes=5)
    told(torch.randn(50, 3, 32, 32), torch.arange(50) % 5).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in told.parameters()) and used
