"""What stands between the network and the application: a bound on bodies, a count of answers."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from qmoe.serve.errors import refusal_of
from qmoe.serve.metrics import Metrics

MAX_BODY_BYTES = 4 << 20


class Edge:
    """ASGI middleware."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on; answer 413 to a body of more than `MAX_BODY_BYTES`."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        read, begun = 0, False

        async def bounded() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY_BYTES:
                raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
            return message

        async def counted(message: Any) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                # The route, not the path: strangers could make up any number of paths.
                path = getattr(scope.get("route"), "path", "other")
                self.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        try:
            await self.app(scope, bounded, counted)
        except Exception as error:  # a fault of ours: the server goes on
            if begun:
                raise
            refused = refusal_of(error)
            await JSONResponse(refused.body(), refused.status)(scope, receive, counted)
