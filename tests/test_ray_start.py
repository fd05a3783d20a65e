"""A Ray cluster that cannot be used ends a run at once, with an error of one line."""

import socket

import pytest
from small_runs import small_recipe, write_photos

from camkit.bulk import RayEngine, run
from camkit.cli import main
from camkit.errors import CamkitError


@pytest.fixture
def ray():
    pytest.importorskip("ray.data")
    import ray

    if ray.is_initialized():
        pytest.skip("this process is connected to a cluster")
    return ray


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_an_address_at_which_nothing_answers_is_an_error(ray, tmp_path):
    photos, address = write_photos(tmp_path / "in", 2), f"127.0.0.1:{free_port()}"
    reported = rf"no Ray cluster answers at {address} \(.*Connection refused\); start one with `ray"
    with pytest.raises(CamkitError, match=reported) as raised:
        run(small_recipe(), photos, tmp_path / "out", ray=RayEngine(address))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:99999", "no-such-host.invalid:6379"])
def test_an_address_that_is_none_is_an_error(ray, tmp_path, monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    photos = write_photos(tmp_path / "in", 2)
    with pytest.raises(CamkitError, match=rf"no Ray cluster answers at {address} \(") as raised:
        run(small_recipe(), photos, tmp_path / "out", ray=RayEngine())
    assert "\n" not in str(raised.value)


def test_ray_that_cannot_start_here_is_an_error(ray, tmp_path, monkeypatch, capsys):
    write_photos(tmp_path / "in", 2)
    (tmp_path / "file").touch()

    def cannot_start(*_, **__):
        raise Exception("The current node timed out during startup.\nSee the logs.")  # noqa: TRY002 - as Ray does

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", cannot_start)
    command = ["run", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--model", "demo"]
    assert main([*command, "--size", "96", "--engine", "ray"]) == 1
    error = capsys.readouterr().err.splitlines()
    assert error == [
        "camkit: Ray does not start on this machine (The current node timed out during startup. "
        "See the logs.); fix the cause, or use the local engine (--engine local)"
    ]
