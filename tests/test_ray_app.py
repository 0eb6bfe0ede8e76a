"""The Ray Serve application: its arguments, the files that document it, and (make check) a local Ray that serves a policy."""

import os
import shlex
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from serve.client import RemotePolicy
from serve.server import ServeConfig
from tests.tiny_policy import observations, write_policy
from vla.cli import parse_config

pytest.importorskip("ray.serve")

from serve.ray_app import RayConfig, build

DEPLOY = Path(__file__).resolve().parents[1] / "docs" / "deploy"


def test_arguments_are_converted_and_unknown_ones_named():
    config = RayConfig.parse({"policy_path": "p", "num_cpus": "2", "max_batch": "8"})
    assert (config.num_cpus, config.max_batch) == (2.0, 8)
    with pytest.raises(ValueError, match="no argument 'max_bach'"):
        RayConfig.parse({"max_bach": "8"})
    with pytest.raises(ValueError, match="Nothing to serve"):
        build({})


def test_the_documented_files_use_settings_that_exist():
    ray = yaml.safe_load((DEPLOY / "ray_serve.yaml").read_text())
    (application,) = ray["applications"]
    assert application["import_path"] == "serve.ray_app:build" and RayConfig.parse(application["args"]).policy_path
    (line,) = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line.startswith("ENTRYPOINT")]
    program, verb, *arguments = yaml.safe_load(line.removeprefix("ENTRYPOINT "))
    (container,) = yaml.safe_load((DEPLOY / "inference_service.yaml").read_text())["spec"]["predictor"]["containers"]
    config = parse_config(ServeConfig, [*arguments, *container["args"]], verb="serve")
    assert (program, verb) == ("vla", "serve") and config.host == "0.0.0.0" and config.policy.path == "/mnt/models"
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": config.port}


def test_the_documented_commands_use_settings_that_exist():
    text = (DEPLOY.parent / "serving.md").read_text()
    commands = [shlex.split(line.split("#")[0]) for line in text.splitlines() if line.startswith("vla serve ")]
    assert len(commands) >= 2
    for _, _, *arguments in commands:
        parse_config(ServeConfig, [argument.replace("...", "x") for argument in arguments], verb="serve")


@pytest.mark.check
def test_a_local_ray_serves_what_the_policy_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """About half a minute on a quiet machine: a cluster, a controller, a proxy and two replicas are processes each."""
    pytest.importorskip("serve.engine")
    import openai
    import ray
    from ray import serve as ray_serve

    from serve.request import Request
    from tests import chat_engine
    from vla.policy import load_policy

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(DEPLOY.parents[1]), os.environ.get("PYTHONPATH", "")]))
    folder = write_policy(tmp_path / "policy")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    expected = load_policy(folder).act(observations(5), seeds=list(range(5)))
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
    try:
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        arguments = {"policy_path": str(folder), "num_cpus": "0.5", "max_replicas": "1"}
        ray_serve.run(build(arguments | {"vlm_factory": "tests.chat_engine:build"}))
        for scheme in ("http", "ws"):
            with RemotePolicy(f"{scheme}://127.0.0.1:{port}", timeout_s=120) as remote:
                for chunk, want in zip(remote.act(observations(5), seeds=list(range(5))), expected, strict=True):
                    np.testing.assert_allclose(chunk.actions, want.actions, atol=1e-5)
                with pytest.raises(ValueError, match="max_length"):
                    remote.act([replace(observations(1)[0], instruction="go " * 30)])
        (answer,) = chat_engine.build().run([Request("how many bowls?", max_tokens=24)])
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none is needed", timeout=60) as client:
            asked = {"model": "vlm", "messages": [{"role": "user", "content": "how many bowls?"}], "max_tokens": 24}
            assert client.chat.completions.create(**asked).choices[0].message.content == answer.text
            pieces = [piece.choices[0].delta.content or "" for piece in client.chat.completions.create(**asked, stream=True)]
            assert "".join(pieces) == answer.text
    finally:
        ray_serve.shutdown()
        ray.shutdown()
