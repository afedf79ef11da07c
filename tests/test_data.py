"""Images: a reader's own files of every kind, data sets of torchvision, the stand-in."""

import os
import re
import socket
import threading
import unicodedata
import warnings
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from notebook import CODE, run_cells
from PIL import Image

CPU = torch.device("cpu")
RED, GREEN, BLUE = (250, 20, 10), (15, 240, 30), (20, 30, 230)
RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))


@pytest.fixture
def names(tmp_path, monkeypatch):
    """The names of the cells about images, new for each test, which runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # torchvision leaves sockets open
        space = run_cells("Data", "download", "load_folder", "load_data", "first", "hold_out")
        space.stand_in.__defaults__ = (60, 20)
        yield space


def save(path, image=None, colour=RED, size=(40, 40), **options):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", size, colour)).save(path, **options)


def make_folder(root, classes, n_train=2, n_test=1):
    """Images whose red tells the class, whose green the split and whose blue the number."""
    for i, name in enumerate(classes):
        for split, n in [("train", n_train), ("test", n_test)]:
            for k in range(n):
                colour = (20 * i, 200 * (split == "test"), k)
                save(Path(root, split, name, f"{k}.png"), colour=colour)


# A file


FORMATS = [("x.tif", mode) for mode in ["P", "L", "1", "CMYK", "I", "F", "I;16"]]
FORMATS += [(f"x.{end}", "RGB") for end in ["png", "JPG", "jpeg", "gif", "webp", "bmp", "tif"]]


@pytest.mark.parametrize("name, mode", FORMATS)
def test_every_format_and_colour_mode_keeps_what_it_shows(names, name, mode):
    image = Image.new("L", (50, 50), "white")
    image.paste("black", (0, 0, 25, 50))
    save(name, (image.convert("RGB") if mode in "CMYK" else image).convert(mode))
    pixels = names.read_image(name)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    assert pixels[:, :14].max() < 10 and pixels[:, 18:].min() > 245


DEEP = {
    "float.tif": np.float32(RAMP),
    "signed float.tif": np.float32(2 * RAMP - 1),
    "bytes as float.tif": np.float32(255 * RAMP),
    "bytes as int.tif": np.int32(255 * RAMP),
    "signed int.tif": np.int32(1e6 * RAMP - 5e5),
    "twelve.png": np.uint16(4095 * RAMP),
} | {f"sixteen.{end}": np.uint16(65535 * RAMP) for end in ["png", "tif", "pgm"]}


@pytest.mark.parametrize("name", [*DEEP, "unsigned.tif", "ten.pgm"])
def test_numbers_of_more_than_8_bits_are_scaled_not_clipped(names, name):
    if name == "ten.pgm":
        Path(name).write_bytes(b"P5 64 64 1023\n" + (1023 * RAMP).astype(">u2").tobytes())
    elif name == "unsigned.tif":  # Pillow writes signed ones: a tag, 339, is changed from 2 to 1
        save(name, Image.fromarray(np.uint32(RAMP * (2**32 - 1)).view(np.int32)))
        tag = np.array([339, 3, 1, 0, 2, 0], "<u2").tobytes()
        signed = Path(name).read_bytes()
        assert signed.count(tag) == 1
        Path(name).write_bytes(signed.replace(tag, tag.replace(b"\2", b"\1")))
    else:
        save(name, Image.fromarray(DEEP[name]))
    row = names.read_image(name)[16, :, 0].astype(int)
    assert row[0] < 10 and row[-1] > 245 and np.abs(np.diff(row, n=2)[1:-1]).max() <= 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_no_numbers_are_refused(names, value):
    pixels = np.float32(RAMP)
    pixels[3, 3] = value
    save("x.tif", Image.fromarray(pixels))
    with pytest.raises(ValueError, match="not a number"):
        names.read_image("x.tif")


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "key", "deep key"])
def test_transparent_pixels_are_white_whatever_colour_they_hide(names, kind):
    image, options = Image.new("RGBA", (64, 64), (0, 0, 0, 0)), {}
    image.paste((0, 0, 0, 255), (0, 0, 32, 64))
    if kind == "LA":
        image = image.convert("LA")
    elif kind == "palette":
        image, options = Image.new("P", (64, 64), 1), {"transparency": 1}
        image.putpalette([0, 0, 0, 0, 0, 0])  # black twice
        image.paste(0, (0, 0, 32, 64))
    elif kind == "key":
        image, options = Image.new("RGB", (64, 64), BLUE), {"transparency": BLUE}
        image.paste("black", (0, 0, 32, 64))
    elif kind == "deep key":
        pixels = np.full((64, 64), 5000, np.uint16)
        pixels[:, :32] = 0
        image, options = Image.fromarray(pixels), {"transparency": 5000}
    save("x.png", image, **options)
    pixels = names.read_image("x.png")
    assert pixels[:, :15].max() < 5 and pixels[:, 17:].min() > 250


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif", "deep.png", "deep.tif"])
@pytest.mark.parametrize("orientation, turns", [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_photographs_stand_upright(names, name, orientation, turns):
    upright = np.zeros((64, 64), np.uint16 if "deep" in name else np.uint8)
    upright[:20] = np.iinfo(upright.dtype).max
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(name, Image.fromarray(np.rot90(upright, -turns).copy()), exif=exif)
    pixels = names.read_image(name)
    assert pixels[:8].min() > 250 and pixels[12:].max() < 5


@pytest.mark.parametrize("size", [(120, 40), (40, 120), (1, 1), (31, 33), (999, 99)])
def test_images_are_cropped_to_squares_not_squeezed(names, size):
    image, (w, h) = Image.new("RGB", size, GREEN), size
    side = min(size)
    image.paste(RED, ((w - side) // 2, (h - side) // 2, (w + side) // 2, (h + side) // 2))
    save("x.png", image)
    pixels = names.read_image("x.png")
    assert pixels.shape == (32, 32, 3) and np.abs(pixels[4:-4, 4:-4].astype(int) - RED).max() < 5


@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
def test_a_large_image_shrinks_evenly(names, name):
    """Each pixel is the mean of 30 x 30, however a decoder shortens its work."""
    ramp = np.linspace(0, 255, 1280)
    save(name, Image.fromarray(np.uint8(np.tile(ramp.round(), (960, 1)))))
    expected = ramp[160:-160].reshape(32, 30).mean(1)[:, None]
    assert np.abs(names.read_image(name).astype(int) - expected).max() < 3


# A folder


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_keeps_labels_splits_and_images(names, kind):
    make_folder("own", ["b", "a", "C d"], 4, 2)
    data = names.load_data(kind("own"), CPU)
    assert (data.name, data.classes, data.split) == ("own", ("C d", "a", "b"), "test")
    for (images, labels), n, green in [(data.train, 4, 0), (data.test, 2, 200)]:
        assert images.shape == (3 * n, 3, 32, 32) and images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        red = torch.tensor([40, 20, 0])[labels]  # in the order "b", "a", "C d" as they were made
        assert torch.equal(images[:, 0, 5, 5].long(), red) and (images[:, 1] == green).all()
        assert sorted(images[:, 2, 5, 5].tolist()) == sorted([*range(n)] * 3)


def test_the_order_of_the_files_does_not_matter_and_classes_end_up_mixed(names):
    labels = np.random.default_rng(0).integers(4, size=60)
    images = np.arange(60, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    by_class = np.argsort(labels, kind="stable")
    one = names.to_tensors(images, labels, CPU)
    other = names.to_tensors(images[by_class], labels[by_class], CPU)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert torch.equal(torch.tensor(labels)[one[0][:, 0, 0, 0].long()], one[1])
    assert (one[1].diff() != 0).sum() > 20


JUNK = ["@eaDir", "__MACOSX", ".ipynb_checkpoints", ".net", "#recycle", "$RECYCLE.BIN"]


@pytest.mark.parametrize("junk", JUNK)
def test_what_is_no_class_or_no_image_is_left_out_and_named(names, capsys, junk):
    make_folder("own", ["a", "b", junk])
    save(f"own/train/a/{junk}/x.png")
    save("own/train/a/._0.png")
    Path("own/train/a/notes.txt").write_text("x")
    Path("own/train/b/x.heic").write_bytes(b"x")
    data = names.load_data("own", CPU)
    assert data.classes == ("a", "b") and len(data.train[1]) == 4
    out = capsys.readouterr().out
    assert out.count(f"\n{junk}.") == 2  # in train/ and in test/
    assert "skipped 2" in out and "notes.txt" in out and "x.heic" in out


def test_nested_and_linked_folders_count_and_both_spellings_of_an_accent_are_one(names):
    composed, decomposed = (unicodedata.normalize(form, "Käfer") for form in ["NFC", "NFD"])
    make_folder("own", [composed, "b"])
    save(f"own/train/{decomposed}/2020/may/x.png")
    save("elsewhere/y.png")
    Path("own/train/b/link").symlink_to(Path("elsewhere").resolve())
    data = names.load_data("own", CPU)
    assert data.classes == (composed, "b") and data.train[1].bincount().tolist() == [3, 3]


def test_all_that_is_wrong_is_named_in_one_error(names):
    make_folder("own", ["a", "b"])
    folder = Path("own").resolve()
    whole = (folder / "train" / "a" / "0.png").read_bytes()
    damaged = {"train/a/0.png": whole[:60], "train/b/1.png": b"", "test/b/0.png": b"<html>"}
    for name, content in damaged.items():
        (folder / name).write_bytes(content)
    (folder / "train" / "empty").mkdir()
    Path("own/test/photos").mkdir()
    Path("own/test/photos/x.heic").write_bytes(b"x")
    with pytest.raises(ValueError) as caught:
        names.load_data("own", CPU)
    text = str(caught.value)
    for name in [*damaged, "train/empty", "test/empty", "train/photos", "test/photos"]:
        assert f"\n{folder / name}: " in text
    assert len(text.splitlines()) == 1 + 7


@pytest.mark.parametrize("classes", [[], ["a"]])
def test_fewer_than_two_classes_are_refused(names, classes):
    Path("own/train").mkdir(parents=True)
    make_folder("own", classes)
    with pytest.raises(ValueError, match=f"two or more classes are needed, found {len(classes)}"):
        names.load_data("own", CPU)


@pytest.mark.parametrize("source", ["nowhere", "cifar10", "", "own/train", "~/no such", None, 10])
def test_data_that_is_nothing_is_named_with_what_it_may_be(names, source):
    make_folder("own", ["a", "b"])
    with pytest.raises(ValueError) as caught:
        names.load_data(source, CPU)
    for word in ["DATA", repr(source), "CIFAR10", "CIFAR100", "FashionMNIST", "stand-in", "train/"]:
        assert word in str(caught.value)


def test_images_are_kept_for_the_session_and_read_again_when_a_folder_changes(names):
    make_folder("own", ["a", "b"])
    make_folder("data/CIFAR10", ["c", "d", "e"])
    before = names.load_data("own", CPU)
    assert names.load_data("CIFAR10", CPU).classes == ("c", "d", "e")
    assert names.load_data(Path("own"), CPU) is before
    save("own/train/a/more.png")
    os.utime("own/train/a", ns=(1, 1))  # clocks of some disks are coarse
    changed = names.load_data("own", CPU)
    assert len(changed.train[1]) == 5
    before_edit = names.load_folder
    names.load_folder = lambda folder: before_edit(folder)
    assert names.load_data("own", CPU) is not changed  # an edited function is used


def test_a_class_name_is_text_whatever_it_holds(names):
    classes = ["$a^$ *b* _c_", "<b>x & y", "`h` # ~i~", "_", *"ABCDEFG", "z" * 60]
    make_folder("own", classes, n_train=4)
    data = names.load_data("own", CPU)
    assert sorted(data.classes) == sorted(classes)
    (cell,) = [cell.source for cell in CODE if "three training images" in cell.source]
    shown = []
    exec(cell, vars(names) | {"data": data, "show_figure": lambda *given: shown.extend(given)})
    figure, title = shown
    figure.savefig("figure.png")
    plt.close(figure)
    assert title.startswith("own") and len(figure.axes) == 10
    for ax, name in zip(figure.axes, data.classes):
        beginning = re.sub(r"[\s…]", "", ax.get_title())
        assert beginning and re.sub(r"\s", "", name).startswith(beginning)
        assert ax.images[0].get_array().shape == (32, 96, 3)


# Data sets of torchvision


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "FashionMNIST"])
def test_downloaded_images_keep_their_labels(names, monkeypatch, name):
    grey = name == "FashionMNIST"
    shape, kind = ((28, 28), torch.tensor) if grey else ((32, 32, 3), np.array)

    def dataset(root, train, download):
        """Its images are their own numbers + 100."""
        assert socket.getdefaulttimeout() == 30  # a server that is silent cannot stop us
        numbers = np.arange(20 if train else 8, dtype=np.uint8)
        images = np.stack([np.full(shape, 100 + n, np.uint8) for n in numbers])
        return SimpleNamespace(data=kind(images), targets=kind(numbers % 4), classes=[*"abcd"])

    monkeypatch.setattr(f"torchvision.datasets.{name}", dataset)
    data = names.load_data(name, CPU)
    images, labels = data.train
    assert data.name == name and images.shape == (20, 3, 32, 32) and len(data.test[1]) == 8
    numbers = images[:, 0, 16, 16].long() - 100
    assert torch.equal(numbers % 4, labels) and numbers.unique().numel() == 20
    if grey:  # a black border, and the same in all colours
        border = torch.ones(32, 32, dtype=torch.bool)
        border[2:-2, 2:-2] = False
        assert (images[..., border] == 0).all() and (images[..., ~border] >= 100).all()
    assert socket.getdefaulttimeout() is None and names.load_data(name, CPU) is data


def serve(answer):
    """The address of a server that gives this answer to every request."""
    server = socket.create_server(("127.0.0.1", 0))

    def run():
        while True:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

    threading.Thread(target=run, daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}/"


OK = b"HTTP/1.1 200 OK\r\n"
ANSWERS = [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 404 Gone\r\n\r\n", OK + b"\r\n<html>"]
ANSWERS += [OK + b"Content-Length: 9\r\n\r\nx", OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nx"]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", ["CIFAR10", "FashionMNIST"])
def test_after_a_bad_answer_a_notice_and_the_stand_in(names, monkeypatch, capsys, name, answer):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    address = serve(answer)
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", address + "x.tar.gz")
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.mirrors", [address])
    data = names.load_data(name, CPU)
    assert "stand-in" in data.name and len(data.classes) == 10
    assert names.load_data(name, CPU) is data  # after another try
    assert capsys.readouterr().out.count(f"NOTICE: {name} could not be loaded") == 2
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("damaged", ["train-images", "train-labels", "t10k-images", "t10k-labels"])
def test_a_folder_with_a_damaged_file_is_named_and_whole_files_load(names, capsys, damaged):
    raw = Path("data", "FashionMNIST", "raw")
    raw.mkdir(parents=True)
    images = np.array([0x803, 40, 28, 28], ">i4").tobytes() + bytes(40 * 28 * 28)
    labels = np.array([0x801, 40], ">i4").tobytes() + bytes(40)
    for split in ["train", "t10k"]:
        (raw / f"{split}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    (path,) = raw.glob(f"{damaged}*")
    whole = path.read_bytes()
    for end in [0, 3, 10, 20, -1]:
        path.write_bytes(whole[:end])
        assert "stand-in" in names.load_data("FashionMNIST", CPU).name
        assert f"delete {raw}" in capsys.readouterr().out
    path.write_bytes(whole)
    assert len(names.load_data("FashionMNIST", CPU).train[1]) == 40


# The stand-in


def test_the_stand_in_can_be_learned_but_not_by_a_linear_model(names):
    """Least squares guess within 4 standard errors; the strongest frequency tells the class."""
    classes, (images, labels), (test, test_labels) = names.stand_in(6_000, 1_000)
    assert len(set(classes)) == 10
    x, y = (torch.tensor(i.mean(3) / 128 - 1).flatten(1).float() for i in (images, test))
    targets = torch.nn.functional.one_hot(torch.from_numpy(labels)).float() - 0.1
    weights = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ targets)
    accuracy = np.mean((y @ weights).argmax(1).numpy() == test_labels)
    assert accuracy < 0.1 + 4 * (0.09 / 1000) ** 0.5
    spectrum = np.abs(np.fft.fft2(test, axes=(1, 2))).sum(3)
    strengths = np.concatenate([spectrum[:, 1:6, 0], spectrum[:, 0, 1:6]], axis=1)
    assert np.mean(strengths.argmax(1) == test_labels) > 0.8


# Fewer images


def small_data(names, n_train, n_test=5):
    splits = [(torch.arange(n), torch.arange(n)) for n in (n_train, n_test)]
    return names.Data("small", ("a", "b"), *splits)


def test_first_takes_the_first_images_and_none_takes_all(names):
    data = small_data(names, 20)
    fewer = names.first(data, 7, 3)
    assert [part.tolist() for part in fewer.train] == [[*range(7)]] * 2
    assert [part.tolist() for part in fewer.test] == [[*range(3)]] * 2
    assert len(names.first(data).train[1]) == 20 and len(names.first(data, 99).test[1]) == 5


@pytest.mark.parametrize("n_images", [2, 3, 10, 99, 100, 5000])
@pytest.mark.parametrize("n_train, n_held", [(1, 1), (60, 40), (999, 1), (1, 999), (9, 90)])
def test_validation_images_are_the_last_and_never_trained_with(names, n_images, n_train, n_held):
    data = small_data(names, n_images)
    held = names.hold_out(data, n_train, n_held)
    train, validation = held.train[1].tolist(), held.test[1].tolist()
    assert held.split == "validation" and data.split == "test" and held.classes == data.classes
    assert train == [*range(len(train))] and not {*train} & {*validation}
    assert validation == [*range(n_images - len(validation), n_images)]
    assert train and validation and held.train[0].tolist() == train
    if n_train + n_held <= n_images:
        assert (len(train), len(validation)) == (n_train, n_held)
    else:  # all are used, in the ratio that was asked for
        assert len(train) + len(validation) == n_images
        assert abs(len(train) - n_images * n_train / (n_train + n_held)) <= 1


@pytest.mark.parametrize("n_images, n_train, n_validation", [(1, 5, 5), (9, 0, 3), (9, 3, 0)])
def test_too_few_images_to_hold_some_out_are_an_error(names, n_images, n_train, n_validation):
    with pytest.raises(ValueError, match=f"{n_train} .* {n_validation} .* {n_images} .* small"):
        names.hold_out(small_data(names, n_images), n_train, n_validation)
