"""Scripts run as in a new process of Python, without the seconds that each would take to start.

A parent imports what is slow and belongs to others, such as torch, but not camkit, and computes
nothing. Each script runs in a fork of it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ON_FIRST_USE = ("bench", "bulk", "compat", "contrib", "data", "losses", "score")
SECONDS = 120
PARENT = """
import importlib, json, os, runpy, signal, sys, traceback, warnings
import cv2, jaxtyping, numpy, PIL.Image, timm, torch
try:
    import open_clip
except ImportError:
    pass

def run(job):
    os.chdir(job["folder"])
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "the map of .* is flat")  # of untrained models
    warnings.filterwarnings("ignore", ".* deprecated - use", DeprecationWarning)  # matplotlib 3.8
    given = {}
    if job["given"]:
        module, function, *arguments = job["given"]
        given = getattr(importlib.import_module(module), function)(*arguments)
    runpy.run_path(job["script"], init_globals=given, run_name="__main__")

for line in sys.stdin:
    job = json.loads(line)
    already = [name for name in sys.modules if name.partition(".")[0] == "camkit"]
    child = os.fork()
    if not child:
        signal.alarm(job["seconds"])
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        failed = 1
        try:
            assert not already
            run(job)
            failed = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(failed)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""


class FreshProcesses:
    """Runs scripts, each in a fork of a process that has not imported camkit."""

    def __enter__(self):
        if not hasattr(os, "fork"):
            pytest.skip("needs os.fork")
        paths = (str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", ""))
        self._parent = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PARENT],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_):
        with self._parent:
            self._parent.stdin.close()

    def run(self, code, folder, *, given=()):
        """Run code in a folder and return what it printed; `AssertionError` if it fails.

        Args:
            given: module, function and arguments; what the function returns becomes the globals.
        """
        script, log = folder / "script.py", folder / "log.txt"
        script.write_text(code, "utf-8")
        names = {"script": str(script), "log": str(log), "folder": str(folder)}
        job = {**names, "given": given, "seconds": SECONDS}
        self._parent.stdin.write(json.dumps(job) + "\n")
        self._parent.stdin.flush()
        code = int(self._parent.stdout.readline())
        printed = log.read_text("utf-8", errors="replace")
        assert code == 0, f"exit status {code}\n{printed}"
        return printed
