"""``qmoe serve``: an OpenAI-compatible server of one model."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from qmoe.checkpoints.hub import check_place
from qmoe.cli.generate import Loading, Paging
from qmoe.cli.output import Debug, grouped, quiet
from qmoe.cli.ranks import rank_of_torchrun
from qmoe.exits import interruptible
from qmoe.paging.options import PagingOptions

LOCAL = ("127.0.0.1", "::1", "localhost")
# Streams are told that the server is ending, and have so long to say it to their clients.
SECONDS_TO_LEAVE = 5


def _printable_key(key: str | None) -> str | None:
    if key is not None and not (key and key.isascii() and key.isprintable()):
        raise typer.BadParameter("a key is one or more ASCII characters")
    return key


@dataclass(frozen=True)
class Serving:
    """Where and how requests are served."""

    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000
    api_key: Annotated[
        str | None,
        typer.Option(
            callback=_printable_key,
            envvar="QMOE_API_KEY",
            help="Key that requests must have.",
            show_envvar=True,
        ),
    ] = None
    name: Annotated[
        str | None,
        typer.Option(help="What requests call the model.", show_default="the folder's name"),
    ] = None
    max_queue: Annotated[
        int, typer.Option(min=1, help="Texts that may wait; more are answered with 429.")
    ] = 64
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Of a chat's answer, where a request says nothing.")
    ] = 2048


@dataclass(frozen=True)
class Room(Paging):
    """How much runs at a time."""

    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Texts at a time.", show_default="8; with a budget, 1 that it holds"
        ),
    ] = None

    def options(self, num_texts: int = 1) -> PagingOptions | None:
        """As the runtime takes them; None where nothing is paged."""
        if (self.hbm_budget, self.context, self.misses, self.host_memory) == (None,) * 4:
            return None
        return super().options(num_texts)


@grouped
def serve(
    path: Annotated[str, typer.Argument(help="A model's folder or Hub id.", metavar="PATH")],
    serving: Serving,
    room: Room,
    loading: Loading,
    debug: Debug = False,
) -> None:
    """Serve a model to OpenAI clients: chat, completions, streaming, metrics."""
    if rank_of_torchrun() is not None:
        raise typer.BadParameter("qmoe serve runs in one process; start it without torchrun")
    paged = room.options()
    check_place(path)
    _check_installed()
    with interruptible(), _bound(serving.host, serving.port) as listener:
        if serving.host not in LOCAL and serving.api_key is None:
            print(
                f"warning: whoever reaches {serving.host} may use the model; --api-key keeps "
                "others out",
                file=sys.stderr,
            )
        import qmoe
        from qmoe.generation import load_tokenizer
        from qmoe.serve import Settings, create_app
        from qmoe.tools.threads import threads_for

        quiet()
        tokenizer = load_tokenizer(path)
        model = qmoe.load(path, **asdict(loading), **({} if paged is None else asdict(paged)))
        settings = Settings(
            name=serving.name or os.path.basename(os.path.abspath(path)) or path,
            api_key=serving.api_key,
            batch_size=room.batch_size or (8 if paged is None else 1),
            max_queue=serving.max_queue,
            max_tokens=serving.max_tokens,
        )
        on_cpu = model.device.type == "cpu"
        with threads_for(model.get_memory_footprint()) if on_cpu else nullcontext():
            # The first call compiles kernels: a person should not wait for it.
            qmoe.generate(model, tokenizer, [[0, 0]], max_new_tokens=4, do_sample=False)
            _run(create_app(model, tokenizer, settings), listener, settings.name)


def _check_installed() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f'qmoe serve needs {error.name}: pip install "qmoe[serve]", or ".[serve]" in a clone'
        ) from None


def _bound(host: str, port: int) -> socket.socket:
    """A socket that holds the port, before minutes go into loading; who connects then waits."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()  # before that, Linux lets another server have the port too
        except BaseException:
            listener.close()
            raise
        return listener
    except OSError as error:
        raise ValueError(
            f"{host}:{port}: cannot listen there ({error.strerror or error}); choose another "
            "--port or --host"
        ) from None


def _run(app: Any, listener: socket.socket, name: str) -> None:
    """Serve until a signal ends it; Ctrl-C then goes on as one."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            host, port = listener.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(f"{name} is served at http://{host}:{port}/v1", file=sys.stderr, flush=True)

        def handle_exit(self, sig: int, frame: Any) -> None:
            app.state.engine.stop()
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        app, log_level="critical", timeout_graceful_shutdown=SECONDS_TO_LEAVE, access_log=False
    )
    Server(config).run(sockets=[listener])
