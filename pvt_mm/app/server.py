"""The server of the page: files, predictions and attention, each request by itself."""

import contextlib
import io
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from ..data.loading import DataError
from ..engine.errors import UsageError
from .models import Served

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request

STATIC = Path(__file__).with_name('static')
# The page loads nothing from elsewhere, and a browser makes sure of it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:"
)


@dataclass(frozen=True)
class Limits:
    """What an upload may be.

    Attributes:
        megabytes: Of the file.
        megapixels: Of the image in it, which may unpack to far more than the file.
    """

    megabytes: float = 20.0
    megapixels: float = 40.0


class Refused(Exception):
    """A request that cannot be answered, with the status and a sentence for the user."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def create_app(
    served: Sequence[Served], limits: Limits = Limits(), hosts: Sequence[str] = ('*',)
) -> 'Starlette':
    """The application, for any ASGI server.

    Args:
        served: The models, see :func:`serve`.
        limits: Of an upload.
        hosts: The names under which it may be called, so that no other page on the network can name
            this computer and read the answers; ``*`` allows all.

    Raises:
        UsageError: starlette is not installed, or two models have the same name.
    """
    try:
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.responses import FileResponse, JSONResponse
        from starlette.routing import Mount, Route
        from starlette.staticfiles import StaticFiles
    except ModuleNotFoundError as error:
        raise UsageError(_missing(error)) from error
    models = {one.name: one for one in served}
    if len(models) < len(served):
        names = ', '.join(one.name for one in served)
        raise UsageError(f'Two models have the same name, expected different ones: {names}.')

    async def page(request: 'Request') -> FileResponse:
        return FileResponse(STATIC / 'page.html', headers={'Content-Security-Policy': POLICY})

    async def describe(request: 'Request') -> JSONResponse:
        return JSONResponse([one.describe() for one in served])

    async def predict(request: 'Request') -> JSONResponse:
        model, data = _find(models, request), await _receive(request, limits)
        return JSONResponse(await run_in_threadpool(_with_file, data, limits, model.predict))

    async def attend(request: 'Request') -> JSONResponse:
        model, query = _find(models, request), request.query_params
        try:
            x, y = float(query.get('x', '')), float(query.get('y', ''))
        except ValueError as error:
            raise Refused(400, 'The point has no x and y, expected two numbers.') from error
        block, data = query.get('block', ''), await _receive(request, limits)

        def work(path: str) -> dict[str, Any]:
            return model.attend(path, x, y, block)

        return JSONResponse(await run_in_threadpool(_with_file, data, limits, work))

    async def refuse(request: 'Request', error: Exception) -> JSONResponse:
        return JSONResponse(dict(error=str(error)), getattr(error, 'status', 422))

    async def fail(request: 'Request', error: Exception) -> JSONResponse:
        # The server prints the traceback.
        text = f'The model failed, {type(error).__name__}: {error}. The terminal says where.'
        return JSONResponse(dict(error=text), 500)

    return Starlette(
        routes=[
            Route('/', page),
            Route('/models', describe),
            Route('/predict', predict, methods=['POST']),
            Route('/attention', attend, methods=['POST']),
            Mount('/static', StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={
            Refused: refuse,
            UsageError: refuse,
            DataError: refuse,
            Exception: fail,
        },
    )


def _missing(error: ModuleNotFoundError) -> str:
    return f'The page needs {error.name}, which is not installed: pip install starlette uvicorn'


def _find(models: Mapping[str, Served], request: 'Request') -> Served:
    name = request.query_params.get('model', '')
    if name not in models:
        raise Refused(404, f'There is no model {name!r}, expected one of {", ".join(models)}.')
    return models[name]


async def _receive(request: 'Request', limits: Limits) -> bytes:
    """The body of a request; reading ends where it is too long, whatever its header says."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limits.megabytes * 1e6:
            raise Refused(
                413,
                f'The file is larger than {limits.megabytes:g} MB: choose a smaller one, or start '
                f'the server with a larger --max-mb.',
            )
    return bytes(data)


def _with_file(data: bytes, limits: Limits, work: Callable[[str], dict]) -> dict[str, Any]:
    """Check an image before it is unpacked, and hand it on as a file, as the tools read it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise Refused(415, 'The file is no image that can be read: choose another.') from error
    except Image.DecompressionBombError as error:
        raise Refused(413, f'The image is too large: {error}.') from error
    if width * height > limits.megapixels * 1e6:
        raise Refused(
            413,
            f'The image has {width} x {height} pixels, expected at most {limits.megapixels:g} '
            f'million: choose a smaller one, or start the server with a larger --max-megapixels.',
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'upload')
        path.write_bytes(data)
        try:
            return work(str(path))
        except (UsageError, DataError) as error:
            raise Refused(422, str(error).replace(str(path), 'The file')) from error


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens.

    Args:
        host: An address of this computer.
        port: 0 takes one that is free.

    Raises:
        UsageError: the port is taken, or the address is not of this computer.
    """
    try:
        listener = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise UsageError(
            f'{host}:{port} cannot be used ({error}): pass another --port or --host.'
        ) from error
    with listener:
        yield listener


def run_server(app: 'Starlette', listener: socket.socket) -> None:
    """Answer requests until Ctrl-C.

    Raises:
        UsageError: uvicorn is not installed.
    """
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise UsageError(_missing(error)) from error
    uvicorn.Server(uvicorn.Config(app, log_level='warning')).run(sockets=[listener])
