"""Image sets in their original files: fetched, checked, read, or said to be missing."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lowrank_jax.errors import MissingFile, UserError
from train import fetch
from train.data import original_files, pipeline
from train.data.original_files import ORIGINALS, File, Original


def idx(array: np.ndarray) -> bytes:
    """An IDX file of uint8, by its specification."""
    head = bytes([0, 0, 8, array.ndim])
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return head + sizes + array.tobytes()


def about(name: str, content: bytes) -> File:
    return File(name, len(content), hashlib.sha256(content).hexdigest())


@pytest.fixture
def mnist_like() -> tuple[Original, dict[str, bytes], list[np.ndarray]]:
    """A small set of the form of MNIST: what is published, and its arrays."""
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 256, (7, 28, 28), np.uint8),
        rng.integers(0, 10, 7, np.uint8),
        rng.integers(0, 256, (3, 28, 28), np.uint8),
        rng.integers(0, 10, 3, np.uint8),
    ]
    names = [file.name for file in ORIGINALS["mnist"].files]
    packed = [gzip.compress(idx(array), mtime=0) for array in arrays]
    contents = dict(zip(names, packed, strict=True))
    files = tuple(about(name, content) for name, content in contents.items())
    return Original("", files), contents, arrays


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and the end of a file to who asks for it."""

    asked: list[str | None]
    at_most: int | None

    def send_head(self) -> io.BytesIO | None:
        asked = self.headers["Range"]
        self.asked.append(asked)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return None
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        content = path.read_bytes()[start:]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return io.BytesIO(content[: self.at_most])

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def served(
    folder: Path, at_most: int | None = None
) -> Iterator[tuple[str, list[str | None]]]:
    """Serves a folder on this machine: its address, and the ranges that are asked.

    Args:
      folder: What is served.
      at_most: Bytes of an answer after which the connection ends.
    """
    asked: list[str | None] = []
    handler = type("Asked", (Handler,), {"asked": asked, "at_most": at_most})
    serve = functools.partial(handler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_fetched_and_read(tmp_path, mnist_like):
    """What was cut off goes on, what is there stays, and the arrays are the same."""
    original, contents, arrays = mnist_like
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    for name, content in contents.items():
        (there / name).write_bytes(content)
    first, second, *_ = contents
    (here / f"{first}.part").write_bytes(contents[first][:100])
    (here / second).write_bytes(contents[second])
    with served(there) as (url, asked):
        fetch.fetch(original, here, url)
        assert asked == ["bytes=100-", None, None]
        fetch.fetch(original, here, url)
        assert len(asked) == 3
    assert sorted(path.name for path in here.iterdir()) == sorted(contents)
    splits = original_files.read(original, here)
    for n, split in enumerate(splits):
        np.testing.assert_array_equal(split["image"][..., 0], arrays[2 * n])
        np.testing.assert_array_equal(split["label"], arrays[2 * n + 1])
        assert split["label"].dtype == np.int32


def test_a_connection_that_ends_early(tmp_path, mnist_like):
    """What came stays, and the next try goes on from there."""
    original, contents, _ = mnist_like
    (tmp_path / "there").mkdir()
    for name, content in contents.items():
        (tmp_path / "there" / name).write_bytes(content)
    here, (first, *_) = tmp_path / "here", contents
    with served(tmp_path / "there", at_most=7) as (url, asked):
        for _ in range(2):
            with pytest.raises(UserError, match="a connection that ended early. Try"):
                fetch.fetch(original, here, url)
    assert asked == [None, "bytes=7-"]
    assert (here / f"{first}.part").read_bytes() == contents[first][:14]


def test_what_a_server_may_do_wrong(tmp_path, mnist_like):
    """Another file, none, nobody there: one line each, and nothing half is left."""
    original, contents, _ = mnist_like
    name, *_ = contents
    (tmp_path / name).write_bytes(b"<html>moved</html>")
    here = tmp_path / "here"
    with served(tmp_path) as (url, _):
        with pytest.raises(UserError) as another:
            fetch.fetch(original, here, url)
        (tmp_path / name).unlink()
        with pytest.raises(UserError) as none:
            fetch.fetch(original, here, f"{url}/")
    with pytest.raises(UserError) as nobody:
        fetch.fetch(original, here, url)
    with pytest.raises(UserError, match="answers, got unknown url type: 'nonsense/"):
        fetch.fetch(original, here, "nonsense")
    assert str(another.value) == (
        f"{url}/{name}: {here / name}.part: must have {original.files[0].size:,} bytes,"
        " got 18. It is damaged; remove it, and fetch it again."
    )
    ending = f"Try again, name a mirror by --url, or put the file into {here} yourself."
    for caught, reason in ((none, "Not Found"), (nobody, "[Errno 111] Connection")):
        message = str(caught.value)
        start = f"{url}/{name}: must be an address that answers, got {reason}"
        assert message.startswith(start) and message.endswith(ending)
    assert not list(here.iterdir())


@pytest.mark.parametrize("harm", ["missing", "short", "another bit"])
def test_damaged_files_are_named(tmp_path, mnist_like, harm):
    original, contents, _ = mnist_like
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    path = tmp_path / original.files[2].name
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes({"short": content[:-1]}.get(harm, content))
    if harm == "missing":
        path.unlink()
    with pytest.raises(UserError) as caught:
        original_files.read(original, tmp_path)
    rule = {"missing": "must be there", "short": "must have"}.get(harm, "must have the")
    assert str(caught.value).startswith(f"{path}: {rule}")
    assert str(caught.value).lower().endswith(" fetch it again.")
    assert isinstance(caught.value, MissingFile) == (harm == "missing")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\x0d\1\0\0\0\0",
        b"\0\0\x08\1\0\0\0\3ab",
        idx(np.zeros(3, np.uint8))[:6],
    ],
)
def test_no_idx(content):
    with pytest.raises(UserError, match="^x.gz: must be a file as it was published"):
        original_files.parse_idx(content, Path("x.gz"))


