"""The network's registry and router: which adapters exist, which nodes hold them, who answers.

`app.create_app(settings)` is the ASGI application, `server.run(settings)` the whole program.
"""
