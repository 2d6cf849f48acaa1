"""Runs commands and Python of the documents one after the other, in one process and one folder.

    python -m tests.documents_run CALLS RESULTS

CALLS is a JSON list of {"words": [...]}, {"code": "..."} and {"copy": {from: to}}; RESULTS gets a
line {"error": "", "seconds": 1.2, "said": "..."} for each.
"""

import contextlib
import importlib
import io
import json
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request
from pathlib import Path

SECONDS = 300  # until a service is ready
# Without these the same token arrays are made, faster.
LEFT_OUT = ("seqio", "tensorflow", "tensorflow_datasets", "tensorflow_text")


def called(words):
    """Runs a command of ours, or a script, as if it were a program."""
    module = words[1] == "-m"
    name, arguments = (words[2], words[3:]) if module else (words[1], words[2:])
    if name == "dgr_jax.serve":
        return served(words)
    sys.argv = [name, *arguments]
    try:
        if name.startswith("dgr_jax."):
            importlib.import_module(name).command(arguments)
        elif module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"it ended with {ended.code}") from ended


def served(words):
    """A service answers when it is ready, and ends when it is told to."""
    program = [sys.executable, *words[1:], "--port=0", "--batch_size=2"]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as service:
        try:
            lines = iter(service.stderr.readline, "")
            url = next(
                word for line in lines for word in line.split() if word.startswith("http://")
            )
            asked = urllib.request.Request(
                f"{url}/search", b'{"query": "bees", "k": 2}', {"Content-Type": "application/json"}
            )
            answer = answered(asked, time.monotonic() + SECONDS)
            assert len(answer["results"][0]["hits"]) == 2
        finally:
            service.send_signal(signal.SIGTERM)
            service.communicate()


def answered(asked, until):
    """The answer of a service that may still compile."""
    while True:
        try:
            with urllib.request.urlopen(asked) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > until:
                raise
            time.sleep(0.5)


def main(calls, results):
    for call in json.loads(Path(calls).read_text(encoding="utf-8")):
        begun, said, error = time.process_time(), io.StringIO(), ""
        try:
            with contextlib.redirect_stdout(said):
                if "words" in call:
                    called(call["words"])
                elif "code" in call:
                    exec(compile(call["code"], "<documents>", "exec"), {"__name__": "documents"})
            for source, target in call.get("copy", {}).items():
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(source, target, symlinks=True)
        except BaseException:
            error = traceback.format_exc()
        result = {
            "error": error, "said": said.getvalue(), "seconds": time.process_time() - begun,
        }  # fmt: skip
        with open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    sys.modules.update(dict.fromkeys(LEFT_OUT))
    main(*sys.argv[1:])
