"""Serves a model of digits over HTTP, at the size that each request asks for.

    make quickstart   # elsewhere, pip install '.[serve]' brings what this needs
    .venv/bin/python -m examples.serve_digits --checkpoint=runs/quickstart/run
    curl -X PUT localhost:8000/size -d '{"size": "0.5"}'

- `POST /predict {"image": [64 pixels from 0 to 16], "size": "0.5"}` answers
  `{"label", "size", "ms"}`: the size that ran, and the time from the request to the
  answer. Without "size" the default one runs.
- `PUT /size {"size": "0.5"}` changes the default from the next batch on, for requests
  that wait too. `{"size": "auto"}` lets the queue choose: the largest size and, for
  each full batch of requests that wait, one smaller.
- `GET /sizes` tells the sizes with their costs and the default, `GET /health` how many
  requests wait.

What does not fit is answered by status 400 and `{"error": what to mend}`. One set of
weights is held, and programs for every size and batch are compiled before the first
request. Requests that wait run together, up to the largest batch, those of one size at
a time. The queue has no limit: put a proxy with one before it.
"""

import asyncio
import collections
import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import uvicorn
from absl import flags
from flax import nnx
from jaxtyping import UInt8
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from lowrank_jax import errors, families
from lowrank_jax.active import get_ranks
from lowrank_jax.elastic import Elastic
from lowrank_jax.errors import UserError
from train import binary, opening
from train.model import about, checkpoint_task, family_of, model_cost

BATCHES = (1, 4, 16, 64)
SHAPE = (8, 8, 1)
BRIGHTEST = 16
MOST_BYTES = 10_000  # of a request's body
AUTO = "auto"

Costs = Mapping[str, Mapping[str, int]]
"""Parameters and MACs by size."""


def load(
    path: str | Path,
    fractions: Sequence[float],
    *,
    batches: Sequence[int] = BATCHES,
    allow_imports: Sequence[str] = (),
) -> tuple[Elastic, Costs]:
    """Loads a classifier of digits at several sizes, from pixels to labels.

    Args:
      path: A checkpoint, a folder of steps, or a run's workdir.
      fractions: The sizes: members of the checkpoint's family where it has one, else
        fractions of every rank.
      batches: How many images programs are compiled for.
      allow_imports: Packages that names in the checkpoint may be imported from.

    Raises:
      UserError: It classifies something else, or has no such sizes.
    """
    allowed = list(allow_imports)
    with errors.at("--checkpoint"):
        saved, model = opening.load_latest(path, allow_imports=allowed)
        task = checkpoint_task(saved, allow_imports=allowed)
        config, facts, _ = about(saved)
        image = facts["arrays"].get("image", {})
        if "num_classes" not in facts or tuple(image.get("shape", ())) != SHAPE:
            raise UserError(
                f"must be of a classifier of images {SHAPE}, got one trained on"
                f" {config['data']['name']}. Take one of configs/digits_mlp.py."
            )
        family = family_of(saved)

    def label(model: nnx.Module, images: jax.Array) -> jax.Array:
        return model(*task.inputs({"image": images}, None)).argmax(axis=-1)

    full, cost = get_ranks(model), model_cost(model, task)
    with errors.at("--sizes"):
        ordered = sorted(set(fractions), reverse=True)
        if len({f"{fraction:g}" for fraction in ordered}) < len(ordered):
            raise UserError(
                f"must differ in six digits, got {ordered}. Leave one of them out."
            )
        sizes = {f"{f:g}": families.member(family, full, f) for f in ordered}
        example = jax.ShapeDtypeStruct((1, *SHAPE), np.uint8)
        elastic = Elastic(model, sizes, example, batches=batches, forward=label)
    costs = {
        name: {"params": cost.params(ranks), "macs": cost.macs(ranks)}
        for name, ranks in sizes.items()
    }
    return elastic, costs


class _Waiting(NamedTuple):
    """A request: its image, the size it asks for, and where its answer is put."""

    image: UInt8[np.ndarray, "x y c"]
    size: str | None
    answer: asyncio.Future


class Service:
    """Runs what waits, in batches of one size.

    Args:
      elastic: From images to labels; its default size is that of requests that name
        none.

    Attributes:
      auto: Whether the queue chooses that size instead.
    """

    def __init__(self, elastic: Elastic):
        self.elastic = elastic
        self.auto = False
        self.names = tuple(elastic.sizes)
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._arrived = asyncio.Event()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @property
    def default(self) -> str:
        """The size of a request that names none, if it ran now."""
        if not self.auto:
            return self.elastic.size
        smaller = self.waiting // self.elastic.batches[-1]
        return self.names[min(smaller, len(self.names) - 1)]

    async def answer(
        self, image: UInt8[np.ndarray, "x y c"], size: str | None
    ) -> tuple[int, str]:
        """Returns an image's label and the size that found it, when its turn has come.

        Args:
          image: Its pixels.
          size: Which size; None for the default when it runs.
        """
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(image, size, answer))
        self._arrived.set()
        return await answer

    async def work(self) -> None:
        """Runs batches for ever."""
        while True:
            await self._arrived.wait()
            if not self._waiting:
                self._arrived.clear()
                continue
            size, batch = self._take()
            images = np.stack([one.image for one in batch])
            try:
                labels = await asyncio.to_thread(self.elastic, images, size=size)
            except Exception as error:  # theirs; those after them are answered
                for one in batch:
                    if not one.answer.done():  # else nobody listens any more
                        one.answer.set_exception(error)
                continue
            for one, label in zip(batch, labels, strict=True):
                if not one.answer.done():
                    one.answer.set_result((int(label), size))

    def _take(self) -> tuple[str, list[_Waiting]]:
        """Takes the first request, and those of its size, out of the queue."""
        default = self.default
        size = self._waiting[0].size or default
        batch, others = [], []
        while self._waiting and len(batch) < self.elastic.batches[-1]:
            one = self._waiting.popleft()
            (batch if (one.size or default) == size else others).append(one)
        self._waiting.extendleft(reversed(others))
        return size, batch


