"""The API's description as a page: Swagger UI from files that are installed with this package, so it works offline."""

from importlib import resources

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse, Response

from serve.errors import ApiError

_FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}


def docs_routes() -> APIRouter:
    """Return the page at ``/docs`` and the files that it loads. They need no key: the page asks for one."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/docs")
    def page() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title="hrs",
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="data:,",
            swagger_ui_parameters={"validatorUrl": None, "persistAuthorization": False},
        )

    @routes.get("/docs/{name}")
    def file(name: str) -> Response:
        if name not in _FILES:
            raise ApiError(404, "there is no such file")
        content = (resources.files("swagger_ui") / "static" / name).read_bytes()
        headers = {"Cache-Control": "max-age=3600"}
        return Response(content, media_type=_FILES[name], headers=headers)

    return routes
