"""The page of `camkit app` as a space of Hugging Face: upload this folder as one.

It serves the small model that ships with camkit. For a model of your own, replace `model`; names of
its classes come from the model, or from ``vocabulary=`` of `camkit.wrap`.
"""

import os

import camkit
from camkit.app import build, launch

model = camkit.data.demo_model()
page = build(camkit.wrap(model))

if __name__ == "__main__":
    # a space is reached from outside of its machine
    launch(page, server_name=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"))
