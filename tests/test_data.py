"""Loading images survives what files, folders, servers and disks do: the result is right, or one
message names what is wrong. Every server is local, every image is made here."""

import errno
import gc
import gzip
import hashlib
import io
import os
import pickle
import re
import shutil
import socket
import tarfile
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from test_notebook import CLASSES, run, save_images
from test_notebook import loaders as loaders_of_the_notebook
from tqdm import TMonitor

ORANGE = (250, 130, 10)

loaders = loaders_of_the_notebook  # a fixture


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """No warning is given; no thread (but tqdm's own) and no timeout outlives a test."""
    threads = set(threading.enumerate())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        old_pyparsing = {"category": DeprecationWarning, "module": "matplotlib|pyparsing"}
        warnings.filterwarnings("ignore", **old_pyparsing)  # Matplotlib 3.8, when first imported
        # torchvision before 0.29.2, on Python 3.12 and 3.13, which hides it from users
        warnings.filterwarnings("ignore", "Python 3.14 will, by default, filter extracted tar")
        yield
    left = set(threading.enumerate()) - threads
    assert [thread for thread in left if not isinstance(thread, TMonitor)] == []
    assert socket.getdefaulttimeout() is None


# A folder of own images


@pytest.fixture
def own(loaders):
    """A sound folder of two classes."""
    return save_images(Path("own"), ["cat", "dog"], 1, 1)


@pytest.fixture
def read(loaders):
    """Save an image and read it the notebook's way."""

    def read(image, name="image.png", **options):
        image.save(name, **options)
        pixels = loaders["read_image"](Path(name))
        assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
        return pixels

    return read


def plain(mode, colour, size=(40, 30)):
    return Image.new(mode, size, colour)


def refuses(loaders, *named, source="own"):
    """Loading raises one ValueError of one line, without a chain of others, that says all these."""
    with pytest.raises(ValueError) as caught:
        loaders["load_data"](source)
    message = str(caught.value)
    assert [text for text in named if str(text) not in message] == [] and "\n" not in message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


PHOTO = Image.effect_noise((200, 200), 50).convert("RGB")
BROKEN = {
    "empty.png": b"",
    "text.png": b"This is not an image.\n",
    "truncated.jpg": encoded(PHOTO, "JPEG")[:-1000],
    "truncated.png": encoded(PHOTO, "PNG")[:-1000],
    "header only.jpg": encoded(PHOTO, "JPEG")[:20],
    "header only.webp": encoded(PHOTO, "WEBP")[:20],
    "no pixels.tif": b"II*\0\x08\0\0\0\0\0\0\0\0\0",
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_image_that_cannot_be_read_is_named(loaders, own, name):
    path = own / "test" / "dog" / name
    path.write_bytes(BROKEN[name])
    refuses(loaders, path, "replace or remove")


@pytest.mark.parametrize("side", [10_000, 20_000])  # Pillow warns of the one, refuses the other
def test_an_image_of_a_dangerous_size_is_named(loaders, own, side):
    path = own / "train" / "cat" / "huge.pgm"
    path.write_bytes(f"P5 {side} {side} 255\n".encode())
    refuses(loaders, path, f"{side**2} pixels", "exceeds limit", "replace or remove")


def test_one_broken_image_stops_the_loading_of_many_soon(loaders, own):
    """What was not begun is cancelled, though the broken file sorts first."""
    read, seen = loaders["read_image"], []
    (own / "train" / "cat" / "!.png").write_bytes(b"")
    for i in range(500):
        os.link(own / "train/cat/0.png", own / f"train/dog/{i + 1}.png")
    loaders["read_image"] = lambda path: (seen.append(path), time.sleep(0.005), read(path))[-1]
    refuses(loaders, own / "train" / "cat" / "!.png")
    assert len(seen) < 400


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "YCbCr", "RGBX"])
def test_every_colour_mode_keeps_its_colour(read, mode):
    kind = "png" if mode in ("RGB", "RGBA", "P") else "tif"
    kind = "jpg" if mode == "YCbCr" else kind
    pixels = read(plain("RGB", ORANGE).convert(mode, palette=Image.ADAPTIVE), f"image.{kind}")
    assert np.abs(np.int64(pixels) - ORANGE).max() <= 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P"])
def test_grey_stays_the_same_grey(read, mode):
    grey = 255 if mode == "1" else 77
    assert (read(plain("L", grey).convert(mode)) == grey).all()


