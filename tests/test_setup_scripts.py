"""The shell programs: the token is stored where it belongs and never shown; series are recorded; mistakes are named."""

import json
import os
import signal
import socket
import stat
import subprocess
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

PROGRAMS = Path(__file__).resolve().parents[1] / "official_content"
TOKEN = "hf_" + "a" * 34


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as the script asks: who am I, and may I read this model."""

    def do_GET(self):
        known = self.headers.get("authorization") == f"Bearer {TOKEN}"
        if self.path.startswith("/api/whoami-v2"):
            self.answer(200 if known else 401, {"name": "someone"})
        elif "gated" in self.path:
            self.answer(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        else:
            self.answer(200, {})

    def answer(self, status, body, headers=None):
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Silence."""


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def store(home: Path, token: str, *models: str, endpoint: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_TOKEN": ""}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [PROGRAMS / "configure_huggingface.sh", *models]
    return subprocess.run(command, input=token, env=environment, capture_output=True, text=True, check=False)


def test_a_good_token_is_stored_for_its_owner_alone(tmp_path, hub):
    """Mode 600, the account and each model's access are named, the token is in no output."""
    result = store(tmp_path / "home", TOKEN + "\n", "org/open", "org/gated", endpoint=hub)
    assert result.returncode == 0, result.stderr
    path = tmp_path / "home" / "token"
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == (TOKEN, 0o600)
    assert "knows it as someone" in result.stdout
    assert "org/open: can be read" in result.stdout
    assert "org/gated: gated: accept its licence" in result.stdout
    assert TOKEN not in result.stdout + result.stderr
    assert [entry.name for entry in (tmp_path / "home").iterdir() if "partial" in entry.name] == []


def test_a_refused_token_leaves_the_old_one(tmp_path, hub):
    """Exit 2; what was stored before stays."""
    (tmp_path / "token").write_text("old", encoding="utf-8")
    result = store(tmp_path, "hf_" + "b" * 34, endpoint=hub)
    assert (result.returncode, "refuses this token" in result.stderr) == (2, True)
    assert (tmp_path / "token").read_text(encoding="utf-8") == "old"


def test_without_a_network_the_token_is_stored_and_called_untested(tmp_path):
    """Exit 1 with one plain message: a closed port stands for the missing network."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        result = store(tmp_path, TOKEN, endpoint=f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert (result.returncode, "untested" in result.stderr, "Traceback" in result.stderr) == (1, True, False)
    assert (tmp_path / "token").read_text(encoding="utf-8") == TOKEN


@pytest.mark.parametrize(
    ("token", "message"), [("", "no token was given"), ("hf_short\n", "does not look like a token")]
)
def test_what_is_no_token_is_not_stored(tmp_path, token, message):
    """Exit 2 before anything is sent anywhere."""
    result = store(tmp_path, token, endpoint="http://127.0.0.1:9")
    assert (result.returncode, message in result.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []


def collect(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [PROGRAMS / "collect_metrics.sh", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_series_have_one_row_per_sample(tmp_path):
    """Two samples half a second apart: numbers in every column, a share between 0 and 100."""
    result = collect(tmp_path, "run", "0.5", "1")
    assert result.returncode == 0, result.stderr
    header, *rows = (tmp_path / "run" / "cpu_metrics.csv").read_text(encoding="utf-8").splitlines()
    assert header == "timestamp,node,utilization_cpu,load_1min,processes_running"
    assert 1 <= len(rows) <= 3
    assert all(0 <= float(row.split(",")[2]) <= 100 for row in rows)
    _, memory = (tmp_path / "run" / "memory_metrics.csv").read_text(encoding="utf-8").splitlines()[:2]
    used, total = (int(value) for value in memory.split(",")[2:4])
    assert 0 < used < total
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_an_earlier_recording_is_not_overwritten(tmp_path):
    """Exit 2 and the file as it was."""
    (tmp_path / "cpu_metrics.csv").write_text("mine", encoding="utf-8")
    result = collect(tmp_path, ".", "1", "1")
    assert (result.returncode, "is not overwritten" in result.stderr) == (2, True)
    assert (tmp_path / "cpu_metrics.csv").read_text(encoding="utf-8") == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_signal_ends_a_recording_well(tmp_path):
    """SIGTERM during a recording without end: exit 0 and whole rows."""
    process = subprocess.Popen(
        [PROGRAMS / "collect_metrics.sh", tmp_path, "0.2", "0"], stdout=subprocess.PIPE, text=True
    )
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=5)
    assert (process.returncode, "samples of cpu memory network" in out) == (0, True)
    assert (tmp_path / "cpu_metrics.csv").read_text(encoding="utf-8").endswith("\n")


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("collect_metrics.sh", ["x", "0"], "INTERVAL 0"),
        ("collect_metrics.sh", ["x", "1", "long"], "DURATION long"),
        ("mlflow_ui.sh", ["0"], "port 0"),
        ("mlflow_ui.sh", ["70000"], "port 70000"),
        ("mlflow_ui.sh", ["web"], "port web"),
    ],
)
def test_bad_arguments_are_named(tmp_path, program, arguments, message):
    """Exit 2, nothing written."""
    result = subprocess.run([PROGRAMS / program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, message in result.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program", ["collect_metrics.sh", "mlflow_ui.sh", "configure_huggingface.sh"])
def test_help_shows_the_command(program):
    """The first lines of the script, without their comment marks."""
    result = subprocess.run([PROGRAMS / program, "--help"], capture_output=True, text=True, check=True)
    assert f"./official_content/{program}" in result.stdout


def test_a_port_in_use_is_named():
    """Exit 2 with another port to try."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = subprocess.run([PROGRAMS / "mlflow_ui.sh", port], capture_output=True, text=True, check=False)
    assert (result.returncode, "is in use" in result.stderr) == (2, True)


@pytest.mark.slow
def test_the_mlflow_ui_answers_on_this_machine_only(tmp_path):
    """It answers on 127.0.0.1, listens on no other address and prints the page of the training runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "DISPLAY": ""}
    command = [PROGRAMS / "mlflow_ui.sh", str(port)]
    printed = (tmp_path / "printed").open("w")
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=printed, stderr=subprocess.DEVNULL
    )
    try:
        assert answer(f"http://127.0.0.1:{port}/health", seconds=120) == "OK"
        listening = Path("/proc/net/tcp").read_text(encoding="utf-8")
        assert f"00000000:{port:04X}" not in listening
        assert f"0100007F:{port:04X}" in listening
        end = time.monotonic() + 60
        while "Training runs" not in (tmp_path / "printed").read_text() and time.monotonic() < end:
            time.sleep(0.2)
        page = f"Training runs: http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning"
        assert page in (tmp_path / "printed").read_text()
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def answer(address: str, *, seconds: float) -> str:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5) as response:
                return response.read().decode()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
