"""An OpenAI-compatible server for a person or a few: `qmoe serve`, and `create_app` to mount it.

A thread owns the model and generates (`engine`); the application checks requests and speaks HTTP
(`app`, `requests`, `errors`, `edge`, `metrics`). Only `qmoe.cli` enters here, and whoever mounts
the application themselves.
"""

from qmoe.serve.app import Settings, create_app

__all__ = ["Settings", "create_app"]
