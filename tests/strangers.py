"""Somebody without the token tries to use a Ray: every listening socket of a process tree is found and asked."""

import ipaddress
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import grpc
import httpx
import psutil

_METHODS = {
    "gcs_server": "ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "raylet": "ray.rpc.NodeManagerService/RequestWorkerLease",
    "object manager": "ray.rpc.ObjectManagerService/Push",
    "worker": "ray.rpc.CoreWorkerService/PushTask",
    "agent": "ray.rpc.LogService/ListLogs",
    "replica": "ray.serve.ASGIService/HandleRequest",
    "client server": "ray.rpc.RayletDriver/ClusterInfo",
}
"""A gRPC method of each kind of server that Ray starts."""
_PATHS = ("/api/job_agent/jobs/", "/api/jobs/", "/get_or_create_runtime_env")
"""Where a job agent, a dashboard and a runtime environment agent take what is to be run."""
_REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE)
_JOIN = """
import sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR")
print("joined")
"""


def listeners(root: psutil.Process) -> list[tuple[psutil.Process, str, int]]:
    """Processes below ``root`` (with itself), and the addresses and TCP ports on which they listen."""
    found = []
    for process in (root, *root.children(recursive=True)):
        try:
            connections = process.net_connections(kind="tcp")
        except psutil.NoSuchProcess:
            continue
        found += [(process, c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN]
    return found


def is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_loopback


def require_closed(root: psutil.Process, mark: Path, own_ports: Collection[int] = ()) -> set[str]:
    """Assert that nobody can use the servers of the Ray below ``root`` without its token.

    Args:
        mark: a file that does not exist, and exists as soon as some server runs what it is asked to run.
        own_ports: ports that are not asked, because they belong to the endpoint.

    Returns:
        The kinds of servers that refused, so that a caller can require those it expects.
    """
    refused = set()
    token = root.environ().get("RAY_AUTH_TOKEN")
    for process in root.children(recursive=True):
        token = token or process.environ().get("RAY_AUTH_TOKEN")
    assert token, "no process has a token"
    for process in (root, *root.children(recursive=True)):
        assert not any(token in word for word in process.cmdline()), f"{process.name()} shows the token"
    found = listeners(root)
    for process, address, port in found:
        if port in own_ports:
            continue
        # A replica's server for other deployments listens everywhere: Ray has no setting for it.
        assert is_loopback(address) or "Replica" in process.name(), f"{process.name()} listens on {address}:{port}"
        if _http_refuses(port, mark):
            refused.add("http")
        refused |= _grpc_refuses(process, port)
    assert not mark.exists(), "a stranger's job was run"
    return refused


def _http_refuses(port: int, mark: Path) -> bool:
    """True if a server answered that a token is missing, False if it takes no jobs or speaks no HTTP."""
    headers = {"Content-Type": "application/json"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=10, trust_env=False) as client:
        try:
            answers = [client.post(path, json={"entrypoint": f"touch {mark}"}) for path in _PATHS]
        except httpx.ProtocolError:
            return False
    statuses = {answer.status_code for answer in answers}
    assert statuses <= {401, 403, 405}, f"port {port} answers {statuses}"
    return 401 in statuses


def _grpc_refuses(process: psutil.Process, port: int) -> set[str]:
    refused = set()
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        for kind, method in _METHODS.items():
            for credentials in ((), (("authorization", f"Bearer {'0' * 64}"),)):
                try:
                    channel.unary_unary(f"/{method}")(b"", timeout=10, metadata=credentials)
                except grpc.RpcError as error:
                    assert error.code() in _REFUSED, f"{process.name()} answers {error.code()} to {method}"
                    if error.code() == grpc.StatusCode.UNAVAILABLE:
                        return refused  # it speaks HTTP
                    if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                        refused.add(kind)
                else:
                    raise AssertionError(f"{process.name()} lets strangers call {method}")
    return refused


def require_no_member(root: psutil.Process) -> None:
    """Assert that a driver of another user, which knows no token, does not join the cluster below ``root``."""
    (gcs,) = {port for process, _, port in listeners(root) if process.name() == "gcs_server"}
    stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    driver = subprocess.run(
        [sys.executable, "-c", _JOIN, f"127.0.0.1:{gcs}"],
        env=stranger | {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert driver.returncode != 0 and "joined" not in driver.stdout, driver.stdout
    assert "Failed to connect to Ray" in driver.stderr, driver.stderr
