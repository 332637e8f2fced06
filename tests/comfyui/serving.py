"""A real ComfyUI server as a child process, and the little of its HTTP API that tests need."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 600  # seconds for the start, and for one prompt


class Refused(Exception):
    """The server's answer to a prompt that does not validate."""


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen
    url: str
    log: Path
    base: Path

    @classmethod
    def start(cls, comfyui: Path, base: Path) -> "Server":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = base / "server.log"
        command = [
            sys.executable,
            str(comfyui / "main.py"),
            "--cpu",
            "--base-directory",
            str(base),
            "--port",
            str(port),
            "--disable-auto-launch",
            "--disable-metadata",
            "--database-url",
            f"sqlite:///{base / 'comfyui.db'}",
        ]
        process = subprocess.Popen(command, cwd=base, stdout=log.open("w"), stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        server = cls(process, f"http://127.0.0.1:{port}", log, base)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                server.get("/system_stats")
                return server
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        server.stop()
        raise TimeoutError(log.read_text()[-3000:])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.loads(answer.read())

    def text(self, path: str) -> str:
        return self.bytes(path).decode()

    def bytes(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + urllib.parse.quote(path), timeout=30) as answer:
            return answer.read()

    def post(self, path: str, values: dict) -> dict:
        request = urllib.request.Request(self.url + path, json.dumps(values).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read() or "{}")
        except urllib.error.HTTPError as error:
            raise Refused(error.read().decode()) from None

    def queue(self, prompt: dict) -> str:
        return self.post("/prompt", {"prompt": prompt})["prompt_id"]

    def wait(self, prompt_id: str) -> dict:
        """The prompt's entry in the history: `status` and `outputs`."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                return entry
            time.sleep(0.05)
        raise TimeoutError(self.log.read_text()[-3000:])

    def run(self, prompt: dict) -> dict:
        return self.wait(self.queue(prompt))
