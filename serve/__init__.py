"""Trained models behind HTTP, in the shapes OpenAI's clients know, as a Ray Serve application.

hrs serve model.hrs                          on this machine, until Ctrl-C
serve deploy serve/config.yaml               on a running cluster

``serve.api.make_api`` needs no Ray: the same application runs in any ASGI server over a backend.
"""
