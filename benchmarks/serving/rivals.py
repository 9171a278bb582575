"""LiteLLM's proxy and llama-cpp-python's server as processes, each in a virtual environment of its own."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from edgeft.home import cache_dir
from serving.stage import Server, environment, free_port, process, wait_until

LITELLM = "litellm[proxy]==1.105.0"
# What llama-cpp-python[server] asks for; the built package itself is linked from this interpreter, since building it takes ten minutes.
LLAMA_SERVER = (
    "uvicorn", "fastapi", "pydantic-settings", "sse-starlette", "starlette-context", "PyYAML",
    "numpy", "jinja2", "diskcache", "typing_extensions",
)  # fmt: skip


def venv(name: str, *packages: str) -> Path:
    """The interpreter of a virtual environment with these packages; made at the first call, in the user's cache."""
    place = cache_dir("bench-venvs", name)
    python, whole = place / "bin" / "python", place / ".whole"
    if not whole.exists():
        print(f"progress: making {place}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        whole.touch()
    return python


def litellm_python() -> Path:
    """LiteLLM's own interpreter."""
    return venv("litellm-1.105.0", LITELLM)


def llama_python() -> Path:
    """An interpreter that has llama_cpp.server: this one's llama_cpp, and the server's packages."""
    python = venv("llama-cpp-server", *LLAMA_SERVER)
    spec = find_spec("llama_cpp")
    if not spec or not spec.origin:
        sys.exit("llama-cpp-python is not installed here: pip install 'edgeft[compress]', or --llama-python")
    built = Path(spec.origin).parent
    site = next((python.parent.parent / "lib").glob("python*/site-packages"))
    if not (site / "llama_cpp").exists():
        (site / "llama_cpp").symlink_to(built)
    return python


@contextmanager
def litellm(upstream: str, python: Path, scratch: Path) -> Iterator[Server]:
    """LiteLLM's proxy, one worker, no database, in front of an OpenAI-shaped upstream."""
    key, port, log = f"sk-{secrets.token_urlsafe(40)}", free_port(), scratch / "litellm.log"
    config = scratch / "litellm.yaml"
    model = {"model": "openai/stand-in", "api_base": f"{upstream}/v1", "api_key": "none"}
    settings = {
        "model_list": [{"model_name": "stand-in", "litellm_params": model}],
        "general_settings": {"master_key": key},
        "litellm_settings": {"telemetry": False},
    }
    config.write_text(json.dumps(settings))  # JSON is YAML
    command = [str(python.parent / "litellm"), "--config", str(config), "--host", "127.0.0.1"]
    own = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "PYTHONPATH": ""}
    with process([*command, "--port", str(port), "--num_workers", "1"], log, environment(**own)) as child:
        drain(child, log)
        wait_until(f"http://127.0.0.1:{port}/health/liveliness", log, child)
        yield Server(f"http://127.0.0.1:{port}", key, pid=child.pid)


@contextmanager
def llama_cpp_server(gguf: Path, python: Path, threads: int, context: int, scratch: Path) -> Iterator[Server]:
    """`python -m llama_cpp.server`, as it comes: one request at a time behind a lock."""
    port, log = free_port(), scratch / "llama_cpp_server.log"
    command = [str(python), "-m", "llama_cpp.server", "--model", str(gguf), "--host", "127.0.0.1"]
    own = [
        "--port",
        str(port),
        "--n_threads",
        str(threads),
        "--n_ctx",
        str(context),
        "--interrupt_requests",
        "False",
    ]
    with process([*command, *own], log, environment(PYTHONPATH="")) as child:
        drain(child, log)
        wait_until(f"http://127.0.0.1:{port}/v1/models", log, child)
        yield Server(f"http://127.0.0.1:{port}", model=str(gguf), pid=child.pid)


def drain(child: subprocess.Popen[str], log: Path) -> None:
    """Keep a child's standard output from filling its pipe."""
    import threading

    def copy() -> None:
        assert child.stdout
        for line in child.stdout:
            with log.open("a") as out:
                out.write(line)

    threading.Thread(target=copy, daemon=True).start()
