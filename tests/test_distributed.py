"""Several processes: gradients, draws, and the exported notebook under torchrun, on the CPU."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
import torch.distributed as dist
from nbconvert import ScriptExporter
from test_notebook import EXPERIMENTS, INJECTED, NOTEBOOK, ROOT, SHOWS

import objectives as o

N, C, D = 24, 7, 5  # 24 images are 2 x 12 and 4 x 6


# What every rank does


class Told(torch.nn.Module):
    """A linear layer and an objective on its outputs, or on itself."""

    def __init__(self, objective):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = torch.nn.Linear(D, C, dtype=torch.float64)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
        self.objective = objective

    def forward(self, *batch):
        return self.objective(self.layer, *batch)[0]


def objectives_of_ranks(generator):
    def softmax(layer, e, labels, _):
        return o.softmax_cross_entropy(layer(e), labels)

    def teacher(layer, e, labels, teacher_logits):
        return o.teacher_student(layer(e), labels, teacher_logits, temperature=2)

    def sampled(layer, e, labels, _):
        generator.manual_seed(5)  # the same noise classes on every rank
        return o.sampled_softmax(e, labels, layer.weight, layer.bias, generator=generator)

    def value(layer, e, labels, _):
        return o.value_function(layer(e), o.reward_if_correct(labels), generator=generator)

    def policy(layer, e, labels, _):
        return o.policy_gradient(layer(e), o.reward_if_correct(labels), generator=generator)

    return {f.__name__: f for f in (softmax, teacher, sampled, value, policy)}


def gradients(parallel, share):
    """The gradient of each objective, as numbers, on this share of one batch."""
    random = torch.Generator().manual_seed(1)
    batch = (
        torch.randn(N, D, generator=random, dtype=torch.float64),
        torch.randint(C, (N,), generator=random),
        torch.randn(N, C, generator=random, dtype=torch.float64),
    )
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator, found = torch.Generator().manual_seed(100 + rank), {}
    for name, objective in objectives_of_ranks(generator).items():
        told = Told(objective)
        module = parallel(told)  # held: gradients are averaged as long as it lives
        module(*(tensor[share] for tensor in batch)).backward()
        found[name] = [p.grad.flatten().tolist() for p in told.parameters()]
    return found


def rank_main(out):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    share = slice(rank, None, world)
    found = gradients(torch.nn.parallel.DistributedDataParallel, share)
    own = gradients(lambda told: told, share)
    Path(out, f"{rank}.json").write_text(json.dumps({"averaged": found, "own": own}))
    dist.barrier()  # gloo aborts a rank that leaves while another still talks to it
    dist.destroy_process_group()


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(n, *command, **options):
    """Start n processes on this machine, each with one thread."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*torchrun, "--nproc-per-node", str(n), *map(str, command)],
        env=ONE_THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """What each of 2 and of 4 ranks found, twice."""
    runs = []
    for _ in range(2):
        out = tmp_path_factory.mktemp("ranks")
        process = torchrun(request.param, __file__, out)
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        runs.append([json.loads((out / f"{r}.json").read_text()) for r in range(request.param)])
    return runs


def flat(gradient):
    return torch.tensor([x for parameter in gradient for x in parameter], dtype=torch.float64)


@pytest.mark.parametrize("name", ["softmax", "teacher", "sampled"])
def test_averaged_gradient_is_that_of_the_joint_batch(ranks, name):
    joint = flat(gradients(lambda told: told, slice(None))[name])
    for rank in ranks[0]:
        torch.testing.assert_close(flat(rank["averaged"][name]), joint)


@pytest.mark.parametrize("name", ["value", "policy"])
def test_bandits_average_independent_draws(ranks, name):
    """Each rank's gradient is its own; the average is the mean of them on every rank."""
    own = torch.stack([flat(rank["own"][name]) for rank in ranks[0]])
    assert len({tuple(row.tolist()) for row in own}) == len(own)
    for rank in ranks[0]:
        torch.testing.assert_close(flat(rank["averaged"][name]), own.mean(0))


