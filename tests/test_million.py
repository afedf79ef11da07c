"""A million classes: the corpus and the helpers of the race, taken from the notebook's cells."""

import ast
import itertools
import math
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from notebook import CODE, PATH
from torch import nn

import objectives

DENSE = "sampled, dense gradient"
SPARSE = "sampled, sparse gradient"
METHODS = ["full softmax", "adaptive softmax", DENSE, SPARSE]
if hasattr(nn, "LinearCrossEntropyOptions"):
    METHODS.append("full, in chunks")


def silent(text):
    pass


def definitions(*names):
    """What the cells that hold these functions define; nothing in them is run."""
    namespace = {
        "F": F,
        "Path": Path,
        "dataclass": dataclass,
        "device": torch.device("cpu"),
        "math": math,
        "nn": nn,
        "np": pytest.importorskip("numpy"),
        "objectives": objectives,
        "re": re,
        "time": time,
        "torch": torch,
    }
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    constants = ["TOKEN", "UNKNOWN_TOKEN", "CONTEXT"]
    constants += ["RACE_SAMPLES", "RACE_BATCH", "RACE_TESTS", "TEST_AFTER"]
    wanted = set(names)
    for cell in CODE:
        if not any(f"def {name}(" in cell.source for name in wanted):
            continue
        for node in ast.parse(cell.source).body:
            is_constant = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in constants
            if isinstance(node, kept) or is_constant:
                exec(compile(ast.Module([node], []), str(PATH), "exec"), namespace)
    missing = wanted - namespace.keys()
    assert not missing, f"no cell defines {missing}"
    return namespace


CELLS = definitions(
    "last_layer_loss",
    "count_scores",
    "measure_errors",
    "read_corpus",
    "find_sources",
    "race",
    "most_frequent_next",
)


def write_files(folder, texts):
    files = []
    for position, text in enumerate(texts):
        file = folder / f"{position:03}.py"
        file.write_text(text, encoding="utf-8")
        files.append(file)
    return files


@pytest.fixture
def corpus(tmp_path):
    """Ten files; the last is for the test. `once` and `never` become unknown."""
    texts = ["a.b(a) 12\n"] * 8 + ["a once é\n", "a never b\n"]
    return CELLS["read_corpus"](write_files(tmp_path, texts))


def test_tokens_survive_the_reading_but_for_the_rare_ones(corpus):
    train = [corpus.words[number] for number in corpus.train.tolist()]
    test = [corpus.words[number] for number in corpus.test.tolist()]
    assert train == ["a", ".", "b", "(", "a", ")", "12"] * 8 + ["a", "<unknown>", "<unknown>"]
    assert test == ["a", "<unknown>", "b"]


def test_classes_are_numbered_by_falling_frequency(corpus):
    counted = Counter(corpus.train.tolist())
    assert corpus.counts.tolist() == [counted[number] for number in range(len(corpus.words))]
    assert corpus.counts.tolist() == sorted(corpus.counts.tolist(), reverse=True)
    assert corpus.words[0] == "a"
    assert len(set(corpus.words)) == len(corpus.words)


def test_each_file_is_read_once_and_bytes_that_are_no_text_do_no_harm(tmp_path, monkeypatch):
    files = write_files(tmp_path, ["x y x y"] * 20)
    files[3].write_bytes(b"x \xff\xfe y")
    files[4].write_bytes(b"")
    read = []
    read_text = Path.read_text

    def watched(file, *arguments, **settings):
        read.append(file)
        return read_text(file, *arguments, **settings)

    monkeypatch.setattr(Path, "read_text", watched)
    corpus = CELLS["read_corpus"](files)
    assert sorted(read) == files
    assert (len(corpus.train), len(corpus.test)) == (16 * 4 + 2, 2 * 4)


def test_where_no_token_is_rare_unknown_ones_of_the_test_have_a_class_still(tmp_path):
    corpus = CELLS["read_corpus"](write_files(tmp_path, ["x y x y"] * 9 + ["x z"]))
    rows = CELLS["encode"](["x y z x"], corpus.words)
    assert corpus.test.max() < len(corpus.words)
    assert rows.max() < len(corpus.words)


def test_the_library_stands_in_for_a_pytorch_without_sources(tmp_path, capsys):
    library = tmp_path / "dist-packages" / "lib"  # a folder above may have any name
    (library / "json").mkdir(parents=True)
    (library / "site-packages" / "other").mkdir(parents=True)
    for name in ["os.py", "json/tool.py", "site-packages/other/a.py"]:
        (library / name).write_text("x = 1")
    files = CELLS["find_sources"](tmp_path / "no" / "torch.zip", library)
    assert files == [library / "json" / "tool.py", library / "os.py"]
    assert capsys.readouterr().out.count("\n") == 1


def test_the_sources_of_this_pytorch_are_found(tmp_path):
    folder = Path(torch.__file__).parent
    files = CELLS["find_sources"](folder, tmp_path)
    assert folder / "nn" / "functional.py" in files
    assert len(set(files)) == len(files)


def test_a_phrase_is_its_last_four_tokens(corpus):
    a, b, dot = (corpus.words.index(token) for token in ["a", "b", "."])
    unknown = corpus.words.index("<unknown>")
    rows = CELLS["encode"](["b b a . strange b"], corpus.words)
    assert rows.tolist() == [[a, dot, unknown, b]]
    with pytest.raises(ValueError, match="3 tokens"):
        CELLS["encode"](["a . b"], corpus.words)


def test_the_context_of_a_token_is_the_four_before_it():
    ids = torch.arange(100, 120)
    contexts, labels = CELLS["examples_at"](torch.tensor([4, 19]), ids)
    assert contexts.tolist() == [[100, 101, 102, 103], [115, 116, 117, 118]]
    assert labels.tolist() == [104, 119]