def make_app(elastic: Elastic, costs: Costs) -> Starlette:
    """Makes the application; it runs batches as long as it lives."""
    service = Service(elastic)

    async def predict(request: Request) -> JSONResponse:
        began = time.perf_counter()
        given = await _read(request, {"image", "size"})
        image, size = _image(given.get("image")), given.get("size")
        if size is not None:
            _check_size(size, service.names)
        label, size = await service.answer(image, size)
        ms = 1000 * (time.perf_counter() - began)
        return JSONResponse({"label": label, "size": size, "ms": ms})

    async def put_size(request: Request) -> JSONResponse:
        size = (await _read(request, {"size"})).get("size")
        _check_size(size, (*service.names, AUTO))
        service.auto = size == AUTO
        if not service.auto:
            elastic.size = size
        return JSONResponse({"size": size})

    async def get_sizes(request: Request) -> JSONResponse:
        default = AUTO if service.auto else elastic.size
        return JSONResponse({"sizes": costs, "default": default})

    async def get_health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "waiting": service.waiting})

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        worker = asyncio.create_task(service.work())
        yield
        worker.cancel()

    routes = [
        Route("/predict", predict, methods=["POST"]),
        Route("/size", put_size, methods=["PUT"]),
        Route("/sizes", get_sizes),
        Route("/health", get_health),
    ]
    return Starlette(
        routes=routes, lifespan=lifespan, exception_handlers={UserError: _refuse}
    )


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, status_code=400)


async def _read(request: Request, known: set[str]) -> dict[str, Any]:
    """The body: a JSON object of known names.

    Raises:
      UserError: It is something else, or too long.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise UserError(
                f"body: must be at most {MOST_BYTES:,} bytes, got more. Send one image."
            )
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"body: must be JSON, got {body[:40]!r} ({error}). Mend it."
        ) from error
    if not isinstance(given, dict) or given.keys() - known:
        raise UserError(
            f"body: must be an object of {sorted(known)}, got {str(given)[:80]}. Name"
            " these alone."
        )
    return given


def _image(pixels: Any) -> UInt8[np.ndarray, "x y c"]:
    """An image from its pixels, row by row."""
    count = int(np.prod(SHAPE))
    if not isinstance(pixels, list) or len(pixels) != count:
        shown = f"{len(pixels)}" if isinstance(pixels, list) else f"{pixels!r:.40}"
        raise UserError(
            f"image: must be a list of {count} numbers, got {shown}. Send the pixels of"
            f" {SHAPE[0]} rows, one row after the other."
        )
    if wrong := [x for x in pixels if not _is_pixel(x)]:
        raise UserError(
            f"image: must be whole numbers from 0 to {BRIGHTEST}, got {wrong[0]!r:.40}."
            " Scale and round them."
        )
    return np.asarray(pixels, np.uint8).reshape(SHAPE)


def _is_pixel(x: Any) -> bool:
    return type(x) in (int, float) and 0 <= x <= BRIGHTEST and x == int(x)


def _check_size(size: Any, known: Sequence[str]) -> None:
    if size not in known:
        raise UserError(
            f"size: must be one of {list(known)}, got {size!r:.40}. Choose one."
        )


def _define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "A run's workdir, or a checkpoint.")
    flags.DEFINE_list("sizes", ["1", "0.5", "0.25", "0.125"], "Fractions of the ranks.")
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen at.")
    flags.DEFINE_integer("port", 8000, "Port to listen at.", 1, 65535)
    flags.DEFINE_list("allow_imports", [], "Packages that names may be imported from.")
    flags.mark_flag_as_required("checkpoint")


def _fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"--sizes: must be numbers, got {text!r}. Mend it.") from error


def _main() -> None:
    given = flags.FLAGS
    fractions = [_fraction(text) for text in given.sizes]
    elastic, costs = load(
        given.checkpoint, fractions, allow_imports=given.allow_imports
    )
    sizes = ", ".join(elastic.sizes)
    print(f"sizes {sizes} ({elastic.nbytes:,} bytes) on {given.host}:{given.port}")
    uvicorn.run(
        make_app(elastic, costs), host=given.host, port=given.port, log_level="warning"
    )


if __name__ == "__main__":
    _define_flags()
    binary.run(_main)
