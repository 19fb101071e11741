"""A JupyterLab server for one session of tests: started as `make lab` starts it, in folders that are its own.

    with LabServer(folder) as server:
        server.url, server.token

Nothing of the user's is read or changed: settings, workspaces, IPython's profile and copies of the notebooks lie in
`folder`. The kernel is that of the Python that runs the tests. Stored rows are the checkout's, or those of NBKIT_RUNS.
"""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from nbkit import paths

START_SECONDS = 120
STOP_SECONDS = 30
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    # All cells are laid out, also those far below: what is too wide or has no image is then seen without scrolling.
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}


def command_of_make_lab() -> list[str]:
    """What `make lab` starts, with the Python of the tests."""
    made = ["make", "--no-print-directory", "-n", "lab", f"RUN={sys.executable}"]
    printed = subprocess.run(made, cwd=paths.ROOT, check=True, capture_output=True, text=True).stdout
    [line] = [line for line in printed.splitlines() if " -m jupyterlab" in line]
    return shlex.split(line)


class LabServer:
    """A server on loopback; `url` ends without a slash. It ends with the `with`, and if the tests are killed."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.notebooks = self.folder / "notebooks"
        self.figures = self.folder / "figures"
        self._log = self.folder / "server.log"

    def __enter__(self):
        without_checkpoints = shutil.ignore_patterns(".ipynb_checkpoints")
        shutil.copytree(paths.ROOT / "notebooks", self.notebooks, ignore=without_checkpoints)
        for plugin, values in SETTINGS.items():
            self.set(plugin, values)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]  # where another takes it meanwhile, the server tries others
        options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.allow_root=True"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command_of_make_lab(), *options], cwd=self.folder, env=self._environment(),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        # Its input ends with this process, also when that is killed; kernels end with their server.
        self._watch = subprocess.Popen(
            ["sh", "-c", 'read -r _; kill "$1"', "sh", str(self._process.pid)],
            stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind, error, traceback):
        self.stop()

    def set(self, plugin: str, values: dict) -> None:
        """Stores settings of a plugin ("package:plugin"); pages that are opened afterwards have them."""
        package, name = plugin.split(":")
        path = self.folder / "settings" / package / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")

    def ask(self, path: str, method: str = "GET"):
        """The server's answer at a path of its REST interface, None where it is empty."""
        request = urllib.request.Request(
            f"{self.url}/api/{path}", method=method, headers={"Authorization": f"token {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=STOP_SECONDS) as answer:
            return json.loads(answer.read() or "null")

    def end_kernels(self) -> None:
        for kernel in self.ask("kernels"):
            self.ask(f"kernels/{kernel['id']}", "DELETE")

    def stop(self) -> None:
        """Ends the server and, through it, its kernels."""
        self._watch.kill()
        self._watch.communicate()
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _environment(self) -> dict[str, str]:
        # a backend named outside would take the place of the one that shows figures in a notebook
        users = {name: value for name, value in os.environ.items()
                 if not name.startswith(("JUPYTER", "JPY_", "IPYTHON")) and name != "MPLBACKEND"}  # fmt: skip
        return users | {
            "JUPYTER_CONFIG_DIR": str(self.folder / "config"),
            "JUPYTER_DATA_DIR": str(self.folder / "data"),
            "JUPYTER_RUNTIME_DIR": str(self.folder / "runtime"),
            "JUPYTERLAB_SETTINGS_DIR": str(self.folder / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(self.folder / "workspaces"),
            "IPYTHONDIR": str(self.folder / "ipython"),
            "NBKIT_RUNS": str(paths.RUNS.resolve()),
            "NBKIT_FIGURES": str(self.figures),
        }

    def _wait_until_it_answers(self) -> None:
        """Reads port and token from the file that the server writes about itself, and waits for its first answer."""
        until = time.monotonic() + START_SECONDS
        about = self.folder / "runtime" / f"jpserver-{self._process.pid}.json"
        while time.monotonic() < until and self._process.poll() is None:
            try:
                known = json.loads(about.read_text(encoding="utf-8"))
                self.url, self.token = known["url"].rstrip("/"), known["token"]
                self.ask("status")
                return
            except (OSError, ValueError):  # not yet written, half written, not yet listening
                time.sleep(0.1)
        log = self._log.read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"JupyterLab did not answer within {START_SECONDS} s; it said:\n{log[-3000:]}")