def test_cmyk_jpegs_keep_their_colour(read):
    pixels = read(plain("RGB", ORANGE).convert("CMYK"), "image.jpg", quality=95)
    assert np.abs(np.int64(pixels) - ORANGE).max() <= 6


def halves(left, right, mode):
    """The left half of one colour, the right half of another."""
    image = plain(mode, left, (64, 64))
    image.paste(right, (32, 0, 64, 64))
    return image


def assert_halves(pixels, left, right, tolerance=3):
    assert np.abs(np.int64(pixels[:, :14]) - left).max() <= tolerance
    assert np.abs(np.int64(pixels[:, 18:]) - right).max() <= tolerance


def test_transparent_pixels_are_white_whatever_colour_they_hide(read):
    white = (255, 255, 255)
    assert_halves(read(halves((*ORANGE, 255), (0, 9, 0, 0), "RGBA")), ORANGE, white)
    assert_halves(read(halves((20, 255), (20, 0), "LA")), (20, 20, 20), white)
    assert_halves(read(halves((*ORANGE, 255), (0, 0, 0, 128), "RGBA")), ORANGE, (127, 127, 127))
    palette = halves(0, 1, "P")
    palette.putpalette([*ORANGE, 0, 0, 0])
    assert_halves(read(palette), ORANGE, (0, 0, 0))
    assert_halves(read(palette, transparency=1), ORANGE, white)
    assert_halves(read(palette, transparency=b"\xff\x80"), ORANGE, (127, 127, 127))
    assert_halves(read(halves(ORANGE, (1, 2, 3), "RGB"), transparency=(1, 2, 3)), ORANGE, white)


RAMP = np.linspace(0, 65535, 32 * 32).reshape(32, 32)  # black to white, in 16 bits


@pytest.mark.parametrize(
    "name, kind", [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2"), ("pgm", "<i4")]
)
def test_sixteen_bits_are_scaled_not_clipped(read, name, kind):
    pixels = read(Image.fromarray(RAMP.astype(kind)), f"image.{name}")
    assert np.abs(pixels - RAMP[..., None] / 257).max() <= 1


def test_sixteen_bits_are_turned_as_the_camera_was(read):
    exif = Image.Exif()
    exif[0x112] = 6
    pixels = read(Image.fromarray(RAMP.astype(np.uint16)), exif=exif)
    assert np.abs(pixels[..., 0] - np.rot90(RAMP, -1) / 257).max() <= 1


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_without_a_known_white_are_refused(loaders, own, kind):
    path = own / "train" / "cat" / "1.tif"
    Image.fromarray(np.zeros((40, 40), kind)).save(path)
    refuses(loaders, path, "mode", "no white", "8 or 16 bits")


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (4000, 3000)])
def test_every_size_is_fitted(read, size):
    assert np.abs(np.int64(read(plain("RGB", ORANGE, size), "image.png")) - ORANGE).max() <= 1


@pytest.mark.parametrize("name", ["image.webp", "image.tif", "image.png"])
def test_of_an_animation_the_first_frame_is_read(read, name):
    others = [plain("RGB", (0, 0, 255)), plain("RGB", (0, 255, 0))]
    extra = {"lossless": True} if name.endswith("webp") else {}
    pixels = read(plain("RGB", ORANGE), name, save_all=True, append_images=others, **extra)
    assert np.abs(np.int64(pixels) - ORANGE).max() <= 3


