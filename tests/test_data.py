"""Images: a reader's own files of every kind, data sets of torchvision, the stand-in."""

import os
import socket
import sys
import tarfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from test_notebook import CODE, ROOT, execute, notebook, run, view

RED, GREEN, BLUE = (250, 20, 10), (15, 240, 30), (20, 30, 230)
NAMES = ["$a^$ *b* _c_", "<b>x & y", "[d](e) | f \\ g", "`h` # ~i~"]


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The names of the notebook up to the cell that loads data."""
    return notebook(tmp_path_factory.mktemp("data"), last="load-data")


@pytest.fixture
def names(cells, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    timeout = socket.getdefaulttimeout()
    cells["load_data"].cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # Pillow closes files when it pleases
        yield view(cells)
    socket.setdefaulttimeout(timeout)


def save(path, image=None, colour=RED, size=(40, 40), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", size, colour)).save(path, **options)


def make_folder(root, classes, n_train=2, n_test=1):
    """Images whose red channel tells the class, the green one the half, the blue one the number."""
    for i, name in enumerate(classes):
        for half, n in [("train", n_train), ("test", n_test)]:
            for k in range(n):
                colour = (20 * i, 200 * (half == "test"), 10 * k)
                save(root / half / name / f"{k}.png", colour=colour)
    return root


# A file


@pytest.mark.parametrize("name", ["x.png", "x.JPG", "x.jpeg", "x.gif", "x.webp", "x.bmp", "x.tif"])
def test_every_format_keeps_its_colours(names, name):
    save(Path(name), colour=RED)
    pixels = names.read_image(Path(name))
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - RED).max() < 10


@pytest.mark.parametrize("mode", ["RGB", "P", "L", "1", "CMYK"])
def test_every_colour_mode_keeps_what_it_shows(names, mode):
    image = Image.new("RGB", (50, 50), "white")
    image.paste("black", (0, 0, 25, 50))
    save(Path("x.tif"), image.convert(mode))
    pixels = names.read_image(Path("x.tif"))
    assert pixels[:, :14].max() < 5 and pixels[:, 18:].min() > 250


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "key"])
def test_transparent_pixels_are_white_whatever_colour_they_hide(names, kind):
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 32, 64))
    if kind == "LA":
        save(Path("x.png"), image.convert("LA"))
    elif kind == "palette":
        black_twice = Image.new("P", (64, 64), 1)
        black_twice.putpalette([0, 0, 0, 0, 0, 0])
        black_twice.paste(0, (0, 0, 32, 64))
        save(Path("x.png"), black_twice, transparency=1)
    elif kind == "key":
        blue = Image.new("RGB", (64, 64), BLUE)
        blue.paste("black", (0, 0, 32, 64))
        save(Path("x.png"), blue, transparency=BLUE)
    else:
        save(Path("x.png"), image)
    pixels = names.read_image(Path("x.png"))
    assert pixels[:, :15].max() < 5 and pixels[:, 17:].min() > 250


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_sixteen_bits_are_scaled_not_clipped(names, name):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    save(Path(name), Image.fromarray(ramp))
    row = names.read_image(Path(name))[16, :, 0].astype(int)
    assert row[0] < 10 and row[-1] > 245 and np.abs(np.diff(row, n=2)[1:-1]).max() <= 2


@pytest.mark.parametrize("orientation, turns", [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_photographs_stand_upright(names, orientation, turns):
    upright = Image.new("RGB", (64, 64), BLUE)
    upright.paste(RED, (0, 0, 64, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(Path("x.png"), upright.rotate(-90 * turns), exif=exif)
    assert np.array_equal(names.read_image(Path("x.png"))[2, 16], RED)


@pytest.mark.parametrize("size", [(120, 40), (40, 120), (1, 1), (31, 33), (999, 99)])
def test_images_are_cropped_to_squares_not_squeezed(names, size):
    image, (w, h) = Image.new("RGB", size, GREEN), size
    side = min(size)
    image.paste(RED, ((w - side) // 2, (h - side) // 2, (w + side) // 2, (h + side) // 2))
    save(Path("x.png"), image)
    pixels = names.read_image(Path("x.png"))
    assert pixels.shape == (32, 32, 3) and np.abs(pixels[4:-4, 4:-4].astype(int) - RED).max() < 5


@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
def test_a_large_image_shrinks_evenly(names, name):
    """Each pixel is the mean of 30 x 30, however a decoder shortens its work."""
    ramp = np.linspace(0, 255, 1280)
    save(Path(name), Image.fromarray(np.uint8(np.tile(ramp.round(), (960, 1)))))
    pixels = names.read_image(Path(name)).astype(int)
    expected = ramp[160:-160].reshape(32, 30).mean(1)[:, None]
    assert np.abs(pixels - expected).max() < 3


# A folder


def test_a_folder_keeps_labels_halves_and_images(names):
    make_folder(Path("own"), ["b", "a", "C d"], 4, 2)
    data = names.load_data("own")
    assert data.name == "own" and data.classes == ["C d", "a", "b"]
    for half, n in [(data.train, 4), (data.test, 2)]:
        images, labels = half
        assert images.shape == (3 * n, 3, 32, 32) and images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        shades = torch.tensor([40, 20, 0])[labels]  # in the order "b", "a", "C d" as they were made
        assert torch.equal(images[:, 0, 5, 5].long(), shades)
        assert (images[:, 1] == 200 * (half is data.test)).all()
        assert sorted(images[:, 2, 5, 5].tolist()) == sorted([*range(0, 10 * n, 10)] * 3)


def test_the_order_of_the_files_does_not_matter_and_classes_end_up_mixed(names):
    labels = np.random.default_rng(0).integers(4, size=60)
    images = np.arange(60, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    by_class = np.argsort(labels, kind="stable")
    one, other = (
        names.to_device(images, labels),
        names.to_device(images[by_class], labels[by_class]),
    )
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert (one[1].diff() != 0).sum() > 20


def test_hidden_files_do_not_count_and_nested_folders_do(names):
    folder = make_folder(Path("own"), ["a", "b"])
    save(folder / "train" / "a" / "2020" / "may" / "x.png", colour=(0, 0, 90))
    for junk in ["train/a/.x.png", "train/.c/x.png", "test/__MACOSX/x.png", "train/a/.d/x.png"]:
        save(folder / junk)
    (folder / "train" / ".DS_Store").write_bytes(b"x")
    data = names.load_data("own")
    assert data.classes == ["a", "b"] and len(data.train[1]) == 5 and len(data.test[1]) == 2


def test_files_that_are_no_images_by_their_ending_are_named_and_skipped(names, capsys):
    folder = make_folder(Path("own"), ["a", "b"])
    (folder / "train" / "a" / "notes.txt").write_text("x")
    (folder / "train" / "b" / "x.heic").write_bytes(b"x")
    assert len(names.load_data("own").train[1]) == 4
    out = capsys.readouterr().out
    assert "skipped 2" in out and "notes.txt" in out and "x.heic" in out


def test_all_damaged_files_are_named_in_one_error(names):
    folder = make_folder(Path("own"), ["a", "b"])
    whole = (folder / "train" / "a" / "0.png").read_bytes()
    damaged = {"train/a/0.png": whole[:60], "train/b/1.png": b"", "test/b/0.png": b"<html>"}
    for name, content in damaged.items():
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        names.load_data("own")
    for name in damaged:
        assert str(Path("own", name)) in str(caught.value)
    assert str(caught.value).count(".png:") == 3


@pytest.mark.parametrize(
    "train, test", [(["a", "b"], ["a"]), (["a"], ["a", "b"]), (["a"], ["a"]), ([], []), (["a"], [])]
)
def test_halves_with_other_classes_or_fewer_than_two_are_refused(names, train, test):
    for half, classes in [("train", train), ("test", test)]:
        Path("own", half).mkdir(parents=True)
        for name in classes:
            save(Path("own", half, name, "x.png"))
    with pytest.raises(ValueError) as caught:
        names.load_data("own")
    assert "own" in str(caught.value) and f"{train}, {test}" in str(caught.value)


@pytest.mark.parametrize("source", ["nowhere", "cifar10", "", "own/train", "~/no such folder"])
def test_data_that_is_nothing_is_named_with_what_it_may_be(names, source):
    make_folder(Path("own"), ["a", "b"])
    with pytest.raises(ValueError) as caught:
        names.load_data(source)
    for word in ["DATA", repr(source), "CIFAR10", "CIFAR100", "FashionMNIST", "stand-in", "train/"]:
        assert word in str(caught.value)


# Whole sections with difficult folders


@pytest.mark.skipif(sys.platform == "win32", reason="such names cannot be folders there")
def test_names_are_text_whatever_they_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = make_folder(tmp_path / "my $|_*[<\\ pictures", NAMES, 12, 6)
    found = notebook(tmp_path / "kept", without=(), DATA=str(root))
    run(found, "softmax-anatomy", "value-settings", "value-anatomy", "value-train")
    run(found, "summary", "comparison", "predictions")
    # Matplotlib needs a backslash to know that a dollar is a dollar
    titles = [title.replace(r"\$", "$") for title in found["display"].figures()]
    assert len(titles) >= 7 and all(root.name in title for title in titles)
    assert [name.replace(r"\$", "$") for name in found["data"].classes] == sorted(NAMES)


def test_a_resnet_trains_where_one_image_is_left_over(tmp_path):
    found = run(notebook(tmp_path, last="first"))
    execute(found, CODE["deeper"].split("\n\n\n")[0])
    images = torch.randint(256, (129, 3, 32, 32), dtype=torch.uint8)
    half = images, torch.arange(129) % 2
    data = found["Data"]("d", ["a", "b"], half, [tensor[:4] for tensor in half])
    config = found["Config"](epochs=1, batch_size=128, network=found["resnet18"])
    _, history, stopped = found["train"](found["softmax_cross_entropy"], data, config, print)
    assert len(history) == 1 and stopped == ""


# Data sets of torchvision


def fake_dataset(shape, kind):
    """A class like those of torchvision; its images are their own numbers + 100."""

    def dataset(root, train, download):
        numbers = np.arange(20 if train else 8)
        data = np.uint8(
            np.broadcast_to(numbers.reshape(-1, *[1] * len(shape)), (len(numbers), *shape))
        )
        return SimpleNamespace(data=kind(data + 100), targets=kind(numbers % 4), classes=[*"abcd"])

    return dataset


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "FashionMNIST"])
def test_downloaded_images_keep_their_labels(names, monkeypatch, name):
    grey = name == "FashionMNIST"
    fake = fake_dataset((28, 28) if grey else (32, 32, 3), torch.tensor if grey else np.array)
    monkeypatch.setattr(f"torchvision.datasets.{name}", fake)
    data = names.load_data(name)
    images, labels = data.train
    assert data.name == name and images.shape == (20, 3, 32, 32) and len(data.test[1]) == 8
    numbers = images[:, 0, 16, 16].long() - 100
    assert torch.equal(numbers % 4, labels) and numbers.unique().numel() == 20
    if grey:  # a black border, and the same in all colours
        border = torch.ones(32, 32, dtype=torch.bool)
        border[2:-2, 2:-2] = False
        assert (images[..., border] == 0).all() and (images[..., ~border] >= 100).all()


ERRORS = (
    URLError("no route"),
    TimeoutError("timed out"),
    RuntimeError("File not found or corrupted"),
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_without_a_download_one_notice_and_the_stand_in(names, monkeypatch, capsys, error):
    timeouts = []

    def fail(*_, **__):
        timeouts.append(socket.getdefaulttimeout())
        raise error

    monkeypatch.setattr("torchvision.datasets.CIFAR10", fail)
    data = [names.load_data("CIFAR10") for _ in range(3)]
    assert all("stand-in" in d.name for d in data) and len(data[0].classes) == 10
    assert capsys.readouterr().out.count("NOTICE") == 1
    assert timeouts == [30]  # a server that is silent does not hang the notebook


# The stand-in


def test_a_linear_model_learns_nothing_of_the_stand_in(names):
    """Least squares, fitted on 10,000 images: within 4 standard errors of guessing."""
    stand_in = getattr(names.stand_in, "func", names.stand_in)
    _, ((images, labels), (test, test_labels)) = stand_in()
    x, y = (torch.from_numpy(i.reshape(len(i), -1) / 128 - 1).float() for i in (images, test))
    x, y = (torch.cat([z, torch.ones(len(z), 1)], 1) for z in (x, y))
    targets = torch.nn.functional.one_hot(torch.from_numpy(labels)).float()
    gram = x.T @ x + 10 * torch.eye(x.shape[1])
    guesses = (y @ torch.linalg.solve(gram, x.T @ targets)).argmax(1).numpy()
    assert np.mean(guesses == test_labels) < 0.1 + 4 * (0.09 / 2000) ** 0.5


def test_the_small_cnn_learns_the_stand_in(tmp_path):
    """The notebook's first training, as it stands there."""
    found = notebook(tmp_path, last="data")
    found["stand_in"] = found["stand_in"].func
    execute(found, CODE["first"])
    assert found["history"][-1]["test_accuracy"] > 0.5


# Shared images, where they are


def test_shared_images_load_as_ten_classes(cells, tmp_path):
    shared = Path(os.environ.get("CIFAR10_ARCHIVE", ROOT.parent / "shared" / "cifar10-jpeg.tar.xz"))
    if not shared.exists():
        pytest.skip("no shared images here")
    with tarfile.open(shared, "r|*") as archive:
        for n, member in enumerate(archive):
            if member.isfile() and n % 250 == 0:
                save(tmp_path / member.name, Image.open(archive.extractfile(member)))
    classes, halves = cells["load_folder"](tmp_path)
    assert len(classes) == 10 and [len(labels) for _, labels in halves] == [200, 40]
    assert np.bincount(halves[0][1]).tolist() == [20] * 10
