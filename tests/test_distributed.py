"""Several processes: the notebook's script under torchrun on the CPU, and the cell that runs it."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from notebook import CODE, PATH

import objectives


def find_cell(text):
    """The syntax tree of the one cell that contains this text."""
    (cell,) = [cell for cell in CODE if text in cell.source]
    return ast.parse(cell.source)


def find_script():
    """The text that the notebook writes to several_devices.py."""
    for node in ast.walk(find_cell("script.write_text(")):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "script.write_text":
            return ast.literal_eval(node.args[0])
    raise AssertionError("no cell writes the script")


SCRIPT = find_script()
NAMES = [
    "softmax_cross_entropy",
    "teacher_student",
    "sampled_softmax",
    "value_function",
    "policy_gradient",
]


def define(tree, *names):
    """The functions of these names, without running the rest of their cell."""
    namespace = {"Path": Path, "objectives": objectives, "os": os, "subprocess": subprocess}
    namespace["sys"] = sys
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            exec(compile(ast.Module([node], []), str(PATH), "exec"), namespace)
    return namespace


run_on_devices = define(find_cell("def run_on_devices("), "run_on_devices")["run_on_devices"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The script, and images whose class is their brightness; every rank gets whole batches."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "batch[rank::n_ranks]" in SCRIPT
    whole_batches = SCRIPT.replace("batch[rank::n_ranks]", "batch")  # so only draws can differ
    (tmp_path / "several_devices.py").write_text(whole_batches)
    torch.manual_seed(0)
    labels = torch.arange(512) % 5
    images = torch.randint(20, (512, 3, 32, 32)) + 50 * labels[:, None, None, None]
    torch.save([images.byte(), labels], tmp_path / "images.pt")
    return tmp_path


def test_ranks_keep_equal_weights_draw_differently_and_report_in_order(folder, capsys):
    environment = dict(os.environ)
    status = run_on_devices(
        folder / "several_devices.py", folder / "images.pt", "policy_gradient", 2
    )
    out = capsys.readouterr().out
    assert status == 0, out
    assert dict(os.environ) == environment  # the kernel's own settings are untouched
    assert "Warning" not in out

    number = r"-?\d+\.\d+"
    pattern = rf"epoch (\d), rank (\d): last loss ({number}), sum of weights ({number})"
    reports = re.findall(pattern, out)
    assert [report[:2] for report in reports] == [
        ("1", "0"),
        ("1", "1"),
        ("2", "0"),
        ("2", "1"),
        ("3", "0"),
        ("3", "1"),
    ]
    for ours, theirs in zip(reports[0::2], reports[1::2]):
        assert ours[3] == theirs[3]
        assert ours[2] != theirs[2]
    assert len({report[3] for report in reports}) == 3  # they learn


def test_a_run_that_fails_says_so(tmp_path, capsys):
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('no such objective')")
    assert run_on_devices(script, tmp_path / "images.pt", "anything", 1) != 0
    out = capsys.readouterr().out
    assert "no such objective" in out
    assert "torchrun ended with status" in out.splitlines()[-1]


def test_processes_meet_without_a_name_for_this_machine(monkeypatch):
    """The command names a local address; a host name that does not resolve took minutes."""
    commands = []

    class Process:
        stdout = ()

        def __init__(self, command, **settings):
            commands.append((command, settings))

        def wait(self):
            return 0

        def terminate(self):
            pass

    monkeypatch.setattr(subprocess, "Popen", Process)
    run_on_devices(Path("script.py"), Path("images.pt"), "value_function", 3)
    ((command, settings),) = commands
    assert command[0] == sys.executable
    assert command[command.index("--local-addr") + 1] == "127.0.0.1"
    assert command[command.index("--nproc-per-node") + 1] == "3"
    assert settings["env"]["PYTHONPATH"] == str(Path(objectives.__file__).resolve().parent)


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_of_the_script_moves_every_weight(name):
    namespace = {"__name__": "script"}
    exec(compile(SCRIPT, "several_devices.py", "exec"), namespace)
    assert list(namespace["OBJECTIVES"]) == NAMES
    torch.manual_seed(0)
    network = namespace["NetworkWithLoss"](namespace["OBJECTIVES"][name], n_classes=5)
    loss = network(torch.randn(50, 3, 32, 32), torch.arange(50) % 5)
    loss.backward()
    assert loss.shape == ()
    for parameter in network.parameters():
        assert parameter.grad.abs().sum() > 0


def test_only_the_images_that_are_used_are_saved(tmp_path):
    """A slice that is saved without a copy takes the whole tensor along."""
    cell = find_cell("def run_on_devices(")
    saving = [node for node in cell.body if ast.unparse(node).startswith("torch.save(")]
    images = torch.zeros(20_000, 3, 8, 8, dtype=torch.uint8)
    labels = torch.arange(20_000)
    file = tmp_path / "images.pt"
    namespace = {"torch": torch, "images": images, "labels": labels, "images_file": file}
    exec(compile(ast.Module(saving, []), str(PATH), "exec"), namespace)
    saved_images, saved_labels = torch.load(file)
    assert torch.equal(saved_labels, labels[:4096])
    n_bytes = saved_images.numel() + 8 * len(saved_labels)
    assert file.stat().st_size < n_bytes + 10_000
