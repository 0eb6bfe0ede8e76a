"""Makes the checked-in gRPC stubs from the .proto files beside them: `python -m serve.protocol.stubs`."""

import sys
from pathlib import Path

PROTO_FILES = ("open_inference.proto", "policy.proto")


def generate(output: Path) -> None:
    """Write NAME_pb2.py and NAME_pb2_grpc.py of every .proto into `output`/serve/protocol.

    Needs grpcio-tools. Its version must not be newer than the oldest protobuf and grpcio that run the stubs.
    Raises RuntimeError if a .proto does not compile; protoc says why on stderr.
    """
    from grpc_tools import protoc

    root = Path(__file__).resolve().parents[2]
    names = [f"serve/protocol/{name}" for name in PROTO_FILES]  # so that the stubs import each other by this path
    code = protoc.main(["protoc", f"-I{root}", f"--python_out={output}", f"--grpc_python_out={output}", *names])
    if code:
        raise RuntimeError(f"protoc failed with exit code {code} on {names}.")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2])
