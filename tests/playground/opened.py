"""The playground as a user starts it, and models to open it on."""

import http.client
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from urllib.parse import urlencode

import numpy as np
from PIL import Image

from megadit.pipeline import ECDiTPipeline
from tests.commands import run_python
from tests.ranks import heed_interrupts

TOOL = "tools/playground.py"
PORTS = ("--port", "0")


@contextmanager
def opened(folder, *flags):
    """(host, port) of a playground of its own process, which ends well when it is interrupted."""
    command = [sys.executable, TOOL, str(folder), *PORTS, *flags]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        preexec_fn=heed_interrupts,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("the playground is at http://127.0.0.1:"), line
        yield "127.0.0.1", int(line.split("/ ")[0].rsplit(":")[-1])
        process.send_signal(signal.SIGINT)
        assert (process.stdout.read(), process.wait(120)) == ("the playground has ended\n", 0)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def refusal(*argv):
    """What the tool says that cannot be opened."""
    done = run_python(TOOL, *argv)
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


def ask(place, method, path, body=None, **headers):
    """(status, headers, content) of one request; a body that is no bytes is posted as JSON."""
    connection = http.client.HTTPConnection(*place, timeout=120)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None and not isinstance(body, bytes):
        body, given = json.dumps(body).encode(), {"Content-Type": "application/json"} | given
    try:
        connection.request(method, path, body, given)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def draw(place, **wish):
    """What is drawn; it must be."""
    status, _, content = ask(place, "POST", "/draw", wish)
    assert status == 200, content
    return json.loads(content)


def error(place, method, path, body=None, **headers):
    """(status, message) of a request that is refused."""
    status, told, content = ask(place, method, path, body, **headers)
    assert told["Content-Type"] == "application/json"
    return status, json.loads(content)["error"]


def overlay(place, **query):
    status, headers, content = ask(place, "GET", f"/overlay?{urlencode(query)}")
    assert (status, headers["Content-Type"]) == (200, "image/png"), content
    return pixels(content)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def pipeline_of(run):
    pipe = ECDiTPipeline.from_run(run)
    pipe.set_progress_bar_config(disable=True)
    return pipe