@pytest.mark.parametrize("orientation, turns", [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_photographs_stand_upright(read, orientation, turns):
    exif = Image.Exif()
    exif[0x112] = orientation
    image = halves(ORANGE, (0, 0, 255), "RGB")
    pixels = read(image, "image.jpg", exif=exif, quality=95, subsampling=0)
    assert_halves(np.rot90(pixels, -turns), ORANGE, (0, 0, 255), 9)


def test_broken_metadata_is_no_reason_to_warn(loaders, own):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x09\0\x12\x01\x03\0\x01\0\0\0\x01"
    path = own / "train" / "cat" / "photo.jpg"
    path.write_bytes(encoded(PHOTO, "JPEG", exif=exif))
    with pytest.warns(UserWarning, match="EXIF"), Image.open(path):
        pass
    assert len(loaders["load_data"]("own").train[0]) == 3


def test_a_class_without_images_is_named(loaders, own):
    for empty in [own / "train" / "empty", own / "test" / "empty"]:
        empty.mkdir()
    Image.new("RGB", (9, 9)).save(own / "train" / "empty" / "moving.gif")
    refuses(loaders, own / "train" / "empty", "no images", ".png")


@pytest.mark.parametrize("classes", [[], ["cat"]])
def test_fewer_than_two_classes_are_refused(loaders, classes):
    for split in ["train", "test"]:
        Path("own", split).mkdir(parents=True)
        for name in classes:
            Path("own", split, name).mkdir()
            plain("L", 0).save(Path("own", split, name, "0.png"))
    refuses(loaders, "own: train/ and test/ must hold two classes or more", classes)


def test_names_may_hold_any_letters(loaders):
    classes = [*CLASSES, "小猫", "[a]*?", "it's 100% {x}"]
    for label, name in enumerate(classes):
        for split in ["train", "test"]:
            folder = Path("[own] Bücher", split, name)
            folder.mkdir(parents=True)
            plain("L", 40 * label).save(folder / f"größe {name} [1].PNG")
    data = loaders["load_data"]("[own] Bücher")
    assert data.name == "[own] Bücher" and data.classes == sorted(classes)
    for images, labels in [data.train, data.test]:
        values = [classes.index(data.classes[label]) * 40 for label in labels]
        assert images[:, 0, 0, 0].tolist() == values


def test_links_to_folders_and_files_are_followed(loaders, own, tmp_path):
    away = tmp_path / "away"
    own.rename(away)
    for split in ["train", "test"]:
        Path("own", split, "dog").mkdir(parents=True)
        Path("own", split, "cat").symlink_to(away / split / "cat")
        Path("own", split, "dog", "linked.png").symlink_to(away / split / "dog" / "0.png")
        Path("own", split, "dog", "more").symlink_to(away / split / "cat")
    Path("link").symlink_to("own")
    data = loaders["load_data"]("link")
    assert data.classes == ["cat", "dog"] and list(data.train[1]) == [0, 1, 1]


@pytest.mark.parametrize("name", ["train/cat/gone.png", "test/dog/gone.jpg", "train/gone"])
def test_a_link_to_nothing_is_named(loaders, own, name):
    (own / name).symlink_to("nowhere")
    refuses(loaders, own / name)


def test_hidden_files_and_folders_do_not_count(loaders, own):
    before = loaders["load_data"]("own")
    for split in ["train", "test"]:
        for hidden in [".ipynb_checkpoints", "__MACOSX", ".git", "cat/.ipynb_checkpoints"]:
            (own / split / hidden).mkdir()
            (own / split / hidden / "0-checkpoint.png").write_bytes(
                (own / split / "cat" / "0.png").read_bytes()
            )
        for hidden in [".DS_Store", "cat/.DS_Store", "cat/._0.png", "cat/Thumbs.db", "notes.txt"]:
            (own / split / hidden).write_bytes(b"not for you")
    after = loaders["load_data"]("own")
    assert after.classes == before.classes == ["cat", "dog"]
    for a, b in [(after.train, before.train), (after.test, before.test)]:
        assert np.array_equal(a[0], b[0]) and a[1] == b[1]


@pytest.mark.parametrize("source", [None, 5, 0.5, True, ["own"], {"own": 1}, b"own", len])
def test_a_source_that_is_no_string_is_named(loaders, own, source):
    refuses(loaders, "DATA must be", repr(source), source=source)


def test_the_names_that_a_source_may_have_are_listed(loaders):
    refuses(loaders, "cifar10, cifar100, fashion-mnist, stand-in", source="cifar")


@pytest.mark.parametrize("source", ["~nobody-of-this-name/images", "a\0b", " own", "own/train"])
def test_a_source_that_is_no_folder_is_named(loaders, own, source):
    refuses(loaders, "DATA must be", repr(source), source=source)


def test_a_path_and_a_home_folder_are_sources(loaders, own, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert loaders["load_data"](Path("own")).name == loaders["load_data"]("~/own").name == "own"


@pytest.mark.parametrize("source", ["cifar10", "cifar100", "fashion-mnist"])
def test_a_folder_of_a_download_without_its_halves_is_named(loaders, source):
    Path("data", source).mkdir(parents=True)
    refuses(loaders, Path("data", source, "train"), repr(source), source=source)


@pytest.mark.parametrize("failing", ["load_data", "to_device"])
def test_after_an_error_the_data_of_before_is_whole(loaders, own, failing):
    loaders |= {"DATA": "own", "DEVICE": torch.device("cpu")}
    before = dict(run(loaders, "to-device"))
    parts = dict(vars(loaders["data"]))
    if failing == "load_data":
        (own / "train" / "cat" / "broken.png").write_bytes(b"")
    else:
        loaders["DEVICE"] = "no such device"
    with pytest.raises((ValueError, RuntimeError)):
        run(loaders, "to-device")
    for name in ["data", "PIXEL_MEAN", "PIXEL_STD"]:
        assert loaders[name] is before[name]
    assert vars(loaders["data"]) == parts and isinstance(parts["train"][0], torch.Tensor)


# The downloads of CIFAR-10 and FashionMNIST


class Handler(BaseHTTPRequestHandler):
    """Answers with a file, or fails in the way that its server was told."""

    def do_GET(self):
        server = self.server
        server.requests.append(server.way)
        if server.way == "silent":
            server.closing.wait(10)
        elif server.way == "404":
            self.send_error(404)
        elif server.way == "garbage":
            self.wfile.write(b"garbage\r\n\r\n")
        elif server.way != "nothing":
            body = server.files[Path(self.path).name]
            body = b"<html>Log in</html>" if server.way == "another page" else body
            self.send_response(200)
            self.send_header("Content-Length", len(body))
            self.end_headers()
            cut = server.way in ("half", "half, then silent")
            self.wfile.write(body[: len(body) // 2] if cut else body)
            if server.way == "half, then silent":
                server.closing.wait(10)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    """A local server that counts requests."""

    daemon_threads = False  # closing it waits for them

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.way, self.requests = files, "good", []
        self.closing = threading.Event()

    def handle_error(self, *args):
        pass  # a client that went away


def batches():
    """The files of a tiny CIFAR-10, whose pixels are their labels, and their checksums."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    files = {}
    for i, name in enumerate(names):
        labels = [(label + i) % 10 for label in range(10)]
        pixels = np.repeat(np.uint8(labels)[:, None], 3072, axis=1)
        files[name] = pickle.dumps({"data": pixels, "labels": labels}, protocol=2)
    files["batches.meta"] = pickle.dumps({"label_names": [f"class {c}" for c in range(10)]}, 2)
    return files


FILES = batches()
FOLDER = Path("data", "cifar-10-batches-py")
ARCHIVE = Path("data", "cifar-10-python.tar.gz")


def fashion_files():
    """The files of a tiny FashionMNIST, whose pixels are twenty times their label and one."""
    files = {}
    for name, n in [("train", 30), ("t10k", 20)]:
        labels = np.uint8(np.arange(n) * 7 % 10)
        pixels = np.repeat(20 * labels + 1, 28 * 28)
        shapes = {"images-idx3": [n, 28, 28], "labels-idx1": [n]}
        for (kind, shape), values in zip(shapes.items(), [pixels, labels]):
            header = np.array([0x800 + len(shape), *shape], ">u4").tobytes()
            files[f"{name}-{kind}-ubyte.gz"] = gzip.compress(header + values.tobytes(), mtime=0)
    return files


FASHION = fashion_files()
RAW = Path("data", "FashionMNIST", "raw")


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture(scope="module")
def archive():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in FILES.items():
            info = tarfile.TarInfo(f"{FOLDER.name}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture
def server(loaders, archive, monkeypatch):
    """A local server that torchvision downloads from, with little patience."""
    cifar10 = torchvision.datasets.CIFAR10
    sums = [[name, md5(FILES[name])] for name in FILES]
    server = Server({ARCHIVE.name: archive, **FASHION})
    fashion = torchvision.datasets.FashionMNIST
    monkeypatch.setattr(fashion, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(fashion, "resources", [(name, md5(FASHION[name])) for name in FASHION])
    monkeypatch.setattr(cifar10, "url", f"http://127.0.0.1:{server.server_port}/{ARCHIVE.name}")
    monkeypatch.setattr(cifar10, "tgz_md5", md5(archive))
    monkeypatch.setattr(cifar10, "train_list", sums[:5])
    monkeypatch.setattr(cifar10, "test_list", sums[5:6])
    monkeypatch.setattr(cifar10, "meta", cifar10.meta | {"md5": sums[6][1]})
    monkeypatch.setattr(torchvision.datasets.utils, "tqdm", None)  # the notebook sets its own
    monkeypatch.setenv("no_proxy", "*")
    patience = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda s: patience(s and s / 100))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


def assert_cifar10(loaders, capsys):
    """Loading gives CIFAR-10, images with their labels, and says nothing but a bar."""
    data = loaders["load_data"]("cifar10")
    assert (data.name, data.classes) == ("CIFAR-10", [f"class {c}" for c in range(10)])
    for (images, labels), n in [(data.train, 50), (data.test, 10)]:
        assert images.shape == (n, 32, 32, 3) and images.dtype == np.uint8
        assert (images == np.uint8(labels)[:, None, None, None]).all()
    said = capsys.readouterr()
    assert said.err == "" and "\n" not in said.out and not re.search("[a-z]{6}", said.out)


def assert_stand_in(loaders, capsys):
    """Loading gives the stand-in, and one notice that says why and what to do."""
    assert "stand-in" in loaders["load_data"]("cifar10").name
    said = capsys.readouterr()
    assert said.err == "" and said.out.count("NOTICE") == 1
    assert "run this cell again" in said.out and ARCHIVE.name in said.out
    assert FOLDER.as_posix() in said.out and torchvision.datasets.CIFAR10.url in said.out
    return said.out


def test_cifar10_is_downloaded_once(loaders, server, capsys):
    assert_cifar10(loaders, capsys)
    n_requests = len(server.requests)
    assert n_requests > 0
    assert_cifar10(loaders, capsys)
    ARCHIVE.unlink()
    assert_cifar10(loaders, capsys)
    assert len(server.requests) == n_requests


FAILURES = {
    "silent": "timed out",
    "404": "404",
    "garbage": "BadStatusLine",
    "nothing": "closed",
    "another page": "corrupted",
    "half": "corrupted|IncompleteRead",
    "half, then silent": "timed out",
}


@pytest.mark.parametrize("way", FAILURES)
def test_a_failing_server_does_not_spoil_the_next_attempt(loaders, server, capsys, way):
    server.way = way
    assert re.search(FAILURES[way], assert_stand_in(loaders, capsys))
    server.way = "good"
    assert_cifar10(loaders, capsys)


def test_without_a_server_the_notice_says_what_to_do(loaders, server, capsys, monkeypatch):
    nobody_listens = f"http://127.0.0.1:9/{ARCHIVE.name}"
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", nobody_listens)
    assert "refused" in assert_stand_in(loaders, capsys)


@pytest.mark.parametrize("damage", [lambda a: a[:-1000], lambda a: a[::-1], lambda a: b""])
def test_a_damaged_archive_is_downloaded_again(loaders, server, archive, capsys, damage):
    ARCHIVE.parent.mkdir()
    ARCHIVE.write_bytes(damage(archive))
    assert_cifar10(loaders, capsys)
    assert ARCHIVE.read_bytes() == archive


def test_a_damaged_archive_and_no_server_give_the_stand_in(loaders, server, archive, capsys):
    ARCHIVE.parent.mkdir()
    ARCHIVE.write_bytes(archive[:-1000])
    server.way = "404"
    assert_stand_in(loaders, capsys)
    server.way = "good"
    assert_cifar10(loaders, capsys)


@pytest.mark.parametrize("damaged", ["data_batch_3", "test_batch"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_whole_archive_repairs_its_folder_without_a_request(
    loaders, server, archive, capsys, damage, damaged
):
    ARCHIVE.parent.mkdir()
    ARCHIVE.write_bytes(archive)
    assert_cifar10(loaders, capsys)
    if damage == "missing":
        (FOLDER / damaged).unlink()
    else:
        (FOLDER / damaged).write_bytes(FILES[damaged][:1000])
    assert_cifar10(loaders, capsys)
    assert server.requests == []


def test_when_the_class_names_are_damaged_the_notice_helps(loaders, server, capsys):
    """torchvision does not extract again for this file alone."""
    assert_cifar10(loaders, capsys)
    n_requests = len(server.requests)
    (FOLDER / "batches.meta").write_bytes(b"")
    assert f"remove {FOLDER.as_posix()}" in assert_stand_in(loaders, capsys)
    for path in FOLDER.iterdir():
        path.unlink()
    FOLDER.rmdir()
    assert_cifar10(loaders, capsys)
    assert len(server.requests) == n_requests


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_does_not_spoil_the_next_attempt(loaders, server, capsys, monkeypatch):
    def opened(path, mode="r"):
        file = open(path, mode)
        if "w" not in mode:
            return file
        file.close()
        return no_space()

    with monkeypatch.context() as patch:
        patch.setattr(torchvision.datasets.utils, "open", opened, raising=False)
        assert "No space left" in assert_stand_in(loaders, capsys)
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "copyfileobj", no_space)  # while it extracts
        assert "No space left" in assert_stand_in(loaders, capsys)
    n_requests = len(server.requests)
    assert ARCHIVE.exists()
    assert_cifar10(loaders, capsys)
    assert len(server.requests) == n_requests


def test_a_file_in_the_place_of_the_data_folder_is_named(loaders, server, capsys):
    Path("data").write_text("")
    assert "'data'" in assert_stand_in(loaders, capsys)


def test_an_interrupt_leaves_nothing_that_spoils_the_next_attempt(
    loaders, server, capsys, monkeypatch
):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loaders["tqdm"], "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loaders["load_data"]("cifar10")
    assert 0 < ARCHIVE.stat().st_size
    capsys.readouterr()
    assert_cifar10(loaders, capsys)


def assert_fashion(loaders, capsys):
    """Loading gives FashionMNIST: images in a margin of black, with their labels, in colours."""
    data = loaders["load_data"]("fashion-mnist")
    assert data.name == "FashionMNIST" and len(data.classes) == 10 and "Bag" in data.classes
    for (images, labels), n in [(data.train, 30), (data.test, 20)]:
        assert images.shape == (n, 32, 32, 3) and images.dtype == np.uint8
        assert list(labels) == [7 * i % 10 for i in range(n)]
        expected = np.zeros_like(images)
        expected[:, 2:30, 2:30] += np.uint8(20 * labels + 1)[:, None, None, None]
        assert np.array_equal(images, expected)
    said = capsys.readouterr()
    assert said.err == "" and "NOTICE" not in said.out


def assert_no_fashion(loaders, capsys):
    """Loading gives the stand-in, and one notice that says why and what to do."""
    assert "stand-in" in loaders["load_data"]("fashion-mnist").name
    said = capsys.readouterr()
    assert said.err == "" and said.out.count("NOTICE: FashionMNIST could not be loaded") == 1
    assert "run this cell again" in said.out and RAW.parent.as_posix() in said.out
    with warnings.catch_warnings():
        # torchvision's list of errors is in a cycle with itself, and with it an open connection
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    return said.out


def test_fashion_mnist_is_downloaded_once(loaders, server, capsys):
    assert_fashion(loaders, capsys)
    assert len(server.requests) >= 4
    n_requests = len(server.requests)
    assert_fashion(loaders, capsys)
    for path in RAW.glob("*.gz"):
        path.unlink()
    assert_fashion(loaders, capsys)
    assert len(server.requests) == n_requests


@pytest.mark.parametrize("way", FAILURES)
def test_a_server_that_fails_fashion_mnist_does_not_spoil_the_next_attempt(
    loaders, server, capsys, way
):
    server.way = way
    assert re.search(FAILURES[way], assert_no_fashion(loaders, capsys))
    server.way = "good"
    assert_fashion(loaders, capsys)


def test_files_of_fashion_mnist_are_used_where_the_notice_says(loaders, server, capsys):
    server.way = "404"
    where = re.search(r"save its files in (\S+)", assert_no_fashion(loaders, capsys))[1]
    for name, content in FASHION.items():
        Path(where, name).write_bytes(content)
    server.requests.clear()
    assert_fashion(loaders, capsys)
    assert server.requests == []


def test_a_damaged_download_of_fashion_mnist_is_repaired(loaders, server, capsys):
    RAW.mkdir(parents=True)
    for damage, (name, content) in zip([10, 100, 0], FASHION.items()):
        (RAW / name).write_bytes(content[:damage])
    assert_fashion(loaders, capsys)


@pytest.mark.parametrize("length", [0, 10, 100])
def test_a_file_that_torchvision_half_extracted_leads_to_a_notice_that_helps(
    loaders, server, capsys, length
):
    """It finds the file there and does not extract it again, as after a full disk."""
    assert_fashion(loaders, capsys)
    damaged = RAW / "train-images-idx3-ubyte"
    damaged.write_bytes(damaged.read_bytes()[:length])
    said = assert_no_fashion(loaders, capsys)
    assert f"remove {RAW.parent.as_posix()}" in said
    shutil.rmtree(RAW.parent)
    assert_fashion(loaders, capsys)