def cifar_records(count: int, rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, count, np.uint8)
    planes = images.transpose(0, 3, 1, 2).reshape(count, -1)
    return np.concatenate([labels[:, None], planes], axis=1).tobytes(), images


def test_the_archive_of_cifar(tmp_path):
    """Five batches in their order, and the test's; colours come last."""
    rng = np.random.default_rng(0)
    names = [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"]
    made = {name: cifar_records(2, rng) for name in names}
    path = tmp_path / "cifar.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in reversed(names):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(made[name][0])
            archive.addfile(member, io.BytesIO(made[name][0]))
    train, test = original_files.read_cifar(path)
    expected = np.concatenate([made[name][1] for name in names[:5]])
    np.testing.assert_array_equal(train["image"], expected)
    np.testing.assert_array_equal(test["image"], made["test_batch.bin"][1])
    with pytest.raises(UserError, match="no records of 3,073"):
        original_files.parse_cifar(made[names[0]][0][:-1], path)
    with pytest.raises(UserError, match="the label 77"):
        original_files.parse_cifar(b"\x4d" + bytes(3072), path)
    with tarfile.open(path, "w:gz"):
        pass
    with pytest.raises(UserError, match="got no data_batch_1.bin, data_batch_2.bin"):
        original_files.read_cifar(path)


def test_a_set_by_its_name(tmp_path, monkeypatch, mnist_like):
    """Where nothing is prepared by TFDS, the original files are taken; a run does not
    go on with the other order of the same images."""
    original, contents, arrays = mnist_like
    monkeypatch.setitem(ORIGINALS, "mnist", original)
    (tmp_path / "mnist").mkdir()
    for name, content in contents.items():
        (tmp_path / "mnist" / name).write_bytes(content)
    data = pipeline.load_dataset("mnist", data_dir=str(tmp_path), validation_examples=2)
    assert data.sizes == {"train": 5, "validation": 2, "test": 3}
    assert data.facts["num_classes"] == 10
    assert data.facts["about"] == {"order": "original files"}
    (batch,) = data.eval_batches("test", 3)
    np.testing.assert_array_equal(batch["image"][..., 0], arrays[2])


def test_what_is_said_of_missing_sets(tmp_path):
    """The command that fetches it and the layouts, a recipe, or the nearest name."""
    expected = {
        "mnist": (
            f"data set 'mnist': must be in {tmp_path}, got nothing of it there. Run"
            f" python -m train.fetch mnist --data_dir={tmp_path} (no TensorFlow"
            " needed), or set config.data.data_dir or TFDS_DATA_DIR to where it is.\n"
            f"  as it was published: {tmp_path}/mnist/ with train-images-idx3-ubyte.gz,"
            " train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz,"
            " t10k-labels-idx1-ubyte.gz\n"
            f"  as TFDS prepares it: {tmp_path}/mnist/VERSION/ with dataset_info.json"
            " and *.array_record*"
        ),
        "minst": (
            f"data set: must be a known name, or a set that is prepared in {tmp_path},"
            " got 'minst'. Did you mean 'mnist'?"
        ),
        "oxford_pets": (
            "data set 'oxford_pets': must be one of cifar10, digits, fashion_mnist,"
            f" mnist, sentence_pairs, text_windows, or prepared in {tmp_path}, got"
            " neither. Set config.data.data_dir or TFDS_DATA_DIR to where it is, or"
            " prepare it once on a machine with TensorFlow:\n"
            f"  tfds.builder('oxford_pets', data_dir='{tmp_path}',"
            " file_format='array_record').download_and_prepare()\n"
            f"  which makes {tmp_path}/oxford_pets/VERSION/ with dataset_info.json and"
            " *.array_record*"
        ),
    }
    for name, message in expected.items():
        with pytest.raises(UserError) as caught:
            pipeline.load_dataset(name, data_dir=str(tmp_path))
        assert str(caught.value) == message
