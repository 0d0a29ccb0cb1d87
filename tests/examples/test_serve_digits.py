"""The server of digits: answers are the cut model's, refusals say what to mend."""

import asyncio
import collections
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
import text_configs
from cutting import FULL, cut_to, load, make_config
from sklearn import datasets
from starlette.testclient import TestClient

from examples import serve_digits
from lowrank_jax import checkpoint
from lowrank_jax.elastic import Elastic
from lowrank_jax.errors import UserError
from train.model import checkpoint_task

SIZES = ("1", "0.5", "0.1")
BATCHES = (1, 4)
Loaded = tuple[Elastic, serve_digits.Costs]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("served") / "run"
    support.train(make_config("mlp", {"hidden": (80,)}, epochs=3), workdir)
    return workdir


@pytest.fixture(scope="module")
def loaded_once(run: Path) -> Loaded:
    return serve_digits.load(run, [float(size) for size in SIZES], batches=BATCHES)


@pytest.fixture
def loaded(loaded_once: Loaded) -> Loaded:
    """With the default size that it begins with."""
    loaded_once[0].size = SIZES[0]
    return loaded_once


@pytest.fixture
def client(loaded: Loaded) -> Iterator[TestClient]:
    with TestClient(serve_digits.make_app(*loaded)) as client:
        yield client


def digits(count: int) -> np.ndarray:
    data = datasets.load_digits().images[:count]
    return data[..., None].astype(np.uint8)


def body(image: np.ndarray, **more: Any) -> dict[str, Any]:
    return {"image": image.ravel().tolist(), **more}


def test_answers_are_those_of_the_cut_checkpoint(run, client, tmp_path):
    """At each size that a request names; other labels at the least one."""
    images, labels = digits(60), {}
    for size in SIZES:
        cut = tmp_path / size
        cut_to(run, cut, "rank_fraction", float(size))
        model = load(cut)
        saved = checkpoint.open_checkpoint(cut)
        task = checkpoint_task(saved, allow_imports=[])
        wanted = model(*task.inputs({"image": images}, None)).argmax(axis=-1)
        found = [client.post("/predict", json=body(x, size=size)) for x in images]
        assert {one.status_code for one in found} == {200}
        answers = [one.json() for one in found]
        assert {one["size"] for one in answers} == {size}
        assert min(one["ms"] for one in answers) > 0
        labels[size] = [one["label"] for one in answers]
        assert labels[size] == wanted.tolist()
    assert labels["1"] != labels["0.1"]


def test_sizes_are_those_of_the_checkpoints_family(run, tmp_path):
    """Where it has one: by layer, and on the line between two."""
    saved = checkpoint.open_checkpoint(run)
    about = {key: saved.metadata[key] for key in ("config", "facts")}
    half = {"head": 10, "hidden/0": 8}
    about["family"] = [[0.5, half]]
    checkpoint.save(tmp_path / "family", load(run), metadata=about)
    elastic, costs = serve_digits.load(tmp_path / "family", [0.75, 1.0, 0.5])
    assert elastic.sizes == {"1": FULL, "0.75": {**FULL, "hidden/0": 36}, "0.5": half}
    params = [cost["params"] for cost in costs.values()]
    assert params == sorted(params, reverse=True) and params[-1] < params[0]


def test_pixels_may_be_written_as_decimals(client):
    image = digits(1)[0]
    given = {"image": image.ravel().astype(float).tolist()}
    found = client.post("/predict", json=given).json()
    assert found["label"] == client.post("/predict", json=body(image)).json()["label"]


def test_the_default_size_is_read_and_changed(client):
    """The largest at first; what a request names goes first."""
    image = digits(1)[0]
    sizes = client.get("/sizes").json()
    assert sizes["default"] == "1" and tuple(sizes["sizes"]) == SIZES
    macs = [size["macs"] for size in sizes["sizes"].values()]
    assert macs == sorted(macs, reverse=True) and len(set(macs)) == len(SIZES)
    for size in ("0.1", "auto", "0.5"):
        assert client.put("/size", json={"size": size}).json() == {"size": size}
        assert client.get("/sizes").json()["default"] == size
        ran = client.post("/predict", json=body(image)).json()["size"]
        assert ran == ("1" if size == "auto" else size)  # nothing else waits
        named = client.post("/predict", json=body(image, size="1")).json()["size"]
        assert named == "1"
    assert client.get("/health").json() == {"status": "ok", "waiting": 0}


