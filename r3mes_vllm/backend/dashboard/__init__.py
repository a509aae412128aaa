"""The dashboard at `/`: what the network looks like from this router, and a place to try it.

    traffic.py  counts what the router answers, in a ring of the last minutes
    health.py   how each node is doing, and why it gets no requests, in a sentence
    history.py  what adapters' names have stood for
    view.py     nodes, adapters and models as text, ready to be shown
    page.py     that text in HTML, every word of it escaped
    routes.py   the page, its data and its files
    static/     the style and the script, without a build step

The page is whole without the script, which then keeps it up to date from `/dashboard/data`.
"""

from fastapi import FastAPI

from r3mes_vllm.backend.dashboard import routes
from r3mes_vllm.backend.dashboard.traffic import Counted, Traffic
from r3mes_vllm.backend.dashboard.view import Latest


def install(app: FastAPI) -> None:
    """Put the dashboard into `app`, whose `state.backend` is there when it serves."""
    traffic = Traffic()
    app.state.traffic = traffic
    app.state.latest = Latest(traffic)
    app.add_middleware(Counted, traffic=traffic)
    app.include_router(routes.router)
