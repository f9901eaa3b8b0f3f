"""The service's paths, and one shape for whatever goes wrong: {"error": "one line"}."""

# Without `from __future__ import annotations`: FastAPI reads the annotations of the functions below, and
# could not find what they name if they were text.

from typing import Annotated, Any

from fastmrcnn.service.answer import Answer, Error, Health, Options
from fastmrcnn.service.handler import Service
from fastmrcnn.service.help_page import help_page
from fastmrcnn.service.limits import CLIENT_GONE, RefusedError
from fastmrcnn.service.polite import Polite
from fastmrcnn.service.upload import FIELD, FORM, ClientGoneError, shown

PREDICT = "/predict"
COUNTED = {PREDICT, "/health", "/metrics", "/docs", "/openapi.json"}
WHY = {
    400: "There is no image in the body, or it is damaged, or a form has other fields.",
    404: "No such path.",
    405: "No such method there.",
    408: "The body did not come in time.",
    413: "The body or the image is larger than what is taken.",
    415: "The body is no image that can be read.",
    422: "The query has a mistake.",
    500: "The model failed on this image.",
    503: "Not now: the model is being warmed up, all places are taken, or the service is stopping.",
    504: "The answer took too long.",
}
_BYTES = {"schema": {"type": "string", "format": "binary"}}
_BODY = {
    "required": True,
    "content": {
        "image/*": _BYTES,
        "application/octet-stream": _BYTES,
        FORM: {
            "schema": {
                "type": "object",
                "properties": {FIELD: {"type": "string", "format": "binary"}},
                "required": [FIELD],
                "additionalProperties": False,
            }
        },
    },
}


def make_app(service: Service) -> Any:
    """The ASGI application of a service."""
    from fastapi import FastAPI, Query, Request, Response
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    app = FastAPI(
        title="fastmrcnn",
        version="1",
        description="Finds objects in images: an image in, COCO JSON out.",
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )

    @app.post(
        PREDICT,
        summary="Find the objects in an image",
        responses={200: {"model": Answer}, **_errors(400, 408, 413, 415, 422, 500, 503, 504)},
        response_class=Response,
        openapi_extra={"requestBody": _BODY},
    )
    async def predict(request: Request, options: Annotated[Options, Query()]) -> Response:
        body = await service.predict(request.headers, request.receive, options)
        return Response(body, media_type="application/json")

    @app.get(
        "/health", summary="Whether images are taken", responses={200: {"model": Health}, **_errors(503)}
    )
    async def health() -> Response:
        if trouble := service.trouble():
            raise RefusedError(503, trouble)
        return _json(200, Health(status="ready", classes=service.detector.class_names).model_dump())

    @app.get(
        "/metrics",
        summary="Counts for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        text, kind = service.counts.text()
        return Response(text, media_type=kind)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(help_page(app.openapi(), service.limits), media_type="text/html; charset=utf-8")

    @app.exception_handler(RefusedError)
    async def refused(request: Request, refusal: RefusedError) -> Response:
        return _error(refusal.status, str(refusal), refusal.headers)

    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: ClientGoneError) -> Response:
        return _error(CLIENT_GONE, "the client hung up")

    @app.exception_handler(RequestValidationError)
    async def mistaken(request: Request, error: RequestValidationError) -> Response:
        return _error(422, _mistake(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        where = f"{request.method[:20]} {shown(request.url.path)}"
        told = {404: "there is no such path", 405: "there is no such method here"}
        line = told.get(error.status_code, "this cannot be done")
        return _error(error.status_code, f"{where}: {line}; see /docs", dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _error(500, "the service failed on this request")

    return Polite(app, service.counts, timed=PREDICT, known=COUNTED)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Error, "description": WHY[status]} for status in statuses}


def _json(status: int, content: Any, headers: dict[str, str] | None = None) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(content, status, headers)


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Any:
    return _json(status, {"error": message}, headers)


def _mistake(error: Any) -> str:
    """One line on a query that pydantic refused."""
    name = shown(str(error["loc"][-1]))
    if error["type"] == "extra_forbidden":
        return f"query {name}: unknown; {', '.join(Options.model_fields)} are known"
    return f"query {name}: {error['msg'][:1].lower()}{error['msg'][1:]}, got {shown(str(error['input']))}"