PIXELS = [0] * 64
REFUSED = {
    "not JSON": ("/predict", b"{", "body: must be JSON"),
    "not UTF-8": ("/predict", b"\xff\xff", "body: must be JSON"),
    "deep": ("/predict", b"[" * 9000, "body: must be JSON"),
    "long": ("/predict", b" " * 10_001, "body: must be at most 10,000 bytes"),
    "a list": ("/predict", [1], "body: must be an object of ['image', 'size']"),
    "another name": ("/predict", {"pixels": PIXELS}, "body: must be an object of"),
    "no image": ("/predict", {}, "image: must be a list of 64 numbers, got None"),
    "a text": ("/predict", {"image": "a" * 64}, "image: must be a list of 64 numbers"),
    "63 pixels": ("/predict", {"image": PIXELS[1:]}, "image: must be a list of 64 num"),
    "rows": ("/predict", {"image": [[0] * 8] * 8}, "image: must be a list of 64 numb"),
    "17": ("/predict", {"image": [*PIXELS[1:], 17]}, "image: must be whole numbers fr"),
    "-1": ("/predict", {"image": [*PIXELS[1:], -1]}, "image: must be whole numbers fr"),
    "a half": ("/predict", {"image": [*PIXELS[1:], 0.5]}, "image: must be whole numbe"),
    "true": ("/predict", {"image": [*PIXELS[1:], True]}, "image: must be whole number"),
    "NaN": ("/predict", b'{"image": [' + b"0," * 63 + b"NaN]}", "image: must be whole"),
    "size": ("/predict", {"image": PIXELS, "size": "2"}, "size: must be one of ['1', "),
    "a number": ("/predict", {"image": PIXELS, "size": 1}, "size: must be one of ['1'"),
    "auto": ("/predict", {"image": PIXELS, "size": "auto"}, "size: must be one of ['1"),
    "default": ("/size", {"size": "2"}, "size: must be one of ['1', '0.5', '0.1', 'au"),
    "none": ("/size", {}, "size: must be one of"),
    "a list as size": ("/size", {"size": ["1"]}, "size: must be one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(client, case):
    """By status 400 and one message; the next request is answered."""
    path, given, message = REFUSED[case]
    method = "POST" if path == "/predict" else "PUT"
    data = {"content": given} if isinstance(given, bytes) else {"json": given}
    found = client.request(method, path, **data)
    assert found.status_code == 400
    assert found.json()["error"].startswith(message)
    assert client.post("/predict", json=body(digits(1)[0])).status_code == 200


async def _answers(
    service: serve_digits.Service, asked: list[str | None], change: Any = None
) -> list[tuple[int, str]]:
    """What requests get that all wait before the first batch runs."""
    image = digits(1)[0]
    tasks = [asyncio.create_task(service.answer(image, size)) for size in asked]
    while service.waiting < len(asked):
        await asyncio.sleep(0)
    if change:
        change()
    worker = asyncio.create_task(service.work())
    try:
        return await asyncio.gather(*tasks)
    finally:
        worker.cancel()


def test_a_long_queue_takes_smaller_sizes(loaded):
    """One for each full batch that waits, and the largest again as it empties."""
    service = serve_digits.Service(loaded[0])
    service.auto = True
    sizes = [size for _, size in asyncio.run(_answers(service, [None] * 14))]
    assert sizes == ["0.1"] * 8 + ["0.5"] * 4 + ["1"] * 2


def test_requests_that_wait_run_together_by_size(loaded, monkeypatch):
    """In the order in which the first of each came; a new default is theirs too."""
    elastic, _ = loaded
    batches = []
    run = Elastic.__call__

    def note(self: Elastic, images: np.ndarray, *, size: str) -> np.ndarray:
        batches.append((len(images), size))
        return run(self, images, size=size)

    monkeypatch.setattr(Elastic, "__call__", note)
    service = serve_digits.Service(elastic)
    asked = [None, "0.1", None, "0.1", "1", None, None, None]
    change = lambda: setattr(elastic, "size", "0.5")  # noqa: E731
    answers = asyncio.run(_answers(service, asked, change))
    assert [size for _, size in answers] == [size or "0.5" for size in asked]
    assert batches == [(4, "0.5"), (2, "0.1"), (1, "1"), (1, "0.5")]


def test_a_batch_that_fails_is_not_the_last(loaded):
    """Its requests get the error; those after it are answered."""
    service = serve_digits.Service(loaded[0])

    async def both() -> tuple[Any, Any]:
        worker = asyncio.create_task(service.work())
        bad = service.answer(np.zeros((7, 8, 1), np.uint8), None)
        (error,) = await asyncio.gather(bad, return_exceptions=True)
        answer = await service.answer(digits(1)[0], None)
        worker.cancel()
        return error, answer

    error, (label, size) = asyncio.run(both())
    assert isinstance(error, UserError) and "inputs: must be" in str(error)
    assert label in range(10) and size == "1"


def test_a_switch_under_load_fails_no_request(client):
    """Threads ask all the time, the size changes back and forth: every answer is the
    model's, and both sizes ran."""
    images = digits(8)
    alone = {
        (size, n): client.post("/predict", json=body(x, size=size)).json()["label"]
        for size in SIZES
        for n, x in enumerate(images)
    }
    wrong: list[Any] = []
    ran: collections.Counter[str] = collections.Counter()
    stop = threading.Event()

    def ask(number: int) -> None:
        while not stop.is_set():
            found = client.post("/predict", json=body(images[number]))
            answer = found.json()
            if found.status_code != 200 or (
                answer["label"] != alone[answer["size"], number]
            ):
                wrong.append(answer)
            ran[answer["size"]] += 1

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(images))]
    for thread in threads:
        thread.start()
    try:
        for size in (*SIZES[1:], *SIZES, "auto") * 3:
            before = sum(ran.values())
            assert client.put("/size", json={"size": size}).status_code == 200
            while sum(ran.values()) < before + 2 * len(images):  # two rounds at each
                assert any(thread.is_alive() for thread in threads)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert all(ran[size] for size in SIZES)


def test_models_of_something_else_are_refused(tmp_path, run):
    """Of text, at sizes that are none, from a folder without checkpoints."""
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="^--checkpoint: "):
        serve_digits.load(tmp_path / "none", [1.0])
    config = text_configs.make_config(text_configs.write(tmp_path / "a.txt"))
    config["phases"] = [{**config["phases"][0], "until": {"steps": 1}}]
    support.train(config, tmp_path / "text")
    with pytest.raises(UserError, match="^--checkpoint: must be of a classifier of i"):
        serve_digits.load(tmp_path / "text", [1.0])
    for bad in ([2.0], [0.0], [1.0, float("nan")]):
        with pytest.raises(UserError, match=r"^--sizes: .*must be in \(0, 1\]"):
            serve_digits.load(run, bad)
    with pytest.raises(UserError, match="^--sizes: must differ in six digits, got"):
        serve_digits.load(run, [0.333333333, 0.3333333331])
    with pytest.raises(UserError, match="^--sizes: sizes: must be at least one"):
        serve_digits.load(run, [])