def test_ranks_repeat_themselves(ranks):
    assert ranks[0] == ranks[1]


# The notebook as a script


SETTINGS = {"DATA": "stand-in", "EPOCHS": 2, "WIDTH": 8, "BATCH_SIZE": 64, "RESUME": True}


def script(folder, last_cell=None):
    """The notebook, exported by nbconvert, up to a cell, with small data and settings."""
    notebook = nbformat.v4.new_notebook()
    names = ["stand-in", "why-settings", "race-settings", "experiment"]
    small = {name: INJECTED[name] for name in names}
    for cell in NOTEBOOK.cells:
        cell = cell.copy()
        if cell.id in small:
            cell.source += f"\n{small[cell.id]}"
        for name, value in SETTINGS.items() if cell.id == "parameters" else []:
            cell.source, n = re.subn(rf"(?m)^{name} = .*", f"{name} = {value!r}", cell.source)
            assert n == 1
        notebook.cells.append(cell)
        if cell.id == last_cell:
            break
    path = folder / "training_objectives.py"
    path.write_text(ScriptExporter().from_notebook_node(notebook)[0])
    return path


def saved_accuracies(folder):
    return {
        path.name[:-16]: torch.load(path, weights_only=True)["run"]["accuracy"]
        for path in (folder / "runs").glob("*.pt")
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The whole script in two processes: its folder and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    process = torchrun(2, script(folder), cwd=folder)
    out, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    return folder, out, errors


def test_one_rank_prints(two_ranks):
    _, out, _ = two_ranks
    for once in ["2 epochs, batches of 64", "wrote runs/results.json", "With 30,000 classes"]:
        assert out.count(once) == 1


def test_one_rank_plots_and_saves(two_ranks):
    folder, out, errors = two_ranks
    shows = len(SHOWS.findall(script(folder).read_text()))
    figures = sorted((folder / "runs").glob("figure-*.png"))
    assert len(figures) == shows and all(path.stat().st_size > 3_000 for path in figures)
    for path in figures:
        assert len(re.findall(rf"(?m)^runs/{path.name}: [A-Z].+\.$", out)) == 1
    assert set(saved_accuracies(folder)) == {"half-trained", *o.__all__[:5]}
    results = json.loads((folder / "runs" / "results.json").read_text())
    assert len(results["objectives"]) == 5 and len(results["experiments"]) == len(EXPERIMENTS)
    assert "Warning" not in errors


def test_two_ranks_learn_as_much_as_one(two_ranks, tmp_path):
    """Within 5 standard errors of a difference between two accuracies on 500 images."""
    command = [sys.executable, script(tmp_path, "softmax-train")]
    subprocess.run(command, cwd=tmp_path, env=ONE_THREAD, check=True, capture_output=True)
    one = saved_accuracies(tmp_path)["softmax_cross_entropy"]
    two = saved_accuracies(two_ranks[0])["softmax_cross_entropy"]
    spread = ((one * (1 - one) + two * (1 - two)) / 500) ** 0.5
    assert one > 0.2 and abs(one - two) < 5 * spread


def test_a_killed_worker_ends_the_job_and_a_second_start_goes_on(tmp_path):
    path = script(tmp_path, "teacher-train")
    process = torchrun(2, path, cwd=tmp_path)
    until = time.monotonic() + 120
    while not list((tmp_path / "runs").glob("softmax*.pt")) and time.monotonic() < until:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "SIGKILL" in errors and path.name in errors
    finished = set(saved_accuracies(tmp_path))
    process = torchrun(2, path, cwd=tmp_path)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    for name in ["half-trained", "softmax_cross_entropy"]:
        assert name in finished and f"{name}, seed 0, was loaded from" in out
    assert "teacher_student" in saved_accuracies(tmp_path)


if __name__ == "__main__":
    rank_main(sys.argv[1])