def test_what_follows_most_often_is_counted():
    words = ["a", "b", "c"]
    ids = torch.tensor([0, 0, 1, 1, 2, 0, 0, 1, 1, 2, 0, 0, 1, 1, 0])
    follows = CELLS["most_frequent_next"]
    assert follows(torch.tensor([0, 0, 1, 1]), words, ids) == "c  67%"
    assert follows(torch.tensor([2, 2, 2, 2]), words, ids) == "never seen"


def make_problem(method, n_classes=300, n=40, size=32):
    torch.manual_seed(0)
    layer = CELLS["make_last_layer"](method, size, n_classes)
    embeddings = torch.randn(n, size, requires_grad=True)
    labels = torch.randint(n_classes, (n,))
    noise = objectives.LogUniform(n_classes)
    loss = CELLS["last_layer_loss"](method, layer, embeddings, labels, 20, noise)
    return layer, embeddings, labels, loss


@pytest.mark.parametrize("method", METHODS)
def test_every_method_moves_the_layer_and_what_lies_below(method):
    layer, embeddings, _, loss = make_problem(method)
    loss.backward()
    assert embeddings.grad.abs().sum() > 0
    for parameter in layer.parameters():
        assert parameter.grad.is_sparse == (method == SPARSE)
        assert parameter.grad.to_dense().isfinite().all()


@pytest.mark.parametrize("method", [m for m in METHODS if m.startswith("full")])
def test_full_softmax_is_exact_in_chunks_too(method):
    layer, embeddings, labels, loss = make_problem(method)
    expected = F.cross_entropy(embeddings @ layer.weight.T + layer.bias, labels)
    gradient = torch.autograd.grad(loss, layer.weight, retain_graph=True)[0]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, layer.weight)[0])


@pytest.mark.parametrize("n_classes", [4, 50, 99, 1000])
def test_adaptive_softmax_has_its_clusters_with_few_classes_too(n_classes):
    layer = CELLS["make_last_layer"]("adaptive softmax", 64, n_classes)
    log_p = layer.log_prob(torch.randn(5, 64))
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(5))


@pytest.mark.parametrize("method", ["full softmax", "adaptive softmax", SPARSE])
def test_probabilities_of_all_classes_sum_to_one(method):
    torch.manual_seed(0)
    model = CELLS["NextToken"](300, method)
    for parameter in model.last.parameters():
        nn.init.normal_(parameter)
    log_p = model.log_probabilities(torch.randint(300, (40, CELLS["CONTEXT"])))
    assert log_p.shape == (40, 300)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(40))


def test_scores_of_adaptive_softmax_are_those_of_the_clusters_that_hold_labels():
    labels = torch.tensor([0, 9, 10, 99, 100, 500])  # clusters end at 10, 100 and 1,000
    frequent = 6 * (10 + 2)
    assert CELLS["count_scores"]("adaptive softmax", labels, 1000, 5) == frequent + 180 + 1800


def test_noise_and_bias_of_a_gradient_are_told_apart():
    torch.manual_seed(0)
    weight = torch.randn(50, requires_grad=True)
    exact_loss = weight.square().sum()
    exact = 2 * weight.detach()
    direction = exact / exact.norm()

    def draw():
        noise = 0.3 * exact.norm() * torch.randn(50) / math.sqrt(50)
        bias = 0.1 * exact.norm() * direction
        return weight.square().sum() + weight @ (noise + bias), {}

    errors = CELLS["measure_errors"](draw, weight, exact_loss, exact, 2000, silent)
    assert errors["gradient noise"] == pytest.approx(0.3, rel=0.05)
    assert errors["gradient bias"] == pytest.approx(0.1, rel=0.1)
    assert errors["cosine of the mean gradient"] == pytest.approx(1, abs=0.01)


def test_an_exact_loss_has_neither_noise_nor_bias():
    weight = torch.ones(5, requires_grad=True)

    def draw():
        return weight.square().sum(), {}

    exact = 2 * weight.detach()
    errors = CELLS["measure_errors"](draw, weight, draw()[0], exact, 5, silent)
    assert errors["gradient noise"] == errors["gradient bias"] == errors["loss error"] == 0


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("method", [m for m in METHODS if m != DENSE])
def test_a_race_learns_a_text_that_repeats_itself(method, tmp_path, monkeypatch):
    """On a clock by which every step takes one second, whatever the machine."""
    ticks = itertools.count()
    monkeypatch.setitem(CELLS, "time", SimpleNamespace(perf_counter=ticks.__next__))
    text = " ".join(f"word{number}" for number in range(150))
    corpus = CELLS["read_corpus"](write_files(tmp_path, [text] * 20))
    noise = objectives.ClassFrequencies(corpus.counts)
    torch.manual_seed(0)
    model = CELLS["NextToken"](len(corpus.words), method, noise, n_samples=100)
    rows = CELLS["race"](model, corpus, seconds=48, seed=0, update=silent, n_tests=200)
    assert [row["steps"] for row in rows] == [6, 16, 48]
    assert [row["seconds"] for row in rows] == [6, 16, 48]  # the tests take no time
    assert rows[-1]["loss"] < 0.8 * math.log(151)

    contexts, labels = CELLS["examples_at"](torch.arange(4, len(corpus.test)), corpus.test)
    nats, accuracy = CELLS["test_next_token"](model, contexts, labels)
    log_p = model.log_probabilities(contexts)
    assert nats == pytest.approx(F.nll_loss(log_p, labels).item(), rel=1e-4)
    assert accuracy == pytest.approx((log_p.argmax(1) == labels).float().mean().item(), abs=1e-6)
